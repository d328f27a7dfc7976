"""A run of the toy env that says where it is and waits there a moment, so that a test can send it a signal.

    python preempted_run.py WORKDIR EXPERT METRICS [LAUNCH]

`METRICS` is what the metrics to wait at are logged under; empty to run through.
"""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

import torch
from toy_run import CONFIG, toy_trainer

from vla_rl.config import with_method
from vla_rl.rundir import RunDirectory


def main(workdir: str, expert: str, wait_at: str, launch: str | None = None) -> None:
    """Begin the run, or go on with it."""
    torch.set_num_threads(1)
    original = RunDirectory.log

    def log(self, metrics, *, phase, step):
        original(self, metrics, phase=phase, step=step)
        if phase == wait_at:
            print("here", flush=True)
            time.sleep(1)

    RunDirectory.log = log
    config = replace(CONFIG, num_workers=2)
    if launch is not None:
        config = with_method(replace(config, stage0=replace(config.stage0, steps=200)), "sft")
    trainer = toy_trainer(Path(workdir), Path(expert), config=config)
    trainer.launch = launch
    trainer.run()


if __name__ == "__main__":
    main(*sys.argv[1:])
