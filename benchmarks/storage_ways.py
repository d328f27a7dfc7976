"""The ways of ``storage.py`` to write episodes and to read their frames, ours and others'."""

from __future__ import annotations

import importlib.util
import multiprocessing
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol, get_args

import gymnasium as gym
import h5py
import numpy as np

from vla_rl.data import BalancedSampler, Episode, EpisodeStore, ImageFormat
from vla_rl.data.image_formats import LOSSY


class Reader(Protocol):
    """Opened for reading, once for all reads."""

    def episode(self, index: int) -> np.ndarray:
        """All pictures of one episode, uint8 ``[T+1, H, W, 3]``."""
        ...

    def frames(self, episodes: np.ndarray, steps: np.ndarray) -> np.ndarray:
        """One picture of each of ``B`` (episode, step) pairs, uint8 ``[B, H, W, 3]``."""
        ...


@dataclass
class Way:
    """One way to store: ``write(folder, episodes)`` makes ``folder`` or finds it empty; ``open(folder)`` reads it."""

    name: str
    write: Callable[[Path, list[Episode]], Any]
    open: Callable[[Path], Reader]
    lossless: bool = True


class StoreReader:
    """This library's: whole episodes from the store, single frames from the sampler, which keeps none in RAM."""

    def __init__(self, folder: Path) -> None:
        self.store = EpisodeStore(folder, "r")
        self.sampler = BalancedSampler([self.store], batch_size=1, seed=0, max_ram_bytes=0)
        self.starts = np.cumsum([0, *(info.total_steps for info in self.store.index)])

    def episode(self, index: int) -> np.ndarray:
        """All its pictures."""
        return self.store[index].observations["image"]

    def frames(self, episodes: np.ndarray, steps: np.ndarray) -> np.ndarray:
        """A batch, as training draws it."""
        return self.sampler.rows(self.starts[episodes] + steps).images


def library() -> Iterator[Way]:
    """What this library writes, raw and compressed; every episode is synced."""
    needed = {"zstd": "hdf5plugin", "video": "av"}
    for form in get_args(ImageFormat):
        if importlib.util.find_spec(needed.get(form, "PIL")):
            name = "EpisodeStore" if form == "raw" else f"EpisodeStore, {form}"
            yield Way(name, partial(write_store, images=form), StoreReader, lossless=form not in LOSSY)


def write_store(folder: Path, episodes: list[Episode], images: ImageFormat) -> None:
    """Append all."""
    with EpisodeStore(folder, images=images) as store:
        for episode in episodes:
            store.append(episode)


class Hdf5Reader:
    """One HDF5 file, kept open; one frame per read.

    Without HDF5's cache of decoded chunks, 8 MB per dataset: it would hold these few episodes but not a large store.
    """

    def __init__(self, folder: Path) -> None:
        file = h5py.File(folder / "images.hdf5", "r", rdcc_nbytes=0)
        self.datasets: list[Any] = [file[f"{index}"] for index in range(len(file))]

    def episode(self, index: int) -> np.ndarray:
        """All its pictures."""
        return self.datasets[index][()]

    def frames(self, episodes: np.ndarray, steps: np.ndarray) -> np.ndarray:
        """Frame by frame."""
        return np.stack([self.datasets[episode][step] for episode, step in zip(episodes, steps, strict=True)])


def hdf5(name: str, **options: Any) -> Way:
    """Plain h5py: one frame per chunk, with filter ``options``."""

    def write(folder: Path, episodes: list[Episode]) -> None:
        folder.mkdir(exist_ok=True)
        with h5py.File(folder / "images.hdf5", "w") as file:
            for index, episode in enumerate(episodes):
                images = episode.observations["image"]
                file.create_dataset(f"{index}", data=images, chunks=(1, *images.shape[1:]), **options)

    return Way(name, write, Hdf5Reader)


def plain_hdf5() -> Iterator[Way]:
    """Chunks and compressions of HDF5, read with h5py."""
    yield hdf5("h5py, one frame per chunk")
    if importlib.util.find_spec("hdf5plugin"):
        import hdf5plugin

        yield hdf5("h5py, Blosc LZ4 per frame", **hdf5plugin.Blosc(cname="lz4", clevel=5, shuffle=0))


class MinariReader:
    """Minari's own loader, which reads whole episodes."""

    def __init__(self, folder: Path) -> None:
        import minari

        self.dataset = minari.MinariDataset(folder / "data")

    def episode(self, index: int) -> np.ndarray:
        """All its pictures."""
        return self.dataset[index].observations["image"]

    def frames(self, episodes: np.ndarray, steps: np.ndarray) -> np.ndarray:
        """Every episode of the batch once, then its frames."""
        known = {int(index): self.episode(int(index)) for index in np.unique(episodes)}
        return np.stack([known[int(episode)][step] for episode, step in zip(episodes, steps, strict=True)])


