"""VLAPolicy: a frozen VLM encoder and an action head, with the normalisation that belongs to them."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from vla_rl.encoders.features import Features
from vla_rl.heads.base import ActionHead
from vla_rl.importing import import_path
from vla_rl.saved_files import RESTORE, read_object, read_tensors, write_tensors
from vla_rl.saved_modules import SavedModule

if TYPE_CHECKING:
    from vla_rl.data.statistics import Statistics
    from vla_rl.encoders import Encoder

FORMAT = 1  # of policy.json; a further field does not make it another format
NORMALISERS = ("action_mean", "action_std", "state_mean", "state_std")


class VLAPolicy(nn.Module):
    """pi(o, l) -> a: encoder (theta) and action head (phi).

    Args:
        encoder: the VLM, frozen except inside `encoder.trainable()`.
        head: action head; it works in normalised action units.
        statistics: mean and standard deviation of actions [A] and states [S]; identity if None.

    Attributes:
        unknown_fields: fields of a loaded `policy.json` that this version does not know; saved again as they were.
    """

    def __init__(self, encoder: Encoder, head: ActionHead, *, statistics: Statistics | None = None):
        super().__init__()
        self.encoder = encoder
        self.head = head
        self.unknown_fields: dict[str, Any] = {}
        action_dim, state_dim = _sizes(head)
        widths = head.config().get("feature_dim"), getattr(encoder, "feature_dim", None)
        if None not in widths and widths[0] != widths[1]:
            raise ValueError(
                f"the head was built for features of width {widths[0]}, the encoder gives {widths[1]}; build the head "
                "with feature_dim=encoder.feature_dim"
            )
        for name, size in (("action", action_dim), ("state", state_dim)):
            mean = None if statistics is None else getattr(statistics, f"{name}_mean")
            std = None if statistics is None else getattr(statistics, f"{name}_std")
            if mean is not None and size and len(mean) != size:
                raise ValueError(
                    f"the statistics hold {len(mean)} {name} entries, the head was built for {size}; build it with "
                    f"their {name}_dim, and give a head over chunks vla_rl.chunks.chunk_statistics"
                )
            self.register_buffer(f"{name}_mean", torch.zeros(size) if mean is None or not size else _float(mean))
            self.register_buffer(f"{name}_std", torch.ones(size) if std is None or not size else _float(std))
        self.action_mean: Tensor
        self.action_std: Tensor
        self.state_mean: Tensor
        self.state_std: Tensor

    @property
    def device(self) -> torch.device:
        """Where the head lives."""
        return self.action_mean.device

    @property
    def uses_state(self) -> bool:
        """Whether the head takes proprioception."""
        return len(self.state_mean) > 0

    def normalize_state(self, state: np.ndarray | Tensor | None) -> Tensor | None:
        """State [B, S] in normalised units, or None if the head takes none.

        Raises:
            ValueError: the head takes proprioception and none was given, or one of another size.
        """
        if not self.uses_state:
            return None
        if state is None:
            raise ValueError("this policy takes proprioception, but the observation has no 'state'")
        tensor = torch.as_tensor(state, dtype=torch.float32, device=self.device)
        _check_entries("the state", tensor, self.state_mean)
        return (tensor - self.state_mean) / self.state_std

    def normalize_action(self, action: np.ndarray | Tensor) -> Tensor:
        """Action [B, A] of the env, in the head's units.

        Raises:
            ValueError: it has another size than the head's.
        """
        tensor = torch.as_tensor(action, dtype=torch.float32, device=self.device)
        _check_entries("the action", tensor, self.action_mean)
        return (tensor - self.action_mean) / self.action_std

    def env_action(self, action: Tensor) -> np.ndarray:
        """Action [B, A] of the head in the env's units, float32, not clipped."""
        return (self.head.executed(action) * self.action_std + self.action_mean).cpu().numpy().astype(np.float32)

    def encode(self, obs: Mapping[str, np.ndarray], instructions: Sequence[str]) -> Features:
        """Features of a batch of observations: one forward of the VLM."""
        return self.encoder.encode(stack_cameras(obs), instructions)

    @torch.no_grad()
    def act(
        self,
        obs: Mapping[str, np.ndarray],
        instructions: Sequence[str] | str,
        *,
        deterministic: bool = True,
        noise: Tensor | None = None,
    ) -> np.ndarray:
        """Action for one observation (image [H, W, 3], one instruction) or a batch ([B, H, W, 3], B instructions).

        The head is in eval mode from then on: only `train_supervised` has dropout of its own on.

        Args:
            obs: the observation convention: `image` (or `image_<camera>`), `state`, `task_id`.
            instructions: natural language.
            deterministic: the mode of the distribution, else a sample.
            noise: exploration noise from `head.draw_noise`, to keep it for an episode.

        Returns:
            float32 [A] or [B, A], clipped to [-1, 1].

        Raises:
            ValueError: one instruction came with a batch of images, or the state does not fit the head.
        """
        self.head.eval()
        single = isinstance(instructions, str)
        if single and (batches := [key for key in obs if key.startswith("image") and np.ndim(obs[key]) == 4]):
            count = len(obs[batches[0]])
            raise ValueError(
                f"act got one instruction for {batches[0]!r} of {count} observations; give a list of {count}"
            )
        batch = {key: np.asarray(value)[None] for key, value in obs.items()} if single else obs
        features = self.encode(batch, [instructions] if isinstance(instructions, str) else instructions)
        state = self.normalize_state(batch.get("state"))
        if deterministic:
            action = self.head.predict(features, state)
        else:
            action = self.head.distribution(features, state).sample(noise)
        action = np.clip(self.env_action(action), -1.0, 1.0)
        return action[0] if single else action

    def save_pretrained(self, directory: str | Path) -> None:
        """Write encoder, head and normalisation to `directory` (safetensors and JSON).

        Raises:
            FileExistsError: the directory is not empty.
        """
        directory = Path(directory)
        if directory.exists() and any(directory.iterdir()):
            raise FileExistsError(f"{directory} is not empty; give a new directory or remove it first")
        directory.mkdir(parents=True, exist_ok=True)
        self.encoder.save_pretrained(directory / "encoder")
        tensors = {f"head.{key}": value for key, value in self.head.state_dict().items()}
        for name in NORMALISERS:
            tensors[name] = getattr(self, name)
        write_tensors(tensors, directory / "head.safetensors")
        head = {"class": import_path(type(self.head)), "kwargs": self.head.config()}
        if head["class"].startswith("__main__:") or "<locals>" in head["class"]:
            warnings.warn(
                f"the head is saved by its import path, and no other program can import {head['class']!r}; define it "
                "in a module of its own",
                stacklevel=2,
            )
        head |= self.unknown_fields.get("head", {})
        config = {"format": FORMAT, **self.unknown_fields, "head": head}
        (directory / "policy.json").write_text(json.dumps(config, indent=2) + "\n")

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Upload the policy with a model card; `options` and what is raised: see `vla_rl.sharing.push_to_hub`.

        Returns:
            Address of the commit.
        """
        from vla_rl.sharing import push_to_hub

        return push_to_hub(self, repo_id, **options)

    @classmethod
    def from_pretrained(
        cls, name_or_path: str | Path, *, revision: str | None = None, **encoder_kwargs: Any
    ) -> VLAPolicy:
        """Load a policy from a directory or a hub id, in eval mode; `encoder_kwargs` go to its encoder's.

        Args:
            name_or_path: directory written by `save_pretrained`, or hub id.
            revision: branch, tag or commit of the policy on the hub.
            encoder_kwargs: such as `device` and `dtype`.

        Raises:
            FileNotFoundError: there is no policy there.
            ValueError: it was written in a format that this version does not read, or a file of it is damaged.
        """
        from vla_rl.encoders.base import load_encoder

        directory = policy_directory(name_or_path, revision=revision)
        config = read_object(directory / "policy.json")
        if config.pop("format", FORMAT) != FORMAT:
            raise ValueError(
                f"{name_or_path} holds a policy in another format than {FORMAT}, the one that this version of vla_rl "
                "reads; install the version that wrote it"
            )
        saved = SavedModule.from_json(config.get("head"), ActionHead, where=f"'head' in {directory / 'policy.json'}")
        tensors = _read_head_tensors(directory / "head.safetensors", saved.sketch())
        encoder = load_encoder(directory / "encoder", **encoder_kwargs)
        policy = cls(encoder, saved.build())
        policy.unknown_fields = {**config, "head": saved.unknown_fields}
        policy.head.load_state_dict({k.removeprefix("head."): v for k, v in tensors.items() if k.startswith("head.")})
        for name in NORMALISERS:
            getattr(policy, name).copy_(tensors[name])
        return policy.to(encoder_kwargs.get("device", "cpu")).eval()


def consent(policy: VLAPolicy) -> dict[str, Any]:
    """What `from_pretrained` needs beside a directory to load a copy of a policy whose VLM runs code of its own."""
    return {"trust_remote_code": True} if getattr(policy.encoder, "trust_remote_code", False) else {}


def policy_directory(name_or_path: str | Path, *, revision: str | None = None) -> Path:
    """Where the files of a policy lie: the directory itself, or that of a download.

    Raises:
        FileNotFoundError: there is no policy there.
    """
    directory = Path(name_or_path)
    if not directory.is_dir() and str(name_or_path).count("/") == 1:
        from huggingface_hub import snapshot_download

        try:
            directory = Path(snapshot_download(str(name_or_path), revision=revision))
        except (OSError, ValueError) as error:
            raise FileNotFoundError(
                f"{name_or_path} is no directory, and the Hugging Face hub has not given it either "
                f"({type(error).__name__}); check the path or the hub id"
            ) from error
    if not (directory / "policy.json").is_file():
        raise FileNotFoundError(f"{name_or_path} holds no policy.json; give a directory written by save_pretrained")
    if not (directory / "encoder" / "encoder.json").is_file():
        raise FileNotFoundError(f"{directory / 'encoder'} holds no encoder.json; {RESTORE}")
    return directory


def stack_cameras(obs: Mapping[str, np.ndarray]) -> np.ndarray:
    """The images of a batch: uint8 [B, H, W, 3] from `image` alone, or [B, N, H, W, 3] from all cameras by name.

    Raises:
        KeyError: there is no image.
        ValueError: the cameras' images differ in size.
    """
    cameras = sorted(key for key in obs if key == "image" or key.startswith("image_"))
    if cameras == ["image"]:
        return obs["image"]
    if not cameras:
        raise KeyError(
            f"the observation has no 'image' or 'image_<camera>', only {sorted(obs)}; wrap the env in VLAObservation"
        )
    shapes = {key: list(np.shape(obs[key])[1:]) for key in cameras}
    if any(shape != shapes[cameras[0]] for shape in shapes.values()):
        raise ValueError(
            f"cameras must share one size to be stacked, got {shapes}; give VLAObservation one image_size for all"
        )
    return np.stack([obs[key] for key in cameras], axis=1)


def _sizes(head: ActionHead) -> tuple[int, int]:
    """Sizes of action and state; 0 without proprioception."""
    kwargs = head.config()
    if "action_dim" not in kwargs:
        raise ValueError(f"config() of {type(head).__name__} holds {sorted(kwargs)}; it has to hold action_dim too")
    return int(kwargs["action_dim"]), int(kwargs.get("state_dim", 0))


def _read_head_tensors(path: Path, head: ActionHead) -> dict[str, Tensor]:
    """Weights of the head and the normalisers, from a file that holds just these, in the right shapes."""
    shapes = {f"head.{name}": tuple(value.shape) for name, value in head.state_dict().items()}
    action_dim, state_dim = _sizes(head)
    tensors = read_tensors(path, shapes | dict(zip(NORMALISERS, 2 * [(action_dim,)] + 2 * [(state_dim,)], strict=True)))
    for name in NORMALISERS:
        usable, what = torch.isfinite(tensors[name]), "finite numbers"
        if name.endswith("_std"):
            usable, what = usable & (tensors[name] > 0), "finite numbers above 0"
        if not usable.all():
            raise ValueError(f"{path} holds {name}={tensors[name].tolist()[:8]}, expected {what}; {RESTORE}")
    return tensors


def _check_entries(what: str, given: Tensor, mean: Tensor) -> None:
    """Entries of another number would be refused by torch in its own words, and a single one spread over all."""
    if given.shape[-1:] != mean.shape:
        raise ValueError(f"{what} is {list(given.shape)}, the head was built for {len(mean)} entries; make them agree")


def _float(array: np.ndarray) -> Tensor:
    return torch.as_tensor(np.asarray(array), dtype=torch.float32).clone()
