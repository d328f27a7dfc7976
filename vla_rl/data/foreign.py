"""Episodes out of arrays that other programs wrote: which array is what, and what has to be told besides."""

from __future__ import annotations

import io
import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from vla_rl._cameras import camera_names
from vla_rl.data.episode import Episode
from vla_rl.data.packages import needed
from vla_rl.data.safety import MAX_EPISODE_BYTES, MAX_OBJECTS, UnsafeFileError, check_inside

Arrays = dict[str, np.ndarray]
Render = Callable[[Arrays], np.ndarray]
"""From all arrays of an episode, by path, to its pictures, uint8 ``[T+1, H, W, 3]``."""

_JPEG = b"\xff\xd8\xff"
MAX_TEXT = 10_000
MAX_TEXTS = 1 << 28
_MAX_JSON_BYTES = 64 << 20


@dataclass(frozen=True)
class Labels:
    """What to assume where episodes do not say it themselves.

    Attributes:
        task: name of the task.
        instruction: the sentence; by default the first string of a text observation, if there is one.
        source: who acted.
        success: whether the episodes solved their task; by default the attribute ``success``, else
            ``infos/<success_key>``.
        success_key: name below ``infos`` of what tells success at every step.
        state_keys: observations to put into ``state``, one after the other, as float32; by default ``observation`` or
            ``state`` or the only observation of floats.
        image_keys: observations that are pictures, uint8 ``[T+1, H, W, 3]`` or, in grey, ``[T+1, H, W]`` or
            ``[T+1, H, W, 1]``; by default all in colour, or else those in grey of at least 32 x 32. A single one
            becomes ``image``, several are named as by ``VLAObservation(image_key=[...])``.
    """

    task: str | None = None
    instruction: str | None = None
    source: str = "import"
    success: bool | None = None
    success_key: str = "success"
    state_keys: Sequence[str] = ()
    image_keys: Sequence[str] = ()


def join_path(path: str, key: str) -> str:
    """The path of what lies in a group: ``"infos/env"``, and deeper down ``"infos/env.reward"``."""
    return f"{path}{'.' if '/' in path else '/'}{key}"


def flatten(group: h5py.Group, *, skip: Sequence[str] = ()) -> Arrays:
    """Arrays of a group and its subgroups by path, as of ``join_path``; JPEG frames decoded.

    Of texts only the first is read, unless they are actions: those are strings ``[T]``, of type object. Call
    ``check_group`` first.

    Raises:
        UnsafeFileError: if frames or texts are larger than an episode may be.
        ValueError: if JPEG frames are not of one size.
    """
    arrays: Arrays = {}
    todo: list[tuple[str, Any]] = [(name, group[name]) for name in map(str, group) if name not in skip]
    while todo:
        name, item = todo.pop()
        if isinstance(item, h5py.Group):
            todo += [(join_path(name, child), item[child]) for child in map(str, item)]
        elif isinstance(item, h5py.Dataset):
            array = _read(item, every_text=name.split("/")[0] == "actions")
            if array is not None:
                arrays[name] = array
    return arrays


def _read(dataset: h5py.Dataset, *, every_text: bool) -> np.ndarray | None:
    if dataset.dtype.kind in "biuf":
        if dataset.dtype == np.uint8 and dataset.ndim == 2 and len(dataset) and bytes(dataset[0, :3]) == _JPEG:
            return _decode_jpeg(dataset)
        return dataset[()]
    element = h5py.check_vlen_dtype(dataset.dtype)
    if element == np.uint8 and dataset.ndim == 1 and len(dataset) and bytes(dataset[0][:3]) == _JPEG:
        return _decode_jpeg(dataset)
    if h5py.check_string_dtype(dataset.dtype) and dataset.ndim == 1 and len(dataset):
        if every_text:
            return _read_texts(dataset)
        return np.array(_text(dataset[0], str(dataset.name)))
    return None


def _read_texts(dataset: h5py.Dataset) -> np.ndarray:
    """All strings, one by one, since any number of rows may refer to one long string in the file."""
    texts, total = np.empty(len(dataset), object), 0
    for row in range(len(dataset)):
        texts[row] = _text(dataset[row], str(dataset.name))
        total += len(texts[row])
        if total > MAX_TEXTS:
            raise UnsafeFileError(f"'{dataset.name}' has more than {MAX_TEXTS:,} characters; refused")
    return texts


