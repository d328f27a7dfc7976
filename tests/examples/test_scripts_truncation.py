"""Truncation is not termination: an environment that only ever runs out of time, against returns worked out by hand."""

from __future__ import annotations

from typing import ClassVar

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from scripts import EXAMPLES, RUNS, run_script

HORIZON, GAMMA, LAMBDA = 5, 0.9, 0.8


class Constant(gym.Env):
    """One unchanging frame, a reward of 1 per step, and a time limit: V is one number for all frames."""

    metadata: ClassVar[dict] = {"render_modes": ["rgb_array"]}
    instructions = ("reach the red square", "reach the blue square", "reach the green square")
    observation_space = spaces.Dict(
        {
            "image": spaces.Box(0, 255, (32, 32, 3), np.uint8),
            "state": spaces.Box(-1.0, 1.0, (2,), np.float32),
            "task_id": spaces.Discrete(3),
        }
    )
    action_space = spaces.Box(-1.0, 1.0, (2,), np.float32)

    def __init__(self, task="", variant="", render_mode=None):
        self.render_mode, self.steps = render_mode, 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        return self.frame(), {"success": False}

    def step(self, action):
        self.steps += 1
        return self.frame(), 1.0, False, self.steps == HORIZON, {"success": self.steps == HORIZON}

    def frame(self):
        return {"image": np.full((32, 32, 3), 90, np.uint8), "state": np.zeros(2, np.float32), "task_id": np.int64(0)}


@pytest.fixture(autouse=True)
def registered():
    gym.register("test/Constant-v0", entry_point=Constant)
    yield
    del gym.registry["test/Constant-v0"]


def run(monkeypatch, folder, name, sft, demos, path=None):
    """Three iterations, in which only the critic learns, so that V is not 0 in the last."""
    options = RUNS[name].format(sft=sft, demos=demos)
    options += f" --env-id test/Constant-v0 --eval-episodes 0 --gamma {GAMMA} --dtype float32"
    if name != "sacfd_latent.py":
        options += f" --gae-lambda {LAMBDA} --critic-warmup-iterations 9 --critic-learning-rate 1e-2"
    return run_script(monkeypatch, folder, path or name, options)


def mutated(tmp_path, name, right, wrong):
    """The script with one expression replaced: what it would be if a time limit counted as an end."""
    source = (EXAMPLES / name).read_text()
    assert source.count(right) == 1
    path = tmp_path / "mutant" / name
    path.parent.mkdir()
    path.write_text(source.replace(right, wrong))
    return path


def returns_are_those_of_an_endless_task(made):
    """Compare with GAE by hand: n steps before the limit, with delta = r + gamma V - V at every one of them.

    The advantage is the geometric sum delta (1 - (gamma lambda)^n) / (1 - gamma lambda), and the return that plus V.
    """
    values, returns, valid = (made[key].double().numpy() for key in ("values", "returns", "valid"))
    value = values[0, 0]
    assert value > 0.1 and np.allclose(values, value, atol=1e-5)
    checked = 0
    for env in range(values.shape[1]):
        resets = np.flatnonzero(valid[:, env] == 0)
        for t in np.flatnonzero(valid[:, env]):
            left = resets[resets > t]
            if not len(left):
                continue  # cut by the rollout's end, not by the limit
            n = left[0] - t
            assert 1 <= n <= HORIZON
            delta = 1 + GAMMA * value - value
            expected = delta * (1 - (GAMMA * LAMBDA) ** n) / (1 - GAMMA * LAMBDA) + value
            checked += 1
            if abs(returns[t, env] - expected) > 1e-4:
                return False
    assert checked > 30
    return True


@pytest.mark.parametrize(
    "name",
    ["ppo_frozen_vlm.py", "ppo_full_vlm.py", "ppo_replay_vlm.py", "ire_vla_metaworld.py", "ire_vla_franka_kitchen.py"],
)
def test_returns_go_on_beyond_a_time_limit(name, sft, demos, tmp_path, monkeypatch):
    assert returns_are_those_of_an_endless_task(run(monkeypatch, tmp_path, name, sft, demos))
    path = mutated(tmp_path, name, "~terminations[t]", "~dones[t]")
    assert not returns_are_those_of_an_endless_task(run(monkeypatch, path.parent, name, sft, demos, path))


def test_targets_of_sac_go_on_beyond_a_time_limit(sft, demos, tmp_path, monkeypatch):
    def discounts_are_those_of_an_endless_task(made):
        batch = made["online"].sample(200, GAMMA, 3, torch.Generator().manual_seed(0))
        steps = (batch["rewards"][:, None] - torch.tensor([1, 1 + GAMMA, 1 + GAMMA + GAMMA**2])).abs().argmin(1) + 1
        assert set(steps.tolist()) == {1, 2, 3}  # look ahead to the limit or three steps
        return torch.allclose(batch["discounts"], GAMMA ** steps.float(), atol=1e-5)

    assert discounts_are_those_of_an_endless_task(run(monkeypatch, tmp_path, "sacfd_latent.py", sft, demos))
    path = mutated(tmp_path, "sacfd_latent.py", '~data["terminated"][slot]', '~data["done"][slot]')
    made = run(monkeypatch, path.parent, "sacfd_latent.py", sft, demos, path)
    assert not discounts_are_those_of_an_endless_task(made)
