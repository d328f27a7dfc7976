"""One experiment from nothing: expert episodes, a policy, the iterative trainer, a report."""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import gymnasium as gym
import torch
from rich.console import Console
from rich.progress import track

from vla_rl.collect import collect_expert
from vla_rl.config import IterativeConfig, Method, check, with_method
from vla_rl.data import EpisodeStore, compute_statistics
from vla_rl.encoders import FrozenVLMEncoder, LoRASettings, small_vlm
from vla_rl.encoders.saving import require_processor
from vla_rl.experiment_file import read_experiment, write_experiment
from vla_rl.guards import GuardConfig
from vla_rl.heads import GaussianHead
from vla_rl.policy import VLAPolicy, policy_directory
from vla_rl.report import summary_table, verdict, write_report
from vla_rl.report_html import write_html
from vla_rl.rundir import RunDirectory, lock_run
from vla_rl.runs import EXPERIMENT_FILE, read_run
from vla_rl.saved_files import read_object
from vla_rl.seeding import seed_everything
from vla_rl.tracking import Follower, Tool, load_tool
from vla_rl.trainer import IterativeTrainer


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
    """"small" (a 3.6 M-parameter PaliGemma built from config, random weights), "tiny" (the same size, pre-trained,
    in the package), or a hub id or directory"""
    device: Literal["cpu", "cuda"] = "cpu"
    """where VLM, head and critic compute; environments always step on the CPU"""
    patch_size: int = 16
    """height and width in pixels of the "small" VLM's patches"""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """precision of the VLM's matrix multiplications"""
    prompt: str | None = None
    """format string with {instruction}, for a hub id or directory; None for the instruction alone"""
    views: Literal["separate", "joint"] | None = None
    """several cameras of a hub id or directory: each with the prompt, or all in one; None for as saved, or separate"""
    truncate_layers: int | None = None
    """text layers to keep of a hub id or directory; None for all"""
    lora_rank: int = 16
    """rank of the LoRA weights on the text backbone; 0 for none"""
    lora_top_layers: int | None = None
    """LoRA on the last so many text layers only, so that what lies below is computed once per frame; None for all"""
    num_queries: int = 8
    """learned queries of the token learner"""
    hidden_dim: int = 256
    """last hidden layer of head and critic"""
    exploration: Literal["gsde", "gaussian"] = "gsde"
    """exploration noise: one matrix per episode, or independent per step"""
    init_std: float | None = None
    """standard deviation of the exploration at the start of stage 1, in normalised action units; None for as saved,
    or 0.3"""


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
    launch: str | None = None
    """run stages 0 and 2 in processes that this starts, such as "torchrun --nproc-per-node 4"; None for one process"""
    env: EnvConfig = field(default_factory=EnvConfig)
    """environments"""
    model: ModelConfig = field(default_factory=ModelConfig)
    """policy"""
    train: IterativeConfig = field(default_factory=IterativeConfig)
    """schedule and hyperparameters"""
    guards: GuardConfig = field(default_factory=GuardConfig)
    """when the trainer steps in"""


def make_env(label: str, config: EnvConfig) -> gym.Env:
    """An env for a task label: `"drawer-open:new"` is task drawer-open, variant new; without a colon the env's own."""
    task, _, variant = label.partition(":")
    arguments: dict[str, Any] = {config.task_argument: task, "image_size": config.image_size, "horizon": config.horizon}
    if variant:
        arguments["variant"] = variant
    return gym.make(config.env_id, **arguments)


def check_device(device: str) -> str:
    """The device, if torch has it here.

    Raises:
        ValueError: it has not.
    """
    if device == "cuda" and not torch.cuda.is_available():
        built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "the CPU alone"
        raise ValueError(
            f"device cuda was asked for, but torch {torch.__version__} (built for {built}) sees no GPU; leave it out "
            "to compute on the CPU, or see what `vla-rl doctor` says of torch"
        )
    return device


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
        first = stores[0][0]
        image_size = first.observations[first.image_keys[0]].shape[1]
        encoder = small_vlm(instructions, image_size=image_size, patch_size=config.patch_size, dtype=dtype, seed=seed)
        encoder.to(config.device)
    else:
        encoder = FrozenVLMEncoder.from_pretrained(
            config.vlm,
            device=config.device,
            dtype=dtype,
            prompt=config.prompt,
            views=config.views,
            truncate_layers=config.truncate_layers,
        )
    head = GaussianHead(
        encoder.feature_dim,
        len(statistics.action_mean),
        state_dim=0 if statistics.state_mean is None else len(statistics.state_mean),
        num_queries=config.num_queries,
        hidden_dim=config.hidden_dim,
        exploration=config.exploration,
        init_std=0.3 if config.init_std is None else config.init_std,
    )
    return VLAPolicy(encoder, head, statistics=statistics).to(config.device)


