import json
import os
import signal
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from rich.console import Console
from tiny import differing, parameters, tiny_encoder, tiny_policy, toy_env

from vla_rl import trainer as trainer_module
from vla_rl.config import IterativeConfig, with_method
from vla_rl.data import EpisodeStore
from vla_rl.encoders import LoRASettings
from vla_rl.guards import GuardConfig
from vla_rl.heads import ActionHead, PooledMLP
from vla_rl.policy import VLAPolicy
from vla_rl.preemption import PreemptedError
from vla_rl.rl import stage1
from vla_rl.rl.exploration import ExplorationConfig
from vla_rl.rl.ppo import PPOConfig
from vla_rl.rl.sac import SACfDConfig
from vla_rl.rl.stage1 import NoSuccessError
from vla_rl.rundir import RunDirectory, RunDirectoryError
from vla_rl.sl.supervised import SLConfig
from vla_rl.trainer import IterativeTrainer

SL = SLConfig(steps=6, batch_size=16, scope="all", random_shift=0)
CONFIG = IterativeConfig(
    stage0=SL,
    stage1=PPOConfig(
        total_timesteps=500, num_envs=8, rollout_steps=25, minibatch_size=100, update_epochs=1, critic_warmup_updates=1
    ),
    sacfd=SACfDConfig(
        total_timesteps=500,
        num_envs=8,
        num_demos=4,
        learning_starts=300,
        utd_ratio=0.1,
        batch_size=16,
        critic_warmup_updates=2,
        num_critics=2,
    ),
    stage2=replace(SL, scope="lora"),
    collect_episodes=8,
    eval_episodes=4,
    rl_eval_episodes=4,
    eval_envs=2,
    num_workers=0,
    video_episodes=1,
    stop_at_zero=False,
)
GROUPS = {"expert": ["reach-red"], "rl": ["reach-red:new"]}


@pytest.fixture
def make_trainer(tmp_path, expert_path):
    """Trainers of one test share their expert data; each is given its workdir by name."""
    trainers = []

    def make(workdir="run", *, config=CONFIG, policy=None, resume=False, **more):
        arguments = {
            "expert": EpisodeStore(expert_path, mode="r"),
            "rl_tasks": ["reach-red:new"],
            "make_envs": toy_env,
            "eval_tasks": GROUPS,
            "config": config,
            "lora": LoRASettings(r=2, alpha=4),
            "console": Console(quiet=True),
            **more,
        }
        policy = tiny_policy(init_std=1.0) if policy is None else policy
        if resume:
            trainers.append(IterativeTrainer.resume(tmp_path / workdir, policy=policy, **arguments))
        else:
            trainers.append(IterativeTrainer(policy, workdir=tmp_path / workdir, **arguments))
        return trainers[-1]

    yield make
    for trainer in trainers:
        trainer.close()


def files(path):
    return {p.relative_to(path).as_posix(): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}


def saved(workdir):
    """Weights of every checkpoint of a run."""
    return {
        path.name: parameters(VLAPolicy.from_pretrained(path)) for path in sorted((workdir / "checkpoints").iterdir())
    }


def test_the_schedule_is_algorithm_1(make_trainer, monkeypatch, tmp_path):
    nothing = stage1.Stage1Result([], 0, 0, 0, False, 0.0, 0.0)
    monkeypatch.setattr(trainer_module, "run_ppo", lambda *args, **kwargs: nothing)
    monkeypatch.setattr(trainer_module, "train_supervised", lambda *args, **kwargs: 0.0)
    tasks = ["reach-red:new", "reach-blue:new"]
    config = replace(CONFIG, rounds=2, eval_episodes=1, rl_eval_episodes=1)
    trainer = make_trainer(config=config, rl_tasks=tasks, eval_tasks={"rl": tasks})
    trainer.run()
    done = json.loads((tmp_path / "run" / "state.json").read_text())["done"]
    rounds = [f"task{k}-round{r}" for k in (0, 1) for r in (0, 1)]
    phases = [f"{name}-{phase}" for name in rounds for phase in ("stage1", "eval1", "stage2", "eval2")]
    assert done == ["stage0", "eval-stage0", *phases]
    trained = ["stage0", *(phase for phase in phases if "stage" in phase)]
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == sorted(trained)


