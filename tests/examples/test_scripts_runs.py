"""What a run of each script that trains leaves behind: curves, a policy where asked for, a tracker's run, videos."""

import importlib.machinery
import os
import runpy
import sys
import time
import types
from functools import partial
from pathlib import Path
from unittest.mock import Mock

import gymnasium as gym
import h5py
import imageio.v3 as iio
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from scripts import CLEANRL_LOSSES, EXAMPLES, RUNS, SMALL_HEAD, SMALL_PPO, THREE_STAGES, run_script, scalars
from tiny import toy_env

from vla_rl import VLAPolicy

LOSSES = {
    "sft_vlm.py": {"bc_loss"},
    "ppo_frozen_vlm.py": CLEANRL_LOSSES,
    "ppo_full_vlm.py": CLEANRL_LOSSES,
    "ppo_replay_vlm.py": CLEANRL_LOSSES | {"bc_loss"},
    "filtered_bc_vlm.py": {"bc_loss"},
    "sacfd_latent.py": {"qf_loss", "qf_values", "actor_loss", "entropy", "alpha", "bc_loss"},
    "ire_vla_metaworld.py": CLEANRL_LOSSES | {"bc_loss"},
    "ire_vla_franka_kitchen.py": CLEANRL_LOSSES | {"bc_loss"},
}


@pytest.fixture
def tracked(monkeypatch):
    """The arguments of every `wandb.init`, of a package that only has that."""
    calls = []
    module = types.ModuleType("wandb")
    module.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
    module.init = lambda **settings: calls.append(settings)
    monkeypatch.setitem(sys.modules, "wandb", module)
    return calls


def losses(tags):
    return {tag: values for tag, values in tags.items() if tag.startswith("losses/")}


def differing_weights(first, second):
    before, after = load_file(first), load_file(second)
    assert before.keys() == after.keys()
    return {name for name in before if not torch.equal(before[name], after[name])}


@pytest.mark.parametrize("name", RUNS)
def test_128_steps_with_and_without_saving(name, sft, demos, root, tracked, monkeypatch):
    plain_name, exp_name = f"{Path(name).stem}-plain", f"{Path(name).stem}-saving"
    options = RUNS[name].format(sft=sft, demos=demos) + " --eval-episodes 2 --exp-name"
    plain = run_script(monkeypatch, root, name, f"{options} {plain_name}")
    assert not tracked and not Path("runs", plain["run_name"], "model").exists()
    run = run_script(monkeypatch, root, name, f"{options} {exp_name} --save-model --track")
    tags = scalars(root, run)
    np.testing.assert_equal(losses(tags), losses(scalars(root, plain)))  # saving and tracking change no draw
    assert {tag.removeprefix("losses/") for tag in losses(tags)} == LOSSES[name]
    assert run["global_step"] >= 127 and all(np.isfinite(values[-1]).all() for values in losses(tags).values())
    if name.startswith("ppo"):
        assert set(tags) >= {"charts/episodic_return", "charts/episodic_length", "charts/success_rate", "charts/SPS"}
    end = 128 if name == "sft_vlm.py" else run["global_step"]
    before = {"sft_vlm.py": []}.get(name, [0])
    if name.startswith("ire_vla"):  # after stage 0, 1, 2, and of the saved model
        before += [end, end]
    assert [step for step, _ in tags["eval/success_rate"]] == [*before, end]

    (settings,) = tracked
    assert settings["sync_tensorboard"] is True and settings["project"] == "vla-rl"
    assert settings["name"] == run["run_name"]
    assert run["run_name"].startswith(f"{run['args'].env_id}__{exp_name}__1__")
    assert settings["config"] == vars(run["args"]) and settings["config"]["exp_name"] == exp_name

    saved = Path("runs", run["run_name"], "model")
    weights = "encoder/model/model.safetensors"
    assert differing_weights(sft / "head.safetensors", saved / "head.safetensors")
    learns_all = name == "sft_vlm.py" or "scope all" in options
    if learns_all:
        assert name == "sft_vlm.py" or differing_weights(sft / weights, saved / weights)
    else:
        assert not differing_weights(sft / weights, saved / weights)
    policy = VLAPolicy.from_pretrained(saved)
    wants_lora = name == "ppo_full_vlm.py" or name.startswith("ire_vla")
    assert getattr(policy.encoder.lora, "r", None) == (2 if wants_lora else None)


