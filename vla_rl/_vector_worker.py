"""The worker side of ``vla_rl.vector``: the environments of one process and the memory their observations go to."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from copy import deepcopy
from functools import partial
from multiprocessing.connection import Connection
from multiprocessing.shared_memory import SharedMemory
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from gymnasium.vector.utils import create_empty_array, iterate

from vla_rl._vector_checks import CheckedEnv, EnvOutputError

_SHAREABLE = (spaces.Box, spaces.Discrete, spaces.MultiDiscrete, spaces.MultiBinary)
_ALIGNMENT = 64  # bytes
_ORPHAN_SECONDS = 5.0  # that a worker has to end by itself once its parent is gone


class _Idle:
    """Takes the place of an environment that a step leaves alone."""

    def __init__(self, observation: Any) -> None:
        self.observation = observation

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        return self.observation, 0.0, False, False, {}


class Chunk(SyncVectorEnv):
    """The environments of one worker: records the raw infos instead of merging them, and answers commands."""

    def __init__(
        self, env_fns: Sequence[Callable[[], gym.Env]], autoreset_mode: AutoresetMode, *, first: int = 0
    ) -> None:
        checked = [partial(_checked, env_fn, first + i) for i, env_fn in enumerate(env_fns)]
        super().__init__(checked, copy=False, autoreset_mode=autoreset_mode)
        self.raw_infos: list[tuple[int, dict[str, Any]]] = []
        self.memory: SharedMemory | None = None

    def _add_info(self, vector_infos: dict[str, Any], env_info: dict[str, Any], env_num: int) -> dict[str, Any]:
        # The reset that follows a final info may change objects that the environment still holds.
        self.raw_infos.append((env_num, deepcopy(env_info) if "final_info" in env_info else env_info))
        return vector_infos

    def description(self) -> dict[str, Any]:
        return {
            "observation_space": self.single_observation_space,
            "action_space": self.single_action_space,
            "metadata": {key: value for key, value in self.metadata.items() if key != "autoreset_mode"},
            "render_mode": self.render_mode,
        }

    def handle(self, command: str, payload: Any) -> Any:
        self.raw_infos = []
        if command == "step":
            actions, active = payload
            with self._left_alone(~active):
                _, rewards, terminations, truncations, _ = self.step(actions)
            return self.raw_infos, (rewards, terminations, truncations)
        if command == "reset":
            seeds, options = payload
            if options is None or "reset_mask" not in options or options["reset_mask"].any():
                self.reset(seed=seeds, options=options)
            return (self.raw_infos,)
        if command == "call":
            name, args, kwargs = payload
            return self.call(name, *args, **kwargs)
        if command == "set_attr":
            return self.set_attr(*payload)
        if command == "share":
            self._observations = payload
            return None
        if command == "attach":
            self._observations = self._attach(*payload)
            return None
        if command == "revive":
            seeds, shared = payload
            self.reset(seed=seeds)  # into memory of its own: the caller is to see the observations before the loss
            self._observations = self._attach(*shared)
            self._env_obs = deepcopy(list(iterate(self.observation_space, self._observations)))
            self._autoreset_envs[:] = True
            return None
        raise ValueError(f"unknown worker command {command!r}.")

    @contextmanager
    def _left_alone(self, idle: np.ndarray) -> Iterator[None]:
        if not idle.any():
            yield
            return
        envs, ended = self.envs, self._autoreset_envs[idle]
        self.envs = [_Idle(self._env_obs[i]) if idle[i] else env for i, env in enumerate(envs)]  # type: ignore[misc]
        self._autoreset_envs[idle] = False
        try:
            yield
        finally:
            self.envs = envs
            self._autoreset_envs[idle] = ended
        self.raw_infos = [(i, info) for i, info in self.raw_infos if not idle[i]]

    def detach(self) -> None:
        """Let go of the shared memory."""
        self._observations = None
        if self.memory is not None:
            with suppress(BufferError):
                self.memory.close()

    def _attach(self, name: str, num_envs: int, start: int, stop: int) -> Any:
        self.memory = SharedMemory(name=name)
        observations = create_empty_array(self.single_observation_space, n=num_envs, fn=Carver(self.memory.buf))
        return tree_slice(observations, start, stop)


def _checked(env_fn: Callable[[], gym.Env], number: int) -> gym.Env:
    return CheckedEnv(env_fn(), number=number)


def serve(pipe: Connection, env_fns: Sequence[bytes], autoreset_mode: AutoresetMode, firsts: Sequence[int]) -> None:
    """Build the chunks of environments and answer commands until ``close`` or until the parent is gone (worker side).

    A command is ``(chunk, name, payload)`` and its answer ``(chunk, whether it worked, result or traceback)``. A chunk
    that could not be built says so once, and its parent asks it nothing. ``firsts`` are the chunks' first rows.
    """
    for number in (signal.SIGINT, signal.SIGTERM):  # schedulers send it to all processes; the parent decides
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=end_with_parent, daemon=True).start()
    chunks = [
        _build(pipe, index, thunks, autoreset_mode, first)
        for index, (thunks, first) in enumerate(zip(env_fns, firsts, strict=True))
    ]
    while True:
        try:
            index, command, payload = pipe.recv()
        except (EOFError, OSError):
            break
        chunk = chunks[index]
        if command == "close" or chunk is None:
            break
        try:
            pipe.send((index, True, chunk.handle(command, payload)))
        except (BrokenPipeError, ConnectionResetError):
            break
        except EnvOutputError as error:
            pipe.send((index, False, error))
        except Exception:
            pipe.send((index, False, traceback.format_exc()))
    for chunk in chunks:
        if chunk is not None:
            chunk.close()
            chunk.detach()


def end_with_parent() -> None:
    """End this process after its parent, even while an environment hangs."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        time.sleep(_ORPHAN_SECONDS)
        os._exit(1)


