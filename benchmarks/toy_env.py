"""The toy env, in a file without torch: worker processes import the file of what they make."""

from __future__ import annotations

from typing import Any

import gymnasium as gym


def toy_env(label: str = "reach-red", **kwargs: Any) -> gym.Env:
    """The toy env for "task" or "task:variant"."""
    task, _, variant = label.partition(":")
    return gym.make("vla_rl_envs:VLA/Toy-v0", task=task, variant=variant or "original", **kwargs)
