"""Encoders that come with the package: their names and where their files are."""

from __future__ import annotations

from pathlib import Path

from vla_rl.encoders.checkpoint import EncoderSettings

ASSETS = Path(__file__).parents[1] / "assets"

PACKAGED: dict[str, EncoderSettings] = {
    "tiny": EncoderSettings(source="tiny", dtype="bfloat16", image_size=(64, 64)),
}
"""Settings by name; a saved policy keeps the name, so that it finds the weights wherever the package is installed."""


def packaged_path(name_or_path: str | Path) -> str | None:
    """Directory of a packaged encoder, or None if `name_or_path` is not the name of one.

    A directory of your own that is called the same is `./tiny`.

    Raises:
        FileNotFoundError: If the package was installed without the files.
    """
    if not isinstance(name_or_path, str) or name_or_path not in PACKAGED:
        return None
    directory = ASSETS / name_or_path
    if not (directory / "model.safetensors").is_file():
        raise FileNotFoundError(
            f"the encoder {name_or_path!r} should be in {directory}, which holds no model.safetensors; make it with "
            f"`python benchmarks/tiny/pretrain.py` and copy its `model` directory there, or pass another model"
        )
    return str(directory)
