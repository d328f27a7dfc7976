"""The caller's side of the workers of ``vla_rl.vector``: how processes start, answer and end."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing import resource_tracker
from typing import Any

import gymnasium as gym
from gymnasium.vector import AutoresetMode
from gymnasium.vector.utils import CloudpickleWrapper

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
_CLOSE_TIMEOUT = 5.0  # seconds


class LocalChunk:
    """The interface of ``RemoteChunk`` without a process, for ``num_workers=0``: ``send`` does the work at once."""

    def __init__(self, env_fns: EnvFns, autoreset_mode: AutoresetMode, bounds: Bounds) -> None:
        self.bounds = bounds
        self.chunk = Chunk(env_fns, autoreset_mode)
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

    def join(self) -> None:
        pass


class RemoteChunk:
    """A contiguous chunk of environments that lives in a worker process.

    Attributes:
        bounds: first row and the one after the last.
        busy: the command whose answer has not been received yet.
    """

    def __init__(self, process: WorkerProcess, index: int, bounds: Bounds) -> None:
        self.process, self.index, self.bounds = process, index, bounds
        self.busy: str | None = "construction"

    def send(self, command: str, payload: Any) -> None:
        """Send a command; a dead worker is reported by ``receive``, when the others have answered too."""
        self.busy = command
        with suppress(OSError):
            self.process.pipe.send((self.index, command, payload))

    def receive(self, what: str) -> tuple[bool, Any]:
        """Wait for the answer: whether it worked, and the result or the text of the error."""
        start, stop = self.bounds
        named = f"the worker of sub-environments {start}..{stop - 1}"
        try:
            ok, reply = self.process.answer(self.index)
        except (EOFError, OSError):
            ok, reply = False, f"{named} died during {what} {self.process.obituary()}"
        else:
            reply = reply if ok else f"{named} raised during {what}:\n{reply}"
        self.busy = None
        return ok, reply


class WorkerProcess:
    """One worker process with its chunks, and the pipe to it."""

    def __init__(
        self, env_fns: Sequence[EnvFns], autoreset_mode: AutoresetMode, bounds: Sequence[Bounds], context: str | None
    ) -> None:
        self.chunks = [RemoteChunk(self, index, rows) for index, rows in enumerate(bounds)]
        self._answers: dict[int, tuple[bool, Any]] = {}
        mp = multiprocessing.get_context(context)
        self.pipe, child_pipe = mp.Pipe()
        payload = [pickle.dumps(CloudpickleWrapper(thunks)) for thunks in env_fns]  # type: ignore[arg-type]
        self.process = mp.Process(target=serve, args=(child_pipe, payload, autoreset_mode), daemon=True)  # type: ignore
        # A forked worker without a tracker to inherit would start its own, which frees the memory when the worker ends.
        resource_tracker.ensure_running()
        with _worker_surroundings():
            self.process.start()
        child_pipe.close()

    def answer(self, index: int) -> tuple[bool, Any]:
        """The next answer of one chunk; those of other chunks that come first are kept for them."""
        while index not in self._answers:
            other, ok, reply = self.pipe.recv()
            self._answers[other] = (ok, reply)
        return self._answers.pop(index)

    def obituary(self) -> str:
        self.process.join(_CLOSE_TIMEOUT)
        return (
            f"(exit code {self.process.exitcode}); a negative code is the signal that ended it, -9 often means out of "
            "memory: use fewer environments."
        )

    def request_close(self) -> None:
        with suppress(OSError):
            self.pipe.send((0, "close", None))

    def join(self) -> None:
        self.process.join(_CLOSE_TIMEOUT)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
        self.pipe.close()


@contextmanager
def _worker_surroundings() -> Iterator[None]:
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
