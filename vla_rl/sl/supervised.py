"""Supervised learning of VLM and head on stored episodes: stages 0 and 2."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from vla_rl.data.sampler import BalancedSampler, Batch
from vla_rl.encoders.loading import layer_stacks
from vla_rl.policy import VLAPolicy
from vla_rl.preemption import PreemptedError, put_off_sigterm
from vla_rl.settings import check_choices, check_least, check_positive
from vla_rl.sl.caches import (
    CachedFeatures,
    FeatureSource,
    RowCache,
    Scope,
    SupervisedError,
    WholeModel,
    draw_shifts,
    feature_source,
    random_shift,
)
from vla_rl.sl.processes import OneProcess, Processes
from vla_rl.sl.snapshots import Snapshots, local_part

__all__ = [
    "CachedFeatures",
    "SLConfig",
    "Scope",
    "SupervisedError",
    "feature_source",
    "random_shift",
    "train_supervised",
]

_ADVICE = "lower the learning rates or check the data"


@dataclass
class SLConfig:
    """Stages 0 and 2: J = E || pi(o, l) - a ||^2. Batch size, steps and learning rates are our choice."""

    steps: int = 2000
    """gradient steps"""
    batch_size: int = 256
    """env steps per gradient step, balanced over tasks; all processes together"""
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
    """augmentation by a random shift of up to this many pixels; only where no vision tokens are kept"""
    max_grad_norm: float = 1.0
    """gradient clipping"""
    gradient_accumulation: int = 1
    """parts that a process's rows go through the model in, to save memory; the gradients stay the same"""
    gradient_checkpointing: bool = False
    """keep only each layer's input for the backward pass and compute the rest again: less memory, a third more time"""
    optimizer: Literal["adamw", "adamw8bit"] = "adamw"
    """"adamw8bit" keeps the moments of large tensors in 8 bits; needs ".[quantize]\""""
    offload: bool = False
    """fill the cache of what is frozen first, then keep those parts of the VLM on the CPU; no use on a CPU"""
    cache_dir: str | None = None
    """keep that cache in a file there, mapped to memory, instead of in RAM"""
    snapshot_every: int = 0
    """gradient steps between snapshots, from the newest of which a killed stage goes on; 0: on SIGTERM alone"""

    def __post_init__(self) -> None:
        check_choices(self)
        check_least(0, steps=self.steps, random_shift=self.random_shift, weight_decay=self.weight_decay)
        check_least(0, learning_rate=self.learning_rate, encoder_learning_rate=self.encoder_learning_rate)
        check_positive(max_grad_norm=self.max_grad_norm)
        if not 0 <= self.warmup_fraction < 1:
            raise ValueError(f"warmup_fraction={self.warmup_fraction}; expected a number from 0 to below 1")


