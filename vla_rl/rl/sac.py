"""Soft actor-critic from demonstrations on cached features: settings, the losses as pure functions, the critics."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vla_rl.encoders.features import Features
from vla_rl.heads.distributions import Distribution
from vla_rl.heads.pooling import TokenLearner
from vla_rl.policy import VLAPolicy
from vla_rl.settings import check_choices, check_least, check_positive, check_share


@dataclass
class SACfDConfig:
    """Stage 1 by SAC from demonstrations, the algorithm of the paper's real robot.

    The paper gives 20 demonstrations and half of each batch from them; the rest is our choice, after RLPD (Ball et al.
    2023, arXiv 2302.02948).
    """

    total_timesteps: int = 20_000
    """env steps per RL task, in whole rollouts"""
    num_envs: int = 16
    """parallel environments"""
    rollout_steps: int = 8
    """env steps per environment between updates"""
    learn_between_episodes: bool = False
    """all updates wait until the one environment has finished an episode, so that none holds up a robot's clock"""
    num_demos: int = 20
    """successes of the policy as it comes (zero-shot) that are gathered before anything learns; plain SAC: 0, and
    `keep_successes=False`"""
    learning_starts: int = 5_000
    """env steps to gather them in, or longer, until as many episodes have ended as there are environments"""
    keep_successes: bool = True
    """later successes join the demonstrations, without being encoded again"""
    demo_fraction: float = 0.5
    """part of a batch from the demonstrations"""
    utd_ratio: float = 0.5
    """critic updates per env step; every step is replayed utd_ratio * batch_size times over. Above 1, as in RLPD, where
    env steps are dear (a robot, or a GPU to learn on)"""
    policy_delay: int = 2
    """critic updates per update of actor and temperature"""
    batch_size: int = 256
    """transitions per update"""
    buffer_size: int = 100_000
    """frames in the online buffer, at most; as many again for the demonstrations"""
    buffer_gb: float = 4.0
    """memory of each of the two buffers in GB, at most"""
    buffer_device: Literal["cpu", "policy"] = "cpu"
    """where they lie; on the policy's GPU, if there is room, no features travel to it and back"""
    gamma: float = 0.99
    """discount"""
    n_step: int = 10
    """steps of the return that a target looks ahead; with 3, the actor leaves before the critics know the way"""
    tau: float = 0.005
    """step of the target critics towards the critics, per update"""
    num_critics: int = 4
    """critics over one token learner"""
    num_min_critics: int = 2
    """random subset of the target critics whose minimum is the target"""
    critic_learning_rate: float = 3e-4
    """Adam's learning rate of the critics"""
    learning_rate: float = 1e-4
    """Adam's learning rate of the actor"""
    temperature_learning_rate: float = 1e-3
    """Adam's learning rate of the logarithm of the temperature"""
    init_temperature: float = 0.01
    """weight of the entropy at the start"""
    target_std: float = 0.15
    """the temperature keeps the entropy at that of a Gaussian of this standard deviation, in normalised action units"""
    entropy_backup: bool = False
    """count the entropy of later steps in the targets; RLPD leaves it out where rewards are sparse"""
    bc_coef: float = 0.5
    """weight of behaviour cloning on the demonstrations"""
    q_filter: bool = False
    """clone only where the critics prefer the demonstration to the actor"""
    critic_warmup_updates: int = 500
    """first updates that train only the fresh critics"""
    max_grad_norm: float = 1.0
    """gradient clipping, actor and critics apart"""
    converged_success: float = 0.95
    """stop early when the noisy success rate reaches this twice in a row"""

    def __post_init__(self) -> None:
        check_choices(self)
        check_positive(init_temperature=self.init_temperature, target_std=self.target_std)
        check_positive(max_grad_norm=self.max_grad_norm)
        check_least(0, learning_rate=self.learning_rate, critic_learning_rate=self.critic_learning_rate)
        check_least(0, temperature_learning_rate=self.temperature_learning_rate)
        check_share(gamma=self.gamma, tau=self.tau)
        if min(self.num_envs, self.rollout_steps, self.n_step, self.policy_delay) < 1 or self.batch_size < 2:
            raise ValueError(
                f"num_envs={self.num_envs}, rollout_steps={self.rollout_steps}, n_step={self.n_step}, "
                f"policy_delay={self.policy_delay}, batch_size={self.batch_size}: expected at least 1, the last 2"
            )
        if self.learn_between_episodes and self.num_envs > 1:
            raise ValueError(
                f"learn_between_episodes=True with num_envs={self.num_envs}: the others would step on while the "
                "slowest one finishes; set num_envs=1, or learn_between_episodes=False"
            )
        if not 1 <= self.num_min_critics <= self.num_critics:
            raise ValueError(
                f"num_min_critics={self.num_min_critics}; expected 1 .. num_critics={self.num_critics} of the critics"
            )
        if not 0 <= self.demo_fraction < 1:
            raise ValueError(f"demo_fraction={self.demo_fraction}; expected a number from 0 to below 1")


