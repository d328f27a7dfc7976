"""Limits on the actions that a robot receives."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
from numpy.typing import ArrayLike


class UnsafeActionError(ValueError):
    """An action that no limit can make safe, such as NaN."""


class SafetyLimits(gym.Wrapper, gym.utils.RecordConstructorArgs):
    """Passes on actions within a box, and none that differs from the one before by more than `max_delta`.

    First the action is clipped to the box, then to the neighbourhood of the last one executed. The action space stays
    as it is. `info["executed_action"]` is what the environment received, float32 [A], and `info["limited"]` whether
    that differs from what was asked for. Below `RescaleAction` the limits are in the robot's own units.

    These limits are the learning side's, and no replacement for those of the robot's controller and its emergency stop.

    Args:
        env: environment with a Box of actions, [A].
        low: least action, a number or [A]; None takes the action space's.
        high: greatest action, a number or [A]; None takes the action space's.
        max_delta: most by which an entry may change from step to step, a number or [A]; None lets it jump.
        rest: the action that the first of an episode is compared with, a number or [A]: that of a robot which stands
            still.

    Attributes:
        num_clipped: steps whose action lay outside the box.
        num_slowed: steps whose action changed too fast.

    Raises:
        ValueError: the action space is no such Box, or the limits contradict each other.
    """

    def __init__(
        self,
        env: gym.Env,
        *,
        low: ArrayLike | None = None,
        high: ArrayLike | None = None,
        max_delta: ArrayLike | None = None,
        rest: ArrayLike = 0.0,
    ) -> None:
        gym.utils.RecordConstructorArgs.__init__(self, low=low, high=high, max_delta=max_delta, rest=rest)
        gym.Wrapper.__init__(self, env)
        space = env.action_space
        if not isinstance(space, gym.spaces.Box) or len(space.shape) != 1:
            raise ValueError(f"the action space is {space}, expected a Box of shape [A]; flatten the actions first")
        self._shape = space.shape
        self.low = np.maximum(space.low, self._array("low", space.low if low is None else low))
        self.high = np.minimum(space.high, self._array("high", space.high if high is None else high))
        self.max_delta = None if max_delta is None else self._array("max_delta", max_delta)
        self.rest = self._array("rest", rest)
        if (self.low > self.high).any() or (self.max_delta is not None and (self.max_delta <= 0).any()):
            raise ValueError(
                f"low={low}, high={high}, max_delta={max_delta}; give low <= high within {space}, delta > 0"
            )
        if (self.rest < self.low).any() or (self.rest > self.high).any():
            raise ValueError(f"rest={rest} lies outside the limits {self.low} .. {self.high}; give one inside")
        self.num_clipped = self.num_slowed = 0
        self._last = self.rest

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Reset the environment; the robot then stands still."""
        self._last = self.rest
        return self.env.reset(seed=seed, options=options)

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """Step with the action within the limits.

        Raises:
            UnsafeActionError: the action has another shape, or entries that are not finite; nothing was sent.
        """
        asked = np.asarray(action, dtype=np.float32)
        if asked.shape != self._shape or not np.isfinite(asked).all():
            raise UnsafeActionError(
                f"the action is {np.asarray(action).tolist()}, expected {self._shape[0]} finite numbers; nothing was "
                "sent: look at the policy's weights and at its observations"
            )
        inside = np.clip(asked, self.low, self.high)
        self.num_clipped += int((inside != asked).any())
        executed = inside
        if self.max_delta is not None:
            executed = np.clip(inside, self._last - self.max_delta, self._last + self.max_delta)
            self.num_slowed += int((executed != inside).any())
        self._last = executed
        observation, reward, terminated, truncated, info = self.env.step(executed.copy())
        limited = bool((executed != asked).any())
        return observation, reward, terminated, truncated, {**info, "executed_action": executed, "limited": limited}

    def _array(self, name: str, value: ArrayLike) -> np.ndarray:
        array = np.asarray(value, dtype=np.float32)
        if array.shape not in ((), self._shape) or np.isnan(array).any():
            raise ValueError(f"{name}={value}; give a number, or {self._shape[0]} of them, none NaN")
        return np.broadcast_to(array, self._shape).copy()
