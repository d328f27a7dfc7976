"""The documentation's commands run as they stand, one directory per page, with less to do where that takes minutes."""

import contextlib
import io
import json
import os
import shlex
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hub_server import hub
from others_data import files, publish
from pages import DOCS, OTHERS, ROOT, blocks, commands
from tiny import tiny_policy, toy_env

from vla_rl.cli import main
from vla_rl.collect import run_expert
from vla_rl.data import EpisodeStore
from vla_rl.encoders import small_vlm
from vla_rl.estimate_cli import _INSTRUCTION
from vla_rl.presets import PRESETS
from vla_rl.trainer import IterativeTrainer

TRAIN = (
    "--train.num-workers 0 --train.eval-episodes 4 --train.rl-eval-episodes 4 "
    "--train.no-stop-at-zero --train.stage0.steps 5 --train.stage2.steps 5 --train.stage1.total-timesteps 256 "
    "--train.stage1.num-envs 8 --train.stage1.rollout-steps 16 --train.stage1.minibatch-size 64"
)
METAWORLD = (
    f"{TRAIN} --train.stage0.batch-size 8 --expert-episodes 1 --expert-tasks drawer-close --rl-tasks drawer-open:new "
    "--unseen-tasks drawer-open:new --env.horizon 100 --train.eval-episodes 1 --train.rl-eval-episodes 1 "
    "--train.stage2.batch-size 8 --train.collect-episodes 8"
)
LESS = {
    "collect": "--episodes 2 --num-workers 0",
    "train": f"{TRAIN} --expert-episodes 4",
    "train --resume": "",
    "train toy --workdir runs/split": f"{TRAIN} --expert-episodes 4 --method sft",  # a launch less
    "train metaworld": METAWORLD,
    "train metaworld --model.device cuda": f"{METAWORLD} --model.device cpu",
    "train metaworld --workdir runs/sharded": f"{METAWORLD} --method sft",
    "train metaworld --workdir /shared/run": f"{METAWORLD} --method sft --workdir runs/shared",
    "train metaworld-demo": METAWORLD,
    "train metaworld-reduced": METAWORLD,
    "sft": "--sl.steps 2 --sl.batch-size 8",
    "eval": "--episodes 2 --num-workers 0",
    "data import minari some/dataset-v0": "--out from-minari",  # of their own, as each is somebody else's data
    "data import lerobot theirs": "--out from-lerobot",
}
"""By the beginning of a command, the longest one counting. Said after the page's own words: the last one counts."""

TWO = {
    "torchrun --nproc-per-node 4": "torchrun --standalone --nproc-per-node 2",
    "accelerate launch --config_file": "accelerate launch --num_processes 2 --main_process_port 0 --config_file",
    "--nproc-per-node 4 --rdzv-backend c10d --rdzv-endpoint node1:29500": "--nproc-per-node 1 --rdzv-backend c10d "
    "--rdzv-endpoint localhost:FREE_PORT",
}
"""Launchers, and the same with two processes of a CPU, by gloo, on any free port."""


SRUN = """#!/bin/bash
[ "$1 $2 $3 $4" = "--nodes 2 --ntasks-per-node 1" ] || exit 64
shift 4
SLURM_PROCID=1 "$@" & SLURM_PROCID=0 "$@" && wait %1
"""
"""Slurm's launcher with both nodes on this machine."""


def free_port():
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]


def smaller(words):
    """The words of a command with less to do."""
    text = shlex.join(words)
    for launcher, two in TWO.items():
        text = text.replace(launcher, two)
    words = shlex.split(text.replace("FREE_PORT", str(free_port())))
    at = words.index("vla_rl" if words[0] == "torchrun" else "vla-rl") + 1
    start = max((key for key in LESS if f"{shlex.join(words[at:])} ".startswith(f"{key} ")), key=len, default="")
    return [*map(os.path.expanduser, words), *LESS.get(start, "").split()]


