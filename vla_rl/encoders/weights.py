"""Which weights of a model are trained, held in half precision, or randomly dropped."""

from __future__ import annotations

from typing import Any, Literal

from torch import nn

from vla_rl.encoders.loading import language_model, text_backbone
from vla_rl.encoders.lora import has_lora, lora_parameters

Scope = Literal["lora", "text", "all"]


def zero_dropout(model: nn.Module) -> None:
    """Set every dropout of a model, adapters aside, to zero, so that train and eval mode compute the same."""
    for path, module in model.named_modules():
        if "lora_" in path:
            continue
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        for name, value in vars(module).items():
            if "drop" in name and isinstance(value, float):
                setattr(module, name, 0.0)


def half_weights(model: Any) -> list[nn.Parameter]:
    """Weights that mixed precision multiplies in half precision: those of linear layers, adapters and ties excepted.

    Autocast would round them at each call; holding them rounded gives the same numbers and half the memory. Quantised
    weights stay as they are.
    """
    tied = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    weights: dict[int, nn.Parameter] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and "lora_" not in name and id(module.weight) not in tied:
            weights.update({id(weight): weight for weight in module.parameters(recurse=False)})
    return [weight for weight in weights.values() if weight.is_floating_point()]


def scope_parameters(model: Any, scope: Scope) -> list[nn.Parameter]:
    """The weights that learn: the adapter's ("lora"), those of text backbone and projector ("text"), or "all".

    Raises:
        ValueError: If there is no adapter for "lora", quantised weights would learn, or the scope is none of these.
    """
    if scope == "lora":
        if not has_lora(model):
            raise ValueError("the encoder has no LoRA adapter; call add_lora(LoRASettings()) or use scope 'text'")
        return lora_parameters(model)
    if scope not in ("text", "all"):
        raise ValueError(f"scope is {scope!r}, expected 'lora', 'text' or 'all'; pass one of them")
    weights = used_parameters(model, vision=scope == "all")
    if not all(weight.is_floating_point() for weight in weights):
        raise ValueError(f"scope is {scope!r}, but quantised weights cannot learn; add an adapter and use scope 'lora'")
    return weights


def used_parameters(model: Any, *, vision: bool) -> list[nn.Parameter]:
    """Weights on the way to the features: text backbone and projector, and the vision tower if asked for.

    Left out are weights that never run: the language-model head, and the decoder of an encoder-decoder.
    """
    backbone = {id(weight) for weight in text_backbone(model).parameters()}
    skipped = {id(weight) for weight in language_model(model).parameters()}
    head = model.get_output_embeddings()
    if head is not None:
        skipped |= {id(weight) for weight in head.parameters()}
    skipped -= backbone
    if not vision:
        tower = model.get_encoder(modality="image")
        if tower is model:
            raise ValueError(
                f"{type(model).__name__} does not say which part is its vision tower; use scope 'lora' or 'all'"
            )
        skipped |= {id(weight) for weight in tower.parameters()}
    return [weight for weight in model.parameters() if id(weight) not in skipped]
