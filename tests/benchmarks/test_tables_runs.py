import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import render_tables
import tables
from table_runs import read_runs
from tables import Args, main

from vla_rl.presets import METAWORLD_BASE
from vla_rl.rundir import RunDirectory

TINY = (
    *("--expert-episodes", "6", "--model.lora-rank", "4", "--model.hidden-dim", "16", "--model.dtype", "float32"),
    *("--train.stage0.steps", "20", "--train.stage0.batch-size", "32", "--train.num-workers", "0"),
    *("--train.stage1.total-timesteps", "128", "--train.stage1.num-envs", "4", "--train.stage1.rollout-steps", "16"),
    *("--train.stage1.minibatch-size", "64", "--train.stage1.update-epochs", "1"),
    *("--train.stage2.steps", "5", "--train.stage2.batch-size", "32"),
    *("--train.eval-episodes", "2", "--train.rl-eval-episodes", "4", "--train.eval-envs", "4"),
    *("--train.video-episodes", "0"),
)
EVALUATION = {
    "mean": 0,
    "tasks": {"a": {"episodes": [{"seed": 5, "success": False, "length": 3, "episode_return": 0.0}]}},
}


def option(command, name):
    """Value of the last occurrence of an option; None if it is not there."""
    return next((command[i + 1] for i in reversed(range(len(command))) if command[i] == name), None)


class Trainer:
    """Stands in for `vla-rl train`: leaves a finished run, or half of one for the names in `dies`."""

    def __init__(self, monkeypatch):
        self.calls, self.dies, self.weights, self.trains = [], [], b"weights", True
        monkeypatch.setattr(tables, "subprocess", SimpleNamespace(run=self.run))

    def run(self, command, *, cwd, **kwargs):
        if command[0] != "vla-rl":
            return subprocess.run(command, cwd=cwd, **kwargs)
        workdir = Path(cwd) / option(command, "--workdir")
        self.calls.append(workdir.name)
        run = RunDirectory(workdir)
        if option(command, "--method") == "sft" and self.trains:
            policy = workdir / "checkpoints" / "stage0"
            policy.mkdir(parents=True)
            (policy / "policy.json").write_text("{}")
            (policy / "head.safetensors").write_bytes(self.weights)
        if workdir.name in self.dies:
            return SimpleNamespace(returncode=1)
        run.add_result("after-stage0", {"rl": EVALUATION})
        run.add_result("seconds", {"total": 60.0})
        (workdir / "report.md").write_text(f"# Report\n\n    {shlex.join(command)}\n")
        run.close()
        return SimpleNamespace(returncode=0)


@pytest.fixture
def trainer(monkeypatch):
    return Trainer(monkeypatch)


def args(tmp_path, *methods, seeds=(0,)):
    return Args(preset="toy", seeds=seeds, methods=methods, root=tmp_path / "runs", out=tmp_path / "out")


def commands(tmp_path):
    files = sorted((tmp_path / "out" / "toy").glob("*.json"))
    return {path.stem: shlex.split(json.loads(path.read_text())["command"]) for path in files}


def test_rows_of_a_seed_share_stage_0_and_demonstrations_and_seeds_share_no_episode(tmp_path, trainer):
    assert main(args(tmp_path, "ppo", "ire-vla", seeds=(0, 2)), ("--expert-episodes", "6")) == 0
    assert trainer.calls == ["sft-s0", "ppo-s0", "ire-vla-s0", "sft-s2", "ppo-s2", "ire-vla-s2"]
    made = commands(tmp_path)
    assert all(command[:5] == ["vla-rl", "train", "toy", "--expert-episodes", "6"] for command in made.values())
    for seed in ("0", "2"):
        assert option(made[f"sft-s{seed}"], "--policy") is None
        for method in ("ppo", "ire-vla"):
            command = made[f"{method}-s{seed}"]
            assert option(command, "--policy") == f"sft-s{seed}/checkpoints/stage0"
            assert option(command, "--expert-data") == f"sft-s{seed}/expert_data"
            assert option(command, "--train.stage0.steps") == "0" and option(command, "--train.seed") == seed
            assert option(command, "--method") == method
    episodes = [int(option(made[f"ppo-s{seed}"], "--train.eval-seed")) for seed in (0, 2)]
    assert episodes[1] - episodes[0] >= 1000
    files = [json.loads(path.read_text()) for path in (tmp_path / "out" / "toy").iterdir()]
    assert len({entry["stage0_sha256"] for entry in files}) == 1 and len(files[0]["commit"]) == 40
    assert not any(str(tmp_path) in json.dumps(entry) for entry in files)


