"""Stores joined, divided, filtered, relabelled and sampled: always into a new store, frames copied as they are."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from vla_rl.data.copying import Progress, common_shapes, copy_stores, sources
from vla_rl.data.selection import balanced_sample, by_task, select, split_by_fraction
from vla_rl.data.store import EpisodeStore

StorePath = str | Path


def merge(
    stores: Sequence[StorePath], out: StorePath, *, overwrite: bool = False, progress: Progress | None = None
) -> EpisodeStore:
    """One store of all episodes of several, in the order given.

    Raises:
        ValueError: if their observations or actions differ, or none holds an episode.
        FileExistsError: if ``out`` exists and ``overwrite`` is False.
    """
    opened = [EpisodeStore(path, mode="r") for path in stores]
    if not opened:
        raise ValueError("no stores to merge; give at least one")
    part = [source for store in opened for source in sources(store)]
    shapes = common_shapes(opened)
    return copy_stores(out, {".": part}, shapes=shapes, overwrite=overwrite, progress=progress)[0]


def split(
    store: StorePath,
    out: StorePath,
    *,
    fraction: float | None = None,
    names: tuple[str, str] = ("train", "val"),
    seed: int = 0,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> list[EpisodeStore]:
    """Divides a store into ``out/train`` and ``out/val``, or into one store per task.

    Args:
        store: what to divide.
        out: new folder for the parts.
        fraction: share of every task's episodes that goes into the first part, drawn at random; None makes one store
            per task instead, ``out/<task>``.
        names: folders of the two parts.
        seed: of the draw.
        overwrite: replace what is at ``out``.
        progress: called after every episode.

    Raises:
        ValueError: if a part would be empty, or two tasks would share a folder.
        FileExistsError: if ``out`` exists and ``overwrite`` is False.
    """
    opened = EpisodeStore(store, mode="r")
    if fraction is not None:
        for name in names:
            _check_name(name)
        if names[0] == names[1]:
            raise ValueError(f"both parts would go to '{names[0]}'; give two names")
        chosen = dict(zip(names, split_by_fraction(opened.index, fraction, seed=seed), strict=True))
    else:
        chosen = {}
        for task, indices in sorted(by_task(opened.index).items()):
            name = re.sub(r"[^\w.-]", "_", task).lstrip(".") or "_"
            if name in chosen:
                raise ValueError(f"task {task!r} and another one would both go to '{name}'; relabel one of them first")
            chosen[name] = indices
    parts = {name: sources(opened, indices) for name, indices in chosen.items()}
    return copy_stores(out, parts, shapes=opened.step_shapes, overwrite=overwrite, progress=progress)


def _check_name(name: str) -> None:
    if not re.fullmatch(r"[\w-][\w.-]*", name):
        raise ValueError(f"a part cannot be called {name!r}; use letters, digits, '-', '_' and '.'")


def filter_episodes(
    store: StorePath, out: StorePath, *, where: str, overwrite: bool = False, progress: Progress | None = None
) -> EpisodeStore:
    """A store of the episodes for which an expression holds; see ``vla_rl.data.select``.

    Raises:
        ValueError: if the expression is not understood or holds for no episode.
        FileExistsError: if ``out`` exists and ``overwrite`` is False.
    """
    opened = EpisodeStore(store, mode="r")
    part = sources(opened, _some(opened, where))
    return copy_stores(out, {".": part}, shapes=opened.step_shapes, overwrite=overwrite, progress=progress)[0]


def relabel(
    store: StorePath,
    out: StorePath,
    *,
    task: str | None = None,
    instruction: str | None = None,
    source: str | None = None,
    where: str | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> EpisodeStore:
    """A copy of a store with another task, instruction or source for the episodes that ``where`` selects.

    The others are copied as they are.

    Raises:
        ValueError: if nothing is to change, a name is empty, or ``where`` is not understood or holds for no episode.
        FileExistsError: if ``out`` exists and ``overwrite`` is False.
    """
    given = {"task": task, "instruction": instruction, "source": source}
    changes = {name: value for name, value in given.items() if value is not None}
    if not changes:
        raise ValueError("nothing to relabel; give a task, an instruction or a source")
    if "" in (task, source):
        raise ValueError("task and source must be names, got an empty one")
    opened = EpisodeStore(store, mode="r")
    chosen = set(_some(opened, where))
    part = [one for i in range(len(opened)) for one in sources(opened, [i], changes=changes if i in chosen else None)]
    return copy_stores(out, {".": part}, shapes=opened.step_shapes, overwrite=overwrite, progress=progress)[0]


def sample(
    store: StorePath,
    out: StorePath,
    number: int,
    *,
    seed: int = 0,
    where: str | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> EpisodeStore:
    """A store of ``number`` episodes, drawn as evenly over the tasks as they allow; the same seed draws the same ones.

    Raises:
        ValueError: if there are fewer, or ``where`` is not understood.
        FileExistsError: if ``out`` exists and ``overwrite`` is False.
    """
    opened = EpisodeStore(store, mode="r")
    candidates = select(opened.index, where)
    chosen = balanced_sample([opened.index[i] for i in candidates], number, seed=seed)
    part = sources(opened, [candidates[k] for k in chosen])
    return copy_stores(out, {".": part}, shapes=opened.step_shapes, overwrite=overwrite, progress=progress)[0]


def _some(store: EpisodeStore, where: str | None) -> list[int]:
    chosen = select(store.index, where)
    if not chosen:
        raise ValueError(f"no episode of '{store.path}' fits {where!r}; `vla-rl data info` shows what it holds")
    return chosen
