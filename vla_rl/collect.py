"""Expert demonstrations: scripted experts run in parallel processes, their successes stored as episodes."""

from __future__ import annotations

import multiprocessing
import pickle
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.vector.utils import CloudpickleWrapper

from vla_rl._observation import told_success
from vla_rl._vector_checks import LostWorkerError
from vla_rl._vector_chunks import worker_surroundings
from vla_rl._vector_worker import end_with_parent
from vla_rl.data.episode import Episode
from vla_rl.fitting import require_unit_box
from vla_rl.importing import load_object
from vla_rl.vector import available_cores

Expert = Callable[[gym.Env], np.ndarray]


@dataclass(frozen=True)
class CollectJob:
    """A few episodes of one task for one process."""

    make_env: Callable[[str], gym.Env]
    make_expert: Callable[[gym.Env], Expert]
    task: str
    seeds: tuple[int, ...]
    noise: float


def run_expert(env: gym.Env, expert: Expert, *, task: str, seed: int, noise: float) -> Episode:
    """One episode of an expert.

    With noise, the env executes `clip(expert + N(0, noise))` while the expert's own action is stored, so that the data
    show how to come back from a deviation (DART, Laskey et al. 2017, arXiv 1703.09327).

    Args:
        env: in the observation convention.
        expert: callable(env) -> action in [-1, 1].
        task: label to store.
        seed: of the reset and the noise.
        noise: standard deviation, in action units.

    Raises:
        KeyError: the env tells no success.
        ValueError: the env's actions are not in [-1, 1], or the expert's has another shape.
    """
    require_unit_box(env.action_space)
    rng = np.random.default_rng(seed)
    obs, info = env.reset(seed=seed)
    observations, actions, rewards, success = [_copied(obs)], [], [], False
    terminated = truncated = False
    while not (terminated or truncated):
        action = np.asarray(expert(env), dtype=np.float32)
        if action.shape != env.action_space.shape:
            raise ValueError(
                f"the expert gave an action of shape {action.shape}, the env takes {env.action_space}; give one of that"
            )
        executed = np.clip(action + noise * rng.standard_normal(action.shape), -1, 1).astype(np.float32)
        obs, reward, terminated, truncated, info = env.step(executed)
        observations.append(_copied(obs))
        actions.append(action)
        rewards.append(float(reward))
        success |= told_success(info)
    ends = np.arange(len(actions)) == len(actions) - 1
    instructions: tuple[str, ...] = env.get_wrapper_attr("instructions")
    return Episode(
        observations={key: np.stack([o[key] for o in observations]) for key in observations[0]},
        actions=np.stack(actions),
        rewards=np.asarray(rewards, dtype=np.float64),
        terminations=ends & terminated,
        truncations=ends & truncated,
        success=success,
        source="expert",
        task=task,
        instruction=instructions[int(observations[0]["task_id"])],
        seed=seed,
        iteration=0,
        policy_version=f"expert, noise {noise}",
    )


def collect_expert(
    tasks: Sequence[str],
    *,
    make_env: Callable[[str], gym.Env],
    expert: str,
    episodes: int,
    noise: float = 0.1,
    seed: int = 0,
    num_workers: int | None = None,
) -> Iterator[Episode]:
    """Yield `episodes` expert episodes per task, failures included, in the order of the jobs.

    Args:
        tasks: labels.
        make_env: label -> env; cloudpickle must be able to pickle it (a lambda is fine).
        expert: import path of `make_expert(env) -> expert`, e.g. "vla_rl_envs:make_expert".
        episodes: per task.
        noise: standard deviation of the action noise.
        seed: of the first episode of each task; the next ones count up.
        num_workers: processes; 0 stays in this one, None starts one per core, at most 8.

    Raises:
        ValueError: `episodes` or `num_workers` is too small, or there is no such expert.
        LostWorkerError: a process died.
    """
    if episodes < 1 or (num_workers is not None and num_workers < 0):
        raise ValueError(
            f"collect_expert got episodes={episodes} and num_workers={num_workers}; give at least 1 episode and 0 or "
            "more workers."
        )
    chunk, make_expert = 5, load_object(expert)
    jobs = [
        CollectJob(make_env, make_expert, task, tuple(range(seed + start, seed + min(start + chunk, episodes))), noise)
        for task in tasks
        for start in range(0, episodes, chunk)
    ]
    if num_workers == 0 or not jobs:
        envs: dict[str, gym.Env] = {}
        try:
            for job in jobs:
                yield from _run_job(job, envs)
        finally:
            _close(envs)
        return
    count = min(available_cores(), 8) if num_workers is None else num_workers
    for batch in _in_processes(jobs, min(count, len(jobs))):
        yield from batch


def _in_processes(jobs: Sequence[CollectJob], count: int) -> Iterator[list[Episode]]:
    """The episodes of every job, in order; the processes work on at most two jobs each in advance."""
    context = multiprocessing.get_context("spawn")
    executor = ProcessPoolExecutor(count, mp_context=context, initializer=_begin_worker)
    pending: deque[Future[list[Episode]]] = deque()
    waiting = iter(jobs)
    workers: list[Any] = []
    try:
        while True:
            while len(pending) < 2 * count and (job := next(waiting, None)) is not None:
                pickled = pickle.dumps(CloudpickleWrapper(job))  # type: ignore[arg-type]
                with worker_surroundings():
                    pending.append(executor.submit(_run_pickled, pickled))
                workers = list(executor._processes.values())
            if not pending:
                return
            yield pending.popleft().result()
    except BrokenProcessPool as error:
        raise LostWorkerError(
            "a process that collects expert episodes died, often for want of memory; use fewer workers, or "
            "num_workers=0 to see it happen in this process."
        ) from error
    finally:
        for worker in workers:  # else what is pending would be finished first, after Ctrl-C too
            worker.kill()
        executor.shutdown(cancel_futures=True)


_ENVS: dict[str, gym.Env] = {}
"""The environment of the latest task, in a worker process of one `collect_expert`."""


def _begin_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends a worker at once
    threading.Thread(target=end_with_parent, daemon=True).start()


def _run_pickled(job: bytes) -> list[Episode]:
    return _run_job(pickle.loads(job).fn)


def _run_job(job: CollectJob, envs: dict[str, gym.Env] = _ENVS) -> list[Episode]:
    if job.task not in envs:
        _close(envs)
        envs[job.task] = job.make_env(job.task)
    env = envs[job.task]
    expert = job.make_expert(env)
    return [run_expert(env, expert, task=job.task, seed=seed, noise=job.noise) for seed in job.seeds]


def _close(envs: dict[str, gym.Env]) -> None:
    for env in envs.values():
        env.close()
    envs.clear()


def _copied(obs: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """An environment may give the same arrays with every step."""
    return {key: np.array(value) for key, value in obs.items()}
