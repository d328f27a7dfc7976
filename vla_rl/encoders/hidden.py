"""Reading hidden states out of a model's text backbone, or starting it in the middle from kept ones."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
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


class LowerLayers:
    """The first `count` text layers of a model, whose output can be computed once and put in their place later.

    While they stand aside, the model's own forward still makes masks and rotary embeddings for the layers above.

    Args:
        model: An image-text-to-text model.
        count: How many layers, at least 1 and fewer than there are.
    """

    def __init__(self, model: Any, count: int) -> None:
        self.count = count
        self.modules = list(text_layers(text_backbone(model)))[:count]
        self._gives_tuple = [False] * count

    def run(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        """What the layers give for `inputs`: the input `[B, M, D]` of the layer above them."""

        def remember(index: int) -> Any:
            def hook(module: nn.Module, args: Any, output: Any) -> None:
                self._gives_tuple[index] = isinstance(output, tuple)

            return hook

        handles = [layer.register_forward_hook(remember(index)) for index, layer in enumerate(self.modules)]
        try:
            return hidden_states(model, inputs, layer=self.count)
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def replaced_by(self, hidden: Tensor) -> Iterator[None]:
        """Inside, the layers compute nothing and give `hidden`, a result of `run`."""
        before = [{name: vars(layer)[name] for name in _CALLS if name in vars(layer)} for layer in self.modules]
        for layer, gives_tuple in zip(self.modules, self._gives_tuple, strict=True):
            output = (hidden,) if gives_tuple else hidden
            vars(layer).update(forward=lambda *_, _output=output, **__: _output, _compiled_call_impl=None)
        try:
            yield
        finally:
            for layer, kept in zip(self.modules, before, strict=True):
                for name in _CALLS:
                    vars(layer).pop(name, None)
                vars(layer).update(kept)


_CALLS = ("forward", "_compiled_call_impl")


@contextmanager
def moved_away(modules: list[nn.Module], device: torch.device) -> Iterator[None]:
    """Inside, the weights and buffers of `modules` lie on `device`; afterwards where they were."""
    tensors = {id(t): t for module in modules for t in (*module.parameters(), *module.buffers())}.values()
    homes = [tensor.device for tensor in tensors]
    for tensor in tensors:
        tensor.data = tensor.data.to(device)
    try:
        yield
    finally:
        for tensor, home in zip(tensors, homes, strict=True):
            tensor.data = tensor.data.to(home)
