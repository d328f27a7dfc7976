"""Loading and inspecting Hugging Face vision-language models: weights, processor, and where their parts are."""

from __future__ import annotations

import inspect
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn


def require_transformers() -> Any:
    """Import transformers on first use, since `import vla_rl` must stay light.

    Raises:
        ImportError: If it is not installed.
    """
    try:
        import transformers
    except ImportError as error:
        raise ImportError("encoders need transformers; install it with `pip install 'transformers>=5'`") from error
    return transformers


def load_model(name_or_path: str, *, revision: str | None, trust_remote_code: bool) -> Any:
    """Load an image-text-to-text model from a directory or the hub, in float32 and eval mode."""
    transformers = require_transformers()
    model = transformers.AutoModelForImageTextToText.from_pretrained(
        name_or_path, dtype=torch.float32, revision=revision, trust_remote_code=trust_remote_code
    )
    return model.eval()


def load_processor(name_or_path: str, *, revision: str | None, trust_remote_code: bool) -> Any:
    """Load a model's processor, without its video part where torchvision (which that part needs) is missing."""
    transformers = require_transformers()
    options = {"revision": revision, "trust_remote_code": trust_remote_code}
    try:
        processor = transformers.AutoProcessor.from_pretrained(name_or_path, **options)
    except (ImportError, OSError, ValueError) as error:
        processor = _processor_without_video(name_or_path, error, options)
    if not hasattr(processor, "tokenizer") or not hasattr(processor, "image_processor"):
        raise ValueError(
            f"{name_or_path!r} gave a {type(processor).__name__}, expected a processor with a tokenizer and an image "
            "processor; save the model's full processor beside its weights"
        )
    for flag in ("do_image_splitting", "crop_to_patches"):
        if hasattr(processor.image_processor, flag):
            setattr(processor.image_processor, flag, False)
    limit = getattr(processor.image_processor, "max_image_size", None)
    if isinstance(limit, dict) and "longest_edge" in limit:
        processor.image_processor.size = {"longest_edge": limit["longest_edge"]}
    return processor


def _processor_without_video(name_or_path: str, error: Exception, options: dict[str, Any]) -> Any:
    transformers = require_transformers()
    config = transformers.AutoConfig.from_pretrained(name_or_path, **options)
    class_name = _processor_class_name(name_or_path, config, options)
    processor_class = getattr(transformers, class_name, None)
    if processor_class is None or "video_processor" not in inspect.signature(processor_class.__init__).parameters:
        raise error
    tokenizer = transformers.AutoTokenizer.from_pretrained(name_or_path, **options)
    image_processor = transformers.AutoImageProcessor.from_pretrained(name_or_path, **options)
    settings, _ = processor_class.get_processor_dict(name_or_path, revision=options["revision"])
    accepted = set(inspect.signature(processor_class.__init__).parameters) - {"image_processor", "tokenizer"}
    settings = {name: value for name, value in settings.items() if name in accepted and name != "video_processor"}
    settings.setdefault("chat_template", tokenizer.chat_template)
    return without_video(processor_class)(
        image_processor=image_processor, tokenizer=tokenizer, video_processor=None, **settings
    )


def without_video(processor_class: Any) -> Any:
    """A processor class that has no video part, for which transformers needs torchvision."""
    names = [name for name in processor_class.get_attributes() if name != "video_processor"]
    members = {"get_attributes": classmethod(lambda _: names), "video_processor": SimpleNamespace(num_frames=0, fps=0)}
    return type(processor_class.__name__, (processor_class,), members)


def _processor_class_name(name_or_path: str, config: Any, options: dict[str, Any]) -> str:
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES

    return PROCESSOR_MAPPING_NAMES.get(config.model_type, "")


def language_model(model: Any) -> Any:
    """The model's text part, language-model head included where the text part brings its own."""
    for owner in (model, model.base_model):
        if hasattr(owner, "language_model"):
            return owner.language_model
    return model.get_decoder()


def text_backbone(model: Any) -> Any:
    """The module whose last hidden states are the features: the decoder, or the encoder of an encoder-decoder."""
    if model.config.get_text_config().is_encoder_decoder or model.config.is_encoder_decoder:
        return language_model(model).get_encoder()
    module = model.get_decoder()
    while hasattr(module, "get_decoder") and module.get_decoder() is not module:
        module = module.get_decoder()
    return module


def text_layers(backbone: nn.Module) -> nn.ModuleList:
    """The stack of transformer layers directly under a text backbone."""
    for child in backbone.children():
        if isinstance(child, nn.ModuleList):
            return child
    raise ValueError(
        f"{type(backbone).__name__} has no list of layers among its children; use layer=-1 and LoRA on all layers"
    )


def image_token_id(config: Any) -> int:
    """The id that marks image positions in the prompt."""
    for name in ("image_token_id", "image_token_index"):
        if getattr(config, name, None) is not None:
            return getattr(config, name)
    raise ValueError(
        f"{type(config).__name__} names no image token, so frames cannot be placed in its prompt; "
        "use an image-text-to-text model"
    )


def accepted_inputs(model: nn.Module) -> frozenset[str]:
    """Names of the inputs that the model's forward declares."""
    return frozenset(inspect.signature(model.forward).parameters)


def vision_inputs(model: Any) -> frozenset[str] | None:
    """Inputs of the model's cacheable vision path, or None where vision tokens cannot be cached.

    A path whose vision tokens depend on the instruction cannot be cached per frame.
    """
    if "mm_encoder_outputs" not in accepted_inputs(model) or not hasattr(model, "get_image_features"):
        return None
    names = frozenset(inspect.signature(model.get_image_features).parameters)
    return None if any(name.endswith("input_ids") for name in names) else names


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

    Autocast would round them at each call; holding them rounded gives the same numbers and half the memory.
    """
    tied = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    weights: dict[int, nn.Parameter] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and "lora_" not in name and id(module.weight) not in tied:
            weights.update({id(weight): weight for weight in module.parameters(recurse=False)})
    return list(weights.values())


def vision_rows(pooled: Tensor | list[Tensor] | tuple[Tensor, ...], frames: int) -> Tensor:
    """A model's projected vision tokens as `[frames, V, D]`, whether it gives a tensor or a list per frame."""
    tokens = pooled if isinstance(pooled, Tensor) else torch.cat([part.reshape(-1, part.shape[-1]) for part in pooled])
    return tokens.reshape(frames, -1, tokens.shape[-1])


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


def vision_part(rows: Tensor, rank: int) -> Tensor | list[Tensor]:
    """The inverse of `vision_rows`: a tensor of `rank` dimensions, or for a negative rank a list of such per frame."""
    rows = rows.contiguous()
    if rank < 0:
        return list(rows) if rank == -2 else list(rows.unsqueeze(1))
    return rows if rank == 3 else rows.flatten(0, 1)


def refuse_nonempty(directory: Path) -> None:
    """Raise FileExistsError if `directory` holds anything."""
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise FileExistsError(f"{directory} is not empty; save to a new directory, or remove this one first")
