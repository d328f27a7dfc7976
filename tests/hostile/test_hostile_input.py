"""Whatever is wrong with a file or an env: a sentence that names it, in little memory, and nothing overwritten."""

import gc
import hashlib
import json
import shutil
import signal
import sys
import warnings
from functools import partial
from pathlib import Path

import numpy as np
import pytest

sys.path.append(str(Path(__file__).parent))
sys.path.append(str(Path(__file__).parents[1] / "data"))

import corpus
import corpus_settings
from episode_maker import assert_equal, make_episode
from faulty import Faulty
from resident import KNOWN, forget_peak, resident
from tiny import tiny_policy, toy_store

from vla_rl.config import IterativeConfig
from vla_rl.data import BalancedSampler, EpisodeStore
from vla_rl.data.verification import verify
from vla_rl.encoders import LoRASettings
from vla_rl.experiment import ExperimentConfig
from vla_rl.experiment_file import read_experiment, write_experiment
from vla_rl.policy import VLAPolicy
from vla_rl.presets import PRESETS
from vla_rl.resuming import refuse_other_run
from vla_rl.rundir import RunDirectory, RunDirectoryError, write_json
from vla_rl.runs import read_run
from vla_rl.sl.job import SupervisedJob
from vla_rl.sl.snapshots import Snapshots
from vla_rl.sl.supervised import SLConfig, train_supervised
from vla_rl.vector import EnvOutputError, WorkerVectorEnv

STORES, RUNS = dict(corpus.stores()), dict(corpus.runs())
CHECKPOINTS, POLICIES = dict(corpus.damaged_checkpoints()), dict(corpus.policies())
ADAPTED = dict(corpus.adapted_policies())
MAY_BE_ABSENT = ("tokenizer_config.json", "generation_config.json")
OUTPUTS = corpus.env_outputs()
EXPERIMENTS, JOBS = dict(corpus_settings.experiments()), dict(corpus_settings.jobs())
SNAPSHOTS = {name: (file, change) for name, file, change in corpus_settings.snapshots()}
SECONDS = 120  # before a case counts as hanging
SLACK = 16 << 20  # what reading and telling may take besides twice the file: Python's objects, modules loaded late


@pytest.fixture(scope="module", autouse=True)
def little_to_collect():
    """Each case looks for garbage twice, among its own objects instead of all that other tests have loaded."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def test_the_corpus_is_large():
    assert sum(map(len, (STORES, RUNS, CHECKPOINTS, POLICIES, ADAPTED, OUTPUTS, EXPERIMENTS, JOBS, SNAPSHOTS))) >= 500


def checksums(root):
    files = [path for path in sorted(root.rglob("*")) if path.is_file()]
    return {path.relative_to(root): hashlib.blake2b(path.read_bytes()).digest() for path in files}


def is_clear(error):
    """One of our own words: no exception of a library below, one sentence, not too long."""
    ours = type(error).__module__.startswith("vla_rl") or type(error) in (ValueError, FileNotFoundError, OSError)
    text = str(error)
    return ours and "Traceback" not in text and text.count("\n") == 0 and 20 < len(text.replace("/", "")) < 700


def attempt(root, work, *, may_change=()):
    """What `work` returned, or the error; checks the memory it took, that it ended, and that no other file changed.

    The slack is more than these small files take; `test_memory.py` has large ones.
    """
    before, size = checksums(root), sum(p.stat().st_size for p in root.rglob("*") if p.is_file())
    memory = forget_peak() if KNOWN else 0

    def give_up(*_):
        raise AssertionError(f"still at work after {SECONDS} seconds")

    signal.signal(signal.SIGALRM, give_up)
    signal.alarm(SECONDS)
    try:
        found = work()
    except AssertionError:
        raise
    except Exception as error:
        found = error
    finally:
        signal.alarm(0)
    growth = resident("VmHWM") - memory if KNOWN else 0
    assert growth < 2 * size + SLACK
    after = checksums(root)
    assert {name: digest for name, digest in after.items() if name not in may_change} == {
        name: digest for name, digest in before.items() if name not in may_change
    }
    return found


def demand_clear(found):
    if isinstance(found, Exception) and not is_clear(found):
        raise AssertionError(f"{type(found).__name__}: {found}") from found


@pytest.fixture(scope="module")
def good_store(tmp_path_factory):
    path = tmp_path_factory.mktemp("good") / "store"
    with EpisodeStore(path) as store:
        for number in range(2):
            store.append(make_episode(number))
    (path / "data" / "writer.lock").unlink(missing_ok=True)
    return path


def read_store(path):
    store = EpisodeStore(path, mode="r")
    episodes = list(store)
    BalancedSampler([store], batch_size=4, seed=0).sample()
    return episodes


@pytest.mark.parametrize("name", STORES)
def test_stores(tmp_path, good_store, name):
    """An error, or the episodes as they were: much of a store's records can be made anew."""
    root = tmp_path / "store"
    shutil.copytree(good_store, root)
    STORES[name](root)
    found = attempt(root, partial(read_store, root))
    demand_clear(found)
    if not isinstance(found, Exception):
        for episode in found:
            assert len(episode.actions) == 5 and np.isfinite(episode.actions).all()
        if not name.startswith(("attribute", "no-attribute", "task-id-huge")) and len(found) == 2:
            assert_equal(found[1], make_episode(1))
    demand_clear(attempt(root, partial(verify, root)))


