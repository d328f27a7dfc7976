"""Episode stores to and from data sets of Minari (https://minari.farama.org), whose layout they share."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py

from vla_rl.data import minari_arrow
from vla_rl.data.copying import Progress
from vla_rl.data.foreign import Arrays, Labels, Render, flatten, read_attributes
from vla_rl.data.image_formats import image_format, read_images
from vla_rl.data.importing import Found, write_store
from vla_rl.data.layout import PACKED, get_group, list_datasets, metadata_header
from vla_rl.data.minari_spaces import flat_actions, read_space
from vla_rl.data.safety import UnsafeFileError, check_group, check_inside
from vla_rl.data.selection import select
from vla_rl.data.store import EpisodeStore
from vla_rl.data.writing import new_folder, require_space, sync_file

MAX_METADATA_BYTES = 64 << 20


def export_minari(
    store: EpisodeStore,
    out: str | Path,
    *,
    where: str | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Writes a Minari data set that needs no other file: all episodes in one ``data/main_data.hdf5``.

    Images are raw in it (decoded where the store keeps them otherwise) and need Minari 0.5.4 to be read; ``extras``
    stay behind. Below the folder ``MINARI_DATASETS_PATH`` (``~/.minari/datasets``), ``minari.load_dataset`` finds it by
    its path from there. (A store of raw pictures can be read by ``minari.MinariDataset(store.path / "data")`` without
    any export.)

    Args:
        store: open store.
        out: folder to make; its name should end in a version such as ``-v0``.
        where: expression that chooses episodes; see ``select``.
        overwrite: replace the data set at ``out``.
        progress: called after every episode.

    Raises:
        ValueError: if no episode is chosen.
        FileExistsError: if ``out`` exists and ``overwrite`` is False.
    """
    out = Path(out).absolute()
    chosen = select(store.index, where)
    if not chosen:
        raise ValueError(f"no episode of '{store.path}' fits {where!r}; nothing was exported")
    infos = [store.index[i] for i in chosen]
    require_space(out, sum(info.num_bytes for info in infos))
    with new_folder(out, overwrite=overwrite) as folder:
        (folder / "data").mkdir()
        main = folder / "data" / "main_data.hdf5"
        with h5py.File(main, "w", track_order=True) as file:
            for number, index in enumerate(chosen):
                check_inside(store.episode_path(index), store.path)
                with store.open_episode(index) as group:
                    check_group(group)
                    require_space(out, store.decoded_bytes(index))
                    _copy_group(group, file.create_group(f"episode_{number}"), number)
                if progress is not None:
                    progress(number + 1, len(chosen))
        sync_file(main)
        num_task_ids = 1 + max(info.max_task_id for info in infos)
        metadata = metadata_header(out, store.step_shapes, num_task_ids=num_task_ids)
        del metadata["vla_rl_format"], metadata["step_shapes"]
        metadata |= {
            "total_episodes": len(infos),
            "total_steps": sum(info.total_steps for info in infos),
            "dataset_size": round(main.stat().st_size / 1e6, 1),
        }
        (folder / "data" / "metadata.json").write_text(json.dumps(metadata), encoding="utf-8")
    return out


def _copy_group(group: h5py.Group, target: h5py.Group, number: int) -> None:
    for name, value in group.attrs.items():
        target.attrs[name] = value
    target.attrs["id"] = number
    for name in group:
        if name not in ("extras", "frame_ends", "observations"):
            group.copy(name, target)
    observations = target.create_group("observations")
    for key, dataset in list_datasets(get_group(group, "observations")):
        if image_format(dataset) == "raw":
            group.copy(dataset, observations)
        else:
            observations.create_dataset(key, data=read_images(dataset))


