import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from tiny import HEAD, DropoutHead, differing, tiny_encoder, tiny_policy
from trainers import CONFIG, files, saved, trainers_in

from vla_rl import trainer as trainer_module
from vla_rl.config import with_method
from vla_rl.data import EpisodeStore
from vla_rl.encoders import LoRASettings
from vla_rl.guards import GuardConfig
from vla_rl.policy import VLAPolicy
from vla_rl.preemption import PreemptedError
from vla_rl.rl import stage1
from vla_rl.rundir import RunDirectory, RunDirectoryError


class InterruptedRunError(Exception):
    pass


def with_dropout(*, seed=0, **head):
    encoder = tiny_encoder(seed=seed)
    torch.manual_seed(seed)
    return VLAPolicy(encoder, DropoutHead(encoder.feature_dim, 2, state_dim=2, **HEAD, **head))


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory, expert_path):
    """Directory and results of a run that was never stopped, one for each maker of policies."""
    runs = {}

    def whole(make_policy=tiny_policy):
        if make_policy not in runs:
            folder = tmp_path_factory.mktemp("whole")
            with contextlib.contextmanager(trainers_in)(folder, expert_path) as make:
                results = make("run", policy=make_policy(init_std=1.0)).run()
            runs[make_policy] = folder / "run", results
        return runs[make_policy]

    return whole


@pytest.mark.parametrize(
    ("phase", "call", "make_policy"),
    [
        ("stage0", 1, tiny_policy),
        ("after-stage0", 2, tiny_policy),
        ("task0-round0-stage1", 2, tiny_policy),
        ("task0-round0-stage2", 1, tiny_policy),
        ("task0-round0-stage2", 1, with_dropout),
        ("task0-round0-after-stage2", 1, tiny_policy),
    ],
)
def test_a_resumed_run_has_the_numbers_of_one_that_was_never_stopped(
    make_trainer, whole_run, monkeypatch, tmp_path, phase, call, make_policy
):
    whole, expected = whole_run(make_policy)
    assert expected["task0-round0-stage1"]["stored_successes"] > 0
    calls = 0
    original = RunDirectory.log

    def interrupt(self, metrics, **kwargs):
        nonlocal calls
        original(self, metrics, **kwargs)
        calls += kwargs["phase"] == phase
        if calls == call:
            raise InterruptedRunError

    with monkeypatch.context() as patch:
        patch.setattr(RunDirectory, "log", interrupt)
        with pytest.raises(InterruptedRunError):
            make_trainer("stopped", policy=make_policy(init_std=1.0)).run()
    done = json.loads((tmp_path / "stopped" / "state.json").read_text())["done"]
    torch.manual_seed(99)
    # The policy given on resuming is only used where no checkpoint had been written.
    policy = make_policy(seed=0 if "stage0" not in done else 5, init_std=1.0)
    resumed = make_trainer("stopped", policy=policy, resume=True)
    results = resumed.run()
    assert results == expected
    weights, again = saved(whole), saved(tmp_path / "stopped")
    assert weights.keys() == again.keys()
    for name, tensors in weights.items():
        assert not differing(tensors, again[name]), name
    runs = [RunDirectory(path, resume=True).metrics() for path in (whole, tmp_path / "stopped")]
    keys = ("phase", "step", "losses/bc_loss", "losses/value_loss")
    first, second = ([[entry.get(key) for key in keys] for entry in run] for run in runs)
    assert first == second


@pytest.mark.parametrize(("owner", "method"), [(VLAPolicy, "save_pretrained"), (EpisodeStore, "append")])
def test_half_a_checkpoint_and_half_a_store_are_written_again(
    make_trainer, whole_run, monkeypatch, tmp_path, owner, method
):
    """Killed after the second write of its kind: the stage 1 is done, but its files are not."""
    _, expected = whole_run()
    calls = 0
    original = getattr(owner, method)

    def interrupt(self, *args, **kwargs):
        nonlocal calls
        original(self, *args, **kwargs)
        calls += 1
        if calls == 2:
            raise InterruptedRunError

    with monkeypatch.context() as patch:
        patch.setattr(owner, method, interrupt)
        with pytest.raises(InterruptedRunError):
            make_trainer("stopped").run()
    state = json.loads((tmp_path / "stopped" / "state.json").read_text())
    assert (state["done"], state["checkpoint"]) == (["stage0", "eval-stage0"], "checkpoints/stage0")
    left = tmp_path / "stopped" / ("checkpoints" if owner is VLAPolicy else "rl_data")
    assert any("task0-round0" in path.name for path in left.iterdir())
    assert make_trainer("stopped", resume=True).run() == expected
    with EpisodeStore(tmp_path / "stopped" / "rl_data" / "task0-round0", mode="r") as store:
        assert len(store) == expected["task0-round0-stage1"]["stored_successes"]


