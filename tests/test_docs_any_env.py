"""The code blocks of docs/guides/any-env.md, run as they stand and compared with the environments underneath."""

import re
from pathlib import Path

import gymnasium as gym
import mujoco
import numpy as np
import pytest
from gymnasium.envs.box2d.lunar_lander import heuristic

GUIDE = Path(__file__).parents[1] / "docs" / "guides" / "any-env.md"
BLOCKS = re.findall(r"```python\n(.*?)```", GUIDE.read_text(), flags=re.DOTALL)
IDS = ("FetchReach-v4", "AdroitHandDoor-v1", "LunarLander-v3")


def run(name):
    """What the block about an environment leaves behind: its names."""
    (block,) = [block for block in BLOCKS if name in block]
    namespace = {}
    exec(block, namespace)
    return namespace


def test_every_block_is_short_and_there_is_one_for_each_environment():
    assert [name in block for name, block in zip(IDS, BLOCKS, strict=True)] == [True] * 3
    for block in BLOCKS:
        assert len([line for line in block.splitlines() if line.strip()]) <= 10


@pytest.mark.parametrize(
    ("name", "kwargs", "state_of"),
    [
        pytest.param("FetchReach-v4", {}, lambda raw: raw["observation"], marks=pytest.mark.simulator),
        pytest.param("AdroitHandDoor-v1", {}, lambda raw: raw[:27], marks=pytest.mark.simulator),
        ("LunarLander-v3", {"continuous": True}, lambda raw: raw),
    ],
    ids=IDS,
)
def test_what_the_block_makes_is_what_lies_underneath(name, kwargs, state_of):
    env = run(name)["env"]
    bare = gym.make(name, **kwargs)
    obs, info = env.reset(seed=7)
    raw, _ = bare.reset(seed=7)
    assert info["success"] is False and info["instruction"] == env.instructions[obs["task_id"]]
    first = obs["image"]
    env.action_space.seed(7)
    for _ in range(5):
        np.testing.assert_allclose(obs["state"], state_of(raw), rtol=1e-6)
        assert env.observation_space["state"].shape == obs["state"].shape
        assert obs["image"].dtype == np.uint8 and obs["image"].shape == env.observation_space["image"].shape
        assert obs["image"].std() > 10
        action = env.action_space.sample()
        obs, reward, *_, info = env.step(action)
        raw, raw_reward, *_ = bare.step(action)
        assert reward == pytest.approx(raw_reward) and info["success"] is False
    assert not np.array_equal(obs["image"], first), "something has moved"


@pytest.mark.simulator
def test_fetch_succeeds_when_the_gripper_is_driven_to_the_dot():
    env = run("FetchReach-v4")["env"]
    for seed in range(3):
        env.reset(seed=seed)
        flags, near = [], []
        for _ in range(50):
            inner = env.unwrapped
            away = inner.goal - inner.data.site("robot0:grip").xpos
            *_, info = env.step(np.append(np.clip(away / 0.1, -1, 1), 0).astype(np.float32))
            flags.append(info["success"])
            near.append(bool(np.linalg.norm(inner.goal - inner.data.site("robot0:grip").xpos) < 0.05))
        assert flags == near and not flags[0] and flags[-1]


@pytest.mark.simulator
def test_adroit_succeeds_when_the_door_stands_open():
    env = run("AdroitHandDoor-v1")["env"]
    env.reset(seed=0)
    inner, still = env.unwrapped, np.zeros(28, np.float32)
    closed = env.step(still)[4]["success"]
    inner.data.joint("door_hinge").qpos = 1.5
    mujoco.mj_forward(inner.model, inner.data)
    obs, *_, info = env.step(still)
    assert (closed, info["success"]) == (False, True)
    assert obs["state"].shape == (27,)


def test_lander_succeeds_between_the_flags_and_not_by_a_crash():
    names = run("LunarLander-v3")
    env, beside = names["env"], np.array([0.4, 0, 0, 0, 0, 0, 1, 1])
    assert not names["landed"](beside, 100, True, False, {})

    def last(policy, seed):
        obs, _ = env.reset(seed=seed)
        while True:
            obs, _, terminated, truncated, info = env.step(policy(obs["state"]))
            if terminated or truncated:
                return obs["state"], info["success"]
            assert info["success"] is False

    state, success = last(lambda state: heuristic(env.unwrapped, state), seed=1)
    assert success is True and abs(state[0]) < 0.2 and state[6] and state[7]
    _, success = last(lambda state: np.array([-1, 0], np.float32), seed=1)
    assert success is False
