"""Action heads: features (and state) in, an action distribution out."""

from vla_rl.heads.base import ActionHead
from vla_rl.heads.bounds import unit_box
from vla_rl.heads.chunked import ChunkedHead
from vla_rl.heads.distributions import (
    BinnedCategorical,
    ChunkGaussian,
    DiagonalGaussian,
    Distribution,
    SquashedGaussian,
    StateDependentGaussian,
)
from vla_rl.heads.flow import FlowChain, FlowHead
from vla_rl.heads.gaussian import GaussianHead
from vla_rl.heads.pooling import LastTokenPooler, MeanPooler, PooledMLP, RLTokenPooler, TokenLearner
from vla_rl.heads.residual import ResidualHead
from vla_rl.heads.tanh_gaussian import TanhGaussianHead
from vla_rl.heads.tokens import TokenHead
from vla_rl.heads.value import ValueHead

__all__ = [
    "ActionHead",
    "BinnedCategorical",
    "ChunkGaussian",
    "ChunkedHead",
    "DiagonalGaussian",
    "Distribution",
    "FlowChain",
    "FlowHead",
    "GaussianHead",
    "LastTokenPooler",
    "MeanPooler",
    "PooledMLP",
    "RLTokenPooler",
    "ResidualHead",
    "SquashedGaussian",
    "StateDependentGaussian",
    "TanhGaussianHead",
    "TokenHead",
    "TokenLearner",
    "ValueHead",
    "unit_box",
]
