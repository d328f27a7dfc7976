import copy
import json
import os

os.environ.setdefault("LP_NUM_THREADS", "1")

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv
from vla_rl_envs.kitchen_tasks import EXPERT_TASKS, INSTRUCTIONS, RL_TASKS, TASK_TABLE, TASKS, UNSEEN_TASKS, VARIANTS

gymnasium_robotics = pytest.importorskip("gymnasium_robotics")
pytestmark = pytest.mark.simulator

ID = "vla_rl_envs:VLA/FrankaKitchen-v0"


def make(task="slide-door-open", **kwargs):
    return gym.make(ID, task=task, **kwargs)


def thunks(n, **kwargs):
    return [lambda: make(**kwargs) for _ in range(n)]


def actions(n, seed=0, shape=(9,)):
    return np.random.default_rng(seed).uniform(-1, 1, (n, *shape)).astype(np.float32)


def rollout(env, *, seed, steps=15):
    """Every number of an episode: observations and MuJoCo's state."""
    observation, _ = env.reset(seed=seed)
    rows = [observation["state"], env.unwrapped.data.qpos.copy(), env.unwrapped.model.body("desk").pos.copy()]
    for action in actions(steps):
        rows += [env.step(action)[0]["state"], env.unwrapped.data.qpos.copy()]
    return np.concatenate(rows)


def test_passes_gymnasium_checker():
    check_env(make(image_size=32).unwrapped, skip_render_check=True)
    check_env(make(image_size=32, render_mode="rgb_array").unwrapped)


def test_observation_convention():
    env = make(task="light-on", image_size=48)
    observation, info = env.reset(seed=0)
    assert observation["image"].shape == (48, 48, 3) and observation["image"].dtype == np.uint8
    assert info == {"success": False, "instruction": "switch on the light"}
    assert env.unwrapped.instructions[observation["task_id"]] == info["instruction"]
    observation, _, _, _, info = env.step(np.ones(9, np.float32))
    assert observation["state"].dtype == np.float32
    np.testing.assert_allclose(observation["state"], env.unwrapped.data.qpos[:9], atol=1.1e-3)
    assert info == {"success": False}


def test_without_variation_it_is_the_simulator_bit_for_bit():
    gym.register_envs(gymnasium_robotics)
    theirs = gym.make("FrankaKitchen-v1", tasks_to_complete=["slide cabinet"], object_noise_ratio=0.0).unwrapped
    ours = make(variation=0.0, render_quality="none").unwrapped
    ours.reset(seed=4), theirs.reset(seed=4)
    np.testing.assert_array_equal(ours.data.qpos, theirs.data.qpos)
    rng = np.random.default_rng(7)
    theirs.robot_env.np_random, ours.simulator.np_random = np.random.default_rng(1), np.random.default_rng(1)
    theirs.robot_env._last_robot_qpos = ours.simulator._last_robot_qpos = ours.data.qpos[:9].copy()
    for _ in range(20):
        action = rng.uniform(-1, 1, 9).astype(np.float32)
        ours.step(action)
        theirs.robot_env.step(action.astype(np.float64))
        np.testing.assert_array_equal(ours.data.qpos, theirs.data.qpos)


def test_reset_seed_is_honest_after_other_episodes():
    env = make(render_quality="none")
    first = rollout(env, seed=5)
    unseeded, _ = env.reset()
    rollout(env, seed=6, steps=30)
    np.testing.assert_array_equal(first, rollout(env, seed=5))
    np.testing.assert_array_equal(unseeded["state"], env.reset()[0]["state"])
    np.testing.assert_array_equal(first, rollout(make(render_quality="none"), seed=5))
    assert not np.array_equal(first, rollout(env, seed=6))


def test_variation_moves_the_arm_and_the_whole_kitchen_within_bounds():
    env, fixed = make(render_quality="none").unwrapped, make(render_quality="none", variation=0.0).unwrapped
    fixed.reset(seed=0)
    arms, shifts = [], []
    for seed in range(40):
        env.reset(seed=seed)
        arms.append(env.data.qpos[:7] - fixed.data.qpos[:7])
        shifts.append(env.data.site("slide_site").xpos - fixed.data.site("slide_site").xpos)
        kettle = env.data.qpos[23:26] - fixed.data.qpos[23:26]
        np.testing.assert_allclose(kettle, shifts[-1], atol=1e-9)
        np.testing.assert_array_equal(env.data.qpos[7:23], fixed.data.qpos[7:23])
    for moves, bound in ((np.array(arms), 0.1), (np.array(shifts)[:, :2], 0.05)):
        assert (np.abs(moves) <= bound + 1e-9).all() and (np.abs(moves).max(axis=0) > 0.8 * bound).all()
        assert (np.abs(moves.mean(axis=0)) < 0.3 * bound).all()
    before = fixed.data.qpos.copy()
    fixed.reset(seed=3)
    np.testing.assert_array_equal(before, fixed.data.qpos)


