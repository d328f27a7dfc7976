import io
import json
import os
import signal
import subprocess
import sys
from dataclasses import asdict, replace

import gymnasium as gym
import numpy as np
import pytest
import torch
from rich.console import Console
from tiny import INSTRUCTIONS, toy_env
from vla_rl_envs import make_expert, tasks

from vla_rl._vector_checks import LostWorkerError
from vla_rl.collect import collect_expert, run_expert
from vla_rl.config import IterativeConfig
from vla_rl.data import EpisodeStore, relabel
from vla_rl.encoders import FrozenVLMEncoder
from vla_rl.experiment import (
    EnvConfig,
    ExperimentConfig,
    ModelConfig,
    check_device,
    check_experiment,
    collect_into,
    make_env,
    new_policy,
    run_experiment,
    saved_policy,
)
from vla_rl.policy import VLAPolicy
from vla_rl.presets import PRESETS
from vla_rl.sl.supervised import SLConfig

TOY = EnvConfig(env_id="vla_rl_envs:VLA/Toy-v0", image_size=32, horizon=20)


def quiet():
    return Console(file=io.StringIO(), width=200)


def test_a_label_is_a_task_and_a_variant():
    for label, task, variant in (("reach-blue", "reach-blue", "original"), ("reach-red:new", "reach-red", "new")):
        env = make_env(label, replace(TOY, horizon=3)).unwrapped
        assert (env.task, env.variant, env.horizon) == (task, variant, 3)


def test_the_stored_action_is_the_experts_and_the_executed_one_is_noisy():
    executed = []

    class Recorded(gym.Wrapper):
        def step(self, action):
            executed.append(np.array(action))
            return super().step(action)

    env = Recorded(toy_env())
    expert = make_expert(env)
    asked = []

    def recorded_expert(env):
        asked.append(expert(env))
        return asked[-1]

    episode = run_expert(env, recorded_expert, task="label", seed=4, noise=0.3)
    np.testing.assert_array_equal(episode.actions, asked)
    deviation = np.array(executed) - np.array(asked)
    assert np.abs(deviation).max() > 0.05 and np.abs(executed).max() <= 1
    assert (episode.task, episode.seed, episode.source, episode.success) == ("label", 4, "expert", True)
    first, _ = toy_env().reset(seed=4)
    np.testing.assert_array_equal(episode.observations["image"][0], first["image"])
    positions = [first["state"]]
    for action in executed:
        positions.append(np.clip(positions[-1] + 0.2 * action, -1, 1))
    np.testing.assert_allclose(episode.observations["state"], positions, atol=1e-5)


def test_an_env_that_fills_the_same_arrays_again_is_copied():
    class Driver(gym.Wrapper):
        """Gives the same arrays with every step, as a camera's driver does."""

        def fill(self, obs):
            self.buffers = getattr(self, "buffers", None) or {key: np.array(value) for key, value in obs.items()}
            for key, value in obs.items():
                self.buffers[key][...] = value
            return self.buffers

        def reset(self, **kwargs):
            obs, info = self.env.reset(**kwargs)
            return self.fill(obs), info

        def step(self, action):
            obs, *rest = self.env.step(action)
            return self.fill(obs), *rest

    env = toy_env()
    plain = run_expert(env, make_expert(env), task="t", seed=3, noise=0.0)
    driven = Driver(toy_env())
    filled = run_expert(driven, make_expert(driven.unwrapped), task="t", seed=3, noise=0.0)
    for key, value in plain.observations.items():
        np.testing.assert_array_equal(filled.observations[key], value)


def test_without_noise_the_expert_is_alone():
    again = [run_expert(toy_env(), make_expert(toy_env()), task="t", seed=s, noise=0.0) for s in (1, 1, 2)]
    np.testing.assert_array_equal(again[0].actions, again[1].actions)
    assert not np.array_equal(again[0].observations["image"][0], again[2].observations["image"][0])


def test_an_expert_or_env_that_does_not_fit_is_named():
    with pytest.raises(ValueError, match=r"an action of shape \(1,\), the env takes Box"):
        run_expert(toy_env(), lambda _: np.ones(1), task="t", seed=0, noise=0.0)

    class Mute(gym.Wrapper):
        def step(self, action):
            return *self.env.step(action)[:4], {"done": True}

    with pytest.raises(KeyError, match=r"no 'success', only \['done'\]; wrap it in .*VLAObservation"):
        run_expert(Mute(toy_env()), lambda _: np.ones(2), task="t", seed=0, noise=0.0)


