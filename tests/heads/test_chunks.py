"""Chunks of actions: the wrappers against hand-computed episodes, the windows that supervised learning takes."""

import math
import subprocess
import sys

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from tiny import HEAD, random_features, tiny_encoder, toy_env, toy_store

from vla_rl.chunks import ChunkActions, EnsembleActions, chunk_statistics
from vla_rl.data import BalancedSampler, Episode, EpisodeStore, compute_statistics
from vla_rl.data.steps import action_windows
from vla_rl.evaluation import evaluate
from vla_rl.heads import ChunkedHead, ValueHead
from vla_rl.policy import VLAPolicy
from vla_rl.rl.rollout import RolloutCollector
from vla_rl.sl.supervised import SLConfig, train_supervised


class Counting(gym.Env):
    """Five steps of reward 1, 2, 3, 4, 5; success is told at the third step and not at the end."""

    observation_space = spaces.Dict(
        image=spaces.Box(0, 255, (32, 32, 3), np.uint8),
        state=spaces.Box(-10, 10, (2,), np.float32),
        task_id=spaces.Discrete(1),
    )
    action_space = spaces.Box(-1, 1, (2,), np.float32)
    instructions = ("count",)

    def __init__(self, *, truncate=False):
        self.truncate, self.t, self.received = truncate, 0, []

    def _observe(self):
        return {"image": np.zeros((32, 32, 3), np.uint8), "state": np.full(2, self.t, np.float32), "task_id": 0}

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        self.received.append([])
        return self._observe(), {"success": False}

    def step(self, action):
        assert self.t < 5, "stepped after the end of the episode"
        self.received[-1].append(np.asarray(action).tolist())
        self.t += 1
        last = self.t == 5
        return (
            self._observe(),
            float(self.t),
            last and not self.truncate,
            last and self.truncate,
            {"success": self.t == 3},
        )


def plan(first):
    """A chunk of three actions (first, 0), (first + .1, 0), (first + .2, 0), flat."""
    return np.array([[first + 0.1 * h, 0] for h in range(3)], np.float32).flatten()


@pytest.mark.parametrize("mode", list(AutoresetMode))
def test_chunks_of_three_over_an_episode_of_five_in_every_autoreset_mode(mode):
    """By hand, gamma .5: 1 + 2/2 + 3/4 = 2.75, then 4 + 5/2 = 6.5 after two of three actions."""
    inner = Counting()
    envs = SyncVectorEnv([lambda: ChunkActions(inner, chunk=3, gamma=0.5)], autoreset_mode=mode)
    envs.reset(seed=0)
    obs, reward, terminated, truncated, info = envs.step(plan(0.0)[None])
    assert (reward[0], obs["state"][0, 0], bool(terminated[0]), info["chunk_steps"][0]) == (2.75, 3.0, False, 3)
    assert info["success"][0]
    obs, reward, terminated, truncated, info = envs.step(plan(0.5)[None])
    assert (reward[0], bool(terminated[0]), bool(truncated[0])) == (6.5, True, False)
    told = info["final_info"] if mode is AutoresetMode.SAME_STEP else info
    assert told["chunk_steps"][0] == 2 and not told["success"][0]
    np.testing.assert_allclose(inner.received[0], [[0, 0], [0.1, 0], [0.2, 0], [0.5, 0], [0.6, 0]], atol=1e-6)
    if mode is AutoresetMode.SAME_STEP:
        assert info["final_obs"][0]["state"][0] == 5 and obs["state"][0, 0] == 0
    else:
        assert obs["state"][0, 0] == 5
    if mode is AutoresetMode.NEXT_STEP:
        obs, reward, *_ = envs.step(plan(0.9)[None])
        assert (reward[0], obs["state"][0, 0], inner.received[1]) == (0, 0, [])
    if mode is AutoresetMode.DISABLED:
        envs.reset(options={"reset_mask": np.array([True])})
    _, reward, *_ = envs.step(plan(-0.5)[None])
    assert reward[0] == 2.75 and len(inner.received[1]) == 3


