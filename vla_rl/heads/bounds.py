"""The box of actions that a bounded head covers: from data or env to the head's normalised units."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from vla_rl.data.statistics import Statistics

Bound = float | Sequence[float]


def unit_box(statistics: Statistics | None, *, chunk: int = 1, margin: float = 0.0) -> dict[str, Bound]:
    """The env's box [-1, 1] in a head's normalised units, as its arguments `low` and `high`.

    `TanhGaussianHead(..., **unit_box(statistics))` covers exactly the actions that the env takes.

    Args:
        statistics: what `VLAPolicy` normalises by, of one env step; None for an identity.
        chunk: H, for heads over chunks.
        margin: widens the box by this share of its half-width; what lies beyond the env's box is clipped by the policy.
    """
    reach = 1.0 + margin
    if statistics is None:
        return {"low": -reach, "high": reach}
    mean, std = statistics.action_mean.astype(float), statistics.action_std.astype(float)
    return {"low": ((-reach - mean) / std).tolist() * chunk, "high": ((reach - mean) / std).tolist() * chunk}


def box_tensors(low: Bound, high: Bound, action_dim: int) -> tuple[Tensor, Tensor]:
    """Both bounds as tensors [A].

    Raises:
        ValueError: one has another number of entries, or a box is empty.
    """
    bounds = [torch.as_tensor(bound, dtype=torch.float32) for bound in (low, high)]
    for bound in bounds:
        if bound.ndim and bound.shape != (action_dim,):
            raise ValueError(
                f"a bound has {len(bound)} entries, the head's action_dim is {action_dim}; give one or as many"
            )
    lower, upper = (bound.expand(action_dim).clone() for bound in bounds)
    if not (lower < upper).all():
        raise ValueError(f"low={low}, high={high}; expected every lower bound to be below its upper one")
    return lower, upper
