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
_arrived: float | None = None  # when SIGTERM did, inside the present `stop_on_sigterm`


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
    global _arrived
    before = signal.signal(signal.SIGTERM, _raise)
    _arrived = None
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
        _arrived = None


@contextmanager
def put_off_sigterm(
    *, grace: float = GRACE, last: Callable[[float], None] | None = None, until: float = LAST
) -> Iterator[Callable[[], bool]]:
    """Inside `stop_on_sigterm`, leave it to the body when to stop; elsewhere do nothing.

    The body asks the function that it is given whether SIGTERM has arrived, writes what must not be lost, and raises
    PreemptedError. If it has done neither after `grace` seconds, that is raised in it, wherever it is. An error after
    SIGTERM ends the body like PreemptedError: its helpers may have got the signal too, and be gone.

    Args:
        grace: seconds from SIGTERM.
        last: called once the body has been left in either way, with the moment on `time.monotonic` at which
            PreemptedError is raised in it.
        until: seconds from SIGTERM that `last` has.
    """
    if not handles_sigterm() or not hasattr(signal, "setitimer"):
        yield lambda: False
        return

    def note(number: int, frame: FrameType | None) -> None:
        global _arrived
        if _arrived is None:
            _arrived = time.monotonic()
            signal.signal(signal.SIGALRM, _raise)
            signal.setitimer(signal.ITIMER_REAL, grace)

    alarm = signal.getsignal(signal.SIGALRM)
    signal.signal(signal.SIGTERM, note)
    try:
        yield sigterm_arrived
        if _arrived is not None:  # after the body had asked for the last time
            raise PreemptedError
    except (PreemptedError, Exception) as error:
        if _arrived is not None and last is not None:
            signal.setitimer(signal.ITIMER_REAL, max(_arrived + until - time.monotonic(), 0.1))
            last(_arrived + until)
        if _arrived is None or isinstance(error, PreemptedError):
            raise
        raise PreemptedError from error
    finally:
        if _arrived is not None:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, alarm)
        signal.signal(signal.SIGTERM, signal.SIG_IGN if _arrived is not None else _raise)


def sigterm_arrived() -> bool:
    """Whether SIGTERM has arrived inside `stop_on_sigterm`; whoever works for this process may have got it, too."""
    return _arrived is not None


def handles_sigterm() -> bool:
    """Whether this is the main thread inside `stop_on_sigterm`, and nobody has taken SIGTERM over since."""
    main = threading.current_thread() is threading.main_thread()
    return main and signal.getsignal(signal.SIGTERM) is _raise


def _raise(number: int, frame: FrameType | None) -> None:
    global _arrived
    _arrived = time.monotonic() if _arrived is None else _arrived
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise PreemptedError
