"""Rollouts through Ray: measured with a few workers on this machine, modelled for many machines.

    python benchmarks/ray_scaling.py --output benchmarks/results/ray_scaling.json

Measured: env steps per second of one local collector and of 1, 2, ... workers (each with as many environments), the
object store's throughput, the time that a new version of the head takes to reach all workers, and what the driver does
with a row. The model is `modelled` below; its assumptions are written into the file.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import ray
import torch
import tyro
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from vla_rl import GaussianHead, VLAPolicy
from vla_rl.encoders import small_vlm
from vla_rl.heads import ValueHead
from vla_rl.integrations.ray import NoiseByEnv, RayRolloutCollector, RolloutWorkers
from vla_rl.report import versions
from vla_rl.rl.ppo import PPOConfig, ppo_update
from vla_rl.rl.rollout import Rollout, RolloutCollector
from vla_rl.rundir import write_json

SENTENCES = ("reach the red square", "reach the blue square", "reach the green square")
PIXELS = 64


@dataclass
class Args:
    """Settings."""

    workers: tuple[int, ...] = (1, 2)
    """numbers of Ray workers to measure"""
    envs_per_worker: int = 8
    """environments of each"""
    rollout_steps: int = 64
    """env steps per environment and rollout"""
    repeats: int = 5
    """rollouts, after one to warm up"""
    megabytes: int = 64
    """size of the array that measures the object store"""
    network_gigabytes: float = 1.25
    """bandwidth of the driver's network in the model, in GB/s"""
    modelled_workers: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
    """numbers of workers in the model, each on cores of its own"""
    address: str | None = None
    """of a cluster to measure, such as "auto"; None starts one on this machine"""
    output: Path | None = None
    """JSON file for the figures"""


def make_policy() -> VLAPolicy:
    """Random weights in the size of the Meta-World demo: 3.6 million in the VLM, the usual head."""
    encoder = small_vlm(SENTENCES, image_size=PIXELS, dtype=torch.bfloat16)
    torch.manual_seed(0)
    return VLAPolicy(encoder, GaussianHead(encoder.feature_dim, 2, state_dim=2))


def make_envs(count: int) -> gym.vector.VectorEnv:
    """Toy environments with pictures of that size."""
    make = partial(gym.make, "vla_rl_envs:VLA/Toy-v0", image_size=PIXELS)
    return SyncVectorEnv([make] * count, autoreset_mode=AutoresetMode.NEXT_STEP)


def seconds_of(work: Callable[[], Any], repeats: int) -> list[float]:
    """Wall-clock seconds of each repeat after a first one that does not count."""
    found = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        work()
        found.append(time.perf_counter() - start)
    return found[1:]


def speed(collector: RolloutCollector, critic: ValueHead, args: Args) -> tuple[dict[str, Any], Rollout]:
    """Env steps per second of whole rollouts, and where the workers' time went."""
    collector.start_exploration()
    rollouts: list[Rollout] = []

    def work() -> None:
        rollouts[:] = [collector.collect(args.rollout_steps, critic, gamma=0.99, gae_lambda=0.95)]

    seconds = seconds_of(work, args.repeats)
    rows = rollouts[0].rewards.numel()
    return {
        "env_steps_per_second": rows / statistics.median(seconds),
        "seconds_per_rollout": seconds,
        "rows": rows,
        "encode_fraction": collector.watch.seconds["encode"] / max(collector.watch.total, 1e-9),
    }, rollouts[0]


def store_throughput(megabytes: int, repeats: int) -> dict[str, float]:
    """Seconds for a worker to hand over an array of float16 features, and MB/s."""
    make: Any = ray.remote(lambda size: np.ones(size, np.float16))
    seconds = seconds_of(lambda: np.array(ray.get(make.remote(megabytes * 500_000))), repeats)
    return {"megabytes": megabytes, "megabytes_per_second": megabytes / statistics.median(seconds)}


def broadcast_seconds(collector: RayRolloutCollector, repeats: int) -> dict[str, float]:
    """Seconds of a request that does next to nothing, with the head as it was and with a new version of it."""

    def changed() -> None:
        with torch.no_grad():
            collector.policy.head.log_std.add_(1e-6)
        collector.redraw_noise()

    same = statistics.median(seconds_of(collector.redraw_noise, repeats))
    new = statistics.median(seconds_of(changed, repeats))
    size = sum(value.nbytes for value in collector.policy.head.state_dict().values())
    return {"request_seconds": same, "request_with_new_head_seconds": new, "head_bytes": size}


