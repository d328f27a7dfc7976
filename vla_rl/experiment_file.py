"""`experiment.json`: the whole configuration a run was started with, so that it can be continued and shown."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from vla_rl.report import versions
from vla_rl.runs import EXPERIMENT_FILE
from vla_rl.saved_files import RESTORE, check_arguments, one_line, read_object

Config = TypeVar("Config")


def write_experiment(workdir: str | Path, config: Any, *, command: str, notes: Sequence[str]) -> None:
    """Write the configuration, the command, the notes of the report, and the versions of this environment."""
    path = Path(workdir)
    path.mkdir(parents=True, exist_ok=True)
    content = {"command": command, "notes": list(notes), "versions": versions(), "config": asdict(config)}
    temporary = path / (EXPERIMENT_FILE + ".tmp")
    temporary.write_text(json.dumps(content, indent=2) + "\n")
    os.replace(temporary, path / EXPERIMENT_FILE)


def read_experiment(workdir: str | Path, cls: type[Config]) -> tuple[Config, str, list[str]]:
    """Configuration, command and notes of a run.

    Raises:
        FileNotFoundError: no run was started there by `vla-rl train` or `vla-rl demo`.
        ValueError: the file is damaged, or of a version with other settings.
    """
    path = Path(workdir) / EXPERIMENT_FILE
    if not path.is_file():
        raise FileNotFoundError(
            f"{workdir} holds no {EXPERIMENT_FILE}, which `vla-rl train` writes as it starts; give its --workdir, or "
            "continue a run that was started from Python with IterativeTrainer.resume"
        )
    content = read_object(path)
    config, command, notes = (content.get(key) for key in ("config", "command", "notes"))
    if not isinstance(command, str) or not isinstance(notes, list) or not all(isinstance(note, str) for note in notes):
        raise ValueError(
            f"{path} lacks the command or the notes that it was written with, a text and a list of texts; {RESTORE}"
        )
    return from_dict(cls, config, where=str(path)), command, notes


def from_dict(cls: type[Config], data: Any, *, where: str = "the data") -> Config:
    """A dataclass, with dataclasses and tuples in it, from what `asdict` and JSON made of one.

    Raises:
        ValueError: a key is no field, or one without default is missing, or a value is of another type.
    """
    if not isinstance(data, Mapping):
        raise ValueError(
            f"{where} has {one_line(repr(data), length=60)} where the settings of {cls.__name__} belong; {RESTORE}"
        )
    hints = get_type_hints(cls)
    unknown = sorted(set(data) - {field.name for field in fields(cls)})  # type: ignore[arg-type]
    if unknown:
        raise ValueError(
            f"{where} has the settings {one_line(str(unknown))}, which this version does not know; use the one it is "
            "from"
        )
    check_arguments(cls, dict(data), where=where)
    values = {}
    for name, value in data.items():
        hint = hints[name]
        if is_dataclass(hint):
            value = from_dict(hint, value, where=where)  # type: ignore[arg-type]
        elif isinstance(value, list):
            value = tuple(value)
        values[name] = value
    return cls(**values)