def run(page, words, *, status=0):
    """Run a command of a page, in this process if no launcher starts it; what it says."""
    words = smaller(words)
    said = io.StringIO()
    if words[0] == "vla-rl":
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            try:
                found = main(words[1:])
            except SystemExit as end:  # a help page
                found = end.code
    else:
        done = subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300)
        found = done.returncode
        said.write(done.stdout)
    assert (found or 0) == status, f"{page}: {shlex.join(words)}\n{said.getvalue()}"
    return said.getvalue()


def words_of(path):
    """Every `vla-rl` on a page, and what starts it."""
    return [words for _, words in commands(path) if words[0] == "vla-rl" or words[3:5] == ["-m", "vla_rl"]]


def run_other(words, env):
    """Run a command of another program, which finds its downloads on a hub of ours, and packages here already."""
    assert words[0] in ("python", "pip", "minari", "hf"), words
    subprocess.run(words, env=env, check=True, timeout=300)


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """An empty directory, which is also the home; commands of this environment; no GPU."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=os.pathsep)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture
def smolvlm(place):
    """A VLM of random weights in a folder of the hub's name, so that nothing is looked for on the hub."""
    encoder = small_vlm(
        [_INSTRUCTION], image_size=32, patch_size=16, width=64, heads=2, vision_layers=1, text_layers=10
    )
    encoder.save_pretrained("HuggingFaceTB/SmolVLM-256M-Instruct")
    return encoder


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


def test_the_stand_in_has_the_name_of_the_presets_vlm():
    hub = "HuggingFaceTB/SmolVLM-256M-Instruct"
    assert {PRESETS[name][1].model.vlm for name in ("kitchen", "metaworld")} == {hub}, "what `smolvlm` stands for"


def test_the_install_lines_are_those_that_ci_starts_with():
    found = {shlex.join(words) for path in [*DOCS.rglob("*.md"), *OTHERS] for _, words in commands(path)}
    lines = {shlex.join(shlex.split(line)) for line in (ROOT / ".ci/run").read_text().splitlines() if " pip " in line}
    installs = {command for command in found if command.startswith("python -m pip install")}
    assert len(installs) == 3 and installs < lines


@pytest.fixture
def small_demo(monkeypatch):
    """The presets behind the demo, with its commands' own differences left and next to nothing to do."""
    for name in ("metaworld-demo", "metaworld-base"):
        description, config = PRESETS[name]
        train = config.train
        train = replace(
            train,
            eval_episodes=1,
            rl_eval_episodes=1,
            num_workers=0,
            stage0=replace(train.stage0, steps=min(train.stage0.steps, 2), batch_size=8),
            stage1=replace(train.stage1, total_timesteps=64, num_envs=4, rollout_steps=16, minibatch_size=16),
            stage2=replace(train.stage2, steps=2, batch_size=8),
            stop_at_zero=False,
        )
        config = replace(
            config,
            train=train,
            env=replace(config.env, horizon=100),
            expert_tasks=("drawer-close",),
            unseen_tasks=("drawer-open:new",),
            expert_episodes=1,
        )
        monkeypatch.setitem(PRESETS, name, (description, config))


def check_runs():
    """The runs under `runs` went through all stages of their method; their names."""
    found = {path.parent for path in Path("runs").glob("*/experiment.json")}
    for path in found:
        method = json.loads((path / "experiment.json").read_text())["config"]["method"]
        stages = ["after-stage0"] if method == "sft" else ["after-stage0", "-stage1", "after-stage2"]
        results = json.loads((path / "results.json").read_text())
        assert all(any(label.endswith(stage) for label in results) for stage in stages), (path, list(results))
        assert (path / "report.html").is_file(), path
    return sorted(path.name for path in found)


