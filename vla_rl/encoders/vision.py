"""Vision tokens as one cacheable tensor, and back into what each model expects from its own vision path."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class VisionPath:
    """The part of a model between pixels and text: vision tower and projector.

    Attributes:
        supported: Whether its output can be cached per frame. It cannot where the model's forward does not take
            `mm_encoder_outputs`, or where vision tokens depend on the instruction.
        format_known: Whether `restore` can work yet; one call of `encode` tells the format.
    """

    def __init__(self, model: Any) -> None:
        takes_tokens = "mm_encoder_outputs" in inspect.signature(model.forward).parameters
        self._names: frozenset[str] = frozenset()
        if takes_tokens and hasattr(model, "get_image_features"):
            self._names = frozenset(inspect.signature(model.get_image_features).parameters)
        self.supported = bool(self._names) and not any(name.endswith("input_ids") for name in self._names)
        self._ranks: list[int] = []

    @property
    def format_known(self) -> bool:
        """Whether `encode` has run once."""
        return bool(self._ranks)

    def encode(self, model: Any, *, pixels: Tensor, inputs: dict[str, Tensor], frames: int) -> Tensor:
        """Projected vision tokens `[frames, V, D']`; D' includes what the model adds to deeper text layers."""
        inputs = {name: value for name, value in inputs.items() if name in self._names}
        output = model.get_image_features(pixel_values=pixels, **inputs, return_dict=True)
        parts = [output.pooler_output, *(getattr(output, "deepstack_features", None) or [])]
        self._ranks = [part.ndim if isinstance(part, Tensor) else -part[0].ndim for part in parts]
        return torch.cat([_to_rows(part, frames) for part in parts], dim=-1)

    def restore(self, rows: Tensor) -> VisionTokens:
        """The value to pass as `mm_encoder_outputs["image"]`, from rows `[frames, V, D']`."""
        chunks = rows.chunk(len(self._ranks), dim=-1)
        parts = [_from_rows(chunk, rank) for chunk, rank in zip(chunks, self._ranks, strict=True)]
        return VisionTokens(parts[0], parts[1:])


class VisionTokens:
    """Stands for a vision tower's output inside a model: what features do not depend on is None."""

    def __init__(self, pooler_output: Any, deepstack_features: list[Any]) -> None:
        self.pooler_output = pooler_output
        self.deepstack_features = deepstack_features

    def __getattr__(self, name: str) -> None:
        return None


def _to_rows(tokens: Tensor | Sequence[Tensor], frames: int) -> Tensor:
    if not isinstance(tokens, Tensor):
        tokens = torch.cat([part.reshape(-1, part.shape[-1]) for part in tokens])
    return tokens.reshape(frames, -1, tokens.shape[-1])


def _from_rows(rows: Tensor, rank: int) -> Tensor | list[Tensor]:
    """Inverse of `_to_rows`: a tensor of `rank` dimensions, or for a negative rank a list of such per frame."""
    rows = rows.contiguous()
    if rank < 0:
        return list(rows) if rank == -2 else list(rows.unsqueeze(1))
    return rows if rank == 3 else rows.flatten(0, 1)
