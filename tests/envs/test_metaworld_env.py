import json

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv
from vla_rl_envs import make_expert
from vla_rl_envs.tasks import EXPERT_TASKS, INSTRUCTIONS, RL_TASKS, TASKS, UNSEEN_TASKS, VARIANTS

pytest.importorskip("metaworld")
pytestmark = pytest.mark.simulator

ID = "vla_rl_envs:VLA/MetaWorld-v0"


def make(task="drawer-open", **kwargs):
    return gym.make(ID, task=task, **kwargs)


def thunks(n, **kwargs):
    return [lambda: make(**kwargs) for _ in range(n)]


def actions(n, seed=0, shape=(4,)):
    return np.random.default_rng(seed).uniform(-1, 1, (n, *shape)).astype(np.float32)


def assert_same(a, b):
    assert a.keys() == b.keys()
    for key in a:
        np.testing.assert_array_equal(a[key], b[key], err_msg=key)


def run_expert(env, seed):
    expert = make_expert(env)
    env.reset(seed=seed)
    while True:
        _, reward, terminated, truncated, info = env.step(expert(env))
        if terminated or truncated:
            return info["success"], reward


def test_passes_gymnasium_checker():
    check_env(make().unwrapped, skip_render_check=True)
    check_env(make(render_mode="rgb_array").unwrapped)


def test_observation_convention():
    env = make(task="window-open", image_size=48)
    observation, info = env.reset(seed=0)
    assert observation["image"].shape == (48, 48, 3) and observation["image"].dtype == np.uint8
    assert observation["state"].shape == (4,) and observation["state"].dtype == np.float32
    state = env.step(np.ones(4, np.float32))[0]["state"]
    np.testing.assert_allclose(state[:3], env.unwrapped.data.body("hand").xpos, atol=1e-6)
    assert info == {"success": False, "instruction": "slide the window open"}
    assert env.unwrapped.instructions[observation["task_id"]] == info["instruction"]


def test_reset_seed_is_honest():
    env = make()
    first, _ = env.reset(seed=5)
    goal = env.unwrapped.expert_observation()[36:]
    for action in actions(60):
        env.step(action)
    unseeded, _ = env.reset()
    assert not np.array_equal(unseeded["image"], first["image"])
    again, _ = env.reset(seed=5)
    assert_same(first, again)
    np.testing.assert_array_equal(goal, env.unwrapped.expert_observation()[36:])
    after, _ = env.reset()
    assert_same(unseeded, after)
    env.reset(seed=6)
    assert not np.array_equal(goal, env.unwrapped.expert_observation()[36:])


def test_resets_equal_metaworld():
    """Same positions, then same physics, as Meta-World's own (slower) reset and step."""
    import mujoco
    from metaworld.env_dict import ALL_V3_ENVIRONMENTS

    for task in ("door-open", "peg-insert-side", "window-close", "lever-pull"):
        ours = make(task=task, render_quality="none")
        ours.reset(seed=9)
        for action in actions(30):
            ours.step(action)
        ours.reset(seed=3)
        theirs = ALL_V3_ENVIRONMENTS[f"{task}-v3"]()
        theirs._set_task_called = theirs.seeded_rand_vec = True
        theirs._partially_observable, theirs._freeze_rand_vec = False, False
        del theirs.sawyer_observation_space
        theirs.np_random = np.random.Generator(np.random.PCG64(3))
        mujoco.mj_resetData(theirs.model, theirs.data)
        theirs.reset_model()
        theirs._freeze_rand_vec = True
        observation, _ = theirs.reset()
        np.testing.assert_array_equal(observation, ours.unwrapped.expert_observation())
        for action in actions(30, seed=1):
            ours.step(action)
            observation = theirs.step(action)[0]
        np.testing.assert_array_equal(theirs.data.qpos, ours.unwrapped.data.qpos)
        np.testing.assert_array_equal(observation, ours.unwrapped.expert_observation())


def test_sub_envs_have_distinct_goals():
    envs = SyncVectorEnv(thunks(4, render_quality="none"))
    envs.reset(seed=0)
    goals = {tuple(env.unwrapped.expert_observation()[36:]) for env in envs.envs}
    assert len(goals) == 4


@pytest.mark.slow
def test_sync_and_async_are_bit_identical():
    kwargs = {"horizon": 8, "image_size": 32}
    both = [SyncVectorEnv(thunks(2, **kwargs)), AsyncVectorEnv(thunks(2, **kwargs), context="forkserver")]
    results = []
    for envs in both:
        rows = [envs.reset(seed=11)[0]]
        rows += [envs.step(action)[0] for action in actions(20, shape=(2, 4))]
        results.append([{key: np.array(value) for key, value in row.items()} for row in rows])
        envs.close()
    for a, b in zip(*results, strict=True):
        assert_same(a, b)


