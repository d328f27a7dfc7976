"""Supervised learning of VLM and head on stored episodes: stages 0 and 2."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from vla_rl.data.sampler import BalancedSampler, Batch
from vla_rl.encoders.features import Features
from vla_rl.policy import VLAPolicy

Scope = Literal["head", "lora", "text", "all"]


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


class SupervisedError(RuntimeError):
    """Supervised learning that must not go on."""


class RowCache:
    """Frozen tensors by row, computed at first use: vision tokens where LoRA learns, features where only the head does.

    Args:
        sampler: its row ids are the keys.
        compute: batch -> tensor [B, ...] on the CPU.
    """

    def __init__(self, sampler: BalancedSampler, compute: Callable[[Batch], Tensor]):
        self.sampler, self.compute = sampler, compute
        self.known = np.zeros(sampler.num_rows, dtype=bool)
        self.values: Tensor | None = None

    def __call__(self, batch: Batch) -> Tensor:
        """The tensors of a batch, [B, ...]."""
        missing = np.unique(batch.row_id[~self.known[batch.row_id]])
        for start in range(0, len(missing), 256):
            ids = missing[start : start + 256]
            values = self.compute(self.sampler.rows(ids))
            if self.values is None:
                self.values = torch.empty(self.sampler.num_rows, *values.shape[1:], dtype=values.dtype)
            self.values[torch.as_tensor(ids)] = values
            self.known[ids] = True
        assert self.values is not None
        return self.values[torch.as_tensor(batch.row_id)]


def random_shift(images: Tensor, pixels: int, *, generator: torch.Generator | None = None) -> Tensor:
    """Shift each image [B, H, W, 3] by up to `pixels` each way, repeating its edge (DrQ, arXiv 2004.13649)."""
    if pixels == 0:
        return images
    batch, height, width = images.shape[:3]
    shift = torch.randint(-pixels, pixels + 1, (2, batch), generator=generator)
    rows = (torch.arange(height) + shift[0][:, None]).clamp(0, height - 1)
    cols = (torch.arange(width) + shift[1][:, None]).clamp(0, width - 1)
    return images[torch.arange(batch)[:, None, None], rows[:, :, None], cols[:, None, :]]


def feature_source(
    policy: VLAPolicy,
    sampler: BalancedSampler,
    *,
    scope: Scope,
    shift: int = 0,
    generator: torch.Generator | None = None,
) -> Callable[[Batch], Features]:
    """How a batch becomes features at the least cost that the scope allows.

    "head": features computed once per row. "lora": vision tokens once per row, where the model takes them. Else:
    images, shifted at random.
    """
    encoder = policy.encoder
    if scope == "head":
        return CachedFeatures(policy, sampler)
    if scope == "lora" and encoder.supports_vision_cache:
        cache = RowCache(sampler, lambda batch: encoder.encode_vision(batch.images).cpu())
        return lambda batch: encoder.forward(None, batch.instructions, vision=cache(batch).to(policy.device))

    def from_images(batch: Batch) -> Features:
        images = torch.as_tensor(batch.images)
        return encoder.forward(
            random_shift(images, shift, generator=generator) if images.ndim == 4 else images, batch.instructions
        )

    return from_images


class CachedFeatures:
    """Features of a frozen encoder, one VLM forward per row, kept in float16.

    Raises:
        SupervisedError: on use, if the encoder has changed since.
    """

    def __init__(self, policy: VLAPolicy, sampler: BalancedSampler):
        self.encoder, self.device = policy.encoder, policy.device
        self.fingerprint = policy.encoder.fingerprint
        self.length = max(
            policy.encoder.encode(batch.images, batch.instructions).tokens.shape[1]
            for batch in _one_row_per_task(sampler)
        )
        self.tokens = RowCache(sampler, self._compute)

    def _compute(self, batch: Batch) -> Tensor:
        features = self.encoder.encode(batch.images, batch.instructions)
        tokens, mask = features.tokens.cpu(), features.mask.cpu()
        packed = torch.zeros(len(tokens), self.length, tokens.shape[-1] + 1, dtype=tokens.dtype)
        packed[:, : tokens.shape[1], :-1] = tokens
        packed[:, : tokens.shape[1], -1] = mask.to(tokens.dtype)
        return packed

    def __call__(self, batch: Batch) -> Features:
        """Features of a batch."""
        if self.encoder.fingerprint != self.fingerprint:
            raise SupervisedError(
                f"cached features are of encoder {self.fingerprint}, the encoder is now {self.encoder.fingerprint}; "
                "make a new cache"
            )
        packed = self.tokens(batch).to(self.device)
        return Features(packed[..., :-1], packed[..., -1] > 0.5, self.fingerprint)


def _one_row_per_task(sampler: BalancedSampler) -> Sequence[Batch]:
    """A one-row batch for every instruction, to learn the longest token sequence."""
    seen: dict[str, int] = {}
    for start in range(0, sampler.num_rows, 4096):
        ids = np.arange(start, min(start + 4096, sampler.num_rows))
        for row, instruction in zip(ids, sampler.rows(ids).instructions, strict=True):
            seen.setdefault(instruction, int(row))
    return [sampler.rows(np.array([row])) for row in seen.values()]


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
        SupervisedError: the loss is not finite.
    """
    generator = torch.Generator().manual_seed(seed)
    head = list(policy.head.parameters())
    opened = nullcontext([]) if config.scope == "head" else policy.encoder.trainable(config.scope)
    losses = []
    with opened as encoder_parameters:
        groups = [{"params": head, "lr": config.learning_rate}]
        if encoder_parameters:
            groups.append({"params": encoder_parameters, "lr": config.encoder_learning_rate})
        optimizer = torch.optim.AdamW(groups, weight_decay=config.weight_decay)
        total_steps = max(config.steps, 2)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer,
            [group["lr"] for group in groups],
            total_steps=total_steps,
            pct_start=max(config.warmup_fraction, 1.5 / total_steps),  # it divides by zero at a rise of one step
        )
        source = feature_source(policy, sampler, scope=config.scope, shift=config.random_shift, generator=generator)
        for step in range(config.steps):
            batch = sampler.sample()
            loss = policy.head.supervised_loss(
                source(batch), policy.normalize_state(batch.state), policy.normalize_action(batch.actions)
            )
            if not torch.isfinite(loss):
                raise SupervisedError(
                    f"the supervised loss is {loss.item()} at step {step}; lower the learning rates or check the data"
                )
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_([*head, *encoder_parameters], config.max_grad_norm)
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
            if on_step is not None:
                on_step(step, losses[-1])
    return float(np.mean(losses[-max(1, config.steps // 10) :]))
