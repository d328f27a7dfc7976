"""Wall-clock control: steps that start on the ticks of a clock, and an account of those that came late."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import gymnasium as gym


class ControlRate(gym.Wrapper, gym.utils.RecordConstructorArgs):
    """Starts every step of an environment `1 / hz` seconds after the one before, and counts the steps that come late.

    A step waits for its tick, then runs. What comes before the tick (choosing the action) may therefore take a whole
    period, and an action always follows the frame that it was chosen from after the same time. Who comes too late
    starts at once, and the ticks go on from there: never are two commands closer together than a period less
    `tolerance`, so that nothing is caught up on by hurrying, whether the action or the clock's own waking was late.
    `info` has `"lateness"` (seconds, 0.0 in time) and `"overrun"` (bool).

    It can keep time only if the environment's own `step` returns within a period.

    Args:
        env: environment whose `step` sends a command and reads the sensors.
        hz: steps per second.
        tolerance: seconds of lateness that do not count as an overrun.
        clock: seconds, from anywhere; for tests.
        sleep: waits for so many seconds; for tests.

    Attributes:
        num_steps: steps so far.
        num_overruns: steps that were late.
        total_lateness: seconds by which these were late, together.
        worst_lateness: the most of them.

    Raises:
        ValueError: `hz` is not positive, or `tolerance` negative.
    """

    def __init__(
        self,
        env: gym.Env,
        hz: float,
        *,
        tolerance: float = 1e-3,
        clock: Callable[[], float] = time.perf_counter,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        if not (0 < hz < float("inf")) or tolerance < 0:
            raise ValueError(f"hz={hz}, tolerance={tolerance}; give steps per second above 0, and seconds from 0")
        gym.utils.RecordConstructorArgs.__init__(self, hz=hz, tolerance=tolerance)
        gym.Wrapper.__init__(self, env)
        self.period, self.tolerance = 1.0 / hz, tolerance
        self.num_steps = self.num_overruns = 0
        self.total_lateness = self.worst_lateness = 0.0
        self._clock, self._sleep = clock, sleep
        self._tick: float | None = None

    def restart_clock(self) -> None:
        """Let the next step start whenever it comes: the time since the last one was a pause and no delay."""
        self._tick = None

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Reset the environment; the first step after it is never late."""
        self.restart_clock()
        return self.env.reset(seed=seed, options=options)

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """Wait for the tick, then step."""
        lateness = self._wait()
        overrun = lateness > self.tolerance
        self.num_steps += 1
        if overrun:
            self.num_overruns += 1
            self.total_lateness += lateness
            self.worst_lateness = max(self.worst_lateness, lateness)
        observation, reward, terminated, truncated, info = self.env.step(action)
        return observation, reward, terminated, truncated, {**info, "lateness": lateness, "overrun": overrun}

    def _wait(self) -> float:
        """Seconds by which the tick was missed; sets the next one."""
        now = self._clock()
        if self._tick is None:
            self._tick = now
        if now < self._tick:
            self._sleep(self._tick - now)
            now = self._clock()
            if now - self._tick <= self.tolerance:
                now = self._tick  # woken in time: the grid does not drift
        lateness = now - self._tick
        self._tick = now + self.period
        return lateness
