"""Loading and inspecting Hugging Face vision-language models: weights, processor, and where their parts are."""

from __future__ import annotations

import importlib.util
import inspect
import json
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from vla_rl.encoders.model_files import check_model_files
from vla_rl.saved_files import RESTORE, one_line


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


def load_model(
    name_or_path: str,
    *,
    revision: str | None,
    trust_remote_code: bool,
    quantization_config: Any = None,
    device: torch.device | str = "cpu",
) -> Any:
    """Load an image-text-to-text model from a directory or the hub, in float32 and eval mode.

    Raises:
        ImportError: If the weights are to be quantised, and what does that is not installed.
        ValueError: If the checkpoint is damaged, is a directory whose weights are pickled, or lacks weights that
            features depend on.
    """
    transformers = require_transformers()
    options = {"dtype": torch.float32, "revision": revision, "trust_remote_code": trust_remote_code}
    if Path(name_or_path).is_dir():
        check_model_files(Path(name_or_path), trust_remote_code=trust_remote_code)
        options["use_safetensors"] = True
    if quantization_config is not None:
        _require_quantizer(quantization_config)
        # Quantised weights cannot be moved or cast afterwards.
        options |= {"quantization_config": quantization_config, "device_map": {"": str(device)}}
    with warnings.catch_warnings():  # where the weights are quantised already, as that says
        warnings.filterwarnings("ignore", message="You passed `quantization_config`")
        model, report = transformers.AutoModelForImageTextToText.from_pretrained(
            name_or_path, output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
    for name, found, expected in sorted(report["mismatched_keys"]):
        raise ValueError(
            f"the checkpoint of {name_or_path} holds {name!r} with shape {list(found)}, expected {list(expected)} as "
            f"its config.json says; {RESTORE}"
        )
    # Features do not pass through the language-model head, so a checkpoint may come without one.
    missing = sorted(name for name in report["missing_keys"] if "lm_head" not in name)
    if missing:
        raise ValueError(
            f"the checkpoint of {name_or_path} lacks {len(missing)} of the model's weights, such as {missing[0]!r}, "
            "which would stay random; restore the file, or give a complete checkpoint"
        )
    for module in model.modules():
        # On some CPUs bitsandbytes repacks 4-bit weights in eval mode for a product that has no gradient, silently.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model.eval()


def quantization(model: Any) -> dict[str, Any] | None:
    """How a model's weights are quantised, as JSON; None if they are not."""
    quantizer = getattr(model, "hf_quantizer", None)
    return None if quantizer is None else json.loads(quantizer.quantization_config.to_json_string(use_diff=False))


def quantization_config(values: dict[str, Any] | None, *, where: str) -> Any:
    """The inverse of `quantization`: a configuration for transformers.

    Raises:
        ValueError: If transformers knows no such quantisation.
    """
    if values is None:
        return None
    from transformers.quantizers.auto import AutoQuantizationConfig

    try:
        return AutoQuantizationConfig.from_dict(values)
    except Exception as error:  # the classes behind it raise whatever they come across
        raise ValueError(f"{where} describes no quantisation of weights ({one_line(error)}); {RESTORE}") from error


def _require_quantizer(config: Any) -> None:
    if "bitsandbytes" in str(getattr(config, "quant_method", "")).lower():
        for package in ("bitsandbytes", "accelerate"):
            if importlib.util.find_spec(package) is None:
                raise ImportError(
                    f"weights in 8 or 4 bits need {package}; install it with `pip install 'vla-rl[quantize]'`"
                )


def load_processor(name_or_path: str, *, revision: str | None, trust_remote_code: bool) -> Any:
    """Load a model's processor, without its video part where torchvision (which that part needs) is missing.

    Raises:
        ValueError: If a directory's processor files cannot be used, or it has no tokenizer or image processor.
    """
    options = {"revision": revision, "trust_remote_code": trust_remote_code}
    try:
        processor = _make_processor(name_or_path, options)
    except ImportError:
        raise
    except Exception as error:  # the classes behind the files raise whatever they come across
        folder = Path(name_or_path)
        if not folder.is_dir():
            raise
        if not any((folder / name).is_file() for name in ("processor_config.json", "preprocessor_config.json")):
            raise ValueError(
                f"{folder} holds a model without its processor; save that beside it: "
                f"transformers.AutoProcessor.from_pretrained(<the model's id>).save_pretrained({str(folder)!r})"
            ) from error
        raise ValueError(
            f"the processor in {name_or_path} cannot be made from its files ({type(error).__name__}: "
            f"{one_line(error)}); {RESTORE}"
        ) from error
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


def _make_processor(name_or_path: str, options: dict[str, Any]) -> Any:
    try:
        return require_transformers().AutoProcessor.from_pretrained(name_or_path, **options)
    except (ImportError, OSError, ValueError) as error:
        return _processor_without_video(name_or_path, error, options)


def _processor_without_video(name_or_path: str, error: Exception, options: dict[str, Any]) -> Any:
    transformers = require_transformers()
    config = transformers.AutoConfig.from_pretrained(name_or_path, **options)
    processor_class = transformers.PROCESSOR_MAPPING.get(type(config), None)
    if processor_class is None or "video_processor" not in processor_class.get_attributes():
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


def layer_stacks(model: Any) -> list[nn.ModuleList]:
    """The stacks of layers of text backbone and vision tower, those that there are."""
    tower = model.get_encoder(modality="image")
    stacks = [child for child in text_backbone(model).children() if isinstance(child, nn.ModuleList)]
    if tower is not model:
        stacks += [module for module in tower.modules() if isinstance(module, nn.ModuleList)]
    return stacks


def image_token_id(config: Any) -> int:
    """The id that marks image positions in the prompt."""
    for name in ("image_token_id", "image_token_index"):
        if getattr(config, name, None) is not None:
            return getattr(config, name)
    raise ValueError(
        f"{type(config).__name__} names no image token, so frames cannot be placed in its prompt; "
        "use an image-text-to-text model"
    )
