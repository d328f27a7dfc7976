"""A new store of every complete episode of a damaged one."""

from __future__ import annotations

import os
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from vla_rl.data.copying import Progress, Source, copy_stores
from vla_rl.data.examination import Examination, Finding, examine_episode
from vla_rl.data.store import EpisodeStore
from vla_rl.data.verification import check_records, episode_files
from vla_rl.file_lock import WriterLock

_TEMPORARY = re.compile(r"(\d{6,18})\.hdf5\.tmp")


@dataclass(frozen=True)
class Repair:
    """What ``repair`` found and did.

    Attributes:
        path: the repaired store, or None if nothing was damaged and so nothing was written.
        kept: number of episodes in it.
        lost: files that held no complete episode, with the reason.
        renumbered: old numbers of the episodes whose number changed, by new number.
        findings: what was wrong with the store.
        original: where the damaged store lies now.
    """

    path: Path | None
    kept: int
    lost: list[Finding]
    renumbered: dict[int, int]
    findings: list[Finding] = field(default_factory=list)
    original: Path | None = None


def repair(
    path: str | Path,
    out: str | Path | None = None,
    *,
    in_place: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Repair:
    """Writes a store of every complete episode of a damaged one; the damaged one is never changed or deleted.

    An episode is complete if its file opens, holds all arrays at their lengths with finite actions and states, and all
    checksums that it carries are right. Episodes keep their order and get consecutive numbers. Files that keep their
    number are not copied but get a second name (a hard link) where the file system can.

    Args:
        path: root directory of the damaged store.
        out: where to write; ``<path>-repaired`` if not given.
        in_place: give the repaired store the name of the damaged one, which is renamed to ``<path>-damaged``.
        overwrite: replace what is at ``out``.
        progress: called after every episode file read.

    Raises:
        FileNotFoundError: if there is no store.
        BlockingIOError: if a writer has it open.
        ValueError: if not one complete episode is left, or both ``out`` and ``in_place`` are given.
        FileExistsError: if ``out`` exists and ``overwrite`` is False.
    """
    root = Path(path).resolve()
    if out is not None and in_place:
        raise ValueError("give either out or in_place, not both")
    target = root.with_name(root.name + "-repaired") if out is None else Path(out).absolute()
    if target == root:
        raise ValueError(f"'{root}' is the damaged store itself; say --in-place (in_place=True) to put it aside")
    files = episode_files(root)
    lock = WriterLock(root) if os.access(root / "data", os.W_OK) else None
    try:
        result = _repair(root, target, files, in_place=in_place, overwrite=overwrite, progress=progress)
    finally:
        if lock is not None:
            lock.release()
    if in_place and result.path is not None:
        EpisodeStore(root, mode="a").close()  # writes the name that it has now into metadata.json
    return result


def _repair(
    root: Path, target: Path, files: dict[int, Path], *, in_place: bool, overwrite: bool, progress: Progress | None
) -> Repair:
    candidates = [*files.values(), *_temporaries(root, files)]
    examined: dict[Path, Examination] = {}
    for done, file in enumerate(candidates, 1):
        examined[file] = examine_episode(file, root)
        if progress is not None:
            progress(done, len(candidates))
    records = check_records(root, files, {number: examined[file] for number, file in files.items()})
    findings = records + [finding for result in examined.values() for finding in result.findings]
    shapes, lost, sources = _complete(root, examined)
    in_order = [source.path for source in sources] == list(files.values())
    if in_order and not any(finding.severity == "error" for finding in records):
        return Repair(None, len(files), [], {}, findings, root)
    if not sources:
        raise ValueError(f"'{root}' has not one complete episode left, so there is nothing to repair")
    copy_stores(target, {".": sources}, shapes=shapes, overwrite=overwrite, link=True)
    numbers = {new: source.index for new, source in enumerate(sources) if source.index != new}
    original, repaired = root, target
    if in_place:
        original = _unused(root.with_name(root.name + "-damaged"))
        os.rename(root, original)
        os.rename(target, root)
        repaired = root
    return Repair(repaired, len(sources), lost, numbers, findings, original)


def _temporaries(root: Path, files: dict[int, Path]) -> list[Path]:
    """Files of a writer that died after writing an episode and before giving the file its name."""
    found = []
    for path in sorted((root / "data" / "episodes").glob("*.tmp")):
        match = _TEMPORARY.fullmatch(path.name)
        if match and int(match[1]) not in files:
            found.append(path)
    return found


def _complete(root: Path, examined: dict[Path, Examination]) -> tuple[dict, list[Finding], list[Source]]:
    """The shapes that most episodes share, what is lost, and the episodes to keep."""
    tables = [result.shapes for result in examined.values() if result.shapes]
    common = Counter(repr(sorted(table.items())) for table in tables).most_common(1)
    shapes = next((table for table in tables if repr(sorted(table.items())) == common[0][0]), {})
    lost, sources = [], []
    for file, result in examined.items():
        if result.damaged or result.info is None or result.number is None:
            lost += [finding for finding in result.findings if finding.severity == "error"]
        elif result.shapes != shapes:
            name = file.relative_to(root).as_posix()
            lost.append(Finding("error", name, f"its steps hold {result.shapes}, but most episodes' {shapes}"))
        else:
            sources.append(Source(file, result.number, result.info, root))
    return shapes, lost, sorted(sources, key=lambda source: source.index)


def _unused(path: Path) -> Path:
    number = 2
    free = path
    while free.exists():
        free = path.with_name(f"{path.name}-{number}")
        number += 1
    return free
