"""The commands of `vla-rl` that run a policy: demo, collect, train, eval."""

from __future__ import annotations

import json
import os
import shlex
import sys
import time
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads would take the env workers' cores

import torch
import tyro
from gymnasium.error import Error as GymnasiumError
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from vla_rl._data_output import print_store
from vla_rl.config import with_method
from vla_rl.cost import config_lines, cost_lines
from vla_rl.evaluation import Evaluator
from vla_rl.experiment import (
    EnvConfig,
    ExperimentConfig,
    check_device,
    check_experiment,
    collect_into,
    make_env,
    resume_experiment,
    run_experiment,
)
from vla_rl.policy import VLAPolicy
from vla_rl.presets import DEMO_EXPERT, PRESETS
from vla_rl.rl.ppo import UpdateError
from vla_rl.rl.stage1 import NoSuccessError
from vla_rl.sl.supervised import SupervisedError
from vla_rl.tracking import Tool
from vla_rl.vector import WorkerError

RUN_ERRORS = (GymnasiumError, WorkerError, NoSuccessError, UpdateError, SupervisedError)
"""What a run or an environment can end in through the user's settings, besides Python's own errors."""


@dataclass
class Demo:
    """iRe-VLA on Meta-World in minutes, on a CPU: what it gains over supervised learning, with intervals and videos.

    Example: vla-rl demo --quick
    """

    quick: bool = False
    """the same loop in a few minutes with far less learning: it shows that everything runs, not what it gains"""
    seed: int = 0
    """seed of everything but the shipped checkpoint"""
    workdir: Path | None = None
    """a new directory for the run; by default runs/demo-s<seed>-<time>"""
    from_scratch: bool = False
    """train stage 0 here too (about 19 minutes more) instead of starting from the shipped checkpoint"""
    dry_run: bool = False
    """print the resolved configuration and what it will cost, and stop"""

    def run(self, console: Console) -> None:
        """Run the demo."""
        _, config = PRESETS["metaworld-demo"]
        train = replace(config.train, seed=self.seed)
        start = (
            "Stage 0 starts from a checkpoint that ships with the package, made on a CPU by `vla-rl train "
            "metaworld-base` from the VLM `tiny`, which takes about 19 minutes more (--from-scratch)."
        )
        if self.from_scratch:
            base = PRESETS["metaworld-base"][1]
            train, start = replace(train, stage0=base.train.stage0), "Stage 0 trains here, from the VLM `tiny`."
            config = replace(config, policy=None, expert_episodes=base.expert_episodes)
        if self.quick:
            train = replace(
                train,
                eval_episodes=2,
                rl_eval_episodes=4,
                stage1=replace(train.stage1, total_timesteps=6_144, num_envs=16, rollout_steps=128, update_epochs=2),
                stage2=replace(train.stage2, steps=30),
                stop_at_zero=False,
            )
            config = replace(config, expert_episodes=4)
            start += " This is the quick demo: too short to learn."
        console.print(start)
        config = replace(config, train=train, workdir=_workdir(self.workdir, f"demo-s{self.seed}"))
        if self.dry_run:
            _dry_run(config, console)
            return
        run_experiment(config, console=console, command=_command(), notes=[start])


@dataclass
class Collect:
    """Run scripted experts and store their successful episodes (HDF5, readable by Minari).

    Example: vla-rl collect --out demos --tasks drawer-open drawer-open:new --episodes 20
    """

    out: Path
    """directory of the episode store; new episodes are appended to one that exists"""
    tasks: tuple[str, ...] = DEMO_EXPERT
    """task labels, "task" or "task:variant\""""
    episodes: int = 40
    """episodes per task"""
    noise: float = 0.2
    """standard deviation of the noise on the executed action; the expert's own action is stored"""
    seed: int = 0
    """reset seed of the first episode of each task"""
    num_workers: int | None = None
    """processes; None: as many as the cores suggest"""
    env: EnvConfig = field(default_factory=EnvConfig)
    """environments"""

    def run(self, console: Console) -> None:
        """Collect."""
        collect_into(
            self.out, self.tasks, env=self.env, episodes=self.episodes, noise=self.noise, seed=self.seed,
            num_workers=self.num_workers, console=console,
        )  # fmt: skip
        print_store(self.out, console)


if TYPE_CHECKING:
    Preset = ExperimentConfig
else:
    Preset = tyro.extras.subcommand_type_from_defaults(
        {name: config for name, (_, config) in PRESETS.items()},
        {name: description for name, (description, _) in PRESETS.items()},
    )