def train_supervised(
    policy: VLAPolicy,
    sampler: BalancedSampler,
    *,
    config: SLConfig,
    seed: int = 0,
    on_step: Callable[[int, float], None] | None = None,
    processes: Processes | None = None,
    snapshots: Snapshots | None = None,
) -> float:
    """Minimise the head's supervised loss over head and, by `config.scope`, VLM weights; in place.

    Several processes do the same as one: each draws the same batch, takes its own rows of it, and the gradients are
    those of the whole batch. Heads and adapters that draw noise of their own (flow matching, LoRA dropout) draw
    another one in every process.

    Args:
        policy: learns; its head is in train mode meanwhile and in eval mode afterwards. Where the processes shard it
            (FSDP2), its weights are in shards afterwards: see `vla_rl.sl.processes.full_weights`.
        sampler: batches balanced over tasks and stores; the same in every process.
        config: hyperparameters.
        seed: of the augmentation.
        on_step: called with step number and loss, in every process.
        processes: from `vla_rl.sl.processes.start_processes`; None for this one alone.
        snapshots: where to go on from and to write how far it is; None for neither. With them SIGTERM, inside
            `vla_rl.preemption.stop_on_sigterm`, ends the stage after the step that is running and one more snapshot.

    Returns:
        Mean loss over the last tenth of the steps.

    Raises:
        ImportError: the optimiser's package is missing.
        PreemptedError: after SIGTERM.
        SupervisedError: the loss, the gradient or what was learned is not finite.
        ValueError: a batch has fewer rows than parts in all processes, or there is nothing to shard.
    """
    processes = processes or OneProcess()
    world, parts = processes.num_processes, config.gradient_accumulation
    if parts < 1 or parts * world > sampler.batch_size:
        among = f" in each of {world} processes" if world > 1 else ""
        raise ValueError(
            f"gradient_accumulation={parts}{among}, expected 1 to the batch size, {sampler.batch_size}, in all"
        )
    if processes.is_fsdp2 and config.scope == "head":
        raise ValueError(
            'scope="head" has no VLM weights that learn, so FSDP2 would shard for nothing; start without it'
        )
    generator = torch.Generator().manual_seed(seed)
    pieces = split(sampler.batch_size, world * parts)[processes.process_index * parts :][:parts]
    losses: list[float] = []
    with ExitStack() as stack:
        stack.callback(policy.head.eval)
        policy.head.train()
        groups: list[dict[str, Any]] = [{"params": list(policy.head.parameters()), "lr": config.learning_rate}]
        if config.scope != "head":
            opened = policy.encoder.trainable(config.scope, checkpointing=config.gradient_checkpointing)
            groups.append({"params": stack.enter_context(opened), "lr": config.encoder_learning_rate})
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
            rows_at_once=min(256, -(-sampler.batch_size // (world * parts))) if world * parts > 1 else 256,
            directory=config.cache_dir,
        )
        pixels = config.random_shift if isinstance(source, WholeModel) else 0
        if processes.is_fsdp2:
            source = WholeModel(policy)  # to fill a cache, one process would wait for shards of others
        if config.offload and (offloaded := getattr(source, "offloaded", None)):
            stack.enter_context(offloaded())
        model, stepper = processes.prepare(SupervisedLoss(policy, source), optimizer)
        whole: dict[str, Any] = {"optimizer": optimizer, "sampler": sampler, "generator": generator}
        whole["buffers"] = dict(policy.named_buffers())
        asked = stack.enter_context(put_off_sigterm() if snapshots is not None else nullcontext(lambda: False))
        if snapshots is not None:
            first = sampler.state_dict()
            losses = snapshots.restore(schedule=schedule, processes=processes, **whole)
            if losses and (rows := getattr(source, "rows", None)):
                _fill_again(rows, sampler, first=first, steps=len(losses), pieces=pieces)
        weights = [weight for group in optimizer.param_groups for weight in group["params"]]
        for step in range(len(losses), config.steps):
            stepper.zero_grad(set_to_none=True)
            loss = torch.zeros((), device=policy.device)
            ids = sampler.draw()
            shifts = draw_shifts(len(ids), pixels, generator=generator) if pixels else None
            for piece in pieces:
                batch = sampler.rows(ids[piece])
                with nullcontext() if piece is pieces[-1] else processes.no_sync(model):
                    share = model(batch, None if shifts is None else shifts[:, piece]) * (len(batch) / len(ids))
                    processes.backward(share * world if world > 1 else share)  # gradients are averaged over processes
                loss += share.detach()
            # With the loss goes whether this process is to stop: all must write the same snapshot.
            total, stopping = processes.reduce(torch.stack([loss, loss.new_tensor(float(asked()))]), "sum").tolist()
            losses.append(total)
            if not np.isfinite(total):
                raise SupervisedError(f"the supervised loss is {total} at step {step}; {_ADVICE}")
            norm = nn.utils.clip_grad_norm_(weights, config.max_grad_norm)  # accelerate's compares tensors with "=="
            norm = float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)  # type: ignore[operator]
            if not np.isfinite(norm):
                raise SupervisedError(f"the norm of the supervised gradient is {norm} at step {step}; {_ADVICE}")
            stepper.step()
            schedule.step()
            if on_step is not None:
                on_step(step, losses[-1])
            if snapshots is not None and (stopping or snapshots.due(step + 1)):
                _check_finite(weights, processes, step=step)
                snapshots.save(losses, processes=processes, **whole)
            if stopping:
                raise PreemptedError
        _check_finite(weights, processes, step=config.steps - 1)
    return float(np.mean(losses[-max(1, config.steps // 10) :]))


def _fill_again(
    rows: RowCache, sampler: BalancedSampler, *, first: dict[str, Any], steps: int, pieces: list[slice]
) -> None:
    """Compute what the first `steps` batches made the cache hold, in their groups of rows.

    A matrix product of other rows rounds differently, so that the later losses would differ in their last bits.
    """
    now = sampler.state_dict()
    sampler.load_state_dict(first)
    for _ in range(steps):
        if rows.known.all():
            break
        ids = sampler.draw()
        for piece in pieces:
            rows.need(ids[piece])
    sampler.load_state_dict(now)


def _check_finite(weights: list[nn.Parameter], processes: Processes, *, step: int) -> None:
    """Raise SupervisedError, in every process, if one holds a trained weight that is NaN or infinite."""
    finite = [torch.isfinite(local_part(weight.detach())).all() for weight in weights]
    wrong = processes.reduce((~torch.stack([each.to(processes.device) for each in finite])).sum(), "sum")
    if int(wrong):
        raise SupervisedError(f"trained weights are NaN or infinite after step {step}, and nothing is saved; {_ADVICE}")


def split(rows: int, parts: int) -> list[slice]:
    """`rows` in `parts` successive slices, whose sizes differ by one at most."""
    bounds = np.linspace(0, rows, parts + 1).round().astype(int).tolist()
    return [slice(*ends) for ends in pairwise(bounds)]


class SupervisedLoss(nn.Module):
    """Policy and supervised loss as one module, whose forward several processes can run together.

    Args:
        policy: encoder and head.
        source: from batches to features.
    """

    def __init__(self, policy: VLAPolicy, source: FeatureSource):
        super().__init__()
        self.policy, self.source = policy, source
        # What FSDP2 shards and gathers at a time.
        stacks = layer_stacks(policy.encoder.model) if hasattr(policy.encoder, "model") else []
        self._no_split_modules = {type(layer).__name__ for stack in stacks for layer in stack}

    def forward(self, batch: Batch, shifts: Tensor | None) -> Tensor:
        """Mean loss over the rows of a batch."""
        policy = self.policy
        state, actions = policy.normalize_state(batch.state), policy.normalize_action(batch.actions)
        loss = policy.head.supervised_loss(self.source(batch, shifts), state, actions)
        if loss.ndim:
            raise ValueError(
                f"supervised_loss() of {type(policy.head).__name__} gave shape {tuple(loss.shape)}; it has to give one "
                "number, the mean over the rows"
            )
        return loss


def _optimizer(config: SLConfig, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, weight_decay=config.weight_decay)
    try:
        from bitsandbytes.optim.adamw import AdamW8bit
    except ImportError as error:
        raise ImportError(
            "optimizer='adamw8bit' needs bitsandbytes; install it with `pip install 'vla-rl[quantize]'`"
        ) from error
    return AdamW8bit(groups, weight_decay=config.weight_decay)
