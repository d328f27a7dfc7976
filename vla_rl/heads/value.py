"""The critic: the action head's shape with one output, made anew for every RL task (paper, section on stage 1)."""

from __future__ import annotations

from torch import Tensor, nn

from vla_rl.encoders.features import Features
from vla_rl.heads.pooling import PooledMLP


class ValueHead(nn.Module):
    """State value from VLM tokens and proprioception.

    Args:
        feature_dim: D of the encoder's tokens.
        state_dim: S; 0 without proprioception.
        width: width of the token learner.
        num_queries: learned queries of the token learner.
        hidden_dim: size of the last hidden layer.
    """

    def __init__(
        self, feature_dim: int, *, state_dim: int = 0, width: int = 128, num_queries: int = 8, hidden_dim: int = 256
    ):
        super().__init__()
        self.body = PooledMLP(
            feature_dim, state_dim=state_dim, width=width, num_queries=num_queries, hidden_dim=hidden_dim
        )
        self.output = nn.Linear(hidden_dim, 1)
        nn.init.zeros_(self.output.weight)
        nn.init.zeros_(self.output.bias)

    def forward(self, features: Features, state: Tensor | None) -> Tensor:
        """Value of each of B frames, [B]."""
        return self.output(self.body(features, state)).squeeze(-1)
