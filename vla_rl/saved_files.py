"""Files of a saved policy or model, which may come from anywhere: checked before anything is built from them."""

from __future__ import annotations

import inspect
import json
import math
import types
from collections.abc import Mapping, Sequence
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

MAX_JSON_BYTES = 16 << 20
RESTORE = "restore it from a copy, or use the version of vla_rl that wrote it"


def one_line(error: BaseException | str, *, length: int = 160) -> str:
    """What an error of another library says, short enough to stand inside a sentence of ours."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= length else text[: length - 3] + "..."


def read_object(path: Path, *, max_bytes: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        ValueError: it holds something else, or more than `max_bytes`.
    """
    try:
        if path.stat().st_size > max_bytes:
            raise ValueError(f"more than {max_bytes:,} bytes")
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read as JSON ({one_line(error, length=100)}); {RESTORE}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds {_short(value)}, expected a JSON object; {RESTORE}")
    return value


def check_arguments(cls: type, values: Any, *, where: str) -> None:
    """Check that `cls(**values)` gets the arguments of its signature, each of the type that it is annotated with.

    Args:
        cls: a dataclass or any class; annotations other than those of JSON values let everything pass.
        values: what a JSON file gave.
        where: names the place in the file, for the error.

    Raises:
        ValueError: they do not fit.
    """
    if not isinstance(values, dict):
        raise ValueError(f"{where} is {_short(values)}, expected an object of arguments of {cls.__name__}; {RESTORE}")
    try:
        inspect.signature(cls).bind(**values)
    except TypeError as error:
        raise ValueError(f"{where} does not fit {cls.__name__} ({one_line(error)}); {RESTORE}") from error
    try:
        hints = get_type_hints(cls.__init__)
    except NameError:  # annotated with a name that is imported for type checkers alone
        hints = {}
    for name, value in values.items():
        hint = hints.get(name, Any)
        if not _fits(value, hint):
            expected = hint.__name__ if isinstance(hint, type) and get_origin(hint) is None else str(hint)
            raise ValueError(
                f"{where} gives {name}={_short(value)}, expected {expected.replace('typing.', '')}; {RESTORE}"
            )


def tensor_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors in a safetensors file by name; reads the header, which must fit the file, and no tensor.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no safetensors file, or a damaged one.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing or no file; {RESTORE}")
    try:
        with safe_open(path, framework="pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} is no whole safetensors file ({one_line(error)}); {RESTORE}") from error


def read_tensors(path: Path, expected: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
    """The tensors of a safetensors file; see `check_tensors`."""
    check_tensors(path, expected)
    return load_file(path)


def write_tensors(tensors: Mapping[str, Tensor], path: Path, *, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file, each tensor whole, also where several share memory."""
    whole = {name: value.detach().to("cpu", copy=True).contiguous() for name, value in tensors.items()}
    save_file(whole, path, metadata=metadata)


def check_tensors(path: Path, expected: Mapping[str, Sequence[int]]) -> None:
    """Check that a safetensors file holds tensors of exactly these names and shapes; reads none.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, or its tensors are others.
    """
    found = tensor_shapes(path)
    for names, what in (
        (expected.keys() - found.keys(), "lacks the"),
        (found.keys() - expected.keys(), "has the unknown"),
    ):
        if names:
            raise ValueError(
                f"{path} {what} tensor {one_line(min(names), length=80)!r} ({len(names)} in all); {RESTORE}"
            )
    for name, shape in found.items():
        if shape != tuple(expected[name]):
            raise ValueError(
                f"{path} holds {name!r} with shape {_short(list(shape))}, expected {_short(list(expected[name]))}, as "
                f"the settings beside it say; {RESTORE}"
            )


def num_elements(shapes: Mapping[str, Sequence[int]]) -> int:
    """Entries of all tensors of these shapes together."""
    return sum(math.prod(shape) for shape in shapes.values())


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value read from JSON is one of the annotated type; annotations that JSON knows nothing of fit all."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return any(_fits(value, argument) for argument in arguments)
    if origin is Literal:
        return any(value == argument and type(value) is type(argument) for argument in arguments)
    if hint in (None, type(None)):
        return value is None
    if hint is float:
        return isinstance(value, float | int) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if hint in (bool, str):
        return isinstance(value, hint)
    kind = origin or hint
    if kind is tuple and isinstance(value, list | tuple):
        if len(arguments) == 2 and arguments[1] is Ellipsis:
            return all(_fits(item, arguments[0]) for item in value)
        return not arguments or (len(value) == len(arguments) and all(map(_fits, value, arguments)))
    if kind in (list, Sequence) and isinstance(value, list | tuple):
        return not arguments or all(_fits(item, arguments[0]) for item in value)
    if kind in (dict, Mapping) and len(arguments) == 2:
        return isinstance(value, dict) and all(_fits(item, arguments[1]) for item in value.values())
    if kind in (dict, Mapping) or is_dataclass(kind):
        return isinstance(value, dict)
    return kind not in (tuple, list, Sequence)


def _short(value: Any) -> str:
    return one_line(repr(value), length=60)