@pytest.fixture(scope="module")
def good_run(tmp_path_factory):
    path = tmp_path_factory.mktemp("good") / "run"
    run = RunDirectory(path)
    write_json(path / "config.json", {"seed": 0, "num_workers": None})
    write_json(path / "start.json", {"rl_tasks": ["a"], "policy": "0" * 16})

    def save(folder):
        (folder / "encoder").mkdir(parents=True)
        for name in ("policy.json", "head.safetensors", "encoder/encoder.json"):
            (folder / name).write_bytes(name.encode() * 50)

    run.log({"losses/bc_loss": 1.0}, phase="stage0", step=0)
    run.finish("stage0", checkpoint=run.save_checkpoint("stage0", save))
    run.add_result("after-stage0", {"rl": {"mean": 0.5}})
    run.finish("eval-stage0")
    run.close()
    shutil.rmtree(path / "tensorboard")
    return path


def resume(path):
    run = RunDirectory(path, resume=True)
    checkpoint = run.usable_checkpoint()
    refuse_other_run(path, config=IterativeConfig(), facts={"rl_tasks": ["a"]}, compare_policy=False)
    return checkpoint, run.read_results(), run.metrics()


def test_the_good_run_is_good(good_run):
    checkpoint, results, metrics = resume(good_run)
    assert checkpoint == good_run / "checkpoints" / "stage0"
    assert results == {"after-stage0": {"rl": {"mean": 0.5}}} and len(metrics) == 1


@pytest.mark.parametrize("name", RUNS)
def test_run_directories(tmp_path, good_run, name):
    root = tmp_path / "run"
    shutil.copytree(good_run, root)
    RUNS[name](root)
    if name.startswith("metrics.jsonl"):
        run = RunDirectory(root, resume=True)  # which ends a line that a kill has torn
        demand_clear(attempt(root, run.metrics))
        return
    found = attempt(root, partial(resume, root))
    assert isinstance(found, RunDirectoryError), found
    demand_clear(found)


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_damaged_checkpoints_of_a_run(tmp_path, good_run, name):
    root = tmp_path / "run"
    shutil.copytree(good_run, root)
    CHECKPOINTS[name](root)
    with pytest.warns(UserWarning, match="is damaged .* going on from the beginning, and 2 finished phases") as told:
        found = attempt(root, partial(resume, root), may_change=[Path("state.json")])
    assert not isinstance(found, Exception), found
    checkpoint, _, _ = found
    assert checkpoint is None and len(told) == 1
    assert json.loads((root / "state.json").read_text())["done"] == []


@pytest.fixture(scope="module")
def good_policy(tmp_path_factory):
    path = tmp_path_factory.mktemp("good") / "policy"
    tiny_policy().save_pretrained(path)
    return path


