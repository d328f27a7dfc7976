"""What an encoder's own directory holds beside weights: `encoder.json`."""

from __future__ import annotations

import json
import string
import warnings
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import torch

from vla_rl.encoders.lora import LoRASettings
from vla_rl.saved_files import RESTORE, check_arguments, read_object

FILE_NAME = "encoder.json"
Views = Literal["separate", "joint"]
DTYPES = ("float32", "bfloat16", "float16")


@dataclass
class EncoderSettings:
    """Everything that decides an encoder's features besides weights and processor.

    Attributes:
        source: Directory or hub id of the unchanged weights; None if there is none.
        revision: Revision of `source`.
        trust_remote_code: Whether `source` runs code of its own.
        weights: Whether the directory itself holds the full weights, under `model/`.
        dtype: Name of the torch type of the matrix products.
        feature_dtype: Name of the torch type in which tokens are stored.
        prompt: Format string with the field `{instruction}`.
        layer: Index into `hidden_states`.
        views: Whether several frames of an observation share a prompt.
        truncate_layers: Number of text layers kept; None for all.
        image_size: (H, W) of the frames last seen.
        lora: Settings of the adapter under `adapter/`, or None.
        quantization: How the weights are quantised, as transformers' configuration of it writes itself; None if not.
        fingerprint: Fingerprint at the time of saving.
        unknown_fields: What a file holds beside these, of a later version; written again as it was.
    """

    source: str | None
    revision: str | None = None
    trust_remote_code: bool = False
    weights: bool = False
    dtype: str = "float32"
    feature_dtype: str = "float16"
    prompt: str = "{instruction}"
    layer: int = -1
    views: Views = "separate"
    truncate_layers: int | None = None
    image_size: tuple[int, int] | None = None
    lora: LoRASettings | None = None
    quantization: dict[str, Any] | None = None
    fingerprint: str | None = None
    unknown_fields: dict[str, Any] = field(default_factory=dict)

    @property
    def torch_dtype(self) -> torch.dtype:
        """`dtype` as a torch type."""
        return getattr(torch, self.dtype)

    @classmethod
    def read(cls, name_or_path: str | Path) -> EncoderSettings:
        """Settings saved in a directory, or the defaults for a plain model directory or hub id.

        Warns of settings that this version does not know.

        Raises:
            ValueError: If the file is damaged.
        """
        path = Path(name_or_path)
        if not (path / FILE_NAME).is_file():
            return cls(source=str(path.resolve()) if path.is_dir() else str(name_or_path))
        values = read_object(path / FILE_NAME)
        known = {field.name for field in fields(cls)} - {"unknown_fields"}
        unknown = {name: values.pop(name) for name in values.keys() - known}
        _check(values, str(path / FILE_NAME))
        if unknown:
            warnings.warn(
                f"{path / FILE_NAME} holds {', '.join(map(repr, sorted(unknown)))}, which this version does not know; "
                "they are kept, but the features may not be those that were saved: update vla-rl",
                stacklevel=2,
            )
        if values.get("image_size"):
            values["image_size"] = tuple(values["image_size"])
        if values.get("lora"):
            values["lora"] = LoRASettings(**values["lora"])
        return cls(**values, unknown_fields=unknown)

    def write(self, directory: Path) -> None:
        """Write `encoder.json` into an existing directory."""
        values = asdict(self)
        values |= values.pop("unknown_fields")
        (directory / FILE_NAME).write_text(json.dumps(values, indent=2) + "\n")


def has_instruction(prompt: str) -> bool:
    """Whether a format string has the field `{instruction}`, and no other."""
    try:
        fields = {part[1:] for part in string.Formatter().parse(prompt) if part[1] is not None}
    except ValueError:  # a single brace
        return False
    return fields == {("instruction", "", None)}


def _check(values: dict[str, Any], where: str) -> None:
    check_arguments(EncoderSettings, values, where=where)
    size, lora = values.get("image_size"), values.get("lora")
    for name in ("dtype", "feature_dtype"):
        if (dtype := values.get(name, DTYPES[0])) not in DTYPES:
            raise ValueError(f"{where} gives {name}={dtype[:60]!r}, expected one of {', '.join(DTYPES)}; {RESTORE}")
    if not has_instruction(values.get("prompt", "{instruction}")):
        prompt = values["prompt"][:60]
        raise ValueError(f"{where} gives prompt={prompt!r}, expected a text with the field {{instruction}}; {RESTORE}")
    if size and min(size) < 1:
        raise ValueError(f"{where} gives image_size={size}, expected a height and a width above 0; {RESTORE}")
    if not values.get("weights") and values.get("source") is None:
        raise ValueError(f"{where} names neither a source of weights nor weights of its own; {RESTORE}")
    if lora is not None:
        check_arguments(LoRASettings, lora, where=f"'lora' in {where}")


def make_empty(directory: str | Path) -> Path:
    """Create a directory to save to.

    Raises:
        FileExistsError: If it exists and holds anything.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    if any(directory.iterdir()):
        raise FileExistsError(f"{directory} is not empty; save to a new directory, or remove this one first")
    return directory
