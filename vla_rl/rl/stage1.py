"""Stage 1 of one RL task: PPO with a fresh critic, or plain collection; successes come back as episodes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor

from vla_rl.data.sampler import BalancedSampler
from vla_rl.encoders.features import Features
from vla_rl.encoders.lora import without_dropout
from vla_rl.envs import instructions_for
from vla_rl.heads.pooling import critic_shape
from vla_rl.heads.value import ValueHead
from vla_rl.policy import VLAPolicy
from vla_rl.rl.exploration import ExplorationConfig, ExtraReward
from vla_rl.rl.optimizers import load_optimizer, load_weights, optimizer_state
from vla_rl.rl.ppo import DeadGradients, PPOConfig, ppo_update
from vla_rl.rl.practice import EpisodeRecord, Practice, Stage1Result, go_on
from vla_rl.rl.rollout import Rollout, RolloutCollector
from vla_rl.rl.snapshots import StageSnapshots, State, copied
from vla_rl.sl.supervised import Scope, feature_source
from vla_rl.timing import Stopwatch

Log = Callable[[dict[str, float], int], None]


class NoSuccessError(RuntimeError):
    """A sparse reward that is never seen teaches nothing."""


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Run the body with `count` torch threads: one while env workers step, more in updates.

    Workers and encoder run at the same time, and torch's threads wait for each other by spinning: a second one that
    shares its core with a worker makes inference up to 20 times slower. With one, the features do not depend
    on how many cores there are either.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def run_ppo(
    policy: VLAPolicy,
    env: Any,
    *,
    task: str,
    config: PPOConfig,
    scope: Scope = "head",
    expert: BalancedSampler | None = None,
    exploration: ExplorationConfig | None = None,
    max_successes: int = 256,
    stop_at_zero: bool = False,
    seed: int = 0,
    iteration: int = 0,
    update_threads: int = 1,
    log: Log | None = None,
    make_collector: Callable[..., RolloutCollector] = RolloutCollector,
    snapshots: StageSnapshots | None = None,
) -> Stage1Result:
    """PPO on the head over cached features (or, by `scope`, on VLM weights too), until the budget or convergence.

    Args:
        policy: learns, in place.
        env: vector env of the RL task, or whatever else `make_collector` takes in its place.
        task: its label.
        config: hyperparameters.
        scope: "head" keeps the VLM frozen and runs it once per env step.
        expert: batches for the behaviour-cloning term, if `config.bc_coef` is set.
        exploration: rewards to add to the env's, and whether the environments are in `StartCurriculum`.
        max_successes: how many successful episodes to return: the latest.
        stop_at_zero: raise if none of the first episodes, as many as there are envs, succeeds.
        seed: of resets and minibatches.
        iteration: number stored with the episodes.
        update_threads: torch threads of an update.
        log: called with CleanRL's tags and the number of env steps after every update.
        make_collector: what steps the envs; `vla_rl.integrations.ray.RayRolloutCollector` for those of other machines.
        snapshots: where to go on from and, inside its `on_sigterm`, to write the state after the last finished update.

    Raises:
        PreemptedError: after SIGTERM.
        TypeError: the head has no log-probabilities.
        NoSuccessError: `stop_at_zero`, and no episode succeeded.
        UpdateError: an update went wrong, or the actor gets no gradient.
    """
    require_log_probs(policy)
    snapshots = snapshots or StageSnapshots()
    before, curriculum = go_on(snapshots, env, exploration)
    shape = critic_shape(policy.head)
    critic = ValueHead(policy.encoder.feature_dim, state_dim=len(policy.state_mean), **shape).to(policy.device)
    record = EpisodeRecord(max_successes)
    policy.train(False)
    collector = make_collector(
        policy,
        env,
        task=task,
        on_episode=record,
        seed=snapshots.seed(seed),
        policy_version=policy.encoder.fingerprint,
        iteration=iteration,
    )
    frames = policy.encoder.num_frames
    collector.start_exploration()
    practice = Practice(policy, env, collector=collector, record=record, frames=frames, curriculum=curriculum)
    watch, rates = practice.watch, practice.rates
    generator = torch.Generator().manual_seed(seed)
    head = list(policy.head.parameters())
    update, actor_updates = 0, 0
    dead = DeadGradients(config.dead_updates)
    extra = extra_reward(policy, exploration, scope=scope)
    with nullcontext([]) if scope == "head" else policy.encoder.trainable(scope) as vlm:
        if scope != "head":
            collector.forget_features()
            collector.policy_version = policy.encoder.fingerprint  # that of weights which change from now on
        bc_loss = _bc_loss(policy, expert, scope) if config.bc_coef and expert is not None else None
        actor_group = {"params": [*head, *vlm], "lr": config.learning_rate}
        critic_group = {"params": list(critic.parameters()), "lr": config.critic_learning_rate}
        optimizer = torch.optim.Adam([actor_group, critic_group], eps=1e-5)
        if before is not None:
            load_weights(vlm, before["vlm"])
            critic.load_state_dict(before["critic"])
            load_optimizer(optimizer, before["optimizer"])
            if extra is not None:
                extra.load_state_dict(before["extra"], fingerprint=policy.encoder.fingerprint)
            if bc_loss is not None and expert is not None:
                expert.load_state_dict(before["expert"])
            generator.set_state(before["minibatches"].clone())
            update, dead.count = before["update"], before["dead"]
            actor_updates = before.get("actor_updates", 0)
            practice.load_state_dict(before)
        while collector.num_env_steps < config.total_timesteps and not practice.converged:
            snapshots.stop_if_asked()
            seen = len(record.outcomes)
            with watch("rollout"), torch_threads(1):
                rollout = collector.collect(
                    config.rollout_steps,
                    critic,
                    gamma=config.gamma,
                    gae_lambda=config.gae_lambda,
                    keep_images=scope != "head",
                    extra=extra,
                )
            with watch("update"), torch_threads(update_threads):
                losses = {} if extra is None else extra.learn()
                stats = losses | ppo_update(
                    policy,
                    critic,
                    optimizer,
                    rollout,
                    config=config,
                    train_actor=update >= config.critic_warmup_updates,
                    features_of=None if scope == "head" else _recompute(policy, rollout, collector.table),
                    bc_loss=bc_loss,
                    generator=generator,
                )
            if scope != "head":
                collector.forget_features()
            update += 1
            actor_updates += stats.get("actor_steps", 0) > 0
            finished = record.outcomes[seen:]
            rates.append(success_rate(finished, collector))
            if log is not None:
                log(tags(stats, collector, rates[-1], watch, optimizer), collector.num_env_steps)
            if rollout.rewards.any():  # without, there is nothing to learn, and the gradient is 0 by right
                dead.check(stats)
            if (
                stop_at_zero
                and len(record.outcomes) >= env.num_envs
                and not any(success for success, _ in record.outcomes)
            ):
                raise NoSuccessError(
                    f"none of the first {len(record.outcomes)} noisy episodes on {task!r} succeeded, so a sparse "
                    "reward cannot teach: train stage 0 longer, choose an easier variant, or set stop_at_zero=False"
                )
            acts_anew = update >= config.critic_warmup_updates + 2
            practice.converged = acts_anew and all(rate >= config.converged_success for rate in rates[-2:])
            practice.look()
            if snapshots.folder is not None:
                learned = {
                    "vlm": [weight.detach() for weight in vlm],
                    "critic": critic.state_dict(),
                    "optimizer": optimizer_state(optimizer),
                    "extra": None if extra is None else extra.state_dict(),
                    "expert": None if expert is None else expert.state_dict(),
                    "minibatches": generator.get_state(),
                    "update": update,
                    "actor_updates": actor_updates,
                    "dead": dead.count,
                }
                # A copy, for the next update changes the weights long before it is finished.
                state = copied(practice.state_dict() | learned)
                snapshots.keep(lambda state=state: state | {"dropped": practice.dropped(state)})
    return practice.result(num_actor_updates=actor_updates)


def run_collect(
    policy: VLAPolicy,
    env: gym.vector.VectorEnv,
    *,
    task: str,
    num_episodes: int,
    exploration: ExplorationConfig | None = None,
    max_successes: int = 256,
    seed: int = 0,
    iteration: int = 0,
    log: Log | None = None,
    snapshots: StageSnapshots | None = None,
) -> Stage1Result:
    """Collect episodes with exploration noise and learn nothing: stage 1 of filtered BC.

    Args:
        policy: acts.
        env: vector env of the RL task.
        task: its label.
        num_episodes: at least so many, the same number in every environment.
        exploration: whether the environments are in `StartCurriculum`; nothing else counts here.
        max_successes: how many successful episodes to return: the latest.
        seed: of the resets.
        iteration: number stored with the episodes.
        log: called once, at the end.
        snapshots: where to go on from and, inside its `on_sigterm`, to write what has been collected.

    Raises:
        PreemptedError: after SIGTERM.
        TypeError: the head has no log-probabilities.
    """
    require_log_probs(policy)
    snapshots = snapshots or StageSnapshots()
    before, curriculum = go_on(snapshots, env, exploration)
    record = EpisodeRecord(max_successes)
    frames = policy.encoder.num_frames
    with torch_threads(1):
        collector = RolloutCollector(
            policy,
            env,
            task=task,
            on_episode=record,
            seed=snapshots.seed(seed),
            policy_version=policy.encoder.fingerprint,
            iteration=iteration,
        )
        collector.start_exploration()
        practice = Practice(policy, env, collector=collector, record=record, frames=frames, curriculum=curriculum)
        left = np.full(env.num_envs, -(-num_episodes // env.num_envs))
        if before is not None:
            practice.load_state_dict(before)
            left = np.array(before["left"])

        def state() -> State:
            now = practice.state_dict() | {"left": left.tolist()}
            running = np.array(collector.running_lengths)
            return now | {"dropped": {"episodes": int(((running > 0) & (left > 0)).sum()), "steps": 0}}

        snapshots.keep(state)
        pause, seen = False, len(record.outcomes)
        collector.stopping = lambda: pause or snapshots.asked()
        while (left > 0).any():
            for row in collector.episode_steps(num_episodes, left=left):
                left = collector.left
                # After the turn of the last group that is at it, so that the groups go on in the same order.
                last = not (left[row["envs"].stop :] > 0).any()
                pause |= curriculum and last and len(record.outcomes) >= seen + env.num_envs
            practice.look()
            pause, seen = False, len(record.outcomes)
            if (left > 0).any():
                snapshots.stop_if_asked()
    practice.rates.append(float(np.mean([success for success, _ in record.outcomes])))
    if log is not None:
        log({"charts/success_rate": practice.rates[-1]}, collector.num_env_steps)
    return practice.result()


def success_rate(finished: list[tuple[bool, int]], collector: RolloutCollector) -> float:
    """Success among the episodes that ended; those still running for longer than any success took count as failures.

    Without them a rollout shorter than the horizon would see the short, successful episodes alone. nan if none ended.
    """
    if not finished:
        return float("nan")
    lengths = [length for success, length in finished if success]
    return len(lengths) / (len(finished) + collector.num_running_longer(max(lengths))) if lengths else 0.0


def extra_reward(policy: VLAPolicy, config: ExplorationConfig | None, *, scope: Scope = "head") -> ExtraReward | None:
    """What adds to the rewards of a stage 1; None if nothing does.

    Raises:
        ValueError: the VLM learns, so that features have no fixed meaning.
    """
    if config is None or not config.adds_reward:
        return None
    if scope != "head":
        raise ValueError(
            "exploration with rnd_coef or shaping_coef learns from features of a frozen VLM, but "
            f'stage1_scope="{scope}" trains it; set stage1_scope="head" or both coefficients to 0'
        )
    encoder, state_dim = policy.encoder, len(policy.state_mean)
    return ExtraReward(encoder.feature_dim, state_dim=state_dim, config=config, device=policy.device)


def require_log_probs(policy: VLAPolicy) -> None:
    """Raise TypeError if the policy's head cannot be trained by RL."""
    if not policy.head.supports_rl:
        raise TypeError(
            f"head {type(policy.head).__name__!r} has no log_prob, so RL cannot train it; "
            'use GaussianHead or set stage1_mode="none"'
        )


