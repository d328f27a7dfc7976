"""Spaces as Minari notes them in ``metadata.json``: the shape of every array, and actions of any kind as vectors."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from vla_rl.data.foreign import Arrays, as_float32, join_path
from vla_rl.data.safety import MAX_DEPTH, UnsafeFileError

Space = dict[str, Any]
"""A Gymnasium space in Minari's JSON: ``{"type": "Box", "shape": [3], ...}``."""

MAX_VECTOR_BYTES = 1 << 30
_SPACE_ERRORS = (KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError)


def read_space(metadata: Mapping[str, Any], name: str) -> Space | None:
    """The space that the metadata note as ``observation_space`` or ``action_space``; None if they note none.

    Raises:
        ValueError: if what they note is no space.
    """
    if name not in metadata:
        return None
    try:
        space = json.loads(metadata[name])
        row_shapes(space, "")
        for _, leaf in _leaves(space, ""):
            if leaf["type"] in ("Discrete", "MultiDiscrete"):
                _choices(leaf)
            elif leaf["type"] == "Text":
                _characters(leaf)
    except _SPACE_ERRORS as error:
        raise ValueError(f"its {name} is none that can be read ({error!r})") from error
    return space


def row_shapes(space: Space, path: str) -> dict[str, tuple[tuple[int, ...], int]]:
    """Shape of a row of every array of numbers in a space, and bytes of one of its numbers, by path."""
    found = {}
    for name, leaf in _leaves(space, path):
        shape = _shape(leaf)
        if shape is not None:
            dtype = {"Discrete": "int64", "MultiBinary": "int8"}.get(leaf["type"]) or leaf["dtype"]
            found[name] = (shape, np.dtype(dtype).itemsize)
    return found


def flat_actions(arrays: Arrays, space: Space | None, where: str) -> Arrays:
    """The arrays of an episode with its actions as one array, float32 ``[T, A]``, by ``gymnasium.spaces.flatten``.

    Numbers stay what they are, each choice of ``Discrete`` or ``MultiDiscrete`` becomes a one-hot vector, and a text
    the indices of its characters; parts of a ``Dict`` follow each other by name, those of a ``Tuple`` in order. So
    ``gymnasium.spaces.unflatten`` gives the action back. Without a noted space, floats count as a ``Box``.

    Args:
        arrays: by path, ``actions`` or ``actions/<key>.<key>``.
        space: of the actions.
        where: file and name of the episode, for messages.

    Raises:
        UnsafeFileError: if the vectors would take more than 1 GiB.
        ValueError: if a part is missing or outside its space, or there is no space to tell what the numbers mean.
    """
    parts = {name: array for name, array in arrays.items() if name == "actions" or name.startswith("actions/")}
    if space is None:
        array = parts.get("actions", np.empty(0, object))
        if array.dtype.kind != "f" or not array.ndim:
            found = {name: f"{part.dtype} {list(part.shape)}" for name, part in parts.items()}
            raise ValueError(
                f"{where} has the actions {found}, and metadata.json notes no action_space that says what they mean; "
                "add the one of its environment, as minari.serialization.serialize_space writes it"
            )
        vectors = [as_float32(array.reshape(len(array), -1), f"{where}: actions")]
    else:
        leaves = list(_leaves(space, "actions"))
        missing = [name for name, _ in leaves if name not in parts or not parts[name].ndim]
        if missing:
            raise ValueError(f"{where} has no '{missing[0]}', though its action_space has; it has {sorted(parts)}")
        vectors = [_vectors(parts[name], leaf, f"{where}: {name}") for name, leaf in leaves]
    if len({len(vector) for vector in vectors}) != 1:
        raise ValueError(f"{where} has parts of actions of different lengths, or none")
    return {name: array for name, array in arrays.items() if name not in parts} | {
        "actions": np.concatenate(vectors, axis=1)
    }


