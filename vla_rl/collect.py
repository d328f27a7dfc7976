"""Expert demonstrations: scripted experts run in parallel processes, their successes stored as episodes."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import gymnasium as gym
import numpy as np

from vla_rl._observation import told_success
from vla_rl._vector_chunks import SINGLE_THREADED
from vla_rl.data.episode import Episode
from vla_rl.importing import load_object
from vla_rl.vector import available_cores

Expert = Callable[[gym.Env], np.ndarray]


@dataclass(frozen=True)
class CollectJob:
    """A few episodes of one task for one process."""

    make_env: Callable[[str], gym.Env]
    expert: str
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
        ValueError: the expert's action has another shape than the env's.
    """
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
        make_env: label -> env; must pickle.
        expert: import path of `make_expert(env) -> expert`, e.g. "vla_rl_envs:make_expert".
        episodes: per task.
        noise: standard deviation of the action noise.
        seed: of the first episode of each task; the next ones count up.
        num_workers: processes; 0 stays in this one, None starts one per core, at most 8.
    """
    chunk = 5
    jobs = [
        CollectJob(make_env, expert, task, tuple(range(seed + start, seed + min(start + chunk, episodes))), noise)
        for task in tasks
        for start in range(0, episodes, chunk)
    ]
    if num_workers == 0:
        envs: dict[str, gym.Env] = {}
        try:
            for job in jobs:
                yield from _run_job(job, envs)
        finally:
            _close(envs)
        return
    count = min(available_cores(), 8) if num_workers is None else num_workers
    with multiprocessing.get_context("spawn").Pool(min(count, len(jobs)), initializer=_single_threaded) as pool:
        for batch in pool.imap(_run_job, jobs):
            yield from batch


_ENVS: dict[str, gym.Env] = {}
"""The environment of the latest task, in a worker process of one `collect_expert`."""


def _run_job(job: CollectJob, envs: dict[str, gym.Env] = _ENVS) -> list[Episode]:
    if job.task not in envs:
        _close(envs)
        envs[job.task] = job.make_env(job.task)
    env = envs[job.task]
    expert: Expert = load_object(job.expert)(env)
    return [run_expert(env, expert, task=job.task, seed=seed, noise=job.noise) for seed in job.seeds]


def _close(envs: dict[str, gym.Env]) -> None:
    for env in envs.values():
        env.close()
    envs.clear()


def _copied(obs: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """An environment may give the same arrays with every step."""
    return {key: np.array(value) for key, value in obs.items()}


def _single_threaded() -> None:
    os.environ.update(SINGLE_THREADED)
