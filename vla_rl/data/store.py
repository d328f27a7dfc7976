"""``EpisodeStore``: episodes on disk, appended one by one, readable by Minari and safe against being killed."""

from __future__ import annotations

import json
import math
import os
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal

import h5py
import numpy as np

from vla_rl.data.episode import Episode, check_names
from vla_rl.data.image_formats import ImageFormat, check_format, is_plain, read_images
from vla_rl.data.layout import (
    PACKED,
    EpisodeInfo,
    Shapes,
    count_links,
    episode_path,
    get_dataset,
    get_group,
    list_datasets,
    metadata_header,
    metadata_totals,
    read_arrays,
    read_episode,
    replace_file,
    step_shapes,
    whole_episode,
    write_episode,
    write_links,
)
from vla_rl.data.recovery import find_shards, find_unindexed, noted_shapes, read_index, read_metadata, store_exists
from vla_rl.data.safety import check_group, check_inside
from vla_rl.data.writing import explained, require_space
from vla_rl.file_lock import WriterLock


class EpisodeStore:
    """A folder of episodes in Minari's layout (``minari.MinariDataset(root / "data")`` reads it).

    Each episode is written and synced under a temporary name, then renamed, and never touched again, so a process that
    is killed at any moment loses at most the episode it was writing. One process writes at a time; any number may read,
    and each sees the episodes that were there when it opened the store. Memory use does not grow with the frames.

    Args:
        path: root directory of the dataset.
        mode: ``"a"`` append, creating the store if it is missing; ``"r"`` read only; ``"w-"`` create, refusing an
            existing one.
        images: how ``append`` stores pictures, see ``ImageFormat``. Raw ones are read fastest by far; a store may hold
            several kinds.

    Raises:
        FileNotFoundError: if mode is ``"r"`` and there is no store.
        FileExistsError: if mode is ``"w-"`` and there is one.
        BlockingIOError: if another writer has the store open.
        ValueError: if the folder holds something else, or files of the store are damaged or missing.
    """

    def __init__(
        self, path: str | os.PathLike[str], mode: Literal["a", "r", "w-"] = "a", *, images: ImageFormat = "raw"
    ) -> None:
        if mode not in ("a", "r", "w-"):
            raise ValueError(f"mode must be 'a', 'r' or 'w-', got {mode!r}")
        if mode != "r":
            check_format(images)
        self.path = Path(path).resolve()
        self.mode = mode
        self._images: ImageFormat = images
        self._data_dir = self.path / "data"
        self._lock: WriterLock | None = None
        self._checked: set[Path] = set()
        self._shards = find_shards(self.path)
        if self._shards:
            self._load_shards()
            return
        self._check_mode()
        if mode != "r":
            with explained(self.path, "nothing was written"):
                (self._data_dir / "episodes").mkdir(parents=True, exist_ok=True)
                self._lock = WriterLock(self.path)
        try:
            if not self._check_mode():  # again, for another writer may have made it before the lock was ours
                self._metadata = metadata_header(self.path, None, num_task_ids=1)
                self._write_metadata(0, 0)
            self._load()
        except BaseException:
            if self._lock is not None:
                self._lock.release()
            raise

    def append(self, episode: Episode, *, extras: Mapping[str, np.ndarray] | None = None) -> int:
        """Stores a whole episode; when this returns, it survives any crash.

        Args:
            episode: the episode.
            extras: arrays of any shape kept beside it (cached features, log-probabilities), see ``read_extras``.

        Returns:
            Its index.

        Raises:
            OSError: if the store is read-only or closed, or the disk is full; the store stays as it was.
            ValueError: if shapes or dtypes of observations or actions differ from the episodes already stored.
        """
        if self._lock is None or not self._lock.held:
            raise OSError(f"store '{self.path}' is not open for writing in this process; open it with mode='a'")
        shapes = step_shapes(episode)
        self._check_shapes(shapes)
        check_names("extras", extras or {})
        kept = f"the store keeps its {len(self)} episodes"
        with explained(self.path, kept):
            arrays = [*episode.observations.values(), *episode.infos.values(), *(extras or {}).values()]
            require_space(self.path, sum(array.nbytes for array in arrays), kept)
            return self._append(episode, extras or {}, shapes)

    def _append(self, episode: Episode, extras: Mapping[str, np.ndarray], shapes: Shapes) -> int:
        index = len(self._index)
        if index >= self._num_links:
            # Links run ahead of the episodes, so that doubling keeps appends cheap; readers go by total_episodes.
            self._num_links = max(64, 2 * index)
            write_links(self._data_dir, self._num_links)
        path = episode_path(self._data_dir, index)
        info = write_episode(path, index, episode, extras=extras, images=self._images)
        try:
            index_bytes = self._record(info, shapes)
        except BaseException:
            with suppress(OSError):  # take back what is there of it, or the next reader would find the episode
                path.unlink()
                os.truncate(self._data_dir / "episodes.jsonl", self._index_bytes)
            raise
        self._shapes, self._index_bytes = shapes, index_bytes
        self._total_steps += info.total_steps
        self._index.append(info)
        return index

    def _record(self, info: EpisodeInfo, shapes: Shapes) -> int:
        """Notes an episode whose file is there; returns the new size of the index."""
        num_task_ids = max(self._num_task_ids, info.max_task_id + 1)
        packed = self._metadata["data_format"] == PACKED
        plain = not packed and is_plain(info.images)
        if self._shapes is None or packed == plain or num_task_ids > self._num_task_ids:
            self._metadata |= metadata_header(self.path, shapes, num_task_ids=num_task_ids, plain=plain)
            self._write_metadata(len(self._index), self._total_steps)
            self._num_task_ids = num_task_ids
        index_bytes = self._append_index_line(info)
        self._update_totals(len(self._index) + 1, self._total_steps + info.total_steps)
        return index_bytes

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, index: int) -> Episode:
        with self.open_episode(index) as group, whole_episode(self.episode_path(index)):
            return read_episode(group)

    def __iter__(self) -> Iterator[Episode]:
        for index in range(len(self)):
            yield self[index]

    @property
    def index(self) -> Sequence[EpisodeInfo]:
        """One light entry per episode, in order; reading it opens no file."""
        return tuple(self._index)

    @property
    def total_steps(self) -> int:
        """Number of actions stored."""
        return self._total_steps

    @property
    def step_shapes(self) -> Shapes:
        """Type and shape of one step of every observation and of ``"actions"``; empty before the first episode."""
        return dict(self._shapes or {})

    @contextmanager
    def open_episode(self, index: int) -> Iterator[h5py.Group]:
        """Gives the read-only HDF5 group of one episode, to read single arrays from.

        Raises:
            IndexError: if there is no such episode.
            ValueError: if its file is damaged or missing.
        """
        path, number = self.locate(index)
        try:
            file = h5py.File(path, "r")
        except OSError as error:
            raise ValueError(f"cannot read '{path}' ({error}); restore it from a copy") from error
        with file:
            with whole_episode(path):
                if f"episode_{number}" not in file:
                    raise ValueError(f"'{path}' holds {list(file)}, not 'episode_{number}'; was it renamed? restore it")
                group = get_group(file, f"episode_{number}")
                if path not in self._checked:
                    check_inside(path, path.parents[2])
                    check_group(group)
            self._checked.add(path)
            yield group

    def episode_path(self, index: int) -> Path:
        """The HDF5 file of one episode; raises IndexError if there is none."""
        return self.locate(index)[0]

    def locate(self, index: int) -> tuple[Path, int]:
        """The HDF5 file of one episode and its number there, which is another than ``index`` only in later shards.

        Raises:
            IndexError: if there is no such episode.
        """
        if not -len(self._index) <= index < len(self._index):
            raise IndexError(f"episode {index} of a store with {len(self._index)}")
        number, data_dir = index % len(self._index), self._data_dir
        if self._shards:
            shard = bisect_right(self._shard_starts, number) - 1
            number, data_dir = number - self._shard_starts[shard], self._shards[shard] / "data"
        return episode_path(data_dir, number), number

    def read_steps(self, index: int, steps: Sequence[int] | np.ndarray) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """Reads single steps of one episode, touching only those frames.

        Args:
            index: the episode.
            steps: ``N`` step numbers, each in ``[0, T)``, in any order.

        Returns:
            Observations, each ``[N, ...]``, and actions ``[N, A]``.

        Raises:
            IndexError: if the episode or a step does not exist.
        """
        steps = np.asarray(steps, dtype=np.int64)
        with self.open_episode(index) as group, whole_episode(self.episode_path(index)):
            actions = get_dataset(group, "actions")
            total = len(actions)
            if steps.ndim != 1 or (len(steps) and not (steps.min() >= 0 and steps.max() < total)):
                raise IndexError(f"steps must be a list of numbers in [0, {total}), got {steps.tolist()}")
            datasets = list_datasets(get_group(group, "observations"))
            return {key: _read_rows(dataset, steps) for key, dataset in datasets}, _read_rows(actions, steps)

    def decoded_bytes(self, index: int) -> int:
        """Size of an episode's file with its pictures raw: what a copy of its arrays takes at most."""
        frames = self.index[index].total_steps + 1
        images = (shape for key, (_, shape) in self.step_shapes.items() if key.split("_")[0] == "image")
        return self.index[index].num_bytes + frames * sum(math.prod(shape) for shape in images)

    def read_extras(self, index: int) -> dict[str, np.ndarray]:
        """The arrays given as ``extras`` when the episode was appended."""
        with self.open_episode(index) as group:
            return read_arrays(get_group(group, "extras")) if "extras" in group else {}

    def close(self) -> None:
        """Ends writing and lets another writer in; reading goes on working. Does nothing the second time."""
        if self._lock is None or not self._lock.held:
            return
        if self._num_links != len(self._index):
            write_links(self._data_dir, len(self._index))
        self._lock.release()

    def __enter__(self) -> EpisodeStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"EpisodeStore('{self.path}', mode={self.mode!r}): {len(self)} episodes, {self.total_steps} steps"

    def __getstate__(self) -> dict[str, Any]:
        """A copy in another process, such as a data loader's worker, reads; only the writer itself writes."""
        return {**vars(self), "_lock": None, "mode": "r"}

    def _check_mode(self) -> bool:
        """Whether the store exists, if the mode allows that."""
        exists = store_exists(self.path)
        if self.mode == "r" and not exists:
            raise FileNotFoundError(
                f"no episode store at '{self.path}'; `vla-rl collect`, `data import` and EpisodeStore(path) make one"
            )
        if self.mode == "w-" and exists:
            raise FileExistsError(
                f"an episode store exists at '{self.path}'; use mode='a' to append to it, or another path"
            )
        return exists

    def _load_shards(self) -> None:
        if self.mode != "r":
            raise ValueError(
                f"'{self.path}' holds {len(self._shards)} stores that are read as one; write to one of them, such as "
                f"'{self._shards[0]}', or to a new one beside them"
            )
        stores = [EpisodeStore(shard, mode="r") for shard in self._shards]
        self._index = [info for store in stores for info in store._index]
        self._total_steps = sum(store.total_steps for store in stores)
        self._shard_starts = list(accumulate(map(len, stores), initial=0))[:-1]
        self._shapes = None
        for store in stores:
            self._check_shapes(store.step_shapes or self._shapes or {}, f"'{store.path}'")
            self._shapes = store.step_shapes or self._shapes

    def _load(self) -> None:
        self._metadata = read_metadata(self.path)
        stored = dict(self._metadata)
        self._index, self._index_bytes = read_index(self._data_dir)
        unindexed = find_unindexed(self._data_dir, self._index)
        self._index += unindexed
        self._total_steps = sum(info.total_steps for info in self._index)
        self._shapes: Shapes | None = noted_shapes(self._metadata)
        if self._shapes is None and self._index:
            self._shapes = step_shapes(self[0])
        self._num_task_ids = 1 + max((info.max_task_id for info in self._index), default=0)
        plain = all(is_plain(info.images) for info in self._index)
        self._metadata |= metadata_header(self.path, self._shapes, num_task_ids=self._num_task_ids, plain=plain)
        for name in ("total_episodes", "total_steps"):
            self._metadata.pop(name, None)
        if self.mode == "r":
            return
        self._num_links = count_links(self._data_dir)
        if self._num_links < len(self._index) or self._num_links == 0:
            self._num_links = len(self._index)
            write_links(self._data_dir, self._num_links)
        for info in unindexed:
            self._index_bytes = self._append_index_line(info)
        if stored != self._metadata | {"total_episodes": len(self._index), "total_steps": self._total_steps}:
            self._write_metadata(len(self._index), self._total_steps)

    def _check_shapes(self, shapes: Shapes, what: str = "the episode") -> None:
        if self._shapes is None or shapes == self._shapes:
            return
        for key in sorted(self._shapes.keys() | shapes.keys()):
            given, expected = (_describe(table.get(key)) for table in (shapes, self._shapes))
            if given != expected:
                raise ValueError(
                    f"'{key}' of {what} is {given} per step, but {expected} in the store '{self.path}'; "
                    "record with the same settings or use another store"
                )

    def _append_index_line(self, info: EpisodeInfo) -> int:
        line = (json.dumps(info._asdict()) + "\n").encode()
        with open(self._data_dir / "episodes.jsonl", "ab") as file:
            file.truncate(self._index_bytes)  # cuts off what an interrupted write may have left
            file.write(line)
        return self._index_bytes + len(line)

    def _write_metadata(self, total_episodes: int, total_steps: int) -> None:
        text = metadata_totals(total_episodes, total_steps) + json.dumps(self._metadata)[1:]
        replace_file(self._data_dir / "metadata.json", text)

    def _update_totals(self, total_episodes: int, total_steps: int) -> None:
        """Overwrites two numbers in place, in one write of 66 bytes.

        Replacing the file would write the bounds of every pixel again, 1.4 MB at 224 x 224, which made appends of 50
        such frames take 1.4 times as long (medians of 60, alternating, on a busy machine).
        """
        expected = metadata_totals(len(self._index), self._total_steps).encode()
        with open(self._data_dir / "metadata.json", "r+b", buffering=0) as file:
            if file.read(len(expected)) == expected:
                file.seek(0)
                file.write(metadata_totals(total_episodes, total_steps).encode())
                return
        self._write_metadata(total_episodes, total_steps)


def _read_rows(dataset: h5py.Dataset, rows: np.ndarray) -> np.ndarray:
    if "encoding" not in dataset.attrs and (dataset.ndim < 3 or dataset.chunks not in (None, (1, *dataset.shape[1:]))):
        return dataset[()][rows]
    return read_images(dataset, rows)


def _describe(shape: tuple[str, tuple[int, ...]] | None) -> str:
    return "absent" if shape is None else f"{shape[0]} {list(shape[1])}"


def require_stores(stores: Sequence[EpisodeStore]) -> None:
    """Refuse what is easily given for a list of stores: one store, or paths.

    Raises:
        TypeError: with what to do.
    """
    if isinstance(stores, (EpisodeStore, str, Path)) or any(isinstance(store, (str, Path)) for store in stores):
        kind = type(stores).__name__ if isinstance(stores, (EpisodeStore, str, Path)) else "paths"
        raise TypeError(f"got {kind}, expected a list of stores; give [EpisodeStore(path, mode='r')]")