def _build(pipe: Connection, index: int, env_fns: bytes, autoreset_mode: AutoresetMode, first: int) -> Chunk | None:
    """One chunk, or None, with the first answer to the parent."""
    try:
        chunk = Chunk(pickle.loads(env_fns).fn, autoreset_mode, first=first)
        pipe.send((index, True, chunk.description()))
        return chunk
    except EnvOutputError as error:
        pipe.send((index, False, error))
        return None
    except Exception:
        pipe.send((index, False, traceback.format_exc()))
        return None


class Carver:
    """Stands in for ``np.zeros`` in ``create_empty_array``: takes each array from one buffer, or only counts bytes."""

    def __init__(self, buffer: memoryview | None) -> None:
        self.buffer = buffer
        self.offset = 0

    def __call__(self, shape: tuple[int, ...], dtype: Any) -> np.ndarray | None:
        count, dtype = int(np.prod(shape)), np.dtype(dtype)
        start = self.offset
        self.offset += -(-count * dtype.itemsize // _ALIGNMENT) * _ALIGNMENT
        if self.buffer is None or count == 0:
            return np.zeros(shape, dtype) if count == 0 else None
        return np.frombuffer(self.buffer, dtype, count, start).reshape(shape)


def check_shareable(space: gym.Space) -> None:
    if isinstance(space, (spaces.Dict, spaces.Tuple)):
        for part in space.spaces.values() if isinstance(space, spaces.Dict) else space.spaces:
            check_shareable(part)
    elif not isinstance(space, _SHAREABLE):
        raise TypeError(
            f"the observation space has a part {space}, which has no fixed-size array to share between processes; "
            "use Box or Discrete (for an instruction: an integer task_id and a static `instructions` table)."
        )


def tree_slice(tree: Any, start: int, stop: int) -> Any:
    if isinstance(tree, dict):
        return {key: tree_slice(value, start, stop) for key, value in tree.items()}
    if isinstance(tree, tuple):
        return tuple(tree_slice(value, start, stop) for value in tree)
    return tree[start:stop]
