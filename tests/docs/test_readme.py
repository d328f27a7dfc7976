"""The README's Python block, word for word, on a made-up robot and demonstrations of it, with a short training."""

import json
from functools import partial
from pathlib import Path
from typing import ClassVar

import gymnasium as gym
import numpy as np
import pytest
from trainers import CONFIG

import vla_rl
from vla_rl.collect import run_expert
from vla_rl.envs import VLAObservation

README = Path(__file__).parents[2] / "README.md"


class Robot(gym.Env):
    """Four joints that have to come to .5; knows nothing of VLAs."""

    observation_space = gym.spaces.Box(-2, 2, (4,))
    action_space = gym.spaces.Box(-1, 1, (4,))
    metadata: ClassVar = {"render_modes": ["rgb_array"], "render_fps": 10}

    def __init__(self, render_mode=None):
        self.render_mode = render_mode

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.joints = self.np_random.uniform(-0.5, 0.5, 4).astype(np.float32)
        return self.joints, {}

    def step(self, action):
        self.joints = self.joints + 0.1 * np.asarray(action, np.float32)
        there = bool(np.abs(self.joints - 0.5).max() < 0.1)
        return self.joints, float(there), there, False, {"is_success": there}

    def render(self):
        image = np.zeros((80, 80, 3), np.uint8)
        for joint, position in enumerate(self.joints):
            image[: int(40 + 20 * position), 20 * joint : 20 * joint + 10] = 255
        return image


def expert(env):
    return np.clip(5 * (0.5 - env.unwrapped.joints), -1, 1)


@pytest.mark.slow
def test_the_ten_lines_for_your_own_robot_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    gym.register("MyRobot-v0", partial(Robot), max_episode_steps=30)
    env = VLAObservation(
        gym.make("MyRobot-v0", render_mode="rgb_array"),
        instructions=["open the drawer"],
        image_size=64,
        success_key="is_success",
    )
    with vla_rl.EpisodeStore("my-demos") as demos:
        for seed in range(6):
            demos.append(run_expert(env, expert, task="drawer", seed=seed, noise=0.1))
    monkeypatch.setattr(vla_rl, "IterativeTrainer", partial(vla_rl.IterativeTrainer, config=CONFIG))
    (code,) = [part.split("```")[0] for part in README.read_text().split("```python\n")[1:]]
    namespace = {"__name__": "__main__"}
    exec(compile(code, str(README), "exec"), namespace)
    results = json.loads(Path("runs/mine/results.json").read_text())
    assert {"after-stage0", "task0-round0-after-stage1", "task0-round0-after-stage2"} <= set(results)
    assert (Path("runs/mine/checkpoints/task0-round0-stage2") / "policy.json").is_file()
