"""Episode stores as LeRobotDataset v3: parquet tables, pictures inside them or in mp4 files, JSON beside them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from vla_rl.data import lerobot_layout as layout
from vla_rl.data.copying import Progress
from vla_rl.data.encoded_frames import encode_frame
from vla_rl.data.episode import Episode
from vla_rl.data.layout import EpisodeInfo
from vla_rl.data.lerobot_layout import episode_columns, feature_name
from vla_rl.data.lerobot_statistics import FeatureStats, array_stats, image_stats, merge_stats
from vla_rl.data.packages import needed
from vla_rl.data.safety import check_group, check_inside
from vla_rl.data.selection import select
from vla_rl.data.store import EpisodeStore
from vla_rl.data.video import VideoWriter
from vla_rl.data.writing import new_folder, require_space, sync_file


def export_lerobot(
    store: EpisodeStore,
    out: str | Path,
    *,
    fps: int = 20,
    video: bool = False,
    crf: int = 18,
    where: str | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Writes a LeRobotDataset v3, which ``LeRobotDataset(name, root=out)`` of lerobot 0.4 and later reads.

    A row per action: ``observation.*``, ``action``, ``next.reward`` (float64), ``next.done``, ``next.success``,
    ``next.terminated``, ``next.truncated``, ``task_id``, ``info.*``; the sentence is LeRobot's *task*. Success, source,
    task, seed, iteration and policy version are columns of ``meta/episodes``, and the observation after the last
    action lies in a file of ours, so that ``import_lerobot`` brings everything back. ``extras`` stay behind.

    Args:
        store: open store.
        out: folder to make.
        fps: steps per second, on which LeRobot's time stamps rest; a store does not know it.
        video: pictures into mp4 files (H.264, 4:2:0: small, and not what they were) instead of PNG in the tables.
        crf: x264's quality of videos, 0 to 51; less is better and larger.
        where: expression that chooses episodes; see ``select``.
        overwrite: replace the data set at ``out``.
        progress: called after every episode.

    Raises:
        ImportError: if pyarrow, pillow or, for videos, PyAV is not installed.
        ValueError: if no episode is chosen, or a video is asked for of pictures with an odd height or width.
        FileExistsError: if ``out`` exists and ``overwrite`` is False.
    """
    out = Path(out).absolute()
    chosen = select(store.index, where)
    if not chosen:
        raise ValueError(f"no episode of '{store.path}' fits {where!r}; nothing was exported")
    if fps < 1 or not 0 <= crf <= 51:
        raise ValueError(f"fps must be at least 1 and crf in [0, 51], got {fps} and {crf}")
    odd = [k for k, (_, shape) in store.step_shapes.items() if k.split("_")[0] == "image" and (shape[0] | shape[1]) % 2]
    if video and odd:
        raise ValueError(f"'{odd[0]}' is {store.step_shapes[odd[0]][1][:2]}, but videos need even sizes; export as PNG")
    with new_folder(out, overwrite=overwrite) as folder:
        writer = _Writer(folder, fps=fps, crf=crf if video else None)
        try:
            for done, index in enumerate(chosen, 1):
                check_inside(store.episode_path(index), store.path)
                with store.open_episode(index) as group:
                    check_group(group)
                require_space(out, store.decoded_bytes(index))
                writer.add(store[index], store.index[index])
                if progress is not None:
                    progress(done, len(chosen))
        finally:
            writer.close()
        writer.write_meta()
        for path in filter(Path.is_file, folder.rglob("*")):
            sync_file(path)
    return out


class _Files:
    """Where the next data go: files are numbered chunk by chunk, and a new one begins once one is large enough."""

    def __init__(self, limit_megabytes: int) -> None:
        self.chunk = self.number = 0
        self._limit = limit_megabytes * 1_000_000

    def names(self) -> dict[str, int]:
        return {"chunk_index": self.chunk, "file_index": self.number}

    def full(self, path: Path) -> bool:
        """Goes on to the next file if ``path``, the current one, is large enough."""
        if not path.exists() or path.stat().st_size < self._limit:  # x264 writes nothing before some frames have come
            return False
        self.chunk, self.number = divmod(self.chunk * layout.FILES_PER_CHUNK + self.number + 1, layout.FILES_PER_CHUNK)
        return True