@pytest.mark.parametrize(
    ("name", "start"),
    [
        ("ire_vla_metaworld.py", "--vlm {sft}/encoder --stage0.steps 2 --stage0.scope all"),
        ("ire_vla_franka_kitchen.py", "--policy {sft}"),
    ],
)
def test_all_three_stages_run(name, start, sft, demos, root, monkeypatch):
    options = f"{THREE_STAGES} {start} --num-steps 32 --total-timesteps 600 --save-model --eval-episodes 2 --seed 7"
    run = run_script(monkeypatch, root, name, options.format(sft=sft, demos=demos))
    tags = scalars(root, run)
    assert [step for step, _ in tags["losses/bc_loss"]] == ([0, 2] if "stage0" in start else [0])
    assert len(tags["eval/expert_success_rate"]) == 3 and len(tags["eval/success_rate"]) == 4  # after each stage, saved
    with h5py.File(Path("runs", run["run_name"], "rl_data", "reach-green", "data", "main_data.hdf5")) as file:
        assert len(file) == len(run["successes"]) > 0
        for group in file.values():
            length = len(group["actions"])
            assert group["observations/image"].shape == (length + 1, 32, 32, 3) and group["rewards"][-1] == 1
            assert not group["terminations"][:-1].any() and group["terminations"][-1]
            # The stored actions lead from one stored state to the next.
            moves = np.diff(group["observations/state"][()], axis=0)
            inside = np.abs(group["observations/state"][1:]) < 1
            np.testing.assert_allclose(moves[inside], 0.2 * group["actions"][()][inside], atol=1e-5)
    saved = VLAPolicy.from_pretrained(Path("runs", run["run_name"], "model"))
    assert saved.encoder.lora.r == 2
    assert any(value.abs().max() > 0 for name, value in saved.encoder.model.named_parameters() if "lora_B" in name)
    obs, _ = toy_env("reach-green").reset(seed=0)
    batch = {key: np.stack([value]) for key, value in obs.items()}
    with torch.no_grad():
        ours = run["agent"].env_action(
            run["agent"].get_mean(*run["vlm"].encode(batch, ["", "", "reach the green square"]))
        )
    np.testing.assert_allclose(ours[0], saved.act(obs, "reach the green square"), atol=1e-5)


@pytest.mark.parametrize(
    ("name", "tasks"),
    [("ppo_frozen_vlm.py", ["--task reach-red:new", "--task reach-blue"]), ("ire_vla_metaworld.py", ["reach-red:new"])],
)
def test_runs_of_one_second_share_no_folder(name, tasks, sft, demos, root, monkeypatch):
    monkeypatch.setattr(time, "time", lambda: 1.8e9)  # as when `benchmarks/launch.py` starts them together
    options = f"{RUNS[name].format(sft=sft, demos=demos)} --total-timesteps 0 --eval-episodes 0 --exp-name at-once"
    options = options.replace("reach-green", "{}") if name.startswith("ire") else f"{options} {{}}"
    names = [run_script(monkeypatch, root, name, options.format(task))["run_name"] for task in (*tasks, tasks[0])]
    assert len(set(names)) == len(names) and "__at-once__1__reach-red-new__" in names[0]


@pytest.mark.parametrize("name", ["filtered_bc_vlm.py", "ire_vla_metaworld.py", "ire_vla_franka_kitchen.py"])
@pytest.mark.parametrize("fraction", ["0", "1", "1.5"])
def test_a_part_of_a_batch_that_is_none_is_refused_at_the_start(name, fraction, tmp_path, monkeypatch):
    options = RUNS[name].format(sft="nowhere", demos="nowhere")
    with pytest.raises(AssertionError, match=f"--rl-fraction is {fraction}.* between 0 and 1"):
        run_script(monkeypatch, tmp_path, name, f"{options} --rl-fraction {fraction}")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", [name for name in RUNS if "{demos}" in RUNS[name]])
def test_demonstrations_that_are_not_there_are_noticed_first(name, tmp_path, monkeypatch):
    monkeypatch.setattr("torch.utils.tensorboard.SummaryWriter", lambda folder: Mock())  # whose thread would outlive it
    with pytest.raises(FileNotFoundError, match="no-demos"):  # and not that there is no policy either
        run_script(monkeypatch, tmp_path, name, RUNS[name].format(sft="no-policy", demos="no-demos"))


@pytest.mark.parametrize("name", ["ire_vla_metaworld.py", "ire_vla_franka_kitchen.py"])
def test_an_rl_task_that_is_named_twice_is_refused_at_the_start(name, tmp_path, monkeypatch):
    options = RUNS[name].format(sft="nowhere", demos="nowhere").replace("reach-green", "reach-green reach-green")
    with pytest.raises(AssertionError, match="--rl-tasks names one twice: reach-green reach-green"):
        run_script(monkeypatch, tmp_path, name, options)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ppo_frozen_vlm.py", "ire_vla_metaworld.py", "evaluate.py"])