def test_every_file_of_a_run_says_what_happened(make_trainer, tmp_path):
    results = make_trainer().run()
    run = tmp_path / "run"
    assert json.loads((run / "results.json").read_text()) == results
    assert [label for label in results if label != "guards"] == [
        "after-stage0",
        "task0-round0-stage1",
        "task0-round0-after-stage1",
        "task0-round0-after-stage2",
    ]
    for label in ("after-stage0", "task0-round0-after-stage1", "task0-round0-after-stage2"):
        assert set(results[label]) == {"expert", "rl"}
        episodes = results[label]["rl"]["tasks"]["reach-red:new"]["episodes"]
        assert [episode["seed"] for episode in episodes] == [10_000, 10_001, 10_002, 10_003]
    first = results["task0-round0-stage1"]
    assert first["task"] == "reach-red:new" and first["num_env_steps"] >= 500
    assert first["num_vlm_frames"] / first["num_env_steps"] < 1.2
    with EpisodeStore(run / "rl_data" / "task0-round0", mode="r") as store:
        assert len(store) == first["stored_successes"] > 0
        assert all(info.success and info.source == "rl" and info.task == "reach-red:new" for info in store.index)
    assert json.loads((run / "config.json").read_text())["stage1"]["total_timesteps"] == 500
    phases = {entry["phase"] for entry in RunDirectory(run, resume=True).metrics()}
    assert {"stage0", "task0-round0-stage1", "task0-round0-stage2", "after-stage0"} <= phases
    with np.load(run / "frames" / "after-stage0-reach-red-new.npz") as frames:
        (episode,) = (frames[name] for name in frames.files)
    assert episode.dtype == np.uint8 and episode.shape[1:] == (32, 32, 3)
    assert list((run / "tensorboard").glob("events*"))


def test_each_stage_trains_what_it_should(make_trainer, tmp_path):
    policy = tiny_policy(init_std=1.0)
    start = parameters(policy)
    make_trainer(policy=policy).run()
    weights = saved(tmp_path / "run")
    sft, rl, last = (weights[name] for name in ("stage0", "task0-round0-stage1", "task0-round0-stage2"))
    assert any(name.startswith("encoder.") for name in differing(start, sft))
    moved = differing(sft, rl)
    assert moved and all(name.startswith("head.") for name in moved)
    base = {name: value for name, value in last.items() if "lora_" not in name}
    renamed = {name.replace(".base_layer.", "."): value for name, value in base.items()}
    changed = differing(rl, renamed)
    assert changed and all(name.startswith("head.") for name in changed)
    adapter = [value for name, value in last.items() if "lora_B" in name]
    assert adapter and all(value.abs().max() > 0 for value in adapter)


def test_stage_2_learns_from_expert_data_and_successes(make_trainer, monkeypatch, tmp_path):
    """And only from those of the task so far."""
    drawn = []
    original = trainer_module.train_supervised

    def recorded(policy, sampler, **kwargs):
        drawn.append(sampler.tasks)
        return original(policy, sampler, **kwargs)

    monkeypatch.setattr(trainer_module, "train_supervised", recorded)
    tasks = ["reach-red:new", "reach-blue:new"]
    config = with_method(replace(CONFIG, collect_episodes=32), "filtered-bc")
    make_trainer(config=config, rl_tasks=tasks, eval_tasks={"rl": tasks}).run()
    expert = ("reach-blue", "reach-red")
    assert drawn == [expert, (*expert, "reach-red:new"), ("reach-blue", "reach-blue:new", "reach-red", "reach-red:new")]


METHODS = {
    "ire-vla": {"vlm": True, "rl": True, "phases": "stage0 stage1 stage2"},
    "ire-vla-sacfd": {"vlm": True, "rl": True, "phases": "stage0 stage1 stage2"},
    "ire-vla-frozen": {"vlm": False, "rl": True, "phases": "stage0 stage1 stage2"},
    "sft": {"vlm": False, "rl": False, "phases": "stage0"},
    "ppo": {"vlm": True, "rl": True, "phases": "stage0 stage1"},
    "ppo-replay": {"vlm": True, "rl": True, "phases": "stage0 stage1 stage2"},
    "filtered-bc": {"vlm": True, "rl": True, "phases": "stage0 stage1 stage2"},
}


