"""Ending a run in order when the machine is taken away: SIGTERM, as Slurm and other schedulers send it."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

EXIT_CODE = 143  # 128 + SIGTERM, as a shell reports it
GRACE = 15.0
"""Seconds after SIGTERM within which what was put off must be done; schedulers commonly wait for 30."""


class PreemptedError(SystemExit):
    """SIGTERM arrived; uncaught, it ends the process with exit code 143 and no traceback."""

    def __init__(self) -> None:
        super().__init__(EXIT_CODE)


@contextmanager
def stop_on_sigterm() -> Iterator[None]:
    """Raise PreemptedError in the body when SIGTERM arrives; in another thread than the main one, do nothing.

    Further SIGTERMs are ignored until the body is left, so that they do not interrupt the tidying up.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, _raise)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def put_off_sigterm(*, grace: float = GRACE) -> Iterator[Callable[[], bool]]:
    """Inside `stop_on_sigterm`, leave it to the body when to stop; elsewhere do nothing.

    The body asks the function that it is given whether SIGTERM has arrived, writes what must not be lost, and raises
    PreemptedError. If it has done neither after `grace` seconds, that is raised in it, wherever it is.

    Args:
        grace: seconds from SIGTERM.
    """
    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGTERM) is not _raise or not hasattr(signal, "setitimer"):
        yield lambda: False
        return
    arrived = False

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal arrived
        if not arrived:
            arrived = True
            signal.signal(signal.SIGALRM, _raise)
            signal.setitimer(signal.ITIMER_REAL, grace)

    alarm = signal.getsignal(signal.SIGALRM)
    signal.signal(signal.SIGTERM, note)
    try:
        yield lambda: arrived
        if arrived:  # after the body had asked for the last time
            raise PreemptedError
    finally:
        if arrived:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, alarm)
        signal.signal(signal.SIGTERM, signal.SIG_IGN if arrived else _raise)


def _raise(number: int, frame: FrameType | None) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise PreemptedError
