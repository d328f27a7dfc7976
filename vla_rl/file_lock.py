"""One writer at a time per episode store, and one process at a time per run."""

from __future__ import annotations

import os
from pathlib import Path
from weakref import WeakValueDictionary

try:
    import fcntl
except ImportError:  # Windows: writers of other processes go unnoticed
    fcntl = None

_held: WeakValueDictionary[Path, FileLock] = WeakValueDictionary()


class FileLock:
    """Held from creation until ``release``, until the object is dropped, or until the process dies, however it dies.

    Args:
        path: a file for the lock, made if missing.
        message: of the error.

    Raises:
        BlockingIOError: if this or another process holds the lock of the same file.
    """

    def __init__(self, path: Path, message: str) -> None:
        path = path.resolve()
        if path in _held:
            raise BlockingIOError(message)
        self._file = open(path, "a")  # noqa: SIM115 (held beyond this function)
        if fcntl is not None:
            try:
                # A record lock and not flock: forked environment workers that outlive the writer must not hold it.
                fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError) as error:
                self._file.close()
                raise BlockingIOError(message) from error
            except OSError:
                pass  # a file system without locks
        self._path = path
        self._owner = os.getpid()
        _held[path] = self

    @property
    def held(self) -> bool:
        """Whether this process may write; False in a forked copy of the process that took the lock."""
        return not self._file.closed and self._owner == os.getpid()

    def release(self) -> None:
        """Lets the next writer in; does nothing the second time."""
        self._file.close()
        if _held.get(self._path) is self:
            del _held[self._path]

    def __del__(self) -> None:
        """Close the file of a lock that its owner forgot."""
        if hasattr(self, "_file"):
            self._file.close()


def held_here(path: Path) -> FileLock | None:
    """The lock that this process holds on a file, if it does."""
    lock = _held.get(path.resolve())
    return lock if lock is not None and lock.held else None


class WriterLock(FileLock):
    """The lock of an episode store's one writer."""

    def __init__(self, root: Path) -> None:
        message = f"another writer has the episode store '{root}' open; close it, or open with mode='r' to read"
        super().__init__(root / "data" / "writer.lock", message)
