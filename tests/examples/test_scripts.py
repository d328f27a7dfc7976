"""The single-file scripts from outside: what they import, that they run, and what they leave behind."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import h5py
import minari
import numpy as np
import pytest
import torch
from scripts import EXAMPLES, SCRIPTS, SMALL_HEAD, SMALL_PPO, SMALL_VLM, run_script, scalars
from tiny import toy_env
from vla_rl_envs import make_expert

from vla_rl import VLAPolicy, evaluate
from vla_rl.collect import run_expert
from vla_rl.evaluation import wilson_interval

NAMES = [path.name for path in SCRIPTS]
CLEANRL_LOSSES = {
    "value_loss",
    "policy_loss",
    "entropy",
    "old_approx_kl",
    "approx_kl",
    "clipfrac",
    "explained_variance",
}


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield "." if node.level else node.module.split(".")[0]


def definitions(path):
    """Source of every function, method and class head of a script, by qualified name; main apart."""
    source = path.read_text()
    found = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef):
            found[node.name] = ast.get_source_segment(source, node)
        elif isinstance(node, ast.ClassDef):
            for member in node.body:
                if isinstance(member, ast.FunctionDef):
                    found[f"{node.name}.{member.name}"] = ast.get_source_segment(source, member)
    return found


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("scripts")


@pytest.fixture(scope="module")
def demos(root):
    options = "--out demos --episodes 4 --seed 5"
    subprocess.run([sys.executable, EXAMPLES / "collect_demos.py", *options.split()], cwd=root, check=True)
    return root / "demos"


@pytest.fixture(scope="module")
def sft(root, demos):
    """The directory of a policy from `sft_vlm.py`, made by a process of its own."""
    options = "--demos demos --total-timesteps 4 --batch-size 8 --eval-episodes 2 --num-envs 2 --save-model"
    options = f"{options} {SMALL_VLM} {SMALL_HEAD}"
    subprocess.run([sys.executable, EXAMPLES / "sft_vlm.py", *options.split()], cwd=root, check=True)
    (model,) = root.glob("runs/*/*__sft_vlm__1__*/model")
    return model


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_a_script_imports_neither_the_library_nor_another_script(path):
    names = set(imported(path))
    assert "tyro" in names
    assert not names & {"vla_rl", "vla_rl_envs", ".", *(script.stem for script in SCRIPTS)}


def test_what_scripts_share_they_share_word_for_word():
    """So that `diff a.py b.py` shows what the methods differ in, and nothing else."""
    seen = {}
    for path in SCRIPTS:
        for name, source in definitions(path).items():
            seen.setdefault(name, {}).setdefault(source, []).append(path.name)
    assert len(seen) > 20
    assert {
        name: list(texts.values()) for name, texts in seen.items() if len(texts) > 1 and name not in DIFFERENT
    } == {}


DIFFERENT = {"Agent.__init__"}  # supervised learning alone has no critic


@pytest.mark.parametrize("name", NAMES)
def test_every_default_is_explained_and_lines_are_few(name):
    source = (EXAMPLES / name).read_text()
    assert len(source.splitlines()) <= 700
    (args,) = (node for node in ast.parse(source).body if isinstance(node, ast.ClassDef) and node.name == "Args")
    fields = [field for field in args.body if isinstance(field, ast.AnnAssign)]
    texts = [text for text in args.body[1:] if isinstance(text, ast.Expr) and isinstance(text.value.value, str)]
    comments = [field for field in fields if "  # " in source.splitlines()[field.end_lineno - 1]]
    assert len(fields) > 5 and all(field.value is not None for field in fields)
    assert len(texts) + len(comments) == len(fields)
    assert (EXAMPLES.parent / "docs" / "scripts" / name).with_suffix(".md").is_file()


def test_demonstrations_are_those_of_the_library(demos):
    with h5py.File(demos / "data" / "main_data.hdf5") as file:
        assert len(file) == 8
        assert [file[f"episode_{i}"].attrs["task"] for i in (0, 7)] == ["reach-red", "reach-blue"]
        for i, seed in enumerate(range(5, 9)):
            env = toy_env("reach-red", render_mode="rgb_array")
            episode = run_expert(env, make_expert(env), task="reach-red", seed=seed, noise=0.2)
            group = file[f"episode_{i}"]
            assert np.array_equal(group["actions"], episode.actions)
            assert np.array_equal(group["rewards"], episode.rewards)
            assert np.array_equal(group["terminations"], episode.terminations)
            for key, value in episode.observations.items():
                assert np.array_equal(group[f"observations/{key}"], value)
            assert group.attrs["instruction"] == episode.instruction and group.attrs["success"]


def test_minari_reads_the_demonstrations(demos):
    dataset = minari.MinariDataset(demos / "data")
    episodes = list(dataset.iterate_episodes())
    assert len(episodes) == dataset.total_episodes == 8
    assert sum(len(episode.actions) for episode in episodes) == dataset.total_steps
    assert episodes[0].observations["image"].shape == (len(episodes[0].actions) + 1, 32, 32, 3)


def test_the_library_acts_with_a_saved_policy_as_the_script_does(sft, root, monkeypatch):
    run = run_script(
        monkeypatch,
        root,
        "sft_vlm.py",
        f"--demos demos --total-timesteps 0 --eval-episodes 0 --vlm {sft}/encoder {SMALL_HEAD}",
    )
    vlm, agent = run["load_policy"](sft, "float32")
    policy = VLAPolicy.from_pretrained(sft, dtype=torch.float32)
    obs, _ = toy_env("reach-blue").reset(seed=0)
    batch = {key: np.stack([value]) for key, value in obs.items()}
    with torch.no_grad():
        ours = agent.env_action(agent.get_mean(*vlm.encode(batch, ["", "reach the blue square"])))
    theirs = policy.act(obs, "reach the blue square")
    assert np.abs(theirs).max() > 0.01
    np.testing.assert_allclose(ours[0], theirs, atol=1e-5)


def test_sft_from_a_process_of_its_own_left_curves(sft, root):
    tags = scalars(root, {"run_name": sft.parent.relative_to(root / "runs")})
    assert set(tags) >= {"losses/bc_loss", "charts/learning_rate", "charts/SPS", "eval/reach-red", "eval/success_rate"}
    assert np.isfinite(tags["losses/bc_loss"][0][1])


@pytest.mark.parametrize("save", ["--save-model", "--no-save-model"])
def test_ppo_frozen_runs_128_steps(sft, root, monkeypatch, save):
    options = f"--policy {sft} --critic-warmup-iterations 1 --eval-episodes 2 {SMALL_PPO} {save} --seed {len(save)}"
    run = run_script(monkeypatch, root, "ppo_frozen_vlm.py", options)
    tags = scalars(root, run)
    assert {tag.removeprefix("losses/") for tag in tags if tag.startswith("losses/")} == CLEANRL_LOSSES
    assert set(tags) >= {"charts/episodic_return", "charts/episodic_length", "charts/success_rate", "charts/SPS"}
    assert [step for step, _ in tags["eval/success_rate"]] == [0, run["global_step"]] and run["global_step"] >= 128
    saved = Path("runs", run["run_name"], "model")
    assert saved.exists() == (save == "--save-model")
    if saved.exists():
        assert differing_weights(sft / "head.safetensors", saved / "head.safetensors")
        assert not differing_weights(sft / "encoder/model/model.safetensors", saved / "encoder/model/model.safetensors")


@pytest.mark.parametrize("switch", ["--async-envs", "--compile-mode default"])
def test_a_switch_for_speed_changes_no_loss(sft, root, monkeypatch, switch):
    options = f"--policy {sft} --critic-warmup-iterations 0 --eval-episodes 1 {SMALL_PPO} --dtype float32 --seed "
    losses = []
    for seed, more in ((31, ""), (31, switch)):
        run = run_script(monkeypatch, root, "ppo_frozen_vlm.py", f"{options} {seed} --exp-name {len(more)} {more}")
        tags = scalars(root, run)
        losses.append({tag: tags[tag] for tag in (f"losses/{name}" for name in CLEANRL_LOSSES)})
    for tag, plain in losses[0].items():
        np.testing.assert_allclose(losses[1][tag], plain, rtol=1e-3, atol=1e-5, err_msg=tag)


@pytest.mark.parametrize("start", ["--vlm {sft}/encoder --stage0.steps 2 --stage0.scope all", "--policy {sft}"])
def test_all_three_stages_run(sft, demos, root, monkeypatch, start):
    options = (
        f"--env-id vla_rl_envs:VLA/Toy-v0 --rl-tasks reach-green --unseen-tasks reach-red:new --demos {demos} "
        f"--stage2.steps 2 --stage2.batch-size 8 --lora-rank 2 --eval-episodes 2 --init-std 3 {SMALL_PPO} {SMALL_HEAD} "
        f"--num-steps 32 --total-timesteps 600 --critic-warmup-iterations 0 --dtype float32 --save-model "
        f"--seed {len(start)} "
    )
    options += start.format(sft=sft)
    run = run_script(monkeypatch, root, "ire_vla_metaworld.py", options)
    tags = scalars(root, run)
    assert {tag.removeprefix("losses/") for tag in tags if tag.startswith("losses/")} == CLEANRL_LOSSES | {"bc_loss"}
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


FEW = "--num-envs 4 --num-steps 16 --total-timesteps 128"
SL = "steps 2 --{0}.batch-size 8 --{0}.scope all"


@pytest.mark.parametrize(
    ("name", "options", "losses"),
    [
        ("ppo_full_vlm.py", f"{SMALL_PPO} --critic-warmup-iterations 1 --lora-rank 2", CLEANRL_LOSSES),
        (
            "ppo_replay_vlm.py",
            f"{SMALL_PPO} --critic-warmup-iterations 1 --scope all --replay.{SL.format('replay')} --demos demos",
            CLEANRL_LOSSES | {"bc_loss"},
        ),
        ("filtered_bc_vlm.py", f"--num-envs 4 --num-episodes 16 --sl.{SL.format('sl')} --demos demos", {"bc_loss"}),
        (
            "sacfd_latent.py",
            f"{FEW} --num-demos 1 --critic-warmup-updates 2 --batch-size 16",
            {"qf_loss", "qf_values", "actor_loss", "entropy", "alpha", "bc_loss"},
        ),
    ],
)
def test_a_variant_runs_and_changes_the_policy(sft, root, demos, monkeypatch, name, options, losses):
    run = run_script(monkeypatch, root, name, f"--policy {sft} --eval-episodes 2 --init-std 3 --save-model {options}")
    tags = scalars(root, run)
    assert {tag.removeprefix("losses/") for tag in tags if tag.startswith("losses/")} == losses
    assert len(tags["eval/success_rate"]) == 2
    saved = Path("runs", run["run_name"], "model")
    assert differing_weights(sft / "head.safetensors", saved / "head.safetensors")
    policy = VLAPolicy.from_pretrained(saved)
    if "scope all" in options:
        weights = "encoder/model/model.safetensors"
        assert differing_weights(sft / weights, saved / weights)
    elif name == "ppo_full_vlm.py":
        assert policy.encoder.lora.r == 2


def test_evaluate_agrees_with_the_library_on_every_episode(sft, root, monkeypatch):
    options = f"--policy {sft} --tasks reach-red --eval-episodes 7 --num-envs 4 --eval-seed 50 --out e.json"
    run = run_script(monkeypatch, root, "evaluate.py", options)
    result = evaluate(VLAPolicy.from_pretrained(sft), {"reach-red": toy_env}, episodes_per_task=7, seed=50)
    outcomes = [episode.success for episode in result.tasks["reach-red"].episodes]
    assert json.loads(Path("e.json").read_text())["tasks"]["reach-red"]["success"] == outcomes
    assert run["wilson_interval"](3, 7) == pytest.approx(wilson_interval(3, 7), abs=1e-4)
    assert run["wilson_interval"](0, 7)[0] == 0 and run["wilson_interval"](7, 7)[1] == 1


def differing_weights(first, second):
    from safetensors.torch import load_file

    before, after = load_file(first), load_file(second)
    assert before.keys() == after.keys()
    return {name for name in before if not torch.equal(before[name], after[name])}