def q_targets(rewards: Tensor, discounts: Tensor, next_q: Tensor, *, entropy_bonus: Tensor | float = 0.0) -> Tensor:
    """Targets y = r + discount * (min_i Q_i(s', a') + alpha * H(s')) (Haarnoja et al. 2018, arXiv 1812.05905, eq. 5).

    Args:
        rewards: [B].
        discounts: [B], 0 where the episode terminated; truncated ones bootstrap.
        next_q: [E, B], of the target critics.
        entropy_bonus: alpha * H, [B]; 0 leaves it out.
    """
    return rewards + discounts * (next_q.min(0).values + entropy_bonus)


def critic_loss(q: Tensor, targets: Tensor) -> Tensor:
    """Mean squared error of every critic [E, B] against the same targets [B], summed over critics."""
    return (q - targets).square().mean(1).sum()


def actor_loss(q: Tensor, entropy: Tensor, *, temperature: float) -> Tensor:
    """-(Q + alpha * H), with Q the mean over critics [E, B] (REDQ, arXiv 2101.05982) and H the policy's entropy [B]."""
    return -(q.mean(0) + temperature * entropy).mean()


def temperature_loss(log_temperature: Tensor, entropy: Tensor, *, target_entropy: float) -> Tensor:
    """Scalar log alpha * (H - target): alpha falls while the entropy H [B] exceeds its target (1812.05905, eq. 18)."""
    return log_temperature * (entropy.detach().mean() - target_entropy)


@torch.no_grad()
def update_target(target: nn.Module, source: nn.Module, tau: float) -> None:
    """Move every weight of `target` by `tau` of the way to that of `source`."""
    for slow, fast in zip(target.parameters(), source.parameters(), strict=True):
        slow.lerp_(fast, tau)


class _Projection(torch.autograd.Function):
    """Clip to [-1, 1]; backwards, outside the box only the part of the gradient that leads back into it passes."""

    @staticmethod
    def forward(ctx: Any, action: Tensor) -> Tensor:
        ctx.save_for_backward(action)
        return action.clamp(-1.0, 1.0)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        (action,) = ctx.saved_tensors
        leads_out = ((action > 1) & (gradient < 0)) | ((action < -1) & (gradient > 0))
        return gradient.masked_fill(leads_out, 0.0)


def executed_action(policy: VLAPolicy, action: Tensor) -> Tensor:
    """What the env gets for an action [B, A] of the head: in its units, clipped to [-1, 1]; differentiable.

    The head is no squashed Gaussian: its mean keeps the meaning that supervised learning gave it, so the deterministic
    policy is the same before and after, and exploration near the bounds is not smaller than elsewhere. The critics see
    the clipped action, as the env does. The gradient is that of minimising over the box (compare the inverting
    gradients of Hausknecht & Stone 2016, arXiv 1511.04143): an action outside can return, and none is pushed further.
    """
    return _Projection.apply(policy.head.executed(action) * policy.action_std + policy.action_mean)  # type: ignore[no-any-return]


