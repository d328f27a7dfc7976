"""Ending a run in order when the machine is taken away: SIGTERM, as Slurm and other schedulers send it."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

EXIT_CODE = 143  # 128 + SIGTERM, as a shell reports it
GRACE = 15.0
"""Seconds after SIGTERM within which what was put off must be done; schedulers commonly wait for 30."""
LAST = 25.0
"""Seconds after SIGTERM within which what is written in the end must be on the disk."""


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
def put_off_sigterm(
    *, grace: float = GRACE, last: Callable[[float], None] | None = None, until: float = LAST
) -> Iterator[Callable[[], bool]]:
    """Inside `stop_on_sigterm`, leave it to the body when to stop; elsewhere do nothing.

    The body asks the function that it is given whether SIGTERM has arrived, writes what must not be lost, and raises
    PreemptedError. If it has done neither after `grace` seconds, that is raised in it, wherever it is.

    Args:
        grace: seconds from SIGTERM.
        last: called once the body has been left in either way, with the moment on `time.monotonic` at which
            PreemptedError is raised in it.
        until: seconds from SIGTERM that `last` has.
    """
    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGTERM) is not _raise or not hasattr(signal, "setitimer"):
        yield lambda: False
        return
    arrived: float | None = None

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal arrived
        if arrived is None:
            arrived = time.monotonic()
            signal.signal(signal.SIGALRM, _raise)
            signal.setitimer(signal.ITIMER_REAL, grace)

    alarm = signal.getsignal(signal.SIGALRM)
    signal.signal(signal.SIGTERM, note)
    try:
        yield lambda: arrived is not None
        if arrived is not None:  # after the body had asked for the last time
            raise PreemptedError
    except PreemptedError:
        if arrived is not None and last is not None:
            signal.setitimer(signal.ITIMER_REAL, max(arrived + until - time.monotonic(), 0.1))
            last(arrived + until)
        raise
    finally:
        if arrived is not None:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, alarm)
        signal.signal(signal.SIGTERM, signal.SIG_IGN if arrived is not None else _raise)


def _raise(number: int, frame: FrameType | None) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise PreemptedError
