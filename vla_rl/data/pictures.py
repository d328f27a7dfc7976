"""Episodes to look at: videos and contact sheets with instruction, actions and success drawn in."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vla_rl.data.copying import Progress
from vla_rl.data.episode import Episode
from vla_rl.data.store import EpisodeStore
from vla_rl.data.writing import new_file

VIDEO_SUFFIXES = (".mp4", ".gif")
SHEET_SUFFIXES = (".png", ".jpg")

_BACKGROUND, _TEXT, _DIM, _GRID = (24, 26, 30), (235, 235, 235), (150, 155, 165), (70, 75, 85)
_BAR, _SUCCESS, _FAILURE = (95, 160, 240), (70, 190, 100), (215, 80, 70)
_BAR_HEIGHT, _LINE = 44, 17
_HOLD_SECONDS = 0.8


def play(
    store: EpisodeStore,
    out: str | Path,
    episodes: Sequence[int],
    *,
    height: int = 256,
    fps: float = 20,
    columns: int = 8,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Writes a video (``.mp4``, ``.gif``) of episodes one after the other, or a contact sheet (``.png``, ``.jpg``).

    Cameras stand side by side. Below them are the instruction, one bar per action dimension (up is positive, the frame
    of the bars is 1 or the episode's largest action) and whether the task was solved: at the step where
    ``infos["success"]`` turns true, else at the end. A sheet has a row per episode, its frames evenly spaced.

    Args:
        store: open store.
        out: file to write; its suffix decides the kind.
        episodes: their numbers, in the order shown.
        height: of a camera picture, in pixels.
        fps: frames per second of a video.
        columns: frames per row of a sheet.
        overwrite: replace the file at ``out``.
        progress: called after every episode.

    Returns:
        The path written.

    Raises:
        ImportError: if pillow or, for videos, imageio is not installed.
        ValueError: if the suffix is another one, or no episode is given.
        IndexError: if there is no such episode.
        FileExistsError: if ``out`` exists and ``overwrite`` is False.
    """
    out = Path(out)
    suffix = out.suffix.lower()
    if suffix not in VIDEO_SUFFIXES + SHEET_SUFFIXES:
        raise ValueError(f"'{out}' should end in {', '.join(VIDEO_SUFFIXES)} (video) or .png, .jpg (contact sheet)")
    if not len(episodes):
        raise ValueError("no episodes to show; `vla-rl data ls` lists what the store holds")
    if height < 16 or columns < 1 or fps <= 0:
        raise ValueError(f"height >= 16, columns >= 1 and fps > 0 are needed, got {height}, {columns} and {fps}")
    pillow, _ = _pillow()
    with new_file(out, overwrite=overwrite) as temporary:
        if suffix in SHEET_SUFFIXES:
            rows = []
            for done, index in enumerate(episodes, 1):
                rows.append(_sheet_row(store[index], index, height=height, columns=columns))
                _report(progress, done, len(episodes))
            width = max(row.shape[1] for row in rows)
            rows = [np.pad(row, ((0, 0), (0, width - row.shape[1]), (0, 0))) for row in rows]
            pillow.fromarray(np.concatenate(rows)).save(temporary)
        else:
            with _video_writer(temporary, fps) as writer:
                for done, index in enumerate(episodes, 1):
                    for frame in _video_frames(store[index], index, height=height, hold=round(_HOLD_SECONDS * fps)):
                        writer.append_data(frame)
                    _report(progress, done, len(episodes))
    return out


def _report(progress: Progress | None, done: int, total: int) -> None:
    if progress is not None:
        progress(done, total)


def _pillow() -> tuple[Any, Any]:
    try:
        from PIL import Image, ImageDraw
    except ImportError as error:
        raise ImportError('drawing episodes needs pillow; install it with pip install "vla-rl[plot]"') from error
    return Image, ImageDraw


def _video_writer(path: Path, fps: float) -> Any:
    try:
        import imageio.v2 as imageio
    except ImportError as error:
        raise ImportError('videos need imageio; install it with pip install "vla-rl[plot]"') from error
    if path.suffix.lower() == ".gif":
        return imageio.get_writer(path, mode="I", duration=1000 / fps, loop=0)
    try:
        return imageio.get_writer(path, fps=fps, macro_block_size=2, quality=8)
    except (ImportError, ValueError) as error:
        raise ImportError('.mp4 needs imageio-ffmpeg; pip install "vla-rl[plot]", or write a .gif') from error


def _solved_from(episode: Episode) -> int | None:
    """The first observation at which the task counts as solved, or None."""
    if not episode.success:
        return None
    solved = episode.infos.get("success")
    if solved is not None and solved.ndim == 1 and np.any(solved):
        return int(np.argmax(solved != 0))
    return episode.total_steps


