"""Two Ray nodes on this machine: rollouts and stage 2 there give what they give here, whatever dies on the way."""

import os
import runpy
import signal
from functools import partial
from pathlib import Path

import pytest
import torch
from tiny import differing, parameters, tiny_policy, toy_env, toy_store

pytest.importorskip("ray")

from ray_cluster import HORIZON, gated_envs, toy_envs, two_nodes, waiting_at

from vla_rl.data import BalancedSampler, EpisodeStore
from vla_rl.encoders import LoRASettings
from vla_rl.heads.value import ValueHead
from vla_rl.integrations import ray_workers
from vla_rl.integrations.ray import (
    Adaptation,
    NoiseByEnv,
    Placement,
    RayRolloutCollector,
    RolloutWorkers,
    WorkerLossError,
    share_episodes,
    supervised_remote,
)
from vla_rl.rl.ppo import PPOConfig
from vla_rl.rl.rollout import RolloutCollector
from vla_rl.rl.stage1 import run_ppo
from vla_rl.sl.supervised import SLConfig, train_supervised
from vla_rl.vector import WorkerVectorEnv

pytestmark = pytest.mark.slow

NUM_ENVS, SEED = 8, 3
EXAMPLE = Path(__file__).parents[2] / "examples" / "integrations" / "ray_stage1.py"
GAE = {"gamma": 0.9, "gae_lambda": 0.8}
ROWS = (
    "tokens",
    "mask",
    "state",
    "actions",
    "rewards",
    "terminated",
    "done",
    "valid",
    "log_probs",
    "values",
    "returns",
)


@pytest.fixture(scope="module")
def cluster():
    with two_nodes() as nodes:
        yield nodes


@pytest.fixture(scope="module")
def workers(cluster):
    with RolloutWorkers(tiny_policy(init_std=1.0), toy_envs, num_envs=NUM_ENVS, num_workers=2) as pool:
        yield pool


@pytest.fixture
def critic(policy):
    torch.manual_seed(0)
    return ValueHead(policy.encoder.feature_dim, state_dim=2, width=16, num_queries=2, hidden_dim=16)


def local_env():
    """The same environments in one process; the two halves go through the model apart, as the workers' do."""
    return WorkerVectorEnv([partial(toy_env, "reach-red", horizon=HORIZON)] * NUM_ENVS, num_workers=0)


def local_collector(policy, env, *, seed, **kwargs):
    return RolloutCollector(policy, env, seed=seed, draw_noise=NoiseByEnv(policy.head, seed=seed), **kwargs)


def assert_same_rollout(one, other):
    for name in ROWS:
        assert torch.equal(getattr(one, name), getattr(other, name)), name
    assert one.fingerprint == other.fingerprint and (one.task_id == other.task_id).all()


def assert_same_episodes(some, others):
    assert len(some) == len(others) > 4
    for one, other in zip(some, others, strict=True):
        assert all((one.observations[key] == other.observations[key]).all() for key in other.observations)
        assert (one.actions == other.actions).all() and (one.rewards == other.rewards).all()
        assert (one.success, one.task, one.iteration) == (other.success, other.task, other.iteration)


def test_rollouts_and_episodes_are_those_of_a_local_collector(workers, critic):
    there, here = tiny_policy(init_std=1.0), tiny_policy(init_std=1.0)
    episodes_there, episodes_here = [], []
    kwargs = {"task": "toy", "seed": SEED, "iteration": 2}
    remote = RayRolloutCollector(there, workers, on_episode=episodes_there.append, **kwargs)
    local = local_collector(here, local_env(), on_episode=episodes_here.append, **kwargs)
    for policy, collector in ((there, remote), (here, local)):
        collector.start_exploration()
        for _ in range(2):
            with torch.no_grad():
                policy.head.mean.bias += 0.1
            collector.rollout = collector.collect(10, critic, **GAE)
    assert_same_rollout(remote.rollout, local.rollout)
    for collector in (remote, local):
        collector.collect_episodes(NUM_ENVS + 1)
        collector.rollout = collector.collect(3, critic, **GAE)
    assert_same_rollout(remote.rollout, local.rollout)
    assert_same_episodes(episodes_there, episodes_here)
    assert episodes_there[0].actions.flags.writeable, "a view of the object store would keep the rollout in memory"
    assert remote.num_env_steps == local.num_env_steps and remote.recent_length == local.recent_length
    assert remote.running_lengths == local.running_lengths
    assert there.encoder.num_frames == here.encoder.num_frames


