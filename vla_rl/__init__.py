"""iRe-VLA for any Hugging Face VLM and any Gymnasium environment.

Importing this package pulls in neither a simulator nor transformers: names are loaded on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

_EXPORTS = {
    "FrozenVLMEncoder": "vla_rl.encoders",
    "Features": "vla_rl.encoders.features",
    "ActionHead": "vla_rl.heads",
    "GaussianHead": "vla_rl.heads",
    "ValueHead": "vla_rl.heads",
    "VLAPolicy": "vla_rl.policy",
    "Episode": "vla_rl.data",
    "EpisodeStore": "vla_rl.data",
    "IterativeTrainer": "vla_rl.trainer",
    "IterativeConfig": "vla_rl.config",
    "evaluate": "vla_rl.evaluation",
}

__all__ = [
    "ActionHead",
    "Episode",
    "EpisodeStore",
    "Features",
    "FrozenVLMEncoder",
    "GaussianHead",
    "IterativeConfig",
    "IterativeTrainer",
    "VLAPolicy",
    "ValueHead",
    "evaluate",
]

if TYPE_CHECKING:
    from vla_rl.config import IterativeConfig
    from vla_rl.data import Episode, EpisodeStore
    from vla_rl.encoders import FrozenVLMEncoder
    from vla_rl.encoders.features import Features
    from vla_rl.evaluation import evaluate
    from vla_rl.heads import ActionHead, GaussianHead, ValueHead
    from vla_rl.policy import VLAPolicy
    from vla_rl.trainer import IterativeTrainer


def __getattr__(name: str) -> object:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'vla_rl' has no attribute {name!r}")
    return getattr(importlib.import_module(_EXPORTS[name]), name)
