"""Success rates: whole episodes on paired seeds, per task, with intervals, and the comparison of two evaluations."""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from types import TracebackType
from typing import Any, Protocol

import gymnasium as gym
import numpy as np
from gymnasium.vector import AutoresetMode

from vla_rl.envs import instruction_table, instructions_for
from vla_rl.fitting import require_unit_box
from vla_rl.intervals import wilson_interval
from vla_rl.vector import EnvGroup, WorkerVectorEnv

LONG = 10_000  # steps of an episode after which a warning says that it may never end


class Policy(Protocol):
    """What can be evaluated."""

    def act(self, obs: Mapping[str, Any], instructions: list[str], *, deterministic: bool) -> np.ndarray:
        """Actions [B, A] in [-1, 1] for B observations (arrays [B, ...] by key) and their B instructions."""
        ...


@dataclass(frozen=True)
class EpisodeOutcome:
    """One evaluation episode.

    Attributes:
        seed: the seed that its environment was reset with.
        success: ``info["success"]`` was true at any step.
        length: steps.
        episode_return: undiscounted sum of rewards.
        frames: uint8 [length + 1, H, W, 3] if they were asked for; not saved by ``to_dict``.
    """

    seed: int
    success: bool
    length: int
    episode_return: float
    frames: np.ndarray | None = field(default=None, repr=False, compare=False)


@dataclass(frozen=True)
class TaskResult:
    """The episodes of one task, ordered by seed."""

    episodes: tuple[EpisodeOutcome, ...]

    @property
    def n(self) -> int:
        """Number of episodes."""
        return len(self.episodes)

    @property
    def successes(self) -> int:
        """Number of successful episodes."""
        return sum(episode.success for episode in self.episodes)

    @property
    def rate(self) -> float:
        """Success rate."""
        return self.successes / self.n

    @property
    def interval(self) -> tuple[float, float]:
        """95 % Wilson interval of the success rate."""
        return wilson_interval(self.successes, self.n)

    @property
    def mean_length(self) -> float:
        """Mean length in steps."""
        return float(np.mean([episode.length for episode in self.episodes]))

    @property
    def mean_return(self) -> float:
        """Mean undiscounted return."""
        return float(np.mean([episode.episode_return for episode in self.episodes]))


