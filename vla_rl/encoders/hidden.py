"""Reading hidden states out of a model's text backbone."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from vla_rl.encoders.loading import text_backbone, text_layers


class _Captured(Exception):  # noqa: N818 - it carries a result, it is no error
    """Ends a model's forward as soon as the wanted hidden states exist, before any language-model head."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.hidden = hidden


def hidden_states(model: Any, inputs: dict[str, Any], *, layer: int = -1) -> Tensor:
    """Run `model` up to the wanted hidden states of its text backbone, and no further.

    Args:
        model: An image-text-to-text model.
        inputs: Arguments of its forward.
        layer: Index into what transformers calls `hidden_states`; -1 is the last, after the final norm.

    Returns:
        Hidden states `[B, M, D]`.
    """
    backbone = text_backbone(model)

    def capture_output(module: nn.Module, args: Any, output: Any) -> None:
        raise _Captured(output[0])

    def capture_input(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        raise _Captured(args[0] if args else kwargs["hidden_states"])

    if layer == -1:
        handle = backbone.register_forward_hook(capture_output)
    else:
        handle = text_layers(backbone)[layer].register_forward_pre_hook(capture_input, with_kwargs=True)
    try:
        model(**inputs, use_cache=False)
    except _Captured as captured:
        return captured.hidden
    finally:
        handle.remove()
    raise RuntimeError(f"{type(model).__name__} never ran its text backbone; it cannot serve as an encoder")