def _decode_jpeg(dataset: h5py.Dataset) -> np.ndarray:
    pillow = needed("PIL.Image")
    frames: np.ndarray | None = None
    for step in range(len(dataset)):
        with pillow.open(io.BytesIO(dataset[step].tobytes()), formats=("JPEG",)) as image:
            claimed = len(dataset) * image.width * image.height * 3
            if claimed > MAX_EPISODE_BYTES or claimed > 1100 * dataset.file.id.get_filesize() + (1 << 20):
                raise UnsafeFileError(f"'{dataset.name}' would take {claimed:,} bytes decoded; refused")
            if frames is None:
                frames = np.empty((len(dataset), image.height, image.width, 3), dtype=np.uint8)
            if (image.height, image.width) != frames.shape[1:3]:
                raise ValueError(f"frame {step} of '{dataset.name}' has another size than the first")
            frames[step] = np.asarray(image.convert("RGB"))
    assert frames is not None
    return frames


def _text(value: Any, name: str) -> str:
    text = value.decode("utf-8", errors="replace") if isinstance(value, bytes) else str(value)
    if len(text) > MAX_TEXT:
        raise UnsafeFileError(f"'{name}' is a text of {len(text):,} characters, more than {MAX_TEXT:,}; refused")
    return text


def read_json(path: Path, root: Path) -> dict[str, Any]:
    """The object in a JSON file of a data set at ``root``.

    Raises:
        UnsafeFileError: if it lies outside ``root`` or is larger than 64 MiB.
        ValueError: if it holds no JSON object.
    """
    check_inside(path, root)
    if path.stat().st_size > _MAX_JSON_BYTES:
        raise UnsafeFileError(f"'{path}' has more than {_MAX_JSON_BYTES:,} bytes; refused")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"'{path}' is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"'{path}' holds a {type(value).__name__}, expected an object")
    return value


def read_attributes(attributes: Mapping[str, Any], name: str) -> dict[str, Any]:
    """What an episode of some name says of itself and we know; what is of the wrong type is left out."""
    if len(attributes) > MAX_OBJECTS:
        raise UnsafeFileError(f"'{name}' has {len(attributes)} attributes; refused")
    found: dict[str, Any] = {}
    for key in ("task", "instruction", "source", "policy_version", "seed", "iteration", "success"):
        value: Any = attributes.get(key)
        if key in ("seed", "iteration") and isinstance(value, int | np.integer):
            found[key] = int(value)
        elif key == "success" and isinstance(value, bool | np.bool_ | np.integer):
            found[key] = bool(value)
        elif key not in ("seed", "iteration", "success") and isinstance(value, str | bytes) and value:
            found[key] = _text(value, f"{name}@{key}")
    return found


def assemble(
    arrays: Arrays,
    *,
    labels: Labels,
    render: Render | None,
    attributes: Mapping[str, Any],
    where: str,
    default_task: str,
    instructions: dict[str, int],
) -> Episode:
    """Makes an episode of foreign arrays; what it says of itself goes before ``labels``.

    Args:
        arrays: by path, as of ``flatten``: ``actions``, ``rewards``, ``terminations``, ``truncations``,
            ``observations`` or ``observations/<key>``, ``infos/<key>``.
        labels: what to assume otherwise.
        render: draws the pictures if there are none.
        attributes: what the episode says of itself.
        where: its file and name, for messages.
        default_task: its task if neither says it.
        instructions: number of each sentence seen so far, which becomes the ``task_id``; extended here.

    Raises:
        ValueError: if something is missing or does not fit, saying which option tells it.
    """
    missing = [key for key in ("actions", "rewards", "terminations", "truncations") if key not in arrays]
    if missing:
        raise ValueError(f"{where} has no '{missing[0]}', so it is not an episode")
    steps = len(arrays["actions"]) if arrays["actions"].ndim else 0
    given = {
        key.removeprefix("observations/"): array for key, array in arrays.items() if key.startswith("observations/")
    }
    if "observations" in arrays:
        image = _is_pictures(arrays["observations"])
        given["image" if image else "observation"] = arrays["observations"]
    infos = {
        key.removeprefix("infos/"): array
        for key, array in arrays.items()
        if key.startswith("infos/") and array.dtype.kind in "biuf" and array.ndim and len(array) == steps + 1
    }
    texts = {key: str(array) for key, array in given.items() if array.dtype.kind == "U"}
    given = {key: array for key, array in given.items() if array.dtype.kind in "biuf"}
    instruction = attributes.get("instruction") or labels.instruction or next(iter(texts.values()), None)
    if not instruction:
        raise ValueError(f"{where} has no instruction; give one (--instruction)")
    success = attributes.get("success", labels.success)
    if success is None:
        solved = infos.get(labels.success_key)
        if solved is None:
            raise ValueError(
                f"{where} does not say whether it succeeded: no attribute 'success' and no 'infos/{labels.success_key}'"
                f" among {sorted(infos)}; name the info (--success-key) or say it for all (--success True)"
            )
        success = bool(np.any(solved))
    observations = _pictures(given, arrays, labels, render, where)
    observations |= _state(given, labels, where)
    actions = arrays["actions"]
    if actions.dtype.kind != "f":
        given_as = f"{actions.dtype} {list(actions.shape)}"
        raise ValueError(f"{where}: actions are {given_as}; only continuous ones, of floats, are supported")
    task_id = given.pop("task_id", None)
    # What is called like a camera or the state but is none keeps its data under another name.
    observations |= {f"raw_{key}" if key.split("_")[0] in ("image", "state") else key: a for key, a in given.items()}
    if task_id is None or task_id.dtype.kind not in "iu":
        task_id = np.full(steps + 1, instructions.setdefault(instruction, len(instructions)))
    observations["task_id"] = task_id.astype(np.int64)
    try:
        return Episode(
            observations=observations,
            actions=as_float32(actions, f"{where}: actions"),
            rewards=arrays["rewards"].astype(np.float64),
            terminations=arrays["terminations"].astype(np.bool_),
            truncations=arrays["truncations"].astype(np.bool_),
            success=success,
            source=attributes.get("source") or labels.source,
            task=attributes.get("task") or labels.task or default_task,
            instruction=instruction,
            seed=attributes.get("seed"),
            iteration=attributes.get("iteration", 0),
            policy_version=attributes.get("policy_version", ""),
            infos=infos,
        )
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _is_pictures(array: np.ndarray) -> bool:
    return array.dtype == np.uint8 and array.ndim == 4 and array.shape[-1] == 3


