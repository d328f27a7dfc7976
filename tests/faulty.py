"""An env that returns rubbish when it is told to."""

import gymnasium as gym
import numpy as np
from gymnasium import spaces


class Faulty(gym.Env):
    """Returns what it is told to at its third step."""

    observation_space = spaces.Dict(
        image=spaces.Box(0, 255, (4, 4, 3), np.uint8),
        state=spaces.Box(-np.inf, np.inf, (2,), np.float32),
        task_id=spaces.Discrete(2),
    )
    action_space = spaces.Box(-1, 1, (2,), np.float32)
    instructions = ("a", "b")

    def __init__(self, change):
        self.change, self.steps = change, 0

    def good(self):
        return {"image": np.full((4, 4, 3), 7, np.uint8), "state": np.zeros(2, np.float32), "task_id": 1}

    def reset(self, *, seed=None, options=None):
        self.steps = 0
        return self.good(), {"success": False}

    def step(self, action):
        self.steps += 1
        returned = [self.good(), 0.0, False, False, {"success": False}]
        return self.change(returned) if self.steps == 3 else tuple(returned)