@pytest.mark.parametrize(
    ("space", "advice"),
    [(gym.spaces.Box(-2, 2, (2,)), "RescaleAction"), (gym.spaces.MultiDiscrete([3, 3]), "ActionWrapper")],
)
def test_an_expert_whose_actions_would_be_clipped_is_refused(space, advice):
    env = toy_env()
    env.action_space = space
    with pytest.raises(ValueError, match=rf"action space is .*; policies act in .*\[-1, 1\]: .*{advice}"):
        run_expert(env, lambda _: np.full(2, 2.0), task="t", seed=0, noise=0.0)


def test_seeds_count_up_for_every_task():
    episodes = list(
        collect_expert(
            ["reach-red", "reach-blue"], make_env=toy_env, expert="vla_rl_envs:make_expert", episodes=7, seed=50,
            num_workers=0,
        )
    )  # fmt: skip
    assert [(e.task, e.seed) for e in episodes] == [(t, 50 + i) for t in ("reach-red", "reach-blue") for i in range(7)]


def test_workers_collect_what_this_process_collects_whatever_the_main_script_is():
    script = (
        "import gymnasium as gym, vla_rl_envs\n"
        "from vla_rl.collect import collect_expert\n"
        "def own_expert(env):\n    return vla_rl_envs.make_expert(env)\n"
        "def collect(count):\n"
        "    stream = collect_expert(['reach-red', 'reach-blue'], episodes=6, num_workers=count,\n"
        "        make_env=lambda task: gym.make('VLA/Toy-v0', task=task), expert='__main__:own_expert')\n"
        "    return [(e.task, e.seed, e.actions.tobytes(), e.observations['image'].tobytes()) for e in stream]\n"
        "assert collect(2) == collect(0)"  # no guard: workers must not import this
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


def fatal_expert(env):
    return lambda env: os.kill(os.getpid(), signal.SIGKILL)


def test_a_worker_that_dies_and_numbers_out_of_range_are_named():
    def collect(**given):
        settings = {"expert": "vla_rl_envs:make_expert", "episodes": 1, "num_workers": 1, **given}
        return list(collect_expert(["reach-red"], make_env=toy_env, **settings))

    with pytest.raises(LostWorkerError, match=r"a process that collects expert episodes died.*use fewer workers"):
        collect(expert="test_experiment:fatal_expert")
    with pytest.raises(ValueError, match=r"episodes=0 .*give at least 1 episode"):
        collect(episodes=0)
    with pytest.raises(ValueError, match=r"num_workers=-1; .* 0 or more workers"):
        collect(num_workers=-1)


def clumsy_expert(env):
    """Solves episodes that start on the left only."""
    skilled = make_expert(env)
    return lambda env: skilled(env) if env.unwrapped.np_random_seed % 2 else np.zeros(2, np.float32)


def test_failures_of_the_expert_are_left_out_and_counted(tmp_path):
    console = quiet()
    collect_into(
        tmp_path / "s", ["reach-red"], env=replace(TOY, expert="test_experiment:clumsy_expert"), episodes=6, noise=0.0,
        num_workers=0, console=console,
    )  # fmt: skip
    with EpisodeStore(tmp_path / "s", mode="r") as store:
        assert [episode.seed for episode in store] == [1, 3, 5] and all(info.success for info in store.index)
    assert "{'reach-red': 3}" in console.file.getvalue()


def clueless_expert(env):
    return lambda env: np.zeros(2, np.float32)


def test_an_experiment_without_demonstrations_ends_in_one_sentence(tmp_path):
    env = replace(TOY, expert="test_experiment:clueless_expert")
    train = IterativeConfig(num_workers=0)
    config = ExperimentConfig(expert_tasks=("reach-red",), expert_episodes=1, env=env, train=train, method="sft")
    with pytest.raises(ValueError, match=r"run/expert_data holds no episode: the expert never succeeded; give another"):
        run_experiment(replace(config, workdir=str(tmp_path / "run")), console=quiet(), command="c")
    EpisodeStore(tmp_path / "empty", mode="w-").close()
    config = replace(config, expert_data=str(tmp_path / "empty"), workdir=str(tmp_path / "other"))
    with pytest.raises(ValueError, match=r"empty' holds no episode; collect some \(vla-rl collect\)"):
        run_experiment(config, console=quiet(), command="c")
    assert not (tmp_path / "other").exists()


def test_a_store_whose_tasks_no_env_knows_is_learned_from(expert_path, tmp_path):
    relabel(expert_path, tmp_path / "store", task="imported")
    train = IterativeConfig(stage0=SLConfig(steps=0), stage1_mode="none", eval_episodes=1, rl_eval_episodes=1)
    config = ExperimentConfig(
        expert_data=str(tmp_path / "store"), workdir=str(tmp_path / "run"), method="sft", env=TOY,
        train=replace(train, num_workers=0), model=ModelConfig(dtype="float32"),
    )  # fmt: skip
    with pytest.raises(ValueError, match="no expert_tasks, rl_tasks or unseen_tasks: give at least one"):
        run_experiment(config, console=quiet(), command="c")
    run_experiment(replace(config, unseen_tasks=("reach-blue",)), console=quiet(), command="c")
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert list(results["after-stage0"]["unseen"]["tasks"]) == ["reach-blue"]


def test_a_new_policy_of_several_cameras_takes_the_size_of_the_first(expert_path, tmp_path):
    with EpisodeStore(expert_path, mode="r") as store:
        episode = store[0]
    seen = {f"image_{name}": episode.observations["image"][:, ::2, ::2] for name in ("front", "wrist")}
    with EpisodeStore(tmp_path / "two") as store:
        store.append(replace(episode, observations={**seen, "task_id": episode.observations["task_id"]}))
        policy = new_policy(ModelConfig(patch_size=8), [store], instructions=INSTRUCTIONS)
    assert policy.encoder.image_size == (16, 16)


def test_a_new_policy_fits_the_data(expert_path):
    with EpisodeStore(expert_path, mode="r") as store:
        policy = new_policy(ModelConfig(dtype="float32", init_std=0.1), [store], instructions=INSTRUCTIONS)
        actions = np.concatenate([episode.actions for episode in store])
        states = np.concatenate([episode.observations["state"][:-1] for episode in store])
    np.testing.assert_allclose(policy.normalize_action(actions).mean(0), 0, atol=1e-4)
    np.testing.assert_allclose(policy.normalize_state(states).std(0, correction=0), 1, rtol=1e-3)
    assert policy.head.config()["state_dim"] == 2 and policy.head.init_std == 0.1
    assert policy.encoder.image_size == (32, 32) and policy.encoder.compute_dtype == torch.float32


def test_a_workdir_with_expert_data_of_an_earlier_attempt_is_refused(tmp_path):
    """Appending to it would store every demonstration twice."""
    collect_into(
        tmp_path / "run" / "expert_data", ["reach-red"], env=TOY, episodes=2, noise=0.1, num_workers=0, console=quiet()
    )
    train = IterativeConfig(stage0=SLConfig(steps=0), eval_episodes=1, rl_eval_episodes=1, num_workers=0)
    config = ExperimentConfig(
        expert_tasks=("reach-red",), method="sft", env=TOY, train=train, workdir=str(tmp_path / "run")
    )
    with pytest.raises(FileExistsError, match="expert_data"):
        run_experiment(config, console=quiet(), command="c")
    with EpisodeStore(tmp_path / "run" / "expert_data", mode="r") as store:
        assert len(store) == 2


def test_a_workdir_with_the_settings_of_an_earlier_attempt_is_refused(tmp_path):
    """Its settings would be lost, with data of its own as well."""
    (tmp_path / "experiment.json").write_text("{}")
    config = ExperimentConfig(name="x", env=TOY, expert_data=str(tmp_path / "data"), workdir=str(tmp_path))
    with pytest.raises(FileExistsError, match=r"experiment\.json is left of an earlier attempt; continue"):
        run_experiment(config, console=quiet(), command="", notes=[])
    assert (tmp_path / "experiment.json").read_text() == "{}"


def test_the_metaworld_preset_has_the_plug_ins_tasks():
    _, config = PRESETS["metaworld"]
    labels = lambda pairs: tuple(t if v == "original" else f"{t}:{v}" for t, v in pairs)  # noqa: E731
    assert config.expert_tasks == tasks.EXPERT_TASKS and len(config.expert_tasks) == 25
    assert config.rl_tasks == labels(tasks.RL_TASKS) and len(config.rl_tasks) == 5
    assert config.unseen_tasks == labels(tasks.UNSEEN_TASKS) and len(config.unseen_tasks) == 10
    assert (config.expert_episodes, config.env.horizon) == (50, 500)


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_about_tasks_that_exist(name):
    description, config = PRESETS[name]
    assert description and config.name == name
    assert json.loads(json.dumps(asdict(config)))["train"]["seed"] == 0
    for group in (config.expert_tasks, config.rl_tasks, config.unseen_tasks):
        assert len(set(group)) == len(group)
    seen = {*config.expert_tasks, *config.rl_tasks}  # RL may practise a task of the demonstrations
    assert config.expert_tasks and not seen & set(config.unseen_tasks)
    for label in (*seen, *config.unseen_tasks):
        if "MetaWorld" in config.env.env_id:
            task, _, variant = label.partition(":")
            assert task in tasks.INSTRUCTION_OF
            assert not variant or variant in tasks.VARIANTS[task]
        else:
            make_env(label, config.env).close()


def test_policies_are_made_on_the_device_asked_for(tmp_path, monkeypatch):
    asked = []
    loaders = {cls: cls.from_pretrained.__func__ for cls in (FrozenVLMEncoder, VLAPolicy)}

    def spy(cls, *args, device="cpu", **kwargs):
        asked.append((cls.__name__, device))
        return loaders[cls](cls, *args, **kwargs)

    for cls in loaders:
        monkeypatch.setattr(cls, "from_pretrained", classmethod(spy))
    for cls in (FrozenVLMEncoder, VLAPolicy):  # there need not be a GPU to see where things are sent
        monkeypatch.setattr(cls, "to", lambda self, device: asked.append((type(self).__name__, device)) or self)
    with EpisodeStore(tmp_path / "store") as store:
        store.append(run_expert(toy_env(), make_expert(toy_env()), task="t", seed=0, noise=0.0))
        for vlm in ("small", "tiny"):
            new_policy(ModelConfig(vlm=vlm, device="cuda"), [store], instructions=INSTRUCTIONS)
    made = ("FrozenVLMEncoder", "cuda"), ("VLAPolicy", "cuda")
    assert asked == [*made, ("FrozenVLMEncoder", "cuda"), ("FrozenVLMEncoder", "cpu"), made[1]]


def test_a_device_that_is_not_there_is_said_before_anything_is_done(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    config = replace(PRESETS["toy"][1], workdir=str(tmp_path / "run"), model=ModelConfig(device="cuda"))
    with pytest.raises(ValueError, match=r"device cuda was asked for, but torch .* sees no GPU; leave it out"):
        run_experiment(config, console=quiet(), command="c")
    assert not (tmp_path / "run").exists()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert check_device("cuda") == "cuda" and check_device("cpu") == "cpu"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model": ModelConfig(vlm="./nothing")}, "is no directory"),
        ({"model": ModelConfig(vlm="nobody/nothing")}, "nobody/nothing"),
        ({"policy": "nothing"}, "holds no policy.json"),
        ({"policy": "nobody/nothing"}, "the Hugging Face hub has not given it either"),
    ],
)
def test_a_model_that_is_not_there_is_said_before_demonstrations_are_collected(tmp_path, changes, said):
    config = replace(PRESETS["toy"][1], workdir=str(tmp_path / "run"), **changes)
    with pytest.raises(OSError, match=said):
        run_experiment(config, console=quiet(), command="c")
    assert not (tmp_path / "run").exists()


