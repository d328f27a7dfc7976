"""A run read back from its directory, finished or not, without writing to it: what the reports are made of."""

from __future__ import annotations

import difflib
import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

from vla_rl.evaluation import EvaluationResult, standing_labels
from vla_rl.saved_files import read_object

GROUPS = {"expert": "expert tasks", "rl": "RL tasks", "unseen": "unseen tasks"}
EXPERIMENT_FILE = "experiment.json"
"""Beside a run's own files: command, notes, versions and the whole `ExperimentConfig` that it was started with."""


@dataclass(frozen=True)
class Run:
    """The files of one run.

    Attributes:
        path: its directory.
        results: `results.json`: evaluations, summaries of stage 1, guards, seconds.
        metrics: the lines of `metrics.jsonl`; what a resumed phase logged again counts once.
        state: `state.json`: finished phases and the checkpoint to continue from.
        config: `config.json`: the `IterativeConfig`.
        experiment: `experiment.json`; empty for a run that was started from Python.
        start: `start.json`: tasks and data that it began with; empty for a run of an earlier version.
    """

    path: Path
    results: dict[str, Any]
    metrics: list[dict[str, Any]]
    state: dict[str, Any]
    config: dict[str, Any]
    experiment: dict[str, Any] = field(default_factory=dict)
    start: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Last part of the path."""
        return self.path.resolve().name

    @property
    def finished(self) -> bool:
        """Whether the run reached its end, rather than going on or having been broken off."""
        return "total" in self.results.get("seconds", {}) or self._last_phase in self.state.get("done", [])

    @property
    def _last_phase(self) -> str | None:
        """Name of the phase that ends this run, where its files tell."""
        if "rl_tasks" not in self.start:
            return None
        tasks, mode = len(self.start["rl_tasks"]), self.config.get("stage1_mode")
        name = f"task{tasks - 1}-round{self.config.get('rounds', 1) - 1}"
        if tasks and self.config.get("stage2_data") != "none" and self.config.get("stage2", {}).get("steps") != 0:
            return f"{name}-eval2"
        return (
            {"none": "eval-stage0", "collect": f"{name}-stage1"}.get(str(mode), f"{name}-eval1")
            if tasks
            else "eval-stage0"
        )

    @property
    def evaluations(self) -> dict[str, dict[str, EvaluationResult]]:
        """Stage label -> group -> result, in the order of the run."""
        return evaluations(self.results)

    @property
    def guards(self) -> list[dict[str, Any]] | None:
        """What the guards raised, or None where the run kept no record of them."""
        return self.results.get("guards")

    @property
    def method(self) -> str:
        """The method of `vla-rl train`, or how stage 1 was run where that is not known."""
        known = self.experiment.get("config", {}).get("method")
        return known or f"stage 1: {self.config.get('stage1_mode', 'unknown')}"

    @property
    def resume_command(self) -> str:
        """What continues this run: a command, or a line of Python where it was started from Python."""
        if not self.experiment:
            return f'IterativeTrainer.resume("{self.path}", policy=..., expert=..., rl_tasks=..., make_envs=...).run()'
        return f"vla-rl train --resume {shlex.quote(str(self.path))}"


def read_run(path: str | Path) -> Run:
    """Read what there is of a run.

    Raises:
        FileNotFoundError: there is no run at `path`.
        ValueError: a file is damaged.
    """
    path = Path(path)
    if not (path / "state.json").is_file():
        raise FileNotFoundError(f"{path} holds no run (no state.json); {_hint(path)}")
    names = ("results", "state", "config", "experiment", "start")
    return Run(path=path, metrics=_metrics(path / "metrics.jsonl"), **{name: _json(path, name) for name in names})


def frames_file(run: Path, label: str, task: str) -> Path:
    """Where the frames of a task's episodes in the evaluation `label` lie; no two tasks share a file.

    A colon is written `+`, and what may not stand in a file's name or a link as in a link: `a/b:new` is `a%2Fb+new`.
    """
    return run / "frames" / f"{label}-{quote(task, safe=':').replace(':', '+')}.npz"


def _hint(path: Path) -> str:
    """Where a run could be that was looked for at `path`."""
    inside = sorted(str(found.parent) for found in path.glob("*/state.json"))
    beside = {found.parent.name: str(found.parent) for found in path.parent.glob("*/state.json")}
    close = inside[:1] or [beside[name] for name in difflib.get_close_matches(path.name, beside, n=1)]
    return f"did you mean {close[0]}?" if close else "give the directory that `vla-rl train` wrote"


def evaluations(results: Mapping[str, Any]) -> dict[str, dict[str, EvaluationResult]]:
    """Stage label -> group -> result, in the order of the run."""
    return {
        label: {group: EvaluationResult.from_dict(value) for group, value in entry.items()}
        for label, entry in results.items()
        if label.startswith("after-") or "-after-" in label
    }


def standing(results: Mapping[str, Any]) -> dict[str, dict[str, EvaluationResult]]:
    """The evaluations up to that of the weights which the run ends with: those that a rollback gave up are left out."""
    found = evaluations(results)
    return {label: found[label] for label in standing_labels(list(found), results)}


def _json(path: Path, name: str) -> dict[str, Any]:
    file = path / f"{name}.json"
    return read_object(file, max_bytes=1 << 30) if file.is_file() else {}


def _metrics(file: Path) -> list[dict[str, Any]]:
    lines = file.read_text().splitlines() if file.is_file() else []
    entries = [json.loads(line) for line in lines if line.endswith("}")]  # a kill may have torn the last one
    return list({(entry["phase"], entry["step"], *entry): entry for entry in entries}.values())
