"""Two Ray nodes on this machine: rollouts there give what they give here, whatever dies on the way."""

import os
import runpy
import signal
from functools import partial
from pathlib import Path

import pytest
import torch
from tiny import differing, parameters, tiny_policy, toy_env

pytest.importorskip("ray")

from ray_cluster import HORIZON, WithoutGPU, gated_envs, toy_envs, two_nodes, waiting_at

from vla_rl.heads.value import ValueHead
from vla_rl.integrations import ray_workers
from vla_rl.integrations.ray import NoiseByEnv, RayRolloutCollector, RolloutWorkers, WorkerLossError
from vla_rl.rl.ppo import PPOConfig
from vla_rl.rl.rollout import RolloutCollector
from vla_rl.rl.stage1 import run_ppo
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


def counted(*, replaced=0, dropped=0, refused=0):
    """What the log says of these."""
    numbers = {"replaced_workers": replaced, "dropped_episodes": dropped, "refused_rollouts": refused}
    return {f"charts/{name}": number for name, number in numbers.items()}


def where(pool):
    """Nodes, numbers of GPUs and devices of a pool's workers, as they see it themselves."""

    def look(worker):
        context = ray_workers.ray.get_runtime_context()
        return context.get_node_id(), len(context.get_accelerator_ids()["GPU"]), worker.policy.device.type

    nodes, gpus, devices = zip(*ray_workers.ray.get([a.__ray_call__.remote(look) for a in pool._actors]), strict=True)
    return set(nodes), sum(gpus), set(devices)


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
    results, learned, logs = [], [], []
    for make_collector, env in ((RayRolloutCollector, workers), (local_collector, local_env())):
        policy = tiny_policy(init_std=1.0)
        torch.manual_seed(1)
        log = []
        kwargs = {"task": "toy", "config": config, "seed": SEED, "log": lambda metrics, _, log=log: log.append(metrics)}
        results.append(run_ppo(policy, env, make_collector=make_collector, **kwargs))
        logs.append(log)
        learned.append(parameters(policy.head))
    there, here = results
    assert all(torch.equal(value, learned[1][name]) for name, value in learned[0].items())
    assert not torch.equal(learned[0]["mean.weight"], tiny_policy(init_std=1.0).head.mean.weight)
    assert (there.num_env_steps, there.num_episodes) == (here.num_env_steps, here.num_episodes)
    assert (there.num_vlm_frames, there.last_success_rate) == (here.num_vlm_frames, here.last_success_rate)
    assert len(there.successes) == len(here.successes)
    more = counted(refused=workers.refused_rollouts)
    assert len(logs[0]) == len(logs[1]) > 1 and logs[0][-1].keys() == logs[1][-1].keys() | more.keys()
    assert more.items() <= logs[0][-1].items()


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
    assert collector.counters == counted(refused=refused + 2)
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
    RayRolloutCollector(tiny_policy(), workers, task="toy")  # all of them have forgotten the other


def test_workers_that_die_or_hang_are_replaced_and_counted(cluster, policy, critic, tmp_path):
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

        pool.timeout = 8.0
        (tmp_path / "hang").touch()
        rollout = collector.collect(4, critic, **GAE)
        assert rollout.rewards.shape == (4, NUM_ENVS) and rollout.valid.any(0).all()
        assert collector.counters == counted(replaced=2, dropped=NUM_ENVS)
        (hanging,) = tmp_path.glob("hanging.*")
        assert not Path("/proc", hanging.suffix[1:]).exists(), "the one that hung has been killed"
        pool.timeout = None

        pool.max_restarts = pool.num_restarts
        ray_workers.ray.kill(pool._actors[0])
        with pytest.raises(WorkerLossError, match="raise max_restarts"):
            collector.collect(4, critic, **GAE)


def test_workers_that_need_a_gpu_are_where_one_is(cluster, workers, policy):
    """The second node says that it has one."""
    RayRolloutCollector(tiny_policy(init_std=1.0), workers, task="toy", seed=SEED)
    second = next(iter(cluster.worker_nodes)).node_id
    nodes, gpus, _ = where(workers)
    assert second in nodes and len(nodes) == 2 and gpus == 0, "one worker on each node"
    with RolloutWorkers(
        policy, toy_envs, num_envs=4, num_workers=2, placement=WithoutGPU(num_cpus=0.5, num_gpus=0.5)
    ) as pool:
        RayRolloutCollector(policy, pool, task="toy", seed=SEED)
        assert where(pool) == ({second}, 2, {"cpu"}), "half of it each"


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
