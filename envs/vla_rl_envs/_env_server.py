"""The child of ``subprocess_env``: serves one environment over stdin and stdout, in any Python from 3.8 on.

Only the standard library and numpy are imported here, so that any interpreter that has the environment can run this
file as a script. The parent imports the functions that both sides need: messages, arrays in JSON, shared memory.
"""

from __future__ import annotations

import base64
import importlib
import importlib.util
import inspect
import json
import mmap
import os
import signal
import struct
import sys
import threading
import time
import traceback
from typing import Any, BinaryIO

if __name__ == "__main__":
    del sys.path[0]  # this directory, where a robohive.py and a metaworld.py would hide the packages of these names

import numpy as np

_ARRAY = "__array__"


def write_message(stream: BinaryIO, message: Any) -> None:
    """Send one message: its length in four bytes, then JSON."""
    data = json.dumps(message).encode()
    stream.write(struct.pack(">I", len(data)) + data)
    stream.flush()


def read_message(stream: BinaryIO) -> Any:
    """The next message, or None at the end of the stream."""
    header = stream.read(4)
    if len(header) < 4:
        return None
    size = struct.unpack(">I", header)[0]
    data = stream.read(size)
    return None if len(data) < size else json.loads(data)


def encode(value: Any, *, skip: bool = False) -> Any:
    """``value`` as JSON, with arrays as dtype, shape and base64; tuples become lists.

    Args:
        value: numbers, strings, arrays, None, and lists, tuples and dicts of them.
        skip: leave out the entries of dicts that are none of these, instead of raising.

    Raises:
        TypeError: if ``value`` holds something else.
    """
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (np.bool_, np.integer, np.floating)):
        return value.item()
    if isinstance(value, np.ndarray) and value.dtype.kind in "biufcSU":
        data = base64.b64encode(np.ascontiguousarray(value).tobytes()).decode()
        return {_ARRAY: [value.dtype.str, list(value.shape), data]}
    if isinstance(value, (list, tuple)):
        return [encode(item, skip=skip) for item in value]
    if isinstance(value, dict):
        encoded = {}
        for key, item in value.items():
            try:
                encoded[str(key)] = encode(item, skip=skip)
            except TypeError:  # noqa: PERF203
                if not skip:
                    raise
        return encoded
    raise TypeError(
        f"{type(value).__name__} cannot be sent between processes; use numbers, strings, arrays, lists and dicts."
    )


def decode(value: Any) -> Any:
    """The inverse of ``encode``."""
    if isinstance(value, list):
        return [decode(item) for item in value]
    if isinstance(value, dict):
        if _ARRAY in value:
            dtype, shape, data = value[_ARRAY]
            return np.frombuffer(base64.b64decode(data), dtype).reshape(shape).copy()
        return {key: decode(item) for key, item in value.items()}
    return value


class SharedArrays:
    """A file that both processes have mapped into memory; it grows when an array lies beyond its end."""

    def __init__(self, path: str) -> None:
        self._file = open(path, "r+b", buffering=0)  # noqa: SIM115
        self._map = None

    def view(self, offset: int, dtype: str, shape: Any) -> Any:
        """The array at ``offset`` bytes, sharing its memory with the other process."""
        count = int(np.prod(shape, dtype=np.int64))
        if count == 0:
            return np.zeros(shape, dtype)
        end = offset + count * np.dtype(dtype).itemsize
        if self._map is None or len(self._map) < end:
            fd = self._file.fileno()
            size = os.fstat(fd).st_size
            if size < end:
                if hasattr(os, "posix_fallocate"):  # a full disk is an error here, and a fatal signal later
                    os.posix_fallocate(fd, size, end - size)
                else:
                    self._file.truncate(end)
            self._map = mmap.mmap(fd, 0)
        return np.frombuffer(self._map, dtype, count, offset).reshape(shape)

    def close(self) -> None:
        """Let go of the file; arrays that were handed out stay valid."""
        self._map = None
        self._file.close()


def store(target: Any, value: Any, name: str) -> None:
    """Put ``value`` into the array ``target``, which has the shape and type of its space.

    Raises:
        ValueError: if the shape differs, or the type would change numbers: no float becomes an integer.
    """
    value = np.asarray(value)
    if value.shape != target.shape:
        raise ValueError(f"{name} has shape {value.shape}, its space says {target.shape}")
    if not np.can_cast(value.dtype, target.dtype, "same_kind"):
        whole = value.dtype.kind in "iu" or (value.ndim == 0 and value.dtype.kind == "f")
        if not whole or not np.array_equal(value.astype(target.dtype), value):
            raise ValueError(
                f"{name} is {value.dtype}, its space says {target.dtype}, which cannot hold it; convert it or give a "
                "space of its type"
            )
    target[...] = value