def import_minari(
    dataset: str | Path,
    out: str | Path,
    *,
    labels: Labels | None = None,
    render: Render | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> EpisodeStore:
    """Writes a store of the episodes of a Minari data set.

    Pictures are the observations that ``Labels.image_keys`` tells of, raw or JPEG. Data sets without any need
    ``render``, which draws them from the recorded states. Actions of any space that Minari stores become vectors by the
    rule of ``gymnasium.spaces.flatten`` (one-hot for discrete ones), so that ``gymnasium.spaces.unflatten`` gives them
    back; observations keep their numbers and types, under names joined by dots where they are nested. Episodes may lie
    in HDF5, Arrow or Parquet files, which are read without Minari, since it would make the environment that the
    metadata name; links that leave the data set and sizes not backed by data are refused.

    Args:
        dataset: folder of the data set, or the id of one that Minari has downloaded.
        out: folder of the new store.
        labels: what the episodes do not say of themselves: task, instruction, success, and which arrays are the state.
        render: function of an episode's arrays (``{"observations/...", "infos/...", "actions", ...}``) that returns its
            pictures, uint8 ``[T+1, H, W, 3]``; its actions are the vectors.
        overwrite: replace what is at ``out``.
        progress: called after every episode.

    Raises:
        FileNotFoundError: if there is no such data set here.
        UnsafeFileError: if a file is made to leave the data set or to fill the memory.
        ValueError: if task, instruction, success or pictures are neither there nor given, or an array does not fit.
        FileExistsError: if ``out`` exists and ``overwrite`` is False.
    """
    root = _find(dataset)
    metadata = _read_metadata(root)
    return write_store(
        Path(out).absolute(),
        _episodes(root, metadata, labels or Labels()),
        total=metadata["total_episodes"],
        render=render,
        overwrite=overwrite,
        progress=progress,
    )


def _episodes(root: Path, metadata: Mapping[str, Any], labels: Labels) -> Generator[Found]:
    name = str(metadata.get("dataset_id", root.parent.name))
    actions = read_space(metadata, "action_space")
    read = minari_arrow.read_episodes if metadata.get("data_format") in minari_arrow.FORMATS else _read_episodes
    for number, (arrays, attributes) in enumerate(read(root, metadata)):
        where = f"'{root}': 'episode_{number}'"
        yield Found(flat_actions(arrays, actions, where), attributes, labels, name, where)


def _find(dataset: str | Path) -> Path:
    """The folder that holds ``main_data.hdf5``, or else ``metadata.json``."""
    path = Path(dataset)
    datasets = Path(os.environ.get("MINARI_DATASETS_PATH", "~/.minari/datasets")).expanduser()
    inside = not path.is_absolute() and ".." not in path.parts
    folders = (path, path / "data", *([datasets / path / "data"] if inside else []))
    for name in ("main_data.hdf5", "metadata.json"):
        for folder in folders:
            if (folder / name).is_file():
                return folder
    raise FileNotFoundError(
        f"no Minari data set at '{dataset}' nor below '{datasets}'; give its folder, or fetch it first with "
        f"`minari download {dataset}`"
    )


def _read_metadata(root: Path) -> dict[str, Any]:
    path = root / "metadata.json"
    check_inside(path, root)
    if path.stat().st_size > MAX_METADATA_BYTES:
        raise UnsafeFileError(f"'{path}' has more than {MAX_METADATA_BYTES:,} bytes; refused")
    try:
        metadata = json.loads(path.read_text(encoding="utf-8"))
        if metadata.get("data_format") == PACKED:
            raise ValueError(
                "it is an episode store with packed pictures; read it as such, or pack it with --images raw"
            )
        if metadata.get("data_format", "hdf5") not in ("hdf5", *minari_arrow.FORMATS):
            raise ValueError(f"its data_format is {metadata['data_format']!r}, expected hdf5, arrow or parquet")
        if not isinstance(metadata["total_episodes"], int) or metadata["total_episodes"] < 1:
            raise ValueError(f"total_episodes is {metadata['total_episodes']!r}")
        read_space(metadata, "action_space")
        if metadata.get("data_format") in minari_arrow.FORMATS:
            read_space(metadata, "observation_space")
    except (ValueError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(f"'{path}' is not that of a Minari data set: {error}") from error
    return metadata


@contextmanager
def _open_episode(file: h5py.File, number: int, root: Path) -> Iterator[h5py.Group]:
    """The group of one episode, in this file or in the file of the data set that it links to."""
    name = f"episode_{number}"
    link: Any = file.get(name, getlink=True) if name in list(file) else None
    if isinstance(link, h5py.HardLink):
        yield get_group(file, name)
    elif isinstance(link, h5py.ExternalLink):
        target = root / link.filename
        check_inside(target, root)
        inner = link.path.strip("/")
        with h5py.File(target, "r") as other:
            if inner not in list(other) or not isinstance(other.get(inner, getlink=True), h5py.HardLink):
                raise UnsafeFileError(f"'{target}' has no group '{link.path}' of its own; refused")
            yield get_group(other, inner)
    else:
        found = "is a soft link" if link is not None else "is missing"
        raise ValueError(f"'{name}' of '{root / 'main_data.hdf5'}' {found}, though metadata.json counts it")


def _read_episodes(root: Path, metadata: Mapping[str, Any]) -> Iterator[tuple[Arrays, dict[str, Any]]]:
    """Arrays of every episode by path, and what its attributes say."""
    path = root / "main_data.hdf5"
    check_inside(path, root)
    if not path.is_file():
        raise FileNotFoundError(f"'{root}' has no main_data.hdf5; fetch the data set again")
    with h5py.File(path, "r") as file:
        for number in range(metadata["total_episodes"]):
            with _open_episode(file, number, root) as group:
                check_group(group)
                arrays = flatten(group, skip=("extras",))
                yield _without_index(arrays), read_attributes(group.attrs, str(group.name))


def _without_index(arrays: Arrays) -> Arrays:
    """Parts of a tuple under their number, as in Arrow files, where HDF5 has ``_index_<number>``."""
    return {re.sub(r"(?<=[/.])_index_(\d+)(?=\.|$)", r"\1", name): array for name, array in arrays.items()}
