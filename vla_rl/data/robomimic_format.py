"""Episode stores to and from the HDF5 files of robomimic (https://robomimic.github.io)."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Generator
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from vla_rl.data.copying import Progress
from vla_rl.data.foreign import Labels, Render, flatten, read_attributes
from vla_rl.data.image_formats import image_format, image_shape, read_images
from vla_rl.data.importing import Found, write_store
from vla_rl.data.layout import get_dataset, get_group, list_datasets
from vla_rl.data.safety import check_group
from vla_rl.data.selection import select
from vla_rl.data.store import EpisodeStore
from vla_rl.data.writing import new_file, require_space

_ATTRIBUTES = ("success", "source", "task", "instruction", "iteration", "policy_version", "seed")


def export_robomimic(
    store: EpisodeStore,
    out: str | Path,
    *,
    env_name: str = "vla_rl",
    materialize: bool = False,
    where: str | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Writes a robomimic file, by default a small one whose arrays are views of the store's (HDF5 virtual datasets).

    Such a view finds the store at its place relative to the file, and has no data once one of them moved. ``obs`` and
    ``next_obs`` are both views of the same ``T + 1`` observations; ``dones`` is termination or truncation.

    Args:
        store: open store.
        out: file to write, ``.hdf5``.
        env_name: name for ``env_args``, which robomimic requires; no environment is made from it here.
        materialize: copy the data, so that the file stands alone; images of ``next_obs`` then take space of their own.
        where: expression that chooses episodes; see ``select``.
        overwrite: replace the file at ``out``.
        progress: called after every episode.

    Raises:
        ValueError: if no episode is chosen, or pictures that are not stored raw were to be viewed.
        FileExistsError: if ``out`` exists and ``overwrite`` is False.
    """
    out = Path(out).absolute()
    chosen = select(store.index, where)
    if not chosen:
        raise ValueError(f"no episode of '{store.path}' fits {where!r}; nothing was exported")
    if materialize:
        require_space(out, 2 * sum(store.index[i].num_bytes for i in chosen))
    masks: dict[str, list[str]] = {}
    with new_file(out, overwrite=overwrite) as temporary, h5py.File(temporary, "w") as file:
        data = file.create_group("data")
        for number, index in enumerate(chosen):
            demo = data.create_group(f"demo_{number}")
            relative = os.path.relpath(store.episode_path(index), out.parent.resolve())
            with store.open_episode(index) as group:
                check_group(group)
                require_space(out, 2 * store.decoded_bytes(index) if materialize else 0)
                _write_demo(group, demo, None if materialize else relative)
            masks.setdefault(store.index[index].task, []).append(f"demo_{number}")
            if progress is not None:
                progress(number + 1, len(chosen))
        data.attrs["total"] = sum(store.index[i].total_steps for i in chosen)
        data.attrs["env_args"] = json.dumps({"env_name": env_name, "type": 2, "env_kwargs": {}})
        mask = file.create_group("mask")
        for task, demos in masks.items():
            name = re.sub(r"[/\0]|^\.$", "_", task)  # what HDF5 does not take
            while name in mask:
                name += "_"
            mask.create_dataset(name, data=np.array(demos, dtype="S"))
    return out


def _write_demo(group: h5py.Group, demo: h5py.Group, view_of: str | None) -> None:
    steps = get_dataset(group, "actions").shape[0]
    demo.attrs["num_samples"] = steps
    for name in _ATTRIBUTES:
        if name in group.attrs:
            demo.attrs[name] = group.attrs[name]
    parts = [("actions", get_dataset(group, "actions"), 0), ("rewards", get_dataset(group, "rewards"), 0)]
    for key, dataset in list_datasets(get_group(group, "observations")):
        parts += [(f"obs/{key}", dataset, 0), (f"next_obs/{key}", dataset, 1)]
    for name, dataset, first in parts:
        shape = (steps, *image_shape(dataset)[1:])
        if view_of is None:
            chunks = (1, *shape[1:]) if len(shape) == 4 else None
            demo.create_dataset(name, data=read_images(dataset, slice(first, first + steps)), chunks=chunks)
        elif image_format(dataset) != "raw":
            raise ValueError(
                f"'{dataset.name}' of '{dataset.file.filename}' is stored as {image_format(dataset)}, which a view "
                "does not decode; export with --materialize, or pack the store with --images raw first"
            )
        else:
            layout = h5py.VirtualLayout(shape=shape, dtype=dataset.dtype)
            # HDF5 takes a % in either name for the beginning of a format.
            file, path = view_of.replace("%", "%%"), str(dataset.name).replace("%", "%%")
            layout[...] = h5py.VirtualSource(file, path, shape=dataset.shape)[first : first + steps]
            demo.create_virtual_dataset(name, layout)
    ended = get_dataset(group, "terminations")[()] | get_dataset(group, "truncations")[()]
    demo.create_dataset("dones", data=ended.astype(np.int64))


