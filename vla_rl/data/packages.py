"""Packages that only some formats need, imported where they are used."""

from __future__ import annotations

import importlib
from typing import Any

_NEEDED = {
    "PIL": ("pillow", "archive"),
    "av": ("PyAV", "archive"),
    "google_crc32c": ("google-crc32c", "rlds"),
    "hdf5plugin": ("hdf5plugin", "archive"),
    "pyarrow": ("pyarrow", "lerobot"),
}
"""By module: the package, and an extra that brings it."""


def needed(module: str) -> Any:
    """Imports one of these modules, such as ``"pyarrow"`` or ``"pyarrow.parquet"``.

    Raises:
        ImportError: if it is not installed, naming the extra to install.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package, extra = _NEEDED[module.partition(".")[0]]
        raise ImportError(f'this format needs {package}; install it with pip install "vla-rl[{extra}]"') from error
