"""What one run of the iterative trainer does: every default in one place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from vla_rl.encoders.base import Encoder
from vla_rl.encoders.lora import LoRASettings
from vla_rl.rl.exploration import ExplorationConfig
from vla_rl.rl.ppo import PPOConfig
from vla_rl.rl.sac import SACfDConfig
from vla_rl.settings import check_choices, check_least
from vla_rl.sl.supervised import Scope, SLConfig

Method = Literal["ire-vla", "ire-vla-sacfd", "ire-vla-frozen", "sft", "ppo", "ppo-replay", "filtered-bc"]


@dataclass
class IterativeConfig:
    """Algorithm 1 of the iRe-VLA paper and its variants."""

    seed: int = 0
    """seed of everything"""
    stage0: SLConfig = field(default_factory=lambda: SLConfig(steps=4000))
    """supervised learning on expert data; steps=0 starts from the policy as given"""
    stage1: PPOConfig = field(default_factory=PPOConfig)
    """online RL on each RL task by PPO"""
    sacfd: SACfDConfig = field(default_factory=SACfDConfig)
    """online RL on each RL task by SAC from demonstrations, in place of stage1 where stage1_mode="sacfd\""""
    stage2: SLConfig = field(
        default_factory=lambda: SLConfig(steps=600, learning_rate=3e-4, encoder_learning_rate=3e-4)
    )
    """supervised learning on expert data and successes; steps=0 leaves it out"""
    stage1_mode: Literal["ppo", "sacfd", "collect", "none"] = "ppo"
    """PPO; SAC from demonstrations; only collecting successes with exploration noise (filtered BC); nothing (SFT)"""
    exploration: ExplorationConfig = field(default_factory=ExplorationConfig)
    """what helps stage 1 where success is rare or has never been seen"""
    stage1_scope: Scope = "head"
    """what PPO trains beside the head; anything but "head" is PPO on the whole model, which re-runs the VLM"""
    stage2_data: Literal["expert+rl", "expert", "none"] = "expert+rl"
    """data of stage 2; "none" leaves it out"""
    rl_fraction: float = 0.5
    """part of a stage-2 batch from the tasks with successes of stage 1; within each part, tasks weigh alike"""
    rounds: int = 1
    """stage 1 + stage 2 per RL task"""
    collect_episodes: int = 128
    """episodes per round of stage1_mode="collect"; a multiple of num_envs"""
    max_rl_episodes: int = 256
    """successes kept per stage 1: the latest"""
    eval_episodes: int = 32
    """episodes per expert or unseen task and evaluation, deterministic, the same seeds every time"""
    rl_eval_episodes: int = 64
    """episodes per RL task and evaluation: the claim rests on these"""
    eval_envs: int = 24
    """parallel environments of an evaluation, shared by its tasks; never more than a task has episodes"""
    eval_seed: int = 10_000
    """reset seed of the first evaluation episode"""
    num_workers: int | None = None
    """processes that step environments; None: one less than there are cores, as the policy needs one too"""
    video_episodes: int = 2
    """episodes of each RL task drawn into the videos before and after"""
    stop_at_zero: bool = True
    """stop with an explanation when SFT and its first rollouts never succeed on the first RL task (PPO and SAC)"""

    @property
    def has_stage2(self) -> bool:
        """Whether stage 2 is run at all."""
        return self.stage2_data != "none" and self.stage2.steps > 0


def with_method(
    config: IterativeConfig, method: Method, *, vlm_scope: Literal["lora", "all"] = "lora"
) -> IterativeConfig:
    """`config` changed into one of the paper's methods and baselines.

    Args:
        config: settings shared by all methods.
        method: "ire-vla"; "ire-vla-sacfd" (stage 1 by SAC from demonstrations instead of PPO); "ire-vla-frozen" (VLM
            frozen in both stages); "sft" (stage 0 alone); "ppo" (PPO on the whole model); "ppo-replay" (the same, then
            expert replay after each task); "filtered-bc" (stage 2 on collected successes, no RL).
        vlm_scope: which weights "the whole model" means for PPO.
    """
    stage1 = {
        "ire-vla": {},
        "ire-vla-sacfd": {"stage1_mode": "sacfd"},
        "ire-vla-frozen": {"stage2": replace(config.stage2, scope="head")},
        "sft": {"stage1_mode": "none", "stage2_data": "none"},
        "ppo": {"stage1_scope": vlm_scope, "stage2_data": "none"},
        "ppo-replay": {"stage1_scope": vlm_scope, "stage2_data": "expert"},
        "filtered-bc": {"stage1_mode": "collect"},
    }
    if method not in stage1:
        raise ValueError(f"unknown method {method!r}; expected one of {', '.join(stage1)}")
    return replace(config, **stage1[method])


def check_scopes(config: IterativeConfig, encoder: Encoder, *, lora: LoRASettings | None, rl: bool) -> None:
    """Refuse, before any stage, a scope that the encoder cannot train.

    Args:
        config: of the run.
        encoder: of its policy.
        lora: what is added to the encoder if it has no adapter.
        rl: whether there are RL tasks.

    Raises:
        ValueError: with the stage and what to change.
    """
    scopes = {
        "stage0.scope": config.stage0.scope if config.stage0.steps else "head",
        "stage1_scope": config.stage1_scope if rl and config.stage1_mode == "ppo" else "head",
        "stage2.scope": config.stage2.scope if rl and config.has_stage2 else "head",
    }
    for name, scope in scopes.items():
        if scope != "head" and type(encoder).trainable is Encoder.trainable:
            raise ValueError(
                f'{name}="{scope}", but {type(encoder).__name__} opens no weights; set {name}="head", or override '
                "its trainable()"
            )
        if scope == "lora" and encoder.lora is None and lora is None:
            raise ValueError(
                f'{name}="lora", but the encoder has no adapter; give lora=LoRASettings(r=16, alpha=32), say, or set '
                f'{name}="head"'
            )


def check(config: IterativeConfig, rl_tasks: Sequence[str]) -> None:
    """Refuse settings that contradict each other, or that a later phase would stumble over.

    Raises:
        ValueError: with what to change.
    """
    if isinstance(rl_tasks, str):
        raise ValueError(f"rl_tasks={rl_tasks!r} is one string; give a list of task labels: [{rl_tasks!r}]")
    check_choices(config)
    if config.stage1_mode == "none" and config.stage2_data == "expert+rl" and rl_tasks:
        raise ValueError('stage1_mode="none" finds no successes; set stage2_data to "expert" or "none"')
    if config.stage1_mode == "sacfd" and config.stage1_scope != "head":
        raise ValueError(
            f'stage1_scope="{config.stage1_scope}" trains the VLM, but stage1_mode="sacfd" replays features of a '
            'frozen one; set stage1_scope="head" or stage1_mode="ppo"'
        )
    if config.exploration.adds_reward and (config.stage1_mode not in ("ppo", "sacfd") or config.stage1_scope != "head"):
        raise ValueError(
            f"exploration.rnd_coef={config.exploration.rnd_coef} and exploration.shaping_coef="
            f"{config.exploration.shaping_coef} reward RL on features of a frozen VLM, but stage1_mode="
            f'"{config.stage1_mode}" with stage1_scope="{config.stage1_scope}" is none; set both to 0'
        )
    if not 0 < config.rl_fraction < 1:
        raise ValueError(f"rl_fraction={config.rl_fraction}; expected a number between 0 and 1")
    names = ("rounds", "collect_episodes", "max_rl_episodes", "eval_episodes", "rl_eval_episodes")
    check_least(1, **{name: getattr(config, name) for name in names})
