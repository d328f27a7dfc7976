"""IterativeTrainer: the schedule of Algorithm 1 (stage 0, then stages 1 and 2 per RL task), nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium.vector import AutoresetMode
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from vla_rl.config import IterativeConfig, check, check_scopes
from vla_rl.curriculum import StartCurriculum
from vla_rl.data.sampler import BalancedSampler, task_weights
from vla_rl.data.store import EpisodeStore
from vla_rl.encoders.lora import LoRASettings
from vla_rl.envs import instruction_table
from vla_rl.evaluation import EvaluationResult, Evaluator, describe
from vla_rl.fitting import require_same_steps, require_unit_box
from vla_rl.guards import GuardConfig, PictureError, weights_problem
from vla_rl.policy import VLAPolicy, consent
from vla_rl.preemption import EXIT_CODE, PreemptedError, stop_on_sigterm
from vla_rl.resuming import policy_digest, refuse_other_run, start_facts
from vla_rl.rl.ppo import PPOConfig, UpdateError
from vla_rl.rl.sac import SACfDConfig
from vla_rl.rl.snapshots import StageSnapshots
from vla_rl.rl.stage1 import NoSuccessError, Stage1Result, require_log_probs, run_collect, run_ppo, torch_threads
from vla_rl.rl.stage1_sac import run_sac
from vla_rl.rundir import RunDirectory, write_json
from vla_rl.runs import GROUPS, frames_file
from vla_rl.seeding import phase_seed, seed_everything
from vla_rl.sl.launch import check_launch, supervise
from vla_rl.sl.supervised import SLConfig, SupervisedError
from vla_rl.vector import LostWorkerError, WorkerError, WorkerVectorEnv
from vla_rl.watch import RunWatch

MakeEnv = Callable[[str], gym.Env]
DECIDES_STAGE1 = (
    "seed", "stage1_mode", "stage1_scope", "stage1", "sacfd", "exploration", "collect_episodes", "max_rl_episodes"
)  # fmt: skip
"""Fields of the configuration that a stage 1's snapshot must share."""
STOPS = (NoSuccessError, UpdateError, SupervisedError, WorkerError, PictureError)
"""What a guard stops a run with; the results say so."""


