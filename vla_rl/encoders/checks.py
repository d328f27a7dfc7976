"""What a model and its processor must offer to serve as an encoder: refusals with their reasons."""

from __future__ import annotations

import inspect
from typing import Any

from vla_rl.encoders.loading import text_backbone


def require_encodable(model: Any, processor: Any) -> None:
    """Refuse what cannot be an encoder.

    Raises:
        ValueError: If the model takes no images or text, or shows no hidden states of a text backbone, or the processor
            lacks a part.
    """
    name = type(model).__name__
    accepted = inspect.signature(model.forward).parameters
    missing = [argument for argument in ("pixel_values", "input_ids") if argument not in accepted]
    if missing:
        raise ValueError(
            f"{name} takes no {' and no '.join(missing)}, so it cannot see frames and read instructions; use an "
            "image-text-to-text model"
        )
    try:
        backbone = text_backbone(model)
        config = backbone.config
    except (AttributeError, TypeError) as error:
        raise ValueError(
            f"{name} shows no hidden states: it has no text backbone under get_decoder() or get_encoder() ({error}); "
            "use an image-text-to-text model of transformers"
        ) from error
    if getattr(config, "hidden_size", None) is None and getattr(config, "d_model", None) is None:
        raise ValueError(
            f"{name} shows no hidden states: {type(backbone).__name__}, its text backbone, names no hidden_size; use "
            "an image-text-to-text model of transformers"
        )
    for part in ("tokenizer", "image_processor"):
        if getattr(processor, part, None) is None:
            raise ValueError(
                f"{type(processor).__name__} has no {part}, so it cannot prepare frames and instructions; use the "
                "model's full processor"
            )