@pytest.mark.parametrize("method", METHODS)
def test_methods(make_trainer, tmp_path, method):
    expected = METHODS[method]
    # With a dense reward, PPO has a gradient in any rollout.
    trainer = make_trainer(config=with_method(CONFIG, method), make_envs=partial(toy_env, reward="dense"))
    results = trainer.run()
    done = trainer.run_dir.state["done"]
    assert [phase.split("-")[-1] for phase in done if "eval" not in phase] == expected["phases"].split()
    after_sft = VLAPolicy.from_pretrained(tmp_path / "run" / "checkpoints" / "stage0")
    assert (trainer.policy.encoder.fingerprint != after_sft.encoder.fingerprint) == expected["vlm"]
    moved = [name for name, value in parameters(trainer.policy).items() if "lora_B" in name and value.any()]
    assert bool(moved) == expected["vlm"]
    assert ("task0-round0-stage1" in results) == expected["rl"]
    assert next(iter(results)) == "after-stage0"
    if expected["rl"]:
        assert any("after-" in label for label in list(results)[1:]) and "rl" in results[list(results)[-1]]
        env_steps, frames = (results["task0-round0-stage1"][key] for key in ("num_env_steps", "num_vlm_frames"))
        again = method.startswith("ppo")  # the whole model runs again in every minibatch
        assert (frames > 1.3 * env_steps) == again


def test_the_whole_model_can_be_all_of_its_weights(make_trainer, tmp_path):
    config = with_method(CONFIG, "ppo", vlm_scope="all")
    trainer = make_trainer(config=config, make_envs=partial(toy_env, reward="dense"))
    trainer.run()
    weights = saved(tmp_path / "run")
    changed = differing(weights["stage0"], weights["task0-round0-stage1"])
    assert trainer.policy.encoder.lora is None
    assert any("vision_tower" in name for name in changed)


def test_an_unknown_method_is_named():
    with pytest.raises(ValueError, match="unknown method 'magic'; expected one of ire-vla, "):
        with_method(CONFIG, "magic")


@pytest.mark.parametrize("method", ["ire-vla", "ppo"])
def test_behaviour_cloning_beside_rl(make_trainer, tmp_path, method):
    config = with_method(replace(CONFIG, stage1=replace(CONFIG.stage1, bc_coef=0.5)), method)
    make_trainer(config=config).run()
    entries = RunDirectory(tmp_path / "run", resume=True).metrics()
    losses = [entry["losses/bc_loss"] for entry in entries if "charts/SPS" in entry and "losses/bc_loss" in entry]
    assert losses and all(0 < loss < 10 for loss in losses)


def test_stage_1_may_begin_close_to_the_goal(make_trainer, tmp_path):
    """With a policy that hardly moves, only close starts succeed, and evaluation knows of none."""
    config = replace(CONFIG, stage0=replace(SL, steps=0), exploration=ExplorationConfig(start_curriculum=True))
    results = {}
    for name, chosen in (("near", config), ("far", replace(config, exploration=ExplorationConfig()))):
        torch.manual_seed(0)
        make_trainer(name, config=chosen, policy=tiny_policy(init_std=0.3)).run()
        results[name] = json.loads((tmp_path / name / "results.json").read_text())
    stored = {name: result["task0-round0-stage1"]["stored_successes"] for name, result in results.items()}
    assert stored["near"] > 2 * stored["far"]
    assert results["near"]["after-stage0"] == results["far"]["after-stage0"]


def test_each_rl_task_has_a_fresh_critic(make_trainer, monkeypatch):
    critics = []

    class Recorded(stage1.ValueHead):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            critics.append((self, [p.abs().sum().item() for p in self.output.parameters()]))

    monkeypatch.setattr(stage1, "ValueHead", Recorded)
    tasks = ["reach-red:new", "reach-blue:new"]
    make_trainer(rl_tasks=tasks, eval_tasks={"rl": tasks}).run()
    assert len({id(critic) for critic, _ in critics}) == 2
    assert [start for _, start in critics] == [[0.0, 0.0]] * 2
    first, second = (critic.body.pool.queries for critic, _ in critics)
    assert not torch.equal(first, second)


