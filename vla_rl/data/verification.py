"""Is a store whole: its records against its files, and every file by itself."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import h5py

from vla_rl.data.copying import Progress
from vla_rl.data.examination import Examination, Finding, examine_episode
from vla_rl.data.features_examination import examine_features
from vla_rl.data.layout import FORMAT, EpisodeInfo, Shapes, episode_path
from vla_rl.data.moments import moments_agree
from vla_rl.data.recovery import read_index
from vla_rl.data.selection import NAMES

EPISODE_FILE = re.compile(r"(\d{6,18})\.hdf5")
MAX_METADATA_BYTES = 64 << 20


@dataclass(frozen=True)
class Verification:
    """Result of ``verify``.

    Attributes:
        episodes: number of episodes that were read whole.
        arrays: number of their arrays.
        checksums: number of arrays that carry a checksum, and the right one.
        findings: errors and warnings.
    """

    episodes: int
    arrays: int
    checksums: int
    findings: list[Finding]

    @property
    def errors(self) -> list[Finding]:
        """The findings that are errors."""
        return [finding for finding in self.findings if finding.severity == "error"]


def verify(path: str | Path, *, progress: Progress | None = None) -> Verification:
    """Reads every byte of a store and checks structure, shapes, ranges, NaN, success and checksums.

    Cached features are read as well. It needs no intact store, changes nothing and keeps one episode in memory at a
    time.

    Args:
        path: root directory of the store.
        progress: called after every episode.

    Raises:
        FileNotFoundError: if there is no folder with a ``data`` folder.
    """
    root = Path(path).resolve()
    files = episode_files(root)
    examined: dict[int, Examination] = {}
    findings: list[Finding] = []
    for done, (number, file) in enumerate(files.items(), 1):
        result = examined[number] = examine_episode(file, root)
        if result.number is not None and result.number != number:
            name = file.relative_to(root).as_posix()
            findings.append(Finding("error", name, f"it holds episode_{result.number}; was it renamed?"))
        findings += result.findings
        if progress is not None:
            progress(done, len(files))
    findings = check_records(root, files, examined) + findings + list(examine_features(root, files))
    return Verification(
        episodes=sum(result.info is not None for result in examined.values()),
        arrays=sum(result.arrays for result in examined.values()),
        checksums=sum(result.checksums for result in examined.values()),
        findings=findings,
    )


def episode_files(root: Path) -> dict[int, Path]:
    """The episode files of a store by number, whatever its records say.

    Raises:
        FileNotFoundError: if there is no ``data`` folder.
    """
    if not (root / "data").is_dir():
        raise FileNotFoundError(f"no episode store at '{root}': there is no folder 'data'; give the store's folder")
    found = {}
    for path in sorted((root / "data" / "episodes").glob("*.hdf5")):
        match = EPISODE_FILE.fullmatch(path.name)
        if match:
            found[int(match[1])] = path
    return dict(sorted(found.items()))


def check_records(root: Path, files: dict[int, Path], examined: dict[int, Examination]) -> list[Finding]:
    """Compares ``metadata.json``, ``episodes.jsonl`` and ``main_data.hdf5`` with the episode files."""
    data_dir = root / "data"
    infos = {number: result.info for number, result in examined.items() if result.info is not None}
    index = read_index(data_dir)[0]
    findings = list(_check_files(root, files, index, infos))
    findings += _check_metadata(data_dir, infos, {n: result.shapes for n, result in examined.items() if result.shapes})
    findings += _check_links(data_dir, len(files))
    for path in sorted(
        [*data_dir.glob("*.tmp"), *(data_dir / "episodes").iterdir()] if files else data_dir.glob("*.tmp")
    ):
        if not EPISODE_FILE.fullmatch(path.name):
            name = path.relative_to(root).as_posix()
            findings.append(Finding("warning", name, "no file of the store; an interrupted write may have left it"))
    return findings


def _check_files(
    root: Path, files: dict[int, Path], index: list[EpisodeInfo], infos: dict[int, EpisodeInfo]
) -> Iterator[Finding]:
    name = "data/episodes.jsonl"
    for number in sorted(set(range(max(len(index), 1 + max(files, default=-1)))) - files.keys()):
        missing = episode_path(root / "data", number).relative_to(root).as_posix()
        yield Finding("error", missing, "the file is missing")
    for number, (info, noted) in ((n, (infos[n], index[n])) for n in infos if n < len(index)):
        different = [key for key in NAMES if key != "index" and getattr(info, key) != getattr(noted, key)]
        if not moments_agree(info.moments, noted.moments):
            yield Finding("error", name, f"line {number + 1} holds other moments than the actions and states have")
        if different:
            told = ", ".join(f"{key} {getattr(noted, key)!r}, not {getattr(info, key)!r}" for key in different)
            yield Finding("error", name, f"line {number + 1} says {told}")
    unnoted = len([number for number in files if number >= len(index)])
    if unnoted:
        yield Finding("warning", name, f"{unnoted} episodes are not noted; the next writer will note them")


def _check_metadata(data_dir: Path, infos: dict[int, EpisodeInfo], shapes: dict[int, Shapes]) -> Iterator[Finding]:
    name = "data/metadata.json"
    path = data_dir / "metadata.json"
    try:
        if path.stat().st_size > MAX_METADATA_BYTES:
            raise ValueError(f"it has more than {MAX_METADATA_BYTES} bytes")
        metadata = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(metadata, dict):
            raise ValueError("it is no JSON object")
    except (OSError, ValueError, RecursionError) as error:
        yield Finding("error", name, f"cannot be read ({error})")
        return
    if metadata.get("vla_rl_format") != FORMAT:
        yield Finding("error", name, f"vla_rl_format is {metadata.get('vla_rl_format')}, expected {FORMAT}")
        return
    for key, actual in (
        ("total_episodes", len(infos)),
        ("total_steps", sum(info.total_steps for info in infos.values())),
    ):
        if metadata.get(key) != actual:
            yield Finding("error", name, f"{key} is {metadata.get(key)}, but the files hold {actual}")
    noted = metadata.get("step_shapes")
    for number, table in shapes.items():
        if noted is not None and noted != {key: [dtype, list(shape)] for key, (dtype, shape) in sorted(table.items())}:
            yield Finding(
                "error", f"data/episodes/{number:06d}.hdf5", f"its steps hold {table}, but the store's {noted}"
            )


def _check_links(data_dir: Path, count: int) -> Iterator[Finding]:
    name = "data/main_data.hdf5"
    try:
        with h5py.File(data_dir / "main_data.hdf5", "r") as file:
            for number in range(count):
                link = file.get(f"episode_{number}", getlink=True)
                target = episode_path(data_dir, number).relative_to(data_dir).as_posix()
                expected = (target, f"/episode_{number}")
                if not isinstance(link, h5py.ExternalLink) or (link.filename, link.path) != expected:
                    yield Finding("error", name, f"'episode_{number}' does not link to '{target}', so Minari misses it")
            others = [key for key in map(str, file) if not re.fullmatch(r"episode_\d+", key)]
            if others:
                yield Finding("warning", name, f"holds {others[:3]}, which the store did not write")
    except (OSError, RuntimeError, KeyError, TypeError, ValueError) as error:
        yield Finding("error", name, f"cannot be read ({' '.join(str(error).split())})")
