"""`vla-rl doctor`: how to make an environment that needs a Python of its own, and what an existing one lacks."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from vla_rl.importing import load_object


class DoctorError(ValueError):
    """The environment that was examined does not work."""


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
