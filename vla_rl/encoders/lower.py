"""Doing without what lies below an adapter: whether its output can be kept, and moving it off the device."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from vla_rl.encoders.hidden import moved_away
from vla_rl.encoders.lora import without_dropout

if TYPE_CHECKING:
    from vla_rl.encoders.vlm import FrozenVLMEncoder


def why_no_lower_cache(
    encoder: FrozenVLMEncoder, images: np.ndarray | Tensor, instructions: Sequence[str]
) -> str | None:
    """None if features from `encode_lower` are bit-equal to those of the images, else the reason against it.

    It is tried out on the frames given, so that no list of model families is needed.

    Args:
        encoder: With an adapter.
        images: uint8 `[B, H, W, 3]` or `[B, N, H, W, 3]`.
        instructions: B instructions.
    """
    name = type(encoder.model).__name__
    if encoder.frozen_layers == 0:
        return "no text layer lies below the adapter; set LoRASettings.top_layers"
    if not encoder.supports_vision_cache:
        return f"{name} takes no precomputed vision tokens, so its text layers cannot run without its vision tower"
    try:
        with torch.no_grad(), without_dropout(encoder.model):
            whole = encoder.forward(images, instructions).tokens
            upper = encoder.forward(None, instructions, lower=encoder.encode_lower(images, instructions)).tokens
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        return f"{name} does not run without its first {encoder.frozen_layers} text layers ({error})"
    if torch.equal(whole, upper):
        return None
    return (
        f"the upper text layers of {name} take more than the output of those below: features from cached hidden "
        f"states differ by up to {(whole - upper).abs().max():.1e}"
    )


@contextmanager
def vision_away(
    encoder: FrozenVLMEncoder, device: torch.device | str = "cpu", *, lower: bool = False
) -> Iterator[None]:
    """Inside, the vision tower lies on another device, for training from cached vision tokens.

    Args:
        encoder: Whose tower; `encode`, `encode_vision` and `encode_lower` do not work inside.
        device: Where to.
        lower: Move the text layers below the adapter too, for training from cached lower hidden states.
    """
    encoder.vision_shape()
    tower = encoder.model.get_encoder(modality="image")
    modules = [] if tower is encoder.model else [tower]
    if lower:
        modules += encoder.lower_layers().modules
    with moved_away(modules, torch.device(device)):
        yield
