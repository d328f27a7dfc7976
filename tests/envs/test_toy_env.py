import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from vla_rl_envs import make_expert


def make(**kwargs):
    return gym.make("vla_rl_envs:VLA/Toy-v0", **kwargs)


def test_passes_gymnasium_checker():
    check_env(make(render_mode="rgb_array").unwrapped)


@pytest.mark.parametrize("task", ["reach-red", "reach-blue", "reach-green"])
@pytest.mark.parametrize("variant", ["original", "new"])
def test_expert_solves_every_episode(task, variant):
    env = make(task=task, variant=variant)
    expert = make_expert(env)
    for seed in range(10):
        _, info = env.reset(seed=seed)
        assert info["success"] is False and task.removeprefix("reach-") in info["instruction"]
        done = False
        while not done:
            _, reward, terminated, truncated, info = env.step(expert(env))
            done = terminated or truncated
        assert info["success"] and reward == 1.0 and terminated


def test_instruction_decides_where_to_go():
    """In one and the same picture, the experts of two tasks go to different places."""
    red, blue = make(task="reach-red"), make(task="reach-blue")
    a, b = red.reset(seed=0)[0], blue.reset(seed=0)[0]
    np.testing.assert_array_equal(a["image"], b["image"])
    assert a["task_id"] != b["task_id"]
    assert not np.array_equal(red.unwrapped.target, blue.unwrapped.target)


def test_picture_shows_the_target_where_it_is():
    env = make(image_size=64)
    image = env.reset(seed=3)[0]["image"].astype(int)
    rows, columns = np.nonzero((image == (220, 40, 40)).all(axis=-1))
    scale = 63 / 2.2
    x, y = columns.mean() / scale - 1.1, 1.1 - rows.mean() / scale
    np.testing.assert_allclose([x, y], env.unwrapped.target, atol=0.05)


def test_seeds_and_horizon():
    env = make(horizon=4)
    first = env.reset(seed=1)[0]["image"]
    assert not np.array_equal(env.reset()[0]["image"], first)
    np.testing.assert_array_equal(env.reset(seed=1)[0]["image"], first)
    away = -np.sign(env.unwrapped.target - env.unwrapped.position).astype(np.float32)
    flags = [env.step(away)[2:4] for _ in range(4)]
    assert flags == [(False, False)] * 3 + [(False, True)]


def test_unknown_task_is_an_error():
    with pytest.raises(ValueError, match=r"reach-pink.*reach-red"):
        make(task="reach-pink")


def test_a_closeness_outside_its_range_is_refused():
    for wrong in (5, -0.1, float("nan")):
        with pytest.raises(ValueError, match=r"closeness=.*; give 0 \(the usual start\) to 1"):
            make().reset(seed=0, options={"closeness": wrong})


def test_no_expert_for_foreign_environments():
    with pytest.raises(TypeError, match="CartPole"):
        make_expert(gym.make("CartPole-v1"))


def test_an_action_of_another_shape_or_of_no_number_is_refused():
    env = make().unwrapped
    env.reset(seed=0)
    for bad in (np.full(2, np.nan), np.array([np.inf] + [0.0] * 1), np.zeros(1), np.zeros((1, 2)), 0.0):
        with pytest.raises(ValueError, match=r"step got the action .*give \(2,\) finite numbers"):
            env.step(bad)
    env.step([0] * 2)  # whole numbers are numbers
