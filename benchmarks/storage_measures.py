"""Time and memory that work takes in this process; standard library alone, as LeRobot's environment runs it too."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def timed(work: Callable[[], Any]) -> tuple[float, float]:
    """Seconds and seconds of CPU time."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - cpu


def peak_bytes(work: Callable[[], Any]) -> int | None:
    """Largest growth of this process's memory during the work, from ``/proc``; None where there is none.

    What earlier work freed is first given back to the system, as reusing it would count as no growth.
    """

    def status(name: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name))

    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
        before = status("VmRSS")
    except (OSError, AttributeError):
        return None
    work()
    return status("VmHWM") - before
