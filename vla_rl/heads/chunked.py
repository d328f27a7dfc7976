"""A Gaussian over a whole chunk of future actions."""

from __future__ import annotations

from torch import Tensor

from vla_rl.heads.distributions import ChunkGaussian
from vla_rl.heads.gaussian import GaussianHead
from vla_rl.heads.pooling import Pooler


class ChunkedHead(GaussianHead):
    """Token learner -> MLP -> H actions at once; PPO treats the chunk as one action (see `vla_rl.chunks`).

    The mean is OpenVLA-OFT's: all steps in parallel, by regression. The exploration noise is drawn anew for every chunk
    and smooth within it.

    Args:
        feature_dim: D of the encoder's tokens.
        action_dim: size of the flat chunk, H times the env's A.
        chunk: H.
        smoothness: correlation of the exploration noise of neighbouring steps, from 0 to below 1.
        state_dim: S; 0 without proprioception.
        width: width of the token learner.
        num_queries: learned queries of the token learner.
        hidden_dim: size of the last hidden layer.
        init_std: standard deviation of the exploration at the start of stage 1, in normalised action units.
        pooler: from tokens to one vector; see `vla_rl.heads.pooling`.

    Raises:
        ValueError: `action_dim` is no multiple of `chunk`, or `smoothness` is out of range.
    """

    def __init__(
        self,
        feature_dim: int,
        action_dim: int,
        *,
        chunk: int,
        smoothness: float = 0.8,
        state_dim: int = 0,
        width: int = 128,
        num_queries: int = 8,
        hidden_dim: int = 256,
        init_std: float = 0.3,
        pooler: Pooler = "token_learner",
    ):
        check_chunk(action_dim, chunk)
        if not 0 <= smoothness < 1:
            raise ValueError(f"smoothness={smoothness}; expected a correlation from 0 to below 1")
        super().__init__(
            feature_dim,
            action_dim,
            state_dim=state_dim,
            width=width,
            num_queries=num_queries,
            hidden_dim=hidden_dim,
            exploration="gaussian",
            init_std=init_std,
            pooler=pooler,
        )
        del self._config["exploration"]
        self._config |= {"chunk": chunk, "smoothness": smoothness}
        self.chunk, self.smoothness = chunk, smoothness

    def _around(self, mean: Tensor, latent: Tensor) -> ChunkGaussian:
        return ChunkGaussian(mean, self.log_std.exp(), chunk=self.chunk, smoothness=self.smoothness)


def check_chunk(action_dim: int, chunk: int) -> None:
    """Raise ValueError unless `action_dim` is the size of a flat chunk of `chunk` steps."""
    if chunk < 1 or action_dim % chunk:
        raise ValueError(
            f"action_dim={action_dim} is no multiple of chunk={chunk}; give the size of the flat chunk, "
            "chunk times the env's action size"
        )
