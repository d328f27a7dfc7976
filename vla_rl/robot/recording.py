"""Every episode of a robot on disk as soon as it ends, whatever its end."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np

from vla_rl._observation import told_success
from vla_rl.data import Episode, EpisodeStore

INFOS = ("lateness", "overrun", "executed_action", "limited", "aborted", "paused")
"""What the wrappers of this package tell about a step; kept with the episode where they do."""


class RecordEpisodes(gym.Wrapper, gym.utils.RecordConstructorArgs):
    """Appends episodes to a store when they end: successes, failures, and those that were broken off.

    An episode in which `reset` or `flush` came early, or a step raised, ends with `infos["aborted"]` and as truncated.
    Actions are those that came to this wrapper, which is what the policy meant; what safety limits below made of them
    is `infos["executed_action"]`. `infos["time"]` are seconds since the reset. Infos of a step stand in the row of the
    observation that it led to; row 0 holds zeros.

    It belongs outermost, in the observation convention. Writing (one sync to disk) falls between episodes.

    Args:
        env: environment in the observation convention.
        store: open for writing, at the caller's hands: the wrapper does not close it.
        task: label of the episodes.
        source: who acts.
        iteration: round of the schedule.
        policy_version: name of the weights that act.
        clock: seconds, from anywhere; for tests.

    Attributes:
        num_episodes: recorded so far.
        num_successes: of these.
        num_steps: in all of them.
    """

    def __init__(
        self,
        env: gym.Env,
        store: EpisodeStore,
        *,
        task: str,
        source: str = "rl",
        iteration: int = 0,
        policy_version: str = "",
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        gym.utils.RecordConstructorArgs.__init__(
            self,
            _disable_deepcopy=True,
            store=store,
            task=task,
            source=source,
            iteration=iteration,
            policy_version=policy_version,
        )
        gym.Wrapper.__init__(self, env)
        self.store, self.task, self.source = store, task, source
        self.iteration, self.policy_version = iteration, policy_version
        self.num_episodes = self.num_successes = self.num_steps = 0
        self._clock = clock
        self._seed: int | None = None
        self._observations: list[dict[str, np.ndarray]] = []
        self._actions: list[np.ndarray] = []
        self._rewards: list[float] = []
        self._infos: list[dict[str, Any]] = []
        self._success = False
        self._start = 0.0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Reset the environment; an episode that was still running is stored as broken off."""
        self.flush()
        observation, info = self.env.reset(seed=seed, options=options)
        self._seed, self._start = seed, self._clock()
        self._observations = [_copied(observation)]
        return observation, info

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """Step the environment; at the end of an episode, store it."""
        asked = np.array(action, dtype=np.float32)
        try:
            observation, reward, terminated, truncated, info = self.env.step(action)
        except BaseException:
            self.flush()
            raise
        self._observations.append(_copied(observation))
        self._actions.append(asked)
        self._rewards.append(float(reward))
        self._infos.append({key: np.array(info[key]) for key in INFOS if key in info} | {"time": self._elapsed()})
        self._success |= told_success(info)
        if terminated or truncated:
            self._write(terminated=bool(terminated), truncated=bool(truncated))
        return observation, reward, terminated, truncated, info

    def flush(self) -> None:
        """Store the running episode, if it has a step, as broken off here."""
        if self._actions:
            self._infos[-1]["aborted"] = np.array(True)
            self._write(terminated=False, truncated=True)

    def close(self) -> None:
        """Store what is running, then close the environment."""
        try:
            self.flush()
        finally:
            self.env.close()

    def _elapsed(self) -> np.ndarray:
        return np.array(self._clock() - self._start)

    def _write(self, *, terminated: bool, truncated: bool) -> None:
        observations, actions, rewards, infos = self._observations, self._actions, self._rewards, self._infos
        self._observations, self._actions, self._rewards, self._infos = [], [], [], []  # whatever comes of them
        success, self._success = self._success, False
        steps = len(actions)
        ends = np.arange(steps) == steps - 1
        instructions: tuple[str, ...] = self.env.get_wrapper_attr("instructions")
        episode = Episode(
            observations={key: np.stack([o[key] for o in observations]) for key in observations[0]},
            actions=np.stack(actions),
            rewards=np.asarray(rewards, dtype=np.float64),
            terminations=ends & terminated,
            truncations=ends & truncated,
            success=success,
            source=self.source,
            task=self.task,
            instruction=instructions[int(observations[0]["task_id"])],
            seed=self._seed,
            iteration=self.iteration,
            policy_version=self.policy_version,
            infos=_stacked(infos),
        )
        self.store.append(episode)
        self.num_episodes += 1
        self.num_successes += success
        self.num_steps += steps


def _copied(observation: dict[str, Any]) -> dict[str, np.ndarray]:
    """A copy of the observation; pictures, task and state in the types that episodes have, all else in its own."""
    kinds = {"task_id": np.int64, "state": np.float32}
    pictures = {key: np.uint8 for key in observation if key == "image" or key.startswith("image_")}
    return {key: np.array(value, dtype=(kinds | pictures).get(key)) for key, value in observation.items()}


def _stacked(infos: list[dict[str, Any]]) -> dict[str, np.ndarray]:
    """Arrays [T + 1, ...] of what every step told, or only the last (being broken off)."""
    names = infos[0].keys() | infos[-1].keys()
    stacked = {}
    for name in sorted(names):
        shape = next(info[name] for info in reversed(infos) if name in info)
        rows = [np.zeros_like(shape), *(info.get(name, np.zeros_like(shape)) for info in infos)]
        stacked[name] = np.stack(rows)
    return stacked