def _bc_loss(policy: VLAPolicy, expert: BalancedSampler, scope: Scope) -> Callable[[], Tensor]:
    source = feature_source(policy, expert, scope=scope)

    def loss() -> Tensor:
        batch = expert.sample()
        return policy.head.supervised_loss(
            source(batch), policy.normalize_state(batch.state), policy.normalize_action(batch.actions)
        )

    return loss


def _recompute(policy: VLAPolicy, rollout: Rollout, table: tuple[str, ...]) -> Callable[[Tensor], Features]:
    """Rows -> features with gradients: PPO on the whole model runs the VLM again for every minibatch."""
    assert rollout.images is not None
    images = rollout.images

    def features_of(rows: Tensor) -> Features:
        index = rows.cpu().numpy()
        with without_dropout(policy.encoder):  # as in the rollout, or the ratios would not start at 1
            return policy.encoder.forward(images[index], instructions_for(table, rollout.task_id[index]))

    return features_of


def tags(
    stats: dict[str, float],
    collector: RolloutCollector,
    rate: float,
    watch: Stopwatch,
    optimizer: torch.optim.Optimizer,
) -> dict[str, float]:
    """CleanRL's tags, and where the time went."""
    losses = {f"losses/{key}": value for key, value in stats.items() if key != "gradient_steps"}
    lengths = collector.recent_length
    return losses | {
        "charts/success_rate": rate,
        "charts/episodic_length": float(np.mean(lengths)) if lengths else float("nan"),
        "charts/learning_rate": optimizer.param_groups[0]["lr"],
        "charts/SPS": collector.num_env_steps / max(watch.total, 1e-9),
        "time/rollout_s": watch.seconds["rollout"],
        "time/simulate_s": collector.watch.seconds["simulate"],
        "time/encode_s": collector.watch.seconds["encode"],
        "time/update_s": watch.seconds["update"],
        **collector.counters,
    }
