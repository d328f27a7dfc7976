"""Proximal policy optimisation on cached features: the losses as pure functions, and one update over a rollout."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vla_rl.encoders.features import Features
from vla_rl.guards import first_not_finite
from vla_rl.heads.value import ValueHead
from vla_rl.policy import VLAPolicy
from vla_rl.rl.rollout import Rollout
from vla_rl.settings import check_least, check_positive, check_share


@dataclass
class PPOConfig:
    """Stage 1. The paper gives none of these numbers; each is our choice."""

    total_timesteps: int = 160_000
    """env steps per RL task, in whole rollouts"""
    num_envs: int = 32
    """parallel environments"""
    rollout_steps: int = 256
    """env steps per environment and update"""
    learning_rate: float = 1e-4
    """Adam's learning rate of the actor"""
    critic_learning_rate: float = 3e-4
    """Adam's learning rate of the critic"""
    gamma: float = 0.99
    """discount"""
    gae_lambda: float = 0.95
    """lambda of generalised advantage estimation"""
    update_epochs: int = 8
    """passes over the rollout, at most"""
    minibatch_size: int = 2048
    """env steps per gradient step"""
    clip_coef: float = 0.2
    """epsilon of the clipped surrogate"""
    vf_coef: float = 0.5
    """weight of the value loss"""
    ent_coef: float = 0.0
    """weight of the entropy bonus"""
    bc_coef: float = 0.0
    """weight of a behaviour-cloning loss on expert data in the same objective (PPO + BC)"""
    max_grad_norm: float = 0.5
    """gradient clipping, actor and critic apart"""
    target_kl: float | None = 0.05
    """above this approximate KL of a minibatch the actor rests for the rest of the update; the critic goes on, for one
    step more where the VLM learns too"""
    critic_warmup_updates: int = 2
    """first updates that train only the fresh critic"""
    converged_success: float = 0.95
    """stop early when the noisy success rate of the rollout reaches this twice in a row"""
    dead_updates: int = 3
    """updates in a row whose policy loss or actor gradient is exactly 0 before the run stops; 0: go on all the same"""

    def __post_init__(self) -> None:
        if self.num_envs < 1 or self.rollout_steps < 1 or self.minibatch_size < 2:
            raise ValueError(
                f"num_envs={self.num_envs}, rollout_steps={self.rollout_steps}, minibatch_size={self.minibatch_size}: "
                "the first two must be at least 1 and the last at least 2"
            )
        check_least(0, learning_rate=self.learning_rate, critic_learning_rate=self.critic_learning_rate)
        check_positive(max_grad_norm=self.max_grad_norm)
        check_share(gamma=self.gamma, gae_lambda=self.gae_lambda)


def policy_loss(log_prob: Tensor, old_log_prob: Tensor, advantages: Tensor, *, clip_coef: float) -> Tensor:
    """PPO's clipped surrogate (Schulman et al. 2017, eq. 7), to be minimised; every argument [B]."""
    ratio = (log_prob - old_log_prob).exp()
    return -torch.min(advantages * ratio, advantages * ratio.clamp(1 - clip_coef, 1 + clip_coef)).mean()


def approx_kl(log_prob: Tensor, old_log_prob: Tensor) -> Tensor:
    """Low-variance estimate of KL(old || new) (http://joschu.net/blog/kl-approx.html, k3); arguments [B]."""
    log_ratio = log_prob - old_log_prob
    return (log_ratio.exp() - 1 - log_ratio).mean()


def explained_variance(values: Tensor, returns: Tensor) -> float:
    """1 - Var(returns - values) / Var(returns); arguments [B]. nan where the returns do not vary."""
    variance = returns.var()
    return float("nan") if variance == 0 else float(1 - (returns - values).var() / variance)


MAX_KL = 10.0  # of a minibatch; a trust region is thousands of times smaller


class UpdateError(RuntimeError):
    """An update that must not go on: NaN, a first ratio that is not 1, a policy that ran away, or no gradient."""


class DeadGradients:
    """Counts updates in a row from which the actor learned nothing, although there were rewards to learn from.

    Args:
        patience: how many are too many; 0 for any number.
    """

    def __init__(self, patience: int) -> None:
        self.patience, self.count = patience, 0

    def check(self, stats: Mapping[str, float]) -> None:
        """Take note of an update's figures; those of a critic's warm-up, or of an actor at rest, do not count.

        Raises:
            UpdateError: the policy loss, or the gradient of the head, was exactly 0 in too many updates in a row.
        """
        if "policy_loss" not in stats or stats.get("actor_steps") == 0:
            return
        # The mean over a single minibatch of normalised advantages may come out as 0 by chance.
        flat = stats["policy_loss"] == 0.0 and stats["gradient_steps"] > 1
        dead = flat or stats.get("actor_grad_norm", 0.0) == 0.0
        self.count = self.count + 1 if dead else 0
        if self.patience and self.count >= self.patience:
            raise UpdateError(
                f"the actor got no gradient in {self.count} updates in a row (policy loss {stats['policy_loss']:g}, "
                f"gradient norm {stats.get('actor_grad_norm', 0.0):g}): check that advantages vary, that the head's "
                "log_prob depends on its weights, and that the optimizer has these; dead_updates=0 goes on all the same"
            )