def test_stage_1_learns_the_same_weights(workers):
    config = PPOConfig(
        total_timesteps=300, rollout_steps=20, minibatch_size=64, update_epochs=2, critic_warmup_updates=1
    )
    results, learned = [], []
    for make_collector, env in ((RayRolloutCollector, workers), (local_collector, local_env())):
        policy = tiny_policy(init_std=1.0)
        torch.manual_seed(1)
        results.append(run_ppo(policy, env, task="toy", config=config, seed=SEED, make_collector=make_collector))
        learned.append(parameters(policy.head))
    there, here = results
    assert all(torch.equal(value, learned[1][name]) for name, value in learned[0].items())
    assert not torch.equal(learned[0]["mean.weight"], tiny_policy(init_std=1.0).head.mean.weight)
    assert (there.num_env_steps, there.num_episodes) == (here.num_env_steps, here.num_episodes)
    assert (there.num_vlm_frames, there.last_success_rate) == (here.num_vlm_frames, here.last_success_rate)
    assert len(there.successes) == len(here.successes)


def test_a_rollout_of_an_older_head_is_refused_and_counted(workers, critic):
    policy = tiny_policy(init_std=1e-3)
    collector = RayRolloutCollector(policy, workers, task="toy", seed=SEED)
    collector.start_exploration()
    refused = workers.refused_rollouts

    collector.ask(4)
    collector.collect(4, critic, **GAE)  # the head is the same
    assert workers.refused_rollouts == refused

    collector.ask(4)
    with torch.no_grad():
        policy.head.mean.bias += 1.0
    rollout = collector.collect(4, critic, **GAE)
    assert workers.refused_rollouts == refused + 2
    rows = rollout.valid_rows
    with torch.no_grad():
        mean = policy.head.predict(rollout.features(rows), rollout.states(rows))
    torch.testing.assert_close(rollout.flat_actions[rows], mean, atol=0.05, rtol=0)


def test_the_example_trains_the_head(workers):
    example = runpy.run_path(str(EXAMPLE), run_name="ray_stage1")
    policy = tiny_policy(init_std=1.0)
    ppo = PPOConfig(total_timesteps=300, rollout_steps=20, minibatch_size=64, update_epochs=1, critic_warmup_updates=1)
    assert example["train"](policy, workers, example["Args"](ppo=ppo)).num_episodes > 20
    assert differing(parameters(policy.head), parameters(tiny_policy(init_std=1.0).head)) == set(
        parameters(policy.head)
    )
    assert differing(parameters(policy.encoder), parameters(tiny_policy().encoder)) == set()


def test_a_worker_with_another_vlm_is_refused(workers):
    with pytest.raises(ValueError, match=r"VLMs below LoRA differ"):
        RayRolloutCollector(tiny_policy(seed=1), workers, task="toy")


