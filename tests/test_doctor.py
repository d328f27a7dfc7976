import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from packaging.requirements import Requirement
from robohive_python import build
from vla_rl_envs.robohive_setup import KITCHEN_ASSETS, REQUIREMENTS, install_commands

from vla_rl import doctor
from vla_rl.cli import main
from vla_rl.doctor_checks import (
    ENVS,
    EXTRAS,
    GL_FIX,
    KNOWN_BAD,
    Check,
    check_disk,
    check_env,
    check_gl,
    check_hub,
    check_pairs,
    check_python,
    check_requirements,
    check_threads,
    check_torch,
)


def lines(capsys, *args, status=0):
    assert main(["doctor", "robohive", *map(str, args)]) == status
    captured = capsys.readouterr()
    return [line.strip() for line in captured.out.splitlines()], captured.err


def package(site, name, version):
    folder = site / f"{name.replace('-', '_')}-{version}.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


def test_prints_the_commands_that_make_the_environment(capsys):
    out, _ = lines(capsys)
    assert set(install_commands("robohive-venv")) <= set(out)
    assert "robohive-venv/bin/robohive_init" in out
    out, _ = lines(capsys, "--venv", "my venv", "--simhive", "/my/simhive")
    assert set(install_commands("my venv", simhive="/my/simhive")) <= set(out)
    assert any("cp -r /my/simhive/franka_sim /my/simhive/furniture_sim /my/simhive/scene_sim" in line for line in out)


def test_says_what_an_interpreter_lacks(capsys, monkeypatch, tmp_path):
    package(tmp_path, "robohive", "0.7.0")
    package(tmp_path, "mujoco", "3.3.0")
    package(tmp_path, "dm-control", "1.0.16")
    for name in KITCHEN_ASSETS[1:]:
        (tmp_path / "robohive" / "simhive" / name).mkdir(parents=True)
    (tmp_path / "robohive" / "__init__.py").touch()
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    out, error = lines(capsys, "--python", sys.executable, status=1)
    assert "ok   robohive 0.7.0" in out and "ok   dm-control 1.0.16" in out
    assert "FAIL mujoco 3.3.0, but mujoco==3.1.3 is needed" in out
    assert "FAIL the package pink-noise-rl is missing" in out
    assert f"FAIL the assets franka_sim are missing in {tmp_path}/robohive/simhive" in out
    assert "ok   assets scene_sim" in out
    assert set(install_commands("robohive-venv")) <= set(out)
    failed = sum(line.startswith("FAIL") for line in out)
    assert error.count("\n") == 1 and f"{failed} of {2 + len(REQUIREMENTS) + len(KITCHEN_ASSETS)} checks" in error


def test_no_such_interpreter(capsys):
    assert "no Python interpreter '/no/python'" in lines(capsys, "--python", "/no/python", status=1)[1]
    assert "is not a Python 3.8 or newer" in lines(capsys, "--python", "false", status=1)[0][0]


@pytest.mark.slow
@pytest.mark.simulator
def test_an_environment_that_works(capsys, request):
    python = build(request.config.cache.mkdir("robohive"))
    out, error = lines(capsys, "--python", python)
    assert out[0].startswith("ok   Python 3") and "runs and is seen" in out[-1] and error == ""


REQUIRES = ("numpy>=1.26", "torch>=2.4", 'peft>=0.17; extra == "lora"', 'matplotlib>=3.8; extra == "plot"')


