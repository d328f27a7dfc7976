"""All steps of some stores as numbered rows: the table that samplers draw from."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import h5py
import numpy as np

from vla_rl.data.image_formats import image_format, read_images
from vla_rl.data.layout import get_dataset, get_group
from vla_rl.data.store import EpisodeStore, require_stores


@dataclass(frozen=True)
class Batch:
    """``B`` single steps.

    Attributes:
        images: uint8 ``[B, H, W, 3]``, or ``[B, N, H, W, 3]`` for ``N`` cameras, ordered by name.
        state: float32 ``[B, S]``, or None if the stores have none.
        actions: float32 ``[B, A]``; with chunks of H steps ``[B, H * A]``, the step's action and those after it.
        task_id: int64 ``[B]``.
        instructions: ``B`` sentences.
        store_index: int64 ``[B]``, position of the store among those given.
        episode_index: int64 ``[B]``, index within that store.
        step_index: int64 ``[B]``, step within that episode.
        row_id: int64 ``[B]``, number of the step among all steps of all stores; a key for caches.
    """

    images: np.ndarray
    state: np.ndarray | None
    actions: np.ndarray
    task_id: np.ndarray
    instructions: list[str]
    store_index: np.ndarray
    episode_index: np.ndarray
    step_index: np.ndarray
    row_id: np.ndarray

    def __len__(self) -> int:
        return len(self.row_id)


class StepTable:
    """Steps of the episodes that the stores hold now, numbered by store, then episode, then step.

    States, actions and task ids are kept in RAM; images too if all of them fit, else they are read when asked for.

    Args:
        stores: at least one; all with the same cameras, state and action sizes.
        max_ram_bytes: most bytes of images to keep in RAM.
        chunk: H, how many actions a row has; see ``action_windows``. A store beside others whose actions are H times
            as long was recorded in chunks already; its rows stay as they are.

    Raises:
        ValueError: if the stores hold no step, or their shapes differ.
    """

    def __init__(self, stores: Sequence[EpisodeStore], *, max_ram_bytes: int, chunk: int = 1) -> None:
        require_stores(stores)
        indices = [store.index for store in stores]
        episodes = [(s, e, info) for s, index in enumerate(indices) for e, info in enumerate(index)]
        if not episodes:
            raise ValueError(f"the {len(stores)} stores given hold no episodes; append some first")
        shapes = _common_shapes(stores, chunk)
        self.tasks = [info.task for _, _, info in episodes]
        self.episode_lengths = np.array([info.total_steps for _, _, info in episodes], dtype=np.int64)
        self.episode_stores = np.array([s for s, _, _ in episodes], dtype=np.int64)
        self.num_rows = int(self.episode_lengths.sum())
        self._starts = np.concatenate([[0], np.cumsum(self.episode_lengths)])
        self._episode_numbers = np.array([e for _, e, _ in episodes], dtype=np.int64)
        self.instructions = [info.instruction for _, _, info in episodes]
        self._places = [stores[s].locate(e) for s, e, _ in episodes]
        self._cameras = [key for key in sorted(shapes) if key.startswith("image_") or key == "image"]
        self._frame_shape = shapes[self._cameras[0]][1]
        if any(shapes[camera][1] != self._frame_shape for camera in self._cameras):
            sizes = {camera: list(shapes[camera][1]) for camera in self._cameras}
            raise ValueError(f"cameras must share one size to be batched, got {sizes}; record them at the same size")

        image_shape = (self.num_rows, len(self._cameras), *self._frame_shape)
        self.images_in_ram = int(np.prod(image_shape, dtype=np.int64)) <= max_ram_bytes
        self._images = np.empty(image_shape, dtype=np.uint8) if self.images_in_ram else None
        self._offsets: dict[int, np.ndarray | None] = {}
        self._action_dim = chunk * shapes["actions"][1][0]
        self._chunk = chunk
        self._actions = np.empty((self.num_rows, self._action_dim), dtype=np.float32)
        self._state = np.empty((self.num_rows, *shapes["state"][1]), dtype=np.float32) if "state" in shapes else None
        self._task_id = np.empty(self.num_rows, dtype=np.int64)
        for number, (s, e, info) in enumerate(episodes):
            with stores[s].open_episode(e) as group:
                self._load(group, slice(self._starts[number], self._starts[number + 1]), info.total_steps)

    def _load(self, group: h5py.Group, rows: slice, steps: int) -> None:
        observations = get_group(group, "observations")
        actions = get_dataset(group, "actions")[()]
        self._actions[rows] = actions if actions.shape[1] == self._action_dim else action_windows(actions, self._chunk)
        self._task_id[rows] = get_dataset(observations, "task_id")[:steps]
        if self._state is not None:
            self._state[rows] = get_dataset(observations, "state")[:steps]
        if self._images is not None:
            for k, camera in enumerate(self._cameras):
                self._images[rows, k] = read_images(get_dataset(observations, camera), slice(steps))

    def rows(self, ids: Sequence[int] | np.ndarray) -> Batch:
        """The steps with the given row ids ``[B]``, in that order; raises IndexError if one does not exist."""
        ids = np.asarray(ids, dtype=np.int64)
        if ids.ndim != 1 or (len(ids) and not (ids.min() >= 0 and ids.max() < self.num_rows)):
            raise IndexError(f"row ids must be a list of numbers in [0, {self.num_rows}), got {ids}")
        episodes = np.searchsorted(self._starts, ids, side="right") - 1
        steps = ids - self._starts[episodes]
        images = self._images[ids] if self._images is not None else self._read_images(episodes, steps)
        return Batch(
            images=images[:, 0] if len(self._cameras) == 1 else images,
            state=None if self._state is None else self._state[ids],
            actions=self._actions[ids],
            task_id=self._task_id[ids],
            instructions=[self.instructions[episode] for episode in episodes],
            store_index=self.episode_stores[episodes],
            episode_index=self._episode_numbers[episodes],
            step_index=steps,
            row_id=ids,
        )

    def _read_images(self, episodes: np.ndarray, steps: np.ndarray) -> np.ndarray:
        images = np.empty((len(steps), len(self._cameras), *self._frame_shape), dtype=np.uint8)
        order = np.lexsort((steps, episodes))
        for episode_rows in np.split(order, np.flatnonzero(np.diff(episodes[order])) + 1):
            if not len(episode_rows):
                continue
            episode = int(episodes[episode_rows[0]])
            offsets = self._frame_offsets(episode)
            if offsets is None:
                with self._open(episode) as datasets:
                    for k, dataset in enumerate(datasets):
                        images[episode_rows, k] = read_images(dataset, steps[episode_rows])
                continue
            with open(self._places[episode][0], "rb", buffering=0) as file:
                for row in episode_rows:
                    for k in range(len(self._cameras)):
                        file.seek(offsets[k, steps[row]])
                        frame = images[row, k]
                        if file.readinto(frame.reshape(-1).data) != frame.nbytes:
                            path = self._places[episode][0]
                            raise ValueError(f"'{path}' ends before frame {steps[row]}; restore the file from a copy")
        return images

    def _frame_offsets(self, episode: int) -> np.ndarray | None:
        """Where the raw frames of an episode lie in its file, int64 ``[cameras, T]``; None if they are compressed.

        Reading them by position saves HDF5's opening of the file, which takes ten times as long as the read itself.
        """
        if episode not in self._offsets:
            steps = int(self.episode_lengths[episode])
            with self._open(episode) as datasets:
                raw = all(image_format(dataset) == "raw" for dataset in datasets)
                self._offsets[episode] = np.stack([_offsets(dataset, steps) for dataset in datasets]) if raw else None
        return self._offsets[episode]

    @contextmanager
    def _open(self, episode: int) -> Iterator[list[h5py.Dataset]]:
        """The pictures of an episode, one array per camera."""
        path, number = self._places[episode]
        with h5py.File(path, "r") as file:
            yield [get_dataset(file, f"episode_{number}/observations/{camera}") for camera in self._cameras]


def action_windows(actions: np.ndarray, chunk: int) -> np.ndarray:
    """For each step of an episode, its action and the ``chunk - 1`` after it, flat: ``[T, A]`` to ``[T, chunk * A]``.

    Beyond the end the last action is repeated (as in Diffusion Policy), so that every loss works on chunks without a
    mask; an env that ends where the demonstration did never executes them.
    """
    steps = np.arange(len(actions))[:, None] + np.arange(chunk)
    return actions[np.minimum(steps, len(actions) - 1)].reshape(len(actions), -1)


def _offsets(images: h5py.Dataset, steps: int) -> np.ndarray:
    """Positions of the first frames in the file; in one piece, or one chunk each in older stores."""
    start = images.id.get_offset()
    if start is not None:
        return start + np.arange(steps, dtype=np.int64) * math.prod(images.shape[1:])
    if images.chunks == (1, *images.shape[1:]):
        infos = [images.id.get_chunk_info_by_coord((step, 0, 0, 0)) for step in range(steps)]
        if all(info.byte_offset is not None for info in infos):
            return np.array([info.byte_offset for info in infos], dtype=np.int64)
    raise ValueError(
        f"'{images.file.filename}': '{images.name}' is not whole or has several frames per chunk, so single frames "
        "cannot be read by position; append its episodes to a new store, or give max_ram_bytes enough for all images"
    )


def _common_shapes(stores: Sequence[EpisodeStore], chunk: int) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Shapes of images, state and single actions, which all stores with episodes must share."""
    tables = []
    smallest = min(store.step_shapes["actions"] for store in stores if len(store))
    in_chunks = (smallest[0], (smallest[1][0] * chunk,))
    for store in stores:
        if len(store):
            names = [key for key in store.step_shapes if key in ("state", "actions") or key.split("_")[0] == "image"]
            table = {key: store.step_shapes[key] for key in sorted(names)}
            tables.append((store, table | {"actions": smallest} if table["actions"] == in_chunks else table))
    first_store, first = tables[0]
    for store, table in tables[1:]:
        if table != first:
            raise ValueError(
                f"'{store.path}' has steps of {table}, but '{first_store.path}' of {first}; draw from them separately"
            )
    return first