def saved(tmp_path, **settings):
    with EpisodeStore(tmp_path / "store") as store:
        store.append(run_expert(toy_env(), make_expert(toy_env()), task="t", seed=0, noise=0.0))
        new_policy(ModelConfig(**settings), [store], instructions=INSTRUCTIONS).save_pretrained(tmp_path / "policy")
    return str(tmp_path / "policy")


def test_a_saved_policy_takes_the_exploration_asked_for_and_keeps_everything_else(tmp_path):
    path = saved(tmp_path, init_std=0.2, num_queries=2, hidden_dim=32)
    first, second = saved_policy(path, ModelConfig()), saved_policy(path, ModelConfig(init_std=0.05))
    assert (first.head.init_std, second.head.init_std) == (0.2, 0.05)
    assert second.head.config() == first.head.config() | {"init_std": 0.05}
    observation, info = toy_env().reset(seed=0)
    np.testing.assert_array_equal(*(policy.act(observation, info["instruction"]) for policy in (first, second)))


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"hidden_dim": 64}, "hidden_dim=64 was asked for, .* with 32; leave it out"),
        ({"exploration": "gaussian"}, "exploration='gaussian' was asked for, .* with 'gsde'"),
        ({"prompt": "do: {instruction}"}, "prompt='do: {instruction}' was asked for, .* with '{instruction}'"),
        ({"patch_size": 8}, "patch_size=8 was asked for, .* with 16"),
        ({"vlm": "nobody/nothing"}, "vlm='nobody/nothing' was asked for, but the policy in .* brings a VLM of its own"),
    ],
)
def test_options_that_a_saved_policy_cannot_have_are_refused_at_the_start(tmp_path, asked, said):
    path = saved(tmp_path, hidden_dim=32)
    config = replace(PRESETS["toy"][1], workdir=str(tmp_path / "run"), policy=path)
    check_experiment(replace(config, model=ModelConfig(hidden_dim=32, init_std=0.1, vlm="tiny")))
    with pytest.raises(ValueError, match=said):
        run_experiment(replace(config, model=ModelConfig(**asked)), console=quiet(), command="c")
    assert not (tmp_path / "run").exists()