class InterruptedRunError(Exception):
    pass


@pytest.mark.parametrize(
    ("phase", "call"),
    [
        ("stage0", 1),
        ("after-stage0", 2),
        ("task0-round0-stage1", 2),
        ("task0-round0-stage2", 1),
        ("task0-round0-after-stage2", 1),
    ],
)
def test_a_resumed_run_has_the_numbers_of_one_that_was_never_stopped(make_trainer, monkeypatch, tmp_path, phase, call):
    config = replace(CONFIG, stage0=replace(SL, steps=30))
    expected = make_trainer("whole", config=config).run()
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
            make_trainer("stopped", config=config).run()
    done = json.loads((tmp_path / "stopped" / "state.json").read_text())["done"]
    torch.manual_seed(99)
    # The policy given on resuming is only used where no checkpoint had been written.
    policy = tiny_policy(seed=0 if "stage0" not in done else 5, init_std=1.0)
    resumed = make_trainer("stopped", config=config, policy=policy, resume=True)
    results = resumed.run()
    assert results == expected
    whole, stopped = saved(tmp_path / "whole"), saved(tmp_path / "stopped")
    assert whole.keys() == stopped.keys()
    for name, weights in whole.items():
        assert not differing(weights, stopped[name]), name
    runs = [RunDirectory(tmp_path / name, resume=True).metrics() for name in ("whole", "stopped")]
    keys = ("phase", "step", "losses/bc_loss", "losses/value_loss")
    whole, stopped = ([[entry.get(key) for key in keys] for entry in run] for run in runs)
    assert whole == stopped


@pytest.mark.parametrize(("owner", "method"), [(VLAPolicy, "save_pretrained"), (EpisodeStore, "append")])
def test_half_a_checkpoint_and_half_a_store_are_written_again(make_trainer, monkeypatch, tmp_path, owner, method):
    """Killed after the second write of its kind: the stage 1 is done, but its files are not."""
    expected = make_trainer("whole").run()
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


def test_sigterm_ends_the_run_in_order_and_it_goes_on_with_the_same_numbers(make_trainer, monkeypatch, tmp_path):
    expected = make_trainer("whole").run()
    original = RunDirectory.log

    def preempted(self, metrics, **kwargs):
        original(self, metrics, **kwargs)
        if kwargs["phase"] == "task0-round0-stage1":
            os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        patch.setattr(RunDirectory, "log", preempted)
        with pytest.raises(PreemptedError) as stopped:
            make_trainer("stopped").run()
    assert stopped.value.code == 143
    assert signal.getsignal(signal.SIGTERM) == before
    state = json.loads((tmp_path / "stopped" / "state.json").read_text())
    assert state["stopped"] == "task0-round0-stage1" and state["done"] == ["stage0", "eval-stage0"]
    assert make_trainer("stopped", resume=True).run() == expected
    assert "stopped" not in json.loads((tmp_path / "stopped" / "state.json").read_text())


def damage(workdir, checkpoint):
    path = workdir / "checkpoints" / checkpoint / "head.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_a_damaged_checkpoint_is_passed_over_with_a_warning(make_trainer, tmp_path):
    expected = make_trainer().run()
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


def test_only_the_newest_checkpoints_and_the_best_are_kept(make_trainer, monkeypatch, tmp_path):
    nothing = stage1.Stage1Result([], 0, 0, 0, False, 0.0, 0.0)
    monkeypatch.setattr(trainer_module, "run_ppo", lambda *args, **kwargs: nothing)
    config = replace(CONFIG, rounds=2, eval_episodes=1, rl_eval_episodes=1)
    trainer = make_trainer(config=config, guards=GuardConfig(keep_checkpoints=2))
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
def test_the_run_does_not_depend_on_the_number_of_env_workers(make_trainer, tmp_path):
    expected = make_trainer("alone").run()
    config = replace(CONFIG, num_workers=3)
    assert make_trainer("workers", config=config).run() == expected
    alone, workers = saved(tmp_path / "alone"), saved(tmp_path / "workers")
    for name, weights in alone.items():
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


