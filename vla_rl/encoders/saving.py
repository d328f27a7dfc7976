"""Writing an encoder to a directory, and making one from a directory or hub id."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from vla_rl.encoders import loading
from vla_rl.encoders import lora as adapters
from vla_rl.encoders.checkpoint import EncoderSettings, make_empty
from vla_rl.encoders.packaged import PACKAGED, packaged_path
from vla_rl.encoders.truncation import truncate_text
from vla_rl.saved_files import one_line

if TYPE_CHECKING:
    from vla_rl.encoders.vlm import FrozenVLMEncoder


def weights_of(saved: EncoderSettings, path: str | Path) -> str:
    """Directory or hub id of the weights of the encoder in `path`, and of their processor."""
    return str(Path(path) / "model") if saved.weights else packaged_path(str(saved.source)) or str(saved.source)


def require_processor(name_or_path: str | Path) -> None:
    """Get the small files of an encoder, so that a wrong name is noticed before there is a use for the weights.

    Raises:
        FileNotFoundError: There is no such directory, or the hub has no such model or cannot be reached.
        ValueError: What is there has no processor for pictures and text.
    """
    path, saved = _settings(name_or_path)
    source, origin = weights_of(saved, path), {"revision": saved.revision, "trust_remote_code": False}
    try:
        loading.require_transformers().AutoConfig.from_pretrained(source, **origin)  # of all files the first to fail
        loading.load_processor(source, **origin)
    except OSError as error:
        said = f"the files of the VLM {str(name_or_path)!r} cannot be had: {one_line(error)}"
        raise FileNotFoundError(said) from error


def restore(
    cls: type[FrozenVLMEncoder],
    name_or_path: str | Path,
    *,
    device: torch.device | str,
    revision: str | None,
    trust_remote_code: bool,
    truncate_layers: int | None,
    quantization_config: Any,
    asked: Mapping[str, Any],
) -> tuple[FrozenVLMEncoder, bool]:
    """What `FrozenVLMEncoder.from_pretrained` does before it adds an adapter; warns if the weights have changed.

    Args:
        cls: The encoder's class.
        name_or_path: Directory, hub id, or the name of an encoder that comes with the package.
        device: Where quantised weights go; others stay on the CPU.
        revision: Revision on the hub.
        trust_remote_code: Whether the model's own code may run.
        truncate_layers: Number of text layers to keep; None for as many as were saved.
        quantization_config: Handed on to transformers; None for what was saved, False for whole weights.
        asked: Settings to use instead of the saved ones, of `dtype`, `prompt`, `layer` and `views`.

    Returns:
        The encoder, and whether its weights are quantised.
    """
    if isinstance(asked.get("dtype"), str):
        raise TypeError(f"dtype={asked['dtype']!r}, expected one of torch's, such as torch.bfloat16")
    path, saved = _settings(name_or_path)
    if saved.trust_remote_code and not trust_remote_code:
        raise ValueError(
            f"the encoder in {path} runs code of {saved.source!r}, which comes with its weights; read that code, and "
            "pass trust_remote_code=True if you trust it"
        )
    origin: dict[str, Any] = {"revision": revision or saved.revision, "trust_remote_code": trust_remote_code}
    weights = weights_of(saved, path)
    kept = saved.truncate_layers if truncate_layers is None else truncate_layers
    if quantization_config is None:
        quantization_config = loading.quantization_config(saved.quantization, where=f"'quantization' of {path}")
    model = loading.load_model(weights, quantization_config=quantization_config or None, device=device, **origin)
    if kept is not None:
        truncate_text(model, kept)
    if saved.lora is not None:
        adapters.load_lora(model, path / "adapter")
    settings = {"dtype": saved.torch_dtype, "prompt": saved.prompt, "layer": saved.layer, "views": saved.views}
    encoder = cls(
        model,
        loading.load_processor(weights, **origin),
        truncate_layers=kept,
        source=None if saved.weights else saved.source,
        **{**settings, **asked},
        **origin,
    )
    encoder.image_size = saved.image_size
    encoder.feature_dtype = getattr(torch, saved.feature_dtype)
    encoder.lora = saved.lora
    encoder.unknown_fields = saved.unknown_fields
    quantized = getattr(model, "is_quantized", False)
    comparable = not asked and not (quantized or saved.quantization) and kept == saved.truncate_layers
    if saved.fingerprint and comparable and encoder.fingerprint != saved.fingerprint:
        warnings.warn(
            f"the encoder in {path} has fingerprint {encoder.fingerprint}, but was saved as {saved.fingerprint}: "
            f"its weights or the processor of {weights} changed since; heads and cached features may not fit",
            stacklevel=3,
        )
    return encoder, quantized


def save(encoder: FrozenVLMEncoder, directory: str | Path, *, weights: bool) -> None:
    """Write settings, adapter, and the full weights if wanted.

    Raises:
        FileExistsError: If the directory is not empty.
    """
    directory = make_empty(directory)
    if weights:
        adapters.save_base(encoder.model, directory / "model")
        encoder.processor.save_pretrained(directory / "model")
    if encoder.lora is not None:
        adapters.save_lora(encoder.model, directory / "adapter")
    EncoderSettings(
        source=None if weights else encoder.source,
        revision=None if weights else encoder.revision,
        trust_remote_code=encoder.trust_remote_code,
        weights=weights,
        dtype=str(encoder.compute_dtype).removeprefix("torch."),
        feature_dtype=str(encoder.feature_dtype).removeprefix("torch."),
        prompt=encoder.prompt,
        layer=encoder.layer,
        views=encoder.views,
        truncate_layers=encoder.truncate_layers,
        image_size=encoder.image_size,
        lora=encoder.lora,
        quantization=loading.quantization(encoder.model),
        fingerprint=encoder.fingerprint,
        unknown_fields=encoder.unknown_fields,
    ).write(directory)


def _settings(name_or_path: str | Path) -> tuple[Path, EncoderSettings]:
    """The name as a path, and what was saved there, or what stands for a name that is no directory."""
    path = Path(name_or_path)
    if not path.is_dir() and (path.is_absolute() or str(name_or_path)[0] in ".~" or len(path.parts) > 2):
        raise FileNotFoundError(
            f"{name_or_path} is no directory; give that of a model or encoder, or a hub id 'org/name'"
        )
    return path, PACKAGED[str(name_or_path)] if packaged_path(name_or_path) else EncoderSettings.read(name_or_path)