def reparameterised(distribution: Distribution, head: nn.Module) -> Tensor:
    """A sample [B, A] that the gradient of the critics flows through.

    Raises:
        TypeError: the head's distribution gives none.
    """
    sample = distribution.sample()
    if not sample.requires_grad:
        raise TypeError(
            f"head {type(head).__name__!r} draws actions that no gradient flows through, so SAC cannot train it; use "
            'GaussianHead, or stage1_mode="ppo"'
        )
    return sample


def matrix_products(dtype: torch.dtype, device: torch.device) -> torch.autocast:
    """Autocast to `dtype` within the block; nothing for float32."""
    half = dtype != torch.float32
    return torch.autocast(device.type, dtype=dtype if half else None, enabled=half)


class EnsembleCritic(nn.Module):
    """Action values: one token learner (the actor's shape), then several layer-normalised MLPs over it.

    Layer normalisation bounds what the critics say of actions that they have not seen (RLPD, section 4.2). The token
    learner is the costly part, so the critics share one; their MLPs begin at different weights.

    Args:
        feature_dim: D of the encoder's tokens.
        action_dim: A.
        state_dim: S; 0 without proprioception.
        width: width of the token learner.
        num_queries: learned queries of the token learner.
        hidden_dim: size of the hidden layers.
        num_critics: E.
        dtype: of the matrix products, all but the last.
    """

    def __init__(
        self,
        feature_dim: int,
        action_dim: int,
        *,
        state_dim: int = 0,
        width: int = 128,
        num_queries: int = 8,
        hidden_dim: int = 256,
        num_critics: int = 4,
        dtype: torch.dtype = torch.float32,
    ):
        super().__init__()
        self.dtype = dtype
        self.pool = TokenLearner(feature_dim, width=width, num_queries=num_queries)
        self.latent = nn.Sequential(
            nn.Linear(self.pool.output_dim + state_dim, hidden_dim), nn.LayerNorm(hidden_dim), nn.Tanh()
        )
        self.first = _EnsembleLinear(num_critics, hidden_dim + action_dim, hidden_dim)
        self.second = _EnsembleLinear(num_critics, hidden_dim, hidden_dim)
        self.norms = nn.ModuleList([nn.LayerNorm(hidden_dim), nn.LayerNorm(hidden_dim)])
        self.output = _EnsembleLinear(num_critics, hidden_dim, 1)

    def embed(self, features: Features, state: Tensor | None) -> Tensor:
        """What the MLPs know of a frame, float32 [B, L]."""
        with matrix_products(self.dtype, features.tokens.device):
            pooled = self.pool(features.tokens.float(), features.mask)
            latent = self.latent(pooled if state is None else torch.cat([pooled, state.to(pooled.dtype)], dim=-1))
        return latent.float()

    def forward(self, embedding: Tensor, actions: Tensor) -> Tensor:
        """Q [E, B] of frames from `embed` [B, L] and actions [B, A] as executed."""
        hidden = torch.cat([embedding, actions], dim=-1)
        with matrix_products(self.dtype, hidden.device):
            hidden = nn.functional.gelu(self.norms[0](self.first(hidden)))
            hidden = nn.functional.gelu(self.norms[1](self.second(hidden)))
        # Actions differ by little in value: the last sum keeps all its digits.
        return self.output(hidden.float()).squeeze(-1)


class _EnsembleLinear(nn.Module):
    """E linear layers at once: [B, in] or [E, B, in] to [E, B, out]."""

    def __init__(self, num: int, inputs: int, outputs: int):
        super().__init__()
        bound = 1 / math.sqrt(inputs)
        self.weight = nn.Parameter(torch.empty(num, inputs, outputs).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.zeros(num, 1, outputs))

    def forward(self, x: Tensor) -> Tensor:
        return torch.matmul(x, self.weight) + self.bias
