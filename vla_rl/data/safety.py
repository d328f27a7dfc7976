"""Checks made on an HDF5 file before anything is read from it, because it may come from anywhere."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, cast

import h5py
import numpy as np

from vla_rl.data.heaps import Heaps, check_words

MAX_EPISODE_BYTES = 8 << 30
MAX_OBJECTS = 10_000
MAX_DEPTH = 8
# gzip packs at most 1032 bytes into one and lzf fewer; more than that is a file made to fill the memory.
MAX_COMPRESSION = 1100
SLACK_BYTES = 1 << 20


class UnsafeFileError(ValueError):
    """A file that would read other files, or claims sizes that it does not hold."""


def check_inside(path: Path, root: Path) -> None:
    """Refuses a symbolic link that leads out of the data set.

    Raises:
        UnsafeFileError: if ``path``, with links followed, is not below ``root``.
    """
    if not path.resolve().is_relative_to(root.resolve()):
        raise UnsafeFileError(f"'{path}' is a link that leaves '{root}'; copy the file there if you trust it")


def check_group(group: h5py.Group, *, max_bytes: int = MAX_EPISODE_BYTES) -> None:
    """Refuses a group from which reading could leave the file, fill the memory or never end; reads no array of numbers.

    Allowed are nested groups and datasets that lie in the same file and hold as many bytes as they claim.

    Args:
        group: usually one episode.
        max_bytes: most bytes that all its arrays may have together, decoded.

    Raises:
        UnsafeFileError: for soft, external or circular links, virtual or externally stored datasets, and sizes that
            are above ``max_bytes`` or not backed by data in the file.
        ValueError: for text, in attributes or arrays, that is damaged.
    """
    where = f"'{group.file.filename}'"
    heaps: Heaps = {}
    total, seen, todo = check_words(group, heaps), 0, [(group, 0)]
    while todo:
        parent, depth = todo.pop()
        if depth > MAX_DEPTH:
            raise UnsafeFileError(f"{where} nests groups deeper than {MAX_DEPTH} levels in '{group.name}'; refused")
        for key in map(str, parent):
            seen += 1
            name = f"{parent.name}/{key}"
            if seen > MAX_OBJECTS:
                raise UnsafeFileError(f"{where} has more than {MAX_OBJECTS} objects in '{group.name}'; refused")
            if not isinstance(parent.get(key, getlink=True), h5py.HardLink):
                raise UnsafeFileError(f"{where}: '{name}' is a link to something else; copy what it points to instead")
            child = parent[key]
            if isinstance(child, h5py.Group):
                todo.append((child, depth + 1))
                total += check_words(child, heaps)
            elif isinstance(child, h5py.Dataset):
                total += _claimed_bytes(child, f"{where}: '{name}'", heaps)
            if total > max_bytes:
                raise UnsafeFileError(
                    f"{where}: '{group.name}' claims {total:,} bytes, more than the {max_bytes:,} allowed"
                )


def encoded_shape(dataset: h5py.Dataset) -> tuple[int, ...]:
    """``(T, H, W, 3)`` that encoded pictures say they have.

    Raises:
        ValueError: if they do not.
    """
    shape = tuple(int(size) for size in np.ravel(cast("Any", dataset.attrs.get("shape", ()))))
    if len(shape) != 4 or min(shape) < 1 or shape[3] != 3:
        raise ValueError(f"'{dataset.file.filename}': '{dataset.name}' claims the shape {shape}, expected [T, H, W, 3]")
    return shape


def _claimed_bytes(dataset: h5py.Dataset, name: str, heaps: Heaps) -> int:
    if dataset.is_virtual or dataset.external:
        raise UnsafeFileError(f"{name} lies in other files; materialise it first, with a program you trust")
    words = check_words(dataset, heaps)
    stored = int(dataset.id.get_storage_size())
    if "encoding" in dataset.attrs:
        shape = encoded_shape(dataset)
        if shape[0] > stored:
            raise UnsafeFileError(f"{name} claims {shape[0]:,} frames in {stored:,} bytes; the file is cut or forged")
        claimed = math.prod(shape)
        # A video of what does not move has no bound; as of all others, an episode may take MAX_EPISODE_BYTES of it.
        bound = claimed if dataset.attrs["encoding"] == "video" else stored * MAX_COMPRESSION
    else:
        claimed = int(dataset.nbytes)
        bound = stored * (MAX_COMPRESSION if dataset.id.get_create_plist().get_nfilters() else 1)
    if claimed > bound + SLACK_BYTES:
        raise UnsafeFileError(f"{name} claims {claimed:,} bytes but {stored:,} are stored; the file is cut or forged")
    return claimed + words
