"""One experiment from nothing: expert episodes, a policy, the iterative trainer, a report."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import gymnasium as gym
import torch
from rich.console import Console
from rich.progress import track

from vla_rl.collect import collect_expert
from vla_rl.config import IterativeConfig, Method, with_method
from vla_rl.data import EpisodeStore, compute_statistics
from vla_rl.encoders import FrozenVLMEncoder, LoRASettings, small_vlm
from vla_rl.heads import GaussianHead
from vla_rl.policy import VLAPolicy
from vla_rl.report import summary_table, verdict, write_report
from vla_rl.rundir import RunDirectory
from vla_rl.trainer import IterativeTrainer, seed_everything


@dataclass
class EnvConfig:
    """Which environments, and how they look."""

    env_id: str = "vla_rl_envs:VLA/MetaWorld-v0"
    """Gymnasium id of an env in the observation convention that takes a task, image_size, horizon, perhaps variant"""
    image_size: int = 64
    """pixels, square"""
    horizon: int = 150
    """env steps until an episode is cut off"""
    task_argument: str = "task"
    """argument of the env that names the task: "env_id" for VLA/RoboHive-v0"""
    expert: str = "vla_rl_envs:make_expert"
    """import path of make_expert(env) -> expert"""


@dataclass
class ModelConfig:
    """Which VLM and head."""

    vlm: str = "small"
    """"small" (a 3.6 M-parameter PaliGemma built from config, random weights), or a hub id or directory"""
    patch_size: int = 16
    """height and width in pixels of the "small" VLM's patches"""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """precision of the VLM's matrix multiplications"""
    lora_rank: int = 16
    """rank of the LoRA weights on the text backbone; 0 for none"""
    num_queries: int = 8
    """learned queries of the token learner"""
    hidden_dim: int = 256
    """last hidden layer of head and critic"""
    exploration: Literal["gsde", "gaussian"] = "gsde"
    """exploration noise: one matrix per episode, or independent per step"""
    init_std: float = 0.3
    """standard deviation of the exploration at the start of stage 1, in normalised action units"""


@dataclass
class ExperimentConfig:
    """Everything that `vla-rl train` needs."""

    name: str = "experiment"
    """first part of the default work directory's name"""
    expert_tasks: tuple[str, ...] = ()
    """task labels with demonstrations; "task" or "task:variant\""""
    rl_tasks: tuple[str, ...] = ()
    """task labels for stage 1, learned one after the other"""
    unseen_tasks: tuple[str, ...] = ()
    """task labels that are only evaluated"""
    method: Method = "ire-vla"
    """the paper's method or a baseline"""
    vlm_scope: Literal["lora", "all"] = "lora"
    """what "the whole model" means for the methods ppo and ppo-replay"""
    policy: str | None = None
    """directory or hub id of a policy to start from, instead of a new one"""
    expert_data: str | None = None
    """an episode store to use, instead of collecting one"""
    expert_episodes: int = 40
    """demonstrations per expert task"""
    expert_noise: float = 0.2
    """standard deviation of the noise on the expert's actions"""
    workdir: str | None = None
    """where everything is written; by default runs/<name>-<method>-s<seed>-<time>"""
    env: EnvConfig = field(default_factory=EnvConfig)
    """environments"""
    model: ModelConfig = field(default_factory=ModelConfig)
    """policy"""
    train: IterativeConfig = field(default_factory=IterativeConfig)
    """schedule and hyperparameters"""


def make_env(label: str, config: EnvConfig) -> gym.Env:
    """An env for a task label: `"drawer-open:new"` is task drawer-open, variant new; without a colon the env's own."""
    task, _, variant = label.partition(":")
    arguments: dict[str, Any] = {config.task_argument: task, "image_size": config.image_size, "horizon": config.horizon}
    if variant:
        arguments["variant"] = variant
    return gym.make(config.env_id, **arguments)


def new_policy(
    config: ModelConfig, stores: Sequence[EpisodeStore], *, instructions: Sequence[str], seed: int = 0
) -> VLAPolicy:
    """A policy with a fresh head, normalised by the statistics of the data.

    Args:
        config: which VLM and head.
        stores: expert data.
        instructions: what the tokenizer of the "small" VLM is trained on.
        seed: of the "small" VLM's weights.
    """
    statistics = compute_statistics(stores)
    dtype = getattr(torch, config.dtype)
    if config.vlm == "small":
        image_size = stores[0][0].observations["image"].shape[1]
        encoder = small_vlm(instructions, image_size=image_size, patch_size=config.patch_size, dtype=dtype, seed=seed)
    else:
        encoder = FrozenVLMEncoder.from_pretrained(config.vlm, dtype=dtype)
    head = GaussianHead(
        encoder.feature_dim,
        len(statistics.action_mean),
        state_dim=0 if statistics.state_mean is None else len(statistics.state_mean),
        num_queries=config.num_queries,
        hidden_dim=config.hidden_dim,
        exploration=config.exploration,
        init_std=config.init_std,
    )
    return VLAPolicy(encoder, head, statistics=statistics)