def saved_policy(name_or_path: str, config: ModelConfig) -> VLAPolicy:
    """A saved policy on the device and in the types asked for, with the exploration asked for.

    Raises:
        ValueError: its head has no `init_std`.
    """
    policy = VLAPolicy.from_pretrained(name_or_path, device=config.device, dtype=getattr(torch, config.dtype))
    if config.init_std is not None:
        kwargs = policy.head.config()
        if "init_std" not in kwargs:
            raise ValueError(
                f"init_std={config.init_std} was asked for, but the {type(policy.head).__name__} in {name_or_path} has "
                "none; leave it out"
            )
        head = type(policy.head)(**kwargs | {"init_std": config.init_std})
        head.load_state_dict(policy.head.state_dict())
        policy.head = head.to(policy.device).eval()
    return policy


def check_saved_policy(directory: Path, config: ModelConfig) -> None:
    """Refuse options that a saved policy cannot have, since it brings VLM and head along.

    Raises:
        ValueError: an option is neither its default nor what the policy has.
    """
    head = read_object(directory / "policy.json").get("head", {}).get("kwargs", {})
    encoder = read_object(directory / "encoder" / "encoder.json")
    model = directory / "encoder" / "model" / "config.json"
    vision = read_object(model).get("vision_config", {}) if model.is_file() else {}
    for name, values in (
        *((name, head) for name in ("num_queries", "hidden_dim", "exploration")),
        *((name, encoder) for name in ("prompt", "views", "truncate_layers")),
        ("patch_size", vision),
    ):
        asked = getattr(config, name)
        if asked not in (getattr(ModelConfig, name), values.get(name)):
            raise ValueError(
                f"{name}={asked!r} was asked for, but the policy in {directory} brings its own VLM and head, with "
                f"{values.get(name)!r}; leave it out, or train a new policy (policy=None)"
            )
    if config.vlm not in ("small", "tiny", encoder.get("source")):
        raise ValueError(
            f"vlm={config.vlm!r} was asked for, but the policy in {directory} brings a VLM of its own; leave it out, "
            "or train a new policy (policy=None)"
        )


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


def check_experiment(config: ExperimentConfig) -> None:
    """Notice before anything is done what would end a run later, or be ignored: contradictions, misspelt tasks.

    Raises:
        ValueError: the configuration contradicts itself, an env does not know a task, the store is empty, or the
            device is not there.
        FileNotFoundError: the policy or the store is not there.
    """
    check_device(config.model.device)
    check(with_method(config.train, config.method, vlm_scope=config.vlm_scope), config.rl_tasks)
    if not config.expert_tasks and config.expert_data is None:
        raise ValueError("no expert_tasks and no expert_data: give tasks to collect demonstrations of, or a store")
    if not (labels := _labels(config)):
        raise ValueError("no expert_tasks, rl_tasks or unseen_tasks: give at least one to evaluate on")
    if config.policy is not None:
        check_saved_policy(policy_directory(config.policy), config.model)
    for label in sorted(set(labels)):
        make_env(label, config.env).close()
    if config.expert_data is not None:
        with EpisodeStore(config.expert_data, mode="r") as store:
            if not len(store):
                raise ValueError(f"expert_data={config.expert_data!r} holds no episode; collect some (vla-rl collect)")