@pytest.mark.parametrize("mode", list(AutoresetMode))
def test_autoreset_modes(mode):
    envs = SyncVectorEnv(thunks(2, horizon=3, image_size=16), autoreset_mode=mode)
    assert envs.metadata["autoreset_mode"] == mode
    envs.reset(seed=0)
    zero = np.zeros((2, 4), np.float32)
    for _ in range(3):
        _, _, terminated, truncated, infos = envs.step(zero)
    assert truncated.all() and not terminated.any()
    if mode == AutoresetMode.SAME_STEP:
        assert infos["final_info"]["success"].tolist() == [False, False]
        assert infos["_final_obs"].all() and infos["final_obs"][0]["image"].shape == (16, 16, 3)
    if mode == AutoresetMode.DISABLED:
        envs.reset(options={"reset_mask": truncated})
    _, reward, _, truncated, infos = envs.step(zero)
    assert not truncated.any() and (reward == 0).all()
    assert "success" in infos


def test_physics_does_not_depend_on_rendering():
    trajectories = []
    for quality in ("fast", "full", "none"):
        env = make(task="door-open", render_quality=quality, image_size=24)
        env.reset(seed=2)
        rows = []
        for action in actions(12):
            env.step(action)
            rows.append(np.concatenate([env.unwrapped.data.qpos, env.unwrapped.data.qvel]))
        trajectories.append(np.array(rows))
    np.testing.assert_array_equal(trajectories[0], trajectories[1])
    np.testing.assert_array_equal(trajectories[0], trajectories[2])


def test_success_reward_and_termination():
    sparse = run_expert(make(render_quality="none"), seed=0)
    assert sparse == (True, 1.0)
    env = make(render_quality="none", terminate_on_success=False, horizon=150)
    expert = make_expert(env)
    env.reset(seed=0)
    rewards, successes = [], []
    for _ in range(150):
        _, reward, terminated, truncated, info = env.step(expert(env))
        assert not terminated
        rewards.append(reward)
        successes.append(info["success"])
    assert truncated and sum(rewards) == 1.0
    first = rewards.index(1.0)
    assert not any(successes[:first]) and all(successes[first:])
    dense = make(render_quality="none", reward="dense")
    dense.reset(seed=0)
    assert 0 < dense.step(np.zeros(4, np.float32))[1] < 10


@pytest.mark.slow
def test_all_tasks_construct_and_reset():
    assert len(TASKS) == len(set(INSTRUCTIONS)) == 50
    for task_id, task in enumerate(TASKS):
        env = make(task=task, render_quality="none")
        observation, info = env.reset(seed=0)
        assert observation["task_id"] == task_id and info["instruction"] == INSTRUCTIONS[task_id]
        assert np.isfinite(env.step(env.action_space.sample())[0]["state"]).all()


def test_experts_solve_a_handful():
    for task in ("reach", "button-press-topdown", "window-close", "coffee-button"):
        assert sum(run_expert(make(task=task, render_quality="none"), seed)[0] for seed in range(3)) == 3, task


def test_expert_actions_are_clipped():
    env = make(task="drawer-open", render_quality="none")
    expert = make_expert(env)
    env.reset(seed=0)
    action = expert(env)
    assert action.dtype == np.float32 and np.abs(action).max() <= 1.0


def test_variants_change_looks_and_positions_only_where_said():
    original, new = make(render_quality="none"), make(variant="recoloured", render_quality="none")
    original.reset(seed=1), new.reset(seed=1)
    np.testing.assert_array_equal(original.unwrapped.data.qpos, new.unwrapped.data.qpos)
    assert not np.array_equal(original.unwrapped.model.mat_rgba, new.unwrapped.model.mat_rgba)
    for task, variants in VARIANTS.items():
        for name, variant in variants.items():
            if variant.low is None:
                continue
            env = make(task=task, variant=name, render_quality="none").unwrapped
            places = [env.reset(seed=seed) and env.simulator.obj_init_pos.copy() for seed in range(5)]
            assert (np.array(places) >= np.array(variant.low) - 1e-9).all()
            assert (np.array(places) <= np.array(variant.high) + 1e-9).all()


