"""What a supervised stage goes on from: whole or passed over, and never with other numbers."""

import json
import os
import shutil
import signal
import warnings

import pytest
import torch
from tiny import HEAD, differing, parameters, tiny_policy

from vla_rl.data import BalancedSampler, EpisodeStore, compute_statistics
from vla_rl.encoders import LoRASettings
from vla_rl.heads import GaussianHead
from vla_rl.preemption import PreemptedError, stop_on_sigterm
from vla_rl.sl.caches import RowCache
from vla_rl.sl.snapshots import Snapshots
from vla_rl.sl.supervised import SLConfig, SupervisedError, train_supervised

STEPS = 8


@pytest.fixture(scope="module")
def store(expert_path):
    with EpisodeStore(expert_path, mode="r") as store:
        yield store


def train(store, *, scope="head", snapshots=None, sigterm_at=None, on_policy=lambda policy: None, config=None):
    """Losses by step and weights; `sigterm_at` is the step after which SIGTERM comes."""
    policy = tiny_policy(statistics=compute_statistics([store]))
    torch.manual_seed(0)
    if scope == "lora":
        policy.encoder.add_lora(LoRASettings(r=4, alpha=8))
    on_policy(policy)
    losses = {}

    def on_step(step, loss):
        losses[step] = loss
        if step == sigterm_at:
            os.kill(os.getpid(), signal.SIGTERM)

    with stop_on_sigterm():
        train_supervised(
            policy,
            BalancedSampler([store], batch_size=12, seed=3),
            config=config or SLConfig(steps=STEPS, batch_size=12, scope=scope, random_shift=2),
            seed=5,
            on_step=on_step,
            snapshots=snapshots,
        )
    return losses, parameters(policy)


def test_a_resumed_stage_computes_frozen_rows_in_the_same_groups(store, tmp_path, monkeypatch):
    """Where a matrix product of other rows rounds differently, the numbers would differ else."""
    groups, original = [], RowCache._compute

    def record(self, missing):
        if len(missing):
            groups.append(missing.tolist())
        original(self, missing)

    monkeypatch.setattr(RowCache, "_compute", record)
    train(store)
    expected = groups.copy()
    assert len(expected) > 1 and len(expected[0]) != len(expected[1])
    with pytest.raises(PreemptedError):
        train(store, snapshots=Snapshots(tmp_path, every=0, of={}), sigterm_at=2)
    groups.clear()
    train(store, snapshots=Snapshots(tmp_path, every=0, of={}))
    assert groups == expected


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("scope", ["head", "lora", "all"])
def test_sigterm_writes_a_snapshot_and_the_stage_goes_on_with_the_same_numbers(store, tmp_path, scope):
    """Where frozen tensors are computed once, too: they are computed again in the groups of rows that they were in."""
    losses, weights = train(store, scope=scope)
    snapshots = Snapshots(tmp_path, every=0, of={})
    for sigterm_at in (1, 4):
        with pytest.raises(PreemptedError) as stopped:
            train(store, scope=scope, snapshots=snapshots, sigterm_at=sigterm_at)
        assert stopped.value.code == 143 and names(tmp_path)[-1] == f"step{sigterm_at + 2:07d}"
    torch.manual_seed(99)
    seen, resumed = train(store, scope=scope, snapshots=snapshots)
    assert seen == {step: losses[step] for step in (6, 7)}
    assert not differing(weights, resumed)


def test_the_two_newest_are_kept(store, tmp_path):
    train(store, snapshots=Snapshots(tmp_path, every=2, of={}))
    assert names(tmp_path) == ["step0000006", "step0000008"]
    assert names(tmp_path / "step0000008") == ["process00000.json", "process00000.safetensors", "state.json"]


@pytest.fixture(scope="module")
def good(store, tmp_path_factory):
    """Snapshots after 3 and 6 of 8 steps, and what the stage ends with."""
    folder = tmp_path_factory.mktemp("good") / "steps"
    losses, weights = train(store, snapshots=Snapshots(folder, every=3, of={}))
    assert names(folder) == ["step0000003", "step0000006"]
    return folder, losses, weights


def flip(path, at):
    content = bytearray(path.read_bytes())
    content[int(at * (len(content) - 1))] ^= 4
    path.write_bytes(content)


