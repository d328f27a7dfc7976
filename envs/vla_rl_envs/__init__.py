"""Gymnasium plug-in of vla_rl: registers the ``VLA/...`` environments, without importing a simulator."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import gymnasium as gym

if TYPE_CHECKING:
    from vla_rl_envs.experts import make_expert
    from vla_rl_envs.wrappers import FastRender

__all__ = ["FastRender", "make_expert"]

gym.register(id="VLA/MetaWorld-v0", entry_point="vla_rl_envs.metaworld:MetaWorldEnv")
gym.register(id="VLA/FrankaKitchen-v0", entry_point="vla_rl_envs.kitchen:FrankaKitchenEnv")
gym.register(id="VLA/RoboHive-v0", entry_point="vla_rl_envs.robohive:RoboHiveEnv")
gym.register(id="VLA/Subprocess-v0", entry_point="vla_rl_envs.subprocess_env:SubprocessEnv")
gym.register(id="VLA/Toy-v0", entry_point="vla_rl_envs.toy:ToyEnv")


def __getattr__(name: str) -> Any:
    if name == "make_expert":
        from vla_rl_envs.experts import make_expert

        return make_expert
    if name == "FastRender":
        from vla_rl_envs.wrappers import FastRender

        return FastRender
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
