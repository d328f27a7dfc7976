"""Stage 1 of iRe-VLA by stable-baselines3's own PPO: it trains the head of a policy whose VLM stays frozen.

python examples/integrations/sb3_frozen_vlm.py --policy POLICY --out TRAINED
needs pip install "vla-rl[sb3]"; POLICY is a directory or hub id of a VLAPolicy, such as a checkpoint of `vla-rl train`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import gymnasium as gym
import tyro
from gymnasium.vector import AutoresetMode
from stable_baselines3 import PPO
from stable_baselines3.common.vec_env import VecMonitor

from vla_rl import VLAPolicy
from vla_rl.envs import EncodeObservation
from vla_rl.integrations.stable_baselines3 import CriticWarmup, EncodedVecEnv, copy_back, policy_kwargs, warm_start
from vla_rl.vector import WorkerVectorEnv


@dataclass
class PPOArgs:
    """stable-baselines3's names."""

    total_timesteps: int = 40_000
    """env steps"""
    num_envs: int = 32
    """parallel environments"""
    num_workers: int | None = None
    """processes for them; 0 runs them in this one"""
    n_steps: int = 128
    """env steps per environment and update"""
    batch_size: int = 1024
    """env steps per gradient step"""
    n_epochs: int = 8
    """passes over a rollout"""
    learning_rate: float = 1e-4
    """Adam's learning rate"""
    gamma: float = 0.99
    """discount"""
    target_kl: float = 0.03
    """an update stops above 1.5 times this"""
    sde_sample_freq: int = 50
    """env steps for which one matrix of exploration noise is kept, if the head explores by gSDE"""
    critic_warmup: int = 2
    """first updates that train the critic alone"""
    seed: int = 0
    """of everything"""


@dataclass
class Args:
    """What to train, where."""

    policy: str
    """directory or hub id of the policy to start from"""
    out: str
    """new directory for the trained policy"""
    env_id: str = "vla_rl_envs:VLA/MetaWorld-v0"
    """environment in the observation convention"""
    task: str = "drawer-open"
    """its task"""
    variant: str = "new"
    """its variant"""
    ppo: PPOArgs = field(default_factory=PPOArgs)
    """hyperparameters"""


def train(policy: VLAPolicy, make_env: Callable[[], gym.Env], args: PPOArgs, *, verbose: int = 0) -> None:
    """Train the policy's head in place."""
    envs = WorkerVectorEnv(
        [make_env] * args.num_envs, num_workers=args.num_workers, autoreset_mode=AutoresetMode.SAME_STEP
    )
    env = VecMonitor(EncodedVecEnv(EncodeObservation(envs, policy.encoder)))
    config: dict[str, Any] = policy.head.config()
    model = PPO(
        "MultiInputPolicy",
        env,
        policy_kwargs=policy_kwargs(policy),
        use_sde=config["exploration"] == "gsde",
        sde_sample_freq=args.sde_sample_freq,
        n_steps=args.n_steps,
        batch_size=args.batch_size,
        n_epochs=args.n_epochs,
        learning_rate=args.learning_rate,
        gamma=args.gamma,
        target_kl=args.target_kl,
        seed=args.seed,
        verbose=verbose,
    )
    warm_start(model, policy, obs=env.reset())
    model.learn(args.total_timesteps, callback=CriticWarmup(args.critic_warmup))
    copy_back(model, policy)
    env.close()


if __name__ == "__main__":
    args = tyro.cli(Args)
    policy = VLAPolicy.from_pretrained(args.policy)
    train(policy, functools.partial(gym.make, args.env_id, task=args.task, variant=args.variant), args.ppo, verbose=1)
    policy.save_pretrained(args.out)
