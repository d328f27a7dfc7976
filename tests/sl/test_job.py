"""A supervised stage as a job: here, in another process, and in two that torchrun starts."""

import copy
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from tiny import differing, parameters, tiny_policy
from trainers import CONFIG as CONFIG_OF_A_RUN
from trainers import files, saved

from vla_rl.cli import main
from vla_rl.config import with_method
from vla_rl.data import EpisodeStore, compute_statistics
from vla_rl.encoders import LoRASettings
from vla_rl.policy import VLAPolicy
from vla_rl.sl import job as jobs
from vla_rl.sl import launch as launching
from vla_rl.sl.job import SupervisedJob, run_job
from vla_rl.sl.launch import launcher, supervise
from vla_rl.sl.supervised import SLConfig, SupervisedError

CONFIG = SLConfig(steps=4, batch_size=15, scope="lora")


@pytest.fixture(scope="module")
def store(expert_path):
    with EpisodeStore(expert_path, mode="r") as store:
        yield store


@pytest.fixture
def policy(store):
    policy = tiny_policy(statistics=compute_statistics([store]))
    policy.encoder.image_size = (32, 32)
    torch.manual_seed(0)
    policy.encoder.add_lora(LoRASettings(r=4, alpha=8))
    return policy


@pytest.fixture
def started(monkeypatch):
    """The processes that a test starts; torch keeps to one thread in them."""
    started = []

    class Recorded(subprocess.Popen):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            started.append(self)

    monkeypatch.setattr(subprocess, "Popen", Recorded)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return started


@pytest.mark.slow
def test_torchrun_gives_what_this_process_gives(policy, store, tmp_path, started):
    before, steps = parameters(policy), {"here": [], "there": []}
    settings = {"config": CONFIG, "seed": 3, "data_seed": 4, "task_weights": {"reach-red": 3.0}}
    trained = copy.deepcopy(policy)
    loss, number = supervise(
        trained,
        [store],
        **settings,
        launch="torchrun --standalone --nproc-per-node 2",
        folder=tmp_path / "job",
        on_step=lambda *step: steps["there"].append(step),
    )
    assert number == 2 and not (tmp_path / "job").exists()
    here_loss, one = supervise(
        policy, [store], **settings, folder=tmp_path / "none", on_step=lambda *step: steps["here"].append(step)
    )
    assert one == 1 and not (tmp_path / "none").exists()
    assert [step for step, _ in steps["there"]] == [0, 1, 2, 3]
    assert [loss for _, loss in steps["there"]] == pytest.approx([loss for _, loss in steps["here"]], rel=1e-4)
    assert loss == pytest.approx(here_loss, rel=1e-4)
    changed = differing(before, parameters(trained))
    assert changed == differing(before, parameters(policy)) and any("lora_B" in name for name in changed)
    for name, value in parameters(policy).items():
        torch.testing.assert_close(parameters(trained)[name], value, rtol=0, atol=2e-4, msg=name)


@pytest.mark.slow
def test_a_run_whose_supervised_stages_are_launched_gives_the_same_numbers(make_trainer, tmp_path, started):
    """One other process: bit-equal, as on its own."""
    expected = make_trainer("here").run()
    assert make_trainer("there", launch=f"{sys.executable} -B").run() == expected
    assert len(started) == 2
    assert not any((tmp_path / "there" / "jobs").iterdir())
    here, there = saved(tmp_path / "here"), saved(tmp_path / "there")
    assert here.keys() == there.keys()
    for name, weights in here.items():
        assert not differing(weights, there[name]), name


class StopError(Exception):
    pass


@pytest.mark.slow
@pytest.mark.parametrize("how", ["stopped", "killed"])
def test_a_job_that_is_broken_off_leaves_the_policy_as_it_was(policy, store, tmp_path, started, how):
    before = parameters(policy)
    contents = []

    def on_step(step, loss):
        contents.append(files(tmp_path / "job" / "start"))
        if how == "stopped":
            raise StopError
        os.kill(started[0].pid, signal.SIGKILL)

    config = SLConfig(steps=100_000, batch_size=15, scope="lora")
    expected = StopError if how == "stopped" else SupervisedError
    with pytest.raises(expected) as error:
        supervise(policy, [store], config=config, launch=sys.executable, folder=tmp_path / "job", on_step=on_step)
    assert how == "stopped" or "exit code -9 and no policy" in str(error.value)
    assert started[0].poll() is not None
    assert not (tmp_path / "job" / "trained").exists()
    assert files(tmp_path / "job" / "start") == contents[0]
    assert not differing(before, parameters(VLAPolicy.from_pretrained(tmp_path / "job" / "start")))
    assert not differing(before, parameters(policy))


