"""Stage 2 of finished runs once more, with other learning rates: what does it forget because it learns too fast?

    python benchmarks/stage2_rates.py RUN --learning-rate 1e-4 --encoder-learning-rate 2e-4

From the checkpoint that the run's stage 2 began with, with its seeds, on the same demonstrations and successes and
evaluated on the same episodes: with the run's own rates everything comes out as it did. Results are added to
`benchmarks/results/stage2_rates.json`.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
import tempfile
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
import tyro
from table_runs import compact

from vla_rl.data import EpisodeStore
from vla_rl.data.sampler import task_weights
from vla_rl.encoders import LoRASettings
from vla_rl.evaluation import describe, evaluate
from vla_rl.experiment import ExperimentConfig, make_env
from vla_rl.experiment_file import read_experiment
from vla_rl.policy import VLAPolicy
from vla_rl.report import versions
from vla_rl.rundir import write_json
from vla_rl.runs import read_run
from vla_rl.seeding import phase_seed, seed_everything
from vla_rl.sl.launch import supervise


@dataclass
class Args:
    """Which runs and which learning rates."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """directories of finished runs of one RL task and one round, where `vla-rl train` left them"""
    learning_rate: float
    """peak learning rate of the head"""
    encoder_learning_rate: float
    """peak learning rate of LoRA"""
    out: Path = Path("benchmarks/results/stage2_rates.json")
    """file to add the results to"""


def start_of_stage2(path: Path, config: ExperimentConfig) -> Path:
    """The checkpoint before the run's stage 2: that of stage 1, of stage 0, or the policy that the run began with."""
    own = [path / "checkpoints" / phase for phase in ("task0-round0-stage1", "stage0")]
    return next((checkpoint for checkpoint in own if checkpoint.is_dir()), path.parent / str(config.policy))


def again(path: Path, config: ExperimentConfig, rates: dict[str, float]) -> tuple[VLAPolicy, float]:
    """The policy after stage 2 of one run with other rates, and the loss."""
    train = config.train
    phase = "task0-round0-stage2"
    policy = VLAPolicy.from_pretrained(start_of_stage2(path, config), dtype=getattr(torch, config.model.dtype))
    seed_everything(phase_seed(train.seed, phase))
    if train.stage2.scope == "lora" and policy.encoder.lora is None:
        policy.encoder.add_lora(LoRASettings(r=config.model.lora_rank, alpha=2 * config.model.lora_rank))
    own = path / "expert_data"
    expert = [EpisodeStore(own if own.is_dir() else path.parent / str(config.expert_data), mode="r")]
    found = [EpisodeStore(store, mode="r") for store in sorted((path / "rl_data").glob("task0-*"))]
    with tempfile.TemporaryDirectory() as folder:
        loss, _ = supervise(
            policy,
            [*expert, *found],
            config=replace(train.stage2, **rates),
            seed=phase_seed(train.seed, phase),
            data_seed=phase_seed(train.seed, f"{phase}-data"),
            task_weights=task_weights(expert, found, rl_fraction=train.rl_fraction),
            folder=Path(folder) / "job",
        )
    return policy, loss


def entry(path: Path, rates: dict[str, float]) -> dict[str, object]:
    """Stage 2 of one run with other rates, and its evaluation."""
    run, (config, command, _) = read_run(path), read_experiment(path, ExperimentConfig)
    if not run.finished:
        sys.exit(f"{path} has not finished; {run.resume_command}")
    policy, loss = again(path, config, rates)
    train = config.train
    groups = {"expert": config.expert_tasks, "rl": config.rl_tasks, "unseen": config.unseen_tasks}
    outcome = {}
    for group, tasks in groups.items():
        outcome[group] = evaluate(
            policy,
            {task: partial(make_env, task, config.env) for task in tasks},
            episodes_per_task=train.rl_eval_episodes if group == "rl" else train.eval_episodes,
            seed=train.eval_seed,
            num_envs_per_task=max(1, train.eval_envs // len(tasks)),
            num_workers=0,
        )
        print(f"{path.name}: {group} {describe(outcome[group])}", flush=True)
    return {
        "table": path.resolve().parent.name,
        "run": path.name,
        "run_command": command,
        **rates,
        "loss": loss,
        "evaluation": {group: compact(result) for group, result in outcome.items()},
        "versions": versions(),
        "cores": os.cpu_count(),
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    args = tyro.cli(Args, description=__doc__)
    for path in args.runs:
        found = entry(path, {"learning_rate": args.learning_rate, "encoder_learning_rate": args.encoder_learning_rate})
        options = f"--learning-rate {args.learning_rate} --encoder-learning-rate {args.encoder_learning_rate}"
        found["command"] = shlex.join(["python", "benchmarks/stage2_rates.py", path.name, *options.split()])
        write_json(args.out, [*(json.loads(args.out.read_text()) if args.out.exists() else []), found])
