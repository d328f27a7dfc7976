"""Supervised learning in this process, or handed to the processes that a launcher starts."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from vla_rl.data.store import EpisodeStore
from vla_rl.policy import VLAPolicy, consent
from vla_rl.rundir import read_json
from vla_rl.sl.job import SupervisedJob, discard, take_over
from vla_rl.sl.supervised import SLConfig, SupervisedError, train_supervised

PATIENCE = 20.0
"""Seconds that a launcher has to end its processes before it is killed."""


def supervise(
    policy: VLAPolicy,
    stores: Sequence[EpisodeStore],
    *,
    config: SLConfig,
    seed: int = 0,
    data_seed: int = 0,
    task_weights: Mapping[str, float] | None = None,
    on_step: Callable[[int, float], None] | None = None,
    launch: str | None = None,
    folder: Path,
) -> tuple[float, int]:
    """Supervised learning in place, here or in processes that a launcher starts: they get the policy in a folder.

    Whatever ends the waiting for them, a signal too, ends them. Should this process be killed, they end at their next
    step once `folder` has been given to another stage, or removed.

    Args:
        policy: learns; what breaks off a launched job leaves it as it was.
        stores: episodes, which the processes read where they lie.
        config: hyperparameters.
        seed: of augmentation and what heads draw.
        data_seed: of the batches.
        task_weights: how often to draw a task relative to the others.
        on_step: called with step number and loss.
        launch: beginning of a command that takes `-m MODULE ARGUMENTS`, such as "torchrun --nproc-per-node 4"; None
            for this process.
        folder: what a launched job and snapshots need, seen by all machines; removed after success. Of one that a
            killed stage has left only the snapshots are kept.

    Returns:
        The mean loss over the last tenth of the steps, and the number of processes.

    Raises:
        FileNotFoundError: the launcher is not installed.
        PreemptedError: after SIGTERM, inside `vla_rl.preemption.stop_on_sigterm`; `folder` then holds a snapshot.
        SupervisedError: the loss, the gradient or what was learned is not finite, or the job failed; its output is in
            `folder/log.txt`.
        ValueError: the snapshots are of another stage.
    """
    folder = folder.absolute()
    command = [] if launch is None else [*launcher(launch), "-m", "vla_rl.sl.job", str(folder)]
    job = SupervisedJob(
        policy=str(folder / "start"),
        data=[str(store.path.absolute()) for store in stores],
        out=str(folder / "trained"),
        config=config,
        seed=seed,
        data_seed=data_seed,
        task_weights=task_weights or {},
        trust_remote_code=bool(consent(policy)),
    )
    if command or folder.exists():
        _renew(folder, keep=job.snapshot_folder)
    if not command:
        sampler, snapshots = job.sampler(stores, chunk=policy.head.chunk), job.snapshots(policy, stores)
        loss = train_supervised(policy, sampler, config=config, seed=seed, on_step=on_step, snapshots=snapshots)
        discard(folder)
        return loss, 1
    policy.save_pretrained(folder / "start")
    job.write(folder / "job.json")
    log = folder / "log.txt"
    with log.open("wb") as output, _running(command, output) as process:
        seen = 0
        while process.poll() is None:
            time.sleep(0.2)
            seen = _report(folder / "steps.jsonl", seen, on_step)
    _report(folder / "steps.jsonl", seen, on_step)
    if process.returncode or not (folder / "result.json").is_file():
        raise SupervisedError(
            f"`{shlex.join(command)}` ended with exit code {process.returncode} and no policy: "
            f"{_last_error(log)}; all that it said is in {log}"
        )
    result = read_json(folder / "result.json")
    trained = VLAPolicy.from_pretrained(folder / "trained", **consent(policy))
    take_over(policy, trained.state_dict(), scope=config.scope)
    discard(folder)
    return float(result["loss"]), int(result["num_processes"])


def _renew(folder: Path, *, keep: Path) -> None:
    """An empty folder but for snapshots; a job that still runs in the one before loses its place, and so ends."""
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    folder.mkdir(parents=True)
    if (old / keep.name).is_dir():
        (old / keep.name).rename(keep)
    shutil.rmtree(old, ignore_errors=True)


def check_launch(launch: str | None) -> None:
    """Refuse a launcher that is not installed, and one that has started the caller.

    Raises:
        FileNotFoundError: it is not installed.
        ValueError: this is one of several processes already, each of which would do everything.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world > 1:
        raise ValueError(
            f"a launcher has started this {world} times, which would all collect and evaluate; start it once, and hand "
            "the supervised stages to the launcher with launch= (`vla-rl train PRESET --launch 'torchrun ...'`)"
        )
    if launch is not None:
        launcher(launch)


def launcher(launch: str) -> list[str]:
    """The words of a launcher, its program looked for beside this interpreter first.

    Raises:
        FileNotFoundError: it is not installed.
    """
    words = shlex.split(launch)
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    program = shutil.which(words[0], path=path) if words else None
    if program is None:
        raise FileNotFoundError(
            f"launch={launch!r} names no program that is installed; expected one such as "
            "'torchrun --nproc-per-node 4', or nothing for a single process"
        )
    return [program, *words[1:]]


@contextmanager
def _running(command: Sequence[str], output: IO[bytes]) -> Iterator[subprocess.Popen[bytes]]:
    """A process that does not outlive the block; a signal to the group of this one does not reach it."""
    process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        yield process
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _report(path: Path, seen: int, on_step: Callable[[int, float], None] | None) -> int:
    """Hand on the steps after the first `seen` that a file holds; returns how many it holds."""
    if not path.is_file():
        return seen
    lines = path.read_text().split("\n")[:-1]  # the last may not be finished
    for line in lines[seen:]:
        step, loss = json.loads(line)
        if on_step is not None:
            on_step(int(step), float(loss))
    return len(lines)


def _last_error(log: Path) -> str:
    """The last line of a log that names an error, else the last line."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    named = [line for line in lines if "Error: " in line and "ChildFailedError" not in line]
    return (named or lines or ["it said nothing"])[-1].removeprefix("[rank0]: ")[:300]