class _Writer:
    """Files of a data set that grows episode by episode; what it keeps in RAM is a row of numbers per episode."""

    def __init__(self, folder: Path, *, fps: int, crf: int | None) -> None:
        self.pa, self.pq = needed("pyarrow"), needed("pyarrow.parquet")
        self.folder, self.fps, self.crf = folder, fps, crf
        (folder / "meta").mkdir()
        self.features: dict[str, dict[str, Any]] = {}
        self.tasks: dict[str, int] = {}
        self.rows: list[dict[str, Any]] = []
        self.stats: list[dict[str, FeatureStats]] = []
        self.num_frames = 0
        self._data: Any = None
        self._data_files = _Files(layout.DATA_MEGABYTES)
        self._videos: dict[str, VideoWriter] = {}
        self._video_files: dict[str, _Files] = {}
        self._last = h5py.File(folder / layout.LAST, "w")

    def add(self, episode: Episode, info: EpisodeInfo) -> None:
        """Appends an episode."""
        number, steps = len(self.rows), episode.total_steps
        task_index = self.tasks.setdefault(episode.instruction, len(self.tasks))
        images = {feature_name(key): episode.observations[key][:steps] for key in episode.image_keys}
        arrays = episode_columns(episode)
        arrays |= {
            "timestamp": (np.arange(steps) / self.fps).astype(np.float32),
            "frame_index": np.arange(steps),
            "episode_index": np.full(steps, number),
            "index": np.arange(self.num_frames, self.num_frames + steps),
            "task_index": np.full(steps, task_index),
        }
        features = self._describe(images, arrays)
        if number == 0:
            self.features = features
        elif features != self.features:
            raise ValueError(
                f"episode {number} has the features {sorted(features)}, others {sorted(self.features)}, or of other "
                "shapes; export episodes with the same infos together (where=...)"
            )
        row: dict[str, Any] = {"episode_index": number, "tasks": [episode.instruction], "length": steps}
        row |= self._write_rows(images if self.crf is None else {}, arrays)
        for key, pictures in images.items() if self.crf is not None else ():
            row |= self._write_video(key, pictures)
        row |= {"dataset_from_index": self.num_frames, "dataset_to_index": self.num_frames + steps}
        row |= {f"meta/episodes/{key}": 0 for key in ("chunk_index", "file_index")}
        row |= {key: getattr(info, key) for key in layout.ATTRIBUTES}
        stats = {key: image_stats(pictures) for key, pictures in images.items()}
        stats |= {key: array_stats(array) for key, array in arrays.items()}
        row |= {f"stats/{key}/{name}": value.tolist() for key, part in stats.items() for name, value in part.items()}
        self._write_last(number, episode)
        self.rows.append(row)
        self.stats.append(stats)
        self.num_frames += steps

    def _describe(self, images: dict[str, np.ndarray], arrays: dict[str, np.ndarray]) -> dict[str, dict[str, Any]]:
        """LeRobot's ``features``."""
        features: dict[str, dict[str, Any]] = {}
        for key, pictures in images.items():
            names = ["height", "width", "channels"]
            features[key] = {
                "dtype": "image" if self.crf is None else "video", "shape": list(pictures.shape[1:]), "names": names
            }  # fmt: skip
            if self.crf is not None:
                height, width = pictures.shape[1:3]
                facts = {"height": height, "width": width, "codec": "h264", "pix_fmt": "yuv420p", "fps": self.fps}
                facts |= {"channels": 3, "is_depth_map": False}
                features[key]["info"] = {f"video.{name}": fact for name, fact in facts.items()} | {"has_audio": False}
        for key, array in arrays.items():
            shape = list(array.shape[1:]) or [1]
            names = [f"{key.split('.')[-1]}_{k}" for k in range(shape[0])] if array.ndim == 2 else None
            features[key] = {"dtype": array.dtype.name, "shape": shape, "names": names}
        return features

    def _write_rows(self, images: dict[str, np.ndarray], arrays: dict[str, np.ndarray]) -> dict[str, int]:
        columns = {key: self._png_column(pictures) for key, pictures in images.items()}
        columns |= {key: self._column(array) for key, array in arrays.items()}
        table, place = self.pa.table(columns), self._data_files.names()
        path = self.folder / layout.DATA.format(**place)
        if self._data is None:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._data = self.pq.ParquetWriter(path, table.schema, compression="snappy")
        self._data.write_table(table)
        if self._data_files.full(path):
            self._data.close()
            self._data = None
        return {f"data/{key}": value for key, value in place.items()}

    def _png_column(self, pictures: np.ndarray) -> Any:
        cells = [
            {"bytes": encode_frame(picture, "PNG"), "path": f"frame-{k:06d}.png"} for k, picture in enumerate(pictures)
        ]
        return self.pa.array(cells, self.pa.struct([("bytes", self.pa.binary()), ("path", self.pa.string())]))

    def _column(self, array: np.ndarray) -> Any:
        """Numbers as such, vectors as lists of fixed size, more dimensions as lists of lists."""
        column = self.pa.array(np.ascontiguousarray(array).reshape(-1))
        if array.ndim == 2 and array.shape[1] > 1:
            return self.pa.FixedSizeListArray.from_arrays(column, array.shape[1])
        if array.ndim > 2:
            for size in reversed(array.shape[1:]):
                offsets = np.arange(0, len(column) + 1, size, dtype=np.int32)
                column = self.pa.ListArray.from_arrays(offsets, column)
        return column

    def _write_video(self, key: str, pictures: np.ndarray) -> dict[str, Any]:
        files = self._video_files.setdefault(key, _Files(layout.VIDEO_MEGABYTES))
        place = files.names()
        path = self.folder / layout.VIDEO.format(video_key=key, **place)
        if key not in self._videos:
            height, width = pictures.shape[1:3]
            assert self.crf is not None
            self._videos[key] = VideoWriter(path, height=height, width=width, fps=self.fps, crf=self.crf)
        video = self._videos[key]
        first = video.num_frames
        video.add(pictures)
        row = {f"videos/{key}/{name}": value for name, value in place.items()}
        row |= {
            f"videos/{key}/from_timestamp": first / self.fps, f"videos/{key}/to_timestamp": video.num_frames / self.fps
        }  # fmt: skip
        if files.full(path):
            self._videos.pop(key).close()
        return row

    def _write_last(self, number: int, episode: Episode) -> None:
        group = self._last.create_group(f"episode_{number}")
        group.attrs["total_steps"] = episode.total_steps
        for key, array in episode.observations.items():
            if key in episode.image_keys:
                group[f"images/{key}"] = np.frombuffer(encode_frame(array[-1], "PNG"), dtype=np.uint8)
            else:
                group[f"observations/{key}"] = array[-1:]
        for key, array in episode.infos.items():
            group[f"infos/{key}"] = array[-1:]

    def close(self) -> None:
        """Ends tables and videos."""
        if self._data is not None:
            self._data.close()
        for video in self._videos.values():
            video.close()
        self._last.close()

    def write_meta(self) -> None:
        """Writes what is known once all episodes are there."""
        pa, meta = self.pa, self.folder / "meta"
        path = self.folder / layout.EPISODES.format(chunk_index=0, file_index=0)
        path.parent.mkdir(parents=True)
        names = {"source": pa.string(), "task": pa.string(), "seed": pa.int64(), "policy_version": pa.string()}
        columns = {key: pa.array([row[key] for row in self.rows], names.get(key)) for key in self.rows[0]}
        self.pq.write_table(pa.table(columns), path)
        tasks = pa.table({"task_index": pa.array(list(self.tasks.values())), "task": pa.array(list(self.tasks))})
        self.pq.write_table(tasks.replace_schema_metadata({"pandas": json.dumps(_PANDAS)}), self.folder / layout.TASKS)
        stats = {key: merge_stats([part[key] for part in self.stats]) for key in self.stats[0]}
        plain = {key: {name: value.tolist() for name, value in part.items()} for key, part in stats.items()}
        (meta / "stats.json").write_text(json.dumps(plain, indent=4), encoding="utf-8")
        info = {
            "codebase_version": layout.VERSION,
            "robot_type": None,
            "total_episodes": len(self.rows),
            "total_frames": self.num_frames,
            "total_tasks": len(self.tasks),
            "chunks_size": layout.FILES_PER_CHUNK,
            "data_files_size_in_mb": layout.DATA_MEGABYTES,
            "video_files_size_in_mb": layout.VIDEO_MEGABYTES,
            "fps": self.fps,
            "splits": {"train": f"0:{len(self.rows)}"},
            "data_path": layout.DATA,
            "video_path": None if self.crf is None else layout.VIDEO,
            "features": self.features,
        }
        (meta / "info.json").write_text(json.dumps(info, indent=4), encoding="utf-8")


_PANDAS = {
    "index_columns": ["task"],
    "column_indexes": [],
    "columns": [
        {"name": name, "field_name": name, "pandas_type": kind, "numpy_type": numpy_type, "metadata": None}
        for name, kind, numpy_type in (("task_index", "int64", "int64"), ("task", "unicode", "object"))
    ],
}
"""What makes the sentence the index of ``tasks.parquet`` when pandas reads it, as LeRobot does."""
