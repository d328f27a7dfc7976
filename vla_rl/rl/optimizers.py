"""Weights and an optimiser's moments as plain trees of tensors and numbers, and back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


def optimizer_state(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """The state of every weight, in the order of the groups; empty for one that has had no step."""
    return [dict(optimizer.state.get(weight, {})) for weight in _weights(optimizer)]


def load_optimizer(optimizer: torch.optim.Optimizer, state: list[dict[str, Any]]) -> None:
    """Give an optimiser over the same weights the state that `optimizer_state` gave; learning rates are not part of it.

    Raises:
        ValueError: it has another number of weights.
    """
    for weight, values in zip(_weights(optimizer), state, strict=True):
        if values:
            optimizer.state[weight] = {name: _beside(weight, value) for name, value in values.items()}


def load_weights(weights: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Write values into weights of the same number and shapes.

    Raises:
        ValueError: they are another number.
    """
    with torch.no_grad():
        for weight, value in zip(weights, values, strict=True):
            weight.copy_(value)


def _weights(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [weight for group in optimizer.param_groups for weight in group["params"]]


def _beside(weight: Tensor, value: Any) -> Any:
    """A copy of a moment where its weight is; the count of steps, a scalar, stays where it is."""
    if not isinstance(value, Tensor):
        return value
    return value.clone() if value.ndim == 0 else value.to(weight.device, copy=True)