def collect_into(
    path: str | Path,
    tasks: Sequence[str],
    *,
    env: EnvConfig,
    episodes: int,
    noise: float,
    seed: int = 0,
    num_workers: int | None = None,
    console: Console,
) -> None:
    """Append the successful expert episodes of some tasks to the store at `path`; say how many failed.

    Raises:
        ValueError: the store holds episodes of one of these tasks and seeds already.
    """
    failed: dict[str, int] = {}
    with EpisodeStore(path, mode="a") as store:
        for info in store.index:
            if info.task in tasks and info.seed is not None and seed <= info.seed < seed + episodes:
                raise ValueError(
                    f"{path} already holds {info.task!r} with seed {info.seed}; give a seed beyond the ones in it "
                    "(episode i of a task uses seed + i)"
                )
        stream = collect_expert(
            tasks,
            make_env=partial(make_env, config=env),
            expert=env.expert,
            episodes=episodes,
            noise=noise,
            seed=seed,
            num_workers=num_workers,
        )
        bar = {"console": console, "transient": True, "disable": not console.is_terminal}
        for episode in track(stream, "expert episodes", total=len(tasks) * episodes, **bar):
            if episode.success:
                store.append(episode)
            else:
                failed[episode.task] = failed.get(episode.task, 0) + 1
    if failed:
        console.print(f"  experts failed, and those episodes were left out: {failed}")


def run_experiment(config: ExperimentConfig, *, console: Console, command: str, notes: list[str] | None = None) -> Path:
    """Run everything and return the work directory.

    Raises:
        FileExistsError: the work directory holds another run.
        ValueError: the configuration contradicts itself.
    """
    start = time.perf_counter()
    assert config.workdir is not None
    workdir = Path(config.workdir)
    RunDirectory.refuse_used(workdir)
    if not config.expert_tasks and config.expert_data is None:
        raise ValueError("no expert_tasks and no expert_data: give tasks to collect demonstrations of, or a store")
    data = Path(config.expert_data) if config.expert_data else workdir / "expert_data"
    if config.expert_data is None and data.exists():
        raise FileExistsError(
            f"{data} is left of an earlier attempt; remove it, give a new workdir, or set expert_data to use it"
        )
    for label in sorted({*config.rl_tasks, *config.unseen_tasks} - set(config.expert_tasks)):
        make_env(label, config.env).close()  # a misspelt task is to be noticed now, not after stage 0
    if config.expert_data is None:
        console.print(f"Collecting {config.expert_episodes} expert episodes of {len(config.expert_tasks)} tasks")
        collect_into(
            data,
            config.expert_tasks,
            env=config.env,
            episodes=config.expert_episodes,
            noise=config.expert_noise,
            seed=100_000 * config.train.seed,
            num_workers=config.train.num_workers,
            console=console,
        )
    collected = time.perf_counter()
    seed_everything(config.train.seed)
    run = with_method(config.train, config.method, vlm_scope=config.vlm_scope)
    with EpisodeStore(data, mode="r") as expert:
        if config.policy is None:
            with make_env((*config.expert_tasks, expert.index[0].task)[0], config.env) as env:
                instructions = env.get_wrapper_attr("instructions")
            policy = new_policy(config.model, [expert], instructions=instructions, seed=config.train.seed)
        else:
            policy = VLAPolicy.from_pretrained(config.policy, dtype=getattr(torch, config.model.dtype))
        trainer = IterativeTrainer(
            policy,
            expert=expert,
            rl_tasks=config.rl_tasks,
            make_envs=partial(make_env, config=config.env),
            eval_tasks={
                name: tasks
                for name, tasks in (
                    ("expert", config.expert_tasks),
                    ("rl", config.rl_tasks),
                    ("unseen", config.unseen_tasks),
                )
                if tasks
            },
            config=run,
            lora=LoRASettings(r=config.model.lora_rank, alpha=2 * config.model.lora_rank)
            if config.model.lora_rank
            else None,
            workdir=workdir,
            console=console,
        )
        try:
            results = trainer.run()
        finally:
            trainer.close()
    seconds = time.perf_counter() - start
    trainer.run_dir.add_result("seconds", {"collect": collected - start, **trainer.seconds, "total": seconds})
    console.print(summary_table(results))
    for sentence in verdict(results):
        console.print(sentence, markup=False)
    path = write_report(workdir, command=command, wall_clock_s=seconds, notes=notes or [])
    console.print(f"{seconds / 60:.1f} minutes. Report: {path}; curves: tensorboard --logdir {workdir}")
    return workdir
