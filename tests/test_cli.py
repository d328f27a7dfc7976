import json
import os
import subprocess
import sys
from pathlib import Path

import imageio.v3 as imageio
import numpy as np
import pytest
from tiny import tiny_policy, toy_store

from vla_rl.cli import main
from vla_rl.data import EpisodeStore

COMMAND = Path(sys.executable).parent / "vla-rl"
TOY = ["--env.env-id", "vla_rl_envs:VLA/Toy-v0", "--env.image-size", "32", "--env.horizon", "20"]
TINY = {
    "expert-episodes": 6,
    "train.stage0.steps": 20,
    "train.stage0.batch-size": 16,
    "train.stage1.total-timesteps": 512,
    "train.stage1.num-envs": 8,
    "train.stage1.rollout-steps": 32,
    "train.stage1.minibatch-size": 64,
    "train.stage1.update-epochs": 1,
    "train.stage2.steps": 10,
    "train.stage2.batch-size": 16,
    "train.eval-episodes": 4,
    "train.rl-eval-episodes": 4,
}


def options(**changes):
    settings = TINY | {key.replace("_", "-"): value for key, value in changes.items()}
    return [text for key, value in settings.items() for text in (f"--{key}", str(value))]


def run(*args, **environment):
    return subprocess.run(
        [COMMAND, *map(str, args)], capture_output=True, text=True, env={**os.environ, **environment}, timeout=300
    )


def fails(capsys, *args):
    """Run in this process, expect exit status 1, and return what was said on stderr."""
    assert main(list(map(str, args))) == 1
    error = capsys.readouterr().err
    assert "Traceback" not in error
    assert error.startswith("vla-rl: ") and error.count("\n") == 1
    return error.removeprefix("vla-rl: ").strip()


@pytest.fixture(scope="module")
def toy_run(tmp_path_factory):
    """A whole experiment as a user starts it, with very little learning."""
    workdir = tmp_path_factory.mktemp("cli") / "run"
    done = run("train", "toy", "--workdir", workdir, *options(), "--train.num-workers", 1, "--train.no-stop-at-zero")
    assert done.returncode == 0, done.stdout + done.stderr
    return workdir, done.stdout


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("policy") / "saved" / "policy"
    tiny_policy().save_pretrained(path)
    return path


def test_help_names_every_command():
    done = run("--help")
    assert done.returncode == 0
    for name in ("demo", "collect", "train", "eval", "data"):
        assert f"• {name} " in done.stdout


@pytest.mark.slow
def test_train_ends_with_a_report(toy_run):
    workdir, stdout = toy_run
    report = (workdir / "report.md").read_text()
    results = json.loads((workdir / "results.json").read_text())
    assert "vla-rl train toy --workdir" in report
    last = [label for label in results if "after-stage2" in label][-1]
    for label in ("after-stage0", last):
        for group in ("expert", "rl", "unseen"):
            assert f"{results[label][group]['mean']:.2f} [" in report
    assert "Report:" in stdout and "report.md" in stdout.replace("\n", "")
    for name in ("RL tasks", "after-stage0"):
        assert name in report and name in stdout
    picture = imageio.imread(workdir / "curves.png")
    assert picture.shape[0] > 200 and picture.shape[1] > 600
    assert len(np.unique(picture.reshape(-1, picture.shape[-1]), axis=0)) > 50
    for video in (workdir / "videos").glob("*.gif"):
        assert imageio.imread(video).shape[1:] == (256, 256, 3)
    for path in [line.split("](")[1].rstrip(")") for line in report.splitlines() if line.startswith("![")]:
        assert (workdir / path).is_file()


@pytest.mark.slow
def test_a_finished_run_is_not_written_over(toy_run, capsys):
    workdir, _ = toy_run
    before = {path: path.stat().st_mtime_ns for path in workdir.rglob("*")}
    error = fails(capsys, "train", "toy", "--workdir", workdir, *options())
    assert str(workdir) in error and "give a new workdir" in error
    assert {path: path.stat().st_mtime_ns for path in workdir.rglob("*")} == before


@pytest.mark.slow
def test_a_checkpoint_of_a_run_is_evaluated(toy_run, tmp_path, capsys):
    workdir, _ = toy_run
    (policy,) = (workdir / "checkpoints").glob("*stage2")
    out = tmp_path / "result.json"
    args = ["eval", policy, "--tasks", "reach-red", "reach-blue:new", "--episodes", 5, "--num-workers", 0, *TOY]
    assert main([str(arg) for arg in [*args, "--out", out]]) == 0
    printed = capsys.readouterr().out
    result = json.loads(out.read_text())
    assert set(result["tasks"]) == {"reach-red", "reach-blue:new"}
    for name, task in result["tasks"].items():
        assert task["n"] == 5 and [episode["seed"] for episode in task["episodes"]] == list(range(10_000, 10_005))
        assert name in printed and f"{task['rate']:.2f}" in printed
    error = fails(capsys, *args, "--out", out)
    assert str(out) in error and "another file" in error


