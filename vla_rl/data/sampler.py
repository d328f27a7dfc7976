"""Random batches of steps from several stores, balanced over tasks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vla_rl.data.steps import Batch, StepTable
from vla_rl.data.store import EpisodeStore, require_stores


class BalancedSampler:
    """Draws steps with replacement: a task uniformly among those present, then one of its steps.

    The sampler sees the episodes that the stores hold when it is made; make a new one after appending.

    Args:
        stores: where the episodes lie, such as expert demonstrations and successes found by RL.
        batch_size: number ``B`` of steps per batch.
        seed: seed of the draws.
        weights: share of each store, e.g. ``[0.5, 0.5]``, applied within each task among the stores that have it; a
            store of weight 0 is left out. Without weights, all steps of a task are equally likely, whichever store they
            lie in.
        task_weights: how often to draw a task relative to the others; 1 where not given.
        max_ram_bytes: images are kept in RAM if they fit within this, else read from disk at every draw.
        chunk: H; with more than 1, a row's actions are those of H steps, flat, for heads over chunks. Beyond the end of
            an episode its last action is repeated. Stores recorded in chunks may lie beside others.

    Raises:
        ValueError: if there is nothing to draw, the weights do not fit, or the stores' shapes differ.
    """

    def __init__(
        self,
        stores: Sequence[EpisodeStore],
        *,
        batch_size: int,
        seed: int,
        weights: Sequence[float] | None = None,
        task_weights: Mapping[str, float] | None = None,
        max_ram_bytes: int = 2_000_000_000,
        chunk: int = 1,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        if chunk < 1:
            raise ValueError(f"chunk must be at least 1, got {chunk}")
        require_stores(stores)
        shares = None if weights is None else np.asarray(weights, dtype=np.float64)
        if shares is not None and (
            shares.shape != (len(stores),) or not np.isfinite(shares).all() or (shares < 0).any()
        ):
            raise ValueError(f"weights must be {len(stores)} numbers >= 0, one per store, got {weights}")
        self.batch_size = batch_size
        self.stores = tuple(stores)
        self._table = StepTable(stores, max_ram_bytes=max_ram_bytes, chunk=chunk)
        self._rng = np.random.default_rng(seed)
        self._build_groups(shares, task_weights or {})

    def _build_groups(self, shares: np.ndarray | None, task_weights: Mapping[str, float]) -> None:
        """Groups rows by (task, store), with the probability of drawing from each group."""
        table = self._table
        names, task_codes = np.unique(table.tasks, return_inverse=True)
        num_stores = int(table.episode_stores.max()) + 1
        row_groups = np.repeat(task_codes * num_stores + table.episode_stores, table.episode_lengths)
        groups, sizes = np.unique(row_groups, return_counts=True)
        mass = sizes.astype(np.float64) if shares is None else shares[groups % num_stores]
        task_mass = np.bincount(groups // num_stores, weights=mass, minlength=len(names))
        present = task_mass > 0
        if not present.any():
            raise ValueError("every store with episodes has weight 0; give one a positive weight")
        kept = mass > 0
        task_share = np.array([task_weights.get(str(name), 1.0) for name in names])
        valid = np.isfinite(task_share).all() and (task_share >= 0).all() and (task_share[present] > 0).any()
        if not valid or not set(task_weights) <= set(names.tolist()):
            raise ValueError(
                f"task_weights must be numbers >= 0, not all 0, for tasks among {', '.join(names)}; got "
                f"{dict(task_weights)}"
            )
        codes = groups[kept] // num_stores
        probabilities = mass[kept] / task_mass[codes] * task_share[codes]
        starts = np.cumsum(sizes) - sizes
        self.tasks: tuple[str, ...] = tuple(str(name) for name in names[present])
        self._rows = np.argsort(row_groups, kind="stable")
        self._group_starts, self._group_sizes = starts[kept], sizes[kept]
        self._cumulative = np.cumsum(probabilities) / probabilities.sum()

    @property
    def num_rows(self) -> int:
        """Number of steps in all stores; row ids are ``0 .. num_rows - 1``, by store, episode and step."""
        return self._table.num_rows

    @property
    def instructions(self) -> tuple[str, ...]:
        """The distinct sentences of all episodes."""
        return tuple(dict.fromkeys(self._table.instructions))

    @property
    def images_in_ram(self) -> bool:
        """Whether the images fitted within ``max_ram_bytes``."""
        return self._table.images_in_ram

    def sample(self) -> Batch:
        """Draws ``batch_size`` steps."""
        return self.rows(self.draw())

    def draw(self) -> np.ndarray:
        """Row ids int64 ``[B]`` of the next batch, for ``rows``; nothing is read."""
        draws = self._rng.random((2, self.batch_size))
        groups = np.minimum(np.searchsorted(self._cumulative, draws[0], side="right"), len(self._group_sizes) - 1)
        sizes = self._group_sizes[groups]
        within = np.minimum((draws[1] * sizes).astype(np.int64), sizes - 1)
        return self._rows[self._group_starts[groups] + within]

    def rows(self, ids: Sequence[int] | np.ndarray) -> Batch:
        """The steps with the given row ids, in that order.

        Raises:
            IndexError: if an id is not in ``[0, num_rows)``.
        """
        return self._table.rows(ids)

    def state_dict(self) -> dict[str, Any]:
        """State of the draws, of plain numbers and strings, for ``load_state_dict``."""
        return {"num_rows": self.num_rows, "rng": self._rng.bit_generator.state}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues the draws where ``state_dict`` was taken.

        Raises:
            ValueError: if the state was taken over other episodes.
        """
        if state["num_rows"] != self.num_rows:
            raise ValueError(
                f"the sampler state was taken over {state['num_rows']} steps, but the stores hold {self.num_rows}; "
                "resume with the same stores"
            )
        self._rng.bit_generator.state = state["rng"]


def task_weights(expert: Sequence[EpisodeStore], rl: Sequence[EpisodeStore], *, rl_fraction: float) -> dict[str, float]:
    """Sampling weights that give the tasks with successes `rl_fraction` of a batch, and the other tasks the rest."""
    rl_tasks = {info.task for store in rl for info in store.index}
    others = {info.task for store in expert for info in store.index} - rl_tasks
    if not rl_tasks or not others:
        return {}
    return dict.fromkeys(rl_tasks, rl_fraction / (1 - rl_fraction) * len(others) / len(rl_tasks))
