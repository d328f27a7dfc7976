import os
import random
import time
from functools import partial

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode
from tiny import tiny_policy, toy_env

from vla_rl.heads.value import ValueHead
from vla_rl.rl.rollout import RolloutCollector
from vla_rl.vector import WorkerVectorEnv

NUM_ENVS, HORIZON, STEPS = 6, 7, 10
FIELDS = ("tokens", "mask", "state", "actions", "rewards", "terminated", "done", "valid", "log_probs", "advantages")


class Dawdling(gym.Wrapper):
    """Takes another time for every step in every process."""

    def step(self, action):
        time.sleep(0.002 * random.Random(time.time_ns() ^ os.getpid()).random())
        return self.env.step(action)


def make():
    return Dawdling(toy_env(horizon=HORIZON))


def play(mode, workers, exploration):
    """Two rollouts and some whole episodes, as everything that comes out of them."""
    policy = tiny_policy(init_std=0.5, exploration=exploration)
    critic = ValueHead(policy.encoder.feature_dim, state_dim=2, width=16, num_queries=2, hidden_dim=16)
    torch.nn.init.ones_(critic.output.weight)
    episodes = []
    env = WorkerVectorEnv([partial(make)] * NUM_ENVS, num_workers=workers, autoreset_mode=mode, context="fork")
    collector = RolloutCollector(policy, env, task="toy", on_episode=episodes.append, seed=5)
    collector.start_exploration()
    rollouts = [collector.collect(STEPS, critic, gamma=0.9, gae_lambda=0.8, keep_images=True) for _ in range(2)]
    collector.collect_episodes(2 * NUM_ENVS)
    env.close()
    arrays = [np.asarray(getattr(rollout, name)) for rollout in rollouts for name in FIELDS]
    arrays += [rollout.images for rollout in rollouts]
    arrays += [
        each for episode in episodes for each in (episode.actions, episode.rewards, episode.observations["image"])
    ]
    return arrays, (collector.num_env_steps, policy.encoder.num_frames)


@pytest.mark.parametrize(
    ("mode", "exploration"),
    [(AutoresetMode.NEXT_STEP, "gsde"), (AutoresetMode.SAME_STEP, "gaussian"), (AutoresetMode.DISABLED, "gsde")],
)
def test_the_data_do_not_depend_on_the_number_of_workers(mode, exploration):
    """Bit by bit; without workers `step_async` does the whole step, so nothing happens at the same time there."""
    reference, counts = play(mode, 0, exploration)
    assert len(reference) > 2 * len(FIELDS) + 2 + 3 * 2 * NUM_ENVS
    for workers in (1, 2, 4):
        arrays, other = play(mode, workers, exploration)
        assert other == counts
        for expected, array in zip(reference, arrays, strict=True):
            np.testing.assert_array_equal(array, expected)


class Switching(gym.ObservationWrapper):
    """Another task at every step."""

    def observation(self, observation):
        self.t = getattr(self, "t", -1) + 1
        return {**observation, "task_id": self.t % 2, "state": np.full(2, self.t, np.float32)}


def test_a_row_keeps_what_was_seen_before_the_step():
    """The group's observations are views that the step writes over."""
    envs = [Switching(toy_env(horizon=HORIZON)) for _ in range(2)]
    env = WorkerVectorEnv([lambda env=env: env for env in envs], num_workers=0)
    collector = RolloutCollector(tiny_policy(), env, task="toy")
    rollout = collector.collect(4, lambda features, state: torch.zeros(len(features)), gamma=0.9, gae_lambda=0.8)
    assert rollout.task_id.tolist() == [0, 0, 1, 1, 0, 0, 1, 1]
    assert rollout.state[:, 0].tolist() == [0, 0, 1, 1, 2, 2, 3, 3]


def test_the_next_half_is_encoded_while_the_first_is_stepping():
    """Seen from the order of the calls: no group waits for its step before the other one's is started."""
    calls = []
    policy = tiny_policy()
    env = WorkerVectorEnv([partial(toy_env, horizon=HORIZON)] * 4, num_workers=0)
    for name, group in zip("ab", env.groups, strict=True):
        start, wait = group.step_async, group.step_wait
        group.step_async = lambda actions, name=name, start=start: (calls.append(f"{name} starts"), start(actions))
        group.step_wait = lambda name=name, wait=wait: (calls.append(f"{name} waits"), wait())[1]
    encode = policy.encoder.encode
    policy.encoder.encode = lambda images, texts: (calls.append(f"encode {len(texts)}"), encode(images, texts))[1]
    collector = RolloutCollector(policy, env, task="toy")
    collector.collect(2, lambda features, state: torch.zeros(len(features)), gamma=0.9, gae_lambda=0.8)
    first = ["encode 2", "a starts", "encode 2", "b starts"]
    second = ["a waits", "encode 2", "a starts", "b waits", "encode 2", "b starts"]
    assert calls == [*first, *second, "a waits", "b waits", "encode 2", "encode 2"]
