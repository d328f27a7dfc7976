"""What an experiment will cost before it is run: counts from its configuration, minutes from measured rates."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, is_dataclass
from typing import Any

from vla_rl.config import with_method
from vla_rl.experiment import ExperimentConfig
from vla_rl.sl.supervised import SLConfig

RATES = {
    "expert_episodes": 6.28,
    "eval_steps": 266.4,
    "stage1_steps": 313.0,
    "lora_samples": 708.5,
    "all_samples": 386.4,
}
"""Per second, with the small VLM on Meta-World at 64 pixels on two CPU cores: `benchmarks/results/phase_rates.json`."""

RATED = ("small", "tiny")
"""VLMs, by their names in a configuration, that have these rates: one class and size."""


@dataclass(frozen=True)
class Cost:
    """Counts of a whole run.

    Attributes:
        expert_episodes: demonstrations to collect.
        gradient_steps: of supervised learning, in all stages.
        samples: rows of data in these steps.
        env_steps: of stage 1, which ends with a whole rollout.
        evaluation_episodes: of every evaluation together.
        evaluation_steps: of these at most, if every episode lasts until the horizon.
        vlm_frames: pictures that the VLM sees, supervised rows and repeated passes included, if every evaluation
            episode lasts until the horizon; one more per episode of stage 1.
        minutes: at `RATES`, or None where these say nothing of this VLM, env or device.
    """

    expert_episodes: int
    gradient_steps: int
    samples: int
    env_steps: int
    evaluation_episodes: int
    evaluation_steps: int
    vlm_frames: int
    minutes: float | None


def cost(config: ExperimentConfig) -> Cost:
    """Count what a run of this configuration does."""
    train = with_method(config.train, config.method, vlm_scope=config.vlm_scope)
    rounds = len(config.rl_tasks) * train.rounds
    episodes = 0 if config.expert_data else len(config.expert_tasks) * config.expert_episodes

    algorithm = train.sacfd if train.stage1_mode == "sacfd" else train.stage1
    per_round = {"none": 0, "collect": train.collect_episodes * config.env.horizon}
    env_steps = rounds * per_round.get(train.stage1_mode, algorithm.total_timesteps)
    passes = 1 if train.stage1_scope == "head" else 1 + train.stage1.update_epochs

    stages: list[tuple[SLConfig, int]] = [(train.stage0, 1)]
    if train.has_stage2:
        stages.append((train.stage2, rounds))
    gradient_steps = sum(stage.steps * times for stage, times in stages)
    samples = sum(stage.steps * times * stage.batch_size for stage, times in stages)

    learned = (train.stage1_mode in ("ppo", "sacfd")) + train.has_stage2
    evaluations = 1 + rounds * learned
    others = len(config.expert_tasks) + len(config.unseen_tasks)
    evaluated = evaluations * (len(config.rl_tasks) * train.rl_eval_episodes + others * train.eval_episodes)
    steps = evaluated * config.env.horizon

    minutes = None
    model, env = config.model, config.env
    if model.vlm in RATED and model.device == "cpu" and "MetaWorld" in env.env_id and env.image_size <= 64:
        rates = RATES
        supervised = sum(
            stage.steps * times * stage.batch_size / rates["all_samples" if stage.scope == "all" else "lora_samples"]
            for stage, times in stages
        )
        seconds = episodes / rates["expert_episodes"] + supervised + steps / rates["eval_steps"]
        minutes = (seconds + passes * env_steps / rates["stage1_steps"]) / 60
    frames = passes * env_steps + steps + samples
    return Cost(episodes, gradient_steps, samples, env_steps, evaluated, steps, frames, minutes)


def cost_lines(config: ExperimentConfig) -> list[str]:
    """The counts in words."""
    found = cost(config)
    supervised = f"{found.gradient_steps:,} gradient steps of supervised learning, {found.samples:,} samples"
    lines = [
        f"{found.expert_episodes:,} expert episodes to collect",
        supervised,
        f"{found.env_steps:,} env steps in stage 1",
        f"{found.evaluation_episodes:,} evaluation episodes, at most {found.evaluation_steps:,} env steps",
        f"about {found.vlm_frames:,} frames through the VLM or less",
    ]
    if found.minutes is None:
        model = config.model.vlm
        lines.append(
            "minutes: no rate is known for this VLM, environment and device"
            + ("" if model in RATED else f"; `vla-rl estimate --model {model}` computes memory and time of a step")
        )
    else:
        lines.append(f"about {found.minutes:.0f} minutes or less, at the rates of two CPU cores")
    return lines


def config_lines(config: Any, prefix: str = "") -> list[str]:
    """A configuration as `group: name=value name=value`, the options of `vla-rl train` that would give it."""
    plain = [f for f in fields(config) if not is_dataclass(getattr(config, f.name))]
    words = [f"{f.name.replace('_', '-')}={_word(getattr(config, f.name))}" for f in plain]
    lines = [f"{prefix or 'experiment'}: {'  '.join(words)}"] if words else []
    for f in fields(config):
        value = getattr(config, f.name)
        if is_dataclass(value):
            lines += config_lines(value, f"{prefix}.{f.name}".lstrip("."))
    return lines


def resolved(config: ExperimentConfig) -> dict[str, Any]:
    """The configuration with its method applied, as plain data."""
    data = asdict(config)
    data["train"] = asdict(with_method(config.train, config.method, vlm_scope=config.vlm_scope))
    return data


def _word(value: Any) -> str:
    return " ".join(map(str, value)) or "()" if isinstance(value, tuple) else str(value)