@dataclass(frozen=True)
class EvaluationResult:
    """Results by task label."""

    tasks: dict[str, TaskResult]

    @property
    def mean(self) -> float:
        """Mean of the tasks' success rates (every task weighs the same)."""
        return float(np.mean([task.rate for task in self.tasks.values()]))

    @property
    def interval(self) -> tuple[float, float]:
        """95 % Wilson interval of ``mean``.

        With the same number of episodes for every task it is that of all episodes pooled (slightly wide when the tasks'
        rates differ); otherwise n is the effective number K^2 / sum_k(1 / n_k) of K tasks.
        """
        n = len(self.tasks) ** 2 / sum(1 / task.n for task in self.tasks.values())
        return wilson_interval(min(self.mean * n, n), n)

    def group(self, names: Sequence[str]) -> EvaluationResult:
        """The result on some of the tasks.

        Raises:
            KeyError: if a name is not one of the tasks.
        """
        missing = [name for name in names if name not in self.tasks]
        if missing:
            raise KeyError(f"tasks {missing} were not evaluated, only {list(self.tasks)}; give names of these.")
        return EvaluationResult({name: self.tasks[name] for name in names})

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data: the summary for a reader, and the episodes, from which ``from_dict`` rebuilds everything."""
        return {
            "mean": self.mean,
            "interval": list(self.interval),
            "tasks": {
                name: {
                    "n": task.n,
                    "successes": task.successes,
                    "rate": task.rate,
                    "interval": list(task.interval),
                    "mean_length": task.mean_length,
                    "mean_return": task.mean_return,
                    "episodes": [
                        {"seed": e.seed, "success": e.success, "length": e.length, "episode_return": e.episode_return}
                        for e in task.episodes
                    ],
                }
                for name, task in self.tasks.items()
            },
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> EvaluationResult:
        """Rebuild what ``to_dict`` wrote (without frames)."""
        return cls(
            {
                name: TaskResult(tuple(EpisodeOutcome(**episode) for episode in task["episodes"]))
                for name, task in data["tasks"].items()
            }
        )


def paired_difference(
    before: EvaluationResult,
    after: EvaluationResult,
    *,
    confidence: float = 0.95,
    resamples: int = 10_000,
    rng_seed: int = 0,
) -> tuple[float, float, float]:
    """How much ``after.mean`` exceeds ``before.mean``, with a paired bootstrap interval.

    Pairs are episodes of one task and one seed; seeds are resampled with replacement within each task, and the interval
    is the percentile one. It has no width where no pair differs.

    Returns:
        ``(difference, low, high)`` of the mean success rate.

    Raises:
        ValueError: if the two do not hold the same tasks and seeds.
    """
    rng = np.random.default_rng(rng_seed)
    if set(before.tasks) != set(after.tasks):
        raise ValueError(
            f"paired_difference got the tasks {list(before.tasks)} and {list(after.tasks)}; give the same tasks."
        )
    observed, samples = [], []
    for name, task in before.tasks.items():
        first, second = ({e.seed: float(e.success) for e in result.episodes} for result in (task, after.tasks[name]))
        if first.keys() != second.keys():
            raise ValueError(
                f"the two evaluations of {name!r} used different seeds; evaluate both with the same seed and n."
            )
        differences = np.array([second[seed] - first[seed] for seed in first])
        observed.append(differences.mean())
        samples.append(rng.choice(differences, (resamples, len(differences))).mean(axis=1))
    low, high = np.quantile(np.mean(samples, axis=0), [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(np.mean(observed)), float(low), float(high)


@dataclass
class _Slot:
    """The episode that runs in one sub-environment."""

    task: str
    seed: int
    frames: list[np.ndarray] | None
    rng: np.random.Generator
    success: bool = False
    length: int = 0
    episode_return: float = 0.0

    def outcome(self) -> EpisodeOutcome:
        frames = None if self.frames is None else np.stack(self.frames)
        return EpisodeOutcome(self.seed, self.success, self.length, self.episode_return, frames)


class Evaluator:
    """Environments of several tasks, kept alive between evaluations because building them is slow.

    Example:
        >>> with Evaluator({"reach": make_reach}) as evaluator:  # doctest: +SKIP
        ...     before = evaluator.run(policy, episodes_per_task=50, seed=1000)
        ...     train(policy)
        ...     after = evaluator.run(policy, episodes_per_task=50, seed=1000)
        >>> paired_difference(before, after)  # doctest: +SKIP
    """

    def __init__(
        self,
        env_fns: Mapping[str, Callable[[], gym.Env]],
        *,
        num_envs_per_task: int = 4,
        num_workers: int | None = None,
        context: str | None = "spawn",
    ) -> None:
        """Build the environments.

        Args:
            env_fns: task label -> thunk; episodes must end by themselves (a time limit), and ``reset(seed=)`` be
                honest.
            num_envs_per_task: sub-environments for each task.
            num_workers: processes, see ``WorkerVectorEnv``.
            context: multiprocessing start method.

        Raises:
            ValueError: if the environments' actions are not in [-1, 1], or they have no common table of instructions.
        """
        self.tasks = list(env_fns)
        self.num_envs_per_task = num_envs_per_task
        self.envs = WorkerVectorEnv(
            [env_fn for env_fn in env_fns.values() for _ in range(num_envs_per_task)],
            num_workers=num_workers,
            autoreset_mode=AutoresetMode.DISABLED,
            context=context,
        )
        try:
            self.instructions = instruction_table(self.envs)
            require_unit_box(self.envs.single_action_space)
        except BaseException:
            self.envs.close()
            raise

    def run(
        self,
        policy: Policy,
        *,
        episodes_per_task: int,
        seed: int,
        deterministic: bool = True,
        action_noise: float = 0.0,
        frames_of: int = 0,
        progress: Callable[[int, int], None] | None = None,
    ) -> EvaluationResult:
        """Play exactly ``episodes_per_task`` whole episodes of every task.

        Episode i of every task is reset with ``seed + i``, whatever the policy and the order in which episodes end, so
        that two policies meet the same episodes and short episodes are not over-represented. The halves of the
        environments take turns: one is stepping while the policy acts on the other.

        Args:
            policy: see ``Policy``; it never sees an environment that has nothing left to play.
            episodes_per_task: n.
            seed: of the first episode.
            deterministic: passed to ``policy.act``.
            action_noise: std of Gaussian noise added to each action, from a generator seeded by the episode's seed.
            frames_of: keep the frames of the first so many episodes of every task.
            progress: called with (episodes finished, episodes in all).

        Raises:
            KeyError: if the environments give no ``info["success"]``.
            ValueError: if ``episodes_per_task`` is not positive, or actions have another size than the environments'.
        """
        if episodes_per_task < 1:
            raise ValueError(f"episodes_per_task is {episodes_per_task}; give at least 1.")
        queues = {task: deque(range(episodes_per_task)) for task in self.tasks}
        outcomes: dict[str, list[EpisodeOutcome]] = {task: [] for task in self.tasks}
        total = episodes_per_task * len(self.tasks)
        act = partial(self._act, policy, deterministic=deterministic, noise=action_noise)
        games = deque(self._play(group, act, queues, outcomes, seed, frames_of) for group in self.envs.groups)
        finished = 0
        try:
            while games:
                game = games.popleft()
                if next(game, False):
                    games.append(game)
                before, finished = finished, sum(map(len, outcomes.values()))
                if progress is not None and finished > before:
                    progress(finished, total)
        finally:
            for game in games:
                game.close()
        return EvaluationResult(
            {task: TaskResult(tuple(sorted(done, key=lambda e: e.seed))) for task, done in outcomes.items()}
        )

    def _play(
        self,
        group: EnvGroup,
        act: Callable[[EnvGroup, dict[str, np.ndarray], list[_Slot | None]], np.ndarray],
        queues: Mapping[str, deque[int]],
        outcomes: Mapping[str, list[EpisodeOutcome]],
        seed: int,
        frames_of: int,
    ) -> Generator[bool, None, None]:
        """Play episodes in one group of environments until none are left; each step is in flight while it yields."""
        tasks = [self.tasks[i // self.num_envs_per_task] for i in range(group.rows.start, group.rows.stop)]
        slots: list[_Slot | None] = [None] * group.num_envs
        obs: dict[str, np.ndarray] = {}
        ended = np.ones(group.num_envs, dtype=np.bool_)
        while True:
            seeds: list[int | None] = [None] * group.num_envs
            for i in ended.nonzero()[0]:
                slots[i] = None
                if queues[tasks[i]]:
                    index = queues[tasks[i]].popleft()
                    seeds[i] = seed + index
                    frames: list[np.ndarray] | None = [] if index < frames_of else None
                    slots[i] = _Slot(tasks[i], seed + index, frames, np.random.default_rng(seed + index))
            started = np.array([s is not None for s in seeds])
            if started.any():
                obs, _ = group.reset(seed=seeds, options={"reset_mask": started} if obs else None)
                _keep_frames(slots, obs, started)
            active = np.array([slot is not None for slot in slots])
            if not active.any():
                return
            group.step_async(act(group, obs, slots), active=active)
            try:
                yield True
            finally:  # also when the evaluation is broken off, so that the group can be used again
                obs, rewards, terminations, truncations, infos = group.step_wait()
            if not infos.get("_success", ~active)[active].all():
                raise KeyError(
                    f"the environments' info has no 'success', only {sorted(k for k in infos if k[0] != '_')}; "
                    "wrap them in vla_rl.envs.VLAObservation(env, success_key=...)."
                )
            _keep_frames(slots, obs, active)
            ended = active & (terminations | truncations)
            for i, slot in enumerate(slots):
                if slot is None:
                    continue
                slot.success |= bool(infos["success"][i])
                slot.length += 1
                if slot.length == 10 * LONG:
                    raise RuntimeError(
                        f"an episode of {slot.task!r} has not ended in {slot.length:,} steps; wrap the environment in "
                        "gymnasium.wrappers.TimeLimit"
                    )
                if slot.length == LONG:
                    warnings.warn(
                        f"an episode of {slot.task!r} has run for {LONG:,} steps; if it never ends, neither does this: "
                        "wrap the environment in gymnasium.wrappers.TimeLimit",
                        stacklevel=2,
                    )
                slot.episode_return += float(rewards[i])
                if ended[i]:
                    outcomes[slot.task].append(slot.outcome())

    def _act(
        self,
        policy: Policy,
        group: EnvGroup,
        obs: dict[str, np.ndarray],
        slots: list[_Slot | None],
        *,
        deterministic: bool,
        noise: float,
    ) -> np.ndarray:
        rows = [i for i, slot in enumerate(slots) if slot is not None]
        instructions = instructions_for(self.instructions, obs["task_id"][rows])
        chosen = policy.act({key: value[rows] for key, value in obs.items()}, instructions, deterministic=deterministic)
        space: Any = group.action_space
        actions = np.zeros(space.shape, space.dtype)
        if np.shape(chosen) != actions[rows].shape:  # numpy would spread a single entry over all
            raise ValueError(
                f"the policy gave actions {list(np.shape(chosen)[1:])}, the environments take "
                f"{group.single_action_space}; they have to be a Box with as many entries as the policy's head."
            )
        actions[rows] = chosen
        if noise > 0:
            for i in rows:
                slot = slots[i]
                assert slot is not None
                actions[i] += noise * slot.rng.standard_normal(actions[i].shape)
            actions = np.clip(actions, space.low, space.high)
        return actions

    def close(self) -> None:
        """Close the environments."""
        self.envs.close()

    def __enter__(self) -> Evaluator:
        """Return the evaluator, to be closed on exit."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the environments."""
        self.close()


