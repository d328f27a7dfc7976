"""Stage 2 on another of two Ray nodes: the weights of a local one, what travels, where it runs, a node that dies."""

import os
import signal
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pytest
import torch
from tiny import parameters, tiny_policy, toy_store

pytest.importorskip("ray")

import ray
from ray_cluster import GatedHead, WithoutGPU, node, started, two_nodes, waiting_at

from vla_rl.data import BalancedSampler, EpisodeStore
from vla_rl.encoders import LoRASettings
from vla_rl.integrations.ray import Adaptation, Placement, share_episodes, supervised_remote
from vla_rl.integrations.ray_supervised import _Job, _supervise
from vla_rl.sl.supervised import SLConfig, SupervisedError, train_supervised

pytestmark = pytest.mark.slow

CONFIG = SLConfig(steps=5, batch_size=16, random_shift=0)
SEEDS = {"seed": 5, "data_seed": 7, "task_weights": {"reach-blue": 0.5}}
THERE = Placement(resources={"trainer": 1})


@pytest.fixture(scope="module")
def cluster():
    with two_nodes() as nodes:
        yield nodes


@pytest.fixture
def expert(tmp_path):
    return toy_store(tmp_path / "expert", ("reach-red", "reach-blue"))


@pytest.fixture
def new(tmp_path):
    """Five successes, as stage 1 finds them."""
    with EpisodeStore(toy_store(tmp_path / "new", ("reach-red",), episodes=5), mode="r") as store:
        yield list(store)


@pytest.fixture
def policies():
    """Twice the same, with LoRA."""
    policies = [tiny_policy(), tiny_policy()]
    for policy in policies:
        policy.encoder.add_lora(LoRASettings(r=2, alpha=4))
    there, here = policies
    Adaptation.of(here).apply(there)  # LoRA begins at random
    return there, here


def train_here(policy, expert, new, folder):
    """What a remote job does, in this process."""
    with EpisodeStore(folder / "found", mode="w-") as store:
        for episode in new:
            store.append(episode)
    with EpisodeStore(expert, mode="r") as first, EpisodeStore(folder / "found", mode="r") as second:
        weights = SEEDS["task_weights"]
        sampler = BalancedSampler([first, second], batch_size=16, seed=SEEDS["data_seed"], task_weights=weights)
        return train_supervised(policy, sampler, config=CONFIG, seed=SEEDS["seed"])


def assert_same_weights(one, other):
    other = parameters(other)
    assert all(torch.equal(value, other[name]) for name, value in parameters(one).items())


def size(references):
    """Bytes in the object store, by Ray's own account."""
    return sum(place["object_size"] for place in ray.experimental.get_object_locations(references).values())


def test_another_machine_gives_the_weights_of_a_local_stage_2(cluster, policies, expert, new, tmp_path):
    there, here = policies
    tiny_policy().save_pretrained(tmp_path / "base")
    start = parameters(here)
    loss = train_here(here, expert, new, tmp_path)
    base = str(tmp_path / "base")
    report = supervised_remote(there, base=base, expert=[expert], found=[new], config=CONFIG, placement=THERE, **SEEDS)
    assert_same_weights(there, here)
    changed = {name for name, value in parameters(there).items() if not torch.equal(value, start[name])}
    assert any("lora_" in name for name in changed) and any(name.startswith("head.") for name in changed)
    assert report.loss == loss and there.encoder.fingerprint == here.encoder.fingerprint
    assert report.node == next(iter(cluster.worker_nodes)).node_id


def test_only_new_episodes_travel_to_a_machine_that_has_had_the_others(cluster, policies, expert, new, tmp_path):
    policy, _ = policies
    tiny_policy().save_pretrained(tmp_path / "base")
    learned = sum(v.nbytes for k, v in parameters(policy).items() if "lora_" in k or not k.startswith("encoder."))
    pictures = [sum(array.nbytes for array in episode.observations.values()) for episode in new]
    found = share_episodes(new[:3])
    late = share_episodes(new[3:])
    kwargs = {"base": str(tmp_path / "base"), "expert": [expert], "config": CONFIG, **SEEDS}

    first = supervised_remote(policy, found=[found], placement=THERE, **kwargs)
    second = supervised_remote(policy, found=[found, late], placement=THERE, **kwargs)
    third = supervised_remote(policy, found=[found, late], placement=THERE, **kwargs)
    overhead = third.bytes_sent  # LoRA and head alone
    assert learned <= overhead < learned + 20_000
    assert first.bytes_sent - overhead == pytest.approx(size(found), abs=100)
    assert second.bytes_sent - overhead == pytest.approx(size(late), abs=100)
    assert sum(pictures[3:]) < size(late) < 1.05 * sum(pictures[3:]) + 4000
    assert first.bytes_received == second.bytes_received == learned

    head_node = Placement(resources={"node:__internal_head__": 0.01})
    here = supervised_remote(policy, found=[found, late], placement=head_node, **kwargs)
    assert here.node == ray.get_runtime_context().get_node_id()
    assert (here.bytes_sent, here.bytes_received) == (0, 0)


def test_a_job_that_needs_a_gpu_runs_where_one_is(cluster, policies, expert, new, tmp_path):
    tiny_policy().save_pretrained(tmp_path / "base")
    kwargs = {"base": str(tmp_path / "base"), "expert": [expert], "found": [new], "config": CONFIG, **SEEDS}
    for _ in range(2):  # by chance it would be the other of the two
        report = supervised_remote(policies[0], placement=WithoutGPU(num_gpus=1), **kwargs)
        assert report.node == next(iter(cluster.worker_nodes)).node_id


def test_a_job_whose_machine_dies_while_it_trains_is_run_again_on_another(cluster, policies, expert, new, tmp_path):
    """The last test: one of the nodes is gone after it."""
    there, here = policies
    base, gate = tiny_policy(), tmp_path / "gate"
    gate.mkdir()
    (gate / "closed").touch()
    base.head = GatedHead(**base.head.config(), folder=str(gate))
    base.save_pretrained(tmp_path / "base")
    started(lambda: cluster.add_node(**node(resources={"trainer": 1})))
    loss = train_here(here, expert, new, tmp_path)
    kwargs = {"base": str(tmp_path / "base"), "expert": [expert], "found": [new], "config": CONFIG, **SEEDS}
    job = ThreadPoolExecutor(1).submit(supervised_remote, there, placement=THERE, **kwargs)
    ((process, first),) = waiting_at(gate, 1).items()
    cluster.remove_node(next(n for n in cluster.worker_nodes if n.node_id == first), allow_graceful=False)
    with suppress(ProcessLookupError):
        os.kill(process, signal.SIGKILL)  # a machine takes all of its processes with it, at once
    (gate / "closed").unlink()
    report = job.result(timeout=300)
    assert set(waiting_at(gate, 2).values()) == {first, report.node} and report.node != first
    assert report.node == next(iter(cluster.worker_nodes)).node_id
    assert report.loss == loss
    assert_same_weights(there, here)


def test_weights_that_the_last_step_has_spoilt_are_not_returned(cluster, tmp_path, expert):
    policy = tiny_policy()
    policy.save_pretrained(tmp_path / "base")
    config = SLConfig(steps=1, batch_size=4, scope="head", learning_rate=1e38, weight_decay=1e38)
    job = _Job(
        str(tmp_path / "base"), (str(expert),), config, seed=0, data_seed=0, task_weights={}, device="cpu", threads=1
    )
    with pytest.raises(SupervisedError, match="trained weights are NaN or infinite after step 0"):
        _supervise(job, [ray.put(Adaptation.of(policy))], [])
