"""A Gaussian squashed into the box of actions by tanh, as in SAC."""

from __future__ import annotations

import torch
from torch import Tensor

from vla_rl.encoders.features import Features
from vla_rl.heads.bounds import Bound, box_tensors
from vla_rl.heads.distributions import SquashedGaussian
from vla_rl.heads.gaussian import Exploration, GaussianHead
from vla_rl.heads.pooling import Pooler


class TanhGaussianHead(GaussianHead):
    """Token learner -> MLP -> tanh -> action within `[low, high]`; the log-prob counts the squashing exactly.

    Its samples never leave the box, so what the env executes is what the log-prob is of. Where demonstrations lie at a
    bound, the squashed mean goes deep into tanh's flat part and exploration shrinks; `unit_box(..., margin=0.1)` keeps
    them away from it.

    Args:
        feature_dim: D of the encoder's tokens.
        action_dim: A.
        low: lower bound, for all dimensions or each, in normalised action units; see `unit_box`.
        high: upper bound.
        state_dim: S; 0 without proprioception.
        width: width of the token learner.
        num_queries: learned queries of the token learner.
        hidden_dim: size of the last hidden layer.
        exploration: "gsde" (held for an episode) or "gaussian" (independent per step), before squashing.
        init_std: standard deviation at the start of stage 1, before squashing.
        pooler: from tokens to one vector; see `vla_rl.heads.pooling`.
    """

    def __init__(
        self,
        feature_dim: int,
        action_dim: int,
        *,
        low: Bound = -1.0,
        high: Bound = 1.0,
        state_dim: int = 0,
        width: int = 128,
        num_queries: int = 8,
        hidden_dim: int = 256,
        exploration: Exploration = "gsde",
        init_std: float = 0.3,
        pooler: Pooler = "token_learner",
    ):
        super().__init__(
            feature_dim,
            action_dim,
            state_dim=state_dim,
            width=width,
            num_queries=num_queries,
            hidden_dim=hidden_dim,
            exploration=exploration,
            init_std=init_std,
            pooler=pooler,
        )
        self._config |= {"low": low, "high": high}
        lower, upper = box_tensors(low, high, action_dim)
        self.register_buffer("low", lower, persistent=False)
        self.register_buffer("high", upper, persistent=False)
        self.low: Tensor
        self.high: Tensor

    def distribution(self, features: Features, state: Tensor | None) -> SquashedGaussian:
        """Squashed Gaussian over normalised actions, batch [B], event [A]."""
        return SquashedGaussian(super().distribution(features, state), self.low, self.high)

    def predict(self, features: Features, state: Tensor | None) -> Tensor:
        """The squashed mean, [B, A]."""
        mean = super().predict(features, state).float()  # a bfloat16 under autocast, and the bounds are none
        return torch.lerp(self.low, self.high, (1 + torch.tanh(mean)) / 2)

    def supervised_loss(self, features: Features, state: Tensor | None, actions: Tensor) -> Tensor:
        """Mean squared error of the squashed mean.

        Raises:
            ValueError: an action lies outside the box.
        """
        if ((actions < self.low - 1e-3) | (actions > self.high + 1e-3)).any():
            raise ValueError(
                f"actions from {actions.min():.2f} to {actions.max():.2f} in normalised units leave this head's box; "
                "build it with **unit_box(statistics), the statistics of the policy"
            )
        return super().supervised_loss(features, state, actions)
