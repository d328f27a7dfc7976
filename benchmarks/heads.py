"""Every action head by supervised learning, then by PPO, on the toy env: ``python benchmarks/heads.py``.

For each head and seed: a fresh tiny VLM and head learn twenty demonstrations of reaching a red square that always lies
in one place (stage 0, VLM included); then the VLM is frozen and PPO trains the head on the square elsewhere and in
another shade (stage 1). Success is the deterministic policy's on the same 100 resets for every head. Finished
combinations are kept in the output file, so a killed run continues.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium.vector import AutoresetMode
from vla_rl_envs.toy import TOY_TASKS, ToyEnv

from vla_rl.chunks import ChunkActions, EnsembleActions, chunk_statistics
from vla_rl.collect import run_expert
from vla_rl.data import BalancedSampler, EpisodeStore, Statistics, compute_statistics
from vla_rl.encoders import small_vlm
from vla_rl.evaluation import evaluate
from vla_rl.heads import (
    ActionHead,
    ChunkedHead,
    FlowHead,
    GaussianHead,
    ResidualHead,
    TanhGaussianHead,
    TokenHead,
    unit_box,
)
from vla_rl.intervals import wilson_interval
from vla_rl.policy import VLAPolicy
from vla_rl.rl.ppo import PPOConfig
from vla_rl.rl.stage1 import run_ppo
from vla_rl.sl.supervised import SLConfig, train_supervised
from vla_rl.vector import WorkerVectorEnv

OUTPUT = Path(__file__).parent / "results" / "heads.json"
PLACES = {"original": (0.4, 0.4), "new": (0.1, 0.4)}
SEEDS = (0, 1, 2)
EPISODES, EVAL_SEED = 100, 10_000
DEMONSTRATIONS = 20
GAMMA, ENV_STEPS, CHUNK = 0.9, 40_000, 4
SIZES: dict[str, Any] = {"state_dim": 2, "width": 16, "num_queries": 2, "hidden_dim": 16}


class FixedToy(ToyEnv):
    """``VLA/Toy-v0`` with the squares always in the same places: twenty demonstrations are enough to learn them."""

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[dict, dict]:
        """Place the dot anywhere but near the red square."""
        _, info = super().reset(seed=seed, options=options)
        self._squares = np.array([PLACES[self.variant], (-0.8, -0.8), (0.8, -0.8)])
        while True:
            self.position = self.np_random.uniform(-0.9, 0.9, 2)
            if np.linalg.norm(self.position - self.target) > 0.3:
                return self._observe(), info


@dataclass(frozen=True)
class Entry:
    """One row of the table.

    Attributes:
        head: (feature_dim, action_dim, statistics of one step) -> head.
        chunk: H.
        sft_steps: gradient steps of stage 0.
        residual: whether a ``ResidualHead`` takes the head's place for stage 1, and with what.
    """

    head: Callable[[int, int, Statistics], ActionHead]
    chunk: int = 1
    sft_steps: int = 150
    residual: dict[str, Any] | None = None


def _gaussian(dim: int, actions: int, _: Statistics, **kwargs: Any) -> ActionHead:
    return GaussianHead(dim, actions, **SIZES, init_std=0.5, **kwargs)


def _tanh(dim: int, actions: int, statistics: Statistics) -> ActionHead:
    return TanhGaussianHead(dim, actions, **unit_box(statistics, margin=0.1), **SIZES, init_std=0.5)


def _chunked(dim: int, actions: int, _: Statistics) -> ActionHead:
    return ChunkedHead(dim, actions, chunk=CHUNK, **SIZES, init_std=0.5)


def _token(dim: int, actions: int, statistics: Statistics) -> ActionHead:
    return TokenHead(dim, actions, bins=256, **unit_box(statistics), **{**SIZES, "hidden_dim": 64})


def _flow(dim: int, actions: int, _: Statistics) -> ActionHead:
    return FlowHead(dim, actions, **{**SIZES, "hidden_dim": 64}, init_std=0.3)


ENTRIES = {
    "GaussianHead": Entry(_gaussian),
    "TanhGaussianHead": Entry(_tanh),
    "ChunkedHead": Entry(_chunked, chunk=CHUNK),
    "TokenHead": Entry(_token, sft_steps=500),
    "FlowHead": Entry(_flow),
    "ResidualHead, scale 1": Entry(_gaussian, residual={"scale": 1.0, "init_std": 0.5}),
    "ResidualHead, scale 2": Entry(_gaussian, residual={"scale": 2.0, "init_std": 0.5}),
    "GaussianHead, mean": Entry(partial(_gaussian, pooler="mean")),
    "GaussianHead, last": Entry(partial(_gaussian, pooler="last")),
    "GaussianHead, rl_token": Entry(partial(_gaussian, pooler="rl_token")),
}


def make_env(variant: str, *, chunk: int = 1, gamma: float = 1.0, ensemble: bool = False) -> gym.Env:
    """The env, in chunks if wanted."""
    env = FixedToy("reach-red", variant)
    if ensemble:
        return EnsembleActions(env, chunk=chunk)
    return env if chunk == 1 else ChunkActions(env, chunk=chunk, gamma=gamma)


def add_demonstrations(store: EpisodeStore, *, seed: int) -> None:
    """Append what stage 0 learns from."""
    env = FixedToy()
    for number in range(DEMONSTRATIONS):
        store.append(run_expert(env, _expert, task="original", seed=1000 * seed + number, noise=0.2))


def success(policy: VLAPolicy, variant: str, **kwargs: Any) -> int:
    """How many of the ``EPISODES`` evaluation episodes succeed."""
    envs = {variant: partial(make_env, variant, **kwargs)}
    result = evaluate(policy, envs, episodes_per_task=EPISODES, seed=EVAL_SEED, num_envs_per_task=50, num_workers=0)
    return result.tasks[variant].successes


def run(entry: Entry, seed: int, store: EpisodeStore) -> dict[str, Any]:
    """Stages 0 and 1 of one head and seed."""
    start = time.perf_counter()
    statistics = compute_statistics([store])
    encoder = small_vlm(
        tuple(TOY_TASKS.values()),
        image_size=32,
        patch_size=16,
        width=32,
        vision_layers=1,
        text_layers=1,
        heads=2,
        seed=seed,
        dtype=torch.float32,
    )
    torch.manual_seed(seed)
    head = entry.head(encoder.feature_dim, 2 * entry.chunk, statistics)
    normalisation = chunk_statistics(statistics, entry.chunk)
    policy = VLAPolicy(encoder, head, statistics=normalisation)
    config = SLConfig(
        steps=entry.sft_steps,
        batch_size=64,
        scope="all",
        random_shift=0,
        learning_rate=3e-3,
        encoder_learning_rate=3e-3,
    )
    sampler = BalancedSampler([store], batch_size=config.batch_size, seed=seed, chunk=entry.chunk)
    loss = train_supervised(policy, sampler, config=config, seed=seed)
    result: dict[str, Any] = {"sft_loss": loss}
    if entry.residual is not None:
        policy = VLAPolicy(encoder, ResidualHead.over(head, **entry.residual), statistics=normalisation)
    result["sft_original"] = success(policy, "original", chunk=entry.chunk)
    if entry.chunk > 1:
        result["sft_original_ensembled"] = success(policy, "original", chunk=entry.chunk, ensemble=True)
    result["sft_new"] = success(policy, "new", chunk=entry.chunk)
    result["sft_seconds"] = time.perf_counter() - start
    ppo = PPOConfig(
        total_timesteps=ENV_STEPS // entry.chunk,
        num_envs=32,
        rollout_steps=32,
        minibatch_size=256,
        learning_rate=2e-3,
        critic_learning_rate=2e-3,
        gamma=GAMMA**entry.chunk,
    )
    thunk = partial(make_env, "new", chunk=entry.chunk, gamma=GAMMA)
    envs = WorkerVectorEnv([thunk] * ppo.num_envs, num_workers=0, autoreset_mode=AutoresetMode.NEXT_STEP)
    stage1 = run_ppo(policy, envs, task="new", config=ppo, seed=seed)
    envs.close()
    result["ppo_new"] = success(policy, "new", chunk=entry.chunk)
    if entry.chunk > 1:
        result["ppo_new_ensembled"] = success(policy, "new", chunk=entry.chunk, ensemble=True)
    result["ppo_policy_steps"] = stage1.num_env_steps
    result["ppo_noisy_first"], result["ppo_noisy_last"] = stage1.first_success_rate, stage1.last_success_rate
    result["seconds"] = time.perf_counter() - start
    return result


def summary(runs: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Pooled over seeds: rate, n and Wilson interval of every success count."""
    counts = [key for key in next(iter(runs.values())) if key.startswith(("sft_original", "sft_new", "ppo_new"))]
    table = {}
    for key in counts:
        successes, n = sum(result[key] for result in runs.values()), EPISODES * len(runs)
        table[key] = {"rate": successes / n, "n": n, "interval": list(wilson_interval(successes, n))}
    return table


