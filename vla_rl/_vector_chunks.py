"""The caller's side of the workers of ``vla_rl.vector``: how processes start, answer and end."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import sys
import time
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing import resource_tracker
from multiprocessing.connection import wait
from multiprocessing.util import Finalize
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.vector import AutoresetMode
from gymnasium.vector.utils import CloudpickleWrapper

from vla_rl._vector_checks import LostWorkerError, WorkerError
from vla_rl._vector_worker import Chunk, serve

EnvFns = Sequence[Callable[[], gym.Env]]
Bounds = tuple[int, int]

SINGLE_THREADED: dict[str, str] = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "LP_NUM_THREADS": "0",  # Mesa's software renderer: draw in the calling thread
}
"""Environment variables of a worker process, of which there are about as many as cores."""
LOSS: dict[str, Any] = {"success": False, "worker_restarted": True}
"""Info of an environment whose episode was cut off by the end of its worker."""
CLOSE_TIMEOUT = 5.0  # seconds
_CONSTRUCTION_FACTOR = 10  # building environments may take so much longer than a step


class LocalChunk:
    """The interface of ``RemoteChunk`` without a process, for ``num_workers=0``: ``send`` does the work at once."""

    def __init__(self, env_fns: EnvFns, autoreset_mode: AutoresetMode, bounds: Bounds) -> None:
        self.index, self.bounds = 0, bounds
        self.chunk = Chunk(env_fns, autoreset_mode, first=bounds[0])
        self.busy: str | None = "construction"
        self.reply: tuple[bool, Any] = (True, self.chunk.description())

    def send(self, command: str, payload: Any) -> None:
        self.busy = command
        try:
            self.reply = (True, self.chunk.handle(command, payload))
        except Exception as error:
            self.reply = (False, error)

    def receive(self, what: str) -> tuple[bool, Any]:
        self.busy = None
        return self.reply

    def request_close(self) -> None:
        self.chunk.close()

    def join(self, deadline: float) -> None:
        pass


class RemoteChunk:
    """A contiguous chunk of environments that lives in a worker process.

    Attributes:
        index: 0, or 1 for the second chunk of its worker.
        bounds: first row and the one after the last.
        busy: the command whose answer has not been received yet.
        seeds: latest seed that each environment was reset with.
        shared: what ``attach`` was sent with.
        lost: which environments were built anew without the caller having been told yet, bool [rows].
        telling: those that the answer to the pending step tells of.
    """

    def __init__(self, process: WorkerProcess, index: int, bounds: Bounds) -> None:
        self.process, self.index, self.bounds = process, index, bounds
        self.busy: str | None = "construction"
        self.seeds: list[int | None] = [None] * (bounds[1] - bounds[0])
        self.shared: Any = None
        self.lost = np.zeros(bounds[1] - bounds[0], dtype=np.bool_)
        self.telling = self.lost

    def send(self, command: str, payload: Any) -> None:
        """Send a command; a dead worker is reported by ``receive``, when the others have answered too."""
        self.busy = command
        if command == "attach":
            self.shared = payload
        elif command == "reset":
            self.seeds = [old if new is None else new for old, new in zip(self.seeds, payload[0], strict=True)]
            self.lost[(payload[1] or {}).get("reset_mask", True)] = False
        elif command == "step":
            self.telling, self.lost = self.lost, np.zeros_like(self.lost)
            payload = (payload[0], payload[1] & ~self.telling)
        with suppress(OSError):
            self.process.pipe.send((self.index, command, payload))

    def receive(self, what: str) -> tuple[bool, Any]:
        """Wait for the answer: whether it worked, and the result or the error or its text."""
        start, stop = self.bounds
        named = f"the worker of sub-environments {start}..{stop - 1}"
        try:
            try:
                ok, reply = self.process.answer(self.index)
            except (EOFError, OSError):
                if not self.process.restart():
                    raise
                ok, reply = self.process.answer(self.index)
        except TimeoutError as error:
            ok, reply = (
                False,
                LostWorkerError(f"{named} did not answer during {what} within {error} seconds and was ended; {_HANGS}"),
            )
        except (EOFError, OSError):
            ok, reply = False, LostWorkerError(f"{named} died during {what} {self.process.obituary()}")
        else:
            if ok and self.busy == "step":
                infos, (_, _, truncations) = reply
                infos += [(int(i), {**LOSS}) for i in np.flatnonzero(self.telling)]
                truncations |= self.telling
            reply = reply if ok or isinstance(reply, Exception) else f"{named} raised during {what}:\n{reply}"
        self.busy = None
        return ok, reply


_HANGS = "look for what it waits for, or give a longer timeout."


class WorkerProcess:
    """One worker process with its chunks, and the pipe to it.

    Attributes:
        restarts: how often it was ended and started again.
    """

    def __init__(
        self,
        env_fns: Sequence[EnvFns],
        autoreset_mode: AutoresetMode,
        bounds: Sequence[Bounds],
        context: str | None,
        *,
        timeout: float | None = None,
        max_restarts: int = 0,
    ) -> None:
        self.chunks = [RemoteChunk(self, index, rows) for index, rows in enumerate(bounds)]
        self.timeout, self.max_restarts, self.restarts = timeout, max_restarts, 0
        self._answers: dict[int, tuple[bool, Any]] = {}
        self._mp = multiprocessing.get_context(context)
        payload = [pickle.dumps(CloudpickleWrapper(thunks)) for thunks in env_fns]  # type: ignore[arg-type]
        self._arguments = (payload, autoreset_mode, [start for start, _ in bounds])
        self._start()

    def _start(self) -> None:
        self.pipe, child_pipe = self._mp.Pipe()
        self.process = self._mp.Process(target=serve, args=(child_pipe, *self._arguments), daemon=True)  # type: ignore
        # A forked worker without a tracker to inherit would start its own, which frees the memory when the worker ends.
        resource_tracker.ensure_running()
        with worker_surroundings():
            self.process.start()
        Finalize(self, self.process.kill, exitpriority=0)  # at exit multiprocessing's SIGTERM would be ignored
        child_pipe.close()

    def answer(self, index: int) -> tuple[bool, Any]:
        """The next answer of one chunk; those of other chunks that come first are kept for them.

        Raises:
            TimeoutError: the worker sends nothing at all for too long; it is dead now.
            EOFError: the worker died.
        """
        building = any(chunk.busy == "construction" for chunk in self.chunks)
        timeout = self.timeout and self.timeout * (_CONSTRUCTION_FACTOR if building else 1)
        while index not in self._answers:
            if timeout is not None and not self.pipe.poll(timeout):
                self.process.kill()
                raise TimeoutError(f"{timeout:g}")
            other, ok, reply = self.pipe.recv()
            self._answers[other] = (ok, reply)
        return self._answers.pop(index)

    def tell_loss(self, chunk: RemoteChunk) -> None:
        """Answer a step in place of environments that are no more: all their episodes are cut off."""
        count = chunk.bounds[1] - chunk.bounds[0]
        infos = [(i, {**LOSS}) for i in range(count)]
        none = np.zeros(count, dtype=np.bool_)
        self._answers[chunk.index] = (True, (infos, (np.zeros(count), none, ~none)))

    def restart(self) -> bool:
        """Start the worker again in the middle of a step, with new seeds; False if that is not wanted or possible."""
        if self.restarts >= self.max_restarts or not all(chunk.busy in (None, "step") for chunk in self.chunks):
            return False
        self.restarts += 1
        self.process.kill()
        self.process.join()
        self.pipe.close()
        self._answers.clear()
        asked = [chunk for chunk in self.chunks if chunk.busy == "step"]
        self._start()
        for chunk in self.chunks:
            chunk.busy = "construction"
        for chunk in self.chunks:
            self._require(chunk)
        for chunk in self.chunks:
            seeds = [None if seed is None else _other_seed(seed, self.restarts) for seed in chunk.seeds]
            chunk.send("revive", (seeds, chunk.shared))
            self._require(chunk)
            chunk.lost[:] = chunk not in asked
            chunk.telling = np.zeros_like(chunk.lost)
        for chunk in asked:
            chunk.busy = "step"
            self.tell_loss(chunk)
        return True

    def _require(self, chunk: RemoteChunk) -> None:
        ok, reply = self.answer(chunk.index)
        chunk.busy = None
        if not ok:
            raise reply if isinstance(reply, Exception) else WorkerError(f"a restarted worker failed:\n{reply}")

    def obituary(self) -> str:
        self.process.join(CLOSE_TIMEOUT)
        return (
            f"(exit code {self.process.exitcode}); a negative code is the signal that ended it, -9 often means out of "
            "memory: use fewer environments."
        )

    def request_close(self) -> None:
        with suppress(OSError):
            self.pipe.send((0, "close", None))

    def join(self, deadline: float) -> None:
        """Wait until the time ``deadline`` of ``time.monotonic`` for the worker to end, then end it."""
        ends = [self.pipe, self.process.sentinel]
        with suppress(EOFError, OSError):  # an answer that nobody takes would keep the worker from closing
            while wait(ends, max(0.0, deadline - time.monotonic())) == [self.pipe]:
                self.pipe.recv_bytes()
        self.process.join(max(0.0, deadline - time.monotonic()))
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
        self.pipe.close()


def _other_seed(seed: int, number: int) -> int:
    return int(np.random.SeedSequence([seed, number]).generate_state(1)[0] >> 1)


@contextmanager
def worker_surroundings() -> Iterator[None]:
    """While workers start: one thread per numerical library, and no main script for them to import.

    A spawned process imports the parent's main script, which costs seconds when that imports torch and starts workers
    of its own when it has no ``__main__`` guard. The thunks are pickled by value, so that workers do not need it.
    """
    environment = {name: os.environ.get(name) for name in SINGLE_THREADED}
    main = sys.modules["__main__"]
    os.environ.update(SINGLE_THREADED)
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main
        for name, value in environment.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
