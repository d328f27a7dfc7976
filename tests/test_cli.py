import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import imageio.v3 as imageio
import numpy as np
import pytest
from tiny import tiny_policy, toy_store

from vla_rl.cli import main
from vla_rl.data import EpisodeStore
from vla_rl.presets import PRESETS
from vla_rl.trainer import IterativeTrainer

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


COMMANDS = ("demo", "collect", "train", "sft", "eval", "report", "compare", "data", "estimate", "doctor")
DATA_TOOLS = (
    "info", "ls", "stats", "verify", "repair", "merge", "split", "filter", "relabel", "sample", "pack", "play",
)  # fmt: skip


def help_of(capsys, monkeypatch, *args):
    """What `--help` prints on a terminal of 80 columns."""
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as end:
        main([*args, "--help"])
    assert end.value.code == 0
    return capsys.readouterr().out


def test_help_names_every_command(capsys, monkeypatch):
    lines = [line.split() for line in help_of(capsys, monkeypatch).splitlines()]
    assert set(COMMANDS) <= {words[0] for words in lines if words}


@pytest.mark.parametrize(
    "args",
    [
        (), *((name,) for name in COMMANDS), ("train", "--resume"), *(("train", name) for name in PRESETS),
        *(("data", name) for name in (*DATA_TOOLS, "re-encode")),
        *(("data", "export", name) for name in ("minari", "robomimic", "lerobot")),
        *(("data", "import", name) for name in ("minari", "robomimic", "lerobot", "roboset", "rlds")),
    ],
    ids=" ".join,
)  # fmt: skip
def test_help_fits_one_screen_and_shows_an_example(capsys, monkeypatch, args):
    text = help_of(capsys, monkeypatch, *args)
    assert sum(max(1, -(-len(line.rstrip()) // 80)) for line in text.splitlines()) <= 40
    name = " ".join(args).removesuffix(" --resume")
    assert re.search(rf"(?i)^examples?: *\s{re.escape(f'vla-rl {name}'.strip())}", text, re.MULTILINE)


def test_the_short_help_shows_the_presets_own_values_and_the_long_one_everything(capsys, monkeypatch):
    short = " ".join(help_of(capsys, monkeypatch, "train", "toy").split())
    assert "env steps per RL task, in whole rollouts [16384]" in short and "ire-vla, ire-vla-sacfd" in short
    with pytest.raises(SystemExit):
        main(["train", "toy", "--help-all"])
    long = capsys.readouterr().out
    for option in ("--train.sacfd.tau", "--env.horizon", "--dry-run", "--guards.worker-timeout"):
        assert option in long
    named = [word for word in short.split() if word.startswith("--") and word != "--help-all"]
    assert len(named) > 12 and all(option in long for option in named), "no option that does not exist"


def test_python_m_is_the_command():
    for module in ("vla_rl", "vla_rl.cli"):
        command = [sys.executable, "-m", module, "data", "info", "nowhere"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert done.returncode == 1 and done.stderr.startswith("vla-rl: ") and "no episode store" in done.stderr


def completion(shell, capsys):
    """The script that `vla-rl --tyro-print-completion SHELL` prints."""
    with pytest.raises(SystemExit) as end:
        main(["--tyro-print-completion", shell])
    assert end.value.code == 0
    return capsys.readouterr().out


COMPLETED = {
    "vla-rl ": set(COMMANDS) | {"-h", "--help"},
    "vla-rl da": {"data"},
    "vla-rl data re": {"relabel", "repair", "re-encode"},
    "vla-rl data import ro": {"robomimic", "roboset"},
    "vla-rl train metaworld-": {name for name in PRESETS if name.startswith("metaworld-")},
    "vla-rl train toy --method filt": {"filtered-bc"},
    "vla-rl train toy --train.stage1.ga": {"--train.stage1.gamma", "--train.stage1.gae-lambda"},
    "vla-rl report ru": {"runs"},
    "vla-rl compare runs/first runs/": {"runs/first", "runs/second"},
    "vla-rl train toy --workdir ru": {"runs"},
    "vla-rl report nowhere": set(),
}


def test_completion_in_bash(capsys, tmp_path):
    for name in ("first", "second"):
        (tmp_path / "runs" / name).mkdir(parents=True)
    (tmp_path / "completion").write_text(completion("bash", capsys))
    script = """
        source ./completion
        [[ $(complete -p vla-rl) == *"-o filenames -F "* ]] || exit 1
        function=$(complete -p vla-rl | sed 's/.* -F \\([^ ]*\\) .*/\\1/')
        while IFS= read -r line; do
            read -ra COMP_WORDS <<< "$line"
            [[ $line == *" " ]] && COMP_WORDS+=("")
            COMP_CWORD=$((${#COMP_WORDS[@]} - 1)) COMPREPLY=()
            $function vla-rl
            echo "${COMPREPLY[*]}"
        done
    """
    lines = "".join(f"{line}\n" for line in COMPLETED)
    done = subprocess.run(
        ["bash", "-c", script], input=lines, capture_output=True, text=True, cwd=tmp_path, timeout=120
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert dict(zip(COMPLETED, [set(line.split()) for line in done.stdout.split("\n")], strict=False)) == COMPLETED


def test_completion_in_zsh(capsys, tmp_path):
    """The same script in Python is in both; here zsh reads it and completes with stand-ins for its own helpers."""
    zsh = os.environ.get("VLA_RL_ZSH") or shutil.which("zsh")
    text = completion("zsh", capsys)
    assert text.startswith("#compdef vla-rl\n") and '-z "$completions" ||' in text
    if zsh is None:
        pytest.skip("no zsh")
    (tmp_path / "_vla-rl").write_text(text)
    script = """
        _files() { echo FILES }
        _describe() { local name=$2; print -rl -- ${${(P)name}%%:*} }
        words=("${(@s: :)1}") CURRENT=${#words}
        source ./_vla-rl
    """
    for line, wanted in COMPLETED.items():
        done = subprocess.run([zsh, "-f", "-c", script, "zsh", line], capture_output=True, text=True, cwd=tmp_path)
        assert (done.returncode, done.stderr) == (0, ""), line
        files = "ru" in line.split(" ")[-1] or "nowhere" in line
        assert set(done.stdout.split()) == ({"FILES"} if files else wanted), line


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["trian", "toy"], "there is no command 'trian'; did you mean 'train'?"),
        (["train", "tyo"], "there is no preset 'tyo'; did you mean 'toy'?"),
        (["data", "infoo", "x"], "there is no data tool 'infoo'; did you mean 'info'?"),
        (["data", "reencode"], "there is no data tool 'reencode'; did you mean 're-encode'?"),
        (["xyz"], f"there is no command 'xyz'; choose one of {', '.join(COMMANDS)}"),
    ],
)
def test_misspelt_words_get_the_nearest_one(capsys, args, said):
    assert main(args) == 2
    assert capsys.readouterr().err == f"vla-rl: {said}\n"


def test_misspelt_options_get_the_nearest_one(capsys):
    with pytest.raises(SystemExit) as end:
        main(["train", "toy", "--trian.seed", "1"])
    captured = capsys.readouterr()
    assert end.value.code == 2 and "--train.seed" in captured.out + captured.err


def test_a_dry_run_shows_everything_and_writes_nothing(tmp_path, capsys):
    args = ["train", "toy", "--workdir", tmp_path / "run", *options(), "--train.stage1.gamma", "0.5", "--dry-run"]
    assert main(list(map(str, args))) == 0
    out = capsys.readouterr().out
    assert "gamma=0.5" in out and "12 expert episodes" in out and "512 env steps in stage 1" in out
    assert list(tmp_path.iterdir()) == []
    error = fails(capsys, *args, "--expert-tasks", "reach-rad")
    assert "'reach-rad'" in error and "reach-red" in error


def test_a_misspelt_expert_task_ends_nothing_later(tmp_path, capsys):
    """With demonstrations at hand no env of it would be made before the evaluation after stage 0."""
    store = toy_store(tmp_path / "store", ("reach-red",), episodes=3)
    args = ["train", "toy", "--workdir", tmp_path / "run", *options(), "--expert-data", store]
    assert "'reach-rad'" in fails(capsys, *args, "--expert-tasks", "reach-red", "reach-rad")
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


def test_a_dry_run_of_supervised_learning(checkpoint, tmp_path, capsys):
    store = toy_store(tmp_path / "store", ("reach-red",), episodes=3)
    with EpisodeStore(store, mode="r") as opened:
        steps = opened.total_steps
    args = ["sft", checkpoint, "--data", store, store, "--out", tmp_path / "out", "--sl.steps", 30, "--dry-run"]
    assert main(list(map(str, [*args, "--sl.batch-size", 16]))) == 0
    out = capsys.readouterr().out
    assert f"6 episodes with {2 * steps} steps" in out and "batch-size=16" in out
    assert f"30 gradient steps, 480 samples: {480 / (2 * steps):.1f} passes" in out
    assert "no episode store" in fails(capsys, *args[:3], tmp_path / "none", *args[5:])
    assert "policy.json" in fails(capsys, "sft", store, *args[2:])
    assert "runs/firts/stage0 holds no policy.json" in fails(capsys, "sft", "runs/firts/stage0", *args[2:])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["store"]
    (tmp_path / "out").mkdir()
    assert "give a new directory" in fails(capsys, *args)


@pytest.mark.simulator
def test_a_dry_run_of_the_demo(tmp_path, capsys):
    assert main(["demo", "--quick", "--dry-run", "--workdir", str(tmp_path / "run")]) == 0
    out = capsys.readouterr().out
    assert "6,144 env steps in stage 1" in out and "24 expert episodes to collect" in out and "minutes or less" in out
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_was_killed_while_it_collected_is_resumed(tmp_path, capsys, monkeypatch):
    args = ["train", "toy", "--workdir", tmp_path / "run", *options(), "--train.num-workers", 0, "--method", "sft"]
    args += ["--expert-tasks", "reach-red", "--unseen-tasks", "reach-blue"]

    def killed(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("vla_rl.experiment.new_policy", killed)
        with pytest.raises(KeyboardInterrupt):
            main(list(map(str, args)))
    assert "train --resume" in fails(capsys, *args)
    assert main(["train", "--resume", str(tmp_path / "run")]) == 0
    assert "it begins anew" in capsys.readouterr().out
    with EpisodeStore(tmp_path / "run" / "expert_data", mode="r") as store:
        assert sorted(info.seed for info in store.index) == list(range(6)), "no episode twice"
    page = (tmp_path / "run" / "report.html").read_text()
    assert "expert tasks" in page and "vla-rl" in page
    assert "has finished" in fails(capsys, "train", "--resume", tmp_path / "run")


@pytest.mark.slow
def test_a_run_that_was_killed_in_stage_2_goes_on_from_there(toy_run, tmp_path, capsys, monkeypatch):
    args = ["train", "toy", "--workdir", tmp_path / "run", *options(), "--train.num-workers", 0]
    args += ["--train.no-stop-at-zero", "--train.stage1.gamma", "0.9"]

    def killed(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(IterativeTrainer, "_stage2", killed)
        with pytest.raises(KeyboardInterrupt):
            main(list(map(str, args)))
    head = tmp_path / "run" / "checkpoints" / "stage0" / "head.safetensors"
    before = head.stat().st_mtime_ns
    assert main(["train", "--resume", str(tmp_path / "run")]) == 0
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    reference = json.loads((toy_run[0] / "results.json").read_text())
    assert results.keys() - {"guards"} == reference.keys() - {"guards"}
    assert head.stat().st_mtime_ns == before, "stage 0 is not repeated"
    assert json.loads((tmp_path / "run" / "config.json").read_text())["stage1"]["gamma"] == 0.9
    seconds = results["seconds"]
    assert {"collect", "stage0", "task0-round0-stage2"} <= seconds.keys()
    assert sum(value for name, value in seconds.items() if name != "total") <= seconds["total"] + 1e-6


def test_nothing_to_resume(tmp_path, capsys):
    error = fails(capsys, "train", "--resume", tmp_path)
    assert str(tmp_path) in error and "experiment.json" in error


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
    out = tmp_path / "results" / "here.json"
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


def test_collecting_onto_a_disk_that_fills_up_stops_and_keeps_what_is_there(tmp_path, capsys, monkeypatch):
    answers = iter([10**12] * 3)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=next(answers, 0)))
    args = ["--out", tmp_path / "store", "--tasks", "reach-red", "--episodes", 6, "--num-workers", 0, *TOY]
    error = fails(capsys, "collect", *args)
    assert "the disk has 0.0 MB left; free some space" in error and "keeps its 3 episodes" in error
    with EpisodeStore(tmp_path / "store", mode="r") as store:
        assert [episode.success for episode in store] == [True] * 3


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


def test_a_hub_that_does_not_answer_is_one_sentence(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    error = fails(capsys, "estimate", "--model", "nobody/has-this")
    assert "nobody/has-this" in error or "huggingface.co" in error.split("Check your")[0]


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
