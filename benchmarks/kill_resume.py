"""Kill a run with SIGKILL at random points, resume it each time, and compare with a run that was never stopped.

    python benchmarks/kill_resume.py --kills 100 --at-least 10 --output benchmarks/results/kill_resume.json

Each kill is aimed at what the run still has before it and has been hit least so far: a stage, an evaluation, or the
writing of a checkpoint. Half of them come at a random file operation of the run itself there (opening, renaming,
removing), the other half a random time after one. Supervised stages write snapshots. Some of the resumed runs find a
bit of their newest checkpoint flipped.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections import Counter
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import tyro
from toy_run import CONFIG, outcome, toy_expert, toy_trainer

from vla_rl.guards import GuardConfig
from vla_rl.report import versions
from vla_rl.rundir import write_json

GUARDS = GuardConfig(keep_checkpoints=2)
SNAPSHOTS = replace(
    CONFIG, stage0=replace(CONFIG.stage0, snapshot_every=2), stage2=replace(CONFIG.stage2, snapshot_every=2)
)
EVENTS = ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "shutil.rmtree", "os.truncate")
BEFORE, EVALUATION, WRITING = "before the first phase", "evaluation", "writing a checkpoint"
LEFT = "left-by-an-earlier-kill"
DELAY = 0.05  # seconds, the mean of what passes between a file operation and a kill that comes after it


@dataclass
class Args:
    """Settings."""

    kills: int = 100
    """how many kills"""
    at_least: int = 0
    """how many of them must have hit each stage, the evaluations, and the writing of checkpoints"""
    flips: float = 0.1
    """how often a bit of the newest checkpoint is flipped before a run is resumed"""
    seed: int = 0
    """of the moments"""
    output: Path | None = None
    """JSON file for the figures"""


@dataclass
class Aim:
    """When a run kills itself: `delay` seconds after its `at`-th file operation in `place`."""

    place: str
    at: int
    delay: float


def child(
    workdir: Path, expert: Path, *, phases: list[str], aim: Aim | None = None, counter: Path | None = None
) -> int:
    """Start or resume the run in a fork of this process; returns its pid.

    Args:
        workdir: of the run.
        expert: store.
        phases: of the run, in order.
        aim: when the fork kills itself; None: never.
        counter: where to write how many file operations below `workdir` there were in each place.
    """
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        seen: Counter[str] = Counter()
        looking = False

        def hook(event: str, arguments: tuple[Any, ...]) -> None:
            nonlocal looking
            if looking or event not in EVENTS or not arguments or str(workdir) not in str(arguments[0]):
                return
            looking = True
            place = where(workdir, phases)
            looking = False
            seen[place] += 1
            if aim is not None and (place, seen[place]) == (aim.place, aim.at):
                if not aim.delay:
                    os.kill(os.getpid(), signal.SIGKILL)
                threading.Timer(aim.delay, os.kill, (os.getpid(), signal.SIGKILL)).start()

        if phases:
            sys.addaudithook(hook)
        with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
            warnings.simplefilter("ignore")
            toy_trainer(workdir, expert, config=SNAPSHOTS, guards=GUARDS).run()
        if counter is not None:
            counter.write_text(json.dumps(seen))
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


def num_done(workdir: Path) -> int:
    """How many phases have finished; -1 where the run has not begun."""
    state = workdir / "state.json"
    return len(json.loads(state.read_text())["done"]) if state.exists() else -1


def where(workdir: Path, phases: list[str]) -> str:
    """What the run is doing, or was doing when it was killed."""
    done = num_done(workdir)
    if done < 0:
        return BEFORE
    if any(not (folder / LEFT).exists() for folder in (workdir / "checkpoints").glob(".*.tmp")):
        return WRITING
    return kind(phases[done]) if done < len(phases) else "after the last phase"


def kind(phase: str) -> str:
    """Evaluations are all alike; a stage is itself."""
    return EVALUATION if "eval" in phase else phase


def ahead(workdir: Path, phases: list[str]) -> list[str]:
    """Places that the run has not passed."""
    left = {kind(phase) for phase in phases[max(num_done(workdir), 0) :]}
    return sorted(left | ({WRITING} if left - {EVALUATION} else set()))


def mark_what_was_left(workdir: Path) -> None:
    """So that half a checkpoint from an earlier kill is not taken for one that is being written."""
    for folder in (workdir / "checkpoints").glob(".*.tmp"):
        (folder / LEFT).touch()


def wait(pid: int, root: Path) -> bool:
    """Whether a run ended by itself, not by a kill."""
    _, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status):
        return False
    if status:
        sys.exit(f"a run failed:\n{(root / 'error.txt').read_text()}")
    return True


def main(args: Args) -> None:
    """Measure."""
    torch.set_num_threads(1)
    rng = random.Random(args.seed)
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        expert, counter = toy_expert(root / "expert"), root / "operations"
        began = time.monotonic()
        wait(child(root / "whole", expert, phases=[]), root)
        length, expected = time.monotonic() - began, outcome(root / "whole")
        phases = expected["done"]
        wait(child(root / "counted", expert, phases=phases, counter=counter), root)
        operations = json.loads(counter.read_text())
        print(f"uninterrupted: {length:.1f} s, phases {phases}, file operations {operations}", flush=True)
        places: Counter[str] = Counter({place: 0 for place in ahead(root / "nowhere", phases)})
        runs = equal = flips = 0
        while places.total() < args.kills:
            workdir = root / f"run{runs}"
            finished = False
            while not finished:
                flips += rng.random() < args.flips and flip_a_bit(workdir, rng)
                mark_what_was_left(workdir)
                aim, left = None, ahead(workdir, phases)
                if left and places.total() < args.kills:
                    place = min(left, key=lambda name: (places[name], rng.random()))
                    delay = rng.expovariate(1 / DELAY) if rng.random() < 0.5 else 0.0
                    aim = Aim(place, rng.randint(1, operations[place]), delay)
                finished = wait(child(workdir, expert, phases=phases, aim=aim), root)
                if not finished:
                    places[where(workdir, phases)] += 1
            runs += 1
            other = differing(outcome(workdir), expected)
            equal += not other
            said = f"DIFFERENT: {', '.join(other)}" if other else "bit-equal"
            print(f"run {runs}: {places.total()} kills so far, {said}", flush=True)
            shutil.rmtree(workdir)
    figures = {
        "command": f"python benchmarks/kill_resume.py --kills {args.kills} --at-least {args.at_least} "
        f"--flips {args.flips} --seed {args.seed}",
        "kills": places.total(),
        "runs": runs,
        "bit_equal_runs": equal,
        "flipped_checkpoints": flips,
        "kills_while": dict(sorted(places.items())),
        "uninterrupted_seconds": round(length, 1),
        "seconds": round(time.monotonic() - start),
        "compared": "checksums of the weights in every checkpoint, results.json, every stored episode, phases done",
        "settings": asdict(SNAPSHOTS),
        "versions": versions(),
    }
    print(json.dumps({key: figures[key] for key in list(figures)[:6]}, indent=2))
    if args.output is not None:
        write_json(args.output, figures)
    missed = [name for name in ahead(Path("nowhere"), phases) if places[name] < args.at_least]
    if missed:
        sys.exit(f"fewer than {args.at_least} kills hit {', '.join(missed)}; give more --kills")
    if equal < runs:
        sys.exit(1)


if __name__ == "__main__":
    main(tyro.cli(Args))