def test_finished_runs_are_not_repeated_and_interrupted_ones_begin_anew_beside_the_old_one(tmp_path, trainer):
    trainer.dies = ["ppo-s0", "ppo-s0-2"]
    assert main(args(tmp_path, "ppo", "ire-vla")) == 1
    assert main(args(tmp_path, "ppo", "ire-vla")) == 1
    trainer.calls.clear()
    assert main(args(tmp_path, "ppo", "ire-vla")) == 0
    assert trainer.calls == ["ppo-s0-3"]
    assert (tmp_path / "runs" / "toy" / "ppo-s0" / "state.json").is_file()
    assert commands(tmp_path)["ppo-s0"][-1] == "ppo-s0-3"
    (tmp_path / "out" / "toy" / "ire-vla-s0.json").unlink()
    trainer.calls.clear()
    assert main(args(tmp_path, "ppo", "ire-vla")) == 0
    assert trainer.calls == [] and "ire-vla-s0" in commands(tmp_path)


def test_without_stage_0_the_other_rows_of_the_seed_are_not_tried(tmp_path, trainer, capsys):
    trainer.dies = ["sft-s0"]
    assert main(args(tmp_path, "ppo", seeds=(0, 1))) == 1
    assert trainer.calls == ["sft-s0", "sft-s1", "ppo-s1"]
    assert "sft, seed 0: `vla-rl train toy" in capsys.readouterr().err


def test_a_preset_that_starts_from_a_policy_has_no_stage_0_to_share_but_its_demonstrations(tmp_path, trainer):
    trainer.trains = False
    given = args(tmp_path, "ire-vla")
    given.preset = "metaworld-reduced"
    assert main(given) == 0
    entry = json.loads((tmp_path / "out" / "metaworld-reduced" / "ire-vla-s0.json").read_text())
    command = shlex.split(entry["command"])
    assert option(command, "--policy") is option(command, "--train.stage0.steps") is None
    assert option(command, "--expert-data") == "sft-s0/expert_data"
    assert entry["stage0_sha256"] == tables.sha256_of(Path(METAWORLD_BASE)) is not None


def test_runs_with_other_options_and_another_stage_0_are_not_mixed(tmp_path, trainer):
    main(args(tmp_path, "ppo"))
    with pytest.raises(ValueError, match=r"made with the options \(\), not \('--train.rounds', '2'\)"):
        main(args(tmp_path, "ppo"), ("--train.rounds", "2"))
    (tmp_path / "runs").rename(tmp_path / "elsewhere")
    assert main(args(tmp_path, "ppo")) == 0  # nothing to do, so stage 0 is not needed
    assert main(args(tmp_path, "ppo", "ire-vla")) == 0 and trainer.calls[-2:] == ["sft-s0", "ire-vla-s0"]
    (tmp_path / "runs").rename(tmp_path / "elsewhere-too")
    trainer.weights = b"other weights"
    with pytest.raises(ValueError, match="stage 0 of seed 0 was made again and came out other"):
        main(args(tmp_path, "ppo-bc"))
    with pytest.raises(ValueError, match="'ppoo'"):
        main(args(tmp_path, "ppoo"))


@pytest.mark.slow
def test_from_the_command_line_to_the_document(tmp_path, monkeypatch):
    """The real thing in one process, as far too short runs."""
    from vla_rl.cli import main as vla_rl

    def run(command, *, cwd, **kwargs):
        if command[0] != "vla-rl":
            return subprocess.run(command, cwd=cwd, **kwargs)
        monkeypatch.setattr(sys, "argv", command)
        before = Path.cwd()
        os.chdir(cwd)
        try:
            return SimpleNamespace(returncode=vla_rl(command[1:]))
        finally:
            os.chdir(before)

    monkeypatch.setattr(tables, "subprocess", SimpleNamespace(run=run))
    methods = ("sft", "filtered-bc", "ppo-bc", "ire-vla")
    assert main(args(tmp_path, *methods), TINY) == 0
    runs = {method: row[0] for method, row in read_runs(tmp_path / "out" / "toy").items()}
    assert set(runs) == set(methods)
    assert runs["sft"].data["env_steps"] == 0
    assert runs["filtered-bc"].data["env_steps"] == runs["ire-vla"].data["env_steps"] >= 128
    for run in runs.values():
        assert run.first("rl") == runs["sft"].first("rl")  # the same policy on the same episodes
    untouched = runs["filtered-bc"].phases
    assert untouched["task0-round0-after-stage1"] == untouched["after-stage0"]
    assert all(len(curve["noisy_success"]) > 1 for curve in runs["ppo-bc"].data["stage1"].values())

    document = tmp_path / "all.md"
    document.write_text("<!-- benchmarks: all -->\n<!-- end benchmarks -->\n")
    where = {"results": tmp_path / "out", "documents": (document,), "pictures": tmp_path / "pictures"}
    assert render_tables.main(render_tables.Args(**where)) == 0
    text = document.read_text()
    assert all(f"| {method} |" in text for method in methods) and (tmp_path / "pictures" / "toy.png").is_file()
    assert render_tables.main(render_tables.Args(**where, check=True)) == 0
