"""New files and folders that appear whole or not at all, and replace nothing unasked."""

from __future__ import annotations

import errno
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from vla_rl.file_lock import WriterLock

RESERVE_BYTES = 1 << 20

_REASONS = {
    errno.ENOSPC: "free some space or write to another disk",
    errno.EDQUOT: "free some space or write to another disk",
    errno.EFBIG: "write to another file system",
    errno.EACCES: "choose a folder that you may write to",
    errno.EPERM: "choose a folder that you may write to",
    errno.EROFS: "choose another one",
}


@contextmanager
def explained(path: str | os.PathLike[str], kept: str) -> Iterator[None]:
    """Says in one sentence what a full disk or a missing permission did to ``path``, and what was ``kept``.

    Raises:
        OSError: instead of h5py's and the system's own errors of these kinds; others pass unchanged.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:
        # h5py reports a failed write as an error without errno, in whose text HDF5 names it.
        named = re.search(r"errno = (\d+)", str(error))
        number = int(named[1]) if named else getattr(error, "errno", None)
        if number not in _REASONS:
            raise
        told = OSError(f"cannot write '{path}', {os.strerror(number)}: {_REASONS[number]}; {kept}")
        told.errno = number
        raise told from error


def require_space(folder: Path, num_bytes: int, kept: str = "nothing was written") -> None:
    """Raises OSError if the disk that will hold ``folder`` has less than ``num_bytes`` and 1 MiB more free."""
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    # HDF5 crashes the process on some errors of a full disk, so it must not get there.
    needed = num_bytes + RESERVE_BYTES
    if free < needed:
        raise OSError(
            f"cannot write '{folder}': it needs {needed / 1e6:,.1f} MB and the disk has {free / 1e6:,.1f} MB left; "
            f"free some space or write to another disk; {kept}"
        )


@contextmanager
def new_file(path: str | os.PathLike[str], *, overwrite: bool = False) -> Iterator[Path]:
    """Gives a temporary path beside ``path``, with its suffix; what was written there gets the name at the end.

    Raises:
        FileExistsError: if ``path`` exists and is not to be overwritten.
        OSError: if it cannot be written; then nothing is left behind.
    """
    path = Path(path)
    _refuse_existing(path, overwrite)
    if path.is_dir():
        raise IsADirectoryError(f"'{path}' is a folder; give the name of a file")
    with explained(path, "nothing was left there"):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.stem}.{_mark()}.tmp{path.suffix}")
        try:
            yield temporary
            sync_file(temporary)
            os.replace(temporary, path)
        except BaseException:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise


@contextmanager
def new_folder(path: str | os.PathLike[str], *, overwrite: bool = False) -> Iterator[Path]:
    """Gives a temporary folder beside ``path`` that gets this name at the end, if nothing went wrong before.

    With ``overwrite``, a data set of that name is moved aside and deleted once the new one is in place. A folder that
    is no data set is never replaced.

    Raises:
        FileExistsError: if ``path`` exists and is not to be overwritten, or is no data set.
        BlockingIOError: if it is an episode store that a writer has open.
        OSError: if it cannot be written; then nothing is left behind.
    """
    path = Path(path).absolute()
    _refuse_existing(path, overwrite)
    if path.exists() and not is_data_set(path):
        raise FileExistsError(f"'{path}' is not a data set, so it is not overwritten; give another path or remove it")
    mark = _mark()
    temporary = path.with_name(f".{path.name}.{mark}.tmp")
    old = path.with_name(f".{path.name}.{mark}.old")
    with explained(path, "nothing was left there"):
        path.parent.mkdir(parents=True, exist_ok=True)
        locks = [WriterLock(store) for store in _stores(path)]
        temporary.mkdir()
        try:
            yield temporary
            if path.exists():
                os.rename(path, old)
            os.rename(temporary, path)
        except BaseException:
            if old.exists() and not path.exists():
                os.rename(old, path)
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        finally:
            for lock in locks:
                lock.release()
    shutil.rmtree(old, ignore_errors=True)


def _mark() -> str:
    """For names of a process's own; in a container another one may have had its number, and left files."""
    return f"{os.getpid()}-{secrets.token_hex(3)}"


def is_data_set(path: Path) -> bool:
    """Whether a folder is empty, or holds an episode store or a Minari or LeRobot data set, or only folders that do."""
    if not path.is_dir() or path.is_symlink():
        return False
    stores = _stores(path)
    return stores == [path] or len(stores) == len(list(path.iterdir()))


def _stores(path: Path) -> list[Path]:
    """``path`` itself if it is a data set, else the data sets right below it."""
    folders = [path, *sorted(path.iterdir())] if path.is_dir() else []
    marks = ("data/metadata.json", "meta/info.json")  # of Minari's layout, and of LeRobot's
    found = [folder for folder in folders if any((folder / mark).exists() for mark in marks)]
    return found[:1] if found[:1] == [path] else found


def _refuse_existing(path: Path, overwrite: bool) -> None:
    if not overwrite and (path.exists() or path.is_symlink()):
        raise FileExistsError(f"'{path}' exists; give another path, or say --overwrite (overwrite=True)")


def copy_file(source: Path, target: Path, *, link: bool = False) -> None:
    """Copies a file's content, or gives it a second name where asked and where the file system can."""
    if link:
        with suppress(OSError):
            os.link(source, target)
            return
    shutil.copyfile(source, target)


def sync_file(path: Path) -> None:
    """Returns when the file's content is on the disk."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
