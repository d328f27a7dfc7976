"""The person beside the robot: what is typed at a terminal, as answers to the wrappers' questions."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterable

HELP = "Enter: ready, or go on   s: success   f: end the episode   p: pause   q: end the run"


class OperatorQuit(Exception):  # noqa: N818
    """The person has asked for the end of the run."""


class Operator:
    """Listens to a person, line by line, while the robot moves.

    Its methods are what the wrappers of this package ask: `SuccessSignal(env, operator.success)`,
    `EarlyStop(env, operator.stop)`, `Pause(env, operator.wait_if_paused)`, `ManualReset(env, operator.ready)`.
    What was said counts for the episode that runs; a new one begins with nothing said.

    Args:
        lines: where lines come from, each a command of `HELP`; None reads the terminal. Its end is a `q`.
        say: tells the person something.
    """

    def __init__(self, lines: Iterable[str] | None = None, *, say: Callable[[str], None] = print) -> None:
        self.say = say
        self._changed = threading.Condition()
        self._success = self._stop = self._paused = self._quit = self._ready = False
        self._lines = sys.stdin if lines is None else lines
        threading.Thread(target=self._listen, name="operator", daemon=True).start()

    def tell(self, line: str) -> None:
        """Take in one line, as if it had been typed."""
        command = line.strip().lower()
        with self._changed:
            if command == "s":
                self._success = True
            elif command == "f":
                self._stop = True
            elif command == "p":
                self._paused = True
            elif command == "q":
                self._quit = True
            elif command == "":
                self._ready, self._paused = True, False
            else:
                self.say(f"{command!r} is no command. {HELP}")
            self._changed.notify_all()

    def begin(self) -> None:
        """Forget what was said of the episode before; `SuccessSignal` and `EarlyStop` call it with every reset."""
        with self._changed:
            self._success = self._stop = False

    def success(self, observation: object = None, ended: bool = False) -> bool:
        """Whether the person has seen the task solved; for `SuccessSignal`."""
        return self._success

    def stop(self) -> bool:
        """Whether the person wants this episode to end; for `EarlyStop`.

        Raises:
            OperatorQuit: the person wants the run to end.
        """
        if self._quit:
            raise OperatorQuit("the person at the robot ended the run")
        return self._stop

    def wait_if_paused(self) -> bool:
        """Wait while the person wants the robot to stand still; returns whether there was anything to wait for.

        Raises:
            OperatorQuit: the person wants the run to end.
        """
        with self._changed:
            if not self._paused:
                return False
            self.say("paused; Enter goes on, q ends the run; leave the scene as it is")
            self._changed.wait_for(lambda: not self._paused or self._quit)
            if self._quit:
                raise OperatorQuit("the person at the robot ended the run")
        return True

    def ready(self, question: str = "") -> None:
        """Ask, and wait for Enter; for `ManualReset`.

        Raises:
            OperatorQuit: the person wants the run to end.
        """
        with self._changed:
            self._ready = False
            self.say(f"{question} [{HELP}]")
            self._changed.wait_for(lambda: self._ready or self._quit)
            if self._quit:
                raise OperatorQuit("the person at the robot ended the run")
            self._success = self._stop = self._paused = False

    def _listen(self) -> None:
        for line in self._lines:
            self.tell(line)
        self.tell("q")
