"""Names, places and types that writing and reading LeRobotDataset v3 share (https://github.com/huggingface/lerobot)."""

from __future__ import annotations

import numpy as np

from vla_rl._cameras import camera_name
from vla_rl.data.episode import Episode

VERSION = "v3.0"
INFO = "meta/info.json"
STATS = "meta/stats.json"
TASKS = "meta/tasks.parquet"
EPISODES = "meta/episodes/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
DATA = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
VIDEO = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
LAST = "meta/vla_rl.hdf5"
"""What a row per action has no room for: the observation after the last one. LeRobot does not read this file."""

FILES_PER_CHUNK = 1000
DATA_MEGABYTES = 100
VIDEO_MEGABYTES = 200

COUNTERS = ("timestamp", "frame_index", "episode_index", "index", "task_index")
ATTRIBUTES = ("success", "source", "task", "seed", "iteration", "policy_version")
"""Columns that we add to ``meta/episodes``; LeRobot shows them in ``dataset.meta.episodes``."""


def feature_name(key: str) -> str:
    """LeRobot's name of an observation: ``image_front`` becomes ``observation.images.front``."""
    if key == "task_id":
        return key
    if key.startswith("image_"):
        return f"observation.images.{key.removeprefix('image_')}"
    return f"observation.{key}"


def observation_name(feature: str) -> str | None:
    """The opposite of ``feature_name``; None for features that are no observations."""
    if feature == "task_id":
        return feature
    if not feature.startswith("observation."):
        return None
    key = feature.removeprefix("observation.")
    for prefix in ("images.", "image."):
        if key.startswith(prefix):
            return camera_name(key.removeprefix(prefix))
    return key


def episode_columns(episode: Episode) -> dict[str, np.ndarray]:
    """Everything of an episode but its pictures, one entry per action, by LeRobot's names.

    Raises:
        ValueError: if two arrays would get one name.
    """
    steps = episode.total_steps
    pairs = [
        (feature_name(key), array[:steps])
        for key, array in episode.observations.items()
        if key not in episode.image_keys
    ]
    pairs += [(f"info.{key}", array[:steps]) for key, array in episode.infos.items()]
    solved = episode.infos.get("success")
    if solved is not None and solved.ndim == 1:
        success = solved[1:] != 0
    else:
        success = (np.arange(steps) == steps - 1) & episode.success
    pairs += [
        ("action", episode.actions),
        ("next.reward", episode.rewards),
        ("next.done", episode.terminations | episode.truncations),
        ("next.success", success),
        ("next.terminated", episode.terminations),
        ("next.truncated", episode.truncations),
    ]
    arrays = {name: array for name, array in pairs if array.size}
    names = [name for name, _ in pairs] + [feature_name(key) for key in episode.image_keys]
    twice = sorted({name for name in names if names.count(name) > 1 or "/" in name})
    if twice:
        raise ValueError(
            f"'{twice[0]}' would be the name of two features, or has a slash in it; rename the observation"
        )
    return arrays
