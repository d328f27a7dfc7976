"""Which implementation of attention a model runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

MAX_TOKENS = 256
"""Longest prompt for which plain attention is taken: its memory grows with the square of the length."""


@contextmanager
def training_attention(encoder: Any) -> Iterator[None]:
    """Let an encoder's model compute attention by plain matrix products within the block, where that trains faster.

    On a CPU, PyTorch's fused attention takes half of a training step of a model of a few million weights: .93 s
    without it against 1.91 s, 256 frames, 30 tokens each. It rounds differently. Nothing changes on an
    accelerator, above `MAX_TOKENS`, or while no frame's size is known.

    Args:
        encoder: A `FrozenVLMEncoder`.
    """
    model, usual = encoder.model, encoder.model.config._attn_implementation
    on_cpu = encoder.device.type == "cpu" and usual == "sdpa"
    if not on_cpu or encoder.image_size is None or encoder.prompt_length(["go"]) > MAX_TOKENS:
        yield
        return
    before = {"": usual}
    before |= {name: getattr(model.config, name)._attn_implementation for name in model.config.sub_configs}
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)
