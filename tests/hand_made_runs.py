"""Runs on disk made by hand, for the tests of what reads them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from vla_rl.evaluation import EpisodeOutcome, EvaluationResult, TaskResult


def outcome(successes: str, *, lengths: list[int] | None = None, first_seed: int = 10_000) -> TaskResult:
    """One episode per letter: "s" succeeded, "-" did not."""
    episodes = [
        EpisodeOutcome(first_seed + i, letter == "s", lengths[i] if lengths else 20, float(letter == "s"))
        for i, letter in enumerate(successes)
    ]
    return TaskResult(tuple(episodes))


def evaluation(**tasks: str) -> dict[str, Any]:
    """`results.json`'s entry for one group."""
    return EvaluationResult({name.replace("_", "-"): outcome(letters) for name, letters in tasks.items()}).to_dict()


def write_run(path: Path, results: dict[str, Any], *, metrics: list[dict] = (), **files: dict[str, Any]) -> Path:
    """Write a run's directory; `files` are further JSON files, such as `config` or `experiment`."""
    path.mkdir(parents=True)
    contents = {"state": {"done": [], "checkpoint": None, "files": {}}, "config": {"seed": 0}} | files
    for name, content in (contents | {"results": results}).items():
        (path / f"{name}.json").write_text(json.dumps(content))
    (path / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in metrics))
    return path


def frames(colour: tuple[int, int, int], count: int, *, size: int = 32) -> np.ndarray:
    """Pictures of one colour with a white line that moves down, uint8 [count, size, size, 3]."""
    pictures = np.tile(np.array(colour, np.uint8), (count, size, size, 1))
    pictures[np.arange(count), np.arange(count) % size] = 255
    return pictures
