import sys

import pytest
from robohive_python import build
from vla_rl_envs.robohive_setup import KITCHEN_ASSETS, REQUIREMENTS, install_commands

from vla_rl.cli import main


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
