import json
from dataclasses import replace
from functools import partial

import gymnasium as gym
import numpy as np
import pytest
import torch
from tiny import HEAD, differing, parameters, tiny_encoder, tiny_policy, toy_env
from trainers import CONFIG, SHORT, SL, files, guards_of, saved

from vla_rl import trainer as trainer_module
from vla_rl.config import with_method
from vla_rl.data import EpisodeStore
from vla_rl.encoders import Encoder
from vla_rl.envs import FrameHistory, VLAObservation
from vla_rl.heads import ActionHead, GaussianHead, PooledMLP
from vla_rl.policy import VLAPolicy
from vla_rl.report_episodes import shots
from vla_rl.rl import stage1
from vla_rl.rl.exploration import ExplorationConfig
from vla_rl.rl.stage1 import NoSuccessError
from vla_rl.rundir import RunDirectory
from vla_rl.runs import read_run
from vla_rl.sl import launch


def test_the_schedule_is_algorithm_1(make_trainer, monkeypatch, tmp_path):
    nothing = stage1.Stage1Result([], 0, 0, 0, False, 0.0, 0.0)
    monkeypatch.setattr(trainer_module, "run_ppo", lambda *args, **kwargs: nothing)
    monkeypatch.setattr(launch, "train_supervised", lambda *args, **kwargs: 0.0)
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


def test_a_stage_2_of_no_steps_is_left_out(make_trainer, tmp_path):
    config = replace(CONFIG, stage2=replace(SL, steps=0), stage1_mode="collect")
    trainer = make_trainer(config=config)
    results = trainer.run()
    assert trainer.run_dir.state["done"] == ["stage0", "eval-stage0", "task0-round0-stage1"]
    assert "task0-round0-after-stage2" not in results


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
    with np.load(run / "frames" / "after-stage0-reach-red+new.npz") as frames:
        (episode,) = (frames[name] for name in frames.files)
    assert episode.dtype == np.uint8 and episode.shape[1:] == (32, 32, 3)
    assert list((run / "tensorboard").glob("events*"))


def test_every_task_has_its_own_frames(make_trainer, tmp_path):
    """Whatever its label holds, and although two labels may differ by a colon alone."""
    horizons = {"reach:red": 3, "reach-red": 4, "desk/reach 100%": 5}

    def lazy(label):
        return toy_env(horizon=horizons[label])

    config = with_method(replace(CONFIG, eval_envs=3, rl_eval_episodes=1, stage0=replace(SL, steps=0)), "sft")
    make_trainer(rl_tasks=list(horizons), eval_tasks={"rl": list(horizons)}, make_envs=lazy, config=config).run()
    found = {shot.task: len(shot.frames) for shot in shots(read_run(tmp_path / "run"))}
    assert found == {task: horizon + 1 for task, horizon in horizons.items()}
    names = {path.name for path in (tmp_path / "run" / "frames").iterdir()}
    assert names == {f"after-stage0-{name}.npz" for name in ("reach+red", "reach-red", "desk%2Freach%20100%25")}


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
    original = launch.train_supervised

    def recorded(policy, sampler, **kwargs):
        drawn.append(sampler.tasks)
        return original(policy, sampler, **kwargs)

    monkeypatch.setattr(launch, "train_supervised", recorded)
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
    with EpisodeStore(tmp_path / "run" / "rl_data" / "task0-round0", mode="r") as store:  # weights that were changing
        assert store.index and all(info.policy_version.endswith("-training") for info in store.index)


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
    assert 0 <= results["near"]["task0-round0-stage1"]["closeness"] <= 1
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


def larger(label):
    return toy_env(label, image_size=64)


def test_an_env_that_stage_1_would_refuse_is_refused_before_stage_0(make_trainer):
    def wide(label):
        return gym.wrappers.RescaleAction(toy_env(label), -2.0, 2.0)

    trainer = make_trainer(make_envs=wide)
    with pytest.raises(ValueError, match=r"Box\(-2.0, 2.0.*policies act in \[-1, 1\]: use .*RescaleAction"):
        trainer.run()
    assert not trainer.run_dir.state["done"]


def test_envs_of_two_tasks_that_do_not_go_together_are_refused_before_stage_0(make_trainer):
    def own(label):
        return VLAObservation(toy_env(label), instructions=[f"do {label}"], task_id=0)

    trainer = make_trainer(make_envs=own)
    with pytest.raises(ValueError, match="sub-environment 1 has the instructions"):
        trainer.run()
    assert not trainer.run_dir.state["done"]


class NoWeights(Encoder):
    """An encoder of one's own that opens nothing for training."""

    feature_dim, feature_dtype = 4, torch.float32

    def config(self):
        return {}

    def forward(self, images, instructions):
        tokens = torch.zeros(len(images), 1, 4)
        return tokens, torch.ones(len(images), 1, dtype=torch.bool)


@pytest.mark.parametrize(
    ("encoder", "changes", "said"),
    [
        (tiny_encoder, {"stage0": replace(SL, steps=0)}, 'stage2.scope="lora", but the encoder has no adapter; give'),
        (tiny_encoder, {"stage0": replace(SL, scope="lora")}, 'stage0.scope="lora", but the encoder has no adapter'),
        (NoWeights, {"stage0": replace(SL, scope="head")}, 'stage2.scope="lora", but NoWeights opens no weights; set'),
        (NoWeights, {}, 'stage0.scope="all", but NoWeights opens no weights'),
    ],
)
def test_a_scope_that_no_stage_could_train_is_refused_at_once(make_trainer, tmp_path, encoder, changes, said):
    encoder = encoder()
    policy = VLAPolicy(encoder, GaussianHead(encoder.feature_dim, 2, state_dim=2, **HEAD))
    with pytest.raises(ValueError, match=said):
        make_trainer(policy=policy, lora=None, config=replace(CONFIG, **changes))
    assert not (tmp_path / "run").exists()
    make_trainer(policy=policy, lora=None, config=with_method(replace(CONFIG, stage0=replace(SL, steps=0)), "sft"))


