"""Curves sent to Weights & Biases or trackio while a run goes on, beside TensorBoard and `metrics.jsonl`."""

from __future__ import annotations

import importlib
import json
import os
import threading
import warnings
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any, Literal

Tool = Literal["wandb", "trackio"]


class Follower:
    """Sends the lines of a run's `metrics.jsonl` to a service as they are written, from a thread.

    The trainer knows nothing of it, and a service that fails ends the sending, not the run. Evaluations keep their
    names (`eval/rl`); everything else is named after its phase, as phases count other steps
    (`task0-round0-stage1/losses/approx_kl` over `task0-round0-stage1/step`, which are env steps).

    Example:
        >>> with Follower("runs/first", tool="wandb", config={}):  # doctest: +SKIP
        ...     trainer.run()

    Args:
        workdir: directory of the run; lines that are in its file already are not sent.
        tool: "wandb" or "trackio".
        config: what the service shows as the run's configuration.
        every: seconds between two looks.

    Raises:
        ImportError: the tool is not installed; the error names the extra.
    """

    def __init__(self, workdir: str | Path, *, tool: Tool, config: Mapping[str, Any], every: float = 2.0):
        self.path = Path(workdir) / "metrics.jsonl"
        self.tool = load_tool(tool)
        self.config = dict(config)
        self.every = every
        self.offset = self.path.stat().st_size if self.path.is_file() else 0
        self.phases: set[str] = set()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._follow, name=f"{tool} follower", daemon=True)

    def __enter__(self) -> Follower:
        """Begin a run at the service."""
        project = os.environ.get("WANDB_PROJECT", "vla-rl")
        self.tool.init(project=project, name=self.path.parent.resolve().name, config=self.config)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Send what is left, and end the run at the service."""
        self._over.set()
        self._thread.join()
        self.tool.finish()

    def _follow(self) -> None:
        try:
            while not self._over.wait(self.every):
                self._send_new()
            self._send_new()
        except Exception as problem:
            warnings.warn(f"{self.tool.__name__} takes no more curves ({problem}); the run goes on", stacklevel=2)

    def _send_new(self) -> None:
        if not self.path.is_file():
            return
        with self.path.open("rb") as file:
            file.seek(self.offset)
            new = file.read()
        whole = new[: new.rfind(b"\n") + 1]
        self.offset += len(whole)
        for line in whole.splitlines():
            if line.endswith(b"}"):  # a kill may have torn one
                self._send(json.loads(line))

    def _send(self, entry: dict[str, Any]) -> None:
        phase, step = entry.pop("phase"), entry.pop("step")
        if phase not in self.phases and hasattr(self.tool, "define_metric"):
            self.tool.define_metric(f"{phase}/*", step_metric=f"{phase}/step")
        self.phases.add(phase)
        named = {key if key.startswith("eval/") else f"{phase}/{key}": value for key, value in entry.items()}
        self.tool.log(named | {f"{phase}/step": step})


def load_tool(tool: Tool) -> ModuleType:
    """The module of a tracking service.

    Raises:
        ImportError: it is not installed; the error names the extra.
    """
    try:
        return importlib.import_module(tool)
    except ImportError as error:
        raise ImportError(f'--track {tool} needs the package {tool}; pip install "vla-rl[{tool}]"') from error