def test_requirements_that_are_not_met_come_with_the_command():
    good = {"vla-rl": "0.1.0", "numpy": "2.4.6", "torch": "2.13.0+cpu", "peft": "0.21.2"}
    base, lora, plot = check_requirements(REQUIRES, good)
    assert (base.status, lora.status, plot.status) == ("ok", "ok", "note")
    assert base.text == "numpy 2.4.6, torch 2.13.0+cpu" and lora.text == "peft 0.21.2"
    assert (plot.text, plot.fix) == ("matplotlib is missing", 'pip install "vla-rl[plot]"')
    base, lora, _ = check_requirements(REQUIRES, {"vla-rl": "0.1.0", "numpy": "1.20", "peft": "0.16"})
    assert base.status == "fail" and base.text == "numpy 1.20, but >=1.26 is needed; torch is missing"
    assert base.fix == 'pip install "numpy>=1.26" "torch>=2.4"'
    assert lora.status == "note" and "peft 0.16, but >=0.17 is needed" in lora.text


def test_every_extra_of_a_user_is_looked_at():
    project = (Path(__file__).parents[1] / "pyproject.toml").read_text()
    table = project.split("[project.optional-dependencies]")[1].split("[project.scripts]")[0]
    extras = set(re.findall(r"^([\w-]+) = ", table, re.MULTILINE))
    assert set(EXTRAS) == extras - {"all", "test", "docs", "demo", "examples"}
    requires = [f'{name}-package>=1; extra == "{name}"' for name in EXTRAS]
    found = check_requirements(requires, {"vla-rl": "0.1.0"})[1:]
    assert [(check.status, check.fix) for check in found] == [("note", f'pip install "vla-rl[{e}]"') for e in EXTRAS]


def test_without_an_installation_nothing_is_known_of_the_packages():
    (check,) = check_requirements((), {})
    assert check.status == "note" and "pip install" in check.fix


def test_python_is_held_against_what_is_required():
    assert check_python(">=3.10")[0].status == "ok"
    assert check_python(">=3.10", version="3.10.0rc1")[0].status == "fail"
    (check,) = check_python(">=3.10", version="3.9.18")
    assert check.status == "fail" and "3.9.18 at" in check.text and ">=3.10 is needed" in check.text
    assert "venv" in check.fix


def test_no_check_fails_without_a_command():
    with pytest.raises(ValueError, match=r"'a' .broken. says nothing of what to type"):
        Check("a", "fail", "broken")


@pytest.mark.parametrize("env_id", ENVS)
def test_an_environment_that_fails_comes_with_the_command(monkeypatch, env_id):
    def says(*answer):
        monkeypatch.setattr("vla_rl.doctor_checks._python", lambda *args, **kwargs: answer)
        (check,) = check_env(env_id)
        return check.status, check.fix

    picture = {"shape": [64, 64, 3], "spread": 0.0, "seconds": 1.0}
    assert says(True, json.dumps(picture)) == ("fail", GL_FIX)
    assert says(True, json.dumps(picture | {"spread": 9.0})) == ("ok", None)
    assert says(False, "OpenGL.error.GLError: 0x502") == says(False, "nothing within 120 s") == ("fail", GL_FIX)
    assert says(False, "ValueError: odd") == ("fail", f'pip install --force-reinstall "{ENVS[env_id]}"')
    assert says(False, "ImportError: No module named 'mujoco'") == ("note", f'pip install "{ENVS[env_id]}"')


def test_known_bad_pairs():
    (check,) = check_pairs({"metaworld": "3.1.1", "mujoco": "3.3.0", "vla-rl": "0.1.0"})
    assert check.status == "ok"
    (check,) = check_pairs({"metaworld": "3.1.1", "mujoco": "3.4.1"})
    assert check.status == "fail" and "metaworld 3.1.1 with mujoco 3.4.1" in check.text
    assert check.fix == 'pip install "mujoco==3.3.0"'
    found = check_pairs({"robohive": "0.7.0", "mujoco": "3.3.0", "gymnasium": "1.4.0"})
    assert [check.fix for check in found] == ["vla-rl doctor robohive"] * 2


def test_known_bad_pairs_are_requirements_that_parse():
    for first, second, why, fix in KNOWN_BAD:
        assert Requirement(first).name != Requirement(second).name and why and fix


