"""One episode file under the magnifying glass: is it whole, is it safe, and does it mean what it says."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import h5py
import numpy as np

from vla_rl.data.episode import Episode
from vla_rl.data.image_formats import episode_format
from vla_rl.data.layout import (
    STEP_ARRAYS,
    EpisodeInfo,
    Shapes,
    checksum,
    episode_info,
    get_dataset,
    get_group,
    read_arrays,
    read_episode,
    step_shapes,
)
from vla_rl.data.safety import check_group, check_inside


@dataclass(frozen=True)
class Finding:
    """Something to know about a file.

    Attributes:
        severity: ``"error"`` where data are missing, damaged or contradict themselves; ``"warning"`` where they look
            odd but can be meant so.
        file: its name, relative to the store.
        message: what is the matter.
    """

    severity: Literal["error", "warning"]
    file: str
    message: str


@dataclass
class Examination:
    """What one episode file turned out to be.

    Attributes:
        number: of the group ``episode_<number>`` in it, or None if there is no such group.
        info: its index entry, or None if it is not a whole episode.
        shapes: of its steps, or None.
        checksums: number of arrays whose checksum is right.
        arrays: number of arrays.
        damaged: whether it is no whole episode, or an array has changed since its checksum was taken.
        findings: what is wrong or odd.
    """

    number: int | None = None
    info: EpisodeInfo | None = None
    shapes: Shapes | None = None
    checksums: int = 0
    arrays: int = 0
    damaged: bool = False
    findings: list[Finding] = field(default_factory=list)


def examine_episode(path: Path, root: Path) -> Examination:
    """Reads a whole episode file and judges it; never raises for what the file holds.

    Args:
        path: the file.
        root: folder of the store, which links must not leave.
    """
    result = Examination()
    name = path.relative_to(root).as_posix() if path.is_relative_to(root) else str(path)
    try:
        check_inside(path, root)
        with h5py.File(path, "r") as file:
            _examine(file, path, result, name)
    except (OSError, RuntimeError, ValueError, KeyError, TypeError, AttributeError, MemoryError) as error:
        # h5py raises any of these for damaged files, and Episode says with a ValueError what is wrong with an array.
        result.info, result.damaged = None, True
        text = " ".join(str(error.args[0] if isinstance(error, KeyError) and error.args else error).split())
        result.findings.append(Finding("error", name, f"no whole episode: {text[:300] or type(error).__name__}"))
    return result


def _examine(file: h5py.File, path: Path, result: Examination, name: str) -> None:
    members = list(file)[:3]
    match = re.fullmatch(r"episode_(\d{1,18})", members[0]) if len(members) == 1 else None
    if match is None or file.get(members[0], getclass=True, getlink=True) is not h5py.HardLink:
        raise ValueError(f"it holds {members}, expected one group 'episode_<number>'")
    result.number = int(match[1])
    group = get_group(file, members[0])
    check_group(group)
    attrs: Any = group.attrs
    for key, kind in (("task", str), ("source", str), ("instruction", str), ("success", (bool, np.bool_))):
        if not isinstance(attrs[key], kind):
            raise ValueError(f"its attribute '{key}' is {attrs[key]!r}, which is of the wrong type")
    episode = read_episode(group)
    errors = _contradictions(group, episode) + _wrong_checksums(group, episode, result)
    result.findings += [Finding("error", name, message) for message in errors]
    result.findings += [Finding("warning", name, message) for message in _oddities(episode)]
    result.info = episode_info(episode, path.stat().st_size, episode_format(group))
    result.shapes = step_shapes(episode)


def _contradictions(group: h5py.Group, episode: Episode) -> list[str]:
    attrs: Any = group.attrs
    found = []
    if int(attrs["total_steps"]) != episode.total_steps:
        found.append(
            f"the attribute total_steps is {attrs['total_steps']}, but there are {episode.total_steps} actions"
        )
    if group.name != f"/episode_{int(attrs['id'])}":
        found.append(f"the attribute id is {attrs['id']} in the group '{group.name}'")
    solved = episode.infos.get("success")
    if solved is not None and bool(np.any(solved)) != episode.success:
        when = f"true at step {int(np.argmax(solved != 0))}" if np.any(solved) else "never true"
        found.append(f"success is {episode.success}, but infos/success is {when}")
    for key in episode.image_keys:
        images = get_dataset(group, f"observations/{key}")
        if "encoding" not in images.attrs and images.chunks not in (None, (1, *images.shape[1:])):
            found.append(f"'{key}' has several frames per chunk, so samplers cannot read single frames of it")
    return found


def _wrong_checksums(group: h5py.Group, episode: Episode, result: Examination) -> list[str]:
    read = {name: getattr(episode, name) for name in STEP_ARRAYS}
    read |= {f"observations/{key}": value for key, value in episode.observations.items()}
    read |= {f"infos/{key}": value for key, value in episode.infos.items()}
    if "extras" in group:
        read |= {f"extras/{key}": value for key, value in read_arrays(get_group(group, "extras")).items()}
    found = []
    for key, array in read.items():
        dataset = get_dataset(group, key)
        expected: Any = dataset.attrs.get("crc32")
        if "encoding" in dataset.attrs:  # another decoder may give other pixels; the bytes are what was stored
            expected, array = dataset.attrs.get("stored_crc32"), dataset[()]
        result.arrays += 1
        if expected is not None and int(expected) != int(checksum(array)):
            found.append(f"'{key}' has checksum {checksum(array):08x}, expected {int(expected):08x}: its data changed")
            result.damaged = True
        elif expected is not None:
            result.checksums += 1
    return found


def _oddities(episode: Episode) -> list[str]:
    found = []
    largest = float(np.abs(episode.actions).max(initial=0))
    if largest > 1:
        found.append(f"actions reach {largest:.3g}, outside [-1, 1]")
    ended = np.flatnonzero(episode.terminations[:-1] | episode.truncations[:-1])
    if len(ended):
        found.append(f"it ends at step {ended[0]} but goes on to step {episode.total_steps - 1}")
    for key, value in [*episode.observations.items(), *episode.infos.items()]:
        if value.dtype.kind == "f" and not np.isfinite(value).all():
            found.append(f"'{key}' holds NaN or infinite values")
    for key in episode.image_keys:
        image = episode.observations[key]
        if image.size and image.min() == image.max():
            found.append(f"'{key}' is all of one colour")
    return found
