"""End-to-end env steps/s against each side alone and a plain AsyncVectorEnv: ``python benchmarks/stepping.py``.

The methods are measured in turn, several rounds of each, so that a machine busy with other work slows all of them
alike; the medians over the rounds are reported. The CPU time per env step of either side alone gives the bound that the
hardware sets: simulating and encoding share C cores, so no order of work gives more than
``C / (simulate + encode)`` env steps per second, nor more than ``workers / simulate`` or ``1 / encode`` (one thread).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("LP_NUM_THREADS", "0")  # AsyncVectorEnv's workers inherit it; WorkerVectorEnv sets it itself

import gymnasium as gym
import numpy as np
import torch
from gymnasium.vector import AsyncVectorEnv, VectorEnv

from vla_rl.encoders import small_vlm
from vla_rl.heads import GaussianHead
from vla_rl.heads.value import ValueHead
from vla_rl.policy import VLAPolicy
from vla_rl.rl.rollout import RolloutCollector
from vla_rl.vector import WorkerVectorEnv

OUTPUT = Path(__file__).parent / "results" / "stepping.json"
TASK = "drawer-open"
PLAIN = "AsyncVectorEnv, default rendering, lockstep"


@dataclass
class Cost:
    """One measurement.

    Attributes:
        steps: env steps.
        wall: seconds.
        simulate: CPU seconds of the workers.
        encode: CPU seconds of this process.
    """

    steps: int
    wall: float
    simulate: float
    encode: float


def make_env(quality: str) -> gym.Env:
    """The environment of every measurement."""
    return gym.make("vla_rl_envs:VLA/MetaWorld-v0", task=TASK, image_size=64, render_quality=quality)


def make_policy() -> VLAPolicy:
    """The demo's policy: small VLM in bfloat16, gSDE head with proprioception."""
    env = make_env("none")
    encoder = small_vlm(env.get_wrapper_attr("instructions"), image_size=64, dtype=torch.bfloat16)
    return VLAPolicy(encoder, GaussianHead(encoder.feature_dim, 4, state_dim=4))


def worker_cpu_seconds(pids: Sequence[int]) -> float:
    """CPU seconds that processes have used so far, from ``/proc``; nan where there is none."""
    ticks = 0
    for pid in pids:
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
        except FileNotFoundError:
            return float("nan")
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


@dataclass
class Method:
    """What is measured: `run` takes what `prepare` returned, untimed, and returns its number of env steps."""

    prepare: Callable[[], Any]
    run: Callable[[Any], int]
    pids: Sequence[int] = ()

    def measure(self) -> Cost:
        """Run once."""
        prepared = self.prepare()
        workers, cpu, wall = worker_cpu_seconds(self.pids), time.process_time(), time.perf_counter()
        steps = self.run(prepared)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        return Cost(steps, wall, worker_cpu_seconds(self.pids) - workers, cpu)


def simulate_alone(env: VectorEnv, steps: int, reset: Any) -> int:
    """Simulate and render without a policy."""
    actions = np.random.default_rng(0).uniform(-1, 1, (env.num_envs, 4)).astype(np.float32)
    for _ in range(steps):
        env.step(actions)
    return steps * env.num_envs


def encode_alone(policy: VLAPolicy, batch: int, steps: int, obs: dict[str, np.ndarray]) -> int:
    """Encode and act on the same observations again and again, `batch` rows at a time."""
    parts = [
        {key: value[rows] for key, value in obs.items()} for rows in np.arange(len(obs["state"])).reshape(-1, batch)
    ]
    noise = policy.head.draw_noise(batch)
    for _ in range(steps):
        for part in parts:
            policy.act(part, ["open the drawer"] * batch, deterministic=False, noise=noise)
    return steps * len(obs["state"])


def collect(critic: ValueHead, steps: int, collector: RolloutCollector) -> int:
    """End to end, as stage 1 does it, advantages included."""
    collector.collect(steps, critic, gamma=0.99, gae_lambda=0.95)
    return collector.num_env_steps


def lockstep(env: VectorEnv, policy: VLAPolicy, steps: int, reset: tuple[dict[str, np.ndarray], Any]) -> int:
    """Encode, act, step, one after the other, as plain code does."""
    obs, _ = reset
    noise = policy.head.draw_noise(env.num_envs)
    for _ in range(steps):
        actions = policy.act(obs, ["open the drawer"] * env.num_envs, deterministic=False, noise=noise)
        obs = env.step(actions)[0]
    return steps * env.num_envs