def test_task_lists_are_disjoint():
    assert len(EXPERT_TASKS) == 25 and len(RL_TASKS) == 5 and len(UNSEEN_TASKS) == 10
    pairs = {(task, "original") for task in EXPERT_TASKS} | set(RL_TASKS) | set(UNSEEN_TASKS)
    assert len(pairs) == 40
    for task, variant in pairs:
        assert task in TASKS and (variant == "original" or variant in VARIANTS[task])


def test_unknown_names_suggest_the_nearest():
    with pytest.raises(ValueError, match=r"drawer-opne.*did you mean 'drawer-open'"):
        make(task="drawer-opne")
    with pytest.raises(ValueError, match="did you mean 'new'"):
        make(variant="neww")
    with pytest.raises(ValueError, match=r"camera 'nowhere'.*corner2"):
        make(camera="nowhere")


def test_spec_survives_json():
    env = make(task="door-open", horizon=7)
    spec = gym.envs.registration.EnvSpec.from_json(env.spec.to_json())
    assert json.loads(env.spec.to_json())["entry_point"] == "vla_rl_envs.metaworld:MetaWorldEnv"
    assert gym.make(spec).unwrapped.horizon == 7


@pytest.mark.parametrize("task", ["faucet-open", "door-unlock", "handle-pull", "door-close", "window-open"])
def test_a_close_start_moves_the_part_that_the_task_is_about(task):
    import mujoco

    env = gym.make("vla_rl_envs:VLA/MetaWorld-v0", task=task, render_quality="none").unwrapped
    positions, distances = [], []
    for closeness in (0.0, 0.5, 0.75, 1.0, None):
        env.reset(seed=3, options=None if closeness is None else {"closeness": closeness})
        positions.append(float(env.data.qpos[9]))  # behind the robot's seven joints and two fingers
        distances.append(np.linalg.norm(env.simulator.get_endeff_pos() - env.simulator._get_pos_objects()[:3]))
        for _ in range(5):
            *_, info = env.step(np.zeros(4))
            assert not info["success"]
    assert positions[0] == positions[4] and distances[0] == distances[4]
    assert positions[1] == pytest.approx(positions[0], abs=0.02)
    way = positions[3] - positions[0]
    assert positions[2] - positions[0] == pytest.approx(way / 2, rel=0.05)
    assert distances[1] == pytest.approx(0.06, abs=0.04) and distances[0] > distances[1]
    # A ninth more of the way, and it is solved.
    env.reset(seed=3)
    env.data.qpos[9] = positions[0] + way / 0.9
    mujoco.mj_forward(env.model, env.data)
    assert env.step(np.zeros(4))[4]["success"]


def test_a_close_start_is_the_same_in_the_first_environment_of_a_process_and_the_next(monkeypatch):
    monkeypatch.setattr("vla_rl_envs.metaworld._simulators", {})
    observations = []
    for _ in range(2):
        env = gym.make("vla_rl_envs:VLA/MetaWorld-v0", task="door-unlock", render_quality="none").unwrapped
        env.reset(seed=1, options={"closeness": 0.7})
        for _ in range(20):
            env.step(np.array([0.2, 1.0, -0.5, 0.0]))
        observations.append(env.expert_observation())
    np.testing.assert_array_equal(*observations)


def test_a_close_start_moves_the_hand_alone_where_a_spring_holds_the_button():
    env = gym.make("vla_rl_envs:VLA/MetaWorld-v0", task="button-press", render_quality="none").unwrapped
    hands, distances, things = [], [], []
    for closeness in (0.0, 0.5, 1.0, None):
        env.reset(seed=3, options=None if closeness is None else {"closeness": closeness})
        hand, thing = env.simulator.get_endeff_pos().copy(), env.simulator._get_pos_objects()[:3].copy()
        hands.append(hand)
        things.append(thing)
        distances.append(np.linalg.norm(hand - thing))
    np.testing.assert_array_equal(hands[0], hands[3])
    for thing in things:
        np.testing.assert_allclose(thing, things[0], atol=1e-3)
    assert distances[1] == pytest.approx((distances[0] + 0.06) / 2, abs=0.01)
    assert distances[2] == pytest.approx(0.06, abs=0.01)
    with pytest.raises(ValueError, match=r"closeness=1\.5"):
        env.reset(options={"closeness": 1.5})


def test_an_action_of_another_shape_or_of_no_number_is_refused():
    env = make(render_quality="none").unwrapped
    env.reset(seed=0)
    for bad in (np.full(4, np.nan), np.array([np.inf] + [0.0] * 3), np.zeros(1), np.zeros((1, 4)), 0.0):
        with pytest.raises(ValueError, match=r"step got the action .*give \(4,\) finite numbers"):
            env.step(bad)
    env.step([0] * 4)  # whole numbers are numbers