def test_a_workdir_in_use_is_refused_and_left_as_it_is(make_trainer, tmp_path):
    make_trainer(config=with_method(CONFIG, "sft")).run()
    before = files(tmp_path / "run")
    with pytest.raises(FileExistsError, match=r"already holds another run.*give a new workdir"):
        make_trainer()
    assert files(tmp_path / "run") == before


def test_a_workdir_with_other_files_is_fine(make_trainer, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    make_trainer(config=with_method(CONFIG, "sft")).run()
    assert (tmp_path / "run" / "notes.txt").read_text() == "mine"


def test_a_first_task_without_any_success_stops_with_an_explanation(make_trainer):
    config = replace(CONFIG, stop_at_zero=True)
    policy = tiny_policy(init_std=1e-3)
    trainer = make_trainer(config=config, policy=policy, make_envs=partial(toy_env, horizon=1))
    with pytest.raises(NoSuccessError, match="train stage 0 longer") as stopped:
        trainer.run()
    guard = trainer.run_dir.read_results()["guards"][-1]
    assert guard == {"guard": "NoSuccessError", "phase": "task0-round0-stage1", "message": str(stopped.value)}


class PlainHead(ActionHead):
    """Imitates, but knows no log-probabilities."""

    def __init__(self, feature_dim, action_dim, *, state_dim=0):
        super().__init__()
        self.kwargs = {"feature_dim": feature_dim, "action_dim": action_dim, "state_dim": state_dim}
        self.body = PooledMLP(feature_dim, state_dim=state_dim, width=16, num_queries=2, hidden_dim=action_dim)

    def config(self):
        return self.kwargs

    def predict(self, features, state):
        return self.body(features, state)

    def supervised_loss(self, features, state, actions):
        return (self.predict(features, state) - actions).abs().mean()


@pytest.mark.parametrize("method", ["ire-vla", "filtered-bc"])
def test_rl_refuses_a_head_without_log_probs(make_trainer, method):
    encoder = tiny_encoder()
    policy = VLAPolicy(encoder, PlainHead(encoder.feature_dim, 2, state_dim=2))
    with pytest.raises(TypeError, match=r"'PlainHead' has no log_prob.*GaussianHead"):
        make_trainer(config=with_method(CONFIG, method), policy=policy)


def test_supervised_learning_takes_any_head(make_trainer, tmp_path):
    encoder = tiny_encoder()
    policy = VLAPolicy(encoder, PlainHead(encoder.feature_dim, 2, state_dim=2))
    results = make_trainer(config=with_method(CONFIG, "sft"), policy=policy).run()
    assert [name for name in results if name != "guards"] == ["after-stage0"]
    again = VLAPolicy.from_pretrained(tmp_path / "run" / "checkpoints" / "stage0")
    assert type(again.head) is PlainHead


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stage1_mode": "none"}, 'stage1_mode="none" finds no successes'),
        ({"rounds": 0}, "rounds=0; expected at least 1"),
        (
            {"stage1_mode": "sacfd", "stage1_scope": "lora"},
            'stage1_scope="lora" trains the VLM, but stage1_mode="sacfd"',
        ),
    ],
)
def test_settings_that_contradict_each_other_are_refused_before_anything_is_written(
    make_trainer, tmp_path, changes, message
):
    with pytest.raises(ValueError, match=message):
        make_trainer(config=replace(CONFIG, **changes))
    assert not (tmp_path / "run").exists()


def test_no_expert_data_is_refused(make_trainer, tmp_path):
    with EpisodeStore(tmp_path / "empty") as empty, pytest.raises(ValueError, match="hold no episode"):
        make_trainer(expert=empty)
    assert not (tmp_path / "run").exists()


def test_no_success_is_no_data_and_no_error(make_trainer, tmp_path):
    policy = tiny_policy(init_std=1e-3)
    results = make_trainer(policy=policy, make_envs=partial(toy_env, horizon=1)).run()
    assert results["task0-round0-stage1"]["stored_successes"] == 0
    assert "task0-round0-after-stage2" in results
    assert not (tmp_path / "run" / "rl_data" / "task0-round0").exists()
