"""Action heads: features (and state) in, an action distribution out."""

from vla_rl.heads.base import ActionHead
from vla_rl.heads.distributions import DiagonalGaussian, Distribution, StateDependentGaussian
from vla_rl.heads.gaussian import GaussianHead
from vla_rl.heads.pooling import PooledMLP, TokenLearner
from vla_rl.heads.value import ValueHead

__all__ = [
    "ActionHead",
    "DiagonalGaussian",
    "Distribution",
    "GaussianHead",
    "PooledMLP",
    "StateDependentGaussian",
    "TokenLearner",
    "ValueHead",
]
