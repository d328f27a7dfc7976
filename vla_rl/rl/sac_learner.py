"""The updates of soft actor-critic on cached features: critics, target critics, actor, temperature."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn

from vla_rl.heads.pooling import critic_shape
from vla_rl.policy import VLAPolicy
from vla_rl.rl.latent_buffer import LatentBatch
from vla_rl.rl.optimizers import load_optimizer, optimizer_state
from vla_rl.rl.ppo import UpdateError
from vla_rl.rl.sac import (
    EnsembleCritic,
    SACfDConfig,
    actor_loss,
    critic_loss,
    executed_action,
    matrix_products,
    q_targets,
    reparameterised,
    temperature_loss,
    update_target,
)


class SACLearner:
    """The critics, their targets and the temperature of one stage 1; the actor is the policy's own head.

    Args:
        policy: its head learns, in place.
        config: hyperparameters.

    Attributes:
        num_updates: of the critics, so far.
    """

    def __init__(self, policy: VLAPolicy, *, config: SACfDConfig):
        self.policy, self.config = policy, config
        shape, action_dim = critic_shape(policy.head), len(policy.action_mean)
        self.critic = EnsembleCritic(
            policy.encoder.feature_dim,
            action_dim,
            state_dim=len(policy.state_mean),
            num_critics=config.num_critics,
            dtype=policy.encoder.compute_dtype,
            **shape,
        ).to(policy.device)
        self.target = copy.deepcopy(self.critic).requires_grad_(False)
        self.log_temperature = torch.tensor(math.log(config.init_temperature), device=policy.device, requires_grad=True)
        self.target_entropy = action_dim * (math.log(config.target_std) + 0.5 * math.log(2 * math.pi * math.e))
        self.critic_optimizer = torch.optim.Adam(self.critic.parameters(), lr=config.critic_learning_rate)
        self.actor_optimizer = torch.optim.Adam(policy.head.parameters(), lr=config.learning_rate)
        self.temperature_optimizer = torch.optim.Adam([self.log_temperature], lr=config.temperature_learning_rate)
        self.num_updates = 0

    @property
    def temperature(self) -> float:
        """Weight of the entropy now."""
        return self.log_temperature.exp().item()

    @property
    def num_actor_updates(self) -> int:
        """Of actor and temperature, so far."""
        delay = self.config.policy_delay
        return max(0, self.num_updates // delay - self.config.critic_warmup_updates // delay)

    def state_dict(self) -> dict[str, Any]:
        """What has been learned beside the head."""
        return {
            "critic": self.critic.state_dict(),
            "target": self.target.state_dict(),
            "log_temperature": self.log_temperature.detach(),
            "optimizers": [optimizer_state(optimizer) for optimizer in self._optimizers],
            "num_updates": self.num_updates,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from where `state_dict` was taken."""
        self.critic.load_state_dict(state["critic"])
        self.target.load_state_dict(state["target"])
        with torch.no_grad():
            self.log_temperature.copy_(state["log_temperature"])
        for optimizer, saved in zip(self._optimizers, state["optimizers"], strict=True):
            load_optimizer(optimizer, saved)
        self.num_updates = state["num_updates"]

    @property
    def _optimizers(self) -> tuple[torch.optim.Optimizer, ...]:
        return self.critic_optimizer, self.actor_optimizer, self.temperature_optimizer

    def update(self, batch: LatentBatch, *, num_demos: int = 0) -> dict[str, float]:
        """One update of the critics, and of actor and temperature every `policy_delay`-th time.

        Args:
            batch: transitions.
            num_demos: how many of them, at the front, are demonstrations.

        Returns:
            Figures by name, for `losses/`.

        Raises:
            UpdateError: the features are stale or a loss is not finite.
        """
        if batch.features.fingerprint != self.policy.encoder.fingerprint:
            raise UpdateError(
                f"the batch holds features of encoder {batch.features.fingerprint}, the policy's encoder is now "
                f"{self.policy.encoder.fingerprint}: the VLM changed; collect again"
            )
        stats, embedding = self._update_critics(batch)
        self.num_updates += 1
        config = self.config
        if self.num_updates > config.critic_warmup_updates and self.num_updates % config.policy_delay == 0:
            stats |= self._update_actor(batch, embedding, num_demos)
        return stats

    def _half(self) -> torch.autocast:
        """The head's matrix products in the encoder's type: its token learner takes most of the time on a CPU."""
        return matrix_products(self.policy.encoder.compute_dtype, self.policy.device)

    def _update_critics(self, batch: LatentBatch) -> tuple[dict[str, float], Tensor]:
        """Figures, and the embedding of the batch's frames, without gradient."""
        config = self.config
        with torch.no_grad():
            with self._half():
                distribution = self.policy.head.distribution(batch.next_features, batch.next_state)
            action = executed_action(self.policy, distribution.sample())
            chosen = torch.randperm(config.num_critics)[: config.num_min_critics]
            next_q = self.target(self.target.embed(batch.next_features, batch.next_state), action)[chosen]
            bonus = self.temperature * distribution.entropy() if config.entropy_backup else 0.0
            targets = q_targets(batch.rewards, batch.discounts, next_q, entropy_bonus=bonus)
        embedding = self.critic.embed(batch.features, batch.state)
        q = self.critic(embedding, batch.actions)
        loss = critic_loss(q, targets)
        _step(self.critic_optimizer, loss, config.max_grad_norm, "critic")
        update_target(self.target, self.critic, config.tau)
        stats = {
            "value_loss": loss.item() / config.num_critics,
            "q": q.mean().item(),
            "q_target": targets.mean().item(),
        }
        return stats, embedding.detach()

    def _update_actor(self, batch: LatentBatch, embedding: Tensor, num_demos: int) -> dict[str, float]:
        config, head = self.config, self.policy.head
        with self._half():
            distribution = head.distribution(batch.features, batch.state)
        action = executed_action(self.policy, reparameterised(distribution, head))
        self.critic.requires_grad_(False)
        q, entropy = self.critic(embedding, action), distribution.entropy()
        loss = actor_loss(q, entropy, temperature=self.temperature)
        stats = {"policy_loss": loss.item(), "entropy": entropy.mean().item(), "temperature": self.temperature}
        if config.bc_coef and num_demos:
            imitation, kept = self._imitation(batch, embedding, q.detach(), num_demos)
            loss = loss + config.bc_coef * imitation
            stats |= {"bc_loss": imitation.item(), "q_filter": kept}
        _step(self.actor_optimizer, loss, config.max_grad_norm, "actor")
        self.critic.requires_grad_(True)
        warmer = temperature_loss(self.log_temperature, entropy, target_entropy=self.target_entropy)
        _step(self.temperature_optimizer, warmer, math.inf, "temperature")
        return stats

    def _imitation(self, batch: LatentBatch, embedding: Tensor, q: Tensor, num_demos: int) -> tuple[Tensor, float]:
        """Behaviour cloning of the demonstrations, and the part of them that counts.

        With the Q filter (Nair et al. 2018, arXiv 1709.10089) these are the ones that the critics prefer to the actor.
        """
        rows = torch.arange(num_demos, device=q.device)
        if self.config.q_filter:
            shown = self.critic(embedding[:num_demos], batch.actions[:num_demos])
            rows = rows[shown.mean(0) >= q[:, :num_demos].mean(0)]
            if not len(rows):
                return q.new_zeros(()), 0.0
        state = None if batch.state is None else batch.state[rows]
        actions = self.policy.normalize_action(batch.actions[rows])
        with self._half():
            loss = self.policy.head.supervised_loss(batch.features[rows], state, actions)
        return loss * len(rows) / num_demos, len(rows) / num_demos


def _step(optimizer: torch.optim.Optimizer, loss: Tensor, max_grad_norm: float, name: str) -> None:
    if not torch.isfinite(loss):
        raise UpdateError(f"the {name} loss of SAC is {loss.item()}; lower its learning rate or check the rewards")
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    for group in optimizer.param_groups:
        nn.utils.clip_grad_norm_(group["params"], max_grad_norm)
    optimizer.step()
