"""The parent's end of a child process that serves an environment: requests, replies, time-outs and obituaries."""

from __future__ import annotations

import os
import queue
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import gymnasium as gym

from vla_rl_envs._env_server import read_message, write_message

_SERVER = Path(__file__).with_name("_env_server.py")
_CLOSE_TIMEOUT = 5.0  # seconds
_CONSTRUCTION = "its construction"
_CONSTRUCTION_ERRORS = (
    ImportError,
    FileNotFoundError,
    ValueError,
    gym.error.UnregisteredEnv,
    gym.error.DependencyNotInstalled,
)
_TAIL = 4000  # bytes of the child's output that an error quotes


class SubprocessEnvError(gym.error.Error):
    """The environment in the other process raised, hung or died; the text carries its traceback or last output."""


class ChildProcess:
    """The process and the messages to and from it."""

    def __init__(self, python: str, env_id: str, environ: Mapping[str, str]) -> None:
        self.name = f"{env_id!r} in {python}"
        self.python, self.env_id = python, env_id
        surroundings = {name: value for name, value in os.environ.items() if name != "PYTHONHOME"} | dict(environ)
        self.process = subprocess.Popen(
            [python, "-u", str(_SERVER)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            env=surroundings,
        )  # fmt: skip
        self.replies: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.output = bytearray()
        self.count = 0
        self.verdict = ""
        self.owner = os.getpid()
        self.closed = False
        self.threads = [
            threading.Thread(target=_receive, args=(self.process.stdout, self.replies), daemon=True),
            threading.Thread(target=_drain, args=(self.process.stderr, self.output), daemon=True),
        ]
        for thread in self.threads:
            thread.start()

    def ask(self, command: str, timeout: float, **payload: Any) -> Any:
        during = _CONSTRUCTION if command in ("make", "share") else command
        self.count += 1
        try:
            write_message(self.process.stdin, {"id": self.count, "command": command, **payload})  # type: ignore[arg-type]
        except (OSError, ValueError):
            self._raise_died(during)
        reply = self._wait(during, time.monotonic() + timeout, timeout)
        if "error" in reply:
            self._raise(reply["error"], during)
        return reply["result"]

    def _wait(self, during: str, deadline: float, timeout: float) -> Any:
        while True:
            try:
                reply = self.replies.get(timeout=max(min(1.0, deadline - time.monotonic()), 0.001))
            except queue.Empty:
                if self.process.poll() is not None:
                    self._raise_died(during)
                if time.monotonic() >= deadline:
                    self.kill()
                    self.verdict = f"did not answer within {timeout:g} seconds during {during} and was ended"
                    raise SubprocessEnvError(
                        f"{self.name} {self.verdict}; give a larger timeout if it only is slow.{self._quote()}"
                    ) from None
                continue
            if reply is None:
                self._raise_died(during)
            if reply["id"] == self.count:  # an older one answers a request that the caller interrupted
                return reply

    def _raise(self, error: Mapping[str, Any], during: str) -> NoReturn:
        kinds, message = error["kinds"], error["message"].strip()
        if during == _CONSTRUCTION:
            origin = SubprocessEnvError(error["traceback"])
            if "ModuleNotFoundError" in kinds and error["module"]:
                raise self._missing(error["module"]) from origin
            for kind in _CONSTRUCTION_ERRORS:
                if kind.__name__ in kinds:
                    hint = "; if a package registers it, name that in imports" if "UnregisteredEnv" in kinds else ""
                    raise kind(f"{self.name}: {message.splitlines()[0] if message else kinds[0]}{hint}") from origin
        report = f"{self.name} raised {kinds[0]} during {during}: {message}"
        raise SubprocessEnvError(f"{report}\nTraceback of that process:\n{error['traceback']}")

    def _missing(self, module: str) -> ModuleNotFoundError:
        return ModuleNotFoundError(
            f"{self.env_id!r} needs the package {module!r}, which {self.python} does not have; install it there with "
            f"{self.python} -m pip install.",
            name=module,
        )

    def _raise_died(self, during: str) -> NoReturn:
        if self.verdict:
            raise SubprocessEnvError(f"{self.name} {self.verdict}; make a new environment.")
        try:
            code = self.process.wait(_CLOSE_TIMEOUT)
        except subprocess.TimeoutExpired:
            self.kill()
            code = self.process.returncode
        self.threads[1].join(1.0)
        if b"ModuleNotFoundError: No module named 'numpy'" in self.output and during == _CONSTRUCTION:
            raise self._missing("numpy")
        raise SubprocessEnvError(
            f"the process of {self.name} died before or during {during} (exit code {code}{_signal_name(code)}); make a "
            f"new environment.{self._quote()}"
        )

    def _quote(self) -> str:
        text = bytes(self.output).decode(errors="replace").strip()
        return f"\nLast output of that process:\n{text}" if text else "\nThat process had printed nothing."

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def close(self) -> None:
        if self.closed or os.getpid() != self.owner:  # a forked copy of the parent leaves the child alone
            return
        self.closed = True
        with suppress(OSError, ValueError):
            write_message(self.process.stdin, {"id": 0, "command": "close"})  # type: ignore[arg-type]
        with suppress(OSError):
            self.process.stdin.close()  # type: ignore[union-attr]
        try:
            self.process.wait(_CLOSE_TIMEOUT)
        except subprocess.TimeoutExpired:
            self.kill()
        for thread in self.threads:
            thread.join(1.0)
        for thread, stream in zip(self.threads, (self.process.stdout, self.process.stderr), strict=True):
            if not thread.is_alive():
                stream.close()  # type: ignore[union-attr]


def _receive(stream: BinaryIO, replies: queue.SimpleQueue[Any]) -> None:
    while True:
        message = read_message(stream)
        replies.put(message)
        if message is None:
            return


def _drain(stream: Any, output: bytearray) -> None:
    while chunk := stream.read1(65536):
        output += chunk
        del output[:-_TAIL]


def find_interpreter(python: str | None) -> str:
    if python is None:
        return sys.executable
    found = shutil.which(os.path.expanduser(python))
    if found is None:
        raise FileNotFoundError(
            f"there is no Python interpreter {python!r} that can be run; give the path of one, such as "
            "my-environment/bin/python."
        )
    return found


def _signal_name(code: int | None) -> str:
    try:
        return f", {signal.Signals(-(code or 0)).name}" + (", often out of memory" if code == -9 else "")
    except ValueError:
        return ""
