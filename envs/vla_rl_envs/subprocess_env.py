"""``VLA/Subprocess-v0``: an environment that runs in another Python, so that its packages need not fit ours."""

from __future__ import annotations

import os
import tempfile
import weakref
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, ClassVar

import gymnasium as gym
import numpy as np
from gymnasium import spaces

from vla_rl_envs._env_child import ChildProcess, SubprocessEnvError, find_interpreter
from vla_rl_envs._env_server import SharedArrays, decode, encode, store

__all__ = ["SubprocessEnv", "SubprocessEnvError"]

_ALIGNMENT = 64  # bytes


class SubprocessEnv(gym.Env[Any, Any]):
    """Any Gymnasium or Gym environment of any Python interpreter, as an ordinary environment of this one.

    A child process runs the environment with the packages of its own interpreter (Python 3.8 or newer, with numpy and
    either Gymnasium or Gym >= 0.21, whose older calls are translated). Observations, actions and pictures travel
    through shared memory as plain arrays, the rest as JSON: nothing is pickled, so that the versions of Python, numpy
    and Gymnasium on both sides may differ. What the simulator prints is kept for error messages.

    ## Observation, action, reward, episode end
    Those of the environment: spaces of Box, Discrete, MultiDiscrete, MultiBinary, Dict and Tuple come through
    unchanged. Infos come through where they are numbers, strings, arrays, or lists and dicts of them (tuples become
    lists); other entries are left out. ``unwrapped.instructions`` is the environment's own table, where it has one.

    ## Reset
    ``reset(seed=)`` goes to the environment's ``reset``, or to its ``seed`` where that is older.

    ## Failure
    An exception in the environment is raised here with its traceback, and the environment stays usable. A child that
    dies is reported with its exit code and last output; one that does not answer in time is ended. The child ends
    with this process, however that ends.

    Args:
        env_id: id in the other interpreter; ``"module:Name-v0"`` imports ``module`` first.
        python: path of the interpreter, such as ``envs/old/bin/python``; None is the one that runs this.
        kwargs: arguments of the environment.
        imports: modules that the child imports first, because they register the id.
        make_fn: ``"module:function"`` or ``"path/file.py:function"`` in the child; called as ``function(env_id,
            **kwargs)`` instead of ``make``, for what is not registered or has to be wrapped there.
        render_mode: given to the environment.
        timeout: most seconds for a step, a reset or a picture.
        make_timeout: most seconds for the construction.
        environ: environment variables of the child, beside this process's own.

    Raises:
        FileNotFoundError: if there is no such interpreter, or a file that the environment needs is missing.
        ModuleNotFoundError: if a package is missing in the interpreter.
        gymnasium.error.UnregisteredEnv: if nothing there has registered the id.
        ValueError: if the environment refuses its arguments.
        SubprocessEnvError: for anything else that goes wrong there.

    Example:
        >>> env = SubprocessEnv("CartPole-v1")
        >>> env.reset(seed=0)[0].shape
        (4,)
        >>> env.close()
    """

    metadata: ClassVar[dict[str, Any]] = {"render_modes": ["rgb_array", "human", "ansi"]}

    def __init__(
        self,
        env_id: str,
        python: str | None = None,
        *,
        kwargs: Mapping[str, Any] | None = None,
        imports: Sequence[str] = (),
        make_fn: str | None = None,
        render_mode: str | None = None,
        timeout: float = 60.0,
        make_timeout: float = 300.0,
        environ: Mapping[str, str] | None = None,
    ) -> None:
        self.env_id, self.render_mode, self.timeout = env_id, render_mode, timeout
        self.python = find_interpreter(python)
        self._memory: SharedArrays | None = None
        self._child: ChildProcess | None = ChildProcess(self.python, env_id, environ or {})
        weakref.finalize(self, self._child.close)  # of an environment that its owner forgot to close
        try:
            description = self._ask(
                "make", make_timeout, env_id=env_id, kwargs=encode(dict(kwargs or {})), imports=list(imports),
                make_fn=make_fn, render_mode=render_mode,
            )  # fmt: skip
            self.observation_space = _build_space(description["observation_space"])
            self.action_space = _build_space(description["action_space"])
            self.metadata = decode(description["metadata"])  # type: ignore[misc]
            if description["instructions"] is not None:
                self.instructions = tuple(description["instructions"])
            self._share_memory()
        except BaseException:
            self.close()
            raise

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Reset the environment; a seed and options go there."""
        super().reset(seed=seed)
        info = self._ask("reset", self.timeout, seed=None if seed is None else int(seed), options=encode(options))
        return self._observe(), decode(info)

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """Step the environment."""
        _store(self._actions, action)
        reward, terminated, truncated, info = self._ask("step", self.timeout)
        return self._observe(), reward, terminated, truncated, decode(info)

    def render(self) -> Any:
        """What the environment's ``render`` returns (an array, a string, a list of them or None)."""
        picture = self._ask("render", self.timeout)
        if "value" in picture:
            return decode(picture["value"])
        return self._arrays.view(self._picture_offset, picture["dtype"], picture["shape"]).copy()

    def call(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """Call a method, or read an attribute, of the unwrapped environment in the child.

        Arguments and result must be numbers, strings, arrays, None, or lists and dicts of them.
        """
        return decode(
            self._ask("call", self.timeout, name=name, args=encode(list(args)), kwargs=encode(kwargs)),
        )

    @property
    def pid(self) -> int | None:
        """Process id of the child; None once it has ended or was closed."""
        return None if self._child is None or self._child.process.poll() is not None else self._child.process.pid

    def close(self) -> None:
        """Close the environment and end the child, by force after five seconds."""
        child, self._child = self._child, None
        if child is not None:
            child.close()
        if self._memory is not None:
            self._memory.close()
            self._memory = None

    @property
    def _arrays(self) -> SharedArrays:
        if self._memory is None:
            raise gym.error.ClosedEnvironmentError(f"{self.env_id!r} is closed; make a new one.")
        return self._memory

    def _ask(self, command: str, timeout: float, **payload: Any) -> Any:
        if self._child is None:
            raise gym.error.ClosedEnvironmentError(f"{self.env_id!r} is closed; make a new one.")
        return self._child.ask(command, timeout, **payload)

    def _share_memory(self) -> None:
        layout = _Layout()
        observation, action = layout.place(self.observation_space), layout.place(self.action_space)
        path = _memory_file(layout.size)
        try:
            self._memory = SharedArrays(path)
            self._ask(
                "share", self.timeout, path=path, observation=_leaves(observation), action=action,
                picture_offset=layout.size,
            )  # fmt: skip
        finally:
            with suppress(OSError):  # both processes have it open; nothing is left behind when they end
                os.unlink(path)
        self._picture_offset = layout.size
        self._observations = _views(self._memory, observation)
        self._actions = _views(self._memory, action)

    def _observe(self) -> Any:
        return _copy(self._observations)


def _memory_file(size: int) -> str:
    for directory in ("/dev/shm", None):
        with suppress(OSError):
            fd, path = tempfile.mkstemp(prefix=f"vla_rl_envs-{os.getpid()}-", dir=directory)
            try:
                if hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(fd, 0, max(size, 1))
                else:
                    os.truncate(fd, max(size, 1))
                return path
            except OSError:
                os.unlink(path)
            finally:
                os.close(fd)
    raise OSError(f"no {size} bytes of shared memory: both /dev/shm and {tempfile.gettempdir()} are full or missing.")


def _build_space(description: Mapping[str, Any]) -> gym.Space[Any]:
    kind = description["kind"]
    if kind == "Dict":
        return spaces.Dict({key: _build_space(part) for key, part in description["spaces"]})
    if kind == "Tuple":
        return spaces.Tuple([_build_space(part) for part in description["spaces"]])
    if kind == "Box":
        dtype: Any = np.dtype(description["dtype"])
        return spaces.Box(decode(description["low"]), decode(description["high"]), dtype=dtype)
    if kind == "Discrete":
        return spaces.Discrete(description["n"], start=description["start"])
    if kind == "MultiBinary":
        return spaces.MultiBinary(description["shape"])
    dtype = np.dtype(description["dtype"])
    return spaces.MultiDiscrete(decode(description["nvec"]), dtype=dtype, start=decode(description["start"]))


class _Layout:
    """Gives the arrays of a space their places in the shared memory."""

    def __init__(self) -> None:
        self.size = 0

    def place(self, space: gym.Space[Any], path: tuple[Any, ...] = ()) -> dict[str, Any]:
        if isinstance(space, spaces.Dict):
            return {"Dict": [[key, self.place(part, (*path, key))] for key, part in space.spaces.items()]}
        if isinstance(space, spaces.Tuple):
            return {"Tuple": [self.place(part, (*path, index)) for index, part in enumerate(space.spaces)]}
        offset, dtype, shape = self.size, np.dtype(space.dtype), space.shape or ()
        size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        self.size += -(-size // _ALIGNMENT) * _ALIGNMENT
        is_int = isinstance(space, spaces.Discrete)
        return {"path": path, "offset": offset, "dtype": dtype.str, "shape": shape, "is_int": is_int}


def _leaves(tree: Mapping[str, Any]) -> list[Any]:
    if "Dict" in tree:
        return [leaf for _, part in tree["Dict"] for leaf in _leaves(part)]
    if "Tuple" in tree:
        return [leaf for part in tree["Tuple"] for leaf in _leaves(part)]
    return [tree]


def _views(memory: SharedArrays, tree: Mapping[str, Any]) -> Any:
    if "Dict" in tree:
        return {key: _views(memory, part) for key, part in tree["Dict"]}
    if "Tuple" in tree:
        return tuple(_views(memory, part) for part in tree["Tuple"])
    return memory.view(tree["offset"], tree["dtype"], tree["shape"])


def _copy(views: Any) -> Any:
    if isinstance(views, dict):
        return {key: _copy(part) for key, part in views.items()}
    if isinstance(views, tuple):
        return tuple(_copy(part) for part in views)
    return views.copy() if views.ndim else views[()]


def _store(views: Any, values: Any) -> None:
    if isinstance(views, dict):
        for key, part in views.items():
            _store(part, values[key])
    elif isinstance(views, tuple):
        for part, value in zip(views, values, strict=True):
            _store(part, value)
    else:
        store(views, values, "the action")
