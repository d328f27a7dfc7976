"""Whether an environment fits what is to act in it: actions in [-1, 1], as many as the policy's."""

from __future__ import annotations

import gymnasium as gym
import numpy as np


def require_unit_box(space: gym.Space, action_dim: int | None = None) -> None:
    """Refuse an environment whose actions are not `action_dim` numbers in [-1, 1]; None takes any number of them.

    Raises:
        ValueError: with what to do.
    """
    low, high = getattr(space, "low", None), getattr(space, "high", None)
    if low is None or high is None or not (np.all(low == -1) and np.all(high == 1)):
        raise ValueError(
            f"the env's action space is {space}; policies act in [-1, 1]: use gymnasium.wrappers.RescaleAction"
        )
    if action_dim is not None and space.shape != (action_dim,):
        raise ValueError(
            f"the env's action space is {space}, the policy's head was built for {action_dim} entries; make them agree"
        )