@pytest.mark.parametrize("mode", list(AutoresetMode))
def test_rollouts_see_chunks_as_steps(mode):
    """Advantages by hand with a critic of zeros: gamma' = gamma^3 and lambda = 1 give discounted returns."""
    torch.manual_seed(0)
    encoder = tiny_encoder()
    policy = VLAPolicy(encoder, ChunkedHead(encoder.feature_dim, 6, chunk=3, state_dim=2, **HEAD))
    episodes = []
    envs = SyncVectorEnv([lambda: ChunkActions(Counting(), chunk=3, gamma=0.5)] * 2, autoreset_mode=mode)
    collector = RolloutCollector(policy, envs, task="count", on_episode=episodes.append)
    critic = ValueHead(encoder.feature_dim, state_dim=2, **HEAD)  # zero as it comes
    rollout = collector.collect(5, critic, gamma=0.5**3, gae_lambda=1.0)
    first = 2.75 + 0.125 * 6.5
    kinds = [first, 6.5, 0.0, first, 6.5] if mode is AutoresetMode.NEXT_STEP else [first, 6.5, first, 6.5, 2.75]
    torch.testing.assert_close(rollout.advantages, torch.tensor(kinds)[:, None].expand(-1, 2))
    assert rollout.actions.shape == (5, 2, 6)
    assert encoder.num_frames == 2 * 5 + 2  # once per chunk, and once for the values at the end
    assert all(episode.success and episode.total_steps == 2 for episode in episodes) and len(episodes) == 4


def test_the_wrappers_are_honest_gymnasium_envs():
    for wrapper, told in ((ChunkActions, {"gamma": 0.9}), (EnsembleActions, {"decay": 0.1})):
        env = wrapper(toy_env(disable_env_checker=True), chunk=4, **told)
        check_env(env, skip_render_check=True)
        assert env.action_space == spaces.Box(-1, 1, (8,), np.float32)
        assert env._saved_kwargs == {"chunk": 4, **told}
        assert env.unwrapped.instructions[0] == "reach the red square"


@pytest.mark.parametrize("wrapper", [ChunkActions, EnsembleActions])
def test_what_cannot_be_chunked_is_named(wrapper):
    with pytest.raises(ValueError, match="chunk=0"):
        wrapper(Counting(), chunk=0)
    with pytest.raises(ValueError, match=r"Discrete\(2\)"):
        wrapper(gym.make("CartPole-v1"), chunk=2)
    env = wrapper(Counting(), chunk=4)
    env.reset(seed=0)
    for count in (4, 12):  # both are whole actions of another length
        with pytest.raises(ValueError, match=f"an action of {count} numbers, expected a chunk of 4 actions, 8 in all"):
            env.step(np.zeros(count))


def test_an_env_without_success_stays_without():
    env = ChunkActions(gym.make("Pendulum-v1"), chunk=2)
    env.reset(seed=0)
    assert "success" not in env.step(np.zeros(2, np.float32))[4]


def test_temporal_ensembling_by_hand():
    """H = 3: the third step executes the mean of what three chunks planned for it, the oldest weighing most."""
    inner = Counting()
    env = EnsembleActions(inner, chunk=3, decay=0.5)
    env.reset(seed=0)
    chunk = np.zeros(6, np.float32)  # one array of the caller's, with another chunk at every step
    for first in (0.0, 0.3, -0.4, 0.2):
        chunk[:] = plan(first)
        _, reward, *_ = env.step(chunk)
    w = [1, math.exp(-0.5), math.exp(-1)]
    expected = [
        0.0,
        (w[0] * 0.1 + w[1] * 0.3) / (w[0] + w[1]),
        (w[0] * 0.2 + w[1] * 0.4 + w[2] * -0.4) / sum(w),
        (w[0] * 0.5 + w[1] * -0.3 + w[2] * 0.2) / sum(w),  # the first chunk no longer reaches here
    ]
    np.testing.assert_allclose([action[0] for action in inner.received[0]], expected, atol=1e-6)
    assert reward == 4.0  # a step at a time
    env.reset()
    env.step(plan(0.9))
    np.testing.assert_allclose(inner.received[1], [[0.9, 0]], atol=1e-6)  # what the last episode planned is gone


def test_windows_by_hand():
    actions = np.array([[1, 10], [2, 20], [3, 30]], np.float32)
    expected = [[1, 10, 2, 20], [2, 20, 3, 30], [3, 30, 3, 30]]
    np.testing.assert_array_equal(action_windows(actions, 2), expected)
    np.testing.assert_array_equal(action_windows(actions, 1), actions)


def counted_episode(seed, *, size, task="count"):
    """Four steps whose actions are 0, .1, .2, ... of `size` entries."""
    steps = 4
    actions = np.arange(steps * size, dtype=np.float32).reshape(steps, size) / 10 + seed
    ends = np.arange(steps) == steps - 1
    return Episode(
        observations={
            "image": np.zeros((steps + 1, 8, 8, 3), np.uint8),
            "state": np.zeros((steps + 1, 2), np.float32),
            "task_id": np.zeros(steps + 1, np.int64),
        },
        actions=actions,
        rewards=np.zeros(steps),
        terminations=ends,
        truncations=ends & False,
        success=True,
        source="expert",
        task=task,
        instruction="count",
        seed=seed,
        iteration=0,
        policy_version="",
    )