def test_collect_and_data_info(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    args = ["collect", "--out", tmp_path / "store", "--tasks", "reach-red", "reach-green:new", "--num-workers", 0, *TOY]
    assert main([str(arg) for arg in [*args, "--episodes", 3]]) == 0
    with EpisodeStore(tmp_path / "store", mode="r") as store:
        tasks = [info.task for info in store.index]
        assert tasks.count("reach-red") == tasks.count("reach-green:new") == 3
        assert all(info.success and info.source == "expert" for info in store.index)
        steps = store.total_steps
    capsys.readouterr()
    assert main(["data", "info", str(tmp_path / "store")]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "6 episodes" in printed and f"{steps} steps" in printed
    assert "reach-red" in printed and "reach-green:new" in printed and "1.00" in printed


@pytest.mark.slow
def test_collect_in_processes_gives_the_same_episodes(tmp_path):
    stores = []
    for workers in (0, 2):
        path = tmp_path / str(workers)
        args = ["collect", "--out", path, "--tasks", "reach-red", "reach-blue", "--episodes", 6, *TOY]
        assert main([str(arg) for arg in [*args, "--num-workers", workers]]) == 0
        with EpisodeStore(path, mode="r") as store:
            stores.append([(episode.task, episode.seed, episode.actions.tobytes()) for episode in store])
    assert stores[0] == stores[1] and len(stores[0]) == 12


def test_an_unknown_task_is_one_sentence_with_a_suggestion(tmp_path, capsys):
    error = fails(capsys, "collect", "--out", tmp_path / "s", "--tasks", "reach-rad", "--num-workers", 0, *TOY)
    assert "'reach-rad'" in error and "reach-red" in error


def test_an_unknown_task_in_a_worker_is_one_sentence_too(tmp_path, capsys):
    error = fails(capsys, "collect", "--out", tmp_path / "s", "--tasks", "reach-rad", "--num-workers", 1, *TOY)
    assert "'reach-rad'" in error and "reach-red" in error


@pytest.mark.parametrize("option", ["rl-tasks", "unseen-tasks", "expert-tasks"])
def test_an_unknown_task_is_noticed_before_anything_is_done(tmp_path, capsys, option):
    args = ["train", "toy", "--workdir", tmp_path / "run", *options(), "--train.num-workers", 0]
    error = fails(capsys, *args, f"--{option}", "reach-rad")
    assert "'reach-rad'" in error and "reach-red" in error
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_an_unknown_env_is_one_sentence(tmp_path, capsys):
    error = fails(capsys, "collect", "--out", tmp_path / "s", "--num-workers", 0, "--env.env-id", "VLA/Nothing-v0")
    assert "Nothing" in error


def test_a_path_without_a_store(tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("mine")
    error = fails(capsys, "data", "info", tmp_path)
    assert str(tmp_path) in error
    error = fails(capsys, "data", "info", tmp_path / "nothing")
    assert "no episode store" in error
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_missing_policy(tmp_path, capsys):
    error = fails(capsys, "eval", tmp_path / "no" / "policy", "--tasks", "reach-red", *TOY)
    assert "policy.json" in error and "save_pretrained" in error


def test_a_policy_that_is_neither_here_nor_on_the_hub(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    error = fails(capsys, "eval", "runs/policy", "--tasks", "reach-red", *TOY)
    assert "runs/policy" in error


def test_an_unknown_task_to_evaluate(checkpoint, capsys):
    error = fails(capsys, "eval", checkpoint, "--tasks", "reach-rad", "--num-workers", 0, *TOY)
    assert "'reach-rad'" in error


def test_training_without_any_data(tmp_path, capsys):
    error = fails(capsys, "train", "toy", "--workdir", tmp_path / "run", *options(), "--expert-tasks")
    assert "expert_tasks" in error and not (tmp_path / "run").exists()


def test_training_from_an_existing_store_and_policy(checkpoint, tmp_path):
    store = toy_store(tmp_path / "store", ("reach-red", "reach-blue"), episodes=3)
    before = {path: path.read_bytes() for path in store.rglob("*.hdf5")}
    args = ["train", "toy", "--workdir", tmp_path / "run", *options(), "--train.num-workers", 0, "--method", "sft"]
    args += ["--expert-data", store, "--policy", checkpoint, "--model.dtype", "float32"]
    assert main([str(arg) for arg in args]) == 0
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert "after-stage0" in results and not any("stage1" in label for label in results)
    assert not (tmp_path / "run" / "expert_data").exists()
    assert {path: path.read_bytes() for path in store.rglob("*.hdf5")} == before


def test_unknown_options_are_refused():
    done = run("train", "toy", "--train.stage1.clip-coeff", "0.1")
    assert done.returncode != 0 and "clip-coef" in done.stdout + done.stderr


def test_a_traceback_on_request(tmp_path):
    done = run("data", "info", tmp_path / "nothing", VLA_RL_TRACEBACK="1")
    assert done.returncode != 0 and "Traceback" in done.stderr and "no episode store" in done.stderr


@pytest.mark.slow
@pytest.mark.simulator
def test_metaworld_expert(tmp_path, capsys):
    args = ["collect", "--out", tmp_path / "s", "--tasks", "drawer-open", "--episodes", 1, "--num-workers", 0]
    assert main([str(arg) for arg in args]) == 0
    with EpisodeStore(tmp_path / "s", mode="r") as store:
        (episode,) = store
    assert episode.success and episode.instruction == "open the drawer"
    assert episode.observations["image"].shape[1:] == (64, 64, 3)
    capsys.readouterr()
    assert main(["data", "info", str(tmp_path / "s")]) == 0
    assert "drawer-open" in capsys.readouterr().out
    error = fails(capsys, "collect", "--out", tmp_path / "t", "--tasks", "drawer-opne", "--num-workers", 0)
    assert "'drawer-opne'" in error and "drawer-open" in error
