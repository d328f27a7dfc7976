"""Vision tokens as one cacheable tensor, and back into what each model expects from its own vision path."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from vla_rl.encoders.hidden import hidden_states
from vla_rl.encoders.loading import text_backbone, text_layers

if TYPE_CHECKING:
    from vla_rl.encoders.vlm import FrozenVLMEncoder


class VisionPath:
    """The part of a model between pixels and text: vision tower and projector.

    Attributes:
        supported: Whether its output seems to fit into a cache per frame. It does not where the model's forward does
            not take `mm_encoder_outputs`, or where vision tokens depend on the instruction.
        format_known: Whether `restore` can work yet; one call of `encode` tells the format.
    """

    def __init__(self, model: Any) -> None:
        takes_tokens = "mm_encoder_outputs" in inspect.signature(model.forward).parameters
        self._names: frozenset[str] = frozenset()
        if takes_tokens and (owner := _owner(model)) is not None:
            self._names = frozenset(inspect.signature(owner.get_image_features).parameters)
        self.supported = bool(self._names) and not any(name.endswith("input_ids") for name in self._names)
        self._ranks: list[int] = []

    @property
    def format_known(self) -> bool:
        """Whether `encode` has run once."""
        return bool(self._ranks)

    def encode(self, model: Any, *, pixels: Tensor, inputs: dict[str, Tensor], frames: int) -> Tensor:
        """Projected vision tokens `[frames, V, D']`; D' includes what the model adds to deeper text layers."""
        inputs = {name: value for name, value in inputs.items() if name in self._names}
        owner: Any = _owner(model)
        output = owner.get_image_features(pixel_values=pixels, **inputs, return_dict=True)
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


def takes_vision_tokens(encoder: FrozenVLMEncoder) -> bool:
    """Whether the text layers get from vision tokens what they get from a frame; tried on one, up to the first layer.

    A model may make more of a frame than its vision tokens, and miss that later.
    """
    model, seen = encoder.model, (encoder.image_size, encoder.num_views)
    frame = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (1, 64, 64, 3), dtype=np.uint8))
    try:
        layer = 0 if len(text_layers(text_backbone(model))) else -1
    except ValueError:
        layer = -1
    try:
        with torch.no_grad(), encoder._autocast():
            whole = hidden_states(model, encoder._inputs(frame, None, ["go"])[0], layer=layer)
            vision = encoder.encode_vision(frame)
            kept = hidden_states(model, encoder._inputs(None, vision, ["go"])[0], layer=layer)
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError):
        return False
    finally:
        encoder.image_size, encoder.num_views = seen
    return whole.shape == kept.shape and torch.allclose(whole.float(), kept.float(), rtol=1e-3, atol=1e-3)


def _owner(model: Any) -> Any:
    """The module that computes vision tokens: the model, or the one inside it that lacks the language-model head."""
    return next((module for module in (model, model.base_model) if hasattr(module, "get_image_features")), None)


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
