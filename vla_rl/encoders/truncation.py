"""Dropping the upper layers of a text backbone for good, so that neither memory nor time is spent on them."""

from __future__ import annotations

from typing import Any

from vla_rl.encoders.loading import text_backbone, text_layers

_COUNTS = ("num_hidden_layers", "num_layers", "encoder_layers", "n_layers")


def truncate_text(model: Any, count: int) -> None:
    """Keep the first `count` text layers of `model` in place, and its final norm (as in SmolVLA, arXiv 2506.01844).

    The configuration follows, so that the model saves and loads as what it is now.

    Raises:
        ValueError: If the backbone has fewer layers.
    """
    backbone = text_backbone(model)
    layers = text_layers(backbone)
    total = len(layers)
    if not 0 < count <= total:
        raise ValueError(f"truncate_layers={count}, expected 1 to {total}, the number of text layers")
    del layers[count:]
    # An encoder-decoder's encoder keeps a copy of the text configuration.
    for config in (model.config.get_text_config(), backbone.config):
        for name, value in list(vars(config).items()):
            if name in _COUNTS and value == total:
                setattr(config, name, count)
            elif isinstance(value, (list, tuple)) and len(value) == total and "layer" in name:
                setattr(config, name, value[:count])
