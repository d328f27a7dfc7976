"""Supervised learning of VLM and head on stored episodes: stages 0 and 2."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from vla_rl.data.sampler import BalancedSampler, Batch
from vla_rl.policy import VLAPolicy
from vla_rl.sl.caches import CachedFeatures, Scope, SupervisedError, feature_source, random_shift

__all__ = [
    "CachedFeatures",
    "SLConfig",
    "Scope",
    "SupervisedError",
    "feature_source",
    "random_shift",
    "train_supervised",
]


@dataclass
class SLConfig:
    """Stages 0 and 2: J = E || pi(o, l) - a ||^2. Batch size, steps and learning rates are our choice."""

    steps: int = 2000
    """gradient steps"""
    batch_size: int = 256
    """env steps per gradient step, balanced over tasks"""
    scope: Scope = "lora"
    """what learns beside the head: nothing ("head"), LoRA, the text backbone, or the whole VLM ("all")"""
    learning_rate: float = 1e-3
    """peak learning rate of the head (one cycle)"""
    encoder_learning_rate: float = 1e-3
    """peak learning rate of the VLM's weights (one cycle)"""
    weight_decay: float = 1e-4
    """AdamW's weight decay"""
    warmup_fraction: float = 0.1
    """part of the steps in which the learning rate rises"""
    random_shift: int = 4
    """augmentation by a random shift of up to this many pixels; only where the images pass through the vision tower"""
    max_grad_norm: float = 1.0
    """gradient clipping"""
    gradient_accumulation: int = 1
    """parts that a batch goes through the model in, to save memory; its gradients stay the same"""
    gradient_checkpointing: bool = False
    """keep only each layer's input for the backward pass and compute the rest again: less memory, a third more time"""
    optimizer: Literal["adamw", "adamw8bit"] = "adamw"
    """"adamw8bit" keeps the moments of large tensors in 8 bits; needs ".[quantize]\""""
    offload: bool = False
    """fill the cache of what is frozen first, then keep those parts of the VLM on the CPU; no use on a CPU"""
    cache_dir: str | None = None
    """keep that cache in a file there, mapped to memory, instead of in RAM"""


def train_supervised(
    policy: VLAPolicy,
    sampler: BalancedSampler,
    *,
    config: SLConfig,
    seed: int = 0,
    on_step: Callable[[int, float], None] | None = None,
) -> float:
    """Minimise the head's supervised loss over head and, by `config.scope`, VLM weights; in place.

    Args:
        policy: learns.
        sampler: batches balanced over tasks and stores.
        config: hyperparameters.
        seed: of the augmentation.
        on_step: called with step number and loss.

    Returns:
        Mean loss over the last tenth of the steps.

    Raises:
        ImportError: the optimiser's package is missing.
        SupervisedError: the loss is not finite.
        ValueError: a batch has fewer rows than parts.
    """
    parts = config.gradient_accumulation
    if not 1 <= parts <= config.batch_size:
        raise ValueError(f"gradient_accumulation={parts}, expected 1 to the batch size, {config.batch_size}")
    generator = torch.Generator().manual_seed(seed)
    head = list(policy.head.parameters())
    losses = []
    with ExitStack() as stack:
        encoder_parameters: list[nn.Parameter] = []
        if config.scope != "head":
            opened = policy.encoder.trainable(config.scope, checkpointing=config.gradient_checkpointing)
            encoder_parameters = stack.enter_context(opened)
        groups = [{"params": head, "lr": config.learning_rate}]
        if encoder_parameters:
            groups.append({"params": encoder_parameters, "lr": config.encoder_learning_rate})
        optimizer = _optimizer(config, groups)
        total_steps = max(config.steps, 2)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer,
            [group["lr"] for group in groups],
            total_steps=total_steps,
            pct_start=max(config.warmup_fraction, 1.5 / total_steps),  # it divides by zero at a rise of one step
        )
        source = feature_source(
            policy,
            sampler,
            scope=config.scope,
            shift=config.random_shift,
            generator=generator,
            rows_at_once=min(256, -(-config.batch_size // parts)) if parts > 1 else 256,
            directory=config.cache_dir,
        )
        if config.offload and (offloaded := getattr(source, "offloaded", None)):
            stack.enter_context(offloaded())
        for step in range(config.steps):
            optimizer.zero_grad(set_to_none=True)
            loss = torch.zeros((), device=policy.device)
            batch = sampler.sample()
            for part in split(batch, parts):
                state, actions = policy.normalize_state(part.state), policy.normalize_action(part.actions)
                share = policy.head.supervised_loss(source(part), state, actions) * (len(part) / len(batch))
                share.backward()
                loss += share.detach()
            losses.append(loss.item())
            if not np.isfinite(losses[-1]):
                raise SupervisedError(
                    f"the supervised loss is {losses[-1]} at step {step}; lower the learning rates or check the data"
                )
            nn.utils.clip_grad_norm_([*head, *encoder_parameters], config.max_grad_norm)
            optimizer.step()
            schedule.step()
            if on_step is not None:
                on_step(step, losses[-1])
    return float(np.mean(losses[-max(1, config.steps // 10) :]))


def split(batch: Batch, parts: int) -> Iterator[Batch]:
    """The rows of a batch in order, in `parts` batches whose sizes differ by one at most."""
    bounds = np.linspace(0, len(batch), parts + 1).round().astype(int)
    for start, stop in pairwise(bounds.tolist()):
        values = {field.name: getattr(batch, field.name) for field in fields(batch)}
        yield replace(batch, **{name: None if v is None else v[start:stop] for name, v in values.items()})


def _optimizer(config: SLConfig, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, weight_decay=config.weight_decay)
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise ImportError(
            "optimizer='adamw8bit' needs bitsandbytes; install it with `pip install 'vla-rl[quantize]'`"
        ) from error
    return AdamW8bit(groups, weight_decay=config.weight_decay)
