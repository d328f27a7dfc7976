"""LoRA adapters on a text backbone, through transformers' own adapter methods: the model class stays unwrapped."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from vla_rl.encoders.loading import text_backbone, text_layers


@dataclass(frozen=True)
class LoRASettings:
    """Low-rank adaptation (Hu et al. 2021, arXiv:2106.09685) of the text backbone's linear layers, kept unmerged.

    Attributes:
        r: Rank of the update.
        alpha: Scale; the update is multiplied by `alpha / r`.
        dropout: Probability of dropping the update's input, only while `trainable()` is open.
        top_layers: Adapt only the last so many layers; None adapts all.
    """

    r: int = 16
    alpha: int = 32
    dropout: float = 0.0
    top_layers: int | None = None


def lora_targets(model: Any, *, top_layers: int | None = None) -> list[str]:
    """Full names of the linear layers under the text backbone, or under its last `top_layers` layers."""
    backbone = text_backbone(model)
    root: list[nn.Module] = [backbone]
    if top_layers is not None:
        layers = text_layers(backbone)
        if not 0 < top_layers <= len(layers):
            raise ValueError(f"top_layers={top_layers}, expected 1 to {len(layers)}, the number of text layers")
        root = list(layers)[-top_layers:]
    inside = {id(module) for part in root for module in part.modules() if isinstance(module, nn.Linear)}
    return [name for name, module in model.named_modules() if id(module) in inside]


def add_lora(model: Any, settings: LoRASettings) -> None:
    """Attach a fresh adapter to `model` in place; it starts as the identity.

    Raises:
        ImportError: If peft is not installed.
        ValueError: If the model already has an adapter.
    """
    if has_lora(model):
        raise ValueError("the encoder already has a LoRA adapter; load it again without one to start afresh")
    peft = _require_peft()
    targets = lora_targets(model, top_layers=settings.top_layers)
    model.add_adapter(
        peft.LoraConfig(r=settings.r, lora_alpha=settings.alpha, lora_dropout=settings.dropout, target_modules=targets)
    )


def load_lora(model: Any, directory: Path) -> None:
    """Attach the adapter saved in `directory` to `model` in place."""
    _require_peft()
    model.load_adapter(str(directory))


def save_lora(model: Any, directory: Path) -> None:
    """Save the adapter of `model` alone, in peft's format."""
    model.save_pretrained(directory)


def save_base(model: Any, directory: Path) -> None:
    """Save the full weights of `model` without its adapter."""
    if not has_lora(model):
        model.save_pretrained(directory)
        return
    state = {
        name.replace(".base_layer.", "."): value for name, value in model.state_dict().items() if "lora_" not in name
    }
    model._hf_peft_config_loaded = False
    try:
        model.save_pretrained(directory, state_dict=state)
    finally:
        model._hf_peft_config_loaded = True


def has_lora(model: Any) -> bool:
    """Whether an adapter is attached."""
    return bool(getattr(model, "_hf_peft_config_loaded", False))


def lora_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The adapter's own weights."""
    return [parameter for name, parameter in model.named_parameters() if "lora_" in name]


def lora_dropouts(model: nn.Module) -> list[nn.Module]:
    """The adapter's dropout modules."""
    return [module for name, module in model.named_modules() if name.endswith("lora_dropout")]


@contextmanager
def without_dropout(model: nn.Module) -> Iterator[None]:
    """Switch the adapter's dropout off for a while, where it is on."""
    active = [module for module in lora_dropouts(model) if module.training]
    for module in active:
        module.eval()
    try:
        yield
    finally:
        for module in active:
            module.train()


def _require_peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise ImportError("LoRA needs peft; install it with `pip install 'vla-rl[lora]'`") from error
    return peft