def ppo_update(
    policy: VLAPolicy,
    critic: ValueHead,
    optimizer: torch.optim.Optimizer,
    rollout: Rollout,
    *,
    config: PPOConfig,
    train_actor: bool = True,
    features_of: Callable[[Tensor], Features] | None = None,
    bc_loss: Callable[[], Tensor] | None = None,
    generator: torch.Generator | None = None,
) -> dict[str, float]:
    """Update head and critic over a rollout, in place.

    The head stays in the mode of the rollout, eval: with dropout the first ratio would not be 1.

    Args:
        policy: policy whose head is in `optimizer` (and its encoder, for PPO on the whole model).
        critic: value head, in `optimizer`.
        optimizer: Adam over everything that learns.
        rollout: what the collector returned, with advantages and returns.
        config: hyperparameters.
        train_actor: False while the critic warms up.
        features_of: rows -> features with gradients (PPO on the whole model); None: the rollout's cached features.
        bc_loss: returns a behaviour-cloning loss of one expert batch, weighted by `config.bc_coef`.
        generator: randomness of the minibatches.

    Returns:
        CleanRL's `losses/*` names to figures.

    Raises:
        UpdateError: the loss is not finite, the first ratio is not 1, or the KL explodes.
    """
    if features_of is None and rollout.fingerprint != policy.encoder.fingerprint:
        raise UpdateError(
            f"the rollout holds features of encoder {rollout.fingerprint}, the policy's encoder is now "
            f"{policy.encoder.fingerprint}: the VLM changed after the rollout; collect again"
        )
    rows = rollout.valid_rows
    advantages = rollout.advantages.flatten()
    advantages = (advantages - advantages[rows].mean()) / (advantages[rows].std() + 1e-8)
    returns, old_log_probs, actions = rollout.returns.flatten(), rollout.log_probs.flatten(), rollout.flat_actions
    stats: dict[str, list[float]] = {}
    actor_learns, steps = train_actor, 0
    for batch in _minibatches(rows, config, generator):
        with torch.set_grad_enabled(train_actor):  # the loss of a fresh critic must not move the VLM
            features = rollout.features(batch) if features_of is None else features_of(batch)
        state = rollout.states(batch)
        value_loss = 0.5 * (critic(features, state) - returns[batch]).square().mean()
        loss = config.vf_coef * value_loss
        record = {"value_loss": value_loss.item()}
        if actor_learns:
            distribution = policy.head.distribution(features, state)
            log_prob = distribution.log_prob(actions[batch])
            ratio = (log_prob.detach() - old_log_probs[batch]).exp()
            if steps == 0 and features_of is None and (ratio - 1).abs().max() > 1e-2:
                raise UpdateError(
                    f"the first PPO ratio is {ratio.min():.3f}..{ratio.max():.3f}, not 1: features or head changed "
                    "between rollout and update; check that nothing trains in between and that dropout is off"
                )
            surrogate = policy_loss(log_prob, old_log_probs[batch], advantages[batch], clip_coef=config.clip_coef)
            entropy = distribution.entropy().mean()
            kl = approx_kl(log_prob.detach(), old_log_probs[batch]).item()
            record |= {
                "policy_loss": surrogate.item(),
                "entropy": entropy.item(),
                "approx_kl": kl,
                "old_approx_kl": (old_log_probs[batch] - log_prob.detach()).mean().item(),
                "clipfrac": ((ratio - 1).abs() > config.clip_coef).float().mean().item(),
            }
            if kl > MAX_KL:
                raise UpdateError(
                    f"the approximate KL of a minibatch is {kl:.1f} and its largest ratio {ratio.max():.3g}: the "
                    "policy ran away; lower learning_rate"
                )
            if config.target_kl is not None and kl > config.target_kl:
                actor_learns = False
            else:
                loss = loss + surrogate - config.ent_coef * entropy
                if bc_loss is not None and config.bc_coef:
                    imitation = bc_loss()
                    loss = loss + config.bc_coef * imitation
                    record["bc_loss"] = imitation.item()
        if not torch.isfinite(loss):
            culprit = first_not_finite(_inputs(rollout))
            raise UpdateError(
                f"the PPO loss is {loss.item()}"
                + (f", for NaN or infinity came with the rollout's {culprit}" if culprit else "")
                + "; lower learning_rate or check the rewards and observations"
            )
        for key, value in record.items():
            stats.setdefault(key, []).append(value)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if actor_learns:
            stats.setdefault("actor_grad_norm", []).append(_grad_norm(policy.head))
        for group in optimizer.param_groups:
            norm = nn.utils.clip_grad_norm_(group["params"], config.max_grad_norm)
            if not torch.isfinite(norm):
                raise UpdateError(
                    f"the gradient of a finite PPO loss is {norm.item()}: the policy ran away; lower learning_rate"
                )
        optimizer.step()
        steps += 1
        if train_actor and not actor_learns and features_of is not None:
            break  # the critic alone is not worth further passes through the VLM
    result = {key: sum(values) / len(values) for key, values in stats.items()}
    result["explained_variance"] = explained_variance(rollout.values.flatten()[rows], returns[rows])
    result["gradient_steps"] = float(steps)
    if train_actor:
        result["actor_steps"] = float(len(stats.get("actor_grad_norm", ())))
    return result


def _inputs(rollout: Rollout) -> dict[str, Tensor | None]:
    """What an update computes its loss from, by name; rewards first, as they are what goes wrong most."""
    names = ("rewards", "tokens", "state", "actions", "log_probs", "values", "advantages", "returns")
    return {name: getattr(rollout, name) for name in names}


def _grad_norm(module: nn.Module) -> float:
    gradients = [p.grad.norm() for p in module.parameters() if p.grad is not None]
    return torch.stack(gradients).norm().item() if gradients else 0.0


def _minibatches(rows: Tensor, config: PPOConfig, generator: torch.Generator | None) -> Iterator[Tensor]:
    """Every epoch's rows in a new order, in minibatches."""
    for _ in range(config.update_epochs):
        for batch in rows[torch.randperm(len(rows), generator=generator)].split(config.minibatch_size):
            if len(batch) > 1:
                yield batch
