"""A small stage 1 of each kind that SIGTERM can come in, for the tests of its snapshots."""

import json
import os
import signal
from functools import partial
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode
from safetensors.torch import load_file
from tiny import parameters, tiny_policy, toy_env

from vla_rl.curriculum import StartCurriculum
from vla_rl.preemption import PreemptedError, stop_on_sigterm
from vla_rl.rl.ppo import PPOConfig
from vla_rl.rl.practice import EpisodeRecord
from vla_rl.rl.sac import SACfDConfig
from vla_rl.rl.snapshots import StageSnapshots
from vla_rl.rl.stage1 import run_collect, run_ppo
from vla_rl.rl.stage1_sac import run_sac
from vla_rl.vector import WorkerVectorEnv

NUM_ENVS, HORIZON, EPISODES = 4, 10, 24
PPO = PPOConfig(
    total_timesteps=400, num_envs=NUM_ENVS, rollout_steps=22, minibatch_size=44, update_epochs=1,
    critic_warmup_updates=1, converged_success=float("inf"),
)  # fmt: skip
SAC = SACfDConfig(
    total_timesteps=400, num_envs=NUM_ENVS, rollout_steps=5, num_demos=1, learning_starts=60, utd_ratio=0.25,
    num_critics=2, batch_size=8, critic_warmup_updates=10, n_step=3, converged_success=float("inf"),
)  # fmt: skip
MODES = ["ppo", "whole", "sac", "collect"]  # "whole" is PPO on the whole model


class Near(gym.Wrapper):
    """Episodes begin close to the square, so that some of them succeed."""

    def reset(self, *, seed=None, options=None):
        return self.env.reset(seed=seed, options={"closeness": 0.7})


def act(mode, folder, *, sigterm_at=None, of=None, exploration=None, ppo=PPO, on_episode=lambda: None):
    """A stage 1, and what it showed; SIGTERM comes with the end of its `sigterm_at`-th episode.

    Returns:
        policy, result (None after SIGTERM), `log` of (env steps, head then), `episodes`, `said`, `resets` (seeds).
    """
    policy = tiny_policy(init_std=1.0)
    torch.manual_seed(1)
    seen = SimpleNamespace(policy=policy, result=None, log=[], episodes=[], said=[], resets=[])
    make = partial(toy_env, horizon=HORIZON)
    curriculum = exploration is not None and exploration.start_curriculum
    thunks = [lambda: (StartCurriculum if curriculum else Near)(make())] * NUM_ENVS
    env = WorkerVectorEnv(thunks, num_workers=0, autoreset_mode=AutoresetMode.NEXT_STEP)
    reset = env.reset
    env.reset = lambda *, seed=None, **more: seen.resets.append(seed) or reset(seed=seed, **more)
    original = EpisodeRecord.__call__

    def ended(self, episode):
        original(self, episode)
        seen.episodes.append(episode)
        on_episode()
        if len(seen.episodes) == sigterm_at:
            os.kill(os.getpid(), signal.SIGTERM)

    shared = {
        "task": "reach-red",
        "seed": 3,
        "exploration": exploration,
        "log": lambda metrics, step: seen.log.append((step, parameters(policy))),
    }
    with pytest.MonkeyPatch.context() as patch, stop_on_sigterm():
        patch.setattr(EpisodeRecord, "__call__", ended)
        snapshots = StageSnapshots(folder, of=of, say=seen.said.append)
        try:
            with snapshots.on_sigterm():
                if mode in ("ppo", "whole"):
                    scope = "head" if mode == "ppo" else "all"
                    seen.result = run_ppo(policy, env, config=ppo, scope=scope, snapshots=snapshots, **shared)
                elif mode == "sac":
                    seen.result = run_sac(policy, env, config=SAC, snapshots=snapshots, **shared)
                else:
                    seen.result = run_collect(policy, env, num_episodes=EPISODES, snapshots=snapshots, **shared)
        except PreemptedError as stopped:
            assert stopped.code == 143
        finally:
            env.close()
    return seen


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def newest(folder):
    """The state in the newest snapshot, as JSON, and its tensors."""
    path = sorted(folder.glob("step*"))[-1]
    return json.loads((path / "state.json").read_text())["state"], load_file(path / "tensors.safetensors")


def in_part(part, tensors):
    """The tensors below a part of a snapshot's state, without its name."""
    return {name.removeprefix(f"/{part}/"): value for name, value in tensors.items() if name.startswith(f"/{part}/")}


def head_of(weights):
    return {name.removeprefix("head."): value for name, value in weights.items() if name.startswith("head.")}


def same_episodes(one, other):
    return len(one) == len(other) and all(
        np.array_equal(a.observations["image"], b.observations["image"]) and np.array_equal(a.actions, b.actions)
        for a, b in zip(one, other, strict=True)
    )


def same(one, other):
    """Whether two trees are bit-equal."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other
