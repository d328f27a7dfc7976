"""The Python environment with RoboHive that the tests share: made once, with the commands that users are given."""

import functools
import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from vla_rl_envs.robohive_setup import KITCHEN_ASSETS, install_commands

_UNREACHABLE = ("Retrying", "NewConnectionError", "Network is unreachable", "Temporary failure in name resolution")


def simhive():
    """Directory of RoboHive's assets; skips the test where there is none."""
    beside = Path(__file__).parents[2] / "shared" / "assets" / "simhive"
    directory = Path(os.environ.get("VLA_RL_SIMHIVE", beside)).resolve()
    if not all((directory / name).is_dir() for name in KITCHEN_ASSETS):
        pytest.skip(f"no RoboHive assets in {directory}; VLA_RL_SIMHIVE names another directory")
    return directory


@functools.cache
def build(cache):
    """Interpreter of an environment under ``cache``, kept between runs; skips the test where pip reaches no index."""
    if "VLA_RL_ROBOHIVE_PYTHON" in os.environ:
        return os.environ["VLA_RL_ROBOHIVE_PYTHON"]
    assets = simhive()
    base = sys.executable if sys.version_info < (3, 13) else shutil.which("python3.12") or shutil.which("python3.11")
    if base is None:
        pytest.skip("RoboHive's mujoco needs Python 3.12 or older")
    recipe = "\n".join(install_commands("venv", python=base, simhive=str(assets)))
    venv = Path(cache) / hashlib.sha256(recipe.encode()).hexdigest()[:12]
    finished = venv / "finished"
    if not finished.exists():
        for old in venv.parent.iterdir():
            shutil.rmtree(old)
        for command in install_commands(str(venv), python=base, simhive=str(assets)):
            done = subprocess.run(command, shell=True, capture_output=True, text=True)
            text = done.stdout + done.stderr
            if done.returncode and any(sign in text for sign in _UNREACHABLE):
                pytest.skip(f"pip cannot reach an index: {text.strip().splitlines()[-1]}")
            assert done.returncode == 0, f"{command}\n{text}"
        finished.touch()
    return str(venv / "bin" / "python")
