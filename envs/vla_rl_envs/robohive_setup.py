"""What RoboHive's Python environment is made of: the commands that make it, and a check of one that exists."""

from __future__ import annotations

import json
import shlex
import subprocess
import time
from typing import Any, NamedTuple

from vla_rl_envs._env_child import find_interpreter

ROBOHIVE = "robohive==0.7.0"
"""Installed without its dependencies, which include torch and an old h5py that its environments do not need."""

REQUIREMENTS: tuple[str, ...] = (
    "mujoco==3.1.3",
    "dm-control==1.0.16",
    "gymnasium==0.29.1",
    "numpy<2",
    "click",
    "termcolor",
    "sk-video",
    "flatten-dict",
    "absl-py",
    "gitpython",
    "pink-noise-rl",
    "h5py",
    "matplotlib",
)
"""What RoboHive's environments import, in the versions that RoboHive pins."""

KITCHEN_ASSETS: tuple[str, ...] = ("franka_sim", "furniture_sim", "scene_sim")
"""Parts of SimHive that the kitchen needs."""

_EXAMPLE = "FK1_MicroOpenRandom_v2d-v4"
_REPORT = """
import importlib.metadata as m, importlib.util as u, json, os, platform, sys
sys.path.pop(0)
def version(name):
    try:
        return m.version(name)
    except m.PackageNotFoundError:
        return None
spec = u.find_spec("robohive")
simhive = None if spec is None else os.path.join(os.path.dirname(spec.origin), "simhive")
print(json.dumps({
    "python": platform.python_version(),
    "versions": {name: version(name) for name in sys.argv[1].split()},
    "simhive": simhive,
    "assets": [] if simhive is None or not os.path.isdir(simhive) else os.listdir(simhive),
}))
"""


class Finding(NamedTuple):
    """One line of a diagnosis: whether it is as it should be, and what was found or is missing."""

    ok: bool
    text: str


def install_commands(
    venv: str = "robohive-venv", *, python: str = "python3.11", simhive: str | None = None
) -> tuple[str, ...]:
    """Shell commands that make the environment, in order.

    Args:
        venv: directory of the new environment.
        python: interpreter to make it with; 3.10, 3.11 and 3.12 are known to work.
        simhive: directory with copies of ``KITCHEN_ASSETS``; None downloads all of SimHive (about 300 MB, needs git).
    """
    interpreter = shlex.quote(f"{venv}/bin/python")
    assets = shlex.quote(f"{venv}/bin/robohive_init")
    if simhive is not None:
        sources = " ".join(shlex.quote(f"{simhive}/{name}") for name in KITCHEN_ASSETS)
        package = f"{shlex.quote(venv)}/lib/python*/site-packages/robohive"
        assets = f'to="$(echo {package})/simhive" && mkdir -p "$to" && cp -r {sources} "$to"'
    return (
        f"{shlex.quote(python)} -m venv {shlex.quote(venv)}",
        f"{interpreter} -m pip install --upgrade pip",  # that of Python 3.10 searches for versions without end
        f"{interpreter} -m pip install --no-deps {ROBOHIVE}",
        f"{interpreter} -m pip install {' '.join(shlex.quote(name) for name in REQUIREMENTS)}",
        assets,
    )


def diagnose(python: str) -> list[Finding]:
    """Check RoboHive's environment: versions, assets, and, if these are there, a first picture of the kitchen.

    Args:
        python: its interpreter.

    Raises:
        FileNotFoundError: if there is no such interpreter.
    """
    interpreter = find_interpreter(python)
    names = {name: wanted for name, wanted in map(_split, (ROBOHIVE, *REQUIREMENTS))}
    done = subprocess.run(
        [interpreter, "-c", _REPORT, " ".join(names)], capture_output=True, text=True, timeout=120, check=False
    )
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        return [Finding(False, f"{interpreter} is not a Python 3.8 or newer that runs: {last}")]
    report = json.loads(done.stdout)
    findings = [Finding(True, f"Python {report['python']} at {interpreter}")]
    findings += [_package(name, wanted, report["versions"][name]) for name, wanted in names.items()]
    findings += [_asset(name, report) for name in KITCHEN_ASSETS]
    if all(finding.ok for finding in findings):
        findings.append(_first_picture(interpreter))
    return findings


def _split(requirement: str) -> tuple[str, str]:
    for sign in ("==", "<"):
        name, found, version = requirement.partition(sign)
        if found:
            return name, sign + version
    return requirement, ""


def _package(name: str, wanted: str, found: str | None) -> Finding:
    if found is None:
        return Finding(False, f"the package {name}{wanted} is missing")
    ok = not wanted or found == wanted[2:]
    if wanted.startswith("<"):
        ok = int(found.split(".")[0]) < int(wanted[1:])
    return Finding(ok, f"{name} {found}" + ("" if ok else f", but {name}{wanted} is needed"))


def _asset(name: str, report: dict[str, Any]) -> Finding:
    if name in report["assets"]:
        return Finding(True, f"assets {name}")
    return Finding(False, f"the assets {name} are missing in {report['simhive'] or 'robohive/simhive'}")


def _first_picture(python: str) -> Finding:
    from vla_rl_envs.robohive import RoboHiveEnv

    start = time.monotonic()
    try:
        env = RoboHiveEnv(_EXAMPLE, python)
        try:
            observation, _ = env.reset(seed=0)
        finally:
            env.close()
    except Exception as error:
        return Finding(False, f"{_EXAMPLE} does not run: {error}")
    if observation["image"].std() < 1.0:
        return Finding(False, f"{_EXAMPLE} gives an empty picture; set MUJOCO_GL to egl, osmesa or glfw")
    return Finding(True, f"{_EXAMPLE} runs and is seen (built, reset and drawn in {time.monotonic() - start:.1f} s)")