@pytest.mark.slow
def test_a_run_goes_on_within_a_supervised_stage(make_trainer, monkeypatch, tmp_path):
    config = with_method(CONFIG_OF_A_RUN, "sft")
    config = replace(config, stage0=replace(config.stage0, snapshot_every=2))
    expected = make_trainer("whole", config=config).run()
    original, steps = launching.train_supervised, []

    def broken_off(*args, on_step, **kwargs):
        def stop(step, loss):
            steps.append(step)
            on_step(step, loss)
            if len(steps) == 5:
                raise StopError

        return original(*args, on_step=stop, **kwargs)

    monkeypatch.setattr(launching, "train_supervised", broken_off)
    with pytest.raises(StopError):
        make_trainer("cut", config=config).run()
    assert make_trainer("cut", config=config, resume=True).run() == expected
    assert steps == [0, 1, 2, 3, 4, 4, 5]
    whole, cut = saved(tmp_path / "whole"), saved(tmp_path / "cut")
    assert not differing(whole["stage0"], cut["stage0"])
    assert not any((tmp_path / "cut" / "jobs").iterdir())


def test_a_job_whose_folder_was_given_to_another_ends(tmp_path, monkeypatch):
    def run(job, *, on_step, processes):
        on_step(0, 0.5)
        launching._renew(tmp_path / "job", keep=job.snapshot_folder)
        (tmp_path / "job" / "steps.jsonl").touch()  # the other's
        on_step(1, 0.5)

    monkeypatch.setattr(jobs, "run_job", run)
    (tmp_path / "job").mkdir()
    SupervisedJob("policy", [], "out").write(tmp_path / "job" / "job.json")
    with pytest.raises(SupervisedError, match="given to another job, so this one ends"):
        jobs.main(tmp_path / "job")
    assert (tmp_path / "job" / "steps.jsonl").read_text() == ""


def test_a_folder_is_removed_whole_or_not_at_all(tmp_path, monkeypatch):
    folder = tmp_path / ".trained.steps"
    (folder / "step0000006").mkdir(parents=True)

    def killed(path, **_):
        if os.path.exists(path):
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(jobs.shutil, "rmtree", killed)
        jobs.discard(folder)
    assert not folder.exists() and any(tmp_path.iterdir())
    jobs.discard(folder)
    assert not any(tmp_path.iterdir())


def test_only_snapshots_outlive_a_killed_stage(tmp_path):
    job = SupervisedJob("policy", [], str(tmp_path / "job" / "trained"), replace(CONFIG, snapshot_every=3))
    (tmp_path / "job" / ".trained.steps" / "step0000003").mkdir(parents=True)
    (tmp_path / "job" / "start").mkdir()
    launching._renew(tmp_path / "job", keep=job.snapshot_folder)
    assert [path.relative_to(tmp_path).as_posix() for path in sorted(tmp_path.rglob("*"))] == [
        "job",
        "job/.trained.steps",
        "job/.trained.steps/step0000003",
    ]


def test_a_job_survives_its_file(tmp_path):
    job = SupervisedJob("a", ["b", "c"], "d", CONFIG, seed=1, task_weights={"x": 0.1}, lora=LoRASettings(r=3, alpha=6))
    job.write(tmp_path / "job.json")
    assert SupervisedJob.read(tmp_path / "job.json") == job


def test_a_job_that_fails_writes_no_policy(policy, store, tmp_path):
    with torch.no_grad():
        policy.head.mean.bias[0] = float("nan")
    policy.save_pretrained(tmp_path / "start")
    before = files(tmp_path)
    job = SupervisedJob(str(tmp_path / "start"), [str(store.path)], str(tmp_path / "out"), CONFIG)
    with pytest.raises(SupervisedError, match="loss is nan at step 0"):
        run_job(job)
    assert files(tmp_path) == before


