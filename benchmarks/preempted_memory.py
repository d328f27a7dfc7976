"""SIGTERM to a stage 1 whose replay memory is large: how long writing takes, and how much of it reaches the disk.

    python benchmarks/preempted_memory.py --gb 1 6 --output benchmarks/results/preempted_memory.json

The memory is filled with random features, and the process sends itself the signal. What was written is read back.
"""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

from vla_rl.encoders.features import Features
from vla_rl.preemption import LAST, PreemptedError, stop_on_sigterm
from vla_rl.report import versions
from vla_rl.rl.latent_buffer import LatentBuffer
from vla_rl.rl.snapshots import PIECE_BYTES, StageSnapshots, State
from vla_rl.rundir import write_json

TOKENS, WIDTH, BATCH = 64, 256, 512


@dataclass
class Args:
    """Settings."""

    gb: tuple[float, ...] = (1.0, 6.0)
    """sizes of the memory"""
    folder: Path | None = None
    """on the disk to write to; a temporary one if None"""
    output: Path | None = None
    """JSON file to write"""


def memory_of(gb: float) -> LatentBuffer:
    """A full memory of that size."""
    memory = LatentBuffer(1 << 40, action_dim=4, fingerprint="random", max_bytes=int(gb * 1e9))
    tokens, mask = torch.randn(BATCH, TOKENS, WIDTH).half(), torch.ones(BATCH, TOKENS, dtype=torch.bool)
    while memory.num_added == 0 or memory.num_added < memory.capacity:
        memory.add_frames(Features(tokens, mask, "random"), None)
    return memory


def measure(gb: float, folder: Path) -> dict[str, float]:
    """Seconds from SIGTERM to the end of writing, and the share of the frames that can be read again."""
    memory = memory_of(gb)

    def state() -> State:
        done = {"collector": {"num_env_steps": 0}, "dropped": {"episodes": 0, "steps": 0}}
        return done | {"memory": memory.state_dict(), "pieces": {"online": memory.pieces(PIECE_BYTES)}}

    snapshots = StageSnapshots(folder)
    with suppress(PreemptedError), stop_on_sigterm(), snapshots.on_sigterm():
        snapshots.keep(state)
        start = time.monotonic()
        os.kill(os.getpid(), signal.SIGTERM)
    seconds = time.monotonic() - start
    saved = StageSnapshots(folder).load()
    assert saved is not None
    frames = sum(piece["count"] for piece in saved["pieces"]["online"])
    return {"gb": gb, "seconds": round(seconds, 1), "share_of_frames": round(frames / memory.capacity, 2)}


def main(args: Args) -> None:
    """Measure every size."""
    rows = []
    for gb in args.gb:
        folder = Path(tempfile.mkdtemp(dir=args.folder))
        try:
            rows.append(measure(gb, folder / "stage"))
        finally:
            shutil.rmtree(folder)
        print("{gb:g} GB: {seconds} s, {share_of_frames:.0%} of the frames".format(**rows[-1]), flush=True)
    if args.output is not None:
        sizes = " ".join(f"{gb:g}" for gb in args.gb)
        command = f"python benchmarks/preempted_memory.py --gb {sizes}"
        write_json(args.output, {"command": command, "limit_s": LAST, "rows": rows, "versions": versions()})


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
