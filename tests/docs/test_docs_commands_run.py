"""The documentation's commands run as they stand, one directory per page, with less to do where that takes minutes."""

import os
from dataclasses import replace
from pathlib import Path

import pytest
from pages import DOCS, ROOT
from test_docs_commands import lines
from tiny import tiny_encoder, tiny_policy, toy_env

from vla_rl.cli import main
from vla_rl.collect import run_expert
from vla_rl.data import EpisodeStore

LESS = {
    "collect": "--episodes 2 --num-workers 0",
    "train": "--expert-episodes 4 --train.num-workers 0 --train.eval-episodes 4 --train.rl-eval-episodes 4 "
    "--train.no-stop-at-zero --train.stage0.steps 5 --train.stage2.steps 5 --train.stage1.total-timesteps 256 "
    "--train.stage1.num-envs 8 --train.stage1.rollout-steps 16 --train.stage1.minibatch-size 64",
    "sft": "--sl.steps 2 --sl.batch-size 8",
    "eval": "--episodes 2 --num-workers 0",
    "train metaworld": "--dry-run --model.device cpu",
}
"""Said after the page's own words: the last one counts."""

ONLY_READ = {
    "demo": ".ci/run",
    "train toy --workdir runs/split": "tests/sl/test_launched.py",
    "train --resume": "tests/test_cli.py",
    "estimate --model HuggingFaceTB": "tests/test_estimate.py",
    "estimate --model kitchen": "tests/test_estimate.py",
    "doctor robohive": "tests/test_doctor.py",
    "collect --out demos --tasks drawer-open": "tests/test_cli.py",
    "data import minari": "tests/data/test_tools_formats.py",
    "data import robomimic": "tests/data/test_robomimic_reader.py",
    "data import lerobot theirs": "tests/data/test_lerobot.py",
    "data import roboset": "tests/data/test_roboset.py",
    "data import rlds": "tests/data/test_rlds.py",
}
"""Beginnings of commands that want the hub, other people's data, a simulator or hours; and what runs their like."""


def run(page, words):
    """Run a command of a page in this process; a help page, or the exit status."""
    words = [os.path.expanduser(word) for word in words]
    command = "train metaworld" if " ".join(words).startswith("train metaworld") else words[0]
    try:
        status = main([*words, *LESS.get(command, "").split()])
    except SystemExit as end:
        status = end.code
    assert not status, f"{page}: vla-rl {' '.join(words)}"


def commands_of(page):
    return [
        words for _, words in lines(DOCS / page) if not any(" ".join(words).startswith(start) for start in ONLY_READ)
    ]


@pytest.fixture
def drawers(tmp_path):
    """Writes 110 episodes of toys under a drawer's name, and one failure."""

    def write(path):
        from vla_rl_envs import make_expert

        env = toy_env("reach-red")
        with EpisodeStore(path, mode="w-") as store:
            for seed in range(110):
                episode = run_expert(env, make_expert(env), task="drawer-open", seed=seed, noise=0.1)
                store.append(replace(episode, success=seed > 0))

    return write


def test_what_is_only_read_is_run_somewhere():
    everything = [" ".join(words) for path in DOCS.rglob("*.md") for _, words in lines(path)]
    for start, test in ONLY_READ.items():
        assert any(command.startswith(start) for command in everything), f"no page has `vla-rl {start}`"
        assert (ROOT / test).is_file(), test


@pytest.mark.slow
@pytest.mark.simulator
def test_the_commands_of_the_command_line_page(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for run_dir in ("runs/sft-s0", "runs/ire-vla-s0"):
        run("before", ["train", "toy", "--workdir", run_dir, "--method", "sft"])
    found = commands_of("reference/cli.md")
    assert len(found) > 7
    for words in found:
        run("reference/cli.md", words)
    for left in ("demos/toy/data", "taught/policy.json", "toy.json", "runs/first/report.html", "compare.html"):
        assert Path(left).exists(), left


@pytest.mark.slow
def test_the_commands_of_the_data_page(tmp_path, monkeypatch, drawers):
    pytest.importorskip("av")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for path in ("demos", "runs/demo/expert_data"):
        drawers(Path(path))
    tiny_policy().save_pretrained("runs/demo/policy")
    found = commands_of("guides/data.md")
    assert len(found) > 14
    for words in found:
        run("guides/data.md", words)
    for left in ("drawers.png", "look.mp4", "views/demos.hdf5", "demos.hdf5", "sets/small/meta/info.json"):
        assert Path(left).stat().st_size > 100, left
    with EpisodeStore("hundred", mode="r") as hundred, EpisodeStore("back", mode="r") as back:
        assert len(hundred) == 100 and len(back) == 110


@pytest.mark.slow
@pytest.mark.simulator
def test_the_commands_of_the_reports_page_and_of_the_quickstart(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run("before", ["train", "toy", "--workdir", "runs/first", "--method", "sft"])
    for copy in ("sft-s0", "ire-vla-s0", "filtered-bc-s0"):
        Path("runs", copy).symlink_to("first")
    for page in ("guides/reports.md", "quickstart.md"):
        for words in commands_of(page):
            run(page, words)
    assert Path("compare.html").is_file() and Path("runs/toy/report.html").is_file()


@pytest.mark.slow
@pytest.mark.simulator
def test_the_commands_of_the_pages_on_gpus(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run("before", ["train", "toy", "--workdir", "runs/split", "--method", "sft"])
    run("before", ["collect", "--out", "demos/toy", "--tasks", "reach-red", "--env.env-id", "vla_rl_envs:VLA/Toy-v0"])
    tiny_encoder().model.config.save_pretrained("DIR_WITH_A_CONFIG")
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    said = {}
    for page in ("guides/many-gpus.md", "guides/memory.md"):
        for words in commands_of(page):
            capsys.readouterr()
            run(page, words)
            said[" ".join(words)] = capsys.readouterr().out
    assert len(said) >= 6
    assert Path("taught/policy.json").is_file() and Path("taught-alone/policy.json").is_file()
    for command, text in said.items():
        if command.startswith("estimate"):
            assert "peak on the device" in text, command
        elif command.startswith("train"):
            assert command.split()[-1] in text, command  # what was asked for is in the plan