def load_policy(path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return VLAPolicy.from_pretrained(path)


@pytest.mark.slow
@pytest.mark.parametrize("name", POLICIES)
def test_policies(tmp_path, good_policy, name):
    root = tmp_path / "policy"
    shutil.copytree(good_policy, root)
    POLICIES[name](root)
    found = attempt(root, partial(load_policy, root))
    assert isinstance(found, Exception)
    demand_clear(found)


@pytest.fixture(scope="module")
def adapted_policy(tmp_path_factory):
    path = tmp_path_factory.mktemp("good") / "adapted"
    policy = tiny_policy()
    policy.encoder.add_lora(LoRASettings(r=4))
    policy.save_pretrained(path)
    return path


@pytest.mark.slow
@pytest.mark.parametrize("name", ADAPTED)
def test_policies_with_an_adapter(tmp_path, adapted_policy, name):
    root = tmp_path / "policy"
    shutil.copytree(adapted_policy, root)
    ADAPTED[name](root)
    found = attempt(root, partial(load_policy, root))
    if any(name == f"encoder/model/{file}-{what}" for file in MAY_BE_ABSENT for what in ("missing", "no-keys")):
        assert isinstance(found, VLAPolicy)
        return
    assert isinstance(found, Exception)
    demand_clear(found)


def step_three_times(change):
    envs = WorkerVectorEnv([partial(Faulty, change)], num_workers=0)
    try:
        envs.reset(seed=0)
        for _ in range(3):
            envs.step(np.zeros((1, 2), np.float32))
    finally:
        envs.close()


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_experiments(tmp_path, name):
    write_experiment(tmp_path, PRESETS["toy"][1], command="vla-rl train toy", notes=["a note"])
    write_json(tmp_path / "state.json", {"done": [], "checkpoint": None})
    EXPERIMENTS[name](tmp_path / "experiment.json")
    found = attempt(tmp_path, partial(read_experiment, tmp_path, ExperimentConfig))
    assert isinstance(found, Exception)
    demand_clear(found)
    demand_clear(attempt(tmp_path, partial(read_run, tmp_path)))


@pytest.mark.parametrize("name", JOBS)
def test_jobs(tmp_path, name):
    job = SupervisedJob("start", ["expert"], "out", task_weights={"reach": 2.0}, lora=LoRASettings(r=2))
    job.write(tmp_path / "job.json")
    JOBS[name](tmp_path / "job.json")
    found = attempt(tmp_path, partial(SupervisedJob.read, tmp_path / "job.json"))
    assert isinstance(found, Exception)
    demand_clear(found)


@pytest.fixture(scope="module")
def good_stage(tmp_path_factory):
    """A store, and snapshots after 1 and 2 of the 3 steps of a stage on it."""
    path = tmp_path_factory.mktemp("good") / "stage"
    toy_store(path / "expert", episodes=1)
    begin(path, steps=2)
    return path


def begin(path, *, steps):
    seen = []
    with EpisodeStore(path / "expert", mode="r") as store:
        train_supervised(
            tiny_policy(),
            BalancedSampler([store], batch_size=4, seed=0),
            config=SLConfig(steps=steps, batch_size=4, scope="head"),
            snapshots=Snapshots(path / "steps", every=1, of={}),
            on_step=lambda step, loss: seen.append(step),
        )
    return seen


@pytest.mark.parametrize("name", SNAPSHOTS)
def test_snapshots(tmp_path, good_stage, name):
    root = tmp_path / "stage"
    shutil.copytree(good_stage, root)
    file, change = SNAPSHOTS[name]
    change(root / "steps" / "step0000002" / file)
    with pytest.warns(UserWarning, match=r"step0000002 is damaged .*; going on from .*step0000001") as told:
        assert begin(root, steps=3) == [1, 2]
    (sentence,) = (str(each.message) for each in told if "is damaged" in str(each.message))
    assert "\n" not in sentence and len(sentence) < 700


@pytest.mark.parametrize("name", OUTPUTS)
def test_env_outputs(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    found = attempt(tmp_path, partial(step_three_times, OUTPUTS[name]))
    assert isinstance(found, EnvOutputError) and "step of sub-environment 0 returned" in str(found)
    assert is_clear(found) and len(str(found)) < 300
