"""The files of an episode store: one HDF5 file per episode, and the two files that make their folder a Minari dataset.

::

    <root>/data/metadata.json             Minari's metadata and our format marker, replaced whole but for two counters
    <root>/data/main_data.hdf5            episode_<i> -> external link into episodes/; holds no data of its own
    <root>/data/episodes/<i>.hdf5         group episode_<i> in Minari's layout, never changed once it has this name
    <root>/data/episodes.jsonl            one line of attributes per episode, appended: a cache of the files
"""

from __future__ import annotations

import io
import json
import os
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple, cast

import h5py
import numpy as np

from vla_rl.data.episode import Episode
from vla_rl.data.image_formats import LOSSY, ImageFormat, episode_format, is_plain, read_images, write_images
from vla_rl.data.moments import episode_moments, pack_moments
from vla_rl.data.safety import check_group

FORMAT = 1
# Raw (not JPEG) images need a reader that knows "jpeg_encoding"; older ones refuse this version number.
MINARI_VERSION = "0.5.4"
PACKED = "vla_rl-packed"
STEP_ARRAYS = ("actions", "rewards", "terminations", "truncations")

Shapes = dict[str, tuple[str, tuple[int, ...]]]
"""dtype and shape of one step, per observation key and for ``"actions"``."""


class EpisodeInfo(NamedTuple):
    """What is known of a stored episode without opening its arrays."""

    task: str
    success: bool
    source: str
    total_steps: int
    iteration: int
    seed: int | None
    instruction: str
    policy_version: str
    return_: float
    max_task_id: int
    num_bytes: int
    moments: str = ""
    """packed sums of actions and state for ``stats``, see ``vla_rl.data.moments``; empty in older stores"""
    images: str = "raw"
    """how pictures are stored, see ``vla_rl.data.image_formats.episode_format``"""


def episode_path(data_dir: Path, index: int) -> Path:
    """Where episode ``index`` lies."""
    return data_dir / "episodes" / f"{index:06d}.hdf5"


def replace_file(path: Path, content: str) -> None:
    """Writes ``content`` to ``path`` so that a killed process leaves either the old or the new file."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(content)
    os.replace(temporary, path)


def write_episode(
    path: Path, index: int, episode: Episode, *, extras: Mapping[str, np.ndarray], images: ImageFormat = "raw"
) -> EpisodeInfo:
    """Writes one episode file, synced to the disk.

    Arrays lie in one piece, uncompressed, so that a frame is read by its position, and reading it touches only it;
    pictures may be stored in another format.
    """
    with new_hdf5(path, sync=True) as file:
        group = file.create_group(f"episode_{index}")
        _write_attributes(group, index, episode)
        for name in STEP_ARRAYS:
            _write_array(group, name, getattr(episode, name))
        for name, arrays in (("observations", episode.observations), ("infos", episode.infos), ("extras", extras)):
            subgroup = group.create_group(name) if arrays or name != "extras" else group
            for key, array in arrays.items():
                if name == "observations" and key in episode.image_keys:
                    _write_images(group, key, array, images)
                else:
                    _write_array(subgroup, key, array)
        check_group(group)  # what a reader would refuse must not get there
        stored_as = episode_format(group)
    return episode_info(episode, path.stat().st_size, stored_as)


@contextmanager
def new_hdf5(path: Path, *, sync: bool = False) -> Iterator[h5py.File]:
    """Gives an HDF5 file in RAM, which is written under a temporary name and gets this one in one atomic step.

    HDF5 itself never writes to the disk: where that is full, it can crash the process.
    """
    content = io.BytesIO()
    with h5py.File(content, "w") as hdf5:
        yield hdf5
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content.getbuffer())
            file.flush()
            if sync:
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def _write_attributes(group: h5py.Group, index: int, episode: Episode) -> None:
    group.attrs["id"] = index
    group.attrs["total_steps"] = episode.total_steps
    if episode.seed is not None:
        group.attrs["seed"] = episode.seed
    group.attrs["success"] = bool(episode.success)
    for name in ("source", "task", "instruction", "iteration", "policy_version"):
        group.attrs[name] = getattr(episode, name)


def _write_array(group: h5py.Group, key: str, array: np.ndarray) -> None:
    group.create_dataset(key, data=array).attrs["crc32"] = checksum(array)


def _write_images(group: h5py.Group, key: str, array: np.ndarray, images: ImageFormat) -> None:
    dataset = write_images(group, key, array, images)
    if "encoding" in dataset.attrs:
        dataset.attrs["stored_crc32"] = checksum(dataset[()])
    # That of the pictures that a reader gets: features computed from them are known by it.
    dataset.attrs["crc32"] = checksum(read_images(dataset) if images in LOSSY else array)


def checksum(array: np.ndarray) -> np.uint32:
    """CRC-32 of an array's bytes, in C order; what the attribute ``crc32`` of a stored array should be."""
    return np.uint32(zlib.crc32(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data))