def test_sigterm_ends_the_run_in_order_and_it_goes_on_with_the_same_numbers(
    make_trainer, whole_run, monkeypatch, tmp_path
):
    _, expected = whole_run()
    original = RunDirectory.log

    def preempted(self, metrics, **kwargs):
        original(self, metrics, **kwargs)
        if kwargs["phase"] == "after-stage0":
            os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        patch.setattr(RunDirectory, "log", preempted)
        with pytest.raises(PreemptedError) as stopped:
            make_trainer("stopped").run()
    assert stopped.value.code == 143
    assert signal.getsignal(signal.SIGTERM) == before
    state = json.loads((tmp_path / "stopped" / "state.json").read_text())
    assert state["stopped"] == "eval-stage0" and state["done"] == ["stage0"]
    assert make_trainer("stopped", resume=True).run() == expected
    assert "stopped" not in json.loads((tmp_path / "stopped" / "state.json").read_text())


def test_the_time_of_what_was_stopped_counts(make_trainer, monkeypatch, tmp_path):
    """Evaluation after stage 0 takes 100 s before it is interrupted, and 10 s the second time; the clock is ours."""
    now, takes = [0.0], [100.0, 10.0]
    original = trainer_module.IterativeTrainer._evaluate

    def evaluate(self, label, **more):
        original(self, label, **more)
        now[0] += takes.pop(0) if label == "after-stage0" else 1.0
        if takes:
            raise InterruptedRunError

    monkeypatch.setattr("vla_rl.rundir.time.perf_counter", lambda: now[0])
    monkeypatch.setattr(trainer_module.IterativeTrainer, "_evaluate", evaluate)
    with pytest.raises(InterruptedRunError):
        make_trainer("stopped").run()
    resumed = make_trainer("stopped", resume=True)
    resumed.run()
    seconds = resumed.run_dir.seconds
    assert (seconds["eval-stage0"], seconds["task0-round0-eval2"]) == (110.0, 1.0)


@pytest.mark.parametrize(
    ("at", "method"), [("stage1", "ire-vla"), ("stage1", "ppo"), ("store", "ire-vla"), ("checkpoint", "ire-vla")]
)
def test_sigterm_in_a_stage_1_loses_no_finished_update(make_trainer, whole_run, monkeypatch, tmp_path, at, method):
    """In its first update, while its successes are written, and while its checkpoint is: it may be finished then."""
    config = with_method(CONFIG, method)
    owner, name = {
        "stage1": (RunDirectory, "log"),
        "store": (EpisodeStore, "append"),
        "checkpoint": (RunDirectory, "save_checkpoint"),
    }[at]
    original = getattr(owner, name)

    def preempted(self, *args, **kwargs):
        result = original(self, *args, **kwargs)
        if at == "store" or "task0-round0-stage1" in (*args, kwargs.get("phase")):
            os.kill(os.getpid(), signal.SIGTERM)
        return result

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, preempted)
        with pytest.raises(PreemptedError):
            make_trainer("run", config=config).run()
    state = json.loads((tmp_path / "run" / "state.json").read_text())
    jobs = tmp_path / "run" / "jobs" / "task0-round0-stage1"
    assert state["stopped"] == "task0-round0-stage1"
    if at != "stage1":  # put off until all was written
        assert state["done"][-1] == "task0-round0-stage1" and not jobs.exists()
        assert make_trainer("run", resume=True).run() == whole_run()[1]
        return
    assert state["done"] == ["stage0", "eval-stage0"] and len(list(jobs.glob("step*"))) == 1
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    results = [make_trainer(folder, config=config, resume=True).run() for folder in ("run", "copy")]
    assert results[0] == results[1] and not jobs.exists()
    (note,) = (entry for entry in results[0]["guards"] if entry["guard"] == "preempted")
    assert note["phase"] == "task0-round0-stage1" and "goes on after 1" in note["message"]
    steps = [e["step"] for e in RunDirectory(tmp_path / "run", resume=True).metrics() if e["phase"] == jobs.name]
    assert steps == sorted(set(steps)) and steps[-1] == results[0]["task0-round0-stage1"]["num_env_steps"] >= 500
    one, other = saved(tmp_path / "run"), saved(tmp_path / "copy")
    assert one.keys() == other.keys() and not any(differing(one[name], other[name]) for name in one)


def damage(workdir, checkpoint):
    path = workdir / "checkpoints" / checkpoint / "head.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_a_damaged_checkpoint_is_passed_over_with_a_warning(make_trainer, whole_run, tmp_path):
    whole, expected = whole_run()
    shutil.copytree(whole, tmp_path / "run")
    before = json.loads((tmp_path / "run" / "state.json").read_text())
    damage(tmp_path / "run", "task0-round0-stage2")
    with pytest.warns(
        UserWarning, match=r"stage2 is damaged \(head.safetensors has other content.*stage1, and 2 finis"
    ):
        trainer = make_trainer(resume=True)
    assert trainer.run_dir.state["done"][-1] == "task0-round0-eval1"
    assert trainer.run() == expected
    after = json.loads((tmp_path / "run" / "state.json").read_text())
    assert (after["done"], after["after"]) == (before["done"], before["after"])
    heads = [state["files"]["checkpoints/task0-round0-stage2"]["head.safetensors"] for state in (before, after)]
    assert heads[0] == heads[1]


