"""New stores out of episodes of other stores, copied as they lie in their files, without decoding a frame."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import h5py

from vla_rl.data.layout import EpisodeInfo, Shapes, episode_path, get_group, write_links, write_records
from vla_rl.data.safety import UnsafeFileError, check_group, check_inside
from vla_rl.data.store import EpisodeStore
from vla_rl.data.writing import copy_file, new_folder, require_space, sync_file

Progress = Callable[[int, int], None]
"""Called with the number of episodes done and the number in all."""


@dataclass(frozen=True)
class Source:
    """One episode to copy.

    Attributes:
        path: its file.
        index: its number there; the file holds the group ``episode_<index>`` and nothing else.
        info: what its store knows of it.
        root: folder of its data set, which links in it must not leave.
        changes: attributes to write anew, such as ``{"task": "drawer-open"}``.
    """

    path: Path
    index: int
    info: EpisodeInfo
    root: Path
    changes: Mapping[str, str] = field(default_factory=dict)


def sources(
    store: EpisodeStore, indices: Sequence[int] | None = None, *, changes: Mapping[str, str] | None = None
) -> list[Source]:
    """Episodes of a store as sources; all of them if ``indices`` is None."""
    chosen, infos = range(len(store)) if indices is None else indices, store.index
    return [Source(*store.locate(i), infos[i], store.path, changes or {}) for i in chosen]


def copy_stores(
    out: str | Path,
    parts: Mapping[str, Sequence[Source]],
    *,
    shapes: Shapes,
    overwrite: bool = False,
    link: bool = False,
    progress: Progress | None = None,
) -> list[EpisodeStore]:
    """Writes one store per part to ``out/<name>``, or to ``out`` itself for the name ``"."``, all of them or none.

    Args:
        out: folder to make.
        parts: episodes of each store, in the order they get there.
        shapes: what a step of these episodes holds.
        overwrite: replace what is at ``out``.
        link: give files that need no change a second name instead of a copy; only for stores never changed by hand.
        progress: called after every episode.

    Returns:
        The new stores, open for reading.

    Raises:
        ValueError: if a part has no episodes.
        UnsafeFileError: if an episode would read other files or claims sizes that it does not hold.
        FileExistsError: if ``out`` exists and ``overwrite`` is False.
        OSError: if it cannot be written; then nothing is left behind.
    """
    empty = [name for name, part in parts.items() if not part]
    if empty or not parts:
        raise ValueError(f"no episodes for '{Path(out) / (empty or ['.'])[0]}', so it was not written; choose others")
    out = Path(out).absolute()
    total = sum(map(len, parts.values()))
    done = 0
    if not link:
        require_space(out, sum(source.info.num_bytes for part in parts.values() for source in part))
    with new_folder(out, overwrite=overwrite) as folder:
        for name, part in parts.items():
            data_dir = folder / name / "data"
            (data_dir / "episodes").mkdir(parents=True)
            infos = []
            for index, source in enumerate(part):
                infos.append(_copy_episode(source, episode_path(data_dir, index), index, link=link))
                done += 1
                if progress is not None:
                    progress(done, total)
            write_links(data_dir, len(infos))
            write_records(data_dir, out / name, infos, shapes)
    return [EpisodeStore(out / name, mode="r") for name in parts]


def _copy_episode(source: Source, target: Path, index: int, *, link: bool) -> EpisodeInfo:
    check_inside(source.path, source.root)
    with h5py.File(source.path, "r") as file:
        if list(file) != [f"episode_{source.index}"]:
            raise UnsafeFileError(f"'{source.path}' holds {list(file)[:3]}, expected 'episode_{source.index}' alone")
        if file.get(f"episode_{source.index}", getclass=True, getlink=True) is not h5py.HardLink:
            raise UnsafeFileError(f"'{source.path}': 'episode_{source.index}' is a link to something else; refused")
        check_group(get_group(file, f"episode_{source.index}"))
    same = index == source.index and not source.changes
    copy_file(source.path, target, link=link and same)
    if not same:
        with h5py.File(target, "r+") as file:
            if index != source.index:
                file.move(f"episode_{source.index}", f"episode_{index}")
            attrs = file[f"episode_{index}"].attrs
            attrs["id"] = index
            for name, value in source.changes.items():
                attrs[name] = value
    sync_file(target)
    return source.info._replace(num_bytes=target.stat().st_size, **source.changes)


def common_shapes(stores: Sequence[EpisodeStore]) -> Shapes:
    """What a step of all these stores holds.

    Raises:
        ValueError: if they differ.
    """
    first, *others = [store for store in stores if len(store)] or stores
    for other in others:
        for key in sorted(first.step_shapes.keys() | other.step_shapes.keys()):
            mine, theirs = first.step_shapes.get(key), other.step_shapes.get(key)
            if mine != theirs:
                raise ValueError(
                    f"'{key}' is {_describe(mine)} per step in '{first.path}' but {_describe(theirs)} in "
                    f"'{other.path}'; only stores recorded with the same settings can be joined"
                )
    return first.step_shapes


def _describe(shape: tuple[str, tuple[int, ...]] | None) -> str:
    return "absent" if shape is None else f"{shape[0]} {list(shape[1])}"
