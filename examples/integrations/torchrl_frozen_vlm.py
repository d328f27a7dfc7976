"""Stage 1 of iRe-VLA by TorchRL's PPO loss: it trains the head of a policy whose VLM stays frozen.

python examples/integrations/torchrl_frozen_vlm.py --policy POLICY --out TRAINED
needs pip install "vla-rl[torchrl]"; POLICY is a directory or hub id of a VLAPolicy, such as a checkpoint of
`vla-rl train`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field

import gymnasium as gym
import torch
import tyro
from gymnasium.vector import AutoresetMode
from torchrl.collectors import Collector
from torchrl.objectives import ClipPPOLoss
from torchrl.objectives.value import GAE

from vla_rl import Features, VLAPolicy
from vla_rl.envs import EncodeObservation
from vla_rl.integrations.torchrl import EncodedEnv, make_actor, make_critic
from vla_rl.vector import WorkerVectorEnv


@dataclass
class PPOArgs:
    """Hyperparameters."""

    total_timesteps: int = 40_000
    """env steps"""
    num_envs: int = 32
    """parallel environments"""
    num_workers: int | None = None
    """processes for them; 0 runs them in this one"""
    rollout_steps: int = 128
    """env steps per environment and update"""
    minibatch_size: int = 1024
    """env steps per gradient step"""
    update_epochs: int = 8
    """passes over a rollout"""
    learning_rate: float = 1e-4
    """Adam's learning rate"""
    gamma: float = 0.99
    """discount"""
    target_kl: float = 0.05
    """above this the actor rests for the rest of the update"""
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
    torch.manual_seed(args.seed)
    envs = WorkerVectorEnv(
        [make_env] * args.num_envs, num_workers=args.num_workers, autoreset_mode=AutoresetMode.DISABLED
    )
    env = EncodedEnv(EncodeObservation(envs, policy.encoder))
    env.set_seed(args.seed)
    observation = env.reset()["observation"]
    features = Features(observation["tokens"], observation["mask"], policy.encoder.fingerprint)
    policy.head.start_exploration(features, policy.normalize_state(observation.get("state", None)))

    actor, critic = make_actor(policy), make_critic(policy)
    advantage = GAE(gamma=args.gamma, lmbda=0.95, value_network=critic, average_gae=True)
    loss_module = ClipPPOLoss(actor, critic, clip_epsilon=0.2, entropy_coeff=0.0, critic_coeff=0.5)
    optimizer = torch.optim.Adam(loss_module.parameters(), args.learning_rate)
    frames = args.num_envs * args.rollout_steps
    collector = Collector(
        env,
        actor,
        frames_per_batch=frames,
        total_frames=args.total_timesteps // frames * frames,
        auto_register_policy_transforms=True,
    )
    for update, rollout in enumerate(collector):
        with torch.no_grad():
            advantage(rollout)
        rows, actor_learns = rollout.reshape(-1), update >= args.critic_warmup
        for _ in range(args.update_epochs):
            for batch in torch.randperm(len(rows)).split(args.minibatch_size):
                losses = loss_module(rows[batch])
                actor_learns = actor_learns and losses["kl_approx"].item() <= args.target_kl
                loss = losses["loss_critic"] + (losses["loss_objective"] if actor_learns else 0.0)
                optimizer.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(loss_module.parameters(), 0.5)
                optimizer.step()
        if verbose:
            ended = rollout["next", "done"]
            rate = rollout["next", "success"][ended].float().mean().item()
            print(f"update {update}: {int(ended.sum())} episodes ended, {rate:.2f} of them in success")
    collector.shutdown()


if __name__ == "__main__":
    args = tyro.cli(Args)
    policy = VLAPolicy.from_pretrained(args.policy)
    train(policy, functools.partial(gym.make, args.env_id, task=args.task, variant=args.variant), args.ppo, verbose=1)
    policy.save_pretrained(args.out)
