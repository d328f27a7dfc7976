"""Markdown from the docstring, the signature and the spaces of an environment's class."""

from __future__ import annotations

import inspect
import re
from dataclasses import dataclass
from typing import Any

import gymnasium as gym
from numpy.typing import NDArray


@dataclass(frozen=True)
class Docstring:
    """A class docstring in parts.

    Attributes:
        description: what stands before the first section.
        sections: heading -> body of each ``## Heading``.
        arguments: name -> text of ``Args:``.
        errors: name -> text of ``Raises:``.
    """

    description: str
    sections: dict[str, str]
    arguments: dict[str, str]
    errors: dict[str, str]


def parse(text: str) -> Docstring:
    """Take apart a docstring with ``## Heading`` sections, then google-style ``Args:`` and ``Raises:``."""
    prose, *blocks = re.split(r"^(Args|Raises|Example):\n", text, flags=re.MULTILINE)
    fields = dict(zip(blocks[::2], blocks[1::2], strict=True))
    description, *parts = re.split(r"^## (.+)\n", prose, flags=re.MULTILINE)
    sections = {heading: body.strip() for heading, body in zip(parts[::2], parts[1::2], strict=True)}
    return Docstring(description.strip(), sections, _fields(fields.get("Args", "")), _fields(fields.get("Raises", "")))


def _fields(block: str) -> dict[str, str]:
    entries = re.findall(r"^    ([\w.]+): (.*(?:\n {8}.*)*)", block, flags=re.MULTILINE)
    return {name: re.sub(r"\s+", " ", text).strip() for name, text in entries}


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def space_table(space: gym.Space) -> str:
    """Shape, type and bounds of a space, or of everything in a Dict by its key."""
    parts = space.spaces if isinstance(space, gym.spaces.Dict) else {"": space}
    rows = []
    for key, part in parts.items():
        if isinstance(part, gym.spaces.Discrete):
            low, high = str(part.start), str(part.start + part.n - 1)
        else:
            low, high = (_bounds(getattr(part, side)) for side in ("low", "high"))
        rows.append([f"`{key}`", f"`{part.shape}`", f"`{part.dtype}`", low, high])
    header, skipped = ["Key", "Shape", "Type", "Min", "Max"], 1 if "" in parts else 0
    return table(header[skipped:], [row[skipped:] for row in rows])


def _bounds(values: NDArray[Any]) -> str:
    numbers = [f"{value:.4g}" for value in values.ravel()]
    return numbers[0] if len(set(numbers)) == 1 else f"[{', '.join(numbers)}]"


def argument_table(env_class: Any, texts: dict[str, str]) -> str:
    """Name, type, default and meaning of every argument of the constructor.

    Raises:
        ValueError: if ``texts`` has nothing for an argument.
    """
    rows = []
    for name, parameter in list(inspect.signature(env_class.__init__).parameters.items())[1:]:
        if name not in texts:
            raise ValueError(f"the argument {name!r} of {env_class.__name__} has no text: add it to Args.")
        default = "" if parameter.default is parameter.empty else f"`{parameter.default!r}`"
        kind = "" if parameter.annotation is parameter.empty else f"`{parameter.annotation}`"
        rows.append([f"`{name}`", kind, default, texts[name]])
    return table(["Argument", "Type", "Default", "Meaning"], rows)
