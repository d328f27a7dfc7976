"""An env of known steps, and a clock that only moves when told to."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces


class FakeClock:
    """Seconds that pass only in `sleep` and `spend`."""

    def __init__(self) -> None:
        self.now = 100.0
        self.slept: list[float] = []

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds

    def spend(self, seconds: float) -> None:
        self.now += seconds


class Steps(gym.Env[dict[str, Any], np.ndarray]):
    """In the observation convention; the state says how many steps the episode has had, `started` when each began."""

    instructions = ("count",)

    def __init__(self, clock: FakeClock | None = None, *, horizon: int = 5, takes: float = 0.0) -> None:
        self.clock, self.horizon, self.takes = clock, horizon, takes
        self.observation_space = spaces.Dict(
            {
                "image": spaces.Box(0, 255, (8, 8, 3), np.uint8),
                "state": spaces.Box(-np.inf, np.inf, (2,), np.float32),
                "task_id": spaces.Discrete(1),
            }
        )
        self.action_space = spaces.Box(-1.0, 1.0, (2,), np.float32)
        self.started: list[float] = []
        self.received: list[np.ndarray] = []
        self.resets = self.count = 0
        self.fails_at = -1

    def _look(self) -> dict[str, Any]:
        image = np.full((8, 8, 3), self.count % 256, np.uint8)
        return {"image": image, "state": np.array([self.count, self.resets], np.float32), "task_id": np.int64(0)}

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.count = 0
        self.resets += 1
        return self._look(), {"success": False}

    def step(self, action: np.ndarray) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        if self.clock is not None:
            self.started.append(self.clock())
            self.clock.spend(self.takes)
        self.received.append(np.array(action))
        self.count += 1
        if self.count == self.fails_at:
            raise ConnectionError("the robot is gone")
        return self._look(), 0.25, False, self.count >= self.horizon, {"success": False}
