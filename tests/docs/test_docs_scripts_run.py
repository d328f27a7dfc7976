"""The commands on the pages of the single-file scripts run in the order of their page, with less to do."""

import json
import runpy
import shlex
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
from pages import DOCS, ROOT, commands
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

pytestmark = [pytest.mark.slow, pytest.mark.simulator]

PAGES = sorted(path.stem for path in (DOCS / "scripts").glob("*.md"))
PPO = (
    "--num-envs 4 --num-steps 8 --total-timesteps 64 --minibatch-size 16 --update-epochs 1 "
    "--critic-warmup-iterations 1 --eval-episodes 1"
)
THREE_STAGES = f"{PPO} --stage0.steps 2 --stage0.batch-size 8 --stage2.steps 2 --stage2.batch-size 8"
LESS = {
    "collect_demos.py": "--episodes 2",
    "sft_vlm.py": "--total-timesteps 2 --batch-size 8 --num-envs 2 --eval-episodes 2",
    "ppo_frozen_vlm.py": PPO,
    "ppo_full_vlm.py": PPO,
    "ppo_replay_vlm.py": f"{PPO} --replay.steps 2 --replay.batch-size 8",
    "filtered_bc_vlm.py": "--num-envs 4 --num-episodes 8 --sl.steps 2 --sl.batch-size 8 --eval-episodes 1",
    "sacfd_latent.py": "--num-envs 4 --num-steps 8 --total-timesteps 64 --num-demos 1 --learning-starts 32 "
    "--critic-warmup-updates 2 --batch-size 16 --buffer-size 1000 --eval-episodes 1",
    "ire_vla_metaworld.py": THREE_STAGES,
    "ire_vla_franka_kitchen.py": THREE_STAGES,
    "evaluate.py": "--eval-episodes 2 --num-envs 2",
    "launch.py": "--workers 1 --num-seeds 1",
}
"""Said after the page's own words: the last one counts."""

BEFORE = {
    "sft_vlm": {"demos/metaworld": "collect_demos"},
    "evaluate": {"runs/SFT_RUN": "sft_vlm"},
    "filtered_bc_vlm": {"runs/SFT_RUN": "sft_vlm", "demos/toy": "sft_vlm"},
    "index": {"runs/SFT_RUN": "sft_vlm"},
    "ppo_frozen_vlm": {"runs/SFT_RUN": "sft_vlm", "demos/red": "sft_vlm"},
    "ppo_full_vlm": {"runs/SFT_RUN": "sft_vlm"},
    "ppo_replay_vlm": {"runs/SFT_RUN": "sft_vlm", "demos/toy": "sft_vlm", "demos/metaworld": "collect_demos"},
    "sacfd_latent": {"runs/SFT_RUN": "sft_vlm"},
}
"""What a page takes over, and the page whose commands leave it."""


def shortened(words):
    """The words of a page, with those that make less to do."""
    script = Path(words[0]).name
    words = ["1" if word == "$seed" else word for word in words]  # the first round of a loop
    if "--command" in words:
        at = words.index("--command") + 1
        inner = shlex.split(words[at])
        words[at] = shlex.join([inner[0], *shortened(inner[1:])])
    words += LESS.get(script, "").split()
    if any(word.startswith("HuggingFaceTB/") for word in words):
        words += ["--vlm", "tiny"]
    simulator = "ire_vla" in script or any(word.startswith("vla_rl/") or "MetaWorld" in word for word in words)
    if simulator and script not in ("collect_demos.py", "filtered_bc_vlm.py"):  # these need a success
        words += ["--horizon", "5"]
    if not simulator and script in ("filtered_bc_vlm.py", "sacfd_latent.py"):  # so that some episodes succeed
        words += ["--init-std", "3"]
    return words


def run(folder, words):
    """Run a script in this process; its module-level names at the end."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "argv", shortened(words))
        patch.setenv("PATH", str(Path(sys.executable).parent), prepend=":")
        try:
            return runpy.run_path(words[0], run_name="__main__")
        except SystemExit as end:
            assert not end.code, words
            return {}


def check(folder, script, left):
    """What a command has to leave behind."""
    args = left.get("args")
    if script == "collect_demos.py":
        with h5py.File(folder / args.out / "data" / "main_data.hdf5") as file:
            assert {group.attrs["task"] for group in file.values()} == set(args.tasks)
    elif script == "evaluate.py":
        if args.out:
            told = json.loads((folder / args.out).read_text())["tasks"]
            assert {task: len(figures["success"]) for task, figures in told.items()} == dict.fromkeys(args.tasks, 2)
        if args.capture_video:
            videos = list((folder / "videos").rglob("*.mp4"))
            assert len(videos) >= len(args.tasks) and all(path.stat().st_size > 1000 for path in videos)
    elif script == "launch.py":
        logs = list((folder / "runs" / "launch").glob("*.log"))
        assert len(logs) == 2 and all(path.read_text().endswith("exit code 0\n") for path in logs)
    elif script == "curves.py":
        table = (folder / "runs" / "curves.md").read_text()
        assert all(f"VLA/Toy-v0 reach-{colour}:new | 1 |" in table for colour in ("red", "blue"))
        assert (folder / "runs" / "curves.png").stat().st_size > 1000
    else:
        events = EventAccumulator(str(folder / "runs" / left["run_name"]))
        events.Reload()
        last = {tag: events.Scalars(tag)[-1].value for tag in events.Tags()["scalars"]}
        last.pop("losses/explained_variance", None)  # undefined as long as nothing earns a reward
        losses = [value for tag, value in last.items() if tag.startswith("losses/")]
        assert losses and np.isfinite(losses).all()
        assert 0 <= last["eval/success_rate"] <= 1
        assert (folder / "runs" / left["run_name"] / "model" / "policy.json").is_file() == args.save_model


@pytest.fixture(scope="module")
def follow(tmp_path_factory):
    """Runs a page, once, in a folder of its own, after the pages on whose leavings it builds; gives the folder."""
    followed = {}

    def link(path, target):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        path.symlink_to(target)

    def follow(page):
        if page in followed:
            return followed[page]
        folder, ran = tmp_path_factory.mktemp(page), set()
        for path in ("examples", "benchmarks", "vla_rl/assets"):
            link(folder / path, ROOT / path)
        for path, other in BEFORE.get(page, {}).items():
            link(folder / path, follow(other) / path)
        for _, words in commands(DOCS / "scripts" / f"{page}.md"):
            if words[0] in ("for", "done"):
                continue
            assert words[0] == "python", words
            script, left = Path(words[1]).name, run(folder, words[1:])
            check(folder, script, left)
            ran.add(script)
            if script == "sft_vlm.py" and left["args"].save_model:
                name = "THAT_RUN" if (folder / "runs" / "SFT_RUN").exists() else "SFT_RUN"
                link(folder / "runs" / name, folder / "runs" / left["run_name"])
        assert ("launch.py" if page == "index" else f"{page}.py") in ran
        followed[page] = folder
        return folder

    return follow


@pytest.mark.parametrize("page", PAGES)
def test_the_commands_of_a_page(page, follow):
    follow(page)  # with its checks