def test_a_job_whose_last_step_spoils_the_weights_writes_no_policy(policy, store, tmp_path):
    policy.save_pretrained(tmp_path / "start")
    before = files(tmp_path)
    config = replace(CONFIG, steps=1, learning_rate=1e38, weight_decay=1e38)
    with pytest.raises(SupervisedError, match="trained weights are NaN or infinite after step 0, and nothing is saved"):
        run_job(SupervisedJob(str(tmp_path / "start"), [str(store.path)], str(tmp_path / "out"), config))
    assert files(tmp_path) == before


def test_a_job_overwrites_nothing(policy, store, tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(FileExistsError, match="give a new directory"):
        run_job(SupervisedJob("no policy", [], str(tmp_path / "out")))
    with pytest.raises(FileNotFoundError, match=re.escape(f"{tmp_path / 'nowhere'} does not exist")):
        run_job(SupervisedJob("no policy", [], str(tmp_path / "nowhere" / "out")))


def test_the_error_in_a_long_log_is_found(tmp_path):
    log = tmp_path / "log.txt"
    log.write_text(
        "W1121 something\n[rank0]: Traceback (most recent call last):\n"
        "[rank0]: vla_rl.SupervisedError: the loss is nan\n"
        "torch.distributed.elastic.multiprocessing.errors.ChildFailedError: \n=====\nexitcode: 1\n"
    )
    assert launching._last_error(log) == "vla_rl.SupervisedError: the loss is nan"


@pytest.mark.parametrize("launch", ["", "no-such-launcher --nproc 2"])
def test_a_launcher_that_is_not_installed_is_refused_before_anything_is_done(make_trainer, tmp_path, launch):
    with pytest.raises(FileNotFoundError, match="names no program that is installed"):
        make_trainer(launch=launch)
    assert not (tmp_path / "run").exists()


def test_a_trainer_that_was_started_several_times_is_refused(make_trainer, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(ValueError, match=r"started this 4 times.*hand the supervised stages to the launcher"):
        make_trainer()
    assert not (tmp_path / "run").exists()


def test_a_launcher_is_found_beside_the_interpreter(monkeypatch):
    monkeypatch.setenv("PATH", "")
    program, *words = launcher("torchrun --nproc-per-node 2")
    assert os.path.dirname(program) == os.path.dirname(sys.executable) and words == ["--nproc-per-node", "2"]


def test_sft_from_the_command_line(store, tmp_path, capsys):
    tiny_policy(statistics=compute_statistics([store])).save_pretrained(tmp_path / "start")
    words = ["sft", tmp_path / "start", "--data", store.path, "--out", tmp_path / "out", "--lora-rank", 2]
    words += ["--sl.steps", 3, "--sl.batch-size", 8]
    assert main([str(word) for word in words]) == 0
    assert re.search(r"loss \d\.\d{4} after 3 steps; policy: .*out", capsys.readouterr().out)
    trained = VLAPolicy.from_pretrained(tmp_path / "out")
    assert trained.encoder.lora == LoRASettings(r=2, alpha=4)
    assert json.loads((tmp_path / "out" / "policy.json").read_text())["head"]
    assert main([str(word) for word in words]) == 1
    assert "give a new directory" in capsys.readouterr().err


def test_snapshots_are_of_the_data_wherever_it_lies(policy, store, tmp_path):
    """As many rows under other instructions would go through otherwise."""
    job = SupervisedJob(policy="start", data=[str(store.path)], out=str(tmp_path / "out"), config=CONFIG)
    shutil.copytree(store.path, tmp_path / "same")
    with EpisodeStore(tmp_path / "told", mode="w-") as told:
        for number in range(len(store)):
            told.append(replace(store[number], instruction=f"please {store[number].instruction}"))
    with EpisodeStore(tmp_path / "same", mode="r") as same, EpisodeStore(tmp_path / "told", mode="r") as told:
        first, second, third = (job.snapshots(policy, [each]).of for each in (store, same, told))
    assert first == second and first | {"data": third["data"]} == third != first
