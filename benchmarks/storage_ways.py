"""The ways of ``storage.py`` to write episodes and to read their frames, ours and others'."""

from __future__ import annotations

import importlib.util
import io
import multiprocessing
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import gymnasium as gym
import h5py
import numpy as np
from PIL import Image

from vla_rl.data import BalancedSampler, Episode, EpisodeStore


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


def write_store(folder: Path, episodes: list[Episode]) -> None:
    """Append all; synced one by one."""
    with EpisodeStore(folder) as store:
        for episode in episodes:
            store.append(episode)


class Hdf5Reader:
    """One HDF5 file, kept open; one frame per read, decoded if it is a compressed picture.

    Without HDF5's cache of decoded chunks, 8 MB per dataset: it would hold these few episodes but not a large store.
    """

    def __init__(self, folder: Path) -> None:
        file = h5py.File(folder / "images.hdf5", "r", rdcc_nbytes=0)
        self.datasets: list[Any] = [file[f"{index}"] for index in range(len(file))]
        self.encoded = self.datasets[0].ndim == 1

    def episode(self, index: int) -> np.ndarray:
        """All its pictures."""
        rows = self.datasets[index][()]
        return np.stack([decoded(row) for row in rows]) if self.encoded else rows

    def frames(self, episodes: np.ndarray, steps: np.ndarray) -> np.ndarray:
        """Frame by frame."""
        rows = [self.datasets[episode][step] for episode, step in zip(episodes, steps, strict=True)]
        return np.stack([decoded(row) for row in rows] if self.encoded else rows)


def decoded(row: np.ndarray) -> np.ndarray:
    """A picture from its compressed bytes."""
    return np.asarray(Image.open(io.BytesIO(row.tobytes())))


def hdf5(name: str, *, encode: dict[str, Any] | None = None, **options: Any) -> Way:
    """Plain h5py: one frame per chunk with filter ``options``, or compressed pictures by Pillow's ``encode``."""

    def write(folder: Path, episodes: list[Episode]) -> None:
        folder.mkdir(exist_ok=True)
        with h5py.File(folder / "images.hdf5", "w") as file:
            for index, episode in enumerate(episodes):
                images = episode.observations["image"]
                if encode is None:
                    file.create_dataset(f"{index}", data=images, chunks=(1, *images.shape[1:]), **options)
                    continue
                dataset = file.create_dataset(f"{index}", (len(images),), h5py.vlen_dtype(np.uint8))
                for k, image in enumerate(images):
                    buffer = io.BytesIO()
                    Image.fromarray(image).save(buffer, **encode)
                    dataset[k] = np.frombuffer(buffer.getvalue(), np.uint8)

    lossless = encode is None or encode["format"] == "PNG"
    return Way(name, write, Hdf5Reader, lossless)


def library() -> Iterator[Way]:
    """What this library writes."""
    yield Way("EpisodeStore", write_store, StoreReader)


def plain_hdf5() -> Iterator[Way]:
    """Chunks and compressions of HDF5, read with h5py."""
    yield hdf5("h5py, one frame per chunk")
    yield hdf5("h5py, lzf per frame", compression="lzf")
    if importlib.util.find_spec("hdf5plugin"):
        import hdf5plugin

        yield hdf5("h5py, zstd per frame", **hdf5plugin.Zstd(clevel=3))
        yield hdf5("h5py, Blosc LZ4 per frame", **hdf5plugin.Blosc(cname="lz4", clevel=5, shuffle=0))
    yield hdf5("PNG per frame", encode={"format": "PNG", "compress_level": 3})
    yield hdf5("JPEG 95 per frame", encode={"format": "JPEG", "quality": 95})
    yield hdf5("WebP 90 per frame", encode={"format": "WEBP", "quality": 90})


class VideoReader:
    """One mp4 per episode; a random frame is decoded from the key frame before it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def episode(self, index: int) -> np.ndarray:
        """All its pictures."""
        import av

        with av.open(str(self.folder / f"{index}.mp4")) as video:
            return np.stack([frame.to_ndarray(format="rgb24") for frame in video.decode(video=0)])

    def frames(self, episodes: np.ndarray, steps: np.ndarray) -> np.ndarray:
        """One seek each."""
        import av

        found = []
        for episode, step in zip(episodes, steps, strict=True):
            with av.open(str(self.folder / f"{episode}.mp4")) as video:
                stream = video.streams.video[0]
                wanted = int(step / 20 / stream.time_base)
                video.seek(wanted, stream=stream)
                frame = next(frame for frame in video.decode(stream) if frame.pts >= wanted)
                found.append(frame.to_ndarray(format="rgb24"))
        return np.stack(found)


def write_video(folder: Path, episodes: list[Episode]) -> None:
    """H.264 at 20 frames per second, a key frame every other frame, as LeRobot does for its sake of random reads."""
    import av

    folder.mkdir(exist_ok=True)
    for index, episode in enumerate(episodes):
        images = episode.observations["image"]
        with av.open(str(folder / f"{index}.mp4"), "w") as video:
            stream = video.add_stream("libx264", rate=20, options={"g": "2", "crf": "18"})
            stream.height, stream.width = images.shape[1:3]
            stream.pix_fmt = "yuv420p"
            for image in images:
                video.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
            video.mux(stream.encode())


def video() -> Iterator[Way]:
    """Video per episode."""
    if importlib.util.find_spec("av"):
        yield Way("H.264 per episode, PyAV", write_video, VideoReader, lossless=False)


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


WAYS: tuple[Callable[[], Iterator[Way]], ...] = (library, plain_hdf5, video, minari, robomimic)


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
