"""Which episodes of a run are worth looking at, and their pictures as animations that a page can hold."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vla_rl.evaluation import EpisodeOutcome
from vla_rl.runs import Run, frames_file

MAX_FRAMES = 75
"""frames of an animation; longer episodes are thinned evenly"""
MAX_SIZE = 192
"""pixels; larger frames are made smaller"""
STRIP_FRAMES = 6
FRAME_MS = 50


@dataclass(frozen=True)
class Shot:
    """One episode to look at.

    Attributes:
        task: task label.
        when: stage label of the evaluation, or the phase that it was found in.
        why: "first", "shortest success", "failed", or several of these.
        success: whether it succeeded.
        length: steps.
        seed: of its reset, if known.
        frames: uint8 [T, H, W, 3].
    """

    task: str
    when: str
    why: str
    success: bool
    length: int
    seed: int | None
    frames: np.ndarray


def shots(run: Run) -> list[Shot]:
    """First, best (shortest) and failed episodes of every RL task: evaluated before and after, and practised."""
    found: list[Shot] = []
    evaluations = run.evaluations
    for task in dict.fromkeys(name for groups in evaluations.values() if "rl" in groups for name in groups["rl"].tasks):
        for label, groups in evaluations.items():
            path = frames_file(run.path, label, task)
            if not path.is_file() or "rl" not in groups or task not in groups["rl"].tasks:
                continue
            with np.load(path) as archive:
                kept = [archive[name] for name in archive.files]
            played = groups["rl"].tasks[task].episodes[: len(kept)]  # the evaluation keeps the first ones, by seed
            for index, why in picks(played).items():
                e = played[index]
                found.append(Shot(task, label, why, e.success, e.length, e.seed, kept[index]))
        found += _practised(run, task)
    return found


def picks(episodes: Sequence[EpisodeOutcome]) -> dict[int, str]:
    """Index -> why, for the first episode, the success of fewest steps and the first failure."""
    reasons: dict[int, list[str]] = {}
    if episodes:
        reasons.setdefault(0, []).append("first")
    successes = [i for i, episode in enumerate(episodes) if episode.success]
    if successes:
        reasons.setdefault(min(successes, key=lambda i: episodes[i].length), []).append("best")
    failures = [i for i, episode in enumerate(episodes) if not episode.success]
    if failures:
        reasons.setdefault(failures[0], []).append("failed")
    return {i: ", ".join(why) for i, why in sorted(reasons.items())}


def _practised(run: Run, task: str) -> list[Shot]:
    """The shortest success of each stage 1 on a task, from the episodes that it kept."""
    from vla_rl.data import EpisodeStore

    root, found = run.path / "rl_data", []
    for path in sorted(root.iterdir()) if root.is_dir() else ():
        with EpisodeStore(path, mode="r") as store:
            mine = [i for i, info in enumerate(store.index) if info.task == task and info.success]
            if not mine:
                continue
            episode = store[min(mine, key=lambda i: store.index[i].total_steps)]
        key = next((k for k in sorted(episode.observations) if k.startswith("image")), None)
        if key is not None:
            frames = np.asarray(episode.observations[key])
            length = len(episode.actions)
            found.append(Shot(task, f"{path.name}-stage1", "best", True, length, episode.seed, frames))
    return found


def animation(frames: np.ndarray) -> str:
    """An animated WebP as a data URI, thinned to `MAX_FRAMES` and made smaller than `MAX_SIZE`, at the same speed.

    Args:
        frames: uint8 [T, H, W, 3].

    Raises:
        ImportError: Pillow is missing; the error names the extra.
    """
    image_module = _pillow()
    chosen = np.unique(np.linspace(0, len(frames) - 1, min(len(frames), MAX_FRAMES)).round().astype(int))
    pictures = [_fit(image_module.fromarray(frames[i])) for i in chosen]
    duration = [round(FRAME_MS * len(frames) / len(chosen))] * len(pictures)
    duration[-1] = 1200  # rest on the end before it begins again
    file = io.BytesIO()
    options = {"duration": duration, "loop": 0, "quality": 82, "method": 2}
    pictures[0].save(file, "WEBP", save_all=True, append_images=pictures[1:], **options)
    return _uri(file)


def strip(frames: np.ndarray, *, count: int = STRIP_FRAMES) -> str:
    """Frames evenly spaced over the episode side by side, as a data URI.

    Raises:
        ImportError: Pillow is missing; the error names the extra.
    """
    image_module = _pillow()
    chosen = np.linspace(0, len(frames) - 1, count).round().astype(int)
    picture = image_module.fromarray(np.concatenate([frames[i] for i in chosen], axis=1))
    height = min(picture.height, 96)
    picture = picture.resize((round(picture.width * height / picture.height), height))
    file = io.BytesIO()
    picture.save(file, "WEBP", quality=82)
    return _uri(file)


def _fit(picture):
    scale = MAX_SIZE / max(picture.size)
    return picture if scale >= 1 else picture.resize((round(picture.width * scale), round(picture.height * scale)))


def _uri(file: io.BytesIO) -> str:
    return "data:image/webp;base64," + base64.b64encode(file.getvalue()).decode()


def _pillow():
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError('pictures in a report need Pillow; pip install "vla-rl[plot]"') from error
    return Image