def test_environments_do_not_share_colours_or_places():
    one, two = make(render_quality="none").unwrapped, make(variant="red", render_quality="none").unwrapped
    one.reset(seed=0), two.reset(seed=1)
    assert not np.array_equal(one.model.body("desk").pos, two.model.body("desk").pos)
    np.testing.assert_allclose(
        two.model.material("M_slide_blue").rgba, VARIANTS["slide-door-open"]["red"]["M_slide_blue"]
    )
    np.testing.assert_allclose(one.model.material("M_slide_blue").rgba, (0.46, 0.5, 0.6, 1.0))
    same = make(render_quality="none").unwrapped
    same.reset(seed=1)
    np.testing.assert_array_equal(same.data.qpos, two.data.qpos)


def test_coloured_doors_look_coloured():
    red, yellow, blue = (
        make(variant=name, variation=0.0, image_size=128).reset(seed=0)[0]["image"][30, 90].astype(int)
        for name in ("red", "yellow", "original")
    )
    assert red[0] > 2 * red[1] and red[0] > 2 * red[2]
    assert yellow[0] > 2 * yellow[2] and yellow[1] > 1.5 * yellow[2]
    assert blue[2] > blue[0]


@pytest.mark.parametrize("task", [name for name in TASKS if name != "kettle"])
def test_success_is_the_joint_past_its_threshold(task):
    """MuJoCo's own joint of that name, put just short of the threshold and just beyond."""
    rule = TASK_TABLE[task]
    env = make(task=task, render_quality="none", terminate_on_success=False).unwrapped
    joint = env.model.joint(rule.joint)
    assert joint.qposadr[0] == rule.index and np.isclose(joint.range, rule.end).any()
    assert abs(rule.threshold) < abs(rule.end)
    for factor, expected in ((0.9, False), (1.06, True)):
        env.reset(seed=0)
        env.data.joint(rule.joint).qpos = factor * rule.threshold
        _, reward, terminated, _, info = env.step(np.zeros(9, np.float32))
        assert info["success"] is expected and reward == float(expected) and not terminated
    env.data.joint(rule.joint).qpos = 0.0
    _, reward, _, _, info = env.step(np.zeros(9, np.float32))
    assert info["success"] is True and reward == 0.0
    assert env.reset()[1]["success"] is False and env.step(np.zeros(9, np.float32))[4]["success"] is False


def test_kettle_has_to_stand_at_its_goal_in_the_moved_kitchen():
    env = make(task="kettle", render_quality="none").unwrapped
    env.reset(seed=2)
    start = env.data.qpos[23:26].copy()
    assert env.step(np.zeros(9, np.float32))[4]["success"] is False
    env.data.qpos[23:26] = start + (0.04, 0.4, 0.0)
    env.data.qvel[:] = 0.0
    assert env.step(np.zeros(9, np.float32))[4]["success"] is True
    env.reset(seed=2)
    env.data.qpos[23:26] = start + (0.04, 0.4, 0.1)
    env.data.qpos[26:30] = (np.sqrt(0.5), np.sqrt(0.5), 0.0, 0.0)
    assert env.step(np.zeros(9, np.float32))[4]["success"] is False


def test_termination_and_horizon():
    env = make(render_quality="none", horizon=3)
    env.reset(seed=0)
    assert [env.step(np.zeros(9, np.float32))[2:4] for _ in range(3)] == [(False, False), (False, False), (False, True)]
    env.reset(seed=0)
    env.unwrapped.data.joint("slide_cabinet").qpos = 0.4
    _, reward, terminated, truncated, _ = env.step(np.zeros(9, np.float32))
    assert reward == 1.0 and terminated and not truncated


@pytest.mark.slow
def test_sync_and_async_are_bit_identical():
    kwargs = {"horizon": 5, "image_size": 24}
    both = [SyncVectorEnv(thunks(2, **kwargs)), AsyncVectorEnv(thunks(2, **kwargs), context="forkserver")]
    results = []
    for envs in both:
        rows = [envs.reset(seed=11)[0]]
        rows += [envs.step(action)[0] for action in actions(12, shape=(2, 9))]
        results.append([{key: np.array(value) for key, value in row.items()} for row in rows])
        envs.close()
    for a, b in zip(*results, strict=True):
        for key in a:
            np.testing.assert_array_equal(a[key], b[key], err_msg=key)
    assert not np.array_equal(results[0][0]["state"][0], results[0][0]["state"][1])


