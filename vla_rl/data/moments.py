"""What actions, states, lengths and returns of the episodes look like, task by task."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np

from vla_rl.data.copying import Progress
from vla_rl.data.layout import get_dataset, get_group
from vla_rl.data.safety import check_group
from vla_rl.data.selection import by_task, select
from vla_rl.data.store import EpisodeStore

CACHE = "moments.hdf5"
_ROWS = ("mean", "squares", "minimum", "maximum")


@dataclass(frozen=True)
class ArrayStatistics:
    """Mean, population standard deviation, smallest and largest value per dimension over steps, float64 ``[D]``."""

    mean: np.ndarray
    std: np.ndarray
    minimum: np.ndarray
    maximum: np.ndarray


@dataclass(frozen=True)
class TaskStatistics:
    """The episodes of one task.

    Attributes:
        task: its name.
        episodes: number of episodes.
        steps: number of steps.
        success_rate: share of the episodes that solved it.
        lengths: smallest, median and largest number of steps of an episode.
        returns: smallest, mean and largest undiscounted return.
        actions: over all steps.
        state: over all steps, without the observation after the last action; None if there are no states.
    """

    task: str
    episodes: int
    steps: int
    success_rate: float
    lengths: tuple[int, float, int]
    returns: tuple[float, float, float]
    actions: ArrayStatistics
    state: ArrayStatistics | None


def stats(store: EpisodeStore, *, where: str | None = None, progress: Progress | None = None) -> list[TaskStatistics]:
    """Statistics per task, sorted by name.

    Sums of every episode are kept in ``data/moments.hdf5`` beside the store, if that can be written, so that only
    episodes that were never counted are opened. A row counts as long as its file has the size and time it had then.

    Args:
        store: open store.
        where: expression that chooses episodes; see ``select``.
        progress: called after every episode opened.

    Raises:
        ValueError: if no episode is chosen, or one is damaged.
    """
    chosen = select(store.index, where)
    if not chosen:
        raise ValueError(f"no episode of '{store.path}' fits {where!r}; `vla-rl data info` shows what it holds")
    tables = _tables(store, chosen, progress)
    infos = store.index
    result = []
    for task, members in sorted(by_task([infos[i] for i in chosen]).items()):
        episodes = [infos[chosen[k]] for k in members]
        rows = np.array([chosen[k] for k in members])
        lengths = np.array([info.total_steps for info in episodes])
        returns = np.array([info.return_ for info in episodes])
        arrays = {key: _merge(table[rows], lengths) for key, table in tables.items()}
        result.append(
            TaskStatistics(
                task=task,
                episodes=len(episodes),
                steps=int(lengths.sum()),
                success_rate=float(np.mean([info.success for info in episodes])),
                lengths=(int(lengths.min()), float(np.median(lengths)), int(lengths.max())),
                returns=(float(returns.min()), float(returns.mean()), float(returns.max())),
                actions=arrays["actions"],
                state=arrays.get("observations/state"),
            )
        )
    return result


def _merge(rows: np.ndarray, lengths: np.ndarray) -> ArrayStatistics:
    """Joins moments of episodes, ``[E, 4, D]`` (Chan, Golub, LeVeque 1979)."""
    means, squares = rows[:, 0], rows[:, 1]
    weights = lengths[:, None] / lengths.sum()
    mean = (weights * means).sum(axis=0)
    variance = squares.sum(axis=0) / lengths.sum() + (weights * (means - mean) ** 2).sum(axis=0)
    return ArrayStatistics(mean, np.sqrt(variance), rows[:, 2].min(axis=0), rows[:, 3].max(axis=0))


def _tables(store: EpisodeStore, chosen: Sequence[int], progress: Progress | None) -> dict[str, np.ndarray]:
    """Moments of all episodes, ``[E, 4, D]`` per array; those of episodes not chosen may be NaN."""
    keys = {"actions": store.step_shapes["actions"][1]}
    if "state" in store.step_shapes:
        keys["observations/state"] = store.step_shapes["state"][1]
    stamps = _stamps(store)
    tables = {key: np.full((len(store), len(_ROWS), *shape), np.nan) for key, shape in keys.items()}
    known = np.zeros(len(store), dtype=bool)
    path = store.path / "data" / CACHE
    with suppress(OSError, RuntimeError, KeyError, ValueError, TypeError):
        known = _read_cache(path, stamps, tables)
    todo = [index for index in chosen if not known[index]]
    for done, index in enumerate(todo, 1):
        with store.open_episode(index) as group:
            for key, table in tables.items():
                dataset = get_dataset(group, key)
                steps = store.index[index].total_steps
                if dataset.shape[1:] != table.shape[2:] or not steps <= dataset.shape[0] <= steps + 1:
                    raise ValueError(f"'{store.episode_path(index)}': '{key}' has shape {dataset.shape}; see verify")
                values = dataset[:steps].astype(np.float64)
                mean = values.mean(axis=0)
                table[index] = mean, ((values - mean) ** 2).sum(axis=0), values.min(axis=0), values.max(axis=0)
        known[index] = True
        if progress is not None:
            progress(done, len(todo))
    if todo:
        with suppress(OSError, RuntimeError):  # the cache is a convenience; the store may be read-only
            _write_cache(path, stamps, tables, known)
    return tables


def _stamps(store: EpisodeStore) -> np.ndarray:
    """Size and time of change of every episode file, int64 ``[E, 2]``."""
    with os.scandir(store.path / "data" / "episodes") as entries:
        found = {entry.name: entry.stat() for entry in entries}
    files = [found[store.episode_path(index).name] for index in range(len(store))]
    return np.array([(file.st_size, file.st_mtime_ns) for file in files], dtype=np.int64).reshape(-1, 2)


def _read_cache(path: Path, stamps: np.ndarray, tables: dict[str, np.ndarray]) -> np.ndarray:
    """Fills in what the cache knows of the present files; returns which rows those are."""
    known = np.zeros(len(stamps), dtype=bool)
    with h5py.File(path, "r") as file:
        check_group(get_group(file, "/"))
        stored = get_dataset(file, "stamps")[()]
        count = min(len(stored), len(stamps))
        fitting = (stored[:count] == stamps[:count]).all(axis=1)
        rows = {key: get_dataset(file, key)[:count] for key in tables}
        if any(rows[key].shape != (count, *table.shape[1:]) for key, table in tables.items()):
            return known
        for key, table in tables.items():
            table[:count][fitting] = rows[key][fitting]
        known[:count] = fitting
    return known


def _write_cache(path: Path, stamps: np.ndarray, tables: dict[str, np.ndarray], known: np.ndarray) -> None:
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with h5py.File(temporary, "w") as file:
            file["stamps"] = np.where(known[:, None], stamps, -1)
            for key, table in tables.items():
                file[key] = table
        os.replace(temporary, path)
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
