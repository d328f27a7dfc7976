"""LeRobot's shapes: a policy with prefix tokens and an action queue, an environment with `pixels` and `agent_pos`."""

from collections import deque
from dataclasses import replace

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from tiny import differing, parameters
from torch import nn

from vla_rl.collect import run_expert
from vla_rl.data import BalancedSampler, EpisodeStore, compute_statistics
from vla_rl.envs import VLAObservation, instruction_table
from vla_rl.heads import GaussianHead
from vla_rl.integrations.lerobot import LeRobotBase, LeRobotEncoder, to_batch
from vla_rl.integrations.residual import ResidualActions
from vla_rl.policy import VLAPolicy
from vla_rl.rl.ppo import PPOConfig
from vla_rl.rl.stage1 import run_ppo
from vla_rl.robot import ManualReset, RecordEpisodes, SafetyLimits, evaluate_on_robot, robot_settings, train_on_robot
from vla_rl.sl.supervised import SLConfig, train_supervised

TEXT = "move the cart to the mark"
GOAL, BIASED_GOAL = 0.5, 0.2


class RailRobot(gym.Env):
    """As LeRobot wraps a robot: pictures by camera, joint positions, `is_success`; the mark is at 0.5."""

    def __init__(self, horizon=12):
        camera = spaces.Box(0, 255, (8, 16, 3), np.uint8)
        self.observation_space = spaces.Dict(
            {"pixels": spaces.Dict({"top": camera}), "agent_pos": spaces.Box(-1, 1, (1,), np.float64)}
        )
        self.action_space = spaces.Box(-1, 1, (1,), np.float32)
        self.horizon = horizon

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.place, self.steps = self.np_random.uniform(-0.9, 0.0), 0
        return self.look(), {"is_success": False}

    def step(self, action):
        self.place = float(np.clip(self.place + 0.5 * float(action[0]), -1, 1))
        self.steps += 1
        success = abs(self.place - GOAL) < 0.1
        return self.look(), float(success), success, self.steps >= self.horizon, {"is_success": success}

    def look(self):
        picture = np.zeros((8, 16, 3), np.uint8)
        picture[2:6, int((self.place + 1) / 2 * 15)] = 255
        return {"pixels": {"top": picture}, "agent_pos": np.array([self.place])}


def rail(horizon=12):
    names = {"image_key": ["pixels/top"], "state_key": "agent_pos", "success_key": "is_success"}
    return VLAObservation(RailRobot(horizon), instructions=[TEXT], **names)


def expert(env):
    return np.clip(np.array([2 * (GOAL - env.unwrapped.place)], np.float32), -1, 1)


class PrefixPolicy(nn.Module):
    """As SmolVLA and pi0: a prefix of image, language and state tokens; chunks of actions, taken from a queue."""

    def __init__(self, width=16, chunk=4):
        super().__init__()
        self.pixels, self.words = nn.Linear(4 * 4 * 3, width), nn.Embedding(32, width)
        self.state, self.chunk = nn.Linear(1, width), chunk
        self.reset()

    def reset(self):
        self.queue = deque()

    def embed_prefix(self, batch):
        """Tokens [B, L, D] and their padding mask [B, L]."""
        (camera,) = (value for key, value in batch.items() if key.startswith("observation.images."))
        patches = nn.functional.unfold(camera, 4, stride=4).transpose(1, 2)
        sentences = [[sum(map(ord, word)) % 32 for word in text.split()] for text in batch["task"]]
        longest = max(map(len, sentences))
        ids = torch.tensor([row + [0] * (longest - len(row)) for row in sentences])
        parts = [self.pixels(patches), self.words(ids), self.state(batch["observation.state"])[:, None]]
        mask = torch.ones(len(ids), sum(part.shape[1] for part in parts), dtype=torch.bool)
        for row, text in enumerate(sentences):
            mask[row, patches.shape[1] + len(text) : -1] = False
        return torch.cat(parts, 1), mask

    @torch.no_grad()
    def predict_action_chunk(self, batch):
        """Towards a goal that is not the mark."""
        place, actions = batch["observation.state"], []
        for _ in range(self.chunk):
            actions.append((0.8 * (BIASED_GOAL - place)).clamp(-1, 1))
            place = place + 0.5 * actions[-1]
        return torch.stack(actions, 1)

    def select_action(self, batch):
        if not self.queue:
            self.queue.extend(self.predict_action_chunk(batch).unbind(1))
        return self.queue.popleft()


@pytest.fixture
def smol():
    torch.manual_seed(0)
    return PrefixPolicy()


def encoder_of(smol):
    return LeRobotEncoder(smol, PrefixPolicy.embed_prefix, image_size=(8, 16), state_dim=1, cameras=("pixels_top",))