def test_videos_are_captured(name, sft, demos, root, monkeypatch):
    pytest.importorskip("moviepy")
    options = RUNS.get(name, "--policy {sft} --tasks reach-red --num-envs 1").format(sft=sft, demos=demos)
    run = run_script(monkeypatch, root, name, f"{options} --eval-episodes 1 --exp-name videos --capture-video")
    videos = list((root / "videos").glob(f"{run['run_name']}*/*.mp4"))
    assert videos and all(os.path.getsize(path) for path in videos)
    frames = iio.imread(min(videos), plugin="pyav")
    assert frames.shape[1:] == (32, 32, 3) and 2 <= len(frames) <= 22  # 20 steps; MoviePy may repeat the last
    assert frames.std(axis=(1, 2)).min() > 5  # a picture, not a plain colour


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "switch"),
    [
        ("ppo_frozen_vlm.py", "--async-envs"),
        ("ppo_frozen_vlm.py", "--compile-mode default"),
        ("filtered_bc_vlm.py", "--compile-mode default"),
        ("ire_vla_metaworld.py", "--compile-mode default"),
    ],
)
def test_a_switch_for_speed_changes_no_loss(name, switch, sft, demos, root, monkeypatch):
    if "compile" in switch and name != "ppo_frozen_vlm.py":  # one script makes machine code; the others trace alone
        monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    options = RUNS[name].format(sft=sft, demos=demos).replace(" --dtype float32", "")
    options += f" --eval-episodes {0 if 'ire_vla' in name else 1} --dtype float32 --exp-name {len(name)}-{len(switch)}"
    plain = losses(scalars(root, run_script(monkeypatch, root, name, f"{options}-plain")))
    switched = losses(scalars(root, run_script(monkeypatch, root, name, f"{options}-switched {switch}")))
    assert switched.keys() == plain.keys() == {f"losses/{tag}" for tag in LOSSES[name]}
    for tag, values in plain.items():
        np.testing.assert_allclose(switched[tag], values, rtol=1e-3, atol=1e-5, err_msg=tag)


def test_a_vlm_from_a_relative_directory_is_saved_with_its_absolute_path(sft, monkeypatch):
    monkeypatch.chdir(sft)
    vlm = runpy.run_path(str(EXAMPLES / "sft_vlm.py"), run_name="script")["VLM"].load("encoder/model", "float32")
    assert vlm.source == str(sft / "encoder" / "model")


def test_tiny_comes_from_the_library_and_goes_on_by_name(demos, root, monkeypatch):
    options = f"--demos {demos} --vlm tiny --scope head --total-timesteps 2 --batch-size 4 {SMALL_HEAD} --save-model"
    run = run_script(monkeypatch, root, "sft_vlm.py", f"{options} --eval-episodes 1 --exp-name tiny --dtype float32")
    saved = root / "runs" / run["run_name"] / "model"
    assert not (saved / "encoder" / "model").exists()
    options = f"--policy {saved} --num-envs 2 --eval-episodes 1 --exp-name from-tiny"
    options = f"{SMALL_PPO} --total-timesteps 16 {options}"
    after = run_script(monkeypatch, root, "ppo_frozen_vlm.py", options)
    obs, _ = toy_env("reach-red").reset(seed=0)
    batch = {key: np.stack([value]) for key, value in obs.items()}
    policy = VLAPolicy.from_pretrained(saved)
    vlm, agent = after["load_policy"](saved)
    with torch.no_grad():
        ours = agent.env_action(agent.get_mean(*vlm.encode(batch, ["reach the red square"])))
    np.testing.assert_allclose(ours[0], policy.act(obs, "reach the red square"), atol=1e-3)  # resized: a grey level off


class ByTurns(gym.Wrapper):
    """The toy environment with another instruction in every episode, by turns, of two that differ in length."""

    instructions = ("reach the red square", "reach the red square, wait there, and then come back to where you began")
    turn = 1

    def reset(self, **settings):
        obs, info = self.env.reset(**settings)
        self.turn = 1 - self.turn
        return obs | {"task_id": np.int64(self.turn)}, info

    def step(self, action):
        obs, *rest = self.env.step(action)
        return obs | {"task_id": np.int64(self.turn)}, *rest


def by_turns(**settings):
    return ByTurns(gym.make("vla_rl_envs:VLA/Toy-v0", **settings))


@pytest.mark.parametrize("name", ["ppo_frozen_vlm.py", "sacfd_latent.py", "ire_vla_metaworld.py"])
def test_instructions_of_one_env_may_differ_in_length(name, sft, demos, root, monkeypatch):
    monkeypatch.setitem(gym.registry, "test/ByTurns-v0", gym.envs.registration.EnvSpec("test/ByTurns-v0", by_turns))
    options = f"{RUNS[name].format(sft=sft, demos=demos)} --env-id test/ByTurns-v0 --eval-episodes 0 --num-envs 1"
    options = f"{options.replace('--unseen-tasks reach-red:new', '--unseen-tasks')} --exp-name by-turns"
    options += " --num-steps 32 --total-timesteps 64"  # a rollout is longer than an episode
    run = run_script(monkeypatch, root, name, options)
    if "b_tokens" in run:  # what an update gets is what was acted on, but for zeros that the mask leaves out
        lengths = [step.shape[1] for step in run["tokens"]]
        frames, masks = run["b_tokens"].view(len(lengths), *run["b_tokens"].shape[1:]), run["b_masks"]
        assert len(set(lengths)) == 2 and max(lengths) == frames.shape[1]
        for step, length in enumerate(lengths):
            assert torch.equal(frames[step, :length], run["tokens"][step][0])
            assert not frames[step, length:].any() and not masks[step, length:].any()
    if "online" in run:
        assert len({mask.sum().item() for mask in run["online"].data["mask"][: run["online"].count]}) == 2