def test_workers_that_die_or_hang_are_replaced_and_counted(cluster, policy, critic, tmp_path, monkeypatch):
    (tmp_path / "closed").touch()
    with RolloutWorkers(policy, partial(gated_envs, folder=tmp_path), num_envs=NUM_ENVS, num_workers=2) as pool:
        collector = RayRolloutCollector(policy, pool, task="toy", seed=SEED)
        collector.ask(10)
        first, _ = waiting_at(tmp_path, 2)
        os.kill(first, signal.SIGKILL)
        (tmp_path / "closed").unlink()
        rollout = collector.collect(10, critic, **GAE)
        assert (pool.num_restarts, pool.dropped_episodes, pool.refused_rollouts) == (1, NUM_ENVS // 2, 0)
        undisturbed = local_collector(policy, local_env(), task="toy", seed=SEED).collect(10, critic, **GAE)
        halves = [
            torch.equal(*(r.actions[:, rows] for r in (rollout, undisturbed))) for rows in (slice(4), slice(4, 8))
        ]
        assert sorted(halves) == [False, True], "one worker went on as if nothing had been, the other began anew"
        assert torch.isfinite(rollout.returns).all()

        wait, silent = ray_workers.ray.wait, [True]
        monkeypatch.setattr(
            ray_workers.ray, "wait", lambda refs, **kw: ([], refs) if silent and silent.pop() else wait(refs, **kw)
        )
        pool.timeout = 600.0
        assert collector.collect(4, critic, **GAE).rewards.shape == (4, NUM_ENVS)
        assert (pool.num_restarts, pool.dropped_episodes) == (3, NUM_ENVS // 2 + NUM_ENVS)

        pool.max_restarts = pool.num_restarts
        ray_workers.ray.kill(pool._actors[0])
        with pytest.raises(WorkerLossError, match="raise max_restarts"):
            collector.collect(4, critic, **GAE)


def test_stage_2_on_another_machine_gives_the_weights_of_a_local_one(cluster, tmp_path):
    tiny_policy().save_pretrained(tmp_path / "base")
    expert = toy_store(tmp_path / "expert", ("reach-red", "reach-blue"))
    new = toy_store(tmp_path / "new", ("reach-red",), episodes=2)
    config = SLConfig(steps=5, batch_size=16, random_shift=0)
    policies = []
    for _ in range(2):
        policies.append(tiny_policy())
        policies[-1].encoder.add_lora(LoRASettings(r=2, alpha=4))
    there, here = policies
    Adaptation.of(here).apply(there)  # LoRA begins at random
    start = parameters(here)

    stores = [EpisodeStore(path, mode="r") for path in (expert, new)]
    weights = {"reach-blue": 0.5}
    sampler = BalancedSampler(stores, batch_size=config.batch_size, seed=7, task_weights=weights)
    loss = train_supervised(here, sampler, config=config, seed=5)
    report = supervised_remote(
        there,
        base=str(tmp_path / "base"),
        expert=[expert],
        found=[share_episodes(stores[1])],
        config=config,
        seed=5,
        data_seed=7,
        task_weights=weights,
        placement=Placement(resources={"trainer": 1}),
    )
    after, expected = parameters(there), parameters(here)
    assert all(torch.equal(value, expected[name]) for name, value in after.items())
    changed = {name for name, value in after.items() if not torch.equal(value, start[name])}
    assert any("lora_" in name for name in changed) and any(name.startswith("head.") for name in changed)
    assert report.loss == loss and there.encoder.fingerprint == here.encoder.fingerprint
    pictures = sum(e.observations[k].nbytes for e in stores[1] for k in e.observations) + 8 * stores[1].total_steps
    learned = [value.nbytes for name, value in after.items() if "lora_" in name or not name.startswith("encoder.")]
    assert (report.bytes_sent, report.bytes_received) == (sum(learned) + pictures, sum(learned))


def test_a_machine_lost_in_the_middle_of_a_rollout(cluster, policy, critic, tmp_path):
    """The last test: the second node is gone after it."""
    (tmp_path / "closed").touch()
    with RolloutWorkers(policy, partial(gated_envs, folder=tmp_path), num_envs=NUM_ENVS, num_workers=2) as pool:
        collector = RayRolloutCollector(policy, pool, task="toy", seed=SEED)
        collector.ask(6)
        assert len(set(waiting_at(tmp_path, 2).values())) == 2, "one worker on each node"
        cluster.remove_node(next(iter(cluster.worker_nodes)), allow_graceful=False)
        (tmp_path / "closed").unlink()
        rollout = collector.collect(6, critic, **GAE)
        assert rollout.rewards.shape == (6, NUM_ENVS) and rollout.valid.all()
        assert (pool.num_restarts, pool.dropped_episodes) == (1, NUM_ENVS // 2)