class IterativeTrainer:
    """iRe-VLA: supervised learning, then for each RL task online RL on the head and supervised learning of everything.

    Args:
        policy: where to start; trained in place.
        expert: expert episodes D_e.
        rl_tasks: task labels, learned one after the other (Algorithm 1).
        make_envs: task label -> env in the observation convention; called in worker processes, so it must pickle.
        eval_tasks: group name ("expert", "rl", "unseen") -> task labels; by default the RL tasks alone.
        config: everything else.
        workdir: a new directory for checkpoints, curves, data and results.
        lora: LoRA weights to add before the first stage that trains with scope "lora", if the encoder has none.
        guards: time-outs, when to roll back, and how many checkpoints to keep; free to change on resuming.
        launch: beginning of a command that runs stages 0 and 2 in processes of their own, such as "torchrun
            --nproc-per-node 4"; None for this process.
        console: where to print; a silent `Console(quiet=True)` is fine.

    Raises:
        FileExistsError: `workdir` holds another run.
        FileNotFoundError: `launch` is not installed.
        RunDirectoryError: on resuming, the run was begun with something else.
        ValueError: the configuration contradicts itself, there is no expert data, or this is one of several processes.
        TypeError: stage 1 is wanted and the head has no log-probabilities; or `lora` is something else.
    """

    def __init__(
        self,
        policy: VLAPolicy,
        *,
        expert: EpisodeStore | Sequence[EpisodeStore],
        rl_tasks: Sequence[str],
        make_envs: MakeEnv,
        eval_tasks: Mapping[str, Sequence[str]] | None = None,
        config: IterativeConfig | None = None,
        workdir: str | Path,
        lora: LoRASettings | None = None,
        guards: GuardConfig | None = None,
        launch: str | None = None,
        console: Console | None = None,
        resume: bool = False,
    ):
        self.policy = policy
        self.expert = [expert] if isinstance(expert, EpisodeStore) else list(expert)
        self.rl_tasks = list(rl_tasks)
        self.make_envs = make_envs
        self.eval_tasks = {name: list(tasks) for name, tasks in (eval_tasks or {"rl": rl_tasks}).items()}
        self.config = config or IterativeConfig()
        self.console = console or Console()
        self.lora = lora
        self.guards = guards or GuardConfig()
        self.launch = launch
        check_launch(launch)
        self._running = "the start"
        self.threads = torch.get_num_threads()
        check(self.config, rl_tasks)
        if self.rl_tasks and self.config.stage1_mode != "none":
            require_log_probs(policy)
        if not isinstance(lora, LoRASettings | None):
            raise TypeError(f"lora={lora!r}; expected vla_rl.encoders.LoRASettings(r=16, alpha=32), say, or None")
        if not resume:
            check_scopes(self.config, policy.encoder, lora=lora, rl=bool(self.rl_tasks))
        if unknown := [group for group in self.eval_tasks if group not in GROUPS]:
            raise ValueError(f"eval_tasks has the groups {unknown}; reports know {list(GROUPS)} alone; use these")
        if empty := [group for group, tasks in self.eval_tasks.items() if not tasks]:
            raise ValueError(f"eval_tasks has no task in {empty}; name some, or leave the group out")
        if not sum(len(store) for store in self.expert):
            raise ValueError("the expert stores hold no episode; collect some first (vla-rl collect)")
        self.evaluators: dict[str, Evaluator] = {}
        self.run_dir = RunDirectory(workdir, resume=resume)
        self.watch = RunWatch(self.run_dir, config=self.guards, expert=self.expert, console=self.console)
        checkpoint = self.run_dir.usable_checkpoint()
        facts = start_facts(
            rl_tasks=self.rl_tasks, eval_tasks=self.eval_tasks, lora=lora, expert=self.expert, policy=policy
        )
        refuse_other_run(self.run_dir.path, config=self.config, facts=facts, compare_policy=checkpoint is None)
        write_json(self.run_dir.path / "config.json", asdict(self.config))
        if not (self.run_dir.path / "start.json").is_file():
            write_json(self.run_dir.path / "start.json", facts)
        if checkpoint is not None:
            self.policy = self._load(checkpoint)

    @classmethod
    def resume(cls, workdir: str | Path, **kwargs: Any) -> IterativeTrainer:
        """Continue a run after a kill, from its last finished phase, with the numbers it would have had.

        After SIGTERM it goes on from within the stage; if that was a stage 1, with other numbers (see `run`).
        A damaged checkpoint is passed over with a warning, and what came after the one before it is repeated.

        Args:
            workdir: directory of the run.
            **kwargs: as for the constructor; of `policy`, only the device matters once a checkpoint has been written.

        Raises:
            RunDirectoryError: the run was begun with something else (see `vla_rl.resuming.MAY_DIFFER`), or its files
                are damaged.
        """
        if "policy" not in kwargs:
            raise ValueError("resume needs policy=, the one that the run began with: stage 0 may not have finished")
        return cls(kwargs.pop("policy"), workdir=workdir, resume=True, **kwargs)

    def run(self) -> dict[str, Any]:
        """Every phase that has not finished yet; returns the content of `results.json`.

        On SIGTERM (a scheduler takes the machine away) the run stops in order. It resumes within a stage where that
        was, and from the last finished phase elsewhere: bit-equal, unless it was in a stage 1 (see `StageSnapshots`).

        Raises:
            PreemptedError: after SIGTERM; uncaught, it ends the process with exit code 143.
        """
        with stop_on_sigterm():
            try:
                self._schedule()
            except PreemptedError:
                self.run_dir.note_stop(self._running)
                self.console.print(
                    f"SIGTERM during {self._running}: {len(self.run_dir.state['done'])} phases are finished and kept; "
                    f"resume the run in {self.run_dir.path} to go on (exit code {EXIT_CODE})"
                )
                raise
            finally:
                self.close()
        return self.run_dir.read_results()

    def _schedule(self) -> None:
        config = self.config
        self.watch.check_expert_images()
        if not self.run_dir.state["done"]:
            self._check_env()
        if config.stage0.steps:
            self._phase("stage0", partial(self._supervise, self.expert, config.stage0, "stage0"), trains=True)
        elif not self.run_dir.state["done"]:
            self._phase("start", lambda: None, trains=True)  # what there is to roll back to
        self._phase("eval-stage0", partial(self._evaluate, "after-stage0", videos=True))
        for number, task in enumerate(self.rl_tasks):
            for round_ in range(config.rounds):
                self._round(number, task, round_)

    def _check_env(self) -> None:
        """Refuse, before stage 0 has cost its time, envs that would be refused after it, by those of two tasks."""
        labels = list(dict.fromkeys([*self.rl_tasks, *chain.from_iterable(self.eval_tasks.values())]))[:2]
        envs = [partial(self.make_envs, label) for label in labels]
        env = WorkerVectorEnv(envs, num_workers=0, autoreset_mode=AutoresetMode.DISABLED)
        with closing(env):
            instruction_table(env)
            observation, action = env.single_observation_space, env.single_action_space
            require_unit_box(action, len(self.policy.action_mean))
            if self.rl_tasks and self.config.has_stage2 and self.config.stage2_data == "expert+rl":
                require_same_steps(self.expert, observation=observation, action=action, chunk=self.policy.head.chunk)
        self.watch.check_expert_steps()

    def close(self) -> None:
        """Stop worker processes and flush the logs; `run` does so at its end."""
        for evaluator in self.evaluators.values():
            evaluator.close()
        self.evaluators.clear()
        self.run_dir.close()

    def _round(self, number: int, task: str, round_: int) -> None:
        """Stage 1 and stage 2 on one RL task."""
        config, name = self.config, f"task{number}-round{round_}"
        learns = config.has_stage2
        last = number == len(self.rl_tasks) - 1 and round_ == config.rounds - 1
        if config.stage1_mode != "none":
            snapshots = self._snapshots(f"{name}-stage1", task)
            with snapshots.on_sigterm():  # until the stage's checkpoint is written
                body = partial(self._stage1, name, number, task, round_, snapshots)
                self._phase(f"{name}-stage1", body, trains=True)
                snapshots.finish()
        if config.stage1_mode in ("ppo", "sacfd"):
            done = last and not learns
            self._phase(f"{name}-eval1", partial(self._evaluate, f"{name}-after-stage1", videos=done))
        if learns:
            self._phase(f"{name}-stage2", partial(self._stage2, f"{name}-stage2"), trains=True)
            self._phase(f"{name}-eval2", partial(self._evaluate, f"{name}-after-stage2", videos=last))

    def _phase(self, name: str, body: Callable[[], str | None], *, trains: bool = False) -> None:
        """Run `body` unless it is done, seeded by its name, so that a resumed run repeats the same numbers.

        `body` may return a checkpoint to go on from, in place of the policy as it is.
        """
        if self.run_dir.is_done(name):
            return
        self._running = name
        seed_everything(self._seed(name))
        try:
            with self.run_dir.timing(name):
                checkpoint = body()
            if trains and (problem := weights_problem(self.policy)) is not None:
                raise UpdateError(f"{name} ended with {problem}; lower the learning rates or check the data")
        except STOPS as error:
            self.watch.note(type(error).__name__, str(error), phase=name)
            raise
        if trains:
            checkpoint = self.run_dir.save_checkpoint(name, self.policy.save_pretrained)
        elif checkpoint is not None:
            self.policy = self._load(self.run_dir.path / checkpoint)
        self.run_dir.finish(name, checkpoint=checkpoint)
        if self.guards.keep_checkpoints is not None:
            self.run_dir.keep_checkpoints(self.guards.keep_checkpoints, also=[self.watch.best_checkpoint()])

    def _load(self, checkpoint: Path) -> VLAPolicy:
        return VLAPolicy.from_pretrained(checkpoint, device=self.policy.device, **consent(self.policy))

    def _stage2(self, phase: str) -> None:
        found = self._rl_stores() if self.config.stage2_data == "expert+rl" else []
        weights = task_weights(self.expert, found, rl_fraction=self.config.rl_fraction)
        self._supervise([*self.expert, *found], self.config.stage2, phase, weights)

    def _supervise(
        self, stores: Sequence[EpisodeStore], config: SLConfig, phase: str, weights: Mapping[str, float] | None = None
    ) -> None:
        if config.scope == "lora":
            self._ensure_lora()
        with self._progress(phase, config.steps) as advance, torch_threads(self.threads):

            def on_step(step: int, loss: float) -> None:
                advance(step + 1, f"loss {loss:.4f}")
                if step % 20 == 0:
                    self.run_dir.log({"losses/bc_loss": loss}, phase=phase, step=step)

            loss, number = supervise(
                self.policy,
                stores,
                config=config,
                seed=self._seed(phase),
                data_seed=self._seed(phase + "-data"),
                task_weights=weights,
                on_step=on_step,
                launch=self.launch,
                folder=self.run_dir.path / "jobs" / phase,
            )
        where = f" in {number} processes" if self.launch is not None else ""
        self.console.print(f"  {phase}: loss {loss:.4f} after {config.steps} steps{where}")

    def _snapshots(self, phase: str, task: str) -> StageSnapshots:
        """What a stage 1 goes on from after SIGTERM."""
        of = {name: value for name, value in asdict(self.config).items() if name in DECIDES_STAGE1}
        return StageSnapshots(
            self.run_dir.path / "jobs" / phase,
            of=of | {"phase": phase, "task": task, "policy": policy_digest(self.policy)},
            say=lambda message: self.watch.note("preempted", message, phase=phase),
        )

    def _stage1(self, name: str, number: int, task: str, round_: int, snapshots: StageSnapshots) -> None:
        config = self.config
        algorithm = config.sacfd if config.stage1_mode == "sacfd" else config.stage1
        if config.stage1_scope == "lora":
            self._ensure_lora()
        make_env = partial(self.make_envs, task)
        if config.exploration.start_curriculum:
            make_env = partial(_with_curriculum, make_env)
            # The noisy success includes easy starts, and says nothing of the task's own.
            algorithm = replace(algorithm, converged_success=float("inf"))
        env = WorkerVectorEnv(
            [make_env] * algorithm.num_envs,
            num_workers=config.num_workers,
            autoreset_mode=AutoresetMode.NEXT_STEP,
            timeout=self.guards.worker_timeout,
            max_restarts=self.guards.max_worker_restarts,
        )
        phase, first = f"{name}-stage1", number == 0 and round_ == 0
        try:
            stop_at_zero = config.stop_at_zero and first
            shared = {"task": task, "iteration": round_, "snapshots": snapshots, "stop_at_zero": stop_at_zero}
            result = self._practise(env, algorithm, name=name, **shared)
            frontiers = env.get_attr("frontier") if config.exploration.start_curriculum else ()
            if env.num_restarts:
                self.watch.note(
                    "worker_restarted",
                    f"env workers hung or died and were started again {env.num_restarts} times; their running episodes "
                    "were cut off",
                    phase=phase,
                )
        finally:
            env.close()
        self.watch.check_stage1(result, task=task, phase=phase, learns=config.stage1_mode != "collect")
        self._store(name, result)
        summary = {key: value for key, value in asdict(replace(result, successes=[])).items() if key != "successes"}
        if frontiers:  # how close to the goal episodes began in the end, 1 being next to it
            summary["closeness"] = float(np.mean(frontiers))
        self.run_dir.add_result(phase, {"task": task, "stored_successes": len(result.successes), **summary})
        if frontiers:
            self.console.print(
                f"  {phase}: episodes began at closeness {summary['closeness']:.2f} or less at the end (1 at the start)"
            )
        self.console.print(
            f"  {phase} ({task}): {result.num_env_steps:,} env steps, {result.num_episodes} episodes, noisy success "
            f"{result.first_success_rate:.2f} -> {result.last_success_rate:.2f}, {len(result.successes)} successes kept"
        )

    def _practise(
        self,
        env: WorkerVectorEnv,
        algorithm: PPOConfig | SACfDConfig,
        *,
        name: str,
        task: str,
        stop_at_zero: bool,
        **more: Any,
    ) -> Stage1Result:
        """Stage 1 itself, by the algorithm that the configuration asks for."""
        config, seed, phase = self.config, self._seed(f"{name}-env"), f"{name}-stage1"
        shared: dict[str, Any] = {
            "task": task,
            "exploration": config.exploration,
            "max_successes": config.max_rl_episodes,
            "seed": seed,
            **more,
        }
        if config.stage1_mode == "collect":
            with self._progress(phase, None) as advance:
                advance(0, f"{config.collect_episodes} episodes")
                log = partial(self._log, phase)
                return run_collect(self.policy, env, num_episodes=config.collect_episodes, log=log, **shared)
        with self._progress(phase, algorithm.total_timesteps) as advance:

            def log(metrics: dict[str, float], step: int) -> None:
                self._log(phase, metrics, step)
                advance(
                    step, f"noisy success {metrics['charts/success_rate']:.2f}, {metrics['charts/SPS']:.0f} steps/s"
                )

            shared |= {"stop_at_zero": stop_at_zero, "update_threads": self.threads, "log": log}
            if isinstance(algorithm, SACfDConfig):
                earlier = [store for store in self._rl_stores() if store.path.name != name]
                demos = [episode for store in earlier for episode in store if episode.task == task]
                return run_sac(self.policy, env, config=algorithm, demos=demos, **shared)
            expert = None
            if algorithm.bc_coef:
                expert = BalancedSampler(self.expert, batch_size=256, seed=seed, chunk=self.policy.head.chunk)
            scope = config.stage1_scope
            return run_ppo(self.policy, env, config=algorithm, scope=scope, expert=expert, **shared)

    def _ensure_lora(self) -> None:
        if self.policy.encoder.lora is None and self.lora is not None:
            self.policy.encoder.add_lora(self.lora)

    def _store(self, name: str, result: Stage1Result) -> None:
        """Write D_RL of one stage 1 as a store of its own."""
        path = self.run_dir.fresh("rl_data", name)
        if not result.successes:
            return
        with EpisodeStore(path, mode="w-") as store:
            for episode in result.successes:
                store.append(episode)

    def _rl_stores(self) -> list[EpisodeStore]:
        root = self.run_dir.path / "rl_data"
        names = sorted(path.name for path in root.iterdir()) if root.is_dir() else []
        # A run that fell back to an earlier checkpoint holds data of phases that are still to be repeated.
        return [EpisodeStore(root / name, mode="r") for name in names if self.run_dir.is_done(f"{name}-stage1")]

    def _evaluate(self, label: str, *, videos: bool = False) -> str | None:
        """Deterministic success on every task of every group, on the same seeds every time.

        Returns:
            The checkpoint to roll back to, if success has fallen too low.
        """
        outcome: dict[str, EvaluationResult] = {}
        with self._progress(label, None) as advance, torch_threads(1):
            for group in self.eval_tasks:
                result = outcome[group] = self._evaluated(group, advance, videos=videos)
                self._save_frames(label, result)
                labels = [key for key in self.run_dir.read_results() if key not in ("guards", label)]
                self.run_dir.log({f"eval/{group}": result.mean}, phase=label, step=len(labels))
                self.console.print(f"  {label}: {group} {describe(result)}")
        self.run_dir.add_result(label, {group: result.to_dict() for group, result in outcome.items()})
        return self.watch.rollback(label, outcome)

    def _evaluated(
        self, group: str, advance: Callable[..., None], *, videos: bool, attempt: int = 1
    ) -> EvaluationResult:
        """The result on one group; begun again if a worker is lost on the way."""
        config = self.config
        episodes = config.rl_eval_episodes if group == "rl" else config.eval_episodes
        try:
            return self._evaluator(group, episodes).run(
                self.policy,
                episodes_per_task=episodes,
                seed=config.eval_seed,
                frames_of=config.video_episodes if videos and group == "rl" else 0,
                progress=partial(_report, advance, f"{group}, {len(self.eval_tasks[group])} tasks"),
            )
        except LostWorkerError as error:
            if group in self.evaluators:
                self.evaluators.pop(group).close()
            if attempt > self.guards.max_worker_restarts:
                raise
            self.watch.note("evaluation_repeated", f"attempt {attempt} on {group}: {error}", phase=self._running)
        return self._evaluated(group, advance, videos=videos, attempt=attempt + 1)

    def _evaluator(self, group: str, episodes: int) -> Evaluator:
        """One live evaluator per group: building simulators is slow."""
        if group not in self.evaluators:
            evaluator = self.evaluators[group] = Evaluator(
                {task: partial(self.make_envs, task) for task in self.eval_tasks[group]},
                num_envs_per_task=max(1, min(episodes, self.config.eval_envs // len(self.eval_tasks[group]))),
                num_workers=self.config.num_workers,
            )
            evaluator.envs.timeout = self.guards.worker_timeout
            seeds = [self.config.eval_seed + i for i in range(evaluator.envs.num_envs)]
            obs, _ = evaluator.envs.reset(seed=seeds)
            self.watch.check_env_images(obs, whose=f"the env ({group} tasks)", phase=self._running)
        return self.evaluators[group]

    def _save_frames(self, label: str, result: EvaluationResult) -> None:
        for task, played in result.tasks.items():
            episodes = [episode.frames for episode in played.episodes if episode.frames is not None]
            if not episodes:
                continue
            path = frames_file(self.run_dir.path, label, task)
            path.parent.mkdir(exist_ok=True)
            np.savez_compressed(path, *episodes)

    def _log(self, phase: str, metrics: dict[str, float], step: int) -> None:
        self.run_dir.log(metrics, phase=phase, step=step)

    def _seed(self, name: str) -> int:
        return phase_seed(self.config.seed, name)

    @contextmanager
    def _progress(self, title: str, total: int | None) -> Iterator[Callable[..., None]]:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
        )
        quiet = not self.console.is_terminal
        with Progress(*columns, console=self.console, transient=True, disable=quiet) as progress:
            bar = progress.add_task(title, total=total, note="")
            yield lambda completed, note, total=total: progress.update(bar, completed=completed, note=note, total=total)


def _with_curriculum(make_env: Callable[[], gym.Env]) -> gym.Env:
    return StartCurriculum(make_env())


def _report(advance: Callable[..., None], note: str, finished: int, total: int) -> None:
    advance(finished, note, total)
