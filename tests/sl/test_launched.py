"""The commands of docs/guides/many-gpus.md, each started on two processes of a CPU, against the same in one process."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import differing, parameters, tiny_policy

from vla_rl.cli import main
from vla_rl.data import EpisodeStore, compute_statistics
from vla_rl.policy import VLAPolicy

pytest.importorskip("accelerate")

pytestmark = pytest.mark.slow

BIN = Path(sys.executable).parent
SETTINGS = Path(__file__).parents[2] / "examples" / "accelerate"
TORCHRUN = ["torchrun", "--standalone", "--nproc-per-node", "2"]
# `num_processes` of the files is the number of GPUs; port 0 is any free one.
ACCELERATE = ["accelerate", "launch", "--num_processes", "2", "--main_process_port", "0", "--config_file"]
FSDP2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
LAUNCHERS = {
    "torchrun": (TORCHRUN, {}, ""),
    "torchrun-fsdp2": (TORCHRUN, FSDP2, " with FSDP2"),
    "ddp.yaml": ([*ACCELERATE, str(SETTINGS / "ddp.yaml")], {}, ""),
    "fsdp2.yaml": ([*ACCELERATE, str(SETTINGS / "fsdp2.yaml")], {}, " with FSDP2"),
}


def run(words, **environment):
    """What a command says; GPUs are hidden from it."""
    words = [str(BIN / words[0]), *map(str, words[1:])]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run(words, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def taught(tmp_path_factory, expert_path):
    """A policy to start from, what one process makes of it, and the words that say what to do."""
    folder = tmp_path_factory.mktemp("taught")
    with EpisodeStore(expert_path, mode="r") as store:
        policy = tiny_policy(statistics=compute_statistics([store]))
    policy.save_pretrained(folder / "start")
    words = ["sft", folder / "start", "--data", expert_path, "--sl.scope", "all", "--sl.random-shift", 2]
    words += ["--sl.steps", 4, "--sl.batch-size", 15, "--out"]
    assert main([str(word) for word in [*words, folder / "alone"]]) == 0
    return folder, words


@pytest.mark.parametrize("name", LAUNCHERS)
def test_sft_under_a_launcher_gives_the_policy_of_one_process(taught, tmp_path, name):
    folder, words = taught
    launcher, environment, how = LAUNCHERS[name]
    said = run([*launcher, "-m", "vla_rl", *words, tmp_path / "out"], **environment)
    assert re.findall(r"loss \d\.\d{4} after 4 steps in 2 processes(.*);", said) == [how], "said by the first alone"
    start, alone = (parameters(VLAPolicy.from_pretrained(folder / path)) for path in ("start", "alone"))
    together = parameters(VLAPolicy.from_pretrained(tmp_path / "out"))
    changed = differing(start, alone)
    assert any(key.startswith("head.") for key in changed) and any(key.startswith("encoder.") for key in changed)
    for key, value in alone.items():
        if value.numel() and not key.endswith("k_proj.bias"):  # as in test_distributed.py
            moved = (value - start[key]).abs().max().item()
            torch.testing.assert_close(together[key], value, rtol=0, atol=0.02 * moved + 1e-7, msg=key)


def test_the_trainer_hands_its_supervised_stages_to_torchrun(tmp_path):
    settings = {
        "expert-episodes": 6,
        "train.num-workers": 0,
        "model.dtype": "float32",  # the rounding of bfloat16 adds up to percents within 20 steps
        "train.stage0.steps": 21,
        "train.stage0.batch-size": 15,
        "train.stage1.total-timesteps": 64,
        "train.stage1.num-envs": 4,
        "train.stage1.rollout-steps": 16,
        "train.stage1.minibatch-size": 64,
        "train.stage2.steps": 21,
        "train.stage2.batch-size": 15,
        "train.eval-episodes": 2,
        "train.rl-eval-episodes": 2,
    }
    words = ["train", "toy", "--train.no-stop-at-zero"]
    words += [str(word) for name, value in settings.items() for word in (f"--{name}", value)]
    losses = {}
    for name, launch in (("alone", []), ("together", ["--launch", " ".join(TORCHRUN)])):
        said = run(["vla-rl", *words, "--workdir", tmp_path / name, *launch])
        assert re.findall(r"(stage\d): loss \S+ after \d+ steps(.*)", said) == [
            (stage, " in 2 processes" if launch else "") for stage in ("stage0", "stage2")
        ]
        lines = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        found = [(line["phase"], line["step"], line["losses/bc_loss"]) for line in lines if "losses/bc_loss" in line]
        losses[name] = {(phase, step): loss for phase, step, loss in found}
    alone, together = losses["alone"], losses["together"]
    assert set(alone) == {(phase, step) for phase in ("stage0", "task0-round0-stage2") for step in (0, 20)}
    assert together == pytest.approx(alone, rel=1e-3)
    results = [json.loads((tmp_path / name / "results.json").read_text()) for name in losses]
    assert results[0].keys() == results[1].keys() >= {"task0-round0-after-stage2"}
