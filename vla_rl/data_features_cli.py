"""`vla-rl data re-encode`: the tool of `vla-rl data` that needs a model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import tyro
from rich.console import Console

from vla_rl._data_output import progress, say
from vla_rl.data import EpisodeStore, feature_groups, reencode

if TYPE_CHECKING:
    from vla_rl.encoders import Encoder


@dataclass
class ReEncode:
    """Compute the features of all observations for an encoder, and keep them beside the episodes.

    Episodes that have them are skipped: a killed run goes on where it was, and a second one adds what was appended.

    Example: vla-rl data re-encode demos --encoder runs/demo/checkpoints/stage0
    """

    store: tyro.conf.Positional[Path]
    """directory of the store"""
    encoder: str
    """directory of a policy, an encoder or a model, or a hub id"""
    batch_size: int = 32
    """observations per forward pass"""
    device: str = "cpu"
    """where the model runs, such as "cuda\""""
    drop_stale: bool = False
    """afterwards, delete the features of all other encoders"""

    def run(self, console: Console) -> None:
        """Re-encode."""
        with EpisodeStore(self.store, mode="r") as store:
            before = {group.fingerprint for group in feature_groups(store)}
        encoder = _load(self.encoder, self.device)
        with progress(console, "episodes") as report:
            made = reencode(
                self.store, encoder, batch_size=self.batch_size, drop_stale=self.drop_stale, progress=report
            )
        say(
            console,
            f"{self.store}: {made.episodes} episodes of encoder {made.fingerprint}, {made.num_bytes / 1e6:,.1f} MB",
        )
        for fingerprint in sorted(before - {made.fingerprint}):
            say(console, f"{'dropped' if self.drop_stale else 'kept'} the features of encoder {fingerprint}")


def _load(name_or_path: str, device: str) -> Encoder:
    from vla_rl.encoders import FrozenVLMEncoder
    from vla_rl.encoders.base import load_encoder

    path = Path(name_or_path)
    path = path / "encoder" if (path / "policy.json").is_file() else path
    if (path / "encoder.json").is_file():
        return load_encoder(path, device=device)
    return FrozenVLMEncoder.from_pretrained(name_or_path, device=device)