def check_estimate(words, said, encoder):
    """The figures are those of the options given."""
    options = dict(zip(words[2::2], words[3::2], strict=True))
    batch = PRESETS["kitchen"][1].train.stage2.batch_size if options["--model"] == "kitchen" else 256
    assert f"gradient step of {options.get('--batch-size', batch)} rows" in said
    assert ("times at 60 TFLOP/s (as given)" in said) == ("--tflops" in options)
    tokens, width = encoder.prompt_length([_INSTRUCTION]), 64
    if "--top-layers" in options:  # hidden states, as docs/guides/memory.md has it
        assert f" {10_000 * 4 * tokens * width / 1e6:.2f} MB (" in said
    if "--tokens" in options:  # image tokens, in bfloat16
        assert f" {10_000 * 2 * int(options['--vision-tokens']) * width / 1e6:.2f} MB (" in said


@pytest.mark.slow
@pytest.mark.simulator
def test_the_commands_of_the_command_line_page(smolvlm, small_demo):
    for run_dir in ("runs/sft-s0", "runs/ire-vla-s0"):
        run("before", ["vla-rl", "train", "toy", "--workdir", run_dir, "--method", "sft"])
    found = words_of(DOCS / "reference/cli.md")
    assert len(found) > 20
    for words in found:
        if words[2:3] == ["--resume"]:  # a run that has finished is left alone
            assert "the run in runs/first has finished" in run("reference/cli.md", words, status=1)
            continue
        if "--quick" in words:  # as it stands
            assert f"{shlex.join(words)} " in (ROOT / ".ci/run").read_text()
            continue
        said = run("reference/cli.md", words)
        if words[1] == "demo":
            assert ("Stage 0 trains here" in said) == ("--from-scratch" in words)
        elif words[1] == "estimate":
            check_estimate(words, said, smolvlm)
        elif words[0] == "torchrun":
            assert said.count("after 2 steps in 2 processes;") == 1
        elif words[1:] == ["doctor", "robohive"]:
            assert "-m pip install --no-deps robohive" in said
    names = check_runs()
    assert len([name for name in names if name.startswith("demo-s0")]) == 2 and "demo-1" in names, names
    assert len([name for name in names if name.startswith("metaworld")]) == 2, "a dry run leaves nothing"
    for left in ("demos/toy/data", "taught/policy.json", "taught-by-four/policy.json", "toy.json", "compare.html"):
        assert Path(left).exists(), left
    with EpisodeStore("demos", mode="r") as store:
        assert sorted(info.task for info in store.index) == sorted(2 * ["drawer-open", "drawer-open:new"])


@pytest.mark.slow
@pytest.mark.simulator
@pytest.mark.filterwarnings("ignore")  # Minari's, at data sets without a home
def test_the_commands_of_the_data_page(drawers, monkeypatch, tmp_path):
    pytest.importorskip("av")
    for path in ("demos", "runs/demo/expert_data"):
        drawers(Path(path))
    tiny_policy().save_pretrained("runs/demo/checkpoints/task0-round0-stage2")
    files()
    (draw,) = [block.code for block in blocks(DOCS / "guides/data.md") if block.code.startswith("# my_render.py")]
    Path("my_render.py").write_text(draw)
    monkeypatch.syspath_prepend(tmp_path)  # PYTHONPATH=.
    publish(tmp_path / "hub", monkeypatch)
    with hub(tmp_path / "hub") as env:
        for _, words in commands(DOCS / "guides/data.md"):
            if words[0] == "vla-rl":
                run("guides/data.md", words)
            else:
                run_other(words, env)
    for left in ("drawers.png", "look.mp4", "views/demos.hdf5", "demos.hdf5", "sets/small/meta/info.json"):
        assert Path(left).stat().st_size > 100, left
    written = {"hundred": 100, "back": 110, "from-minari": 2, "kitchen": 2, "lift": 1, "from-lerobot": 2, "slide": 2}
    for path, episodes in (written | {"flap": 1, "bridge": 2}).items():
        with EpisodeStore(path, mode="r") as store:
            assert len(store) == episodes, path
            if path == "kitchen":
                assert np.ptp(store[0].observations["image"]) > 100, "a picture of nothing"


