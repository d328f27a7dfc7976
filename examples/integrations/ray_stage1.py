"""Stage 1 of iRe-VLA on a Ray cluster: environments and frozen VLM in workers anywhere, the update of the head here.

python examples/integrations/ray_stage1.py                          an untrained policy, two workers on this machine
python examples/integrations/ray_stage1.py --address auto --num-workers 16 --num-envs 256 --policy POLICY \
    --env-id vla_rl_envs:VLA/MetaWorld-v0 --task drawer-open --variant new --out TRAINED
needs pip install "vla-rl[ray]"; POLICY is a directory that every machine can read, or a hub id. Without one there is
little to see but that all works: a policy that never succeeds does not learn from a sparse reward.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field

import gymnasium as gym
import ray
import torch
import tyro
from gymnasium.vector import AutoresetMode

from vla_rl import GaussianHead, VLAPolicy
from vla_rl.encoders import small_vlm
from vla_rl.integrations.ray import Placement, RayRolloutCollector, RolloutWorkers
from vla_rl.rl.ppo import PPOConfig
from vla_rl.rl.stage1 import Stage1Result, run_ppo
from vla_rl.vector import WorkerVectorEnv


@dataclass
class Args:
    """What to train, where."""

    address: str | None = None
    """the cluster's, such as "auto" on one of its machines; None starts one on this machine alone"""
    policy: str | None = None
    """directory or hub id of the policy to start from; None makes a small one with random weights"""
    out: str | None = None
    """new directory for the trained policy"""
    env_id: str = "vla_rl_envs:VLA/Toy-v0"
    """environment in the observation convention"""
    task: str = "reach-red"
    """its task"""
    variant: str = "original"
    """its variant"""
    num_workers: int = 2
    """Ray actors that share the environments"""
    env_processes: int = 0
    """processes of each for its environments; 0 steps them in the actor itself"""
    placement: Placement = field(default_factory=Placement)
    """what each actor takes of its machine"""
    seed: int = 0
    """of everything"""
    ppo: PPOConfig = field(
        default_factory=lambda: PPOConfig(
            total_timesteps=2_000, num_envs=8, rollout_steps=64, minibatch_size=256, update_epochs=4
        )
    )
    """hyperparameters"""


def make_env(args: Args) -> gym.Env:
    """One environment."""
    return gym.make(args.env_id, task=args.task, variant=args.variant)


def make_envs(count: int, args: Args) -> gym.vector.VectorEnv:
    """A worker's environments; called there."""
    env_fns = [functools.partial(make_env, args)] * count
    return WorkerVectorEnv(env_fns, num_workers=args.env_processes, autoreset_mode=AutoresetMode.NEXT_STEP)


def untrained(args: Args) -> VLAPolicy:
    """A policy with random weights that fits the environment."""
    env = make_env(args)
    space = env.observation_space
    assert isinstance(space, gym.spaces.Dict) and env.action_space.shape is not None
    sentences, state = env.get_wrapper_attr("instructions"), space.spaces.get("state")
    encoder = small_vlm(sentences, image_size=32, width=32, vision_layers=1, text_layers=1, heads=2)
    state_dim = 0 if state is None or state.shape is None else state.shape[0]
    return VLAPolicy(encoder, GaussianHead(encoder.feature_dim, env.action_space.shape[0], state_dim=state_dim))


def train(policy: VLAPolicy, workers: RolloutWorkers, args: Args) -> Stage1Result:
    """PPO on the head, in place."""

    def log(metrics: dict[str, float], step: int) -> None:
        print(
            f"{step:>9,} env steps  success {metrics['charts/success_rate']:.2f}  value loss "
            f"{metrics['losses/value_loss']:.4f}  head {workers.version}  replaced {workers.num_restarts}  "
            f"dropped {workers.dropped_episodes}  refused {workers.refused_rollouts}"
        )

    torch.manual_seed(args.seed)
    return run_ppo(
        policy,
        workers,
        task=args.task,
        config=args.ppo,
        seed=args.seed,
        log=log,
        make_collector=RayRolloutCollector,
    )


def main(args: Args) -> None:
    """Train."""
    ray.init(address=args.address, log_to_driver=args.address is None)
    policy = untrained(args) if args.policy is None else VLAPolicy.from_pretrained(args.policy)
    with RolloutWorkers(
        args.policy or policy,
        functools.partial(make_envs, args=args),
        num_envs=args.ppo.num_envs,
        num_workers=args.num_workers,
        placement=args.placement,
    ) as workers:
        result = train(policy, workers, args)
    print(f"{result.num_episodes} episodes, {len(result.successes)} successes kept")
    if args.out is not None:
        policy.save_pretrained(args.out)
    ray.shutdown()


if __name__ == "__main__":
    main(tyro.cli(Args))
