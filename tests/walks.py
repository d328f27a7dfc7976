"""Small environments for the tests of observation wrappers: a random walk, in and out of the convention."""

import gymnasium as gym
import numpy as np
from gymnasium import spaces

PIXELS = spaces.Box(0, 255, (4, 6, 3), np.uint8)
TABLE = ("push", "open the drawer", "close the small blue window")


class Walk(gym.Env):
    """A random walk whose rendered picture shows the position."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}  # noqa: RUF012
    observation_space: spaces.Space = spaces.Box(-np.inf, np.inf, (2, 1), np.float64)
    action_space = spaces.Box(-1, 1, (1,), np.float32)

    def __init__(self, render_mode=None, horizon=4):
        self.render_mode, self.horizon = render_mode, horizon

    def observe(self):
        return np.array([[self.x], [self.t]], np.float64)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.x, self.t = float(self.np_random.integers(0, 99)), 0
        return self.observe(), {}

    def step(self, action):
        self.x += float(self.np_random.integers(1, 9))
        self.t += 1
        return self.observe(), 1.0, False, self.t >= self.horizon, {"is_success": np.float32(self.t == 2)}

    def render(self):
        return np.full((4, 6, 3), int(self.x) % 256, np.uint8)


class Robot(Walk):
    observation_space = spaces.Dict(
        wrist=PIXELS, front=PIXELS, joints=spaces.Box(-1, 1, (2,), np.float64), grip=spaces.Discrete(3)
    )

    def observe(self):
        front = np.full((4, 6, 3), int(self.x) % 256, np.uint8)
        return {"wrist": front + 1, "front": front, "joints": np.array([0.1, 0.2]), "grip": 2}


class Conventional(Walk):
    """Follows the convention by itself, one of three tasks."""

    observation_space = spaces.Dict(
        image=PIXELS, state=spaces.Box(-np.inf, np.inf, (1,), np.float32), task_id=spaces.Discrete(3)
    )
    instructions = TABLE

    def __init__(self, task_id=0, horizon=4):
        super().__init__(horizon=horizon)
        self.task_id = task_id

    def observe(self):
        image = np.full((4, 6, 3), int(self.x) % 256, np.uint8)
        return {"image": image, "state": np.array([self.t], np.float32), "task_id": self.task_id}

    def step(self, action):
        *result, info = super().step(action)
        return *result, {"success": bool(info["is_success"])}
