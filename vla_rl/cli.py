"""The `vla-rl` command: demo, collect, train, eval, data, doctor."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

import tyro
from rich.console import Console

from vla_rl.data_cli import Data

USER_ERRORS = (ValueError, TypeError, KeyError, OSError, ImportError)


def main(args: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    words = list(sys.argv[1:] if args is None else args)
    user_errors: tuple[type[Exception], ...] = USER_ERRORS
    if words[:1] == ["data"]:  # done before torch would be imported
        command = tyro.cli(Data, prog="vla-rl data", args=words[1:])
    else:
        from transformers.utils.logging import disable_progress_bar

        from vla_rl.commands import RUN_ERRORS, Collect, Demo, Doctor, Eval, Train

        disable_progress_bar()
        user_errors += RUN_ERRORS
        tools = Demo | Collect | Train | Eval | Data | Doctor
        command = tyro.cli(tools, prog="vla-rl", description=__doc__, args=words)  # type: ignore[call-overload]
    try:
        return command.run(Console()) or 0
    except user_errors as error:
        if os.environ.get("VLA_RL_TRACEBACK"):
            raise
        text = str(error.args[0] if isinstance(error, KeyError) and error.args else error).strip().splitlines()
        Console(stderr=True).print(
            f"vla-rl: {text[-1] if text else type(error).__name__}", markup=False, highlight=False, soft_wrap=True
        )
        return 1
