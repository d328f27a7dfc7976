"""What an episode store holds when it is opened, whatever happened to its last writer."""

from __future__ import annotations

import json
import math
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from vla_rl.data.image_formats import episode_format
from vla_rl.data.layout import (
    FORMAT,
    EpisodeInfo,
    Shapes,
    episode_info,
    episode_path,
    get_group,
    read_episode,
    whole_episode,
)
from vla_rl.data.safety import check_group, check_inside

# What a creation that was cut short may leave behind.
_CREATION_LEFTOVERS = {"episodes", "writer.lock", "metadata.json.tmp"}
_MAX_NOTED = 1 << 20  # values of a step; where more are noted, the first episode is asked


def store_exists(root: Path) -> bool:
    """Whether ``root`` holds an episode store.

    Raises:
        ValueError: if it is a file, or its ``data`` folder holds something else.
    """
    data_dir = root / "data"
    if root.exists() and not root.is_dir():
        raise ValueError(f"'{root}' is a file, but an episode store is a folder; give the folder, or another path")
    if (data_dir / "metadata.json").exists():
        return True
    if data_dir.exists():
        others = sorted(entry.name for entry in data_dir.iterdir() if entry.name not in _CREATION_LEFTOVERS)
        others += sorted(path.name for path in (data_dir / "episodes").glob("*.hdf5"))
        if others:
            raise ValueError(
                f"'{data_dir}' holds '{others[0]}' but no metadata.json, so it is not a whole episode store; "
                "restore that file or give another path"
            )
    return False


def find_shards(root: Path) -> list[Path]:
    """The stores in a folder that holds nothing else, by name, apart from files and hidden folders; else none."""
    if (root / "data").exists() or not root.is_dir():
        return []
    folders = sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    shards = [folder for folder in folders if (folder / "data" / "metadata.json").exists()]
    # One that its first writer is still making has no metadata yet.
    others = [folder for folder in folders if folder not in shards and not (folder / "data").is_dir()]
    return [] if others else shards


def read_metadata(root: Path) -> dict[str, Any]:
    """Reads ``metadata.json``; empty if a power failure cut it, for all it says is in the episode files.

    Raises:
        ValueError: if it is not that of an episode store.
    """
    path = root / "data" / "metadata.json"
    try:
        metadata = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        if (root / "data" / "episodes.jsonl").exists() and path.is_file():
            return {}
        raise ValueError(f"'{path}' is not JSON ({error}); restore it from a copy or give another path") from error
    version = metadata.get("vla_rl_format") if isinstance(metadata, dict) else None
    if version != FORMAT:
        raise ValueError(
            f"'{root}' was not written by EpisodeStore (vla_rl_format is {version}, expected {FORMAT}); "
            "read its episodes with the program that wrote it and append them to a new store"
        )
    return metadata


def noted_shapes(metadata: dict[str, Any]) -> Shapes | None:
    """The shapes that ``metadata.json`` notes, or None if it notes none, or something that no episode has."""
    try:
        noted = metadata["step_shapes"].items()
        shapes = {str(key): (str(dtype), tuple(map(int, shape))) for key, (dtype, shape) in noted}
        kinds = {np.dtype(dtype).kind for dtype, _ in shapes.values()}
    except (AttributeError, KeyError, TypeError, ValueError):
        return None
    sizes = [math.prod(shape) if min(shape, default=0) >= 0 else -1 for _, shape in shapes.values()]
    sound = "actions" in shapes and kinds <= set("biuf") and min(sizes) >= 0 and max(sizes) <= _MAX_NOTED
    return shapes if sound else None


def read_index(data_dir: Path) -> tuple[list[EpisodeInfo], int]:
    """Reads ``episodes.jsonl`` up to the first line that is not whole; returns the entries and their size in bytes."""
    index: list[EpisodeInfo] = []
    size = 0
    path = data_dir / "episodes.jsonl"
    if path.exists() and not path.is_file():
        raise ValueError(f"'{path}' is no file; remove it, and it is made anew from the episodes")
    with suppress(FileNotFoundError), open(path, "rb") as file:
        for line in file:
            try:
                info = EpisodeInfo(**json.loads(line))
            except (ValueError, TypeError, RecursionError):
                break
            if not line.endswith(b"\n") or not _is_whole(info):
                break
            index.append(info)
            size += len(line)
    return index, size


def _is_whole(info: EpisodeInfo) -> bool:
    """Whether every value is of its type; a line of the index may come from anywhere."""
    words = (info.task, info.source, info.instruction, info.policy_version, info.moments, info.images)
    counts = (info.total_steps, info.iteration, info.max_task_id, info.num_bytes, 0 if info.seed is None else info.seed)
    return (
        all(isinstance(word, str) for word in words)
        and all(isinstance(count, int) and not isinstance(count, bool) for count in counts)
        and isinstance(info.success, bool)
        and isinstance(info.return_, (int, float))
    )


def find_unindexed(data_dir: Path, index: list[EpisodeInfo]) -> list[EpisodeInfo]:
    """Checks that the files of the index are there and whole, and reads the entries of later files from the files.

    Such files come from a writer that died before it had noted them down, or from an index that was lost.

    Raises:
        ValueError: if a file is missing, cut or unreadable.
    """
    sizes = {
        entry.name: entry.stat().st_size for entry in os.scandir(data_dir / "episodes") if entry.name.endswith(".hdf5")
    }
    for number, info in enumerate(index):
        size = sizes.get(f"{number:06d}.hdf5")
        if size != info.num_bytes:
            path = episode_path(data_dir, number)
            found = "is missing" if size is None else f"has {size} bytes"
            raise ValueError(f"'{path}' {found}, expected {info.num_bytes} bytes; restore it from a copy")
    entries, root = [], data_dir.parent
    for number in range(len(index), len(sizes)):
        path = episode_path(data_dir, number)
        try:
            check_inside(path, root)
            with h5py.File(path, "r") as file, whole_episode(path):
                group = get_group(file, f"episode_{number}")
                check_group(group)
                episode, images = read_episode(group), episode_format(group)
        except OSError as error:
            raise ValueError(f"cannot read '{path}' ({error}); restore it from a copy") from error
        entries.append(episode_info(episode, sizes[path.name], images))
    return entries
