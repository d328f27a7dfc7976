"""The toy env of the tests, in a file without torch: worker processes import the file of what they make."""

from typing import Any

import gymnasium as gym


def toy_env(label: str = "reach-red", **kwargs: Any) -> gym.Env:
    task, _, variant = label.partition(":")
    return gym.make("vla_rl_envs:VLA/Toy-v0", task=task, variant=variant or "original", **kwargs)
