"""A vector environment that runs many sub-environments in few worker processes, without importing torch."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from copy import deepcopy
from multiprocessing.shared_memory import SharedMemory
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.error import AlreadyPendingCallError, ClosedEnvironmentError, NoAsyncCallError
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space, create_empty_array

from vla_rl._vector_checks import EnvOutputError, LostWorkerError, WorkerError
from vla_rl._vector_chunks import CLOSE_TIMEOUT, LocalChunk, RemoteChunk, WorkerProcess
from vla_rl._vector_worker import Carver, check_shareable, tree_slice

__all__ = ["EnvGroup", "EnvOutputError", "LostWorkerError", "WorkerError", "WorkerVectorEnv", "available_cores"]


class EnvGroup(VectorEnv):
    """Contiguous sub-environments of a ``WorkerVectorEnv``, to be stepped while the caller looks after another group.

    It steps and resets like any vector environment, in the autoreset mode of the whole, but the observations that it
    returns are views of the workers' memory: they change with its next ``step_async`` or ``reset``.

    Attributes:
        rows: slice of the whole's sub-environments.
    """

    rows: slice
    autoreset_mode: AutoresetMode
    _chunks: Sequence[LocalChunk | RemoteChunk]
    _observations: Any
    _copy = False
    _stepping = False

    @classmethod
    def _of(cls, whole: WorkerVectorEnv, chunks: Sequence[LocalChunk | RemoteChunk]) -> EnvGroup:
        group = cls()
        group._chunks = chunks
        group.rows = slice(chunks[0].bounds[0], chunks[-1].bounds[1])
        group.num_envs = group.rows.stop - group.rows.start
        group.autoreset_mode, group.metadata = whole.autoreset_mode, whole.metadata
        group.render_mode = whole.render_mode
        group.single_observation_space = whole.single_observation_space
        group.single_action_space = whole.single_action_space
        group.observation_space = batch_space(whole.single_observation_space, group.num_envs)
        group.action_space = batch_space(whole.single_action_space, group.num_envs)
        group._observations = tree_slice(whole._observations, group.rows.start, group.rows.stop)
        return group

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
        for chunk, rows in self._local_rows():
            chunk_options = options if mask is None else {**(options or {}), "reset_mask": mask[rows]}
            chunk.send("reset", (seeds[rows], chunk_options))
        replies = self._gather("reset")
        return self._latest_observations(), self._merge_infos(replies)

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
            ValueError: if ``active`` is given in another autoreset mode, or is not such an array; if an action is NaN,
                or there are more or fewer than environments.
        """
        self._check_idle("step_async")
        if active is not None and self.autoreset_mode is not AutoresetMode.DISABLED:
            raise ValueError(f"`active` needs AutoresetMode.DISABLED, this environment has {self.autoreset_mode}.")
        if active is None:
            active = np.ones(self.num_envs, dtype=np.bool_)
        active = _checked_mask(active, self.num_envs, name="active")
        _refuse_nan(actions, active)
        _require_rows(self.single_action_space, actions, self.num_envs)
        for chunk, rows in self._local_rows():
            chunk.send("step", (_slice_actions(self.single_action_space, actions, rows), active[rows]))
        self._stepping = True

    def step_wait(self) -> tuple[Any, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Wait for the step that ``step_async`` started and return what ``step`` returns."""
        self._check_open()
        if not self._stepping:
            raise NoAsyncCallError("step_wait was called without a preceding step_async.", "step")
        self._stepping = False
        replies = self._gather("step")
        rewards, terminations, truncations = (np.concatenate([reply[1][k] for reply in replies]) for k in range(3))
        return self._latest_observations(), rewards, terminations, truncations, self._merge_infos(replies)

    def _local_rows(self) -> list[tuple[LocalChunk | RemoteChunk, slice]]:
        """Every chunk with its rows, counted from the first of the group."""
        first = self.rows.start
        return [(chunk, slice(chunk.bounds[0] - first, chunk.bounds[1] - first)) for chunk in self._chunks]

    def _latest_observations(self) -> Any:
        return deepcopy(self._observations) if self._copy else self._observations

    def _check_open(self) -> None:
        if not self._chunks:
            raise ClosedEnvironmentError("this WorkerVectorEnv is closed; build a new one.")

    def _check_idle(self, name: str) -> None:
        self._check_open()
        for chunk in self._chunks:
            if chunk.busy is not None:
                raise AlreadyPendingCallError(
                    f"{name} was called while a {chunk.busy} is pending; call step_wait (after an interrupt: close).",
                    name,
                )

    def _gather(self, what: str, chunks: Sequence[LocalChunk | RemoteChunk] | None = None) -> list[Any]:
        replies = [chunk.receive(what) for chunk in (self._chunks if chunks is None else chunks)]
        errors = [reply for ok, reply in replies if not ok]
        for error in errors:
            if isinstance(error, Exception):
                raise error
        if errors:
            raise WorkerError("\n".join(errors))
        return [reply for _, reply in replies]

    def _merge_infos(self, replies: Sequence[Any]) -> dict[str, Any]:
        infos: dict[str, Any] = {}
        for (_, rows), reply in zip(self._local_rows(), replies, strict=True):
            for index, info in reply[0]:
                infos = self._add_info(infos, info, rows.start + index)
        return infos


def available_cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class WorkerVectorEnv(EnvGroup):
    """Run ``len(env_fns)`` environments in ``num_workers`` processes, with the data of ``SyncVectorEnv``.

    Every worker steps contiguous environments one after the other, so that a renderer or a simulator library is loaded
    once per worker and not once per environment (Gymnasium's ``AsyncVectorEnv`` starts one process per environment).
    Observations travel through shared memory; actions, rewards and infos through a pipe. ``reset``, ``step``, ``call``,
    ``get_attr``, ``set_attr`` and ``render`` return what ``SyncVectorEnv(env_fns)`` returns, in all three autoreset
    modes. Workers run single-threaded (numerical libraries and the software renderer: their processes share the cores
    already) and never import the caller's main script.

    The environments also come as ``groups``, two halves that step on their own: while the workers simulate and render
    one half, a policy chooses the actions of the other. The halves do not depend on ``num_workers``, so neither does
    what a policy sees in one batch.

    Example:
        >>> import gymnasium as gym
        >>> envs = WorkerVectorEnv([lambda: gym.make("CartPole-v1")] * 4, num_workers=2)
        >>> observations, infos = envs.reset(seed=0)
        >>> observations.shape
        (4, 4)
        >>> first, second = envs.groups
        >>> first.step_async(first.action_space.sample())
        >>> second.step_async(second.action_space.sample())  # the first half is stepping meanwhile
        >>> first.step_wait()[0].shape
        (2, 4)
        >>> observations = second.step_wait()[0]
        >>> envs.close()

    With ``timeout`` and ``max_restarts``, a worker that hangs or dies during a step is ended and started again, with
    other seeds: its environments' rows come back truncated, with their latest observations, reward 0 and
    ``info["worker_restarted"]``, and reset at the next step. That needs ``AutoresetMode.NEXT_STEP``.

    What environments return is checked against their spaces where they are stepped (``EnvOutputError``).

    Attributes:
        groups: the two halves (one group for a single environment); see ``EnvGroup``.
        num_workers: processes.
    """

    _copy = True

    def __init__(
        self,
        env_fns: Sequence[Callable[[], gym.Env]],
        *,
        num_workers: int | None = None,
        autoreset_mode: AutoresetMode | str = AutoresetMode.NEXT_STEP,
        context: str | None = "spawn",
        timeout: float | None = None,
        max_restarts: int = 0,
    ) -> None:
        """Start the workers and build the environments in them.

        Args:
            env_fns: one thunk per sub-environment; cloudpickle must be able to pickle them (lambdas are fine).
            num_workers: processes, at most one per environment; 0 runs everything in this process (for debugging). None
                leaves one core to the caller, who computes meanwhile: one less than there are cores, from 1 to 8.
            autoreset_mode: what happens after the end of an episode, as in ``gymnasium.vector``.
            context: multiprocessing start method; EGL contexts do not survive ``"fork"``.
            timeout: seconds without any answer after which a worker counts as hanging (ten times as many while it
                builds its environments); None waits for ever, as ``num_workers=0`` does.
            max_restarts: how often each worker that hangs or dies is started again, in place of a ``WorkerError``.

        Raises:
            ValueError: if ``env_fns`` is empty, ``num_workers`` is negative, ``timeout`` is not positive, or
                ``max_restarts`` is given in another mode than NEXT_STEP.
            TypeError: if the observation space has a part that has no fixed-size array (such as ``spaces.Text``).
            RuntimeError: if the sub-environments' spaces differ.
            WorkerError: if an environment cannot be built; the text holds the worker's traceback.
            EnvOutputError: if an ``env_fn`` returns no environment.
        """
        super().__init__()
        env_fns = list(env_fns)
        if num_workers is None:
            num_workers = min(max(available_cores() - 1, 1), 8)
        if not env_fns or num_workers < 0:
            raise ValueError(
                f"WorkerVectorEnv got {len(env_fns)} env_fns and num_workers={num_workers}; "
                "give at least one env_fn and num_workers >= 0."
            )
        self.autoreset_mode = AutoresetMode(autoreset_mode)
        if timeout is not None and timeout <= 0:
            raise ValueError(f"timeout={timeout}; give seconds above 0, or None to wait for ever.")
        if max_restarts and self.autoreset_mode is not AutoresetMode.NEXT_STEP:
            raise ValueError(f"max_restarts={max_restarts} needs AutoresetMode.NEXT_STEP, not {self.autoreset_mode}.")
        self.num_envs = len(env_fns)
        self.rows = slice(0, self.num_envs)
        self.num_workers = min(num_workers, self.num_envs)
        self._memory: SharedMemory | None = None
        self._observations = None
        self._chunks: list[LocalChunk | RemoteChunk] = []
        self._processes: list[WorkerProcess] = []

        halves = _split(self.num_envs, 2)
        try:
            for start, stop in _split(self.num_envs, max(self.num_workers, 1)):
                bounds = [(max(start, a), min(stop, b)) for a, b in halves if max(start, a) < min(stop, b)]
                thunks = [env_fns[a:b] for a, b in bounds]
                if self.num_workers:
                    process = WorkerProcess(
                        thunks, self.autoreset_mode, bounds, context, timeout=timeout, max_restarts=max_restarts
                    )
                    self._processes.append(process)
                    self._chunks += process.chunks
                else:
                    for local, rows in zip(thunks, bounds, strict=True):
                        self._chunks.append(LocalChunk(local, self.autoreset_mode, rows))
            self._adopt_description(self._gather("construction"))
            self._share_memory()
            self.groups = tuple(
                EnvGroup._of(self, [chunk for chunk in self._chunks if a <= chunk.bounds[0] < b]) for a, b in halves
            )
        except BaseException:
            self.close()
            raise

    def _adopt_description(self, descriptions: list[dict[str, Any]]) -> None:
        first = descriptions[0]
        for chunk, other in zip(self._chunks, descriptions, strict=True):
            for name in ("observation_space", "action_space"):
                if other[name] != first[name]:
                    raise RuntimeError(
                        f"sub-environment {chunk.bounds[0]} has {name} {other[name]}, sub-environment 0 has "
                        f"{first[name]}; all sub-environments need the same spaces."
                    )
        self.metadata = {**first["metadata"], "autoreset_mode": self.autoreset_mode}
        self.render_mode = first["render_mode"]
        self.single_observation_space = first["observation_space"]
        self.single_action_space = first["action_space"]
        self.observation_space = batch_space(self.single_observation_space, self.num_envs)
        self.action_space = batch_space(self.single_action_space, self.num_envs)

    def _share_memory(self) -> None:
        space, count = self.single_observation_space, self.num_envs
        check_shareable(space)
        if self._processes:
            counter = Carver(None)
            create_empty_array(space, n=count, fn=counter)
            self._memory = SharedMemory(create=True, size=max(counter.offset, 1))
            self._observations = create_empty_array(space, n=count, fn=Carver(self._memory.buf))
            for chunk in self._chunks:
                chunk.send("attach", (self._memory.name, count, *chunk.bounds))
        else:
            self._observations = create_empty_array(space, n=count)
            for chunk in self._chunks:
                chunk.send("share", tree_slice(self._observations, *chunk.bounds))
        self._gather("construction")

    def call(self, name: str, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        """Call a method, or read an attribute, of every sub-environment (through its wrappers)."""
        self._check_idle("call")
        replies = {}
        for turn in (0, 1):  # a worker of two chunks that sends a long answer does not read a long question meanwhile
            chunks = [chunk for chunk in self._chunks if chunk.index == turn]
            for chunk in chunks:
                chunk.send("call", (name, args, kwargs))
            replies |= zip((chunk.bounds for chunk in chunks), self._gather(f"call of {name!r}", chunks), strict=True)
        return tuple(result for _, reply in sorted(replies.items()) for result in reply)

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
        for chunk, rows in self._local_rows():
            chunk.send("set_attr", (name, values[rows]))
        self._gather(f"set_attr of {name!r}")

    def render(self) -> tuple[Any, ...]:
        """Return ``render()`` of every sub-environment."""
        return self.call("render")

    @property
    def timeout(self) -> float | None:
        """Seconds without any answer after which a worker counts as hanging; may be set."""
        return self._processes[0].timeout if self._processes else None

    @timeout.setter
    def timeout(self, seconds: float | None) -> None:
        for process in self._processes:
            process.timeout = seconds

    @property
    def num_restarts(self) -> int:
        """How often a worker was started again."""
        return sum(process.restarts for process in self._processes)

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
        ends = self._processes or [chunk for chunk in self._chunks if isinstance(chunk, LocalChunk)]
        for end in ends:
            end.request_close()
        deadline = time.monotonic() + CLOSE_TIMEOUT
        for end in ends:
            end.join(deadline)
        self._processes = []
        for group in (self, *getattr(self, "groups", ())):
            group._chunks, group._observations = [], None
        if self._memory is not None:
            try:
                self._memory.close()
            except BufferError:  # somebody holds views still: the mapping goes with the last of them
                self._memory.close = lambda: None
            self._memory.unlink()
            self._memory = None

    def __del__(self) -> None:
        """Close what the owner forgot to close."""
        if getattr(self, "_chunks", None):
            self.close()


def _checked_mask(mask: Any, num_envs: int, *, name: str) -> np.ndarray:
    if not isinstance(mask, np.ndarray) or mask.dtype != np.bool_ or mask.shape != (num_envs,) or not mask.any():
        raise ValueError(
            f"{name} is {mask!r}; give a boolean numpy array of shape ({num_envs},) with at least one True."
        )
    return mask


def _refuse_nan(actions: Any, active: np.ndarray) -> None:
    if isinstance(actions, np.ndarray) and actions.dtype.kind == "f" and len(actions) == len(active):
        wrong = active & np.isnan(actions.reshape(len(active), -1)).any(axis=1)
        if np.any(wrong):
            raise ValueError(
                f"the actions of sub-environments {np.flatnonzero(wrong).tolist()} hold NaN; the policy's weights or "
                "its observations went wrong before this step."
            )


def _require_rows(space: gym.Space, actions: Any, count: int) -> None:
    """Refuse a batch of more actions than there are environments, which would be cut off."""
    if isinstance(space, spaces.Dict):
        for key, part in space.spaces.items():
            _require_rows(part, actions[key], count)
    elif isinstance(space, spaces.Tuple):
        for k, part in enumerate(space.spaces):
            _require_rows(part, actions[k], count)
    elif len(actions) != count:
        raise ValueError(f"got actions for {len(actions)} environments, there are {count}; give one for each.")


def _slice_actions(space: gym.Space, actions: Any, rows: slice) -> Any:
    if isinstance(space, spaces.Dict):
        return {key: _slice_actions(part, actions[key], rows) for key, part in space.spaces.items()}
    if isinstance(space, spaces.Tuple):
        return tuple(_slice_actions(part, actions[k], rows) for k, part in enumerate(space.spaces))
    return actions[rows]


def _split(count: int, parts: int) -> list[tuple[int, int]]:
    """Cut ``range(count)`` into contiguous parts of nearly equal length, none of them empty."""
    chunks = np.array_split(np.arange(count), min(parts, count))
    return [(int(chunk[0]), int(chunk[-1]) + 1) for chunk in chunks]
