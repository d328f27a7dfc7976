"""Scripted experts for the environments of this package."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

Expert = Callable[[gym.Env], NDArray[np.float32]]


def make_expert(env: gym.Env) -> Expert:
    """Scripted expert for the task of ``env`` (possibly wrapped).

    Meta-World: its own policy for the task, on the 39-d observation with the goal, clipped to [-1, 1]. Franka Kitchen:
    way points at the handles, followed by inverse kinematics. Toy: a straight line to the named square. Call it once
    per step with the environment; it keeps no state between episodes.

    Returns:
        ``expert(env) -> action``, float32 [A] in [-1, 1].

    Raises:
        TypeError: if there is no expert for this environment.
    """
    name = type(env.unwrapped).__name__
    if name == "MetaWorldEnv":
        return _metaworld_expert(env.unwrapped.task)  # pyright: ignore[reportAttributeAccessIssue]
    if name == "FrankaKitchenEnv":
        from vla_rl_envs.kitchen_experts import KitchenExpert

        return KitchenExpert(env.unwrapped.task)  # pyright: ignore[reportAttributeAccessIssue]
    if name == "ToyEnv":
        return _toy_expert
    raise TypeError(
        f"no scripted expert for {name}: use VLA/MetaWorld-v0, VLA/FrankaKitchen-v0 or VLA/Toy-v0, or write your own "
        "callable."
    )


def _metaworld_expert(task: str) -> Expert:
    from metaworld.policies import ENV_POLICY_MAP

    # Clipping is ours; Meta-World would warn about it once per call site.
    warnings.filterwarnings("ignore", message=r"Constant\(s\) may be too high")
    policy = ENV_POLICY_MAP[f"{task}-v3"]()

    def expert(env: gym.Env) -> NDArray[np.float32]:
        inner: Any = env.unwrapped
        return np.clip(policy.get_action(inner.expert_observation()), -1.0, 1.0).astype(np.float32)

    return expert


def _toy_expert(env: gym.Env) -> NDArray[np.float32]:
    inner: Any = env.unwrapped
    return np.clip((inner.target - inner.position) / inner.step_size, -1.0, 1.0).astype(np.float32)