def minari_way(name: str, *, jpeg: bool) -> Way:
    """Minari's own writer, episode by episode, as its data collector does."""

    def write(folder: Path, episodes: list[Episode]) -> None:
        from minari.data_collector import EpisodeBuffer
        from minari.dataset.minari_storage import MinariStorage

        data = folder / "data"
        data.mkdir(parents=True)
        image = gym.spaces.Box(0, 255, episodes[0].observations["image"].shape[1:], np.uint8)
        space = gym.spaces.Dict({"image": image, "state": gym.spaces.Box(-np.inf, np.inf, (4,), np.float32)})
        storage = MinariStorage.new(
            data,
            observation_space=space,
            action_space=gym.spaces.Box(-1, 1, (4,), np.float32),
            env_spec=None,
            data_format="hdf5",
            jpeg_encoding=jpeg,
        )
        for number, episode in enumerate(episodes):
            observations = {key: episode.observations[key] for key in ("image", "state")}
            arrays = {key: getattr(episode, key) for key in ("actions", "rewards", "terminations", "truncations")}
            storage.update_episodes([EpisodeBuffer(id=number, observations=observations, infos={}, **arrays)])
        storage.update_metadata({"dataset_id": "pictures-v0", "minari_version": "0.5.4"})

    return Way(name, write, MinariReader, lossless=not jpeg)


def minari() -> Iterator[Way]:
    """Minari's writer and loader."""
    if importlib.util.find_spec("minari"):
        yield minari_way("Minari, its default (JPEG)", jpeg=True)
        yield minari_way("Minari, raw pictures", jpeg=False)


class RobomimicReader:
    """robomimic's own loader, with everything but the pictures in RAM, as it advises for large files."""

    def __init__(self, folder: Path) -> None:
        import robomimic.utils.obs_utils as obs_utils
        from robomimic.utils.dataset import SequenceDataset

        obs_utils.initialize_obs_utils_with_obs_specs({"obs": {"rgb": ["image"], "low_dim": ["state"]}})
        self.dataset = SequenceDataset(
            str(folder / "images.hdf5"),
            obs_keys=("image",),
            dataset_keys=("actions",),
            hdf5_cache_mode="low_dim",
            hdf5_use_swmr=True,
            load_next_obs=False,
        )
        lengths = [self.dataset._demo_id_to_demo_length[demo] for demo in self.dataset.demos]
        self.starts, self.lengths = np.cumsum([0, *lengths]), lengths

    def episode(self, index: int) -> np.ndarray:
        """All its pictures, as a sequence of its length."""
        return self.dataset.get_trajectory_at_index(index)["obs"]["image"]

    def frames(self, episodes: np.ndarray, steps: np.ndarray) -> np.ndarray:
        """One item of the data set each."""
        rows = self.starts[episodes] + steps
        return np.stack([self.dataset[int(row)]["obs"]["image"][0] for row in rows])


def write_robomimic(folder: Path, episodes: list[Episode]) -> None:
    """The file that robomimic's ``dataset_states_to_obs.py`` writes."""
    folder.mkdir(exist_ok=True)
    with h5py.File(folder / "images.hdf5", "w") as file:
        for index, episode in enumerate(episodes):
            demo = file.create_group(f"data/demo_{index}")
            demo.attrs["num_samples"] = episode.total_steps
            demo.create_dataset("actions", data=episode.actions)
            for key in ("image", "state"):
                demo.create_dataset(f"obs/{key}", data=episode.observations[key][:-1])
        file["data"].attrs["total"] = sum(episode.total_steps for episode in episodes)


def robomimic() -> Iterator[Way]:
    """Layout and loader of robomimic."""
    if importlib.util.find_spec("robomimic"):
        yield Way("robomimic", write_robomimic, RobomimicReader)


WAYS: tuple[Callable[[], Iterator[Way]], ...] = (library, plain_hdf5, minari, robomimic)


def processes_reading(
    reader: Reader, plan: Sequence[tuple[np.ndarray, np.ndarray]], *, processes: int
) -> tuple[int, float]:
    """Number of batches read by forked processes that read at the same time, and the seconds it took."""
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(processes + 1)

    def work() -> None:
        reader.frames(*plan[0])
        barrier.wait()
        for part in plan:
            reader.frames(*part)
        barrier.wait()

    children = [context.Process(target=work) for _ in range(processes)]
    for child in children:
        child.start()
    barrier.wait()
    start = time.perf_counter()
    barrier.wait()
    seconds = time.perf_counter() - start
    for child in children:
        child.join()
    return processes * len(plan), seconds