def _leaves(space: Space, path: str, depth: int = 0) -> Iterator[tuple[str, Space]]:
    """The spaces inside one that hold values, with their paths, in the order in which Gymnasium flattens them."""
    if depth > MAX_DEPTH:
        raise ValueError("it nests too deep")
    if space["type"] == "Dict":
        parts: Any = sorted(space["subspaces"].items())
    elif space["type"] == "Tuple":
        parts = enumerate(space["subspaces"])
    else:
        yield path, space
        return
    for key, part in parts:
        yield from _leaves(part, join_path(path, str(key)), depth + 1)


def _shape(leaf: Space) -> tuple[int, ...] | None:
    """Shape of a value; None of texts, which have none."""
    kind = leaf["type"]
    if kind == "Box":
        shape: Sequence[Any] = leaf["shape"]
    elif kind == "MultiDiscrete":
        shape = np.shape(leaf["nvec"])
    elif kind == "MultiBinary":
        shape = leaf["n"] if isinstance(leaf["n"], list) else [leaf["n"]]
    elif kind in ("Discrete", "Text"):
        return () if kind == "Discrete" else None
    else:
        raise ValueError(f"it has a {str(kind)[:40]!r}")
    sizes = tuple(map(int, shape))
    if len(sizes) > 16 or not all(0 <= size < 1 << 31 for size in sizes):
        raise ValueError(f"it has the shape {str(sizes)[:100]}")
    return sizes


def _choices(leaf: Space) -> tuple[np.ndarray, np.ndarray]:
    """First value and number of values of each choice of a ``Discrete`` or ``MultiDiscrete``, int64 ``[C]``."""
    sizes = np.array(leaf["n"] if leaf["type"] == "Discrete" else leaf["nvec"], np.int64).reshape(-1)
    starts = np.broadcast_to(np.array(leaf.get("start", 0), np.int64).reshape(-1), sizes.shape)
    if (sizes < 1).any() or (sizes >= 1 << 31).any() or (np.abs(starts) >= 1 << 62).any():
        raise ValueError("it has a choice between no values, or too many")
    return starts, sizes


def _characters(leaf: Space) -> tuple[int, dict[str, int]]:
    """Longest length of a ``Text`` and the index of each of its characters."""
    return int(leaf["max_length"]), {character: k for k, character in enumerate(dict.fromkeys(leaf["charset"]))}


def _vectors(array: np.ndarray, leaf: Space, where: str) -> np.ndarray:
    """Values of one space as float32 ``[T, n]``."""
    kind, steps = leaf["type"], len(array)
    if (array.dtype.kind == "O") != (kind == "Text"):
        raise ValueError(f"{where} are {array.dtype} {list(array.shape)}, no values of a {kind}")
    if kind == "Text":
        width, index = _characters(leaf)
        _check_size(steps, width, where)
        vectors = np.full((steps, width), len(index), np.float32)
        for row, text in zip(vectors, array, strict=True):
            if len(text) > width or not index.keys() >= set(text):
                raise ValueError(f"{where} has the text {text[:40]!r}, which is outside its space")
            row[: len(text)] = [index[character] for character in text]
        return vectors
    values = array.reshape(steps, math.prod(array.shape[1:]))
    if kind not in ("Discrete", "MultiDiscrete"):
        return as_float32(values, where)
    starts, sizes = _choices(leaf)
    if values.shape[1] != len(sizes) or values.dtype.kind not in "biu":
        raise ValueError(f"{where} are {array.dtype} {list(array.shape)}, expected {len(sizes)} whole numbers per step")
    chosen = values.astype(np.int64) - starts
    if ((chosen < 0) | (chosen >= sizes)).any():
        bounds = f"{sizes.tolist()[:20]} values from {starts.tolist()[:20]} on"
        raise ValueError(f"{where} have values outside their space of {bounds}")
    ends = np.cumsum(sizes)
    _check_size(steps, int(ends[-1]) if len(ends) else 0, where)
    vectors = np.zeros((steps, int(sizes.sum())), np.float32)
    np.put_along_axis(vectors, chosen + ends - sizes, 1, axis=1)
    return vectors


def _check_size(steps: int, width: int, where: str) -> None:
    if not 0 <= 4 * steps * width <= MAX_VECTOR_BYTES:
        raise UnsafeFileError(f"{where} would be {steps:,} vectors of {width:,} numbers; refused")
