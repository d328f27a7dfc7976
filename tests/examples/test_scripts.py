"""The single-file scripts from outside: what they import, that they run, and what they leave behind."""

import ast
import json
import runpy
import shutil
from pathlib import Path

import gymnasium as gym
import h5py
import minari
import numpy as np
import pytest
import torch
from scripts import EXAMPLES, SCRIPTS, SMALL_HEAD, run_script, scalars
from tiny import toy_env
from vla_rl_envs import make_expert

from vla_rl import VLAPolicy, evaluate
from vla_rl.collect import run_expert
from vla_rl.evaluation import wilson_interval

NAMES = [path.name for path in SCRIPTS]


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


def test_every_run_has_a_name_of_its_own():
    """Seconds, and a name without the task, gave runs that `benchmarks/launch.py` started together one folder."""
    for path in SCRIPTS:
        source = path.read_text()
        named = [line for line in source.splitlines() if line.startswith("    run_name = ")]
        assert len(named) == (path.name != "collect_demos.py") and all("time.time_ns()" in line for line in named)
        label = "task" if "    task: str" in source else "rl_tasks" if "    rl_tasks: tuple" in source else ""
        assert not label or f"(args.{label})" in source or f"args.{label}.replace" in named[0]


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


def own_env(task="reach-red", render_mode=None):
    """An environment of one's own: it knows no variants, and a function is among its wrappers' settings."""
    env = gym.make("vla_rl_envs:VLA/Toy-v0", task=task, render_mode=render_mode)
    return gym.wrappers.TransformReward(env, lambda reward: 2 * reward)


@pytest.fixture
def own_id(monkeypatch):
    spec = gym.envs.registration.EnvSpec("test/Own-v0", f"{__name__}:own_env")
    monkeypatch.setitem(gym.registry, spec.id, spec)
    return spec.id


def test_demonstrations_of_an_env_with_a_function_among_its_settings(own_id, tmp_path, monkeypatch):
    options = f"--out own --env-id {own_id} --tasks reach-red reach-blue --episodes 2"
    run = run_script(monkeypatch, tmp_path, "collect_demos.py", options)
    dataset = minari.MinariDataset(tmp_path / "own" / "data")
    assert dataset.total_episodes == 4 and dataset.env_spec.id == own_id
    assert next(iter(dataset.iterate_episodes())).rewards[-1] == 2
    monkeypatch.setattr(gym.registry[own_id], "entry_point", own_env)  # of this, nothing can be said in JSON
    assert run["spec_json"](gym.make(own_id)) is None


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_an_env_gets_what_a_label_says_and_no_more(path, monkeypatch):
    env, given = own_env(), []
    monkeypatch.setattr(gym, "make", lambda env_id, **settings: given.append(settings) or env)
    script = runpy.run_path(str(path), run_name="script")
    args = script["Args"]()
    for label in ("", "reach-blue", "reach-blue:new"):
        script["task_env"](args, label) if "task_env" in script else script["make_env"](args, label, 0, "x")()
    wanted = [{}, {"task": "reach-blue"}, {"task": "reach-blue", "variant": "new"}]
    assert [{key: made[key] for key in made if key != "render_mode"} for made in given] == wanted


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


@pytest.mark.parametrize(
    ("name", "value"),
    [("prompt", "Do: {instruction}"), ("truncate_layers", 1), ("layer", -2), ("feature_dtype", "float32")],
)
def test_an_encoder_with_settings_that_scripts_do_not_know_is_refused(sft, root, monkeypatch, name, value):
    policy = root / f"policy-{name}"
    shutil.copytree(sft, policy)
    settings = json.loads((policy / "encoder" / "encoder.json").read_text())
    (policy / "encoder" / "encoder.json").write_text(json.dumps(settings | {name: value}))
    with pytest.raises(ValueError, match=f"has a {name} of its own, which scripts do not know"):
        run_script(monkeypatch, root, "evaluate.py", f"--policy {policy} --tasks reach-red --eval-episodes 1")


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("class", {"class": "vla_rl.heads.tanh_gaussian:TanhGaussianHead"}),
        ("pooler", {"kwargs": {"pooler": "mean"}}),
        ("exploration", {"kwargs": {"exploration": "gaussian"}}),
    ],
)
def test_a_head_that_scripts_do_not_know_is_refused(sft, root, monkeypatch, name, change):
    policy = root / f"policy-{name}"
    shutil.copytree(sft, policy)
    settings = json.loads((policy / "policy.json").read_text())
    settings["head"] |= change | {"kwargs": settings["head"]["kwargs"] | change.get("kwargs", {})}
    (policy / "policy.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=f"the {name} of the head in .* is not .*, all scripts know"):
        run_script(monkeypatch, root, "evaluate.py", f"--policy {policy} --tasks reach-red --eval-episodes 1")


def test_sft_from_a_process_of_its_own_left_curves(sft, root):
    tags = scalars(root, {"run_name": sft.parent.relative_to(root / "runs")})
    assert set(tags) >= {"losses/bc_loss", "charts/learning_rate", "charts/SPS", "eval/reach-red", "eval/success_rate"}
    assert np.isfinite(tags["losses/bc_loss"][0][1])


def test_evaluate_agrees_with_the_library_on_every_episode(sft, root, monkeypatch):
    options = f"--policy {sft} --tasks reach-red --eval-episodes 7 --num-envs 4 --eval-seed 50 --out e.json"
    run = run_script(monkeypatch, root, "evaluate.py", options)
    result = evaluate(VLAPolicy.from_pretrained(sft), {"reach-red": toy_env}, episodes_per_task=7, seed=50)
    outcomes = [episode.success for episode in result.tasks["reach-red"].episodes]
    assert json.loads(Path("e.json").read_text())["tasks"]["reach-red"]["success"] == outcomes
    assert run["wilson_interval"](3, 7) == pytest.approx(wilson_interval(3, 7), abs=1e-4)
    assert run["wilson_interval"](0, 7)[0] == 0 and run["wilson_interval"](7, 7)[1] == 1
