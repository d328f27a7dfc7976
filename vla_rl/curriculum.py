"""A curriculum of start states: where stage 1's episodes begin, moved away from the goal as the policy learns."""

from __future__ import annotations

from collections import deque
from typing import Any

import gymnasium as gym
import numpy as np

from vla_rl._observation import told_success


class StartCurriculum(gym.Wrapper, gym.utils.RecordConstructorArgs):
    """Begin episodes close to what the task is about, and farther away as soon as they succeed from there.

    For environments whose ``reset`` takes ``options={"closeness": c}``, c from 0 (the task's own start) to 1, and gives
    it back in its info, as those of Meta-World and the toy do. A reverse curriculum (Florensa et al. 2017, arXiv
    1707.05300) over that one number, by each environment from its own episodes. Most episodes begin at the frontier,
    the others anywhere between it and the task's own start, so that what was learned near the goal is tried from afar;
    these last longer, so they take more of the env steps than of the episodes. ``info["closeness"]`` tells where it
    began.

    Args:
        env: its ``info["success"]`` tells success at every step.
        window: latest episodes from the frontier that decide.
        advance_at: the frontier moves away from the goal at this success rate.
        retreat_at: and back towards it at or below this one.
        step: how far it moves.
        frontier_share: of the episodes that begin at the frontier.
    """

    def __init__(
        self,
        env: gym.Env,
        *,
        window: int = 2,
        advance_at: float = 0.5,
        retreat_at: float = 0.0,
        step: float = 0.1,
        frontier_share: float = 0.75,
    ) -> None:
        gym.utils.RecordConstructorArgs.__init__(
            self,
            window=window,
            advance_at=advance_at,
            retreat_at=retreat_at,
            step=step,
            frontier_share=frontier_share,
        )
        gym.Wrapper.__init__(self, env)
        rates = 0 <= retreat_at < advance_at <= 1 and 0 < frontier_share <= 1
        if not (window >= 1 and rates and 0 < step <= 1):
            raise ValueError(
                f"window={window}, advance_at={advance_at}, retreat_at={retreat_at}, step={step}, frontier_share="
                f"{frontier_share}; expected a window of at least 1, 0 <= retreat_at < advance_at <= 1, 0 < step <= 1 "
                "and 0 < frontier_share <= 1"
            )
        self.advance_at, self.retreat_at, self.step_size = advance_at, retreat_at, step
        self.frontier_share = frontier_share
        self.frontier = 1.0
        self._outcomes: deque[bool] = deque(maxlen=window)
        self._closeness = 0.0
        self._success: bool | None = None
        self._rng = np.random.default_rng()  # its own, so that the environment draws as it would without

    @property
    def progress(self) -> dict[str, Any]:
        """How far the curriculum is, of JSON types; may be set, before a reset."""
        return {"frontier": self.frontier, "outcomes": list(self._outcomes)}

    @progress.setter
    def progress(self, value: dict[str, Any]) -> None:
        self.frontier = value["frontier"]
        self._outcomes = deque(value["outcomes"], maxlen=self._outcomes.maxlen)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Judge the last episode, then reset the environment to where the next one is to begin.

        Raises:
            ValueError: the environment does not know where to begin.
        """
        if self._success is not None and self._closeness == self.frontier:
            self._outcomes.append(self._success)
            self._move()
        if seed is not None:
            self._rng = np.random.default_rng(seed)
        at_frontier = self._rng.random() < self.frontier_share
        self._closeness = self.frontier if at_frontier else self.frontier * float(self._rng.random())
        self._success = None
        obs, info = self.env.reset(seed=seed, options={**(options or {}), "closeness": self._closeness})
        if "closeness" not in info:
            raise ValueError(
                f"{self.env.unwrapped} was asked to begin an episode at closeness={self._closeness:.2f}, and its reset "
                "info has no 'closeness': it knows no such option; train without a start curriculum "
                "(exploration.start_curriculum=False), or teach it that option"
            )
        return obs, {**info, "closeness": self._closeness}

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """Step the environment, and remember whether the episode has succeeded."""
        obs, reward, terminated, truncated, info = self.env.step(action)
        self._success = bool(self._success) or told_success(info)
        return obs, reward, terminated, truncated, info

    def _move(self) -> None:
        """Move the frontier if enough episodes began there, and count anew."""
        if len(self._outcomes) < (self._outcomes.maxlen or 1):
            return
        rate = float(np.mean(self._outcomes))
        if rate >= self.advance_at:
            self.frontier = max(0.0, self.frontier - self.step_size)
        elif rate <= self.retreat_at:
            self.frontier = min(1.0, self.frontier + self.step_size)
        else:
            return
        self._outcomes.clear()