def describe_space(space: Any) -> Any:
    """A Gym or Gymnasium space as JSON.

    Raises:
        TypeError: if it is not made of Box, Discrete, MultiDiscrete, MultiBinary, Dict and Tuple.
    """
    kinds = {cls.__name__ for cls in type(space).__mro__}
    if "Box" in kinds:
        low, high = (np.asarray(side, dtype=space.dtype) for side in (space.low, space.high))
        return {"kind": "Box", "low": encode(low), "high": encode(high), "dtype": np.dtype(space.dtype).str}
    if "Discrete" in kinds:
        return {"kind": "Discrete", "n": int(space.n), "start": int(getattr(space, "start", 0))}
    if "MultiDiscrete" in kinds:
        nvec = np.asarray(space.nvec)
        start = np.asarray(getattr(space, "start", np.zeros_like(nvec)))
        dtype = np.dtype(space.dtype).str
        return {"kind": "MultiDiscrete", "nvec": encode(nvec), "start": encode(start), "dtype": dtype}
    if "MultiBinary" in kinds:
        return {"kind": "MultiBinary", "shape": list(space.shape)}
    if "Dict" in kinds:
        return {"kind": "Dict", "spaces": [[str(key), describe_space(part)] for key, part in space.spaces.items()]}
    if "Tuple" in kinds:
        return {"kind": "Tuple", "spaces": [describe_space(part) for part in space.spaces]}
    raise TypeError(
        f"the space {space} has no fixed-size arrays to share between processes; give make_fn, a function that wraps "
        "the environment into one with Box, Discrete, MultiDiscrete, MultiBinary, Dict and Tuple spaces"
    )


def load_function(path: str) -> Any:
    """The function at ``"package.module:name"`` or ``"directory/file.py:name"``."""
    place, _, name = path.rpartition(":")
    if not place.endswith(".py"):
        return getattr(importlib.import_module(place), name)
    spec = importlib.util.spec_from_file_location(os.path.basename(place)[:-3], place)
    module = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
    spec.loader.exec_module(module)  # type: ignore[union-attr]
    return getattr(module, name)


def make_env(env_id: str, kwargs: Any, *, imports: Any, make_fn: str | None, render_mode: str | None) -> Any:
    """Build the environment with ``make_fn``, or with whichever of Gymnasium and Gym knows its id."""
    for name in imports:
        importlib.import_module(name)
    if render_mode is not None:
        kwargs = {**kwargs, "render_mode": render_mode}
    if make_fn is not None:
        return load_function(make_fn)(env_id, **kwargs)
    unknown = None
    for name in ("gymnasium", "gym"):
        if importlib.util.find_spec(name) is None:
            continue
        api = importlib.import_module(name)
        options = dict(kwargs)
        if "disable_env_checker" in inspect.signature(api.make).parameters:
            options["disable_env_checker"] = True
        try:
            return api.make(env_id, **options)
        except api.error.UnregisteredEnv as error:
            unknown = unknown or error
        except TypeError as error:
            if "render_mode" not in str(error):
                raise
            del options["render_mode"]  # before Gym 0.25, render() takes the mode
            return api.make(env_id, **options)
    if unknown is not None:
        raise unknown
    raise ModuleNotFoundError("neither gymnasium nor gym is installed", name="gymnasium")