def test_the_sampler_gives_windows_that_end_with_their_episode(tmp_path):
    with EpisodeStore(tmp_path / "steps") as store:
        for seed in (0, 5):
            store.append(counted_episode(seed, size=2))
    sampler = BalancedSampler([store], batch_size=4, seed=0, chunk=3)
    batch = sampler.rows([0, 2, 3, 4])
    assert batch.actions.shape == (4, 6)
    expected = [
        [0.0, 0.1, 0.2, 0.3, 0.4, 0.5],
        [0.4, 0.5, 0.6, 0.7, 0.6, 0.7],
        [0.6, 0.7, 0.6, 0.7, 0.6, 0.7],
        [5.0, 5.1, 5.2, 5.3, 5.4, 5.5],
    ]
    np.testing.assert_allclose(batch.actions, expected, rtol=1e-6)
    with pytest.raises(ValueError, match="chunk must be at least 1"):
        BalancedSampler([store], batch_size=4, seed=0, chunk=0)


def test_what_was_recorded_in_chunks_lies_beside_single_steps(tmp_path):
    """Successes of stage 1 on chunks, and demonstrations: rows of the former stay as they are."""
    with EpisodeStore(tmp_path / "steps") as single, EpisodeStore(tmp_path / "chunks") as chunks:
        single.append(counted_episode(0, size=2))
        chunks.append(counted_episode(0, size=6))
        chunks.append(counted_episode(1, size=6))
    batch = BalancedSampler([single, chunks], batch_size=4, seed=0, chunk=3).rows([0, 4])
    np.testing.assert_allclose(batch.actions[0], [0, 0.1, 0.2, 0.3, 0.4, 0.5], rtol=1e-6)
    np.testing.assert_allclose(batch.actions[1], [0, 0.1, 0.2, 0.3, 0.4, 0.5], rtol=1e-6)
    with pytest.raises(ValueError, match="draw from them separately"):
        BalancedSampler([single, chunks], batch_size=4, seed=0)


def test_supervised_learning_and_evaluation_of_chunks_end_to_end(tmp_path):
    """Training and evaluation are the usual ones: only sampler, statistics and wrapper know of chunks."""
    with EpisodeStore(toy_store(tmp_path / "demos"), mode="r") as store:
        statistics = chunk_statistics(compute_statistics([store]), 4)
        assert statistics.action_mean.shape == (8,)
        torch.manual_seed(0)
        encoder = tiny_encoder()
        head = ChunkedHead(encoder.feature_dim, 8, chunk=4, state_dim=2, **HEAD)
        policy = VLAPolicy(encoder, head, statistics=statistics)
        sampler = BalancedSampler([store], batch_size=16, seed=0, chunk=4)
        loss = train_supervised(policy, sampler, config=SLConfig(steps=60, batch_size=16, scope="head"))
    assert loss < 1.0  # targets have unit variance
    options = {"episodes_per_task": 4, "seed": 0, "num_envs_per_task": 2, "num_workers": 0}
    chunked = evaluate(policy, {"red": lambda: ChunkActions(toy_env(), chunk=4)}, **options).tasks["red"]
    averaged = evaluate(policy, {"red": lambda: EnsembleActions(toy_env(), chunk=4)}, **options).tasks["red"]
    assert all(episode.length <= 5 for episode in chunked.episodes)  # chunks of a horizon of 20 steps
    assert max(episode.length for episode in averaged.episodes) > 5


def test_worker_processes_need_no_torch_for_the_wrappers():
    code = "import sys, vla_rl.chunks; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "False", done.stderr


def test_half_precision_of_matrix_products_leaves_the_correlations_alone():
    head = ChunkedHead(32, 2 * 8, chunk=8, smoothness=0.999, width=16, num_queries=2, hidden_dim=16)
    features, noise = random_features(4), torch.randn(4, 16)
    with torch.no_grad():
        whole = head.distribution(features, None)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            half = head.distribution(features, None)
            drawn = half.sample(noise)
    assert torch.equal(half.factor, whole.factor) and torch.equal(half.log_det, whole.log_det)
    assert torch.equal(drawn, half.sample(noise))
