"""Where a stage 1 stands when SIGTERM comes, on disk: what it has learned and found, its counters and generators."""

from __future__ import annotations

import json
import random
import shutil
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from vla_rl.data.episode import Episode
from vla_rl.preemption import PreemptedError, handles_sigterm, put_off_sigterm
from vla_rl.rundir import file_digest, new_digest, read_json, sync, write_json
from vla_rl.saved_files import check_arguments
from vla_rl.sl.job import discard
from vla_rl.sl.snapshots import compare_files, list_snapshots, publish

State = dict[str, Any]
"""A tree of dicts and lists with tensors, arrays and values of JSON."""

PIECE_BYTES = 64 << 20
RESERVE = 3.0
"""Seconds that the end of writing has for itself."""
_FORMAT = 2
_TENSORS, _STATE, _CHECKSUMS = "tensors.safetensors", "state.json", "checksums.json"
_DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.bool: "BOOL",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint64: "U64", torch.uint32: "U32", torch.uint16: "U16", torch.uint8: "U8",
}  # fmt: skip


_WORDS = {"successes": "successes", "demos": "frames of demonstrations", "online": "frames of replay memory"}


@dataclass
class _Saved:
    """What `state.json` holds."""

    of: dict[str, Any]
    number: int
    state: dict[str, Any]
    pieces: dict[str, Any]
    left_out: dict[str, Any]