@pytest.mark.parametrize("file", ["process00000.safetensors", "process00000.json", "state.json"])
@pytest.mark.parametrize("at", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_one_flipped_bit_is_noticed_and_the_one_before_used(store, good, tmp_path, file, at):
    folder, losses, weights = good
    shutil.copytree(folder, tmp_path / "steps")
    flip(tmp_path / "steps" / "step0000006" / file, at)
    with pytest.warns(UserWarning, match="step0000006 is damaged .*; going on from .*step0000003") as told:
        seen, resumed = train(store, snapshots=Snapshots(tmp_path / "steps", every=3, of={}))
    assert len([each for each in told if "damaged" in str(each.message)]) == 1
    assert seen == {step: losses[step] for step in range(3, STEPS)} and not differing(weights, resumed)
    assert names(tmp_path / "steps") == ["step0000003", "step0000006"]
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*is damaged")
        seen, _ = train(store, snapshots=Snapshots(tmp_path / "steps", every=3, of={}))
    assert list(seen) == [6, 7], "the damaged one has been written again"


def test_where_none_is_whole_the_stage_begins_again(store, good, tmp_path):
    folder, losses, weights = good
    shutil.copytree(folder, tmp_path / "steps")
    flip(tmp_path / "steps" / "step0000006" / "process00000.safetensors", 0.5)
    (tmp_path / "steps" / "step0000003" / "state.json").unlink()
    with pytest.warns(UserWarning, match="is damaged") as told:
        seen, resumed = train(store, snapshots=Snapshots(tmp_path / "steps", every=5, of={}))
    assert [str(each.message).partition("; ")[2] for each in told if "damaged" in str(each.message)] == [
        f"going on from {tmp_path / 'steps' / 'step0000003'}",
        "going on from the beginning of the stage",
    ]
    assert seen == losses and not differing(weights, resumed)


def test_checksums_of_a_state_that_says_nonsense_do_not_help_it(store, good, tmp_path):
    from vla_rl.rundir import file_digest

    folder, losses, _ = good
    shutil.copytree(folder, tmp_path / "steps")
    newest = tmp_path / "steps" / "step0000006"
    state = json.loads((newest / "state.json").read_text()) | {"losses": "low"}
    (newest / "state.json").write_text(json.dumps(state))
    checksums = json.loads((newest / "process00000.json").read_text())
    checksums["state.json"] = file_digest(newest / "state.json")
    (newest / "process00000.json").write_text(json.dumps(checksums))
    with pytest.warns(UserWarning, match="gives losses='low', expected"):
        seen, _ = train(store, snapshots=Snapshots(tmp_path / "steps", every=3, of={}))
    assert list(seen) == list(losses)[3:]


def test_a_gradient_that_is_not_finite_stops_the_training_before_it_does_harm(store):
    before = {}

    def spoil(policy):
        before.update(parameters(policy))
        policy.head.mean.bias.register_hook(lambda gradient: gradient * float("inf"))
        spoil.policy = policy

    with pytest.raises(SupervisedError, match=r"norm of the supervised gradient is inf at step 0; lower the learning"):
        train(store, on_policy=spoil)
    assert not differing(before, parameters(spoil.policy))


@pytest.mark.parametrize("every", [0, 1])
def test_weights_that_the_last_step_spoils_are_not_given_back(store, tmp_path, every):
    config = SLConfig(steps=1, batch_size=12, scope="head", learning_rate=1e38, weight_decay=1e38)
    with pytest.raises(SupervisedError, match=r"weights are NaN or infinite after step \d, and nothing is saved"):
        train(store, config=config, snapshots=Snapshots(tmp_path / "steps", every=every, of={}))
    assert not (tmp_path / "steps").exists()


class CountingHead(GaussianHead):
    """Normalises by running statistics, which are buffers."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.mean = torch.nn.Sequential(torch.nn.BatchNorm1d(HEAD["hidden_dim"]), self.mean)


def test_buffers_that_change_in_training_are_kept(store, tmp_path):
    heads = []

    def other_head(policy):
        torch.manual_seed(0)
        policy.head = CountingHead(policy.encoder.feature_dim, 2, state_dim=2, **HEAD)
        heads.append(policy.head)

    train(store, on_policy=other_head)
    with pytest.raises(PreemptedError):
        train(store, on_policy=other_head, snapshots=Snapshots(tmp_path, every=0, of={}), sigterm_at=3)
    train(store, on_policy=other_head, snapshots=Snapshots(tmp_path, every=0, of={}))
    whole, _, resumed = (head.state_dict() for head in heads)
    assert whole["mean.0.num_batches_tracked"] == STEPS
    assert all(torch.equal(resumed[name], value) for name, value in whole.items())