def driver_seconds_per_row(policy: VLAPolicy, critic: ValueHead, rollout: Rollout, repeats: int) -> float:
    """Seconds of a PPO update with default settings, per row."""
    config = PPOConfig(target_kl=None, learning_rate=0.0)
    optimizer = torch.optim.Adam([*policy.head.parameters(), *critic.parameters()], lr=0.0)
    work = partial(ppo_update, policy, critic, optimizer, rollout, config=config)
    return statistics.median(seconds_of(work, repeats)) / rollout.rewards.numel()


def modelled(
    workers: int, *, rows_per_worker: int, worker_seconds: float, row_bytes: float, driver_seconds: float, args: Args
) -> dict[str, float]:
    """One iteration of stage 1 with `workers` on cores of their own, the driver on another machine.

    Workers collect side by side; their rows come in through one network; driver and workers wait for each other.

    Args:
        workers: number of workers.
        rows_per_worker: rows that each collects in an iteration.
        worker_seconds: that it takes for them.
        row_bytes: what travels per row.
        driver_seconds: per row, for the update.
        args: bandwidth.
    """
    rows = workers * rows_per_worker
    transfer = rows * row_bytes / (args.network_gigabytes * 1e9)
    update = rows * driver_seconds
    total = worker_seconds + transfer + update
    return {
        "workers": workers,
        "rollout_steps_per_second": rows / (worker_seconds + transfer),
        "iteration_steps_per_second": rows / total,
        "update_fraction": update / total,
        "transfer_fraction": transfer / total,
    }


def main(args: Args) -> None:
    """Measure."""
    torch.set_num_threads(1)
    policy = make_policy()
    critic = ValueHead(policy.encoder.feature_dim, state_dim=2)
    local = RolloutCollector(
        policy,
        make_envs(args.envs_per_worker),
        task="toy",
        draw_noise=NoiseByEnv(policy.head, seed=0),
        on_episode=lambda episode: None,
    )
    measured_local, rollout = speed(local, critic, args)
    driver = driver_seconds_per_row(policy, critic, rollout, args.repeats)
    print(f"local: {measured_local['env_steps_per_second']:.0f} env steps/s, update {1e6 * driver:.0f} us per row")
    ray.init(args.address, num_cpus=None if args.address else max(args.workers), log_to_driver=False)
    store = store_throughput(args.megabytes, args.repeats)
    by_workers, broadcast = {}, {}
    for count in args.workers:
        with RolloutWorkers(
            policy, make_envs, num_envs=count * args.envs_per_worker, num_workers=count, max_restarts=0
        ) as workers:
            collector = RayRolloutCollector(policy, workers, task="toy", on_episode=lambda episode: None)
            by_workers[count], _ = speed(collector, critic, args)
            broadcast[count] = broadcast_seconds(collector, args.repeats)
        print(f"{count} workers: {by_workers[count]['env_steps_per_second']:.0f} env steps/s", flush=True)
    ray.shutdown()
    one = by_workers[min(args.workers)]
    pictures = PIXELS * PIXELS * 3
    row_bytes = rollout.tokens[0].nbytes + pictures + 64
    table = [
        modelled(
            count,
            rows_per_worker=one["rows"] // min(args.workers),
            worker_seconds=statistics.median(one["seconds_per_rollout"]),
            row_bytes=row_bytes,
            driver_seconds=driver,
            args=args,
        )
        for count in args.modelled_workers
    ]
    figures = {
        "command": "python benchmarks/ray_scaling.py",
        "settings": {key: value for key, value in asdict(args).items() if key != "output"},
        "n": args.repeats,
        "measured": {
            "local": measured_local,
            "workers": by_workers,
            "object_store": store,
            "broadcast": broadcast,
            "update_seconds_per_row": driver,
            "row_bytes": row_bytes,
        },
        "modelled": table,
        "assumptions": [
            "every worker has cores of its own and is as fast as the one that was measured, with its store and driver",
            f"all rows (features and pictures) enter the driver through {args.network_gigabytes} GB/s after it",
            "the driver updates on one core with the default PPO settings while the workers wait",
            "no worker is slower than another; broadcasting the head costs nothing",
        ],
        "versions": versions(),
    }
    if args.output is not None:
        write_json(args.output, figures)


if __name__ == "__main__":
    main(tyro.cli(Args))
