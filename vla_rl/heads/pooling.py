"""From a sequence of VLM tokens to one latent vector: the poolers, and the trunk that action and value heads share."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vla_rl.encoders.features import Features
from vla_rl.heads.base import ActionHead

Pooler = Literal["token_learner", "learned_queries", "mean", "last", "rl_token"]


class TokenLearner(nn.Module):
    """Attention pooling with learned queries (Set Transformer's PMA; the iRe-VLA paper's token learner).

    Octo's readout tokens and the "learned queries" of other code bases are the same function, so
    `pooler="learned_queries"` is another name for this one.

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
        if torch.is_autocast_enabled(normed.device.type):  # once, not for each product below
            normed = normed.to(torch.get_autocast_dtype(normed.device.type))
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


class MeanPooler(nn.Module):
    """The mean of the real tokens, normalised: tokens [B, M, D] to [B, D]."""

    def __init__(self, feature_dim: int):
        super().__init__()
        self.norm = nn.LayerNorm(feature_dim)
        self.output_dim = feature_dim

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """Mean of `tokens` [B, M, D] where `mask` [B, M] is True, [B, D]."""
        weights = mask / mask.sum(1, keepdim=True)
        return torch.einsum("bm,bmd->bd", weights.to(tokens.dtype), self.norm(tokens))


class LastTokenPooler(nn.Module):
    """The last real token, normalised: tokens [B, M, D] to [B, D].

    In a causal model it is the only token that has seen everything else, and in a bidirectional one it is some token.
    """

    def __init__(self, feature_dim: int):
        super().__init__()
        self.norm = nn.LayerNorm(feature_dim)
        self.output_dim = feature_dim

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """The last of `tokens` [B, M, D] where `mask` [B, M] is True, [B, D]."""
        last = (mask * torch.arange(mask.shape[1], device=mask.device)).argmax(1)
        return self.norm(tokens[torch.arange(len(tokens), device=tokens.device), last])


class RLTokenPooler(nn.Module):
    """A bottleneck from which all tokens can be rebuilt, in the style of "RL Token: Bootstrapping Online RL with VLAs".

    A token learner squeezes the tokens into [B, num_queries * width], and a small decoder (our choice) rebuilds each
    token from that and its position. `reconstruction_loss` is low where the bottleneck has kept what the VLM saw. In
    stage 1 the bottleneck goes on learning with the head.
    """

    def __init__(self, feature_dim: int, *, width: int = 128, num_queries: int = 1):
        super().__init__()
        self.encoder = TokenLearner(feature_dim, width=width, num_queries=num_queries)
        self.output_dim = self.encoder.output_dim
        self.hidden = nn.Linear(self.output_dim, 2 * width)
        self.decoder = nn.Sequential(nn.GELU(), nn.Linear(2 * width, feature_dim))

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """Pool `tokens` [B, M, D] where `mask` [B, M] is True, to [B, num_queries * width]."""
        return self.encoder(tokens, mask)

    def reconstruction_loss(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """Mean squared error of the rebuilt tokens against the normalised ones; 1 is what a constant reaches.

        Its gradient stays in the pooler: a VLM that learns too would make its tokens easy to rebuild instead.

        Args:
            tokens: [B, M, D].
            mask: bool [B, M]; padding does not count.
        """
        tokens = tokens.detach()
        target = nn.functional.layer_norm(tokens, tokens.shape[-1:])
        places = sinusoidal(torch.arange(tokens.shape[1], device=tokens.device), self.hidden.out_features)
        rebuilt = self.decoder(self.hidden(self.encoder(tokens, mask))[:, None] + places)
        return (rebuilt - target).square().mean(-1)[mask].mean()


class PooledMLP(nn.Module):
    """A pooler, then an MLP over the pooled tokens and the proprioceptive state.

    Args:
        feature_dim: D of the encoder's tokens.
        state_dim: S; 0 without proprioception.
        width: width of the token learner.
        num_queries: learned queries of the token learner.
        hidden_dim: L, the size of the returned latent.
        pooler: how tokens become one vector; "mean" and "last" need no width and no queries.
    """

    def __init__(
        self,
        feature_dim: int,
        *,
        state_dim: int,
        width: int,
        num_queries: int,
        hidden_dim: int,
        pooler: Pooler = "token_learner",
    ):
        super().__init__()
        self.pool = _make_pooler(pooler, feature_dim, width=width, num_queries=num_queries)
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

    def auxiliary_loss(self, features: Features) -> Tensor:
        """What the pooler learns beside the actions: the RL token's reconstruction loss; 0 for the other poolers."""
        if isinstance(self.pool, RLTokenPooler):
            return self.pool.reconstruction_loss(features.tokens.float(), features.mask)
        return torch.zeros((), device=features.tokens.device)


def sinusoidal(positions: Tensor, size: int) -> Tensor:
    """Sines and cosines of `positions` [...] at wavelengths from 2 pi to 20,000 pi (Transformer), [..., size]."""
    frequencies = torch.exp(-math.log(1e4) * torch.arange(size // 2, device=positions.device) / (size // 2))
    angles = positions[..., None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


def _make_pooler(pooler: str, feature_dim: int, *, width: int, num_queries: int) -> Any:
    if pooler in ("token_learner", "learned_queries"):
        return TokenLearner(feature_dim, width=width, num_queries=num_queries)
    if pooler == "rl_token":
        return RLTokenPooler(feature_dim, width=width, num_queries=num_queries)
    if pooler == "mean":
        return MeanPooler(feature_dim)
    if pooler == "last":
        return LastTokenPooler(feature_dim)
    known = "token_learner, learned_queries, mean, last, rl_token"
    raise ValueError(f"pooler is {pooler!r}; expected one of {known}")


def critic_shape(head: ActionHead) -> dict[str, int]:
    """Sizes for a critic of the head's own shape (paper); none for a head that may mean something else by the names."""
    if not any(isinstance(part, PooledMLP) for part in head.modules()):
        return {}
    return {key: value for key, value in head.config().items() if key in ("width", "num_queries", "hidden_dim")}
