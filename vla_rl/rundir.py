"""The work directory of a run: state, checkpoints, metrics and results, so that a kill loses one phase at most."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

_OWN = (
    "state.json",
    "config.json",
    "metrics.jsonl",
    "results.json",
    "report.md",
    "checkpoints",
    "rl_data",
    "tensorboard",
)


class RunDirectory:
    """One run on disk.

    `state.json` lists the finished phases and the checkpoint that the next one starts from; `metrics.jsonl` and
    TensorBoard events hold the curves; `results.json` the evaluations.

    Args:
        path: the directory; created if missing.
        resume: continue a run that is there, instead of refusing it.

    Raises:
        FileExistsError: the directory holds another run and `resume` is False.
        FileNotFoundError: `resume` and there is no run.
    """

    def __init__(self, path: str | Path, *, resume: bool = False):
        self.path = Path(path)
        state = self.path / "state.json"
        if resume and not state.is_file():
            raise FileNotFoundError(
                f"{self.path} holds no run to resume (no state.json); start one there without resume"
            )
        if not resume:
            self.refuse_used(self.path)
        self.path.mkdir(parents=True, exist_ok=True)
        self.state: dict[str, Any] = json.loads(state.read_text()) if resume else {"done": [], "checkpoint": None}
        self._writer: SummaryWriter | None = None
        metrics = self.path / "metrics.jsonl"
        if metrics.is_file() and not metrics.read_bytes().endswith(b"\n"):
            metrics.write_bytes(metrics.read_bytes() + b"\n")  # a kill has torn the last line
        if not resume:
            write_json(state, self.state)

    @staticmethod
    def refuse_used(path: str | Path) -> None:
        """Raise FileExistsError if `path` holds another run."""
        found = [name for name in _OWN if (Path(path) / name).exists()]
        if found:
            raise FileExistsError(f"{path} already holds another run ({found[0]}); give a new workdir")

    @property
    def writer(self) -> SummaryWriter:
        """TensorBoard writer, opened at first use."""
        if self._writer is None:
            self._writer = SummaryWriter(str(self.path / "tensorboard"))
        return self._writer

    def is_done(self, phase: str) -> bool:
        """Whether a phase has finished, in this process or before a kill."""
        return phase in self.state["done"]

    def finish(self, phase: str, *, checkpoint: str | None = None) -> None:
        """Note that a phase has finished and, if it trained, which checkpoint the next one starts from."""
        self.state["done"].append(phase)
        if checkpoint is not None:
            self.state["checkpoint"] = checkpoint
        write_json(self.path / "state.json", self.state)

    def fresh(self, *parts: str) -> Path:
        """A path of this run that does not exist: what an interrupted phase left there is removed."""
        path = self.path.joinpath(*parts)
        if path.exists():
            shutil.rmtree(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def log(self, metrics: Mapping[str, float], *, phase: str, step: int) -> None:
        """Append figures to `metrics.jsonl` and TensorBoard."""
        with (self.path / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"phase": phase, "step": step, **{k: float(v) for k, v in metrics.items()}}) + "\n")
        for key, value in metrics.items():
            self.writer.add_scalar(f"{phase}/{key}" if "/" not in key else key, value, step)

    def metrics(self) -> list[dict[str, Any]]:
        """Everything logged so far; what a resumed phase logged again counts once."""
        path = self.path / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.is_file() else []
        entries = [json.loads(line) for line in lines if line.endswith("}")]  # a kill may have torn the last one
        return list({(entry["phase"], entry["step"], *entry): entry for entry in entries}.values())

    def read_results(self) -> dict[str, Any]:
        """`results.json`, empty before the first evaluation."""
        path = self.path / "results.json"
        return json.loads(path.read_text()) if path.is_file() else {}

    def add_result(self, key: str, value: Any) -> None:
        """Put one entry into `results.json`."""
        write_json(self.path / "results.json", self.read_results() | {key: value})

    def close(self) -> None:
        """Flush TensorBoard."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None


def write_json(path: Path, value: Any) -> None:
    """Write JSON under a temporary name, then rename: a reader never sees half a file."""
    temporary = path.with_suffix(path.suffix + ".tmp")
    with temporary.open("w") as file:
        json.dump(value, file, indent=2)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
