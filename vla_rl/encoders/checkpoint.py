"""What an encoder's own directory holds beside weights: `encoder.json`."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch

from vla_rl.encoders.lora import LoRASettings

FILE_NAME = "encoder.json"
Views = Literal["separate", "joint"]


@dataclass
class EncoderSettings:
    """Everything that decides an encoder's features besides weights and processor.

    Attributes:
        source: Directory or hub id of the unchanged weights; None if there is none.
        revision: Revision of `source`.
        trust_remote_code: Whether `source` runs code of its own.
        weights: Whether the directory itself holds the full weights, under `model/`.
        dtype: Name of the torch type of the matrix products.
        prompt: Format string with the field `{instruction}`.
        layer: Index into `hidden_states`.
        views: Whether several frames of an observation share a prompt.
        truncate_layers: Number of text layers kept; None for all.
        image_size: (H, W) of the frames last seen.
        lora: Settings of the adapter under `adapter/`, or None.
        fingerprint: Fingerprint at the time of saving.
    """

    source: str | None
    revision: str | None = None
    trust_remote_code: bool = False
    weights: bool = False
    dtype: str = "float32"
    prompt: str = "{instruction}"
    layer: int = -1
    views: Views = "separate"
    truncate_layers: int | None = None
    image_size: tuple[int, int] | None = None
    lora: LoRASettings | None = None
    fingerprint: str | None = None

    @property
    def torch_dtype(self) -> torch.dtype:
        """`dtype` as a torch type."""
        return getattr(torch, self.dtype)

    @classmethod
    def read(cls, name_or_path: str | Path) -> EncoderSettings:
        """Settings saved in a directory, or the defaults for a plain model directory or hub id."""
        path = Path(name_or_path)
        if not (path / FILE_NAME).is_file():
            return cls(source=str(path.resolve()) if path.is_dir() else str(name_or_path))
        values = json.loads((path / FILE_NAME).read_text())
        values["image_size"] = tuple(values["image_size"]) if values["image_size"] else None
        values["lora"] = LoRASettings(**values["lora"]) if values["lora"] else None
        return cls(**values)

    def write(self, directory: Path) -> None:
        """Write `encoder.json` into an existing directory."""
        (directory / FILE_NAME).write_text(json.dumps(asdict(self), indent=2) + "\n")


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
