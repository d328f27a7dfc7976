"""A vector env whose every observation, reward and episode end is written down beforehand."""

from __future__ import annotations

from dataclasses import dataclass, field

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.vector import SyncVectorEnv
from tiny import INSTRUCTIONS

from vla_rl.vector import WorkerVectorEnv

# Per env, its episodes in turn: length and end ("T" terminated, "C" cut off, "B" both at once).
SCRIPT = (
    ((3, "T"), (4, "C"), (1, "C"), (5, "B"), (3, "C")),
    ((2, "C"), (2, "T"), (6, "C"), (1, "T")),
    ((5, "C"), (1, "T"), (4, "T"), (2, "C")),
)


def script(number: int, episode: int) -> tuple[int, str]:
    return SCRIPT[number][episode % len(SCRIPT[number])]


def observation(number: int, episode: int, t: int, *, constant: bool = False) -> dict[str, np.ndarray | int]:
    seed = (0, 0, 0) if constant else (number, episode, t)
    rng = np.random.default_rng(seed)
    return {
        "image": rng.integers(0, 256, (32, 32, 3), dtype=np.uint8),
        "state": rng.standard_normal(2).astype(np.float32),
        "task_id": 0 if constant else number,
    }


def reward(number: int, episode: int, t: int) -> float:
    return float(np.random.default_rng((number, episode, t, 1)).normal())


def succeeds(number: int, episode: int) -> bool:
    return (number + episode) % 2 == 0


class Scripted(gym.Env):
    """Env `number` plays its script; success, if any, is reported at the last step of the episode alone."""

    observation_space = spaces.Dict(
        image=spaces.Box(0, 255, (32, 32, 3), np.uint8),
        state=spaces.Box(-np.inf, np.inf, (2,), np.float32),
        task_id=spaces.Discrete(len(INSTRUCTIONS)),
    )
    action_space = spaces.Box(-1, 1, (2,), np.float32)
    instructions = INSTRUCTIONS

    def __init__(self, number: int, *, constant: bool = False, tell_success: bool = True):
        self.number, self.constant, self.tell_success = number, constant, tell_success
        self.episode, self.t = -1, 0
        self.received: list[list[np.ndarray]] = []

    def _observe(self):
        return observation(self.number, self.episode, self.t, constant=self.constant)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.episode, self.t = self.episode + 1, 0
        self.received.append([])
        return self._observe(), {"success": False} if self.tell_success else {}

    def step(self, action):
        self.received[-1].append(np.array(action))
        length, end = script(self.number, self.episode)
        assert self.t < length, "stepped after the end of the episode"
        paid = reward(self.number, self.episode, self.t)
        self.t += 1
        last = self.t == length
        info = {"success": last and succeeds(self.number, self.episode)} if self.tell_success else {}
        return self._observe(), paid, last and end in "TB", last and end in "CB", info


@dataclass
class Step:
    """One true transition of one env."""

    episode: int
    t: int
    reward: float
    terminated: bool
    done: bool
    row: int = -1  # of the rollout


@dataclass
class Truth:
    """What env `number` goes through in `rows` vector steps, worked out without an env."""

    number: int
    rows: int
    next_step: bool
    steps: list[Step] = field(default_factory=list)

    def __post_init__(self) -> None:
        episode = t = row = 0
        while row < self.rows:
            length, end = script(self.number, episode)
            done = t + 1 == length
            self.steps.append(Step(episode, t, reward(self.number, episode, t), done and end in "TB", done, row))
            row += 1
            t += 1
            if done:
                episode, t = episode + 1, 0
                row += self.next_step  # the row of the autoreset

    @property
    def finished(self) -> list[int]:
        return [step.episode for step in self.steps if step.done]


def make(kind: str, mode: gym.vector.AutoresetMode, **kwargs) -> tuple[gym.vector.VectorEnv, list[Scripted]]:
    """A vector env of either kind, and its sub-environments."""
    envs = [Scripted(number, **kwargs) for number in range(len(SCRIPT))]
    thunks = [lambda env=env: env for env in envs]
    if kind == "sync":
        return SyncVectorEnv(thunks, autoreset_mode=mode), envs
    return WorkerVectorEnv(thunks, num_workers=0, autoreset_mode=mode), envs
