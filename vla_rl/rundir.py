"""The work directory of a run: state, checkpoints, metrics and results, so that a kill loses one phase at most."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from vla_rl.file_lock import FileLock, held_here

_OWN = (
    "state.json",
    "config.json",
    "start.json",
    "metrics.jsonl",
    "results.json",
    "report.md",
    "checkpoints",
    "rl_data",
    "tensorboard",
)


class RunDirectoryError(ValueError):
    """Files of a run that are damaged, or that belong to another run than the one that was asked for."""


def lock_run(path: Path) -> FileLock:
    """The right of this process to write into a run's directory.

    Raises:
        BlockingIOError: another one has it.
    """
    message = f"{path} is being worked on by another process; wait for its end, or end it first"
    return held_here(path / ".lock") or FileLock(path / ".lock", message)


class RunDirectory:
    """One run on disk.

    `state.json` lists the finished phases and the checkpoint that the next one starts from; `metrics.jsonl` and
    TensorBoard events hold the curves; `results.json` the evaluations.

    Args:
        path: the directory; created if missing.
        resume: continue a run that is there, instead of refusing it.

    Raises:
        BlockingIOError: another process works on the run; `close` lets the next one in.
        FileExistsError: the directory holds another run and `resume` is False.
        FileNotFoundError: `resume` and there is no run.
        RunDirectoryError: `resume` and its state is damaged.

    Attributes:
        state: `done` (finished phases), `checkpoint` (what the next one starts from), `after` (the same after every
            finished phase), `files` (size and checksum of every file of every checkpoint), `seconds` (by phase).
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
        self._lock = lock_run(self.path)
        fresh = {"done": [], "checkpoint": None, "after": [], "files": {}, "seconds": {}}
        self.state: dict[str, Any] = _checked_state(state) if resume else fresh
        self._writer: SummaryWriter | None = None
        self._digests: dict[str, dict[str, list[Any]]] = {}
        _end_last_line(self.path / "metrics.jsonl")
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
        """Note that a phase has finished, and from which checkpoint the next one starts if not from the same."""
        self.state.pop("stopped", None)
        if checkpoint is not None:
            self.state["checkpoint"] = checkpoint
            if checkpoint in self._digests:
                self.state["files"].pop(checkpoint, None)  # the newest comes last
                self.state["files"][checkpoint] = self._digests.pop(checkpoint)
        self.state["done"].append(phase)
        self.state["after"].append(self.state["checkpoint"])
        self._write_state()

    def note_stop(self, phase: str) -> None:
        """Note in which phase the run was asked to stop, for a reader; the next finished phase removes the note."""
        self.state["stopped"] = phase
        self._write_state()

    def save_checkpoint(self, name: str, save: Callable[[Path], object]) -> str:
        """Let `save` fill a new directory, and give it its name once every byte is on the disk.

        Args:
            name: of the checkpoint; one of this name that an interrupted phase left is replaced.
            save: writes to the path that it is given, which does not exist yet.

        Returns:
            Path of the checkpoint, relative to the run's, for `finish`.
        """
        final = self.path / "checkpoints" / name
        temporary = self.fresh("checkpoints", f".{name}.tmp")
        save(temporary)
        digests = {path.relative_to(temporary).as_posix(): file_digest(path) for path in _files(temporary)}
        for path in (*temporary.rglob("*"), temporary):
            sync(path)
        self.fresh("checkpoints", name)
        temporary.rename(final)
        sync(final.parent)
        relative = f"checkpoints/{name}"
        self._digests[relative] = digests
        return relative

    def usable_checkpoint(self) -> Path | None:
        """The checkpoint to go on from, or None for the beginning.

        A damaged or missing one is passed over with a warning: the phases since the one before it count as not done.
        What a kill left of one that was being written is removed.
        """
        for left in (self.path / "checkpoints").glob(".*.tmp"):
            shutil.rmtree(left, ignore_errors=True)
        while (checkpoint := self.state["checkpoint"]) is not None:
            problem = self._damage(checkpoint)
            if problem is None:
                return self.path / checkpoint
            after = self.state["after"]
            kept = len(after)
            while kept and after[kept - 1] == checkpoint:
                kept -= 1
            earlier = after[kept - 1] if kept else None
            warnings.warn(
                f"{self.path / checkpoint} is damaged ({problem}); going on from "
                f"{earlier or 'the beginning'}, and {len(after) - kept} finished phases are repeated",
                stacklevel=2,
            )
            self.state |= {"done": self.state["done"][:kept], "after": after[:kept], "checkpoint": earlier}
            self._write_state()
        return None

    def keep_checkpoints(self, count: int, *, also: Iterable[str | None] = ()) -> None:
        """Delete all but the `count` newest checkpoints, the one in use, and those in `also`."""
        files = self.state["files"]
        kept = {*list(files)[-count:], self.state["checkpoint"], *also}
        surplus = [checkpoint for checkpoint in files if checkpoint not in kept]
        if surplus:
            self.state["files"] = {name: value for name, value in files.items() if name in kept}
            self._write_state()
        for checkpoint in surplus:
            shutil.rmtree(self.path / checkpoint, ignore_errors=True)

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
        """Everything logged so far; what a resumed phase logged again counts once.

        Raises:
            RunDirectoryError: a line is damaged.
        """
        path = self.path / "metrics.jsonl"
        lines = path.read_text(errors="replace").splitlines() if path.is_file() else []
        entries: dict[tuple[Any, ...], dict[str, Any]] = {}
        for number, line in enumerate(lines, 1):
            if not line.endswith("}"):  # a kill has torn it
                continue
            try:
                entry = json.loads(line)
                key = (entry["phase"], entry["step"], *entry)
                entries[key] = entry
            except (ValueError, TypeError, KeyError, RecursionError) as error:
                raise RunDirectoryError(
                    f"line {number} of {path} is no JSON object with phase and step; remove that line"
                ) from error
        return list(entries.values())

    def read_results(self) -> dict[str, Any]:
        """`results.json`, empty before the first evaluation.

        Raises:
            RunDirectoryError: the file is damaged.
        """
        path = self.path / "results.json"
        return read_json(path) if path.is_file() else {}

    def add_result(self, key: str, value: Any) -> None:
        """Put one entry into `results.json`."""
        write_json(self.path / "results.json", self.read_results() | {key: value})

    @property
    def seconds(self) -> dict[str, float]:
        """What each phase has taken so far, in all processes that worked on it."""
        return dict(self.state["seconds"])

    @contextmanager
    def timing(self, phase: str) -> Iterator[None]:
        """Add what a block takes to the seconds of a phase, whatever ends the block but a kill."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.add_seconds(phase, time.perf_counter() - start)

    def add_seconds(self, phase: str, seconds: float) -> None:
        """Add to the seconds of a phase."""
        self.state["seconds"][phase] = self.state["seconds"].get(phase, 0.0) + seconds
        self._write_state()

    def add_guard(self, entry: Mapping[str, Any]) -> None:
        """Put what a guard found into the list `guards` of `results.json`; a repeated phase adds nothing new."""
        found = self.read_results().get("guards", [])
        if dict(entry) not in found:
            self.add_result("guards", [*found, dict(entry)])

    def close(self) -> None:
        """Flush TensorBoard and let others work on the run."""
        self._lock.release()
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _write_state(self) -> None:
        write_json(self.path / "state.json", self.state)

    def _damage(self, checkpoint: str) -> str | None:
        """What is wrong with a checkpoint's files; a run of an earlier version has no checksums to compare."""
        root = self.path / checkpoint
        if not root.is_dir():
            return "it is missing"
        for name, expected in self.state["files"].get(checkpoint, {}).items():
            path = root / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != expected[0]:
                return f"{name} has {path.stat().st_size} bytes, not {expected[0]}"
            if file_digest(path) != expected:
                return f"{name} has other content than was written"
        return None


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        RunDirectoryError: there is none.
    """
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        what = " ".join(str(error).split())[:80] or type(error).__name__
        raise RunDirectoryError(f"{path} cannot be read as JSON ({what}); restore it from a copy") from error
    if not isinstance(value, dict):
        raise RunDirectoryError(f"{path} holds a JSON {type(value).__name__}, expected an object; restore it")
    return value


def write_json(path: Path, value: Any) -> None:
    """Write JSON under a temporary name, then rename: a reader never sees half a file, even after a power cut."""
    temporary = path.with_suffix(path.suffix + ".tmp")
    with temporary.open("w") as file:
        json.dump(value, file, indent=2)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    sync(path.parent)


def _checked_state(path: Path) -> dict[str, Any]:
    state = read_json(path)
    done, checkpoint = state.get("done"), state.get("checkpoint")
    if not isinstance(done, list) or not all(isinstance(phase, str) for phase in done):
        raise RunDirectoryError(f"{path} has no list of phases under 'done'; restore it from a copy")
    state.setdefault("after", [checkpoint] * len(done))  # earlier versions noted neither
    state.setdefault("files", {})
    state.setdefault("seconds", {})
    after, files, seconds = state["after"], state["files"], state["seconds"]
    if not isinstance(after, list) or len(after) != len(done) or (done and after[-1] != checkpoint):
        raise RunDirectoryError(f"{path} does not give one checkpoint per finished phase; restore it from a copy")
    if not isinstance(files, dict) or not all(isinstance(names, dict) for names in files.values()):
        raise RunDirectoryError(f"{path} has no table of checksums under 'files'; restore it from a copy")
    if not isinstance(seconds, dict) or not all(isinstance(value, int | float) for value in seconds.values()):
        raise RunDirectoryError(f"{path} has no table of numbers under 'seconds'; restore it from a copy")
    for name in (checkpoint, *after, *files):
        if name is not None and not (isinstance(name, str) and _is_checkpoint(name)):
            raise RunDirectoryError(f"{path} names {str(name)[:60]!r} as a checkpoint, expected checkpoints/<phase>")
    inner = [(name, entry) for names in files.values() for name, entry in names.items()]
    for name, entry in inner:
        if ".." in Path(name).parts or Path(name).is_absolute() or not isinstance(entry, list) or len(entry) != 2:
            raise RunDirectoryError(f"{path} has a damaged checksum for {name[:60]!r}; restore it from a copy")
    return state


def _is_checkpoint(name: str) -> bool:
    folder, _, phase = name.partition("/")
    return folder == "checkpoints" and phase not in ("", ".", "..") and not set("/\\\0") & set(phase)


def _end_last_line(path: Path) -> None:
    """A kill may have torn the last line of a file that lines are appended to."""
    if path.is_file() and path.stat().st_size:
        with path.open("r+b") as file:
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")


def _files(root: Path) -> list[Path]:
    return sorted(path for path in root.rglob("*") if path.is_file())


def new_digest() -> hashlib.blake2b:
    """What checksums of files are computed by."""
    return hashlib.blake2b(digest_size=16)


def file_digest(path: Path) -> list[Any]:
    """Size and checksum of a file, in JSON types."""
    digest = new_digest()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return [path.stat().st_size, digest.hexdigest()]


def sync(path: Path) -> None:
    """Wait until a file or the names in a directory are on the disk, where the system can tell."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:  # Windows opens no directories
        return
    try:
        os.fsync(descriptor)
    except OSError:
        pass
    finally:
        os.close(descriptor)
