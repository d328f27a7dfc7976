"""The script for Franka Kitchen on the real simulator."""

import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
from scripts import CLEANRL_LOSSES, EXAMPLES, SMALL_HEAD, SMALL_PPO, run_script, scalars

pytestmark = [pytest.mark.slow, pytest.mark.simulator]


def test_128_steps_of_the_whole_loop_in_the_kitchen(tmp_path, monkeypatch):
    env = "--env-id vla_rl_envs:VLA/FrankaKitchen-v0"
    collect = [sys.executable, EXAMPLES / "collect_demos.py", "--out", "demos", *env.split(), "--episodes", "1"]
    subprocess.run([*collect, "--tasks", "slide-door-open", "--noise", "0.05"], cwd=tmp_path, check=True)
    options = (
        f"--demos demos --horizon 24 --eval-episodes 1 --stage0.steps 2 --stage0.batch-size 8 --stage2.steps 2 "
        f"--stage2.batch-size 8 --lora-rank 2 {SMALL_PPO} --num-envs 2 --num-steps 64 --critic-warmup-iterations 0 "
        f"{SMALL_HEAD} --vlm tiny --save-model"
    )
    run = run_script(monkeypatch, tmp_path, "ire_vla_franka_kitchen.py", options)
    tags = scalars(tmp_path, run)
    assert {tag.removeprefix("losses/") for tag in tags if tag.startswith("losses/")} == CLEANRL_LOSSES | {"bc_loss"}
    assert run["global_step"] >= 128 and len(tags["eval/unseen_success_rate"]) == 3
    assert run["args"].rl_tasks == ("slide-door-open:red",)
    assert run["instructions"][run["obs"]["task_id"][0]] == "slide the cabinet door open"
    assert Path("runs", run["run_name"], "model", "policy.json").is_file()

    frames = run["next_obs"]["image"]  # what stage 1 trains on
    with h5py.File(tmp_path / "demos" / "data" / "main_data.hdf5") as file:
        shown = file["episode_0/observations/image"][()]
    assert frames.shape[1:] == shown.shape[1:] == (128, 128, 3) and frames.dtype == shown.dtype == np.uint8
    for picture in (*frames, shown[0]):
        assert picture.std() > 20 and 40 < picture.mean() < 220  # a scene with light and shadow
    red = [int(((p[..., 0] > 110) & (p[..., 1:].max(-1) < 70)).sum()) for p in (frames[0], shown[0])]
    assert red[0] > 100 > red[1]  # the RL task's door is red, that of the demonstrations is not