class Server:
    """The environment and what the parent may ask of it: one method per command."""

    def make(self, request: Any) -> Any:
        self.render_mode = request["render_mode"]
        self.env = make_env(
            request["env_id"],
            decode(request["kwargs"]),
            imports=request["imports"],
            make_fn=request["make_fn"],
            render_mode=self.render_mode,
        )
        self.base = getattr(self.env, "unwrapped", self.env)
        metadata = dict(getattr(self.env, "metadata", None) or {})
        for old, new in (("render.modes", "render_modes"), ("video.frames_per_second", "render_fps")):
            if old in metadata:  # the spelling of Gym before 0.22
                metadata[new] = metadata.pop(old)
        instructions = getattr(self.base, "instructions", None)
        self.observation_is_tuple = "Tuple" in {cls.__name__ for cls in type(self.env.observation_space).__mro__}
        return {
            "observation_space": describe_space(self.env.observation_space),
            "action_space": describe_space(self.env.action_space),
            "metadata": encode(metadata, skip=True),
            "instructions": None if instructions is None else [str(text) for text in instructions],
        }

    def share(self, request: Any) -> None:
        self.memory = SharedArrays(request["path"])
        self.picture_offset = request["picture_offset"]
        self.observation = [(leaf["path"], self._view(leaf)) for leaf in request["observation"]]
        self.action_tree = request["action"]

    def reset(self, request: Any) -> Any:
        options, seed = decode(request["options"]), request["seed"]
        accepted = inspect.signature(self.base.reset).parameters
        anything = any(parameter.kind is parameter.VAR_KEYWORD for parameter in accepted.values())
        kwargs = {}
        if options is not None and ("options" in accepted or anything):
            kwargs["options"] = options
        elif options:
            raise TypeError(f"the environment takes no options at reset, got {sorted(options)}; leave them out")
        if seed is not None:
            if "seed" in accepted or (anything and not hasattr(self.base, "seed")):
                kwargs["seed"] = seed
            elif hasattr(self.base, "seed"):  # Gym before 0.22
                self.env.seed(seed)
            else:
                raise TypeError("the environment takes no seed: it has neither reset(seed=) nor seed()")
        result = self.env.reset(**kwargs)
        info: Any = {}
        has_info = isinstance(result, tuple) and len(result) == 2 and isinstance(result[1], dict)
        if has_info and not (self.observation_is_tuple and self.env.observation_space.contains(result)):
            result, info = result
        self._publish(result)
        return encode(info, skip=True)

    def step(self, request: Any) -> Any:
        result = self.env.step(self._action(self.action_tree))
        if len(result) == 5:
            observation, reward, terminated, truncated, info = result
        else:  # Gym before 0.26
            observation, reward, done, info = result
            truncated = bool(done) and bool(info.get("TimeLimit.truncated", False))
            terminated = bool(done) and not truncated
        self._publish(observation)
        return [float(np.asarray(reward).item()), bool(terminated), bool(truncated), encode(info, skip=True)]

    def render(self, request: Any) -> Any:
        if "mode" in inspect.signature(self.base.render).parameters:  # Gym before 0.26
            picture = self.env.render(mode=self.render_mode)
        else:
            picture = self.env.render()
        if not isinstance(picture, np.ndarray):
            return {"value": encode(picture)}
        self.memory.view(self.picture_offset, picture.dtype.str, picture.shape)[...] = picture
        return {"dtype": picture.dtype.str, "shape": list(picture.shape)}

    def call(self, request: Any) -> Any:
        value = getattr(self.base, request["name"])
        if callable(value):
            value = value(*decode(request["args"]), **decode(request["kwargs"]))
        return encode(value)

    def close(self) -> None:
        if hasattr(self, "env") and hasattr(self.env, "close"):
            self.env.close()

    def _view(self, leaf: Any) -> Any:
        return self.memory.view(leaf["offset"], leaf["dtype"], leaf["shape"])

    def _publish(self, observation: Any) -> None:
        for path, target in self.observation:
            value = observation
            for key in path:
                value = value[key]
            store(target, value, f"the observation{path or ''}")

    def _action(self, tree: Any) -> Any:
        if "Dict" in tree:
            return {key: self._action(part) for key, part in tree["Dict"]}
        if "Tuple" in tree:
            return tuple(self._action(part) for part in tree["Tuple"])
        value = self._view(tree).copy()
        return int(value) if tree["is_int"] else value


def error_report(error: BaseException) -> Any:
    """What the parent needs to know of an exception."""
    cause = error.__cause__
    return {
        "kinds": [cls.__name__ for cls in type(error).__mro__],
        "message": str(error),
        "module": getattr(error, "name", None) or getattr(cause, "name", None),
        "traceback": "".join(traceback.format_exception(type(error), error, error.__traceback__)),
    }


def _take_stdio() -> Any:
    """Keep stdin and stdout for the messages: what the simulator prints goes to stderr, and it reads nothing."""
    commands, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.dup2(2, 1)
    return commands, replies


def _end_with_parent() -> None:
    """End this process within a second of its parent's death, even in the middle of a step."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def main() -> None:
    """Answer commands until ``close`` or the end of stdin."""
    commands, replies = _take_stdio()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    _end_with_parent()
    server = Server()
    while True:
        request = read_message(commands)
        if request is None or request["command"] == "close":
            break
        try:
            reply = {"result": getattr(server, request["command"])(request)}
        except Exception as error:
            reply = {"error": error_report(error)}
        try:
            write_message(replies, {"id": request["id"], **reply})
        except BrokenPipeError:
            break
    server.close()


if __name__ == "__main__":
    main()
