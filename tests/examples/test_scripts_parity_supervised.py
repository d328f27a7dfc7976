"""The supervised parts of the scripts that do RL too, and the library's, from the same weights, data and seeds.

The RL has a learning rate of 0, so that what the supervised part starts from is known.
"""

from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from scripts import SMALL_HEAD, run_script, scalars
from tiny import HEAD, tiny_encoder, tiny_policy

from vla_rl import EpisodeStore, FrozenVLMEncoder, GaussianHead, VLAPolicy
from vla_rl.data import BalancedSampler, Episode, compute_statistics
from vla_rl.encoders import LoRASettings
from vla_rl.sl.supervised import SLConfig, train_supervised
from vla_rl.trainer import task_weights

SEED = 3
RL = f"--num-envs 4 --seed {SEED} --dtype float32 --init-std 1.0"
PPO = f"{RL} --num-steps 48 --total-timesteps 700 --minibatch-size 256 --update-epochs 1 --learning-rate 0"


def settings(name, config):
    """A script's options for a library's configuration."""
    shared = ("steps", "batch_size", "scope", "learning_rate", "random_shift")
    options = {key: getattr(config, key) for key in shared} | {"vlm_learning_rate": config.encoder_learning_rate}
    return " ".join(f"--{name}.{key.replace('_', '-')} {value}" for key, value in options.items())


def supervised(policy, stores, config, weights=None):
    """The library's loss at every step."""
    sampler = BalancedSampler(stores, batch_size=config.batch_size, seed=SEED, task_weights=weights)
    losses = {}
    train_supervised(policy, sampler, config=config, seed=SEED, on_step=losses.__setitem__)
    return losses


def library_store(found, path):
    """The successes that a script kept, as a store of the library."""
    store = EpisodeStore(path)
    with h5py.File(Path(found) / "data" / "main_data.hdf5") as file:
        for group in (file[f"episode_{i}"] for i in range(len(file))):
            arrays = {key: group[key][()] for key in ("actions", "rewards", "terminations", "truncations")}
            arrays |= {"observations": {key: value[()] for key, value in group["observations"].items()}}
            attributes = {key: str(group.attrs[key]) for key in ("task", "instruction", "source")}
            store.append(Episode(**arrays, **attributes, success=True))
    assert len(store) > 0
    return store


def assert_same(ours, theirs, *, first_step=0):
    assert [step - first_step for step, _ in ours] == [0, 20, 40] and len(theirs) == 41
    assert ours[0][1] > 1.05 * ours[-1][1]
    np.testing.assert_allclose([value for _, value in ours], [theirs[step - first_step] for step, _ in ours], rtol=2e-3)


@pytest.fixture(scope="module")
def expert(expert_path):
    return EpisodeStore(expert_path, mode="r")


@pytest.fixture(params=["all", "lora"])
def config(request):
    """With LoRA the library keeps vision tokens, and so shifts no picture."""
    shift = 2 if request.param == "all" else 0
    shared = {"learning_rate": 1e-2, "encoder_learning_rate": 2e-3, "random_shift": shift}
    return SLConfig(steps=41, batch_size=16, scope=request.param, **shared)


@pytest.fixture
def start(config, expert, tmp_path):
    """A policy, with LoRA weights where those learn: script and library would draw them at different times."""
    policy = tiny_policy(statistics=compute_statistics([expert]))
    if config.scope == "lora":
        policy.encoder.add_lora(LoRASettings(r=2, alpha=4))
    policy.save_pretrained(tmp_path / "start")
    return tmp_path / "start"


def test_replay_after_ppo(config, start, expert, expert_path, tmp_path, monkeypatch):
    options = f"--policy {start} --demos {expert_path} --task reach-red:new --eval-episodes 0 {PPO} --scope all"
    run = run_script(monkeypatch, tmp_path, "ppo_replay_vlm.py", f"{options} {settings('replay', config)}")
    ours = scalars(tmp_path, run)["losses/bc_loss"]
    theirs = supervised(VLAPolicy.from_pretrained(start), [expert], config)
    assert_same(ours, theirs, first_step=run["global_step"])


def test_filtered_behaviour_cloning(config, start, expert, expert_path, tmp_path, monkeypatch):
    options = f"--policy {start} --demos {expert_path} --task reach-red:new --eval-episodes 0 {RL} --num-episodes 32"
    run = run_script(monkeypatch, tmp_path, "filtered_bc_vlm.py", f"{options} {settings('sl', config)}")
    found = library_store(run["found"], tmp_path / "found")
    weights = task_weights([expert], [found], rl_fraction=0.5)
    theirs = supervised(VLAPolicy.from_pretrained(start), [expert, found], config, weights)
    assert_same(scalars(tmp_path, run)["losses/bc_loss"], theirs, first_step=run["global_step"])


@pytest.mark.parametrize("name", ["ire_vla_metaworld.py", "ire_vla_franka_kitchen.py"])
def test_stages_0_and_2(name, expert, expert_path, tmp_path, monkeypatch):
    tiny_encoder().save_pretrained(tmp_path / "vlm")
    shared = {"steps": 41, "batch_size": 16, "scope": "all", "random_shift": 2}
    stages = {
        "stage0": SLConfig(learning_rate=1e-2, encoder_learning_rate=1e-3, **shared),
        "stage2": SLConfig(learning_rate=5e-3, encoder_learning_rate=1e-3, **shared),
    }
    options = " ".join(settings(stage, config) for stage, config in stages.items())
    options += (
        f" --vlm {tmp_path}/vlm --demos {expert_path} --env-id vla_rl_envs:VLA/Toy-v0 --rl-tasks reach-red:new "
        f"--unseen-tasks reach-blue:new --eval-episodes 0 {PPO} {SMALL_HEAD}"
    )
    run = run_script(monkeypatch, tmp_path, name, options)
    ours = scalars(tmp_path, run)["losses/bc_loss"]

    encoder = FrozenVLMEncoder.from_pretrained(tmp_path / "vlm", dtype=torch.float32)
    torch.manual_seed(SEED)
    head = GaussianHead(encoder.feature_dim, 2, state_dim=2, **HEAD)
    policy = VLAPolicy(encoder, head, statistics=compute_statistics([expert]))
    found = library_store(run["found"]["reach-red:new"], tmp_path / "found")
    theirs = supervised(policy, [expert], stages["stage0"])
    assert_same(ours[:3], theirs)
    weights = task_weights([expert], [found], rl_fraction=0.5)
    theirs = supervised(policy, [expert, found], stages["stage2"], weights)
    assert [step for step, _ in ours[3:]] == [41, 61, 81]
    np.testing.assert_allclose([v for _, v in ours[3:]], [theirs[step] for step in (0, 20, 40)], rtol=2e-3)
