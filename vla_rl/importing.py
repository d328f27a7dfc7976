"""Plug-ins by import path: `"package.module:Name"`, so that nobody needs to edit a registry."""

from __future__ import annotations

import importlib
from typing import Any


def import_path(cls: type) -> str:
    """`"package.module:Class"` of `cls`."""
    return f"{cls.__module__}:{cls.__qualname__}"


def load_object(path: str) -> Any:
    """The class or function at `"package.module:Name"`.

    Raises:
        ValueError: no such module or name.
    """
    module, _, name = path.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"cannot load {path!r} ({error}); expected an importable 'package.module:Name'") from error
