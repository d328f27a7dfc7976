"""Plug-ins by import path: `"package.module:Name"`, so that nobody needs to edit a registry."""

from __future__ import annotations

import importlib
import re
from typing import Any

REFERENCE = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*")


def import_path(cls: type) -> str:
    """`"package.module:Class"` of `cls`."""
    return f"{cls.__module__}:{cls.__qualname__}"


def load_object(path: str) -> Any:
    """The class or function at `"package.module:Name"`.

    Raises:
        ValueError: the path is not of that form (nothing is imported then), or there is no such module or name.
    """
    if not isinstance(path, str) or not REFERENCE.fullmatch(path):
        raise ValueError(f"cannot load {repr(path)[:80]}; expected an importable 'package.module:Name'")
    module, _, name = path.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"cannot load {path!r} ({error}); expected an importable 'package.module:Name'") from error
