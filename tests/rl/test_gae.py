import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from vla_rl.rl.gae import gae

GAMMA, LAMBDA = 0.9, 0.8


def columns(*rows):
    return torch.tensor(rows, dtype=torch.float64).T


def flags(*rows):
    return torch.tensor(rows, dtype=torch.bool).T


def test_hand_calculation():
    # One env, three steps, the episode terminates at the last.
    # delta_2 = 3 - 0.3 = 2.7; delta_1 = 2 + .9*.3 - .2 = 2.07; delta_0 = 1 + .9*.2 - .1 = 1.08
    # A_2 = 2.7; A_1 = 2.07 + .72*2.7 = 4.014; A_0 = 1.08 + .72*4.014 = 3.97008
    advantages, returns = gae(
        columns([1.0, 2.0, 3.0]),
        columns([0.1, 0.2, 0.3]),
        next_values=columns([0.2, 0.3, 7.0]),
        terminated=flags([0, 0, 1]),
        done=flags([0, 0, 1]),
        valid=flags([1, 1, 1]),
        gamma=GAMMA,
        gae_lambda=LAMBDA,
    )
    torch.testing.assert_close(advantages, columns([3.97008, 4.014, 2.7]))
    torch.testing.assert_close(returns, columns([4.07008, 4.214, 3.0]))


def test_a_truncation_bootstraps_but_cuts_the_trace():
    # delta_0 = 1 + .9*5 - 0 = 5.5, and the next episode's delta_1 = 10 must not leak into it.
    advantages, _ = gae(
        columns([1.0, 10.0]),
        columns([0.0, 0.0]),
        next_values=columns([5.0, 0.0]),
        terminated=flags([0, 0]),
        done=flags([1, 0]),
        valid=flags([1, 1]),
        gamma=GAMMA,
        gae_lambda=LAMBDA,
    )
    torch.testing.assert_close(advantages, columns([5.5, 10.0]))


def test_an_invalid_row_contributes_nothing_even_when_it_holds_rubbish():
    # Env 0 has a reset row in the middle, env 1 is the same data without that row: the real rows must agree.
    def run(rewards, values, next_values, done, valid):
        return gae(
            columns(rewards),
            columns(values),
            next_values=columns(next_values),
            terminated=flags([0] * len(done)),
            done=flags(done),
            valid=flags(valid),
            gamma=GAMMA,
            gae_lambda=LAMBDA,
        )

    nan = float("nan")
    with_reset, returns = run(
        [1.0, 2.0, nan, 3.0], [0.1, 0.2, 99.0, 0.3], [0.2, 0.5, 1.0, 0.7], [0, 1, 0, 0], [1, 1, 0, 1]
    )
    without, _ = run([1.0, 2.0, 3.0], [0.1, 0.2, 0.3], [0.2, 0.5, 0.7], [0, 1, 0], [1, 1, 1])
    torch.testing.assert_close(with_reset[[0, 1, 3]], without)
    assert with_reset[2].item() == 0.0 and returns[2].item() == 0.0


def test_shapes_must_agree():
    matrix = torch.zeros(3, 2)
    with pytest.raises(ValueError, match=r"next_values \(2, 3\)"):
        gae(
            matrix,
            matrix,
            next_values=matrix.T,
            terminated=matrix,
            done=matrix,
            valid=matrix,
            gamma=GAMMA,
            gae_lambda=LAMBDA,
        )


class Endless(gym.Env):
    """Reward 1 for ever and only time limits: with gamma = .99 every state is worth 100."""

    observation_space = gym.spaces.Box(0, np.inf, (1,), np.float64)
    action_space = gym.spaces.Discrete(2)

    def __init__(self, horizon):
        self.horizon = horizon

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return np.zeros(1), {}

    def step(self, action):
        self.t += 1
        return np.full(1, float(self.t)), 1.0, False, self.t >= self.horizon, {}


def rollout(mode, *, rows=25):
    """Collect in one autoreset mode, as the docstring of ``gae`` says, with the true value function V = 100."""
    envs = SyncVectorEnv([lambda: Endless(4), lambda: Endless(7)], autoreset_mode=mode)
    obs, _ = envs.reset(seed=0)
    value = lambda observation: torch.full((2,), 100.0, dtype=torch.float64)  # noqa: E731
    names = ("rewards", "values", "next_values", "terminated", "done", "valid")
    data = {name: [] for name in names}
    previous_done = np.zeros(2, bool)
    for _ in range(rows):
        if mode is AutoresetMode.DISABLED and previous_done.any():
            obs, _ = envs.reset(options={"reset_mask": previous_done})
        values = value(obs)
        obs, reward, terminated, truncated, _ = envs.step(np.zeros(2, np.int64))
        valid = ~previous_done if mode is AutoresetMode.NEXT_STEP else np.ones(2, bool)
        previous_done = terminated | truncated
        row = (reward, values, value(obs), terminated, previous_done, valid)
        for name, entry in zip(names, row, strict=True):
            data[name].append(torch.as_tensor(entry))
    return {name: torch.stack(entries) for name, entries in data.items()}


@pytest.mark.parametrize("mode", list(AutoresetMode))
def test_a_true_value_function_has_no_advantage_in_any_autoreset_mode(mode):
    data = rollout(mode)
    assert data["done"].any()
    assert (~data["valid"]).any() == (mode is AutoresetMode.NEXT_STEP)
    advantages, returns = gae(**data, gamma=0.99, gae_lambda=0.95)
    torch.testing.assert_close(advantages, torch.zeros_like(advantages), atol=1e-9, rtol=0)
    torch.testing.assert_close(returns[data["valid"]], torch.full_like(returns[data["valid"]], 100.0))


def test_the_mistake_that_this_guards_against_is_large():
    data = rollout(AutoresetMode.SAME_STEP)
    data["terminated"] = data["done"]
    advantages, _ = gae(**data, gamma=0.99, gae_lambda=0.95)
    assert advantages[data["done"]].max() < -90
