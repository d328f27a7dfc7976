"""The files of a model in a directory, checked before transformers allocates what they describe."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from vla_rl.saved_files import RESTORE, num_elements, one_line, read_object, tensor_shapes

_LAYER_COUNTS = {"num_hidden_layers", "num_layers", "encoder_layers", "decoder_layers", "n_layers", "depth"}
_SETTINGS = (
    "added_tokens.json",
    "chat_template.json",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
)
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_MAX_SETTINGS_BYTES = 256 << 20  # the largest tokenizers in use take 35 MB
_DENSE_SLACK = 2  # weights shared by several layers are stored once
_QUANTISED_SLACK = 16  # four-bit weights lie two to a byte, in an element of one byte or more


def check_model_files(directory: Path, *, trust_remote_code: bool) -> None:
    """Check that a model's JSON files are objects, its safetensors files whole, and that their sizes agree.

    Raises:
        ValueError: A file is damaged, the weights are there as pickles alone, or the configuration describes a model
            far larger than the weights.
    """
    files = sorted(directory.glob("*.safetensors"))
    pickles = sorted(path.name for kind in _PICKLES for path in directory.glob(kind))
    if pickles and not files:
        raise ValueError(
            f"{directory} holds its weights as a pickle, {pickles[0]!r}, which can run any code when it is read; save "
            "the model as safetensors where you trust it, or give a directory with model.safetensors"
        )
    for name in _SETTINGS:
        if (directory / name).is_symlink() or (directory / name).exists():
            read_object(directory / name, max_bytes=_MAX_SETTINGS_BYTES)
    if not (directory / "config.json").is_file():
        return
    config = read_object(directory / "config.json")
    shapes = {f"{path.name}/{name}": shape for path in files for name, shape in tensor_shapes(path).items()}
    if not shapes:
        return
    for name, layers in _layer_counts(config):
        if layers > len(shapes):
            raise ValueError(
                f"{directory / 'config.json'} gives {name}={json.dumps(layers)[:20]}, but the weights beside it are "
                f"{len(shapes)} tensors; {RESTORE}"
            )
    described = _num_parameters(directory, trust_remote_code=trust_remote_code)
    slack = _QUANTISED_SLACK if "quantization_config" in config else _DENSE_SLACK
    if described > slack * num_elements(shapes):
        raise ValueError(
            f"{directory / 'config.json'} describes a model of {described:,} parameters, the weights beside it hold "
            f"{num_elements(shapes):,}; {RESTORE}"
        )


def _layer_counts(config: dict[str, Any]) -> Iterator[tuple[str, int]]:
    for name, value in config.items():
        if isinstance(value, dict):
            yield from _layer_counts(value)
        elif name in _LAYER_COUNTS and isinstance(value, int):
            yield name, value


def _num_parameters(directory: Path, *, trust_remote_code: bool) -> int:
    """Parameters of the model that a configuration describes, without allocating them."""
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(directory, trust_remote_code=trust_remote_code)
        if not trust_remote_code and type(config) not in transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
            raise ValueError(f"it is a {type(config).__name__}")
        with torch.device("meta"):
            model = transformers.AutoModelForImageTextToText.from_config(config, trust_remote_code=trust_remote_code)
    except ImportError:
        raise
    except Exception as error:  # the classes behind a configuration raise whatever they come across
        if not trust_remote_code and "auto_map" in read_object(directory / "config.json"):
            raise ValueError(
                f"{directory} holds a model whose code comes with its weights, and nothing of it was run; read that "
                "code, and pass trust_remote_code=True if you trust it"
            ) from error
        raise ValueError(
            f"{directory / 'config.json'} describes no image-text-to-text model that can be built "
            f"({type(error).__name__}: {one_line(error)}); {RESTORE}, or give another model"
        ) from error
    return sum(parameter.numel() for parameter in model.parameters())
