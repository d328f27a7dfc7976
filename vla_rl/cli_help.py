"""Help that fits one screen, for commands whose every option would fill ten: an example and what is changed most."""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, Literal, get_args, get_origin, get_type_hints

from rich.console import Console
from rich.table import Table

TRAIN = (
    "workdir",
    "method",
    "policy",
    "expert-data",
    "expert-episodes",
    "rl-tasks",
    "model.vlm",
    "model.device",
    "train.seed",
    "train.rounds",
    "train.stage0.steps",
    "train.stage1.total-timesteps",
    "train.stage1.num-envs",
    "train.stage2.steps",
    "train.num-workers",
)
"""The options that the help of a preset names."""


def print_presets(console: Console) -> None:
    """Help of `vla-rl train`."""
    from vla_rl.presets import PRESETS

    _say(console, "usage: vla-rl train PRESET [options]")
    _say(console, "       vla-rl train --resume WORKDIR\n")
    table = Table.grid(padding=(0, 2, 0, 2))
    for name, (description, _) in PRESETS.items():
        table.add_row(name, description)
    console.print(table)
    _say(console, "\nExample: vla-rl train toy --workdir runs/first")
    _say(console, "`vla-rl train PRESET --help` names its main options, `--help-all` every one,")
    _say(console, "`--dry-run` prints the configuration and what it will cost, and stops.")


def print_preset(console: Console, preset: str) -> None:
    """Help of `vla-rl train PRESET`.

    Raises:
        KeyError: there is no such preset.
    """
    from vla_rl.presets import PRESETS

    description, config = PRESETS[preset]
    options = dict(flatten(config))
    _say(console, f"usage: vla-rl train {preset} [options]\n")
    _say(console, f"{description}\n")
    rows = [(f"--{name}", f"{options[name][1]} [{_shown(options[name][0])}]") for name in TRAIN]
    rows += [
        ("--dry-run", "print configuration and cost, and stop"),
        ("--track {wandb,trackio}", "send the curves there too; TensorBoard has them always"),
        ("--help-all", f"every option ({len(options) + 2})"),
    ]
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column()
    for row in rows:
        table.add_row(*(cell.replace("[", r"\[") for cell in row))
    console.print(table)
    _say(console, f"\nExample: vla-rl train {preset} --workdir runs/first --train.seed 1")


def flatten(config: Any, prefix: str = "") -> Iterator[tuple[str, tuple[Any, str]]]:
    """Option -> (value, docstring) of a dataclass and of the dataclasses in it."""
    documented, hints = field_docstrings(type(config)), get_type_hints(type(config))
    for field in fields(config):
        value = getattr(config, field.name)
        name = prefix + field.name.replace("_", "-")
        if is_dataclass(value):
            yield from flatten(value, name + ".")
        else:
            yield name, (value, documented.get(field.name, "") + _choices(hints[field.name]))


def field_docstrings(cls: type) -> dict[str, str]:
    """The string below each field of a dataclass, as one line."""
    (node,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    assert isinstance(node, ast.ClassDef)
    found = {}
    for field, below in zip(node.body, node.body[1:], strict=False):
        if (
            isinstance(field, ast.AnnAssign)
            and isinstance(field.target, ast.Name)
            and isinstance(below, ast.Expr)
            and isinstance(below.value, ast.Constant)
            and isinstance(below.value.value, str)
        ):
            found[field.target.id] = " ".join(below.value.value.split())
    return found


def print_overview(console: Console, prog: str, commands: Sequence[type], *, lines: Sequence[str]) -> None:
    """Help of a command that has commands: what each is for, in its docstring's first line.

    Args:
        console: where to print.
        prog: what stands before the command.
        commands: their dataclasses.
        lines: what to say below.
    """
    _say(console, f"usage: {prog} COMMAND [options]\n")
    table = Table.grid(padding=(0, 2, 0, 2))
    for command in commands:
        table.add_row(kebab(command.__name__), (command.__doc__ or "").split("\n")[0].replace("[", r"\["))
    console.print(table)
    _say(console, "\n" + "\n".join([*lines, f"`{prog} COMMAND --help` says more."]))


def kebab(name: str) -> str:
    """`"ReEncode"` as `"re-encode"`."""
    return re.sub(r"(?<!^)(?=[A-Z])", "-", name).lower()


def print_command(
    console: Console, name: str, cls: type, *, groups: Sequence[str] = (), rare: Sequence[str] = ()
) -> None:
    """Help of a command without the options of some of its groups.

    Args:
        console: where to print.
        name: of the command.
        cls: its dataclass.
        groups: fields that hold dataclasses, named in one line each.
        rare: fields that are left out.
    """
    documented, hints = field_docstrings(cls), get_type_hints(cls, include_extras=True)
    first, *rest = inspect.cleandoc(cls.__doc__ or "").split("\n")
    positional = [f.name for f in fields(cls) if "Positional" in str(hints[f.name])]
    usage = " ".join(["vla-rl", name, *(word.upper() for word in positional), "[options]"])
    _say(console, f"usage: {usage}\n")
    _say(console, f"{first}\n")
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column()
    for field in fields(cls):
        if field.name in (*groups, *rare):
            continue
        flag = field.name.upper() if field.name in positional else f"--{field.name.replace('_', '-')}"
        needed = field.default is MISSING and field.default_factory is MISSING
        text = documented.get(field.name, "") + _choices(hints[field.name])
        text += " [needed]" if needed else f" [{_shown(field.default)}]"
        table.add_row(flag, text.replace("[", r"\["))
    for group in groups:
        text = documented.get(group, group)
        if "OmitArgPrefixes" in str(hints[group]):
            names = (f"--{field.name.replace('_', '-')}" for field in fields(get_type_hints(cls)[group]))
            table.add_row("...", f"{text}: {', '.join(names)}")
        else:
            table.add_row(f"--{group}.*", f"{text}: see --help-all")
    table.add_row("--help-all", "every option, with its type")
    console.print(table)
    example = next((line for line in rest if line.startswith("Example:")), "")
    _say(console, f"\n{example}")


def _choices(hint: Any) -> str:
    """`: a, b or c` for a Literal."""
    if get_origin(hint) is not Literal:
        return ""
    *first, last = map(str, get_args(hint))
    return f": {', '.join(first)} or {last}" if first else ""


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return " ".join(map(str, value)) if value else "none"
    return "none" if value is None else "off" if value is False else "on" if value is True else str(value)


def _say(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False)
