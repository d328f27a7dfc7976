"""LoRA adapters on a text backbone, through transformers' own adapter methods: the model class stays unwrapped."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from vla_rl.encoders.loading import text_backbone, text_layers
from vla_rl.saved_files import RESTORE, one_line, read_object, tensor_shapes


@dataclass(frozen=True)
class LoRASettings:
    """Low-rank adaptation (Hu et al. 2021, arXiv:2106.09685) of the text backbone's linear layers, kept unmerged.

    Attributes:
        r: Rank of the update.
        alpha: Scale; the update is multiplied by `alpha / r`.
        dropout: Probability of dropping the update's input, only while `trainable()` is open.
        top_layers: Adapt only the last so many of the layers that run; None adapts all. What lies below them can be
            computed once per frame and kept (`FrozenVLMEncoder.encode_lower`).
    """

    r: int = 16
    alpha: int = 32
    dropout: float = 0.0
    top_layers: int | None = None


def lora_targets(model: Any, *, top_layers: int | None = None, layer: int = -1) -> list[str]:
    """Full names of the linear layers of the text backbone that an adapter goes to.

    Args:
        model: An image-text-to-text model.
        top_layers: Only the last so many of the layers that run.
        layer: Where the features are read; the layers from there on do not run.

    Raises:
        ValueError: If there are fewer layers.
    """
    backbone = text_backbone(model)
    root: list[nn.Module] = [backbone]
    idle: list[nn.Module] = []
    if top_layers is not None or layer != -1:
        layers = list(text_layers(backbone))
        count = len(layers) if layer == -1 else layer
        if top_layers is not None:
            if not 0 < top_layers <= count:
                raise ValueError(f"top_layers={top_layers}, expected 1 to {count}, the number of text layers that run")
            root = layers[count - top_layers : count]
        idle = layers[count:]
    outside = {id(module) for part in idle for module in part.modules()}
    inside = {id(module) for part in root for module in part.modules() if isinstance(module, nn.Linear)} - outside
    return [name for name, module in model.named_modules() if id(module) in inside]


def first_adapted_layer(model: Any) -> int:
    """Index of the lowest text layer with adapter weights; 0 too without an adapter, or with one outside the layers."""
    adapter = {id(weight) for weight in lora_parameters(model)}
    try:
        layers = text_layers(text_backbone(model))
    except ValueError:
        return 0
    adapted = [{id(weight) for weight in layer.parameters()} & adapter for layer in layers]
    if not adapter or set().union(*adapted) != adapter:
        return 0
    return next(index for index, weights in enumerate(adapted) if weights)


def add_lora(model: Any, settings: LoRASettings, *, layer: int = -1) -> None:
    """Attach a fresh adapter to `model` in place, below the `layer` of the features; it starts as the identity.

    Raises:
        ImportError: If peft is not installed.
        ValueError: If the model already has an adapter.
    """
    if has_lora(model):
        raise ValueError("the encoder already has a LoRA adapter; load it again without one to start afresh")
    peft = _require_peft()
    targets = lora_targets(model, top_layers=settings.top_layers, layer=layer)
    model.add_adapter(
        peft.LoraConfig(r=settings.r, lora_alpha=settings.alpha, lora_dropout=settings.dropout, target_modules=targets)
    )


def load_lora(model: Any, directory: Path) -> None:
    """Attach the adapter saved in `directory` to `model` in place.

    Raises:
        FileNotFoundError: If the directory holds none.
        ImportError: If peft is not installed.
        ValueError: If its files are damaged, or do not fit each other or the model.
    """
    _require_peft()
    config, weights = read_object(directory / "adapter_config.json"), directory / "adapter_model.safetensors"
    shapes = tensor_shapes(weights)
    if not all(config.get("r") in shape for shape in shapes.values()):
        raise ValueError(f"{weights} is no adapter of rank {config.get('r')!r}, which its settings name; {RESTORE}")
    conversions = getattr(model, "_weight_conversions", None)
    try:
        model.load_adapter(str(directory))
    except ImportError:
        raise
    except Exception as error:  # what reads the settings raises whatever it comes across
        raise ValueError(f"the adapter in {directory} does not fit the model ({one_line(error)}); {RESTORE}") from error
    model._weight_conversions = conversions  # the adapter's would rename the model's own weights when these are saved
    strangers = _values(load_file(weights).values()) - _values(lora_parameters(model))
    if len(shapes) != len(lora_parameters(model)) or strangers:
        raise ValueError(
            f"{weights} holds {len(shapes)} tensors, of which {strangers.total()} found no place among the "
            f"{len(lora_parameters(model))} of this model's adapter; {RESTORE}"
        )


def _values(tensors: Iterable[torch.Tensor]) -> Counter[bytes]:
    """What tensors hold, whatever their names (which change from saving to loading), places and types are."""
    rounded = (tensor.detach().to("cpu", torch.bfloat16).contiguous() for tensor in tensors)
    return Counter(bytes(str(t.shape), "ascii") + t.view(torch.uint8).numpy().tobytes() for t in rounded)


def save_lora(model: Any, directory: Path) -> None:
    """Save the adapter of `model` alone, in peft's format."""
    model.save_pretrained(directory)


def save_base(model: Any, directory: Path) -> None:
    """Save the full weights of `model` without its adapter; quantised ones as they are."""
    quantizer = getattr(model, "hf_quantizer", None)
    # What transformers does to quantised weights on loading it cannot undo on saving.
    options = {} if quantizer is None else {"save_original_format": False}
    if not has_lora(model):
        model.save_pretrained(directory, **options)
        return
    state = {
        name.replace(".base_layer.", "."): value for name, value in model.state_dict().items() if "lora_" not in name
    }
    if quantizer is not None:  # transformers would ask it for the weights, the adapter's among them
        vars(quantizer)["get_state_dict_and_metadata"] = lambda _: (state, {})
    model._hf_peft_config_loaded = False
    try:
        model.save_pretrained(directory, state_dict=state, **options)
    finally:
        model._hf_peft_config_loaded = True
        if quantizer is not None:
            del vars(quantizer)["get_state_dict_and_metadata"]


def has_lora(model: Any) -> bool:
    """Whether an adapter is attached."""
    return bool(getattr(model, "_hf_peft_config_loaded", False))


def lora_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The adapter's own weights."""
    return [parameter for name, parameter in model.named_parameters() if "lora_" in name]


def changes_base(model: nn.Module, state: Mapping[str, Tensor], *, prefix: str) -> bool:
    """Whether loading `state`, whose names begin with `prefix`, gives weights below the adapter other values."""
    base = ((prefix + name, value) for name, value in model.state_dict().items() if "lora_" not in name)
    return any(name in state and not torch.equal(state[name].to(value), value) for name, value in base)


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
