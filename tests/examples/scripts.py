"""How the tests run the single-file scripts, and the small settings that they share."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from typing import Any

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

EXAMPLES = Path(__file__).parents[2] / "examples"
SCRIPTS = sorted(
    path
    for pattern in ("*_vlm.py", "ire_vla_*.py", "sacfd_latent.py", "collect_demos.py", "evaluate.py")
    for path in EXAMPLES.glob(pattern)
)
SMALL_VLM = "--small-image-size 32 --small-width 16 --small-heads 2 --small-vision-layers 1 --small-text-layers 1"
SMALL_HEAD = "--width 16 --num-queries 2 --hidden-dim 16"
SMALL_PPO = "--num-envs 4 --num-steps 16 --total-timesteps 128 --minibatch-size 32 --update-epochs 1"


def run_script(monkeypatch: Any, folder: Path, name: str, options: str) -> dict[str, Any]:
    """Run a script in `folder` as `python name.py options` does; returns its module-level names at the end."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", [name, *options.split()])
    return runpy.run_path(str(EXAMPLES / name), run_name="__main__")


def scalars(folder: Path, run: dict[str, Any]) -> dict[str, list[tuple[int, float]]]:
    """What a run told TensorBoard: (step, value) by tag."""
    events = EventAccumulator(str(folder / "runs" / run["run_name"]))
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
