"""Actions as tokens: a categorical over bins per action dimension, as in RT-2 and OpenVLA."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from vla_rl.encoders.features import Features
from vla_rl.heads.base import ActionHead
from vla_rl.heads.bounds import Bound, box_tensors
from vla_rl.heads.chunked import check_chunk
from vla_rl.heads.distributions import BinnedCategorical
from vla_rl.heads.pooling import PooledMLP, Pooler


class TokenHead(ActionHead):
    """Token learner -> MLP -> logits of equal bins per dimension; cross-entropy, and PPO over the bins' log-probs.

    All dimensions are decoded in parallel (OpenVLA-OFT's discrete variant), so they are independent given the features.
    Exploration is the categorical itself, at temperature 1: what cross-entropy has left uncertain.

    Args:
        feature_dim: D of the encoder's tokens.
        action_dim: A, or chunk * A.
        bins: bins per dimension.
        low: lower edge of the bins, for all dimensions or each, in normalised action units; `unit_box` for the env's
            box, or OpenVLA's 1 % quantile.
        high: upper edge; OpenVLA's is the 99 % quantile. Actions beyond the edges count as the outermost bin.
        chunk: H, how many env steps an action covers.
        state_dim: S; 0 without proprioception.
        width: width of the token learner.
        num_queries: learned queries of the token learner.
        hidden_dim: size of the last hidden layer.
        pooler: from tokens to one vector; see `vla_rl.heads.pooling`.

    Raises:
        ValueError: fewer than two bins, or bounds that do not fit.
    """

    supports_rl = True

    def __init__(
        self,
        feature_dim: int,
        action_dim: int,
        *,
        bins: int = 256,
        low: Bound = -1.0,
        high: Bound = 1.0,
        chunk: int = 1,
        state_dim: int = 0,
        width: int = 128,
        num_queries: int = 8,
        hidden_dim: int = 256,
        pooler: Pooler = "token_learner",
    ):
        super().__init__()
        check_chunk(action_dim, chunk)
        if bins < 2:
            raise ValueError(f"bins={bins}; expected at least 2")
        self._config = {
            "feature_dim": feature_dim,
            "action_dim": action_dim,
            "bins": bins,
            "low": low,
            "high": high,
            "chunk": chunk,
            "state_dim": state_dim,
            "width": width,
            "num_queries": num_queries,
            "hidden_dim": hidden_dim,
            "pooler": pooler,
        }
        self.bins, self.chunk = bins, chunk
        self.body = PooledMLP(
            feature_dim,
            state_dim=state_dim,
            width=width,
            num_queries=num_queries,
            hidden_dim=hidden_dim,
            pooler=pooler,
        )
        self.logits = nn.Linear(hidden_dim, action_dim * bins)
        lower, upper = box_tensors(low, high, action_dim)
        self.register_buffer("low", lower, persistent=False)
        self.register_buffer("high", upper, persistent=False)
        self.low: Tensor
        self.high: Tensor

    def config(self) -> dict[str, Any]:
        """Keyword arguments that rebuild this head."""
        return dict(self._config)

    def distribution(self, features: Features, state: Tensor | None) -> BinnedCategorical:
        """Categorical over bins, batch [B], event [A]."""
        logits = self.logits(self.body(features, state)).unflatten(-1, (-1, self.bins))
        return BinnedCategorical(logits, self.low, self.high)

    def supervised_loss(self, features: Features, state: Tensor | None, actions: Tensor) -> Tensor:
        """Cross-entropy of the actions' bins, mean over dimensions.

        Raises:
            ValueError: more than a tenth of the action entries lie beyond the bins.
        """
        slack = (self.high - self.low) / self.bins
        outside = ((actions < self.low - slack) | (actions > self.high + slack)).float().mean()
        if outside > 0.1:
            raise ValueError(
                f"{outside:.0%} of the action entries lie beyond this head's bins, in normalised units; build it with "
                "**unit_box(statistics), the statistics of the policy"
            )
        loss = -self.distribution(features, state).log_prob(actions).mean() / actions.shape[-1]
        return loss + self.body.auxiliary_loss(features)
