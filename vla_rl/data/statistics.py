"""Numbers that describe stored episodes: means and deviations for normalisation, and what each task looks like."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from vla_rl.data.copying import Progress
from vla_rl.data.layout import get_dataset
from vla_rl.data.moments import episode_moments, merge_moments, unpack_moments
from vla_rl.data.selection import by_task, select
from vla_rl.data.store import EpisodeStore, require_stores

STD_FLOOR = 1e-3


@dataclass(frozen=True)
class Statistics:
    """Mean and standard deviation of actions and states, over steps.

    Deviations are of the population (not ``n - 1``) and at least ``STD_FLOOR = 1e-3``, so that a dimension that never
    moves in the data normalises to about 0 instead of dividing by zero.

    Attributes:
        action_mean: float32 ``[A]``.
        action_std: float32 ``[A]``.
        state_mean: float32 ``[S]``, or None if the episodes have no state.
        state_std: float32 ``[S]``, or None.
        num_steps: number of steps counted; the observation after the last action is not.
        num_episodes: number of episodes counted.
    """

    action_mean: np.ndarray
    action_std: np.ndarray
    state_mean: np.ndarray | None
    state_std: np.ndarray | None
    num_steps: int
    num_episodes: int


@dataclass(frozen=True)
class TaskSummary:
    """What a store holds of one task from one source.

    Attributes:
        task: name of the task.
        source: who acted.
        episodes: number of episodes.
        steps: number of steps in all.
        success_rate: share of episodes that solved the task.
        mean_length: steps per episode.
    """

    task: str
    source: str
    episodes: int
    steps: int
    success_rate: float
    mean_length: float


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


def compute_statistics(stores: Sequence[EpisodeStore]) -> Statistics:
    """Statistics over all steps of all stores; opens no episode whose index entry has its moments.

    Args:
        stores: stores with equal action and state sizes.

    Raises:
        ValueError: if they hold no episode, or their action or state sizes differ.
    """
    require_stores(stores)
    stores = [store for store in stores if len(store)]
    if not stores:
        raise ValueError("the stores hold no episodes, so there are no statistics; append some first")
    for key in ("actions", "state"):
        kinds = {store.step_shapes.get(key) for store in stores}
        if len(kinds) > 1:
            given = " and ".join(sorted(map(str, kinds)))
            raise ValueError(f"'{key}' differs between the stores, {given}; compute their statistics separately")
    rows = np.concatenate([_moments(store, range(len(store))) for store in stores])
    lengths = np.array([info.total_steps for store in stores for info in store.index])
    mean, squares, _, _ = merge_moments(rows, lengths)
    std = np.maximum(np.sqrt(squares / lengths.sum()), STD_FLOOR).astype(np.float32)
    mean, size = mean.astype(np.float32), stores[0].step_shapes["actions"][1][0]
    state = (mean[size:], std[size:]) if "state" in stores[0].step_shapes else (None, None)
    return Statistics(mean[:size], std[:size], *state, int(lengths.sum()), len(lengths))


def action_range(store: EpisodeStore) -> np.ndarray:
    """Smallest and largest of each action entry over all steps of a store that is not empty, float64 ``[2, A]``."""
    size = store.step_shapes["actions"][1][0]
    moments = _moments(store, range(len(store)))[:, :, :size]
    return np.stack([moments[:, 2].min(axis=0), moments[:, 3].max(axis=0)])


def stats(store: EpisodeStore, *, where: str | None = None, progress: Progress | None = None) -> list[TaskStatistics]:
    """Statistics per task, sorted by name.

    They come from the index; only episodes of older stores, whose entries have no moments, are opened.

    Args:
        store: open store.
        where: expression that chooses episodes; see ``select``.
        progress: called after every episode opened.

    Raises:
        ValueError: if no episode is chosen, or one that has to be opened is damaged.
    """
    index = store.index
    chosen = select(index, where)
    if not chosen:
        raise ValueError(f"no episode of '{store.path}' fits {where!r}; `vla-rl data info` shows what it holds")
    moments = _moments(store, chosen, progress)
    size = store.step_shapes["actions"][1][0]
    result = []
    for task, members in sorted(by_task([index[i] for i in chosen]).items()):
        episodes = [index[chosen[k]] for k in members]
        lengths = np.array([info.total_steps for info in episodes])
        returns = np.array([info.return_ for info in episodes])
        merged = merge_moments(moments[members], lengths)
        result.append(
            TaskStatistics(
                task=task,
                episodes=len(episodes),
                steps=int(lengths.sum()),
                success_rate=float(np.mean([info.success for info in episodes])),
                lengths=(int(lengths.min()), float(np.median(lengths)), int(lengths.max())),
                returns=(float(returns.min()), float(returns.mean()), float(returns.max())),
                actions=_array_statistics(merged[:, :size], int(lengths.sum())),
                state=_array_statistics(merged[:, size:], int(lengths.sum())) if "state" in store.step_shapes else None,
            )
        )
    return result


def _array_statistics(moments: np.ndarray, steps: int) -> ArrayStatistics:
    mean, squares, minimum, maximum = moments
    return ArrayStatistics(mean, np.sqrt(squares / steps), minimum, maximum)


def _moments(store: EpisodeStore, chosen: Sequence[int], progress: Progress | None = None) -> np.ndarray:
    """Moments of actions and state of the chosen episodes, ``[E, 4, A + S]``."""
    shapes = {key: store.step_shapes[key][1] for key in ("actions", "state") if key in store.step_shapes}
    size = sum(shape[0] for shape in shapes.values())
    index = store.index
    rows = [unpack_moments(index[i].moments, size) for i in chosen]
    todo = [k for k, row in enumerate(rows) if row is None]
    for done, k in enumerate(todo, 1):
        rows[k] = _read_moments(store, chosen[k], index[chosen[k]].total_steps, shapes)
        if progress is not None:
            progress(done, len(todo))
    return np.stack([row for row in rows if row is not None])


def _read_moments(store: EpisodeStore, number: int, steps: int, shapes: Mapping[str, tuple[int, ...]]) -> np.ndarray:
    with store.open_episode(number) as group:
        arrays = {key: get_dataset(group, key if key == "actions" else f"observations/{key}") for key in shapes}
        for key, array in arrays.items():
            if array.shape != (steps + (key == "state"), *shapes[key]):
                raise ValueError(f"'{store.episode_path(number)}': '{key}' has shape {array.shape}; see verify")
        state = arrays["state"][()] if "state" in arrays else None
        return episode_moments(arrays["actions"][()], state)


def summarize(store: EpisodeStore) -> list[TaskSummary]:
    """One row per (task, source), sorted; reads no frames."""
    groups: dict[tuple[str, str], list[tuple[int, bool]]] = {}
    for info in store.index:
        groups.setdefault((info.task, info.source), []).append((info.total_steps, info.success))
    return [_summary(task, source, entries) for (task, source), entries in sorted(groups.items())]


def _summary(task: str, source: str, entries: Iterable[tuple[int, bool]]) -> TaskSummary:
    lengths, successes = zip(*entries, strict=True)
    episodes, steps = len(lengths), sum(lengths)
    return TaskSummary(task, source, episodes, steps, sum(successes) / episodes, steps / episodes)