class StageSnapshots:
    """Snapshots of one stage 1, written when SIGTERM comes and never else.

    Simulators cannot be saved in general, so the episodes that are running are lost: the stage goes on with what it had
    learned and found, and with new episodes from other seeds. It is a good continuation, not the run that would have
    been; two continuations of one snapshot are the same.

    A snapshot has its name once it is whole and on the disk, with the checksum of every file; the two newest are kept,
    and a damaged one is passed over. What may be large (`pieces` of a state: replay memory, pictures of successes) is
    written piece by piece, the newest first, as long as there is time and room on the disk; the rest is left out.

    Args:
        folder: for this stage alone; None for no snapshots at all.
        of: what the stage does, of JSON types; snapshots of another one are refused.
        say: told in a sentence where the stage goes on and what was lost.

    Attributes:
        asked: whether SIGTERM has arrived.
        number: how often the stage has gone on from a snapshot.
    """

    def __init__(
        self,
        folder: str | Path | None = None,
        *,
        of: Mapping[str, Any] | None = None,
        say: Callable[[str], None] | None = None,
    ):
        self.folder = None if folder is None else Path(folder)
        self.of: State = json.loads(json.dumps({"format": _FORMAT, **(of or {})}))
        self.say = say
        self.asked: Callable[[], bool] = lambda: False
        self.number = 0
        self._state: Callable[[], State] | None = None

    @contextmanager
    def on_sigterm(self) -> Iterator[None]:
        """Inside `vla_rl.preemption.stop_on_sigterm`, let the body come to a good end, and write a snapshot after it.

        The body has 15 seconds, then PreemptedError is raised in it; 25 seconds after SIGTERM writing is given up.
        Where SIGTERM is not left to `stop_on_sigterm` nothing will be written, and a warning says so.
        """
        if self.folder is None:
            yield
            return
        if not handles_sigterm():
            warnings.warn(
                f"{self.folder} gets no snapshot: SIGTERM is not handled by vla_rl here. Enter stop_on_sigterm() in "
                "the main thread, after whatever else takes the signal, such as ray.init()",
                stacklevel=3,
            )
        with put_off_sigterm(last=self._save) as self.asked:
            yield

    def stop_if_asked(self) -> None:
        """Raise PreemptedError if SIGTERM has arrived."""
        if self.asked():
            raise PreemptedError

    def keep(self, state: Callable[[], State]) -> None:
        """Say what a snapshot is to hold from now on; called when one is written.

        Its entry `pieces` maps names to lists of trees, the most important first; each says by `count` how much it is.
        When it is loaded, these are iterators that read tree by tree.
        """
        self._state = state

    @contextmanager
    def changing(self) -> Iterator[None]:
        """What is kept is on its way to another state in the body; broken off there, it is not written."""
        state, self._state = self._state, None
        yield
        self._state = state

    def finish(self) -> None:
        """The stage is done: forget what is kept and remove what was written."""
        self._state = None
        if self.folder is not None:
            discard(self.folder)

    def seed(self, seed: int) -> int:
        """Of the resets: `seed` at first, and another one that follows from it after every snapshot."""
        return int(np.random.SeedSequence([seed, self.number]).generate_state(1)[0] >> 1) if self.number else seed

    def load(self) -> State | None:
        """What the newest snapshot holds; None where there is none. A damaged one is passed over with a warning.

        Raises:
            ValueError: it is of another stage.
        """
        finished = self._finished()
        while finished:
            snapshot = finished.pop()
            try:
                saved = _read(snapshot)
            except ValueError as error:
                before = f"from {finished[-1]}" if finished else "from the beginning of the stage"
                warnings.warn(f"{snapshot} is damaged ({error}); going on {before}", stacklevel=2)
                continue
            changed = [key for key, value in self.of.items() if saved.of.get(key) != value]
            if changed:
                raise ValueError(f"{snapshot} was begun with another {changed[0]}; go on with the same, or remove it")
            self.number = saved.number + 1
            if self.say is not None:
                self.say(_sentence(saved))
            pieces = {name: _pieces(snapshot, name, trees) for name, trees in saved.pieces.items()}
            return saved.state | {"pieces": pieces}
        return None

    def _finished(self) -> list[Path]:
        """All snapshots that have been written to the end, the newest last."""
        return [] if self.folder is None else list_snapshots(self.folder)

    def _save(self, deadline: float) -> None:
        if self.folder is None or self._state is None:
            return
        state = self._state()
        pieces: dict[str, list[State]] = state.pop("pieces")
        temporary = self.folder / ".tmp"
        final = self.folder / f"step{state['collector']['num_env_steps']:09d}-{self.number:03d}"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        checksums = {}
        plain, checksums[_TENSORS] = _write_tree(temporary / _TENSORS, state)
        saved = _Saved(self.of, self.number, plain, {name: [] for name in pieces}, {})
        longest, full = 0.0, False
        for name, tree in ((name, tree) for name, trees in pieces.items() for tree in trees):
            start = time.monotonic()
            if not full and start + 2 * longest < deadline - RESERVE:
                path = temporary / _piece(name, len(saved.pieces[name]))
                try:
                    plain, checksums[path.name] = _write_tree(path, tree)
                    saved.pieces[name].append(plain)
                    longest = max(longest, time.monotonic() - start)
                    continue
                except OSError:
                    full = True
                    path.unlink(missing_ok=True)
            saved.left_out[name] = saved.left_out.get(name, 0) + tree["count"]
        write_json(temporary / _STATE, vars(saved))
        checksums[_STATE] = file_digest(temporary / _STATE)
        write_json(temporary / _CHECKSUMS, checksums)
        publish(temporary, final)


def in_pieces(episodes: Sequence[Episode]) -> list[State]:
    """Episodes as `pieces` of a state, the latest first."""
    pieces: list[State] = []
    size = PIECE_BYTES
    for episode in reversed(episodes):
        more = sum(array.nbytes for array in episode.observations.values())
        if size + more > PIECE_BYTES:
            pieces.append({"count": 0, "episodes": []})
            size = 0
        pieces[-1]["count"] += 1
        pieces[-1]["episodes"].append(vars(episode))
        size += more
    return pieces


def _piece(name: str, index: int) -> str:
    return f"{name}{index:05d}.safetensors"


def _pieces(snapshot: Path, name: str, trees: list[Any]) -> Iterator[State]:
    for index, tree in enumerate(trees):
        yield _put_together(tree, load_file(snapshot / _piece(name, index)))


def _write_tree(path: Path, tree: State) -> tuple[Any, list[Any]]:
    """Write the tensors of a tree to the disk; what remains of it, and the file's digest."""
    tensors: dict[str, Tensor] = {}
    plain = _take_apart(tree, tensors)
    digest = write_tensors(path, tensors)
    sync(path)
    return plain, digest