def episode_info(episode: Episode, num_bytes: int, images: str) -> EpisodeInfo:
    """The index entry of an episode whose file has ``num_bytes``, with pictures stored as ``images``."""
    return EpisodeInfo(
        task=episode.task,
        success=bool(episode.success),
        source=episode.source,
        total_steps=episode.total_steps,
        iteration=int(episode.iteration),
        seed=None if episode.seed is None else int(episode.seed),
        instruction=episode.instruction,
        policy_version=episode.policy_version,
        return_=episode.return_,
        max_task_id=int(episode.observations["task_id"].max()),
        num_bytes=num_bytes,
        moments=pack_moments(episode_moments(episode.actions, episode.observations.get("state"))),
        images=images,
    )


def read_episode(group: h5py.Group) -> Episode:
    """Reads a whole episode from its group."""
    attrs: Any = group.attrs
    return Episode(
        observations=read_arrays(get_group(group, "observations")),
        **{name: get_dataset(group, name)[()] for name in STEP_ARRAYS},
        success=bool(attrs["success"]),
        source=attrs["source"],
        task=attrs["task"],
        instruction=attrs["instruction"],
        seed=int(attrs["seed"]) if "seed" in attrs else None,
        iteration=int(attrs["iteration"]),
        policy_version=attrs["policy_version"],
        infos=read_arrays(get_group(group, "infos")),
    )


@contextmanager
def whole_episode(path: Path) -> Iterator[None]:
    """Says which file it is where the body finds that parts of an episode are missing or of another kind.

    Raises:
        ValueError: in place of what h5py and NumPy raise.
    """
    try:
        yield
    except (KeyError, TypeError, AttributeError, RuntimeError, OSError, UnicodeDecodeError) as error:
        told = " ".join(str(error).split())[:120]
        raise ValueError(f"'{path}' holds no whole episode ({told}); restore it from a copy") from error


def get_group(parent: h5py.Group, name: str) -> h5py.Group:
    """The group of that name; KeyError if there is none."""
    return cast("h5py.Group", parent[name])


def list_datasets(group: h5py.Group) -> list[tuple[str, h5py.Dataset]]:
    """Names and datasets of a group that holds nothing else."""
    return cast("list[tuple[str, h5py.Dataset]]", list(group.items()))


def get_dataset(parent: h5py.Group, name: str) -> h5py.Dataset:
    """The dataset of that name; KeyError if there is none."""
    return cast("h5py.Dataset", parent[name])


def read_arrays(group: h5py.Group) -> dict[str, np.ndarray]:
    """All arrays of a group, by name."""
    return {key: read_images(dataset) for key, dataset in list_datasets(group)}


def write_links(data_dir: Path, count: int) -> None:
    """Replaces ``main_data.hdf5`` by one whose ``episode_0 .. episode_<count - 1>`` link to the episode files."""
    with new_hdf5(data_dir / "main_data.hdf5") as file:
        for index in range(count):
            target = episode_path(data_dir, index).relative_to(data_dir).as_posix()
            file[f"episode_{index}"] = h5py.ExternalLink(target, f"/episode_{index}")