@pytest.mark.parametrize("mode", list(AutoresetMode))
def test_autoreset_modes(mode):
    envs = SyncVectorEnv(thunks(2, horizon=3, render_quality="none", image_size=16), autoreset_mode=mode)
    assert envs.metadata["autoreset_mode"] == mode
    envs.reset(seed=0)
    zero = np.zeros((2, 9), np.float32)
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
    rollouts = [rollout(make(render_quality=q, image_size=24), seed=2, steps=4) for q in ("fast", "full", "none")]
    np.testing.assert_array_equal(rollouts[0], rollouts[1])
    np.testing.assert_array_equal(rollouts[0], rollouts[2])


def test_tables():
    assert len(TASKS) == len(set(INSTRUCTIONS)) == 10 and len(EXPERT_TASKS) == 5
    pairs = {(task, "original") for task in EXPERT_TASKS} | set(RL_TASKS) | set(UNSEEN_TASKS)
    assert len(pairs) == 7
    for task, variant in pairs:
        env = make(task=task, variant=variant, render_quality="none")
        assert env.unwrapped.instructions == INSTRUCTIONS


def test_unknown_names_suggest_the_nearest():
    with pytest.raises(ValueError, match=r"slide-door.*did you mean 'slide-door-open'"):
        make(task="slide-door")
    with pytest.raises(ValueError, match="did you mean 'red'"):
        make(variant="rde")
    with pytest.raises(ValueError, match=r"variant of 'light-on' 'red'"):
        make(task="light-on", variant="red")
    with pytest.raises(ValueError, match="variation=-1"):
        make(variation=-1)
    for variation in (np.nan, np.inf):
        with pytest.raises(ValueError, match=f"variation={variation} a finite number from 0 up"):
            make(variation=variation)


def test_spec_survives_json():
    env = make(task="light-on", horizon=7, variation=0.5)
    spec = gym.envs.registration.EnvSpec.from_json(env.spec.to_json())
    assert json.loads(env.spec.to_json())["entry_point"] == "vla_rl_envs.kitchen:FrankaKitchenEnv"
    assert gym.make(spec).unwrapped.variation == 0.5


@pytest.mark.slow
def test_the_fast_picture_is_the_full_one_but_for_shadows():
    import mujoco
    from skimage.metrics import structural_similarity

    env = make(task="microwave-open", image_size=128)
    fast = env.reset(seed=0)[0]["image"]
    inner = env.unwrapped
    pictures = []
    for shadows in (False, True):
        model = copy.copy(inner.model)
        model.vis.quality.offsamples *= shadows
        with mujoco.Renderer(model, 128, 128) as renderer:
            renderer.scene.flags[mujoco.mjtRndFlag.mjRND_SHADOW] = shadows
            renderer.scene.flags[mujoco.mjtRndFlag.mjRND_REFLECTION] = shadows
            renderer.update_scene(inner.data, inner._camera)
            pictures.append(renderer.render())
    unshadowed, full = pictures
    assert structural_similarity(fast, unshadowed, channel_axis=2) > 0.95
    assert structural_similarity(fast, full, channel_axis=2) > 0.7


def test_states_of_the_simulator_can_be_drawn():
    gymnasium_robotics = pytest.importorskip("gymnasium_robotics")
    from skimage.metrics import structural_similarity
    from vla_rl_envs.rendering import scene_renderer

    gym.register_envs(gymnasium_robotics)
    simulator = gym.make("FrankaKitchen-v1", robot_noise_ratio=0.0, object_noise_ratio=0.0)
    observation, _ = simulator.reset(seed=0)
    for _ in range(6):
        observation = simulator.step(np.full(9, 0.8, np.float32))[0]
    inner = simulator.unwrapped.robot_env
    env = make(image_size=96, variation=1.0).unwrapped
    env.reset(seed=3)
    before = env.data.qpos.copy()
    image = env.draw(observation["observation"])
    truth = scene_renderer(inner.model, env._camera, height=96, width=96).render(inner.model, inner.data, env._camera)
    assert structural_similarity(image, truth, channel_axis=2) > 0.99
    np.testing.assert_array_equal(env.data.qpos, before)
    with pytest.raises(ValueError, match=r"\(59,\)"):
        env.draw(np.zeros(30))


def test_an_action_of_another_shape_or_of_no_number_is_refused():
    env = make(render_quality="none", image_size=1).unwrapped
    env.reset(seed=0)
    for bad in (np.full(9, np.nan), np.array([np.inf] + [0.0] * 8), np.zeros(1), np.zeros((1, 9)), 0.0):
        with pytest.raises(ValueError, match=r"step got the action .*give \(9,\) finite numbers"):
            env.step(bad)
    env.step([0] * 9)  # whole numbers are numbers
