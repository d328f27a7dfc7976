"""Action chunks at the env's side: H actions per call, one after the other or averaged over time."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.utils import RecordConstructorArgs

if TYPE_CHECKING:
    from vla_rl.data.statistics import Statistics


class ChunkActions(gym.Wrapper, RecordConstructorArgs):
    """One step executes a chunk of H actions open-loop: the VLM runs once per chunk.

    The action is the flat [H * A]. A chunk stops at the end of the episode; its reward is the discounted sum
    ``r_0 + gamma r_1 + ...`` of the steps taken, ``info["success"]`` is true if it was at any of them, and
    ``info["chunk_steps"]`` counts them. Observation and other info are the last step's.

    For PPO, one chunk is one step: give ``PPOConfig(gamma=gamma**H)``, and count ``total_timesteps`` and
    ``rollout_steps`` in chunks. The value after a chunk that a time limit cuts short after k steps should count
    ``gamma**k`` and counts ``gamma**H``; with a horizon that H divides there is no such chunk. After a termination
    there is nothing to count.

    Example:
        >>> env = ChunkActions(gym.make("vla_rl_envs:VLA/Toy-v0"), chunk=4)
        >>> env.action_space.shape
        (8,)

    Args:
        env: single env with a Box of actions.
        chunk: H.
        gamma: discount within a chunk.

    Raises:
        ValueError: `chunk` is not positive, or the action space is no one-dimensional Box.
    """

    def __init__(self, env: gym.Env, *, chunk: int, gamma: float = 1.0):
        RecordConstructorArgs.__init__(self, chunk=chunk, gamma=gamma)
        gym.Wrapper.__init__(self, env)
        self.action_space = _chunk_space(env.action_space, chunk)
        self.chunk, self.gamma = chunk, gamma

    def step(self, action: np.ndarray) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """Step the env up to H times.

        Raises:
            ValueError: `action` has another number of values than a chunk.
        """
        actions = _rows(action, self.action_space, self.chunk)
        total, success, info = 0.0, False, {}
        observation, terminated, truncated, k = None, False, False, 0
        while k < self.chunk and not (terminated or truncated):
            observation, reward, terminated, truncated, info = self.env.step(actions[k])
            total += self.gamma**k * float(reward)
            success |= bool(info.get("success", False))
            k += 1
        told = {"success": success} if "success" in info else {}
        return observation, total, terminated, truncated, {**info, **told, "chunk_steps": k}


class EnsembleActions(gym.Wrapper, RecordConstructorArgs):
    """Temporal ensembling: one env step per chunk, by a mean over all chunks that say something about it.

    Takes a new flat chunk [H * A] at every step and executes the mean of what it and the up to H - 1 chunks before it
    planned for now, weighted by ``exp(-decay * i)`` with i = 0 for the oldest (ACT, Zhao et al. 2023, arXiv 2304.13705,
    section IV-A). Meant for evaluation of a policy that was trained on chunks. The memory of chunks lives here and not
    in the policy, because only the env knows for sure which episode an action belongs to.

    Args:
        env: single env with a Box of actions.
        chunk: H.
        decay: m of the weights; ACT's .01 weighs nearly evenly, larger values trust older plans more.

    Raises:
        ValueError: `chunk` is not positive, or the action space is no one-dimensional Box.
    """

    def __init__(self, env: gym.Env, *, chunk: int, decay: float = 0.01):
        RecordConstructorArgs.__init__(self, chunk=chunk, decay=decay)
        gym.Wrapper.__init__(self, env)
        self.action_space = _chunk_space(env.action_space, chunk)
        self.chunk, self.decay = chunk, decay
        self._plans: list[np.ndarray] = []

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Reset, and forget the chunks."""
        self._plans = []
        return self.env.reset(seed=seed, options=options)

    def step(self, action: np.ndarray) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """Step the env once.

        Raises:
            ValueError: `action` has another number of values than a chunk.
        """
        plan = _rows(action, self.action_space, self.chunk)
        self._plans = [*self._plans, plan.copy()][-self.chunk :]
        return self.env.step(ensemble(self._plans, decay=self.decay).astype(plan.dtype))


def ensemble(plans: list[np.ndarray], *, decay: float) -> np.ndarray:
    """The action [A] for now from plans [H, A] of this step (the last one) and the steps before it, oldest first."""
    now = np.stack([plan[len(plans) - 1 - i] for i, plan in enumerate(plans)])
    weights = np.exp(-decay * np.arange(len(plans)))
    return weights @ now / weights.sum()


def chunk_statistics(statistics: Statistics, chunk: int) -> Statistics:
    """The statistics of one step, repeated for a policy whose actions are chunks."""
    return replace(
        statistics,
        action_mean=np.tile(statistics.action_mean, chunk),
        action_std=np.tile(statistics.action_std, chunk),
    )


def _rows(action: Any, space: Any, chunk: int) -> np.ndarray:
    """The actions [H, A] of one chunk."""
    if np.size(action) != space.shape[0]:
        raise ValueError(
            f"got an action of {np.size(action)} numbers, expected a chunk of {chunk} actions, {space.shape[0]} in "
            "all; give the whole chunk."
        )
    return np.asarray(action).reshape(chunk, -1)


def _chunk_space(space: gym.Space, chunk: int) -> spaces.Box:
    if chunk < 1 or not isinstance(space, spaces.Box) or len(space.shape) != 1:
        raise ValueError(f"chunk={chunk} of the action space {space}; expected at least 1 and a Box of one dimension")
    return spaces.Box(np.tile(space.low, chunk), np.tile(space.high, chunk), dtype=space.dtype)  # type: ignore[arg-type]