def test_where_no_checkpoint_is_left_a_run_begins_again(make_trainer, tmp_path):
    config = with_method(CONFIG, "sft")
    expected = make_trainer(config=config).run()
    (tmp_path / "run" / "checkpoints" / "stage0" / "policy.json").unlink()
    with pytest.raises(RunDirectoryError, match="begun with policy="), pytest.warns(UserWarning, match="the beginning"):
        make_trainer(config=config, resume=True, policy=tiny_policy(seed=5, init_std=1.0))
    resumed = make_trainer(config=config, resume=True)
    assert resumed.run_dir.state["done"] == []
    assert resumed.run() == expected


@pytest.mark.parametrize("rollback_after", [2, 0])
def test_only_the_newest_checkpoints_and_the_best_are_kept(make_trainer, monkeypatch, tmp_path, rollback_after):
    nothing = stage1.Stage1Result([], 0, 0, 0, False, 0.0, 0.0)
    monkeypatch.setattr(trainer_module, "run_ppo", lambda *args, **kwargs: nothing)
    config = replace(CONFIG, rounds=2, eval_episodes=1, rl_eval_episodes=1)
    trainer = make_trainer(config=config, guards=GuardConfig(keep_checkpoints=2, rollback_after=rollback_after))
    trainer.run()
    left = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    # All evaluations being equal, the first is the best.
    assert left == ["stage0", "task0-round1-stage1", "task0-round1-stage2"]
    assert sorted(trainer.run_dir.state["files"]) == [f"checkpoints/{name}" for name in left]


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"config": replace(CONFIG, seed=1)}, "seed=0, now it is 1"),
        ({"config": replace(CONFIG, stage1=replace(CONFIG.stage1, gamma=0.9))}, "stage1.gamma=0.99, now it is 0.9"),
        ({"rl_tasks": ["reach-blue"]}, r"rl_tasks=\["),
        ({"eval_tasks": {"rl": ["reach-blue"]}}, "eval_tasks="),
        ({"lora": LoRASettings(r=3, alpha=4)}, "lora.r=2, now it is 3"),
        ({"policy": "other"}, "policy="),
    ],
)
def test_a_run_is_not_resumed_under_other_settings(make_trainer, tmp_path, changes, field):
    make_trainer()
    before = files(tmp_path / "run")
    if "policy" in changes:
        changes = {"policy": tiny_policy(seed=7, init_std=1.0)}
    with pytest.raises(RunDirectoryError, match=f"was begun with {field}"):
        make_trainer(resume=True, **changes)
    assert files(tmp_path / "run") == before


def test_what_changes_no_number_may_change_on_resuming(make_trainer):
    make_trainer()
    stage0 = replace(CONFIG.stage0, cache_dir="elsewhere")
    resumed = make_trainer(resume=True, config=replace(CONFIG, num_workers=1, video_episodes=0, stage0=stage0))
    assert resumed.config.num_workers == 1


@pytest.mark.slow
def test_the_run_does_not_depend_on_the_number_of_env_workers(make_trainer, whole_run, tmp_path):
    alone, expected = whole_run()
    config = replace(CONFIG, num_workers=3)
    assert make_trainer("workers", config=config).run() == expected
    workers = saved(tmp_path / "workers")
    for name, weights in saved(alone).items():
        assert not differing(weights, workers[name]), name


def test_resuming_a_finished_run_changes_nothing(make_trainer, tmp_path):
    config = with_method(CONFIG, "sft")
    results = make_trainer(config=config).run()
    before = files(tmp_path / "run" / "checkpoints")
    assert make_trainer(config=config, policy=tiny_policy(seed=9), resume=True).run() == results
    assert files(tmp_path / "run" / "checkpoints") == before


def test_there_must_be_a_run_to_resume(make_trainer):
    with pytest.raises(FileNotFoundError, match="holds no run to resume"):
        make_trainer("nothing", resume=True)


def test_a_run_that_another_process_works_on_is_left_alone(tmp_path):
    """What a live process is writing would be taken for what a killed one left."""
    run = RunDirectory(tmp_path / "run")
    half = run.fresh("checkpoints", ".stage0.tmp")
    half.mkdir()
    code = f"from vla_rl.rundir import RunDirectory; RunDirectory({str(run.path)!r}, resume=True).usable_checkpoint()"
    refused = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "BlockingIOError" in refused.stderr and "is being worked on by another process" in refused.stderr
    assert half.is_dir()
    run.close()
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0 and not half.exists()