def summary(costs: Sequence[Cost]) -> dict[str, Any]:
    """Medians over the rounds."""
    return {
        "env_steps_per_second": statistics.median(c.steps / c.wall for c in costs),
        "simulate_cpu_ms_per_step": 1e3 * statistics.median(c.simulate / c.steps for c in costs),
        "encode_cpu_ms_per_step": 1e3 * statistics.median(c.encode / c.steps for c in costs),
        "rounds": [asdict(cost) for cost in costs],
    }


def main() -> None:
    """Measure, print a table and write ``benchmarks/results/stepping.json``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--num-envs", type=int, default=32)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4], help="the default of the library is 2")
    parser.add_argument("--plain-envs", type=int, default=8, help="of AsyncVectorEnv, one process and 0.5 GB each")
    parser.add_argument("--steps", type=int, default=160, help="vector steps per measurement, more than one episode")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    policy = make_policy()
    critic = ValueHead(policy.encoder.feature_dim, state_dim=4)

    methods: dict[str, Method] = {}
    envs: list[VectorEnv] = []
    for workers in args.workers:
        env = WorkerVectorEnv([partial(make_env, "fast")] * args.num_envs, num_workers=workers)
        envs.append(env)
        pids = [process.process.pid for process in env._processes if process.process.pid]
        reset = partial(env.reset, seed=0)
        methods[f"simulate alone, {workers} workers"] = Method(reset, partial(simulate_alone, env, args.steps), pids)
        methods[f"lockstep, {workers} workers"] = Method(reset, partial(lockstep, env, policy, args.steps), pids)
        collector = partial(RolloutCollector, policy, env, task=TASK)
        methods[f"ours, {workers} workers"] = Method(collector, partial(collect, critic, args.steps), pids)
    encode = partial(encode_alone, policy, args.num_envs // 2, args.steps)
    methods["encode alone"] = Method(lambda: envs[0].reset(seed=0)[0], encode)
    plain = AsyncVectorEnv([partial(make_env, "full")] * args.plain_envs, context="spawn")
    envs.append(plain)
    pids = [process.pid for process in plain.processes if process.pid]
    run = partial(lockstep, plain, policy, max(args.steps // 8, 2))
    methods[PLAIN] = Method(partial(plain.reset, seed=0), run, pids)

    costs: dict[str, list[Cost]] = {name: [] for name in methods}
    for round_ in range(args.rounds + 1):
        for name, method in methods.items():
            cost = method.measure()
            if round_:  # the first builds renderers and warms up
                costs[name].append(cost)
    for env in envs:
        env.close()

    results = {name: summary(each) for name, each in costs.items()}
    report(results, args.workers)
    record = {
        "command": "python benchmarks/stepping.py",
        "settings": {**{k: v for k, v in vars(args).items() if k != "output"}, "task": TASK, "image_size": 64},
        "cores": os.cpu_count(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "gymnasium": gym.__version__},
        "results": results,
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(record, indent=1) + "\n")


def report(results: dict[str, dict[str, Any]], workers: Sequence[int]) -> None:
    """Print the table and, for every number of workers, the ratios; the ratios are added to the results."""
    print(f"{'':45s} {'steps/s':>8s} {'simulate':>9s} {'encode':>9s}  (CPU ms per env step)")
    for name, row in results.items():
        cpu = f"{row['simulate_cpu_ms_per_step']:9.2f} {row['encode_cpu_ms_per_step']:9.2f}"
        print(f"{name:45s} {row['env_steps_per_second']:8.1f} {cpu}")
    speed = {name: row["env_steps_per_second"] for name, row in results.items()}
    for count in workers:
        ours = results[f"ours, {count} workers"]
        slower = min(speed[f"simulate alone, {count} workers"], speed["encode alone"])
        simulate = results[f"simulate alone, {count} workers"]["simulate_cpu_ms_per_step"]
        encode = results["encode alone"]["encode_cpu_ms_per_step"]
        bound = min((os.cpu_count() or 1) / (simulate + encode), count / simulate, 1 / encode) * 1e3
        ours["of_the_slower_side_alone"] = ours["env_steps_per_second"] / slower
        ours["bound_env_steps_per_second"] = bound
        ours["of_the_bound"] = ours["env_steps_per_second"] / bound
        ours["times_plain"] = ours["env_steps_per_second"] / speed[PLAIN]
        print(
            f"{count} workers: {ours['of_the_slower_side_alone']:.0%} of the slower side alone; the CPU bound is "
            f"{bound:.0f} steps/s, of which {ours['of_the_bound']:.0%}; {ours['times_plain']:.1f}x AsyncVectorEnv"
        )


if __name__ == "__main__":
    main()
