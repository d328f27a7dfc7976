"""Stage 1 on one physical environment: SAC from demonstrations that learns between episodes and can be continued."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import gymnasium as gym
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from safetensors import safe_open

from vla_rl._observation import told_success
from vla_rl.data import Episode, EpisodeStore
from vla_rl.fitting import require_unit_box
from vla_rl.intervals import wilson_interval
from vla_rl.policy import VLAPolicy
from vla_rl.rl.sac import SACfDConfig
from vla_rl.rl.stage1 import Log
from vla_rl.rl.stage1_sac import run_sac
from vla_rl.robot.operator import OperatorQuit
from vla_rl.robot.recording import RecordEpisodes
from vla_rl.saved_files import read_tensors, write_tensors

HEAD_FILE = "head.safetensors"


@dataclass(frozen=True)
class RobotRun:
    """What happened on the robot in one call.

    Attributes:
        num_episodes: recorded, failures and broken-off ones included.
        num_successes: of these.
        num_env_steps: in all of them.
        num_overruns: steps that came late, if a `ControlRate` counts them, else 0.
        finished: all env steps of the configuration are done, in this call and those before; otherwise the person
            ended the run.
    """

    num_episodes: int
    num_successes: int
    num_env_steps: int
    num_overruns: int
    finished: bool


def robot_settings(**changes: Any) -> SACfDConfig:
    """`SACfDConfig` for one environment whose steps are dear; `changes` replace any of its fields.

    Learning waits for the end of the episode, replays every step more often, starts after fewer steps, and never
    believes in two lucky episodes in a row that it has converged. Our choice; the paper names 20 demonstrations alone.
    """
    settings = {
        "total_timesteps": 5_000,
        "num_envs": 1,
        "rollout_steps": 1,
        "learn_between_episodes": True,
        "learning_starts": 1_000,
        "utd_ratio": 2.0,
        "converged_success": math.inf,
    }
    return SACfDConfig(**(settings | changes))


def train_on_robot(
    policy: VLAPolicy,
    env: gym.Env,
    *,
    task: str,
    workdir: str | Path,
    config: SACfDConfig | None = None,
    demos: Iterable[Episode] = (),
    seed: int = 0,
    iteration: int = 0,
    update_threads: int = 1,
    log: Log | None = None,
) -> RobotRun:
    """Stage 1 of `policy` on one environment, every episode recorded at once in `workdir / "episodes"`.

    The env runs in this process, one step after the other, and the updates of `run_sac` come between its episodes:
    after the last step of one and before the reset of the next, while a person puts the scene back. The head is saved
    after every episode's updates. Called again with the same `workdir`, it continues: with the saved head, with all
    recorded successes as demonstrations and the other episodes in the buffer, and with the env steps that are left.
    Critics, temperature and optimisers begin afresh, and the critics' warm-up comes first.

    Args:
        policy: learns, in place; on continuing the same policy as at the start, whose head is replaced.
        env: one environment in the observation convention with actions in [-1, 1]; it stays open. Wrappers of this
            package make one of a robot.
        task: label of the episodes.
        workdir: for this task on this robot.
        config: hyperparameters with `num_envs=1`; None means `robot_settings()`.
        demos: successful episodes from elsewhere, whose actions are those that were executed.
        seed: of the first reset and the batches.
        iteration: number stored with the episodes.
        update_threads: torch threads of an update.
        log: called with figures and env steps of this call after every episode.

    Raises:
        ValueError: `config` is for several environments, the saved head is of another policy, or `workdir` holds
            episodes of another task.
        UpdateError: an update went wrong.
    """
    config = config or robot_settings()
    if config.num_envs != 1:
        raise ValueError(f"num_envs={config.num_envs}; a robot is one environment: give robot_settings()")
    workdir = Path(workdir)
    head_file = workdir / HEAD_FILE
    if head_file.exists():
        _load_head(policy, head_file)
    with EpisodeStore(workdir / "episodes") as store:
        if others := {info.task for info in store.index} - {task}:
            raise ValueError(f"{workdir} holds episodes of {others.pop()!r}; give {task!r} a directory of its own")
        left = config.total_timesteps - store.total_steps
        recorder = RecordEpisodes(env, store, task=task, iteration=iteration, policy_version=policy.encoder.fingerprint)
        if left <= 0:
            return RobotRun(0, 0, 0, 0, finished=True)
        past = range(len(store))
        successes = [number for number in past if store.index[number].success]
        others = [number for number in past if not store.index[number].success]

        def after_episode(figures: dict[str, float], step: int) -> None:
            _save_head(policy, head_file)
            if log is not None:
                log(figures | {"charts/overruns": _overruns(env)}, step)

        overruns_before = _overruns(env)
        vector = SyncVectorEnv([lambda: recorder], autoreset_mode=AutoresetMode.NEXT_STEP)
        finished = True
        try:
            run_sac(
                policy,
                vector,
                task=task,
                config=replace(config, total_timesteps=left),
                demos=chain(demos, (store[number] for number in successes)),
                replay=(store[number] for number in others),
                max_successes=1,
                seed=seed + len(store),
                iteration=iteration,
                update_threads=update_threads,
                log=after_episode,
            )
        except OperatorQuit:
            finished = False
        finally:
            recorder.flush()
        return RobotRun(
            recorder.num_episodes,
            recorder.num_successes,
            recorder.num_steps,
            _overruns(env) - overruns_before,
            finished=finished,
        )


def evaluate_on_robot(
    policy: VLAPolicy,
    env: gym.Env,
    *,
    episodes: int,
    seed: int | None = None,
    say: Callable[[str], None] | None = None,
) -> tuple[int, int, tuple[float, float]]:
    """Episodes of the deterministic policy on one environment, one after the other.

    Args:
        policy: acts.
        env: in the observation convention; wrap it in `RecordEpisodes(..., source="evaluation")` to keep them.
        episodes: how many.
        seed: of the first reset; the next ones count up. None leaves it to the environment.
        say: told the outcome of each.

    Returns:
        Successes, episodes that ended, and the 95 % Wilson interval of the rate; fewer episodes than asked for if the
        person ended the run, and then those before.

    Raises:
        OperatorQuit: the person ended the run before the first episode was over.
        ValueError: the actions are not in [-1, 1], or not as many as the head's.
    """
    require_unit_box(env.action_space, len(policy.action_mean))
    policy.train(False)
    table: tuple[str, ...] = env.get_wrapper_attr("instructions")
    successes = done = 0
    try:
        for number in range(episodes):
            obs, _ = env.reset(seed=None if seed is None else seed + number)
            ended = success = False
            while not ended:
                action = policy.act(obs, table[int(obs["task_id"])])
                obs, _, terminated, truncated, info = env.step(action)
                success |= told_success(info)
                ended = terminated or truncated
            successes, done = successes + success, done + 1
            if say is not None:
                say(f"episode {done}: {'success' if success else 'failure'}, {successes} of {done}")
    except OperatorQuit:
        if not done:
            raise
    return successes, done, wilson_interval(successes, done)


def _overruns(env: gym.Env) -> int:
    return int(env.get_wrapper_attr("num_overruns")) if env.has_wrapper_attr("num_overruns") else 0


def _save_head(policy: VLAPolicy, path: Path) -> None:
    """Write the head's weights, so that a crash leaves the former file or this one."""
    temporary = path.with_suffix(".tmp")
    write_tensors(policy.head.state_dict(), temporary, metadata={"encoder": policy.encoder.fingerprint})
    with temporary.open("rb+") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _load_head(policy: VLAPolicy, path: Path) -> None:
    shapes = {name: tuple(value.shape) for name, value in policy.head.state_dict().items()}
    tensors = read_tensors(path, shapes)
    with safe_open(path, framework="pt") as file:
        encoder = (file.metadata() or {}).get("encoder")
    if encoder != policy.encoder.fingerprint:
        raise ValueError(
            f"{path} belongs to encoder {encoder}, the policy's is {policy.encoder.fingerprint}: give the policy that "
            "this run began with, or another workdir"
        )
    policy.head.load_state_dict(tensors)
