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
        ValueError: the file is of a version with other settings.
    """
    path = Path(workdir) / EXPERIMENT_FILE
    if not path.is_file():
        raise FileNotFoundError(
            f"{workdir} holds no {EXPERIMENT_FILE}, which `vla-rl train` writes as it starts; give its --workdir, or "
            "continue a run that was started from Python with IterativeTrainer.resume"
        )
    content = json.loads(path.read_text())
    return from_dict(cls, content["config"], where=str(path)), content["command"], content["notes"]


def from_dict(cls: type[Config], data: Mapping[str, Any], *, where: str = "the data") -> Config:
    """A dataclass, with dataclasses and tuples in it, from what `asdict` and JSON made of one.

    Raises:
        ValueError: the data has a key that is no field.
    """
    hints = get_type_hints(cls)
    unknown = sorted(set(data) - {field.name for field in fields(cls)})  # type: ignore[arg-type]
    if unknown:
        raise ValueError(
            f"{where} has the settings {unknown}, which this version does not know; use the one it is from"
        )
    values = {}
    for name, value in data.items():
        hint = hints[name]
        if is_dataclass(hint):
            value = from_dict(hint, value, where=where)  # type: ignore[arg-type]
        elif isinstance(value, list):
            value = tuple(value)
        values[name] = value
    return cls(**values)