def _view(episode: Episode, step: int, height: int) -> np.ndarray:
    """The cameras' pictures of one observation side by side, uint8 ``[height, W, 3]``."""
    pillow, _ = _pillow()
    views = []
    for key in episode.image_keys:
        image = episode.observations[key][step]
        width = max(1, round(image.shape[1] * height / max(1, image.shape[0])))
        filtering = pillow.Resampling.NEAREST if height >= 2 * image.shape[0] else pillow.Resampling.LANCZOS
        views.append(np.asarray(pillow.fromarray(image).resize((width, height), filtering)))
    return np.concatenate(views, axis=1)


def _bars(episode: Episode, step: int, width: int) -> np.ndarray:
    """The action chosen at one observation as bars, uint8 ``[44, width, 3]``; empty after the last action."""
    pillow, drawing = _pillow()
    picture = pillow.new("RGB", (width, _BAR_HEIGHT), _BACKGROUND)
    draw = drawing.Draw(picture)
    size = episode.actions.shape[1]
    scale = max(1.0, float(np.abs(episode.actions).max(initial=0)))
    middle, reach = _BAR_HEIGHT / 2, _BAR_HEIGHT / 2 - 4
    slot = (width - 8) / max(1, size)
    draw.line((4, middle, width - 4, middle), fill=_GRID)
    for k in range(size):
        left, right = 4 + k * slot + slot * 0.15, 4 + (k + 1) * slot - slot * 0.15
        draw.rectangle((left, middle - reach, max(left, right), middle + reach), outline=_GRID)
        if step < episode.total_steps:
            tip = middle - reach * float(episode.actions[step, k]) / scale
            draw.rectangle((left, min(tip, middle), max(left, right), max(tip, middle)), fill=_BAR)
    return np.asarray(picture)


def _caption(lines: Sequence[tuple[str, tuple[int, int, int]]], width: int) -> np.ndarray:
    pillow, drawing = _pillow()
    picture = pillow.new("RGB", (width, _LINE * len(lines) + 6), _BACKGROUND)
    draw = drawing.Draw(picture)
    for number, (text, colour) in enumerate(lines):
        draw.text((5, 3 + _LINE * number), text, fill=colour, font=_font())
    return np.asarray(picture)


def _font() -> Any:
    from PIL import ImageFont

    return ImageFont.load_default(size=13)


def _wrapped(text: str, width: int, lines: int) -> list[str]:
    return textwrap.wrap(text, max(8, width // 7), max_lines=lines, placeholder=" ...") or [""]


def _verdict(episode: Episode, step: int) -> tuple[str, tuple[int, int, int]]:
    solved = _solved_from(episode)
    if solved is not None and step >= solved:
        return "success", _SUCCESS
    if step >= episode.total_steps:
        return "not solved", _FAILURE
    return "", _DIM


def _video_frames(episode: Episode, index: int, *, height: int, hold: int) -> Iterator[np.ndarray]:
    for step in range(episode.total_steps + 1):
        view = _view(episode, step, height)
        width = view.shape[1]
        verdict, colour = _verdict(episode, step)
        wrapped = _wrapped(episode.instruction, width, 2)
        lines = [(line, _TEXT) for line in wrapped] + [("", _TEXT)] * (2 - len(wrapped))
        lines += [
            (f"{episode.task} · {episode.source} · episode {index}", _DIM),
            (f"step {step}/{episode.total_steps}  {verdict}", colour if verdict else _DIM),
        ]
        view = view.copy()
        if verdict:
            view[:3] = view[-3:] = view[:, :3] = view[:, -3:] = colour
        frame = np.concatenate([view, _bars(episode, step, width), _caption(lines, width)])
        frame = np.pad(frame, ((0, frame.shape[0] % 2), (0, frame.shape[1] % 2), (0, 0)))
        yield from [frame] * (1 + hold if step == episode.total_steps else 1)


def _sheet_row(episode: Episode, index: int, *, height: int, columns: int) -> np.ndarray:
    steps = np.unique(np.linspace(0, episode.total_steps, columns).round().astype(int))
    cells = []
    for step in steps:
        view = _view(episode, step, height).copy()
        verdict, colour = _verdict(episode, step)
        if verdict:
            view[:3] = view[-3:] = view[:, :3] = view[:, -3:] = colour
        label = _caption([(f"{step}/{episode.total_steps} {verdict}", colour if verdict else _DIM)], view.shape[1])
        cells.append(
            np.pad(np.concatenate([view, _bars(episode, step, view.shape[1]), label]), ((0, 0), (0, 2), (0, 0)))
        )
    width = cells[0].shape[1] * columns
    row = np.concatenate(cells, axis=1)
    row = np.pad(row, ((0, 0), (0, width - row.shape[1]), (0, 0)))
    outcome = ("success", _SUCCESS) if episode.success else ("not solved", _FAILURE)
    title = f"{index}: {episode.instruction}"
    details = f"{episode.task} · {episode.source} · {episode.total_steps} steps · return {episode.return_:.3g} · "
    head = _caption([(_wrapped(title, width, 1)[0], _TEXT), (details + outcome[0], outcome[1])], width)
    return np.concatenate([head, row, np.zeros((6, width, 3), np.uint8)])
