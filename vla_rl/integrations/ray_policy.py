"""What of a policy travels between machines: all of its files once, later LoRA, head and normalisation alone."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vla_rl.encoders.lora import LoRASettings
from vla_rl.policy import VLAPolicy

PolicyFiles = dict[str, np.ndarray]
"""Name -> bytes (uint8) of every file that `VLAPolicy.save_pretrained` writes."""

Base = str | PolicyFiles
"""Where a machine finds the weights that do not travel: a directory or hub id there, or the files themselves."""


@dataclass(frozen=True)
class Adaptation:
    """What stages 1 and 2 change of a policy, with the identity of the encoder that results.

    Attributes:
        lora: settings of the adapter, or None.
        tensors: weights of LoRA and head, and the normalisation, by their name in the policy.
        fingerprint: of the encoder with this LoRA.
        feature_dtype: type in which the encoder stores tokens.
    """

    lora: LoRASettings | None
    tensors: dict[str, Tensor]
    fingerprint: str
    feature_dtype: torch.dtype

    @classmethod
    def of(cls, policy: VLAPolicy) -> Adaptation:
        """A copy of what `policy` has learned, on the CPU."""
        encoder = policy.encoder
        learned = {
            name: value
            for name, value in policy.state_dict().items()
            if not name.startswith("encoder.") or "lora_" in name
        }
        return cls(encoder.lora, copied(learned), encoder.fingerprint, encoder.feature_dtype)

    @property
    def nbytes(self) -> int:
        """Size of the tensors."""
        return sum(value.nbytes for value in self.tensors.values())

    def apply(self, policy: VLAPolicy) -> None:
        """Give `policy`, whose other weights are those of the sender, what has been learned there.

        Raises:
            ValueError: its weights differ from the sender's, or its head has another shape.
        """
        encoder = policy.encoder
        if self.lora is not None and encoder.lora is None:
            encoder.add_lora(self.lora)
        known = policy.state_dict()
        wrong = [name for name, value in self.tensors.items() if name not in known or known[name].shape != value.shape]
        if wrong:
            raise ValueError(
                f"{len(wrong)} of {len(self.tensors)} tensors that came from the other machine have no place here, "
                f"such as {wrong[0]!r}; start both from the same policy and the same LoRA settings"
            )
        policy.load_state_dict(self.tensors, strict=False)
        if encoder.lora is not None:
            with encoder.trainable("lora"):
                pass  # its weights have changed: on leaving, the encoder takes its fingerprint anew
        encoder.feature_dtype = self.feature_dtype
        if encoder.fingerprint != self.fingerprint:
            raise ValueError(
                f"the encoder has fingerprint {encoder.fingerprint} here and {self.fingerprint} where the weights come "
                "from: the VLMs below LoRA differ; give every machine the same base policy, or pass the policy itself"
            )


def copied(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies on the CPU."""
    return {name: value.detach().to("cpu", copy=True) for name, value in tensors.items()}


def policy_files(policy: VLAPolicy) -> PolicyFiles:
    """The files of a policy, to be sent; without the VLM's weights where these have a source and are unchanged."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "policy"
        policy.save_pretrained(root)
        paths = sorted(path for path in root.rglob("*") if path.is_file())
        return {path.relative_to(root).as_posix(): np.fromfile(path, np.uint8) for path in paths}


def load_base(base: Base, device: str) -> VLAPolicy:
    """The policy of a base.

    Raises:
        FileNotFoundError: there is none at the path on this machine.
    """
    if isinstance(base, str):
        return VLAPolicy.from_pretrained(base, device=device)
    with tempfile.TemporaryDirectory() as folder:
        for name, content in base.items():
            path = Path(folder) / name
            path.parent.mkdir(parents=True, exist_ok=True)
            content.tofile(path)
        return VLAPolicy.from_pretrained(folder, device=device)
