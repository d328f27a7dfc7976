"""The `vla-rl` command: which words belong to which command, its help, and how errors end."""

from __future__ import annotations

import contextlib
import difflib
import io
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, get_args

import tyro
from rich.console import Console

from vla_rl import cli_help
from vla_rl.data_cli import Data, Tool
from vla_rl.data_formats_cli import ImportLeRobot, ImportMinari, ImportRlds, ImportRobomimic, ImportRoboSet
from vla_rl.doctor import Doctor
from vla_rl.report_commands import Compare, Report

USER_ERRORS = (ValueError, TypeError, KeyError, OSError, ImportError)
WITHOUT_TORCH = {"data": Data, "doctor": Doctor, "report": Report, "compare": Compare}
"""Commands whose words are read without torch; `data` and `doctor` do without it altogether."""
COMMANDS = ("demo", "collect", "train", "sft", "eval", "report", "compare", "data", "estimate", "doctor")
IMPORTS: dict[str, type] = {
    "minari": ImportMinari,
    "robomimic": ImportRobomimic,
    "lerobot": ImportLeRobot,
    "roboset": ImportRoboSet,
    "rlds": ImportRlds,
}
COMPLETION = "--tyro-print-completion"
RARE = ("gradient_accumulation", "optimizer", "offload", "lora_rank", "truncate_layers", "tokens", "vision_tokens")
"""Options of `vla-rl estimate` that its one-screen help leaves out."""


class UsageError(ValueError):
    """Words that are no command."""


def main(args: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status, or ends the process after a help page."""
    words = list(sys.argv[1:] if args is None else args)
    user_errors: tuple[type[Exception], ...] = USER_ERRORS
    try:
        _refuse_unknown(words)
        if words[:1] == [COMPLETION]:
            print(_completion(words), end="")
            raise SystemExit(0)
        page = _short_help(words)
        if page is not None:
            page(Console())
            raise SystemExit(0)  # as after tyro's own help
        if words and words[0] in WITHOUT_TORCH:
            help_all = ["--help" if word == "--help-all" else word for word in words[1:]]
            command = tyro.cli(WITHOUT_TORCH[words[0]], prog=f"vla-rl {words[0]}", args=help_all)
        else:
            from vla_rl.commands import RUN_ERRORS

            user_errors += RUN_ERRORS
            command = _parse(words)
        return command.run(Console()) or 0
    except user_errors as error:
        if os.environ.get("VLA_RL_TRACEBACK"):
            raise
        Console(stderr=True).print(f"vla-rl: {_sentence(error)}", markup=False, highlight=False, soft_wrap=True)
        return 2 if isinstance(error, UsageError) else 1


def _parse(words: list[str]) -> Any:
    """The command that the words ask for; ends the process on a wrong word and after a help page."""
    from transformers.utils.logging import disable_progress_bar

    from vla_rl.commands import Collect, Demo, Eval, Resume, Train
    from vla_rl.estimate_cli import Estimate
    from vla_rl.sft_cli import Sft

    disable_progress_bar()
    words = ["--help" if word == "--help-all" else word for word in words]
    if words[:1] == ["train"] and any(word.split("=")[0] == "--resume" for word in words):
        return tyro.cli(Resume, prog="vla-rl train", args=words[1:])
    tools = Demo | Collect | Train | Sft | Eval | Report | Compare | Data | Estimate | Doctor
    return tyro.cli(tools, prog="vla-rl", args=words)  # type: ignore[call-overload]


def _completion(words: list[str]) -> str:
    """The shell's script that tyro writes; where it knows no word, files are completed."""
    script = io.StringIO()
    with contextlib.redirect_stdout(script), contextlib.suppress(SystemExit):
        _parse(words)
    changes = {
        'if [[ "$completions" == "__TYRO': 'if [[ -z "$completions" || "$completions" == "__TYRO',
        'compgen -f -- "$cur"': 'compgen -f -- "${COMP_WORDS[COMP_CWORD]}"',  # tyro's $cur joins words
        "complete -F _tyro": "complete -o filenames -F _tyro",  # a slash after a directory
    }
    text = script.getvalue()
    for old, new in changes.items():
        text = text.replace(old, new)
    return text


def _short_help(words: Sequence[str]) -> Callable[[Console], None] | None:
    """What prints the one-screen help of a command with too many options for tyro's, where that is asked for."""
    if not words or words[-1] not in ("-h", "--help"):
        return None
    if words[0] == "data":
        return _short_data_help(words[1:-1])
    if words[0] in WITHOUT_TORCH:
        return None
    from vla_rl.commands import Collect, Demo, Eval, Train
    from vla_rl.estimate_cli import Estimate
    from vla_rl.presets import PRESETS
    from vla_rl.sft_cli import Sft

    match words[:-1]:
        case []:
            tools = (Demo, Collect, Train, Sft, Eval, Report, Compare, Data, Estimate, Doctor)
            lines = ["Example: vla-rl doctor && vla-rl demo --quick", "completion of words: docs/guides/reports.md"]
            return lambda console: cli_help.print_overview(console, "vla-rl", tools, lines=lines)
        case ["train"] | ["train", "--resume"]:
            return cli_help.print_presets
        case ["estimate"]:
            return lambda console: cli_help.print_command(console, "estimate", Estimate, rare=RARE)
        case ["train", preset] if preset in PRESETS:
            return lambda console: cli_help.print_preset(console, preset)
        case ["collect"]:
            return lambda console: cli_help.print_command(console, "collect", Collect, groups=("env",))
        case ["sft"]:
            return lambda console: cli_help.print_command(console, "sft", Sft, groups=("sl",))
        case ["eval"]:
            return lambda console: cli_help.print_command(console, "eval", Eval, groups=("env",))
    return None


def _short_data_help(words: Sequence[str]) -> Callable[[Console], None] | None:
    match words:
        case []:
            lines = ["Example: vla-rl data info runs/demo/expert_data"]
            return lambda console: cli_help.print_overview(console, "vla-rl data", get_args(Tool), lines=lines)
        case ["import", format_] if format_ in IMPORTS:
            name, cls = f"data import {format_}", IMPORTS[format_]
            return lambda console: cli_help.print_command(console, name, cls, groups=("labels",))
    return None


def _refuse_unknown(words: Sequence[str]) -> None:
    """Say which command, tool or preset comes nearest to a misspelt one."""
    match words:
        case ["train", word, *_]:
            from vla_rl.presets import PRESETS

            known, what = tuple(PRESETS), "preset"
        case ["data", word, *_]:
            known, what = tuple(map(cli_help.kebab, (tool.__name__ for tool in get_args(Tool)))), "data tool"
        case [word, *_]:
            known, what = COMMANDS, "command"
        case _:
            return
    if not word.startswith("-") and word not in known:
        near = difflib.get_close_matches(word, known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"choose one of {', '.join(known)}"
        raise UsageError(f"there is no {what} {word!r}; {hint}")


def _sentence(error: Exception) -> str:
    """What went wrong, in one line."""
    text = str(error.args[0] if isinstance(error, KeyError) and error.args else error).strip().splitlines()
    words = text[-1] if text else type(error).__name__
    if isinstance(error, OSError) and len(text) <= 3:
        words = " ".join(map(str.strip, text)) or words  # transformers: what it could not load, then where to read
    if isinstance(error, ImportError) and "pip install" not in words:
        words += "; `vla-rl doctor` says what this installation lacks"
    return words


if __name__ == "__main__":
    raise SystemExit(main())
