"""Ending a run in order when the machine is taken away: SIGTERM, as Slurm and other schedulers send it."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

EXIT_CODE = 143  # 128 + SIGTERM, as a shell reports it


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


def _raise(number: int, frame: FrameType | None) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise PreemptedError