def markdown(results: dict[str, Any]) -> str:
    """The table of the guide."""
    lines = [
        "| head | stage 0: its place | the new place | after PPO: the new place | each seed |",
        "|---|---|---|---|---|",
    ]
    for name, entry in results["heads"].items():
        cells = []
        for key in ("sft_original", "sft_new", "ppo_new"):
            rate, interval = entry["summary"][key]["rate"], entry["summary"][key]["interval"]
            cells.append(f"{_short(rate)} [{_short(interval[0])}, {_short(interval[1])}]")
        seeds = ", ".join(_short(result["ppo_new"] / EPISODES) for result in entry["seeds"].values())
        lines.append(f"| {name} | {' | '.join(cells)} | {seeds} |")
    return "\n".join(lines)


def _short(rate: float) -> str:
    return f"{rate:.2f}".removeprefix("0")


def main() -> None:
    """Run what is missing and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--heads", nargs="*", default=list(ENTRIES), choices=list(ENTRIES))
    parser.add_argument("--seeds", nargs="*", type=int, default=list(SEEDS))
    parser.add_argument("--output", type=Path, default=OUTPUT)
    args = parser.parse_args()
    torch.set_num_threads(1)
    results: dict[str, Any] = {
        "command": "python benchmarks/heads.py",
        "episodes_per_seed": EPISODES,
        "env_steps": ENV_STEPS,
        "heads": {},
    }
    if args.output.is_file():
        results["heads"] = json.loads(args.output.read_text())["heads"]
    for seed in args.seeds:
        with tempfile.TemporaryDirectory() as folder, EpisodeStore(Path(folder) / "demos", mode="w-") as store:
            add_demonstrations(store, seed=seed)
            for name in args.heads:
                entry = results["heads"].setdefault(name, {"seeds": {}})
                if str(seed) in entry["seeds"]:
                    continue
                entry["seeds"][str(seed)] = run(ENTRIES[name], seed, store)
                entry["summary"] = summary(entry["seeds"])
                results["heads"] = {key: results["heads"][key] for key in ENTRIES if key in results["heads"]}
                args.output.write_text(json.dumps(results, indent=1) + "\n")
                print(name, seed, entry["seeds"][str(seed)], flush=True)
    print(markdown(results))


def _expert(env: gym.Env) -> np.ndarray:
    toy: Any = env
    return np.clip((toy.target - toy.position) / toy.step_size, -1, 1).astype(np.float32)


if __name__ == "__main__":
    main()