def run_experiment(
    config: ExperimentConfig,
    *,
    console: Console,
    command: str,
    notes: list[str] | None = None,
    track: Tool | None = None,
    resume: bool = False,
) -> Path:
    """Run everything and return the work directory.

    Args:
        config: the experiment; with a workdir.
        console: where to print.
        command: what the report says the run was started by.
        notes: paragraphs for the report.
        track: a service to send the curves to as well.
        resume: continue the run in the workdir; see `resume_experiment`.

    Raises:
        FileExistsError: the work directory holds another run.
        ValueError: the configuration contradicts itself, the expert never succeeded, or the device is not there.
        OSError: policy or VLM are not there, neither as a directory nor on the hub.
        ImportError: the package of `track` is missing.
    """
    start = time.perf_counter()
    assert config.workdir is not None
    check_device(config.model.device)
    workdir = Path(config.workdir)
    notes = notes or []
    if track is not None:
        load_tool(track)
    if not resume:
        RunDirectory.refuse_used(workdir)
        _refuse_left_data(config, workdir)
        check_experiment(config)
        if config.policy is None and config.model.vlm != "small":
            require_processor(config.model.vlm)  # or the demonstrations would be collected first
        write_experiment(workdir, config, command=command, notes=notes)
    begun = (workdir / "state.json").is_file()
    data = Path(config.expert_data) if config.expert_data else workdir / "expert_data"
    if config.expert_data is None and not begun:
        with ExitStack() as held:
            held.callback(lock_run(workdir).release)
            if data.exists():  # of this run, which was killed while it collected
                console.print("Collecting had not finished: it begins anew")
                shutil.rmtree(data)
            console.print(
                f"Collecting {config.expert_episodes} expert episodes of each of {len(config.expert_tasks)} tasks"
            )
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
    with EpisodeStore(data, mode="r") as expert:
        if not len(expert):
            raise ValueError(
                f"{data} holds no episode: the expert never succeeded; give another env.expert, a longer env.horizon, "
                "more expert_episodes or less expert_noise"
            )
        trainer = _trainer(config, expert, console=console, resume=begun)
        earlier = sum(trainer.run_dir.seconds.values())
        if not begun:
            trainer.run_dir.add_seconds("collect", collected - start)
        try:
            with nullcontext() if track is None else Follower(workdir, tool=track, config=asdict(config)):
                results = trainer.run()
        finally:
            trainer.run_dir.add_result("seconds", trainer.run_dir.seconds)
            trainer.close()
    total = earlier + time.perf_counter() - start
    trainer.run_dir.add_result("seconds", trainer.run_dir.seconds | {"total": total})
    console.print(summary_table(results))
    for sentence in verdict(results):
        console.print(sentence, markup=False)
    path = write_report(workdir, command=command, wall_clock_s=total, notes=notes)
    page = write_html(workdir)
    console.print(f"{total / 60:.1f} minutes. Report: {path}", soft_wrap=True)
    console.print(f"As a page, to look at or send: {page}; curves: tensorboard --logdir {workdir}", soft_wrap=True)
    return workdir


def resume_experiment(workdir: str | Path, *, console: Console, track: Tool | None = None) -> Path:
    """Continue a run that `run_experiment` started, from its last finished phase.

    Raises:
        FileNotFoundError: no run was started there.
        ValueError: the run has finished.
    """
    config, command, notes = read_experiment(workdir, ExperimentConfig)
    config = replace(config, workdir=str(workdir))
    if (Path(workdir) / "state.json").is_file():
        run = read_run(workdir)
        if run.finished:
            raise ValueError(f"the run in {workdir} has finished; `vla-rl report {workdir}` shows it")
        console.print(f"Continuing {workdir}: {', '.join(run.state['done']) or 'no phase'} done", soft_wrap=True)
    return run_experiment(config, console=console, command=command, notes=notes, track=track, resume=True)


def _refuse_left_data(config: ExperimentConfig, workdir: Path) -> None:
    data, settings = workdir / "expert_data", workdir / EXPERIMENT_FILE
    if config.expert_data is None and data.exists():
        raise FileExistsError(
            f"{data} is left of an earlier attempt; continue that with `vla-rl train --resume {workdir}`, remove it, "
            "give a new workdir, or set expert_data to use it"
        )
    if settings.exists():
        raise FileExistsError(
            f"{settings} is left of an earlier attempt; continue that with `vla-rl train --resume {workdir}`, remove "
            "it, or give a new workdir"
        )


def _labels(config: ExperimentConfig) -> tuple[str, ...]:
    """Every task label, those with demonstrations first."""
    return (*config.expert_tasks, *config.rl_tasks, *config.unseen_tasks)


def _trainer(config: ExperimentConfig, expert: EpisodeStore, *, console: Console, resume: bool) -> IterativeTrainer:
    if config.policy is None:
        with make_env(_labels(config)[0], config.env) as env:
            instructions = env.get_wrapper_attr("instructions")
        policy = new_policy(config.model, [expert], instructions=instructions, seed=config.train.seed)
    else:
        policy = saved_policy(config.policy, config.model)
    groups = (("expert", config.expert_tasks), ("rl", config.rl_tasks), ("unseen", config.unseen_tasks))
    model = config.model
    lora = LoRASettings(r=model.lora_rank, alpha=2 * model.lora_rank, top_layers=model.lora_top_layers)
    make = IterativeTrainer.resume if resume else IterativeTrainer
    assert config.workdir is not None
    return make(
        policy=policy,
        expert=expert,
        rl_tasks=config.rl_tasks,
        make_envs=partial(make_env, config=config.env),
        eval_tasks={name: tasks for name, tasks in groups if tasks},
        config=with_method(config.train, config.method, vlm_scope=config.vlm_scope),
        lora=lora if model.lora_rank else None,
        guards=config.guards,
        launch=config.launch,
        workdir=config.workdir,
        console=console,
    )