def import_robomimic(
    path: str | Path,
    out: str | Path,
    *,
    labels: Labels | None = None,
    render: Render | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> EpisodeStore:
    """Writes a store of the demonstrations in a robomimic file.

    The last observation is the last of ``next_obs``, or, where a file has none, that of ``obs`` again. A final
    ``dones`` becomes a termination; without it the episode is truncated there. Where nothing tells success, a
    demonstration with a positive reward counts as one.

    Args:
        path: the file.
        out: folder of the new store.
        labels: what the demonstrations do not say of themselves; see ``Labels``.
        render: draws the pictures where a file has states only.
        overwrite: replace what is at ``out``.
        progress: called after every episode.

    Raises:
        UnsafeFileError: if the file has links or views to other files, or claims sizes that it does not hold.
        ValueError: if something is missing or does not fit.
        FileExistsError: if ``out`` exists and ``overwrite`` is False.
    """
    path, given = Path(path), labels or Labels()
    names = _demo_names(path)

    def episodes() -> Generator[Found]:
        with h5py.File(path, "r") as file:
            data = get_group(file, "data")
            for name in names:
                if not isinstance(data.get(name, getlink=True), h5py.HardLink):
                    raise ValueError(f"'{path}': 'data/{name}' is a link to something else; refused")
                demo = get_group(data, name)
                check_group(demo)
                where = f"'{path}': 'data/{name}'"
                arrays = _as_minari(flatten(demo, skip=("demo",)), where)
                yield Found(arrays, _with_success(demo, given), given, path.stem, where)

    return write_store(
        Path(out).absolute(), episodes(), total=len(names), render=render, overwrite=overwrite, progress=progress
    )


def _demo_names(path: Path) -> list[str]:
    """The groups ``demo_0``, ``demo_1`` ... of a file, in order of their numbers."""
    with h5py.File(path, "r") as file:
        if not isinstance(file.get("data", getlink=True), h5py.HardLink):
            raise ValueError(f"'{path}' has no group 'data', so it is not of robomimic")
        demos = [name for name in map(str, get_group(file, "data")) if re.fullmatch(r"demo_\d{1,9}", name)]
    if not demos:
        raise ValueError(f"'{path}' has no 'data/demo_<number>', so it is not of robomimic")
    return sorted(demos, key=lambda name: int(name[5:]))


def _with_success(demo: h5py.Group, labels: Labels) -> dict[str, Any]:
    attributes = read_attributes(demo.attrs, str(demo.name))
    if "success" not in attributes and labels.success is None and "rewards" in demo:
        attributes["success"] = bool((get_dataset(demo, "rewards")[()] > 0).any())
    return attributes


def _as_minari(arrays: dict[str, np.ndarray], where: str) -> dict[str, np.ndarray]:
    for key in ("actions", "dones"):
        if key not in arrays or not arrays[key].ndim or not len(arrays[key]):
            raise ValueError(f"{where} has no '{key}', so it is not a demonstration")
    steps = len(arrays["actions"])
    result = {key: arrays[key] for key in ("actions", "rewards") if key in arrays}
    for key, array in arrays.items():
        if key.startswith("obs/"):
            following = arrays.get("next_" + key)
            last = array[-1:] if following is None else following[-1:]
            result["observations/" + key.removeprefix("obs/")] = np.concatenate([array, last])
        elif key == "states":
            result["infos/states"] = np.concatenate([array, array[-1:]])
    last = np.arange(steps) == steps - 1
    result["terminations"] = last & (arrays["dones"] != 0)
    result["truncations"] = last & (arrays["dones"] == 0)
    return result