def write_records(data_dir: Path, root: Path, infos: Sequence[EpisodeInfo], shapes: Shapes) -> None:
    """Writes ``episodes.jsonl`` and ``metadata.json`` for episode files that are there; the store will lie at ``root``.

    The index comes first, so that a folder with ``metadata.json`` is whole.
    """
    replace_file(data_dir / "episodes.jsonl", "".join(json.dumps(info._asdict()) + "\n" for info in infos))
    num_task_ids = 1 + max((info.max_task_id for info in infos), default=0)
    plain = all(is_plain(info.images) for info in infos)
    header = metadata_header(root, shapes, num_task_ids=num_task_ids, plain=plain)
    totals = metadata_totals(len(infos), sum(info.total_steps for info in infos))
    replace_file(data_dir / "metadata.json", totals + json.dumps(header)[1:])


def count_links(data_dir: Path) -> int:
    """Number of links in ``main_data.hdf5``; 0 if it is missing or unreadable, for it can be written anew."""
    try:
        with h5py.File(data_dir / "main_data.hdf5", "r") as file:
            return len(file)
    except OSError:
        return 0


def step_shapes(episode: Episode) -> Shapes:
    """Dtype and shape of one step of every observation and of the action."""
    arrays = {**episode.observations, "actions": episode.actions}
    return {key: (array.dtype.name, array.shape[1:]) for key, array in arrays.items()}


def metadata_header(root: Path, shapes: Shapes | None, *, num_task_ids: int, plain: bool = True) -> dict[str, Any]:
    """The part of ``metadata.json`` that rarely changes.

    Spaces are unbounded boxes, except for images and ``task_id`` (``Discrete(num_task_ids)``). They are missing until
    the first episode is stored, and Minari cannot read a dataset that has none, nor one with encoded pictures: where
    not all are ``plain``, the format of the data is one that it refuses.
    """
    header: dict[str, Any] = {
        "vla_rl_format": FORMAT,
        "dataset_id": _dataset_id(root),
        "minari_version": MINARI_VERSION,
        "data_format": "hdf5" if plain else PACKED,
        "jpeg_encoding": False,
    }
    if shapes is not None:
        observation_keys = sorted(shapes.keys() - {"actions"})
        subspaces = {key: _space(key, *shapes[key], num_task_ids=num_task_ids) for key in observation_keys}
        header["step_shapes"] = {key: [dtype, list(shape)] for key, (dtype, shape) in sorted(shapes.items())}
        header["observation_space"] = json.dumps({"type": "Dict", "subspaces": subspaces})
        header["action_space"] = json.dumps(_space("actions", *shapes["actions"], num_task_ids=num_task_ids))
    return header


def _dataset_id(root: Path) -> str:
    """A name that Minari accepts: the path below its folder of datasets, else the folder's name; with a version."""
    datasets = Path(os.environ.get("MINARI_DATASETS_PATH", "~/.minari/datasets")).expanduser().resolve()
    name = root.relative_to(datasets).as_posix() if datasets in root.parents else root.name
    name = re.sub(r"[^-/\w]", "_", name) or "episodes"
    return name if re.search(r"-v\d+$", name) else f"{name}-v0"


def metadata_totals(total_episodes: int, total_steps: int) -> str:
    """The opening of ``metadata.json``, of fixed length, so that it can be overwritten in place.

    It is far shorter than a memory page, so a killed process leaves either the old or the new numbers.
    """
    return f'{{"total_episodes": {total_episodes:12d}, "total_steps": {total_steps:16d}, '


def _space(key: str, dtype: str, shape: tuple[int, ...], *, num_task_ids: int) -> dict[str, Any]:
    """A Gymnasium space as Minari serialises it."""
    if key == "task_id":
        return {"type": "Discrete", "dtype": "int64", "start": 0, "n": num_task_ids}
    kind = np.dtype(dtype).kind
    if kind == "f":
        low, high = -np.inf, np.inf
    elif kind == "b":
        low, high = 0, 1
    else:
        low, high = np.iinfo(dtype).min, np.iinfo(dtype).max
    bounds = {"low": np.full(shape, low, dtype).tolist(), "high": np.full(shape, high, dtype).tolist()}
    return {"type": "Box", "dtype": dtype, "shape": list(shape), **bounds}