def test_the_env_in_the_observation_convention():
    env = rail()
    obs, info = env.reset(seed=0)
    assert set(obs) == {"image_pixels_top", "state", "task_id"} or set(obs) == {"image_top", "state", "task_id"}
    assert obs["state"].dtype == np.float32 and info["instruction"] == TEXT and info["success"] is False
    success = False
    for _ in range(12):
        *_, terminated, truncated, info = env.step(expert(env))
        success |= info["success"]
        if terminated or truncated:
            break
    assert success and terminated


def test_a_base_plays_its_chunks_as_its_own_queue_does(smol):
    base, env = LeRobotBase(smol), rail()
    obs, _ = env.reset(seed=1)
    smol.reset()
    for step in range(6):
        batch = {key: np.asarray(value)[None] for key, value in obs.items()}
        action = base.actions(batch, [TEXT], started=np.array([step == 0]))
        np.testing.assert_allclose(action, smol.select_action(to_batch(batch, [TEXT])), atol=1e-6)
        obs, *_ = env.step(action[0])
    assert abs(obs["state"][0] - BIASED_GOAL) < 0.1


def test_its_prefix_as_features_through_collection_and_supervised_learning(smol, tmp_path):
    frozen = parameters(smol)
    with EpisodeStore(tmp_path / "demos") as store:
        for seed in range(8):
            store.append(run_expert(rail(), expert, task="rail", seed=seed, noise=0.2))
        encoder = encoder_of(smol)
        head = GaussianHead(encoder.feature_dim, 1, state_dim=1, width=16, num_queries=2, hidden_dim=16)
        policy = VLAPolicy(encoder, head, statistics=compute_statistics([store]))
        sampler = BalancedSampler([store], batch_size=16, seed=0)
        config = SLConfig(steps=150, batch_size=16, scope="head", learning_rate=1e-2)
        before, frames = encoder.num_frames, store.total_steps
        train_supervised(policy, sampler, config=config)
        assert encoder.num_frames - before <= frames + 1  # each row once
    successes, n, _ = evaluate_on_robot(policy, rail(), episodes=6)
    assert (successes, n) == (6, 6) and not differing(frozen, parameters(smol))


@pytest.mark.slow
def test_ppo_learns_to_correct_a_biased_base(smol):
    fns = [rail] * 8
    base = LeRobotBase(smol, n_action_steps=1)
    make = lambda: ResidualActions(SyncVectorEnv(fns, autoreset_mode=AutoresetMode.NEXT_STEP), base, scale=0.6)  # noqa: E731
    torch.manual_seed(0)
    encoder = encoder_of(PrefixPolicy())
    head = GaussianHead(encoder.feature_dim, 1, state_dim=2, width=16, num_queries=2, hidden_dim=16, init_std=0.5)
    for parameter in head.mean.parameters():
        nn.init.zeros_(parameter)  # at first the base acts alone
    policy = VLAPolicy(encoder, head)

    def rate():
        env, found, ended = make(), np.zeros(8, bool), np.zeros(8, bool)
        obs, _ = env.reset(seed=100)
        for _ in range(12):
            action = policy.act(obs, [instruction_table(env)[i] for i in obs["task_id"]])
            obs, reward, terminated, truncated, _ = env.step(action)
            found |= (reward > 0) & ~ended
            ended |= terminated | truncated
        return found.mean()

    assert rate() == 0.0  # it stops short of the mark
    config = PPOConfig(
        total_timesteps=6_000, num_envs=8, rollout_steps=48, minibatch_size=96, update_epochs=6, learning_rate=3e-3
    )
    run_ppo(policy, make(), task="rail", config=replace(config, target_kl=0.1, critic_warmup_updates=1))
    assert rate() >= 0.9


def test_the_robot_loop_takes_it(smol, tmp_path):
    torch.manual_seed(0)
    encoder = encoder_of(smol)
    head = GaussianHead(encoder.feature_dim, 1, state_dim=1, width=16, num_queries=2, hidden_dim=16)
    policy = VLAPolicy(encoder, head)
    limited = SafetyLimits(RailRobot(horizon=6), max_delta=1.0)
    names = {"image_key": ["pixels/top"], "state_key": "agent_pos", "success_key": "is_success"}
    asked = []
    env = ManualReset(VLAObservation(limited, instructions=[TEXT], **names), asked.append)
    settings = {"num_demos": 1, "learning_starts": 12, "num_critics": 2, "batch_size": 8, "critic_warmup_updates": 2}
    config = robot_settings(total_timesteps=30, utd_ratio=1.0, **settings)
    run = train_on_robot(policy, env, task="rail", workdir=tmp_path / "run", config=config)
    with EpisodeStore(tmp_path / "run" / "episodes", mode="r") as store:
        assert run.finished and run.num_env_steps == sum(episode.total_steps for episode in store) >= 30
        assert len(asked) == run.num_episodes == len(store)
        assert store[0].observations["state"].shape[1:] == (1,)
    with EpisodeStore(tmp_path / "evaluation") as store:
        assert evaluate_on_robot(policy, RecordEpisodes(env, store, task="rail"), episodes=2)[1] == 2 == len(store)
