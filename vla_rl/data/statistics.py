"""Numbers that describe stored episodes: means and deviations for normalisation, and counts per task."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from vla_rl.data.layout import get_dataset
from vla_rl.data.store import EpisodeStore

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


class _Moments:
    """Running mean and sum of squared deviations, merged block by block (Chan, Golub, LeVeque 1979, eq. 2.1)."""

    def __init__(self) -> None:
        self.count = 0
        self.mean: np.ndarray | float = 0.0
        self.squares: np.ndarray | float = 0.0

    def add(self, block: np.ndarray) -> None:
        values = block.astype(np.float64)
        mean = values.mean(axis=0)
        difference = mean - self.mean
        total = self.count + len(values)
        self.squares = (
            self.squares + ((values - mean) ** 2).sum(axis=0) + difference**2 * (self.count * len(values) / total)
        )
        self.mean = self.mean + difference * (len(values) / total)
        self.count = total

    def result(self) -> tuple[np.ndarray, np.ndarray]:
        std = np.sqrt(np.asarray(self.squares) / self.count)
        return np.asarray(self.mean, dtype=np.float32), np.maximum(std, STD_FLOOR).astype(np.float32)


def compute_statistics(stores: Sequence[EpisodeStore]) -> Statistics:
    """Statistics over all steps of all stores, one episode in memory at a time.

    Args:
        stores: stores with equal action and state sizes.

    Raises:
        ValueError: if they hold no episode, or their action or state sizes differ.
    """
    stores = [store for store in stores if len(store)]
    if not stores:
        raise ValueError("the stores hold no episodes, so there are no statistics; append some first")
    for key in ("actions", "state"):
        kinds = {store.step_shapes.get(key) for store in stores}
        if len(kinds) > 1:
            given = " and ".join(sorted(map(str, kinds)))
            raise ValueError(f"'{key}' differs between the stores, {given}; compute their statistics separately")
    actions, states = _Moments(), _Moments()
    for store in stores:
        has_state = "state" in store.step_shapes
        for index in range(len(store)):
            with store.open_episode(index) as group:
                block = get_dataset(group, "actions")[()]
                actions.add(block)
                if has_state:
                    states.add(get_dataset(group, "observations/state")[: len(block)])
    state_mean, state_std = states.result() if states.count else (None, None)
    return Statistics(*actions.result(), state_mean, state_std, actions.count, sum(map(len, stores)))


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
