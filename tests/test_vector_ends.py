"""How workers end: in the middle of a step, and by their own death."""

import os
import signal
from contextlib import closing

import gymnasium as gym
import numpy as np
from gymnasium import spaces

from vla_rl.vector import WorkerVectorEnv


class Mortal(gym.Env):
    """Shows its number and its steps; the worker of number 1 dies at its first action of 1."""

    observation_space = spaces.Box(0, 99, (2,), np.float32)
    action_space = spaces.Box(-1, 1, (1,), np.float32)

    def __init__(self, number, flag):
        self.number, self.flag = number, flag

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return np.array([self.number, 0], np.float32), {}

    def step(self, action):
        if action[0] == 1 and not self.flag.exists():
            self.flag.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        self.t += 1
        return np.array([self.number, self.t], np.float32), 1.0, False, False, {}


def test_a_partial_reset_after_a_loss_leaves_the_rest_to_be_told(tmp_path):
    """Four environments of one worker; those of the second group are lost while the first one steps."""
    envs = WorkerVectorEnv([lambda i=i: Mortal(i, tmp_path / "died") for i in range(4)], num_workers=1, max_restarts=1)
    with closing(envs):
        envs.reset(seed=0)
        for _ in range(5):
            envs.step(np.zeros((4, 1), np.float32))
        first, second = envs.groups
        assert first.step(np.ones((2, 1), np.float32))[3].all()
        observations, _ = second.reset(options={"reset_mask": np.array([True, False])})
        assert observations.tolist() == [[2, 0], [3, 5]]
        idle = np.zeros((2, 1), np.float32)
        observations, rewards, _, truncated, infos = second.step(idle)
        assert (observations.tolist(), rewards.tolist()) == ([[2, 1], [3, 5]], [1, 0])
        assert truncated.tolist() == infos["worker_restarted"].tolist() == [False, True]
        observations, _, _, truncated, _ = second.step(idle)
        assert (observations.tolist(), truncated.tolist()) == ([[2, 2], [3, 0]], [False, False])


class Talkative(Mortal):
    """Tells more in one step than a pipe holds, and leaves a file when it is closed."""

    def step(self, action):
        return *super().step(action)[:4], {"much": np.zeros(10**6)}

    def close(self):
        self.flag.touch()


def test_closing_in_the_middle_of_a_step_closes_the_environments(tmp_path):
    paths = [tmp_path / "0", tmp_path / "1"]
    envs = WorkerVectorEnv([lambda i=i, path=path: Talkative(i, path) for i, path in enumerate(paths)], num_workers=1)
    envs.reset(seed=0)
    envs.step_async(envs.action_space.sample())
    envs.close()
    assert all(path.exists() for path in paths)


def test_a_long_question_and_long_answers_do_not_wait_for_each_other():
    """One worker with both groups: it sends the answers of the first and does not read the second one's question."""
    envs = WorkerVectorEnv([lambda i=i: Echo() for i in range(3)], num_workers=1, timeout=30)
    with closing(envs):
        envs.reset(seed=0)
        long = np.arange(10**6)
        answers = envs.call("echo", long)
    assert len(answers) == 3 and all(np.array_equal(answer, long) for answer in answers)


class Echo(Mortal):
    """Says what it is told."""

    def __init__(self):
        self.number = 0

    def echo(self, words):
        return words
