"""A vector environment that runs many sub-environments in few worker processes, without importing torch."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from copy import deepcopy
from multiprocessing import resource_tracker
from multiprocessing.shared_memory import SharedMemory
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.error import AlreadyPendingCallError, ClosedEnvironmentError, NoAsyncCallError
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import CloudpickleWrapper, batch_space, create_empty_array

from vla_rl._vector_worker import Carver, Chunk, check_shareable, serve, tree_slice

_SINGLE_THREADED: dict[str, str] = dict.fromkeys(
    ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "LP_NUM_THREADS"), "1"
)
_CLOSE_TIMEOUT = 5.0  # seconds


class WorkerError(RuntimeError):
    """A sub-environment raised in its worker, or the worker itself died; the text carries the worker's traceback."""


class WorkerVectorEnv(VectorEnv):
    """Run ``len(env_fns)`` environments in ``num_workers`` processes, with the data of ``SyncVectorEnv``.

    Every worker steps a contiguous chunk of the environments one after the other, so that a renderer or a simulator
    library is loaded once per worker and not once per environment (Gymnasium's ``AsyncVectorEnv`` starts one process
    per environment). Observations travel through shared memory; actions, rewards and infos through a pipe.
    ``reset``, ``step``, ``call``, ``get_attr``, ``set_attr`` and ``render`` return what ``SyncVectorEnv(env_fns)``
    returns, in all three autoreset modes. Workers run single-threaded and never import the caller's main script.

    Example:
        >>> import gymnasium as gym
        >>> envs = WorkerVectorEnv([lambda: gym.make("CartPole-v1")] * 4, num_workers=2)
        >>> observations, infos = envs.reset(seed=0)
        >>> observations.shape
        (4, 4)
        >>> envs.close()
    """

    def __init__(
        self,
        env_fns: Sequence[Callable[[], gym.Env]],
        *,
        num_workers: int = 2,
        autoreset_mode: AutoresetMode | str = AutoresetMode.NEXT_STEP,
        context: str | None = "spawn",
    ) -> None:
        """Start the workers and build the environments in them.

        Args:
            env_fns: one thunk per sub-environment; cloudpickle must be able to pickle them (lambdas are fine).
            num_workers: processes, at most one per environment; 0 runs everything in this process (for debugging).
            autoreset_mode: what happens after the end of an episode, as in ``gymnasium.vector``.
            context: multiprocessing start method; EGL contexts do not survive ``"fork"``.

        Raises:
            ValueError: if ``env_fns`` is empty or ``num_workers`` is negative.
            TypeError: if the observation space has a part that has no fixed-size array (such as ``spaces.Text``).
            RuntimeError: if the sub-environments' spaces differ.
            WorkerError: if an environment cannot be built; the text holds the worker's traceback.
        """
        super().__init__()
        env_fns = list(env_fns)
        if not env_fns or num_workers < 0:
            raise ValueError(
                f"WorkerVectorEnv got {len(env_fns)} env_fns and num_workers={num_workers}; "
                "give at least one env_fn and num_workers >= 0."
            )
        self.autoreset_mode = AutoresetMode(autoreset_mode)
        self.num_envs = len(env_fns)
        self.num_workers = min(num_workers, self.num_envs)
        self._pending: str | None = None
        self._memory: SharedMemory | None = None
        self._observations: Any = None
        self._workers: list[_Process | _InProcess] = []

        chunks = np.array_split(np.arange(self.num_envs), max(self.num_workers, 1))
        self._bounds = [(int(chunk[0]), int(chunk[-1]) + 1) for chunk in chunks]
        worker_type = _InProcess if self.num_workers == 0 else _Process
        try:
            for start, stop in self._bounds:
                self._workers.append(worker_type(env_fns[start:stop], self.autoreset_mode, (start, stop), context))
            descriptions = self._gather("construction")
            self._adopt_description(descriptions)
            self._share_memory()
        except BaseException:
            self.close()
            raise

    def _adopt_description(self, descriptions: list[dict[str, Any]]) -> None:
        first = descriptions[0]
        for (start, _), other in zip(self._bounds, descriptions, strict=True):
            for name in ("observation_space", "action_space"):
                if other[name] != first[name]:
                    raise RuntimeError(
                        f"sub-environment {start} has {name} {other[name]}, sub-environment 0 has {first[name]}; "
                        "all sub-environments need the same spaces."
                    )
        self.metadata = {**first["metadata"], "autoreset_mode": self.autoreset_mode}
        self.render_mode = first["render_mode"]
        self.single_observation_space = first["observation_space"]
        self.single_action_space = first["action_space"]
        self.observation_space = batch_space(self.single_observation_space, self.num_envs)
        self.action_space = batch_space(self.single_action_space, self.num_envs)

    def _share_memory(self) -> None:
        check_shareable(self.single_observation_space)
        if self.num_workers == 0:
            self._observations = create_empty_array(self.single_observation_space, n=self.num_envs)
            self._send_all("share", [tree_slice(self._observations, a, b) for a, b in self._bounds])
        else:
            counter = Carver(None)
            create_empty_array(self.single_observation_space, n=self.num_envs, fn=counter)
            self._memory = SharedMemory(create=True, size=max(counter.offset, 1))
            self._observations = create_empty_array(
                self.single_observation_space, n=self.num_envs, fn=Carver(self._memory.buf)
            )
            self._send_all("attach", [(self._memory.name, self.num_envs, a, b) for a, b in self._bounds])
        self._gather("construction")

    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """Reset all sub-environments, or those of ``options["reset_mask"]`` (bool [num_envs]).

        Args:
            seed: an int s gives environment i the seed s + i; a sequence gives one seed (or None) per environment.
            options: passed to every sub-environment, without ``reset_mask``.

        Returns:
            The batched observations (rows that were not reset are the latest ones) and the merged infos.
        """
        self._check_idle("reset")
        if seed is None or isinstance(seed, (int, np.integer)):
            seeds = [None if seed is None else int(seed) + i for i in range(self.num_envs)]
        else:
            seeds = list(seed)
        if len(seeds) != self.num_envs:
            raise ValueError(
                f"reset got {len(seeds)} seeds for num_envs={self.num_envs}; give one seed per environment."
            )
        options = None if options is None else dict(options)
        mask = None
        if options is not None and "reset_mask" in options:
            mask = _checked_mask(options.pop("reset_mask"), self.num_envs, name="options['reset_mask']")
        payloads = []
        for start, stop in self._bounds:
            chunk_options = options
            if mask is not None:
                chunk_options = {**(options or {}), "reset_mask": mask[start:stop]}
            payloads.append((seeds[start:stop], chunk_options))
        self._send_all("reset", payloads)
        replies = self._gather("reset")
        return deepcopy(self._observations), self._merge_infos(replies)

    def step(
        self, actions: Any, *, active: np.ndarray | None = None
    ) -> tuple[Any, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Step every sub-environment once, or only the active ones; see ``step_async``."""
        self.step_async(actions, active=active)
        return self.step_wait()

    def step_async(self, actions: Any, *, active: np.ndarray | None = None) -> None:
        """Send the actions and return at once; ``step_wait`` collects the results.

        Args:
            actions: batch of ``action_space``.
            active: bool [num_envs]; a sub-environment where it is False is left alone: it costs nothing, its row
                repeats the latest observation with reward 0, without end and info. Only with
                ``AutoresetMode.DISABLED``.

        Raises:
            ValueError: if ``active`` is given in another autoreset mode, or is not such an array.
        """
        self._check_idle("step_async")
        if active is not None and self.autoreset_mode is not AutoresetMode.DISABLED:
            raise ValueError(f"`active` needs AutoresetMode.DISABLED, this environment has {self.autoreset_mode}.")
        if active is None:
            active = np.ones(self.num_envs, dtype=np.bool_)
        active = _checked_mask(active, self.num_envs, name="active")
        space = self.single_action_space
        self._send_all("step", [(_slice_actions(space, actions, a, b), active[a:b]) for a, b in self._bounds])
        self._pending = "step"

    def step_wait(self) -> tuple[Any, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Wait for the step that ``step_async`` started and return what ``step`` returns."""
        self._check_open()
        if self._pending != "step":
            raise NoAsyncCallError("step_wait was called without a preceding step_async.", "step")
        replies = self._gather("step")
        rewards, terminations, truncations = (np.concatenate([reply[1][k] for reply in replies]) for k in range(3))
        return deepcopy(self._observations), rewards, terminations, truncations, self._merge_infos(replies)

    def call(self, name: str, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        """Call a method, or read an attribute, of every sub-environment (through its wrappers)."""
        self._check_idle("call")
        self._send_all("call", [(name, args, kwargs)] * len(self._workers))
        return tuple(result for reply in self._gather(f"call of {name!r}") for result in reply)

    def get_attr(self, name: str) -> tuple[Any, ...]:
        """Read an attribute of every sub-environment."""
        return self.call(name)

    def set_attr(self, name: str, values: Any) -> None:
        """Set an attribute of the sub-environments, from one value each (list or tuple) or one for all."""
        self._check_idle("set_attr")
        values = list(values) if isinstance(values, (list, tuple)) else [values] * self.num_envs
        if len(values) != self.num_envs:
            raise ValueError(
                f"set_attr got {len(values)} values for num_envs={self.num_envs}; give one or {self.num_envs}."
            )
        self._send_all("set_attr", [(name, values[start:stop]) for start, stop in self._bounds])
        self._gather(f"set_attr of {name!r}")

    def render(self) -> tuple[Any, ...]:
        """Return ``render()`` of every sub-environment."""
        return self.call("render")

    @property
    def np_random_seed(self) -> tuple[int, ...]:
        """The seed of every sub-environment's generator."""
        return self.get_attr("np_random_seed")

    @property
    def np_random(self) -> tuple[np.random.Generator, ...]:
        """Copies of the sub-environments' generators."""
        return self.get_attr("np_random")

    def close_extras(self, **kwargs: Any) -> None:
        """Close the sub-environments, end the workers (by force after five seconds) and free the shared memory."""
        for worker in self._workers:
            worker.request_close()
        for worker in self._workers:
            worker.join()
        self._workers = []
        self._observations = None
        if self._memory is not None:
            with suppress(BufferError):
                self._memory.close()
            self._memory.unlink()
            self._memory = None

    def __del__(self) -> None:
        """Close what the owner forgot to close."""
        if getattr(self, "_workers", None):
            self.close()

    def _check_open(self) -> None:
        if self.closed:
            raise ClosedEnvironmentError("this WorkerVectorEnv is closed; build a new one.")

    def _check_idle(self, name: str) -> None:
        self._check_open()
        if self._pending is not None:
            raise AlreadyPendingCallError(
                f"{name} was called while a {self._pending} is pending; call step_wait (after an interrupt: close).",
                name,
            )

    def _send_all(self, command: str, payloads: Sequence[Any]) -> None:
        for worker, payload in zip(self._workers, payloads, strict=True):
            worker.send(command, payload)

    def _gather(self, what: str) -> list[Any]:
        self._pending = what  # stays when the caller interrupts the wait: the answers would be out of step
        replies = [worker.receive(what) for worker in self._workers]
        self._pending = None
        errors = [reply for ok, reply in replies if not ok]
        if errors:
            raise WorkerError("\n".join(errors))
        return [reply for _, reply in replies]

    def _merge_infos(self, replies: Sequence[Any]) -> dict[str, Any]:
        infos: dict[str, Any] = {}
        for (start, _), reply in zip(self._bounds, replies, strict=True):
            for index, info in reply[0]:
                infos = self._add_info(infos, info, start + index)
        return infos


class _InProcess:
    """The interface of ``_Process`` without a process, for ``num_workers=0``."""

    def __init__(
        self,
        env_fns: Sequence[Callable[[], gym.Env]],
        autoreset_mode: AutoresetMode,
        bounds: tuple[int, int],
        context: str | None,
    ) -> None:
        self.chunk = Chunk(env_fns, autoreset_mode)
        self.reply: Any = self.chunk.description()

    def send(self, command: str, payload: Any) -> None:
        self.reply = self.chunk.handle(command, payload)

    def receive(self, what: str) -> tuple[bool, Any]:
        return True, self.reply

    def request_close(self) -> None:
        self.chunk.close()

    def join(self) -> None:
        pass


class _Process:
    """One worker process and the pipe to it."""

    def __init__(
        self,
        env_fns: Sequence[Callable[[], gym.Env]],
        autoreset_mode: AutoresetMode,
        bounds: tuple[int, int],
        context: str | None,
    ) -> None:
        self.bounds = bounds
        mp = multiprocessing.get_context(context)
        self.pipe, child_pipe = mp.Pipe()
        payload = pickle.dumps(CloudpickleWrapper(env_fns))  # type: ignore[arg-type]
        self.process = mp.Process(target=serve, args=(child_pipe, payload, autoreset_mode), daemon=True)  # type: ignore
        # A forked worker without a tracker to inherit would start its own, which frees the memory when the worker ends.
        resource_tracker.ensure_running()
        with _worker_surroundings():
            self.process.start()
        child_pipe.close()

    def send(self, command: str, payload: Any) -> None:
        with suppress(OSError):  # a dead worker is reported by receive, when the others have answered too
            self.pipe.send((command, payload))

    def receive(self, what: str) -> tuple[bool, Any]:
        try:
            ok, reply = self.pipe.recv()
        except (EOFError, OSError):
            return False, self._obituary(what)
        if ok:
            return True, reply
        start, stop = self.bounds
        return False, f"the worker of sub-environments {start}..{stop - 1} raised during {what}:\n{reply}"

    def _obituary(self, what: str) -> str:
        self.process.join(_CLOSE_TIMEOUT)
        start, stop = self.bounds
        return (
            f"the worker of sub-environments {start}..{stop - 1} died during {what} "
            f"(exit code {self.process.exitcode}); a negative code is the signal that ended it, -9 often means out of "
            "memory: use fewer environments."
        )

    def request_close(self) -> None:
        with suppress(OSError):
            self.pipe.send(("close", None))

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
    environment = {name: os.environ.get(name) for name in _SINGLE_THREADED}
    main = sys.modules["__main__"]
    os.environ.update(_SINGLE_THREADED)
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


def _checked_mask(mask: Any, num_envs: int, *, name: str) -> np.ndarray:
    if not isinstance(mask, np.ndarray) or mask.dtype != np.bool_ or mask.shape != (num_envs,) or not mask.any():
        raise ValueError(
            f"{name} is {mask!r}; give a boolean numpy array of shape ({num_envs},) with at least one True."
        )
    return mask


def _slice_actions(space: gym.Space, actions: Any, start: int, stop: int) -> Any:
    if isinstance(space, spaces.Dict):
        return {key: _slice_actions(part, actions[key], start, stop) for key, part in space.spaces.items()}
    if isinstance(space, spaces.Tuple):
        return tuple(_slice_actions(part, actions[k], start, stop) for k, part in enumerate(space.spaces))
    return actions[start:stop]
