"""Minari data sets whose episodes lie in Arrow or Parquet files, read through Minari's own storage."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vla_rl.data.foreign import Arrays, read_attributes
from vla_rl.data.safety import MAX_EPISODE_BYTES, UnsafeFileError, check_inside

FORMATS = ("arrow", "parquet")


def read_episodes(root: Path, metadata: Mapping[str, Any]) -> Iterator[tuple[Arrays, dict[str, Any]]]:
    """Arrays of every episode by path, as of ``flatten``, and what its own metadata say.

    Args:
        root: folder of ``metadata.json``.
        metadata: its content.

    Raises:
        ImportError: if Minari or pyarrow is not installed.
        UnsafeFileError: if a file lies elsewhere or is larger than an episode may be.
        ValueError: if the spaces are not in the metadata, for Minari would make the environment to ask it, or an
            episode cannot be read.
    """
    missing = [key for key in ("observation_space", "action_space") if not isinstance(metadata.get(key), str)]
    if missing:
        raise ValueError(f"'{root / 'metadata.json'}' has no '{missing[0]}', without which its files cannot be read")
    try:
        importlib.import_module("pyarrow")
        from minari.dataset.minari_storage import MinariStorage
    except ImportError as error:
        raise ImportError(
            'data sets of Minari in Arrow or Parquet files need it; install it with pip install "minari[arrow]"'
        ) from error
    for path in root.rglob("*"):
        check_inside(path, root)
        if path.is_file() and path.stat().st_size > MAX_EPISODE_BYTES:
            raise UnsafeFileError(f"'{path}' has more than {MAX_EPISODE_BYTES:,} bytes; refused")
    for number in range(metadata["total_episodes"]):
        try:
            storage = MinariStorage.read(root)
            (episode,) = storage.get_episodes([number])
            (known,) = storage.get_episode_metadata([number])
        except (OSError, ValueError, KeyError, TypeError, AttributeError, AssertionError, IndexError) as error:
            told = " ".join(str(error).split())[:200]
            raise ValueError(f"Minari cannot read episode {number} of '{root}' ({told})") from error
        yield _flat(episode), read_attributes(known, f"episode_{number}")


def _flat(episode: Mapping[str, Any]) -> Arrays:
    arrays: Arrays = {}
    todo = [(name, value) for name, value in episode.items() if name != "id"]
    while todo:
        name, value = todo.pop()
        if isinstance(value, Mapping):
            separator = "." if "/" in name else "/"
            todo += [(f"{name}{separator}{key}", inner) for key, inner in value.items()]
        elif isinstance(value, list) and value and isinstance(value[0], str):
            arrays[name] = np.array(value[0])
        else:
            array = np.asarray(value)
            if array.dtype.kind in "biuf":
                arrays[name] = array
    return arrays
