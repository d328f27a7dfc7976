"""LeRobotDataset v3 from anyone as episode stores; nothing in its files is believed before it is checked."""

from __future__ import annotations

import math
import re
from collections.abc import Generator
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from vla_rl.data import lerobot_layout as layout
from vla_rl.data.copying import Progress
from vla_rl.data.encoded_frames import decode_frames
from vla_rl.data.foreign import MAX_TEXT, Arrays, Labels, Render, read_json
from vla_rl.data.importing import Found, write_store
from vla_rl.data.layout import get_group, read_arrays
from vla_rl.data.lerobot_layout import observation_name
from vla_rl.data.parquet import Table, column_values, open_table
from vla_rl.data.safety import UnsafeFileError, check_group, check_inside
from vla_rl.data.store import EpisodeStore
from vla_rl.data.video import read_video

_NUMBER_TYPES = {"bool", *(f"{kind}{bits}" for kind in ("int", "uint") for bits in (8, 16, 32, 64))} | {
    "float16", "float32", "float64"
}  # fmt: skip
_REWARDS = ("next.reward", "reward", "rewards")


def import_lerobot(
    path: str | Path,
    out: str | Path,
    *,
    labels: Labels | None = None,
    render: Render | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> EpisodeStore:
    """Writes a store of the episodes of a LeRobotDataset v3.

    What ``export_lerobot`` wrote comes back as it was, pictures too unless they went into videos. In other data sets
    the last observation is the one of the last action again, missing rewards are 0, an episode whose last ``next.done``
    is not true is truncated there, and each sentence is a task of its own unless ``labels`` name one.

    Args:
        path: folder of the data set.
        out: folder of the new store.
        labels: what the episodes do not say of themselves; see ``Labels``.
        render: draws the pictures where a data set has states only.
        overwrite: replace what is at ``out``.
        progress: called after every episode.

    Raises:
        ImportError: if pyarrow, pillow or, for videos, PyAV is not installed.
        FileNotFoundError: if there is no data set, or a file of it is missing.
        UnsafeFileError: if a path leaves the data set, or a file claims sizes that it does not hold.
        ValueError: if it is of another version, or something is missing or does not fit.
        FileExistsError: if ``out`` exists and ``overwrite`` is False.
    """
    source, labels = _Source(Path(path)), labels or Labels()

    def episodes() -> Generator[Found]:
        for number in range(source.num_episodes):
            arrays, attributes = source.read(number)
            task = attributes["instruction"] or Path(path).resolve().name
            yield Found(arrays, attributes, labels, task, f"'{path}': episode {number}")

    return write_store(
        Path(out).absolute(),
        episodes(),
        total=source.num_episodes,
        render=render,
        overwrite=overwrite,
        progress=progress,
    )


class _Source:
    """A data set to read: its checked description, and the tables of its episodes and sentences."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._read_info()
        self.sentences = self._read_tasks()
        self.episodes = self._read_episodes()
        self.num_episodes = len(self.episodes)
        self._table: tuple[Path, Table] | None = None

    def _read_info(self) -> None:
        path = self.root / layout.INFO
        if not path.is_file():
            raise FileNotFoundError(
                f"no LeRobot data set at '{self.root}': '{layout.INFO}' is missing; fetch one with "
                "`hf download --repo-type dataset <id> --local-dir <folder>` and give that folder"
            )
        info = read_json(path, self.root)
        try:
            version = str(info["codebase_version"])
            if not version.startswith("v3."):
                raise ValueError(f"its version is {version[:20]}, only v3 can be imported; LeRobot converts older ones")
            self.fps = float(info["fps"])
            if not (math.isfinite(self.fps) and self.fps > 0):
                raise ValueError(f"fps is {self.fps}")
            self.data_path, self.video_path = info["data_path"], info.get("video_path")
            self.shapes: dict[str, tuple[int, ...]] = {}
            self.types: dict[str, str] = {}
            for key, feature in info["features"].items():
                shape = tuple(feature["shape"])
                if not all(type(size) is int and 0 < size < 1 << 31 for size in shape) or len(shape) > 5 or "/" in key:
                    raise ValueError(f"feature {key[:100]!r} has the shape {str(shape)[:100]}")
                self.shapes[key], self.types[key] = shape, str(feature["dtype"])
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
            raise ValueError(f"'{path}' is not that of a LeRobot data set v3: {error!s}") from error
        self.numbers = [key for key, kind in self.types.items() if kind in _NUMBER_TYPES]
        self.images = [key for key, kind in self.types.items() if kind == "image"]
        self.videos = [key for key, kind in self.types.items() if kind == "video"]

    def _read_tasks(self) -> dict[int, str]:
        table = open_table(self.root / layout.TASKS, self.root, row_bytes=8)
        text = next((name for name in ("task", "__index_level_0__") if name in table.names), "task")
        columns = table.read_all(["task_index", text])
        return {int(number): _text(name) for number, name in zip(columns["task_index"], columns[text], strict=True)}

    def _read_episodes(self) -> list[dict[str, Any]]:
        """Rows of ``meta/episodes``, of the columns needed, sorted by number."""
        rows: list[dict[str, Any]] = []
        paths = sorted((self.root / "meta" / "episodes").glob("*/*.parquet"))
        if not paths:
            raise FileNotFoundError(f"'{self.root}' has no table 'meta/episodes/*/*.parquet'; fetch it again")
        wanted = ["episode_index", "length", "data/chunk_index", "data/file_index"]
        for key in self.videos:
            wanted += [f"videos/{key}/{name}" for name in ("chunk_index", "file_index", "from_timestamp")]
        for path in paths:
            table = open_table(path, self.root, row_bytes=16 * len(wanted))
            columns = table.read_all(wanted + [key for key in layout.ATTRIBUTES if key in table.names])
            rows += [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        rows.sort(key=lambda row: row["episode_index"])
        if not rows or [row["episode_index"] for row in rows] != list(range(len(rows))):
            raise ValueError(f"the episodes of '{self.root}' are not numbered 0, 1, 2 ... in 'meta/episodes'")
        return rows

    def read(self, number: int) -> tuple[Arrays, dict[str, Any]]:
        """Arrays of an episode by the names that ``assemble`` knows, and what it says of itself."""
        row = self.episodes[number]
        path = self._file(self.data_path, row, "data")
        if self._table is None or self._table[0] != path:
            row_bytes = 8 * sum(math.prod(self.shapes[key]) for key in self.numbers) + 16 * len(self.images)
            self._table = (path, open_table(path, self.root, row_bytes=row_bytes))
        table = self._table[1]
        missing = [key for key in self.numbers + self.images if key not in table.names]
        if missing or "action" not in self.numbers:
            raise ValueError(f"'{path}' has no column '{(missing or ['action'])[0]}', though every episode needs it")
        columns = table.read_episode(number, [*self.numbers, *self.images])
        steps = columns.num_rows
        if steps != row["length"] or steps < 1:
            raise ValueError(f"episode {number} has {steps} rows in '{path}', but 'meta/episodes' says {row['length']}")
        values = {key: column_values(columns, key, self.shapes[key]) for key in self.numbers}
        pictures = {key: decode_frames(column_values(columns, key, None), f"'{path}': '{key}'") for key in self.images}
        for key in self.videos:
            pictures[key] = self._read_video(key, row, values["timestamp"])
        attributes = _attributes(row)
        attributes["instruction"] = self.sentences.get(int(values["task_index"].reshape(-1)[0]), "")
        return self._arrays(values, pictures, *self._read_last(number, steps)), attributes

    def _read_video(self, key: str, row: dict[str, Any], timestamps: np.ndarray) -> np.ndarray:
        path = self._file(self.video_path, row, f"videos/{key}", video_key=key)
        shape = self.shapes[key]
        if len(shape) != 3 or 3 not in (shape[0], shape[2]):
            raise ValueError(f"'{key}' has frames of shape {shape}, expected [H, W, 3] or [3, H, W]")
        height, width = shape[:2] if shape[2] == 3 else shape[1:]
        times = float(row[f"videos/{key}/from_timestamp"]) + timestamps.reshape(-1).astype(np.float64)
        return read_video(path, times, height=height, width=width, tolerance=0.5 / self.fps)

    def _file(self, template: Any, row: dict[str, Any], prefix: str, **names: str) -> Path:
        """The file that a template and the numbers of an episode name, which must lie in the data set.

        The template comes with the data set: only plain fields are filled in, where ``str.format`` could do more.
        """
        if not isinstance(template, str) or len(template) > 1000:
            raise ValueError(f"'{self.root / layout.INFO}' names no files of '{prefix.split('/')[0]}'")
        fields = {name: row[f"{prefix}/{name}"] for name in ("chunk_index", "file_index")} | names

        def fill(match: re.Match[str]) -> str:
            value = fields.get(match[1])
            if value is None:
                raise ValueError(f"'{self.root / layout.INFO}': no number '{match[1]}' is known for '{template}'")
            return f"{int(value):0{int(match[2] or 0)}d}" if match[1] in ("chunk_index", "file_index") else str(value)

        path = self.root / re.sub(r"\{(\w{1,20})(?::0?(\d)d)?\}", fill, template)
        check_inside(path, self.root)
        if not path.is_file():
            raise FileNotFoundError(f"'{path}' of the data set is missing; fetch it again")
        return path

    def _read_last(self, number: int, steps: int) -> tuple[dict[str, Arrays], bool]:
        """Observations and infos after the last action, each with one row, where ``export_lerobot`` left them.

        Where it left none of this episode, those of another, which tell the shapes alone, and False.
        """
        path = self.root / layout.LAST
        if not path.is_file():
            return {}, False
        check_inside(path, self.root)
        with h5py.File(path, "r") as file:
            names = [name for name in map(str, file) if isinstance(file.get(name, getlink=True), h5py.HardLink)]
            name = f"episode_{number}"
            if not names:
                return {}, False
            group = get_group(file, name if name in names else names[0])
            check_group(group)
            fits = name in names and group.attrs.get("total_steps") == steps
            parts = {
                part: read_arrays(get_group(group, part)) if part in group else {}
                for part in ("images", "observations", "infos")
            }
        images = {key: decode_frames([array.tobytes()], f"'{path}': '{key}'") for key, array in parts["images"].items()}
        return {"observations": parts["observations"] | images, "infos": parts["infos"]}, fits

    def _arrays(self, values: Arrays, pictures: Arrays, last: dict[str, Arrays], fits: bool) -> Arrays:
        """All arrays as ``assemble`` names them, observations and infos with their last row."""
        steps = len(values["action"])
        final = np.arange(steps) == steps - 1
        done = values.get("next.done", np.zeros(steps)).reshape(steps, -1)[:, 0] != 0
        arrays: Arrays = {
            "actions": values["action"].reshape(steps, -1),
            "terminations": final & done,
            "truncations": final & ~done,
        }
        reward = next((values[key] for key in _REWARDS if key in values), np.zeros(steps))
        arrays["rewards"] = reward.reshape(steps, -1)[:, 0]
        for key, name in (("next.terminated", "terminations"), ("next.truncated", "truncations")):
            if key in values:
                arrays[name] = values[key].reshape(steps, -1)[:, 0] != 0
        for feature, array in [*values.items(), *pictures.items()]:
            key = observation_name(feature)
            if (feature == "task_id" or feature.startswith("info.")) and array.shape[1:] == (1,):
                array = array[:, 0]  # LeRobot has no numbers, only lists of one
            if f"observations/{key}" in arrays:
                raise ValueError(
                    f"'{self.root}': two features would both be the observation {key!r}; rename {feature!r}"
                )
            if key is not None:
                arrays[f"observations/{key}"] = _with_last(array, last.get("observations", {}).get(key), fits)
            elif feature.startswith("info."):
                key = feature.removeprefix("info.")
                arrays[f"infos/{key}"] = _with_last(array, last.get("infos", {}).get(key), fits)
        if "next.success" in values and "infos/success" not in arrays:
            solved = values["next.success"].reshape(steps, -1)[:, 0] != 0
            arrays["infos/success"] = np.concatenate([[False], solved])
        return arrays


def _with_last(array: np.ndarray, last: np.ndarray | None, fits: bool) -> np.ndarray:
    """``[T+1, ...]`` out of ``[T, ...]``: shaped as the row kept for it, with that row or else the last again."""
    if last is not None and last.shape[:1] == (1,) and last.size == array[0].size and last.dtype == array.dtype:
        array = array.reshape(len(array), *last.shape[1:])
        if fits:
            return np.concatenate([array, last])
    return np.concatenate([array, array[-1:]])


def _attributes(row: dict[str, Any]) -> dict[str, Any]:
    """What an episode says of itself, those of the wrong type left out."""
    types = {"success": bool, "source": str, "task": str, "seed": int, "iteration": int, "policy_version": str}
    return {
        key: _text(row[key]) if kind is str else row[key]
        for key, kind in types.items()
        if type(row.get(key)) is kind and row[key] != ""
    }


def _text(value: Any) -> str:
    if not isinstance(value, str) or len(value) > MAX_TEXT:
        raise UnsafeFileError(f"expected a text of up to {MAX_TEXT:,} characters, got {str(value)[:40]!r}; refused")
    return value