def _read(snapshot: Path) -> _Saved:
    """What a snapshot holds.

    Raises:
        ValueError: it is damaged.
    """
    compare_files(snapshot, _CHECKSUMS, [_STATE, _TENSORS])
    values = read_json(snapshot / _STATE)
    check_arguments(_Saved, values, where=_STATE)
    saved = _Saved(**values)
    names = [_piece(name, index) for name, trees in saved.pieces.items() for index in range(len(trees))]
    compare_files(snapshot, _CHECKSUMS, names)
    try:
        saved.state = _put_together(saved.state, load_file(snapshot / _TENSORS))
    except KeyError as error:
        raise ValueError(f"{_TENSORS} lacks {error}") from error
    return saved


def _sentence(saved: _Saved) -> str:
    state, lost = saved.state, saved.state["dropped"]
    older = ", ".join(f"{count:,} {_WORDS.get(name, name)}" for name, count in saved.left_out.items())
    left_out = f"; the oldest {older} were not written for lack of time or room on the disk" if older else ""
    return (
        f"goes on after {state['collector']['num_env_steps']:,} env steps, where SIGTERM stopped it, with other seeds; "
        f"lost are {lost['episodes']} episodes that had not ended or not been learned from, and {lost['steps']:,} env "
        f"steps since the last update{left_out}"
    )


def copied(state: Any) -> Any:
    """A tree whose tensors share no memory with those of `state`, and take none of a GPU."""
    if isinstance(state, Tensor):
        return state.detach().to("cpu", copy=True)
    if isinstance(state, Mapping):
        return {key: copied(value) for key, value in state.items()}
    return [copied(value) for value in state] if isinstance(state, list | tuple) else state


def _take_apart(value: Any, tensors: dict[str, Tensor], name: str = "") -> Any:
    """A tree with names in place of its tensors and arrays, which are put into `tensors`."""
    if isinstance(value, Tensor):
        tensors[name] = value.detach()
        return {"tensor": name}
    if isinstance(value, np.ndarray):
        tensors[name] = torch.from_numpy(np.asarray(value, order="C"))
        return {"array": name}
    if isinstance(value, Mapping):
        return {key: _take_apart(item, tensors, f"{name}/{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_take_apart(item, tensors, f"{name}/{index}") for index, item in enumerate(value)]
    return value.item() if isinstance(value, np.generic) else value


def _put_together(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, dict):
        for kind in ("tensor", "array"):
            if value.keys() == {kind} and isinstance(value[kind], str):
                found = tensors[value[kind]]
                return found if kind == "tensor" else found.numpy()
        return {key: _put_together(item, tensors) for key, item in value.items()}
    return [_put_together(item, tensors) for item in value] if isinstance(value, list) else value


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> list[Any]:
    """Write a safetensors file tensor by tensor: `safetensors.torch.save_file` would copy all of them in RAM first.

    Args:
        path: of the file.
        tensors: by name; the widest types come first, so that each lies at a multiple of its size.

    Returns:
        What `vla_rl.rundir.file_digest` gives for the file, without reading it again.
    """
    names = sorted(tensors, key=lambda name: -tensors[name].element_size())
    header, end = {}, 0
    for name in names:
        tensor = tensors[name]
        begin, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    words = json.dumps(header).encode()
    words += b" " * (-len(words) % 8)
    parts = (tensors[name].cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data for name in names)
    size, digest = 0, new_digest()
    with path.open("wb") as file:
        for part in chain([len(words).to_bytes(8, "little") + words], parts):
            size += len(part)
            digest.update(part)
            file.write(part)
    return [size, digest.hexdigest()]


def random_state() -> State:
    """The global generators of Python, NumPy and torch."""
    version, numbers, gauss = random.getstate()
    state: State = {
        "python": [version, list(numbers), gauss],
        "numpy": np.random.get_state(legacy=False),
        "torch": torch.get_rng_state(),
    }
    return state | ({"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {})


def set_random_state(state: State) -> None:
    """Go on drawing where `random_state` was taken."""
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"].clone())
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"].clone())
