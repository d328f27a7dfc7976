"""From a sequence of VLM tokens to one latent vector: the trunk that action and value heads share in shape."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vla_rl.encoders.features import Features


class TokenLearner(nn.Module):
    """Attention pooling with learned queries (Set Transformer's PMA; the iRe-VLA paper's token learner).

    Maps tokens [B, M, D] with mask [B, M] to [B, num_queries * width].
    """

    def __init__(self, feature_dim: int, *, width: int = 128, num_queries: int = 8, num_heads: int = 4):
        super().__init__()
        if width % num_heads:
            raise ValueError(f"width={width} is no multiple of num_heads={num_heads}")
        self.norm = nn.LayerNorm(feature_dim)
        self.keys_values = nn.Linear(feature_dim, 2 * width)
        self.queries = nn.Parameter(torch.randn(num_queries, width) / width**0.5)
        self.num_heads = num_heads
        self.output_dim = num_queries * width

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """Pool `tokens` [B, M, D] where `mask` [B, M] is True, to [B, num_queries * width]."""
        normed = self.norm(tokens)
        width = self.queries.shape[1] // self.num_heads
        key_weight, value_weight = self.keys_values.weight.unflatten(0, (2, self.num_heads, width))
        queries = self.queries.unflatten(1, (self.num_heads, width)) / width**0.5
        # The queries do not depend on the input, so they fold into the key weights, and values need projecting only
        # after pooling: the same function as multi-head attention at less cost. Key biases cancel in the softmax.
        folded = torch.einsum("qhw,hwd->hqd", queries, key_weight).flatten(0, 1)
        logits = (normed @ folded.T).masked_fill(~mask[..., None], -torch.inf)
        pooled = logits.softmax(dim=1).transpose(1, 2) @ normed
        heads = torch.einsum("bhqd,hwd->bqhw", pooled.unflatten(1, (self.num_heads, -1)), value_weight)
        return (heads.flatten(2) + self.keys_values.bias[self.queries.shape[1] :]).flatten(1)


class PooledMLP(nn.Module):
    """Token learner, then an MLP over the pooled tokens and the proprioceptive state.

    Args:
        feature_dim: D of the encoder's tokens.
        state_dim: S; 0 without proprioception.
        width: width of the token learner.
        num_queries: learned queries of the token learner.
        hidden_dim: L, the size of the returned latent.
    """

    def __init__(self, feature_dim: int, *, state_dim: int, width: int, num_queries: int, hidden_dim: int):
        super().__init__()
        self.pool = TokenLearner(feature_dim, width=width, num_queries=num_queries)
        self.mlp = nn.Sequential(
            nn.Linear(self.pool.output_dim + state_dim, hidden_dim),
            nn.LayerNorm(hidden_dim),
            nn.GELU(),
            nn.Linear(hidden_dim, hidden_dim),
            nn.Tanh(),
        )
        self.state_dim = state_dim

    def forward(self, features: Features, state: Tensor | None) -> Tensor:
        """Latent [B, L], each entry in (-1, 1).

        Raises:
            ValueError: the state is missing or has another size.
        """
        given = 0 if state is None else state.shape[-1]
        if given != self.state_dim:
            raise ValueError(f"state has {given} entries, this head was built for state_dim={self.state_dim}")
        pooled = self.pool(features.tokens.float(), features.mask)
        return self.mlp(pooled if state is None else torch.cat([pooled, state], dim=-1))
