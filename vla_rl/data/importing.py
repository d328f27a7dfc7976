"""The store that every importer writes: episodes of others one by one, in a folder that appears once it is whole."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vla_rl.data.copying import Progress
from vla_rl.data.foreign import Arrays, Labels, Render, assemble
from vla_rl.data.store import EpisodeStore
from vla_rl.data.writing import new_folder


@dataclass(frozen=True)
class Found:
    """An episode as an importer read it.

    Attributes:
        arrays: by the names that ``assemble`` knows.
        attributes: what the episode says of itself.
        labels: what to assume otherwise.
        task: its name if neither says it.
        where: its file and name, for messages.
    """

    arrays: Arrays
    attributes: dict[str, Any]
    labels: Labels
    task: str
    where: str


def write_store(
    out: Path,
    episodes: Generator[Found],
    *,
    total: int,
    render: Render | None,
    overwrite: bool,
    progress: Progress | None,
) -> EpisodeStore:
    """Writes a store of ``total`` episodes and opens it for reading; nothing is left of it if one cannot be read.

    Raises:
        ValueError: what ``assemble`` and the importer say.
        FileExistsError: if ``out`` exists and ``overwrite`` is False.
    """
    instructions: dict[str, int] = {}
    with new_folder(out, overwrite=overwrite) as folder, EpisodeStore(folder) as store, closing(episodes):
        for done, found in enumerate(episodes, 1):
            store.append(
                assemble(
                    found.arrays,
                    labels=found.labels,
                    render=render,
                    attributes=found.attributes,
                    where=found.where,
                    default_task=found.task,
                    instructions=instructions,
                )
            )
            if progress is not None:
                progress(done, total)
    EpisodeStore(out, mode="a").close()  # writes its name, now that it has it, into metadata.json
    return EpisodeStore(out, mode="r")