@pytest.mark.parametrize(("scale", "failures"), [(1, 0), (20, 1)])
def test_expert_actions_out_of_reach_and_failures_are_noted(make_trainer, expert_path, tmp_path, scale, failures):
    with EpisodeStore(expert_path, mode="r") as given, EpisodeStore(tmp_path / "theirs") as store:
        for number, episode in enumerate(given):
            store.append(replace(episode, actions=scale * episode.actions, success=number >= failures))
    config = with_method(replace(SHORT, stage0=replace(SHORT.stage0, steps=0)), "sft")
    trainer = make_trainer(expert=EpisodeStore(tmp_path / "theirs", mode="r"), config=config)
    trainer.run()
    notes = {note["guard"]: note["message"] for note in trainer.run_dir.read_results().get("guards", [])}
    notes = {guard: message for guard, message in notes.items() if guard.startswith("expert")}
    if scale == 1:
        assert not notes
    else:
        assert "reach from -2" in notes["expert_actions"] and "[-1, 1]" in notes["expert_actions"]
        assert notes["expert_failures"].startswith("1 of 8 expert episodes are no successes")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda env: VLAObservation(env, image_size=16),
            r"hold \{'image': \[32, 32, 3\]\}, the env gives \{'image': \[16, 16, 3\]\}",
        ),
        (lambda env: FrameHistory(env, 2), r"hold \{'image': .*, the env gives \{'image_t0': .*, 'image_t1': "),
        (lambda env: VLAObservation(env, use_state=False), r"hold \{'state': \[2\]\}, the env gives \{\}; make them"),
    ],
)
def test_an_env_unlike_the_demonstrations_is_refused_before_stage_0(make_trainer, change, said):
    trainer = make_trainer(make_envs=lambda label: change(toy_env(label)))
    with pytest.raises(ValueError, match=said):
        trainer.run()
    assert not trainer.run_dir.state["done"]


def test_an_env_whose_episodes_are_not_learned_from_may_have_its_own_size(make_trainer):
    trainer = make_trainer(make_envs=larger, config=with_method(CONFIG, "sft"))
    trainer.run()
    assert ("orientation", "eval-stage0") in guards_of(trainer)


def test_groups_that_no_report_knows_are_refused(make_trainer, tmp_path):
    with pytest.raises(ValueError, match=r"the groups \['held-out'\]; reports know \['expert', 'rl', 'unseen'\] alone"):
        make_trainer(eval_tasks={"rl": ["reach-red"], "held-out": ["reach-blue"]})
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("tasks", [{"rl_tasks": [], "eval_tasks": None}, {"eval_tasks": {"unseen": []}}])
def test_an_evaluation_without_a_task_is_refused(make_trainer, tasks):
    with pytest.raises(ValueError, match=r"eval_tasks has no task in \['(rl|unseen)'\]; name some, or leave the group"):
        make_trainer(**tasks)


def test_settings_of_an_adapter_are_no_dict(make_trainer):
    with pytest.raises(TypeError, match=r"lora=\{'r': 2\}; expected vla_rl.encoders.LoRASettings"):
        make_trainer(lora={"r": 2})


class OtherHead(GaussianHead):
    """Takes torch's distributions and a loss per row for what this library wants."""

    def distribution(self, features, state):
        found = super().distribution(features, state)
        return torch.distributions.Normal(found.mean, found.std)

    def supervised_loss(self, features, state, actions):
        return (self.predict(features, state) - actions).square().mean(-1)

    def predict(self, features, state):
        return super().distribution(features, state).mode


@pytest.mark.parametrize(
    ("steps", "error", "message"),
    [
        (0, TypeError, r"distribution\(\) of OtherHead gave torch's Normal.*DiagonalGaussian"),
        (1, ValueError, r"supervised_loss\(\) of OtherHead gave shape \(16,\).*the mean over the rows"),
    ],
)
def test_what_a_head_gives_is_checked(make_trainer, steps, error, message):
    encoder = tiny_encoder()
    policy = VLAPolicy(encoder, OtherHead(encoder.feature_dim, 2, state_dim=2, **HEAD))
    config = replace(CONFIG, stage0=replace(CONFIG.stage0, steps=steps))
    with pytest.raises(error, match=message):
        make_trainer(config=config, policy=policy).run()


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
        ({"rl_eval_episodes": 0}, "rl_eval_episodes=0; expected at least 1"),
        ({"max_rl_episodes": 0}, "max_rl_episodes=0; expected at least 1"),
        ({"collect_episodes": 0, "stage1_mode": "collect"}, "collect_episodes=0; expected at least 1"),
        ({"stage1_mode": "SACfD"}, "stage1_mode='SACfD'; expected one of 'ppo', 'sacfd', 'collect', 'none'"),
        ({"stage1_scope": "LoRA"}, "stage1_scope='LoRA'; expected one of 'head', 'lora', 'text', 'all'"),
        ({"stage2_data": "rl"}, "stage2_data='rl'; expected one of "),
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


def test_one_label_is_no_list_of_labels(make_trainer):
    with pytest.raises(ValueError, match=r"rl_tasks='reach-red' is one string; give .*\['reach-red'\]"):
        make_trainer(rl_tasks="reach-red")


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