def test_torch_computes_here():
    check = check_torch()[0]
    assert check.status == "ok" and torch.__version__ in check.text


def test_a_broken_torch_is_said_and_does_not_end_the_doctor(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    (check,) = check_torch()
    assert check.status == "fail" and check.fix.startswith("pip install")


def test_the_command_comes_without_torch():
    code = """
import sys
class Hide:
    def find_spec(self, name, *rest):
        if name.split(".")[0] in ("torch", "transformers"):
            raise ImportError(name)
sys.meta_path.insert(0, Hide())
from vla_rl.cli import main
sys.exit(main(["doctor", "robohive"]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "robohive-venv/bin/robohive_init" in done.stdout, done.stderr


def test_the_toy_runs_in_a_process_of_its_own():
    (check,) = check_env("VLA/Toy-v0")
    assert check.status == "ok" and "picture [32, 32, 3]" in check.text


@pytest.mark.simulator
def test_a_frame_is_really_drawn(monkeypatch):
    (check,) = check_gl()
    assert check.status == "ok" and "drew a frame" in check.text
    monkeypatch.setenv("MUJOCO_GL", "nonsense")
    (check,) = check_gl()
    assert check.status == "fail" and "MUJOCO_GL=nonsense" in check.text and "apt-get install libegl1" in check.fix


class Hub(BaseHTTPRequestHandler):
    def do_HEAD(self):
        self.send_response(int(self.path.strip("/")))
        self.end_headers()

    def log_message(self, *args):
        pass


@pytest.fixture
def hub(monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    server = HTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_the_hub_and_its_absence(hub, monkeypatch):
    assert check_hub(f"{hub}/200")[0].status == "ok"
    assert check_hub(f"{hub}/403")[0].status == "ok", "it answers, whatever it thinks of the question"
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes the question and never answers
        (check,) = check_hub(f"http://127.0.0.1:{silent.getsockname()[1]}", timeout=0.2)
    assert check.status == "note" and "HF_HUB_OFFLINE=1" in check.fix
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "HF_HUB_OFFLINE is set" in check_hub(f"{hub}/200")[0].text


def test_disk(tmp_path, monkeypatch):
    free = {"runs": 3e9, "shm": 64e6}
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free[path.name]))
    for name in free:
        (tmp_path / name).mkdir()
    runs, shared = check_disk({"runs": tmp_path / "runs" / "later", "shared memory": tmp_path / "shm"})
    assert runs.status == "note" and "3.0 GB free for runs" in runs.text
    assert shared.status == "note" and "--shm-size" in shared.fix
    free["runs"] = 9e9
    assert check_disk({"runs": tmp_path / "runs"})[0].status == "ok"


def test_threads(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1}, raising=False)
    monkeypatch.delenv("MKL_NUM_THREADS", raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert check_threads()[0].status in ("ok", "note")
    monkeypatch.setenv("OMP_NUM_THREADS", "64")
    (check,) = check_threads()
    assert check.status == "note" and "OMP_NUM_THREADS=64" in check.text and "64 threads" in check.text


def test_the_command_prints_what_to_type_and_fails_with_the_checks(monkeypatch, capsys):
    found = [
        Check("a", "ok", "fine"),
        Check("b", "note", "not here", "pip install b"),
        Check("c", "fail", "broken", "mend c"),
    ]
    monkeypatch.setattr(doctor, "all_checks", lambda: [(check.name, lambda check=check: [check]) for check in found])
    assert main(["doctor"]) == 1
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "ok   a: fine" and out[2].strip() == "pip install b" and out[4].strip() == "mend c"
    assert out[5].startswith("1 of 3 checks failed.")
    assert main(["doctor", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["checks"][2] == {
        "name": "c", "status": "fail", "text": "broken", "fix": "mend c",
    }  # fmt: skip
    found.pop()
    assert main(["doctor"]) == 0 and "All that was looked at works" in capsys.readouterr().out