def killed(*args, **kwargs):
    raise KeyboardInterrupt


@pytest.mark.slow
@pytest.mark.simulator
def test_the_commands_of_the_reports_page_and_of_the_quickstart(monkeypatch, small_demo):
    with monkeypatch.context() as patch:
        patch.setattr(IterativeTrainer, "_stage2", killed)
        with pytest.raises(KeyboardInterrupt):
            run("before", ["vla-rl", "train", "toy", "--workdir", "runs/first"])
    for copy in ("sft-s0", "ire-vla-s0", "filtered-bc-s0"):
        Path("runs", copy).symlink_to("first")
    stage0 = Path("runs/first/checkpoints/stage0/head.safetensors")
    before = stage0.stat().st_mtime_ns
    resumed = 0
    for page in ("guides/reports.md", "quickstart.md"):
        for words in words_of(DOCS / page):
            last = json.loads(Path("runs/first/results.json").read_text())
            if "--quick" in words:
                continue
            run(page, words)
            if words[2:3] == ["--resume"]:
                resumed += 1
                new = json.loads(Path("runs/first/results.json").read_text()).keys() - last.keys()
                assert any(label.endswith("after-stage2") for label in new), new
                assert not any("stage0" in label for label in new) and stage0.stat().st_mtime_ns == before
    assert resumed == 1
    assert Path("compare.html").is_file()
    assert [name[:7] for name in check_runs()] == ["demo-s0", "filtere", "first", "ire-vla", "sft-s0", "toy"]


@pytest.mark.slow
def test_the_shell_lines_of_the_reports_page(tmp_path):
    block, *more = [block for block in blocks(DOCS / "guides/reports.md") if "--tyro-print-completion" in block.code]
    assert not more
    check = """
        for word in ~/.local/share/bash-completion/completions/vla-rl; do source "$word"; done
        complete -p vla-rl
        head -n 1 ~/.zfunc/_vla-rl
    """
    code = f"set -eu\n{block.code}\n{check}"
    done = subprocess.run(["bash", "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    bash, zsh = done.stdout.splitlines()
    assert bash.startswith("complete -o filenames -F _") and bash.endswith(" vla-rl") and zsh == "#compdef vla-rl"
    assert {path.name for path in tmp_path.iterdir()} == {".local", ".zfunc"}, "in this home and nowhere else"


@pytest.mark.slow
@pytest.mark.simulator
def test_the_commands_of_the_pages_on_gpus(smolvlm, tmp_path, monkeypatch):
    pytest.importorskip("accelerate")
    pytest.importorskip("bitsandbytes")
    Path("srun").write_text(SRUN)
    Path("srun").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    collect = ["collect", "--out", "demos/toy", "--tasks", "reach-red", "--env.env-id", "vla_rl_envs:VLA/Toy-v0"]
    run("before", ["vla-rl", *collect])
    smolvlm.model.config.save_pretrained("DIR_WITH_A_CONFIG")
    Path("examples").symlink_to(ROOT / "examples")
    said = {}
    for page in ("guides/many-gpus.md", "guides/memory.md"):
        for words in words_of(DOCS / page):
            said[shlex.join(words)] = text = run(page, words)
            if words[1] == "estimate":
                check_estimate(words, text, smolvlm)
            elif "--launch" in words:
                stages = [line for line in text.splitlines() if "steps in 2 processes" in line]
                assert len(stages) == 1, text
    assert len(said) == 9, list(said)
    assert sum("after 2 steps in 2 processes;" in text for text in said.values()) == 1
    assert Path("taught/policy.json").is_file() and Path("taught-alone/policy.json").is_file()
    names = check_runs()
    assert len(names) == 4 and {"sharded", "shared", "split"} < set(names), names
