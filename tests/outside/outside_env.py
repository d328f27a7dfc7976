"""An environment as its user would write it: the observation convention, by Gymnasium's API alone."""

import gymnasium as gym
import numpy as np
from gymnasium import spaces


class LightEnv(gym.Env):
    """A lamp on a rail, seen from above: push it into the lit half; left or right is said by the instruction."""

    instructions = ("push the lamp to the left", "push the lamp to the right")

    def __init__(self, task_id=0, horizon=12):
        self.task_id, self.horizon = task_id, horizon
        self.observation_space = spaces.Dict(
            {
                "image": spaces.Box(0, 255, (16, 32, 3), np.uint8),
                "state": spaces.Box(-1, 1, (1,), np.float32),
                "task_id": spaces.Discrete(2),
            }
        )
        self.action_space = spaces.Box(-1, 1, (1,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.place, self.steps = self.np_random.uniform(-0.4, 0.4), 0
        return self._look(), {"success": False}

    def step(self, action):
        self.place = float(np.clip(self.place + 0.15 * float(action[0]), -1, 1))
        self.steps += 1
        success = self.place > 0.7 if self.task_id else self.place < -0.7
        return self._look(), float(success), success, self.steps >= self.horizon, {"success": success}

    def expert(self):
        return np.array([1.0 if self.task_id else -1.0], np.float32)

    def _look(self):
        image = np.zeros((16, 32, 3), np.uint8)
        column = int((self.place + 1) / 2 * 28)
        image[4:12, column : column + 4] = (255, 220, 0)
        return {"image": image, "state": np.array([self.place], np.float32), "task_id": self.task_id}
