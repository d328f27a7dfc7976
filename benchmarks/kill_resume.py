"""Kill a run with SIGKILL at random points, resume it each time, and compare with a run that was never stopped.

    python benchmarks/kill_resume.py --kills 100 --output benchmarks/results/kill_resume.json

Half of the kills come after a random time, the other half at a random file operation of the run itself (opening,
renaming, removing), so that writing checkpoints, tables and state is hit too. Some of the resumed runs find a bit of
their newest checkpoint flipped.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from toy_run import outcome, settings, toy_expert, toy_trainer

from vla_rl.guards import GuardConfig
from vla_rl.report import versions
from vla_rl.rundir import write_json

GUARDS = GuardConfig(keep_checkpoints=2)
EVENTS = ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "shutil.rmtree", "os.truncate")


@dataclass
class Args:
    """Settings."""

    kills: int = 100
    """how many kills"""
    flips: float = 0.1
    """how often a bit of the newest checkpoint is flipped before a run is resumed"""
    seed: int = 0
    """of the moments"""
    output: Path | None = None
    """JSON file for the figures"""


def child(workdir: Path, expert: Path, *, die_at: int | None, counter: Path | None = None) -> int:
    """Start or resume the run in a fork of this process; returns its pid.

    Args:
        workdir: of the run.
        expert: store.
        die_at: number of the file operation below `workdir` at which the fork kills itself.
        counter: where to write how many there were.
    """
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        seen = 0

        def hook(event: str, arguments: tuple[Any, ...]) -> None:
            nonlocal seen
            if event in EVENTS and arguments and str(workdir) in str(arguments[0]):
                seen += 1
                if seen == die_at:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)
        with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
            warnings.simplefilter("ignore")
            toy_trainer(workdir, expert, guards=GUARDS).run()
        if counter is not None:
            counter.write_text(str(seen))
        code = 0
    except BaseException:
        (workdir.parent / "error.txt").write_text(traceback.format_exc())
    finally:
        os._exit(code)


def flip_a_bit(workdir: Path, rng: random.Random) -> bool:
    """Damage the newest checkpoint, if there is one."""
    if not (workdir / "state.json").exists():
        return False
    checkpoint = json.loads((workdir / "state.json").read_text())["checkpoint"]
    files = [p for p in (workdir / checkpoint).rglob("*") if p.is_file()] if checkpoint else []
    if not files:
        return False
    path = rng.choice(sorted(files))
    content = bytearray(path.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)
    return True


def differing(one: Any, other: Any, *, name: str = "") -> list[str]:
    """Paths of the entries in which two outcomes differ."""
    if isinstance(one, dict) and isinstance(other, dict) and one.keys() == other.keys():
        return [path for key in one for path in differing(one[key], other[key], name=f"{name}/{key}")]
    return [] if one == other else [name]


def where(workdir: Path, phases: list[str]) -> str:
    """What the run was doing when it was killed."""
    if not (workdir / "state.json").exists():
        return "before the first phase"
    done = len(json.loads((workdir / "state.json").read_text())["done"])
    if any((workdir / "checkpoints").glob(".*.tmp")):
        return "writing a checkpoint"
    name = phases[done] if done < len(phases) else "after the last phase"
    return "evaluation" if "eval" in name else name


def main(args: Args) -> None:
    """Measure."""
    torch.set_num_threads(1)
    rng = random.Random(args.seed)
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        expert, counter = toy_expert(root / "expert"), root / "operations"
        began = time.monotonic()
        _, status = os.waitpid(child(root / "whole", expert, die_at=None, counter=counter), 0)
        if status:
            sys.exit(f"the uninterrupted run failed:\n{(root / 'error.txt').read_text()}")
        length, operations = time.monotonic() - began, int(counter.read_text())
        expected = outcome(root / "whole")
        print(f"uninterrupted: {length:.1f} s, {operations} file operations, phases {expected['done']}", flush=True)
        places: Counter[str] = Counter()
        runs = equal = flips = 0
        while sum(places.values()) < args.kills:
            workdir = root / f"run{runs}"
            finished = False
            while not finished:
                last = sum(places.values()) >= args.kills
                by_time = rng.random() < 0.5
                flips += rng.random() < args.flips and flip_a_bit(workdir, rng)
                die_at = None if by_time or last else rng.randrange(1, operations // 2)
                pid = child(workdir, expert, die_at=die_at)
                if by_time and not last:
                    time.sleep(rng.uniform(0, length / 2))
                    os.kill(pid, signal.SIGKILL)
                _, status = os.waitpid(pid, 0)
                if os.WIFSIGNALED(status):
                    places[where(workdir, expected["done"])] += 1
                elif status:
                    sys.exit(f"a resumed run failed:\n{(root / 'error.txt').read_text()}")
                else:
                    finished = True
            runs += 1
            other = differing(outcome(workdir), expected)
            equal += not other
            said = f"DIFFERENT: {', '.join(other)}" if other else "bit-equal"
            print(f"run {runs}: {sum(places.values())} kills so far, {said}", flush=True)
    figures = {
        "command": f"python benchmarks/kill_resume.py --kills {args.kills} --flips {args.flips} --seed {args.seed}",
        "kills": sum(places.values()),
        "runs": runs,
        "bit_equal_runs": equal,
        "flipped_checkpoints": flips,
        "kills_while": dict(sorted(places.items())),
        "uninterrupted_seconds": round(length, 1),
        "seconds": round(time.monotonic() - start),
        "compared": "checksums of the weights in every checkpoint, results.json, every stored episode, phases done",
        "settings": settings(),
        "versions": versions(),
    }
    print(json.dumps({key: figures[key] for key in list(figures)[:6]}, indent=2))
    if args.output is not None:
        write_json(args.output, figures)
    if equal < runs:
        sys.exit(1)


if __name__ == "__main__":
    main(tyro.cli(Args))