def _is_grey(array: np.ndarray) -> bool:
    return array.dtype == np.uint8 and (array.ndim == 3 or (array.ndim == 4 and array.shape[-1] == 1))


def _in_colour(array: np.ndarray) -> np.ndarray:
    return np.repeat(array.reshape(*array.shape[:3], 1), 3, axis=3) if _is_grey(array) else array


def _pictures(
    given: Arrays, arrays: Arrays, labels: Labels, render: Render | None, where: str
) -> dict[str, np.ndarray]:
    """Takes the pictures out of ``given`` and names them as ``VLAObservation`` does; a single one is ``image``."""
    keys = list(labels.image_keys) or sorted(key for key, array in given.items() if _is_pictures(array))
    keys = keys or sorted(key for key, array in given.items() if _is_grey(array) and min(array.shape[1:3]) >= 32)
    absent = [key for key in keys if key not in given]
    if absent:
        raise ValueError(f"{where} has no observation '{absent[0]}'; it has {sorted(given)}")
    if not keys:
        if render is None:
            raise ValueError(
                f"{where} has no pictures, only {sorted(given)}; give a function that draws them from these "
                "(--render package.module:function)"
            )
        return {"image": np.ascontiguousarray(render(arrays))}
    single = len(keys) == 1 and not keys[0].startswith("image_")
    names = {"image": keys[0]} if single else camera_names(keys, where)
    return {name: _in_colour(given.pop(key)) for name, key in names.items()}


def _state(given: Arrays, labels: Labels, where: str) -> dict[str, np.ndarray]:
    """Takes the state out of ``given``."""
    keys = list(labels.state_keys)
    if not keys:
        floats = [key for key, array in given.items() if array.dtype.kind == "f" and array.ndim == 2]
        named = [key for key in ("state", "observation") if key in floats]
        keys = named[:1] or (floats if len(floats) == 1 else [])
    absent = [key for key in keys if key not in given]
    if absent:
        raise ValueError(f"{where} has no observation '{absent[0]}'; it has {sorted(given)}")
    if not keys:
        return {}
    parts = [given.pop(key) for key in keys]
    flat = [part.reshape(len(part), -1) for part in parts]
    return {"state": np.concatenate([as_float32(part, f"{where}: state") for part in flat], axis=1)}


def as_float32(array: np.ndarray, name: str) -> np.ndarray:
    """An array of numbers as float32, with a warning if that changes a value."""
    converted = array.astype(np.float32)
    if converted.dtype != array.dtype and not np.array_equal(converted, array, equal_nan=True):
        warnings.warn(
            f"{name.rsplit(':', 1)[-1].strip()} of {array.dtype} were rounded to float32", UserWarning, stacklevel=2
        )
    return converted
