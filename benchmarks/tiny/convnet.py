"""The probes' baseline: a conv net that has learned nothing but the actions of demonstrations."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from shards import Shard
from torch import Tensor, nn

from vla_rl import EpisodeStore
from vla_rl.data.sampler import BalancedSampler
from vla_rl.sl.supervised import random_shift


class ConvNet(nn.Module):
    """Behaviour cloning from 64 x 64 pixels: five convolutions with the instruction's embedding added to each, an MLP.

    Args:
        instructions: those of the demonstrations; any other has the mean of their embeddings.
        action_dim: A.
    """

    CHANNELS = (32, 64, 128, 192, 192)

    def __init__(self, instructions: Sequence[str], action_dim: int) -> None:
        super().__init__()
        self.index = {text: number for number, text in enumerate(instructions)}
        inputs, strides = (3, *self.CHANNELS), (2, 2, 2, 2, 1)
        self.convolutions = nn.ModuleList(
            nn.Conv2d(a, b, 3, stride=stride, padding=1)
            for a, b, stride in zip(inputs[:-1], inputs[1:], strides, strict=True)
        )
        self.words = nn.ModuleList(nn.Embedding(len(instructions), width) for width in self.CHANNELS)
        self.norms = nn.ModuleList(nn.GroupNorm(8, width) for width in self.CHANNELS)
        self.head = nn.Sequential(
            nn.Flatten(), nn.Linear(self.CHANNELS[-1] * 16, 256), nn.GELU(), nn.Linear(256, action_dim)
        )

    def features(self, frames: Tensor, instructions: Sequence[str]) -> Tensor:
        """The last feature map, [B, 192, 4, 4], of frames uint8 [B, 64, 64, 3]: as many places as the VLM's patches."""
        numbers = torch.tensor([self.index.get(text, -1) for text in instructions])
        x = frames.permute(0, 3, 1, 2).float() / 127.5 - 1
        for convolution, norm, words in zip(self.convolutions, self.norms, self.words, strict=True):
            known = words(numbers.clamp_min(0))
            shift = torch.where((numbers >= 0)[:, None], known, words.weight.mean(0))
            x = torch.nn.functional.gelu(norm(convolution(x)) + shift[:, :, None, None])
        return x

    def forward(self, frames: Tensor, instructions: Sequence[str]) -> Tensor:
        """Actions [B, A], normalised."""
        return self.head(self.features(frames, instructions))


def train_on_actions(demonstrations: Path, *, steps: int = 1500, batch_size: int = 128, seed: int = 0) -> ConvNet:
    """A conv net cloned from stored demonstrations with 64 x 64 pictures, shifted at random (DrQ)."""
    with EpisodeStore(demonstrations, mode="r") as store:
        sampler = BalancedSampler([store], batch_size=batch_size, seed=seed)
        sample = sampler.rows(np.arange(sampler.num_rows)[:: max(1, sampler.num_rows // 5000)])
        mean, std = sample.actions.mean(0), sample.actions.std(0) + 1e-6
        torch.manual_seed(seed)
        net = ConvNet(sorted(set(sample.instructions)), sample.actions.shape[1])
        optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3, weight_decay=1e-4)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=steps, pct_start=0.1)
        for step in range(steps):
            batch = sampler.sample()
            frames = random_shift(torch.as_tensor(batch.images), 4)
            target = torch.as_tensor((batch.actions - mean) / std, dtype=torch.float32)
            loss = torch.nn.functional.mse_loss(net(frames, batch.instructions), target)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            if step % 250 == 0 or step == steps - 1:
                print(f"conv net, step {step}: loss {loss.item():.4f}", flush=True)
    return net.eval()


@torch.no_grad()
def conv_features(net: ConvNet, shard: Shard, instructions: Sequence[str]) -> NDArray[np.float64]:
    """The last feature map of each picture, flat: [N, 192 * 16]."""
    rows = [
        net.features(torch.from_numpy(shard.images[i : i + 64]), instructions[i : i + 64]).flatten(1).numpy()
        for i in range(0, len(shard), 64)
    ]
    return np.concatenate(rows).astype(float)