@dataclass
class Train:
    """A whole experiment from a named preset: expert data, stage 0, stages 1 and 2 per RL task, report.

    Example: vla-rl train toy --workdir runs/first
    """

    preset: tyro.conf.OmitSubcommandPrefixes[Preset]
    dry_run: tyro.conf.CascadeSubcommandArgs[bool] = False
    """check the tasks, print the resolved configuration and what it will cost, and stop"""
    track: tyro.conf.CascadeSubcommandArgs[Tool | None] = None
    """send the curves to this service too; TensorBoard has them always"""

    def run(self, console: Console) -> None:
        """Train."""
        config = self.preset
        workdir = _workdir(config.workdir, f"{config.name}-{config.method}-s{config.train.seed}")
        config = replace(config, workdir=workdir)
        if self.dry_run:
            _dry_run(config, console)
            return
        run_experiment(config, console=console, command=_command(), track=self.track)


@dataclass
class Resume:
    """Continue a run that was broken off, from its last finished phase, as it was configured.

    Example: vla-rl train --resume runs/first
    """

    resume: Path
    """work directory of the run"""
    track: Tool | None = None
    """send the curves to this service too"""

    def run(self, console: Console) -> None:
        """Resume."""
        resume_experiment(self.resume, console=console, track=self.track)


@dataclass
class Eval:
    """Deterministic success rate of a saved policy, with 95 % Wilson intervals.

    Example: vla-rl eval runs/demo/checkpoints/task0-round0-stage2 --tasks drawer-open:new
    """

    policy: tyro.conf.Positional[str]
    """directory written by save_pretrained (a run's checkpoints/<phase>), or a hub id"""
    tasks: tuple[str, ...]
    """task labels, "task" or "task:variant\""""
    episodes: int = 32
    """episodes per task"""
    seed: int = 10_000
    """reset seed of the first episode; episode i uses seed + i"""
    envs_per_task: int = 4
    """parallel environments per task"""
    num_workers: int | None = None
    """processes; None: as many as the cores suggest"""
    device: Literal["cpu", "cuda"] = "cpu"
    """where the policy computes"""
    dtype: Literal["float32", "bfloat16"] | None = None
    """precision of the VLM's matrix multiplications; None: as saved"""
    out: Path | None = None
    """write the result there as JSON"""
    env: EnvConfig = field(default_factory=EnvConfig)
    """environments"""

    def run(self, console: Console) -> None:
        """Evaluate."""
        if self.out is not None and self.out.exists():
            raise FileExistsError(f"{self.out} exists; give another file or remove it first")
        if self.out is not None:
            self.out.parent.mkdir(parents=True, exist_ok=True)
        torch.set_num_threads(1)
        device = check_device(self.device)
        dtype = None if self.dtype is None else getattr(torch, self.dtype)
        policy = VLAPolicy.from_pretrained(self.policy, device=device, dtype=dtype)
        env_fns = {task: partial(make_env, task, self.env) for task in self.tasks}
        num_envs = min(self.envs_per_task, max(1, self.episodes))
        with (
            Progress(console=console, transient=True) as progress,
            Evaluator(env_fns, num_envs_per_task=num_envs, num_workers=self.num_workers) as evaluator,
        ):
            bar = progress.add_task("episodes")
            result = evaluator.run(
                policy, episodes_per_task=self.episodes, seed=self.seed,
                progress=lambda finished, total: progress.update(bar, completed=finished, total=total),
            )  # fmt: skip
        table = Table("task", "success", "95 % interval", "n", "mean length")
        for name, task in result.tasks.items():
            low, high = task.interval
            table.add_row(name, f"{task.rate:.2f}", f"{low:.2f} .. {high:.2f}", str(task.n), f"{task.mean_length:.0f}")
        low, high = result.interval
        table.add_row("mean", f"{result.mean:.2f}", f"{low:.2f} .. {high:.2f}", "", "")
        console.print(table)
        if self.out is not None:
            self.out.write_text(json.dumps({"command": _command(), **result.to_dict()}, indent=2) + "\n")


def _dry_run(config: ExperimentConfig, console: Console) -> None:
    """Check an experiment, and print all of it and its cost."""
    check_experiment(config)
    train = with_method(config.train, config.method, vlm_scope=config.vlm_scope)
    for line in [*config_lines(replace(config, train=train)), "", *cost_lines(config)]:
        console.print(line, markup=False, highlight=False, soft_wrap=not console.is_terminal)


def _workdir(given: Path | str | None, name: str) -> str:
    return str(given or Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}")


def _command() -> str:
    return shlex.join(["vla-rl", *sys.argv[1:]])