def evaluate(
    policy: Policy,
    env_fns: Mapping[str, Callable[[], gym.Env]],
    *,
    episodes_per_task: int,
    seed: int,
    num_envs_per_task: int = 4,
    num_workers: int | None = None,
    **options: Any,
) -> EvaluationResult:
    """Build the environments, evaluate once and close them; ``options`` are those of ``Evaluator.run``."""
    num_envs = min(num_envs_per_task, max(1, episodes_per_task))
    with Evaluator(env_fns, num_envs_per_task=num_envs, num_workers=num_workers) as evaluator:
        return evaluator.run(policy, episodes_per_task=episodes_per_task, seed=seed, **options)


def _keep_frames(slots: Sequence[_Slot | None], obs: Mapping[str, np.ndarray], rows: np.ndarray) -> None:
    images = next((obs[key] for key in sorted(obs) if key == "image" or key.startswith("image_")), None)
    for i, slot in enumerate(slots):
        if rows[i] and slot is not None and slot.frames is not None and images is not None:
            slot.frames.append(images[i].copy())


def describe(result: EvaluationResult) -> str:
    """One line: the mean over tasks with its interval, then each task's rate."""
    low, high = result.interval
    n = sum(task.n for task in result.tasks.values())
    tasks = ", ".join(f"{name} {task.rate:.2f}" for name, task in result.tasks.items())
    return f"{result.mean:.2f} [{low:.2f}, {high:.2f}], n = {n} ({tasks})"


def standing_labels(labels: list[str], results: Mapping[str, Any]) -> list[str]:
    """The labels of evaluations, in the order of the run, without those that a rollback at the last one gave up."""
    rollbacks = [entry for entry in results.get("guards", ()) if entry["guard"] == "rollback" and "evaluation" in entry]
    back = {entry["phase"]: entry["evaluation"] for entry in rollbacks}
    kept = back.get(labels[-1]) if labels else None
    return labels[: labels.index(kept) + 1] if kept in labels else labels
