"""`vla-rl doctor`: what this installation lacks, with the command that mends it; RoboHive's Python beside it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import tyro
from rich.console import Console

from vla_rl.doctor_checks import Check, all_checks
from vla_rl.importing import load_object


class DoctorError(ValueError):
    """The environment that was examined does not work."""


@dataclass
class Doctor:
    """Look at Python, torch, OpenGL, simulators, hub, disk and threads; what is wrong comes with the command to type.

    Example: vla-rl doctor --json > report.json      (robohive: how to make its environment, and what one lacks)
    """

    topic: tyro.conf.Positional[Literal["here", "robohive"]] = "here"
    """this installation, or the environment of VLA/RoboHive-v0, which has a Python of its own"""
    json: tyro.conf.FlagCreatePairsOff[bool] = False
    """for bug reports: everything as JSON"""
    python: str | None = None
    """robohive: interpreter to examine: versions, assets, and a first picture"""
    venv: Path = Path("robohive-venv")
    """robohive: directory that the printed commands make"""
    simhive: Path | None = None
    """robohive: directory with copies of RoboHive's assets, for the printed commands"""

    def run(self, console: Console) -> int | None:
        """Print and examine; the exit status is 1 where something does not work."""
        if self.topic == "robohive":
            doctor_robohive(console, python=self.python, venv=self.venv, simhive=self.simhive)
            return None
        return doctor_here(console, as_json=self.json)


def doctor_here(console: Console, *, as_json: bool = False) -> int:
    """Run every check and print what it found; returns the exit status, 1 where something does not work."""
    found: list[Check] = []
    with console.status("looking", spinner="dots") as status:
        for name, check in all_checks():
            status.update(f"looking at {name}")
            found += check()
    if as_json:
        console.print_json(json.dumps({"checks": [asdict(check) for check in found]}))
    else:
        print_checks(console, found)
    return int(any(check.status == "fail" for check in found))


def print_checks(console: Console, checks: Sequence[Check]) -> None:
    """One line per check, what to type below it, and a sum."""
    styles = {"ok": "green", "note": "yellow", "fail": "bold red"}
    for check in checks:
        console.print(f"{check.status:4}", style=styles[check.status], end=" ")
        console.print(f"{check.name}: {check.text}", markup=False, highlight=False, soft_wrap=True)
        if check.fix is not None:
            console.print(f"       {check.fix}", style="cyan", markup=False, highlight=False, soft_wrap=True)
    wrong = sum(check.status == "fail" for check in checks)
    notes = sum(check.status == "note" for check in checks)
    words = "All that was looked at works." if not wrong else f"{wrong} of {len(checks)} checks failed."
    console.print(words + (f" Notes: {notes}; what they name is optional." if notes else ""))


def doctor_robohive(console: Console, *, python: str | None, venv: Path, simhive: Path | None) -> None:
    """Print the commands that make RoboHive's environment; with `python`, examine that one first.

    Args:
        console: where to print.
        python: interpreter to examine, or None for the commands alone.
        venv: directory that the printed commands make.
        simhive: directory with copies of RoboHive's assets, for the printed commands.

    Raises:
        DoctorError: the examined environment lacks something; what, has been printed.
        FileNotFoundError: there is no such interpreter.
    """
    findings = [] if python is None else load_object("vla_rl_envs.robohive_setup:diagnose")(python)
    for finding in findings:
        console.print(f"{'ok  ' if finding.ok else 'FAIL'} {finding.text}", markup=False, soft_wrap=True)
    wrong = sum(not finding.ok for finding in findings)
    if findings and not wrong:
        return
    commands = load_object("vla_rl_envs.robohive_setup:install_commands")
    assets = commands(str(venv), simhive=str(simhive or "DIRECTORY"))[-1]
    lines = [
        "RoboHive pins versions that exclude the other simulators, so it gets a Python of its own:",
        *commands(str(venv))[:-1],
        "Its assets (SimHive), from its authors' repositories:",
        commands(str(venv))[-1],
        "or from copies that you have" + ("" if simhive else " in DIRECTORY") + ":",
        assets,
        "Then examine it, and use it:",
        f"vla-rl doctor robohive --python {venv}/bin/python",
        f'gym.make("vla_rl_envs:VLA/RoboHive-v0", env_id="FK1_SdoorOpenRandom_v2d-v4", python="{venv}/bin/python")',
    ]
    for line in lines:
        indent = "" if line.endswith(":") else "  "
        console.print(indent + line, markup=False, highlight=False, soft_wrap=True)
    if wrong:
        raise DoctorError(f"{python} does not run RoboHive: {wrong} of {len(findings)} checks failed, as said above.")
