"""The paper's action head: token learner, MLP, and a Gaussian around its output for RL."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vla_rl.encoders.features import Features
from vla_rl.heads.base import ActionHead
from vla_rl.heads.distributions import DiagonalGaussian, StateDependentGaussian
from vla_rl.heads.pooling import PooledMLP, Pooler
from vla_rl.settings import check_choice, check_positive

Exploration = Literal["gsde", "gaussian"]


class GaussianHead(ActionHead):
    """Token learner -> MLP -> mean action; mean squared error in stages 0 and 2, a Gaussian in stage 1.

    The paper leaves open how its MSE head becomes stochastic. Here the log-std does not depend on the observation and
    the exploration is gSDE by default: one noise matrix per episode, so that exploration is smooth in time.

    Args:
        feature_dim: D of the encoder's tokens.
        action_dim: A.
        state_dim: S; 0 without proprioception.
        width: width of the token learner.
        num_queries: learned queries of the token learner.
        hidden_dim: size of the last hidden layer.
        exploration: "gsde" (held for an episode) or "gaussian" (independent per step).
        init_std: standard deviation of the exploration at the start of stage 1, in normalised action units.
        pooler: from tokens to one vector; the paper's token learner, or one of the others of `vla_rl.heads.pooling`.

    Raises:
        ValueError: `exploration` is another word, or `init_std` not above 0.
    """

    supports_rl = True

    def __init__(
        self,
        feature_dim: int,
        action_dim: int,
        *,
        state_dim: int = 0,
        width: int = 128,
        num_queries: int = 8,
        hidden_dim: int = 256,
        exploration: Exploration = "gsde",
        init_std: float = 0.3,
        pooler: Pooler = "token_learner",
    ):
        super().__init__()
        check_choice(Exploration, exploration=exploration)
        check_positive(init_std=init_std)
        self._config = {
            "feature_dim": feature_dim,
            "action_dim": action_dim,
            "state_dim": state_dim,
            "width": width,
            "num_queries": num_queries,
            "hidden_dim": hidden_dim,
            "exploration": exploration,
            "init_std": init_std,
            "pooler": pooler,
        }
        self.exploration = exploration
        self.init_std = init_std
        self.body = PooledMLP(
            feature_dim,
            state_dim=state_dim,
            width=width,
            num_queries=num_queries,
            hidden_dim=hidden_dim,
            pooler=pooler,
        )
        self.mean = nn.Linear(hidden_dim, action_dim)
        rows = (hidden_dim,) if exploration == "gsde" else ()
        self.log_std = nn.Parameter(torch.full((*rows, action_dim), math.log(init_std)))

    def config(self) -> dict[str, Any]:
        """Keyword arguments that rebuild this head."""
        return dict(self._config)

    def distribution(self, features: Features, state: Tensor | None) -> DiagonalGaussian:
        """Gaussian over normalised actions, batch [B], event [A]."""
        latent = self.body(features, state)
        return self._around(self.mean(latent), latent)

    def _around(self, mean: Tensor, latent: Tensor) -> DiagonalGaussian:
        """The exploration around mean actions [B, A], from the latent [B, L]."""
        if self.exploration == "gsde":
            return StateDependentGaussian(mean, latent, self.log_std)
        return DiagonalGaussian(mean, self.log_std.exp())

    def predict(self, features: Features, state: Tensor | None) -> Tensor:
        """The mean action, [B, A]."""
        return self.mean(self.body(features, state))

    def supervised_loss(self, features: Features, state: Tensor | None, actions: Tensor) -> Tensor:
        """Mean squared error (the paper's J0 and J2), and what the pooler learns beside it."""
        loss = nn.functional.mse_loss(self.predict(features, state), actions)
        return loss + self.body.auxiliary_loss(features)

    def draw_noise(self, num_envs: int) -> Tensor | None:
        """Standard normal [num_envs, L, A] to be held for an episode (gSDE), or None."""
        if self.exploration != "gsde":
            return None
        return torch.randn(num_envs, *self.log_std.shape, device=self.log_std.device)

    @torch.no_grad()
    def start_exploration(self, features: Features, state: Tensor | None) -> None:
        """Reset the log-std so that the standard deviation of the action is `init_std` on these features."""
        log_std = math.log(self.init_std)
        if self.exploration == "gsde":
            squared_norm = self.body(features, state).square().sum(-1).mean()
            log_std -= 0.5 * math.log(float(squared_norm) + 1e-8)
        self.log_std.fill_(log_std)
