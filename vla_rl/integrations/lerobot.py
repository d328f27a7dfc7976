"""LeRobot's policies as source of features or as base under a residual, and ours with LeRobot's interface.

Nothing of LeRobot is imported: any object with its methods will do.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vla_rl._cameras import camera_name
from vla_rl.encoders.base import Encoder, require_finite, require_rows
from vla_rl.encoders.features import Features
from vla_rl.encoders.fingerprint import update_digest
from vla_rl.policy import VLAPolicy

Batch = dict[str, Any]
Embed = Callable[[Any, Batch], tuple[Tensor, Tensor]]
IMAGES = "observation.images."


def to_batch(
    obs: Mapping[str, np.ndarray],
    instructions: Sequence[str],
    *,
    cameras: Mapping[str, str] | None = None,
    device: torch.device | str = "cpu",
) -> Batch:
    """A batch of observations as LeRobot's policies take it.

    Args:
        obs: `image` or `image_<camera>` uint8 [B, H, W, 3], and perhaps `state` [B, S].
        instructions: B sentences.
        cameras: our key -> LeRobot's camera name; by default `image` is `image` and `image_top` is `top`.
        device: of the tensors.

    Returns:
        `observation.images.<camera>` float32 [B, 3, H, W] in 0..1, `observation.state` float32 [B, S], `task`.

    Raises:
        KeyError: `cameras` names a key that the observations have not.
    """
    if unknown := (cameras or {}).keys() - obs.keys():
        raise KeyError(f"cameras names {sorted(unknown)}, but the observation has {sorted(obs)}; give its image keys")
    batch: Batch = {"task": list(instructions)}
    for key in (key for key in obs if key == "image" or key.startswith("image_")):
        camera = (cameras or {}).get(key, key.removeprefix("image_"))
        images = torch.as_tensor(np.ascontiguousarray(obs[key]), device=device)
        batch[IMAGES + camera] = images.movedim(-1, -3).float() / 255
    if "state" in obs:
        batch["observation.state"] = torch.as_tensor(obs["state"], dtype=torch.float32, device=device)
    return batch


def from_batch(
    batch: Mapping[str, Any], *, cameras: Mapping[str, str] | None = None
) -> tuple[dict[str, np.ndarray], list[str]]:
    """The inverse of `to_batch`: observations by our convention, and instructions.

    A data set's `observation.image` beside `observation.images.<camera>` is the camera `image`. Our `image_0` is
    LeRobot's camera `0`, and `image_0` again only with `cameras={"image_0": "0"}`.

    Raises:
        KeyError: the batch has no image or no `task`, or not the cameras that `cameras` names.
        ValueError: a float image goes beyond 1, or two cameras would get one name.
    """
    ours = {theirs: key for key, theirs in (cameras or {}).items()}
    features = {key.removeprefix(IMAGES): key for key in batch if key.startswith(IMAGES)}
    if IMAGES + "image" not in batch and "observation.image" in batch:
        features["image"] = "observation.image"
    names = list(features)
    if not names or "task" not in batch:
        raise KeyError(
            f"the batch has the keys {sorted(batch)}; LeRobot's interface needs {IMAGES}<camera> and task (a sentence "
            "per row)"
        )
    if missing := ours.keys() - set(names):
        raise KeyError(f"cameras names LeRobot's {sorted(missing)}, but the batch has the cameras {names}; name these")
    obs: dict[str, np.ndarray] = {}
    for name in names:
        key = ours.get(name, "image" if len(names) == 1 else camera_name(name))
        if key in obs:
            raise ValueError(f"two of the cameras {names} would both be {key!r}; give cameras={{key: camera}}")
        images = batch[features[name]].movedim(-3, -1)
        if images.is_floating_point():
            if images.max() > 1.01:
                raise ValueError(
                    f"{features[name]} is float up to {float(images.max()):g}, expected 0..1; divide it by 255"
                )
            images = (images.float() * 255).round().clamp(0, 255).to(torch.uint8)
        obs[key] = images.cpu().numpy()
    if "observation.state" in batch:
        obs["state"] = batch["observation.state"].float().cpu().numpy()
    task = batch["task"]
    return obs, [task] * len(next(iter(obs.values()))) if isinstance(task, str) else list(task)


class LeRobotPolicy(nn.Module):
    """A `VLAPolicy` with the interface of LeRobot's policies, for its evaluation, its robots and its async server.

    Takes images in 0..1 and states and gives actions in env units: LeRobot's own normalisation is not to be applied.

    Args:
        policy: acts deterministically.
        cameras: our key -> LeRobot's camera name, as for `to_batch`; needed only where the names differ.
    """

    def __init__(self, policy: VLAPolicy, *, cameras: Mapping[str, str] | None = None):
        super().__init__()
        self.policy = policy
        self.cameras = cameras
        self._queue: deque[Tensor] = deque()

    def reset(self) -> None:
        """Forget what is left of a chunk: a new episode begins."""
        self._queue.clear()

    @torch.no_grad()
    def predict_action_chunk(self, batch: Mapping[str, Any], **kwargs: Any) -> Tensor:
        """Actions of the next steps, float32 [B, H, A]; H is 1 unless the head gives chunks."""
        obs, instructions = from_batch(batch, cameras=self.cameras)
        actions = torch.from_numpy(self.policy.act(obs, instructions))
        return actions.unflatten(-1, (self.policy.head.chunk, -1)).to(self.policy.device)

    @torch.no_grad()
    def select_action(self, batch: Mapping[str, Any], **kwargs: Any) -> Tensor:
        """The next action, float32 [B, A]; the policy looks again when its chunk is used up."""
        if not self._queue:
            self._queue.extend(self.predict_action_chunk(batch).transpose(0, 1))
        return self._queue.popleft()

    def forward(self, batch: Mapping[str, Any]) -> tuple[Tensor, dict[str, float]]:
        """The head's imitation loss against `action` [B, A] (or [B, H, A]) in env units, on frozen features."""
        obs, instructions = from_batch(batch, cameras=self.cameras)
        policy = self.policy
        actions = policy.normalize_action(torch.as_tensor(batch["action"]).flatten(1))
        state = policy.normalize_state(obs.get("state"))
        loss = policy.head.supervised_loss(policy.encode(obs, instructions), state, actions)
        return loss, {"loss": float(loss.detach())}


class LeRobotBase:
    """Actions of a LeRobot policy for a batch of environments whose episodes begin at different times.

    Every environment executes `n_action_steps` of a chunk before the policy looks again, or fewer if its episode ends.
    Policies that keep observations of their own between calls (diffusion with several observation steps) do not fit.

    Args:
        policy: has `predict_action_chunk(batch) -> [B, H, A]` and `reset()`.
        n_action_steps: how many actions of a chunk are executed.
        cameras: our key -> LeRobot's camera name, as for `to_batch`.
        preprocess: batch -> batch before the policy, such as the pipeline that LeRobot saves with a policy
            (normalisation, tokens of the task).
        postprocess: actions [B, A] -> actions in env units.
        device: of the batch.

    Raises:
        TypeError: the policy has no `predict_action_chunk`.
    """

    def __init__(
        self,
        policy: Any,
        *,
        n_action_steps: int = 1,
        cameras: Mapping[str, str] | None = None,
        preprocess: Callable[[Batch], Batch] | None = None,
        postprocess: Callable[[Tensor], Tensor] | None = None,
        device: torch.device | str = "cpu",
    ):
        if not callable(getattr(policy, "predict_action_chunk", None)):
            raise TypeError(f"{type(policy).__name__} has no predict_action_chunk(batch); give a LeRobot policy")
        self.policy, self.n_action_steps, self.cameras, self.device = policy, n_action_steps, cameras, device
        self.preprocess, self.postprocess = preprocess, postprocess
        self._queues: list[deque[np.ndarray]] = []
        policy.reset()

    @torch.no_grad()
    def actions(
        self,
        obs: Mapping[str, np.ndarray],
        instructions: Sequence[str],
        *,
        started: np.ndarray | None = None,
        active: np.ndarray | None = None,
    ) -> np.ndarray:
        """The next action of every environment, float32 [B, A].

        Args:
            obs: observation convention, a row per environment, always of the same environments in the same order.
            instructions: a sentence per environment.
            started: bool [B], which environments are at the start of an episode; None means all of them.
            active: bool [B], which environments need an action; the others' chunks stay as they are, and their rows of
                the result are zero. None means all of them.
        """
        count = len(instructions)
        if started is None or len(self._queues) != count:
            self._queues = [deque() for _ in range(count)]
        else:
            for i in np.flatnonzero(started):
                self._queues[i].clear()
        rows = range(count) if active is None else np.flatnonzero(active).tolist()
        empty = [i for i in rows if not self._queues[i]]
        if empty:
            chosen = {key: value[empty] for key, value in obs.items()}
            chunk = self.plan(chosen, [instructions[i] for i in empty])[:, : self.n_action_steps]
            for i, actions in zip(empty, chunk, strict=True):
                self._queues[i].extend(actions)
        taken = {i: self._queues[i].popleft() for i in rows}
        nothing = np.zeros_like(next(iter(taken.values())))
        return np.stack([taken.get(i, nothing) for i in range(count)])

    @torch.no_grad()
    def plan(self, obs: Mapping[str, np.ndarray], instructions: Sequence[str]) -> np.ndarray:
        """What the policy would do from here, float32 [B, H, A]; no queue is touched."""
        batch = to_batch(obs, instructions, cameras=self.cameras, device=self.device)
        chunk = self.policy.predict_action_chunk(batch if self.preprocess is None else self.preprocess(batch))
        if self.postprocess is not None:
            chunk = self.postprocess(chunk.flatten(0, 1)).unflatten(0, chunk.shape[:2])
        return chunk.float().cpu().numpy()


class LeRobotEncoder(Encoder):
    """Inner states of a LeRobot policy as features, where `FrozenVLMEncoder` would take a VLM.

    The policy is frozen. It gets no proprioception, since an encoder sees pictures and sentences alone: where its
    inputs demand a state it is zero, and the head on top takes the real one.

    Args:
        policy: a module.
        embed: `(policy, batch) -> (tokens [B, M, D], mask bool [B, M])`, such as `states_of("model.encoder")`.
        state_dim: size of the zeros for `observation.state`; 0 leaves it out.
        cameras: names of the cameras, in the order of the images' second axis.
        preprocess: batch -> batch before the policy, such as the pipeline that LeRobot saves with it.
        device: where the policy runs.

    Attributes:
        feature_dim: D, known after the first `encode` or `measure`.
        num_forwards: calls of the policy so far.
        num_frames: frames encoded so far, each view counted.
        fingerprint: of the policy's weights, `cameras`, `state_dim`, and what `embed` and `preprocess` make of a frame.
    """

    def __init__(
        self,
        policy: nn.Module,
        embed: Embed,
        *,
        image_size: tuple[int, int],
        state_dim: int = 0,
        cameras: Sequence[str] = ("image",),
        preprocess: Callable[[Batch], Batch] | None = None,
        device: torch.device | str = "cpu",
    ):
        super().__init__()
        self.policy = policy.requires_grad_(False).eval().to(device)
        self.embed, self.state_dim, self.cameras, self.preprocess = embed, state_dim, tuple(cameras), preprocess
        self._fingerprint = weights_fingerprint(policy)
        views = np.random.default_rng(0).integers(0, 256, (1, len(self.cameras), *image_size, 3), dtype=np.uint8)
        tokens = self.encode(views, ["go"]).tokens.float()
        self.feature_dim = tokens.shape[-1]
        # Three digits, which do not depend on the machine as the last ones do.
        seen = f"{self.cameras} {state_dim} {list(tokens.shape)} {tokens.mean():.2e} {tokens.std():.2e}"
        self._fingerprint = hashlib.sha256(f"{self._fingerprint} {seen}".encode()).hexdigest()[:16]

    @torch.no_grad()
    def encode(self, images: np.ndarray | Tensor, instructions: Sequence[str]) -> Features:
        """Features of frames uint8 [B, H, W, 3] or [B, N, H, W, 3] of N cameras: tokens [B, M, D] in `feature_dtype`.

        Raises:
            FloatingPointError: a token does not fit `feature_dtype`.
            ValueError: the number of cameras is another, or `embed` gave something else than tokens and mask.
        """
        array = np.asarray(images)
        views = array[:, None] if array.ndim == 4 else array
        if views.ndim != 5 or views.shape[1] != len(self.cameras):
            raise ValueError(
                f"images have the shape {array.shape}, expected [B, H, W, 3] or [B, N, H, W, 3] with N = "
                f"{len(self.cameras)} for the cameras {self.cameras}"
            )
        obs = {f"image_{name}": views[:, i] for i, name in enumerate(self.cameras)}
        if self.state_dim:
            obs["state"] = np.zeros((len(views), self.state_dim), np.float32)
        batch = to_batch(obs, instructions, device=self.device)
        tokens, mask = self.embed(self.policy, batch if self.preprocess is None else self.preprocess(batch))
        require_rows(tokens, len(views), "embed")
        features = Features(tokens.to(self.feature_dtype), mask.bool(), self.fingerprint)
        require_finite(features, "embed")
        self.num_forwards += 1
        self.num_frames += views.shape[0] * views.shape[1]
        return features

    @property
    def fingerprint(self) -> str:
        """Of what the policy was and did when it was given."""
        return self._fingerprint

    def train(self, mode: bool = True) -> LeRobotEncoder:
        """Set the flag only: the policy stays in eval mode."""
        self.training = mode
        return self

    def save_pretrained(self, directory: Any) -> None:
        """Not possible: LeRobot saves its policies.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError(
            "a LeRobot policy is saved by its own save_pretrained; save the head's state_dict beside it"
        )


def states_of(module: str, *, batch_first: bool = True) -> Embed:
    """An `embed` that runs `predict_action_chunk` and takes what one of the policy's modules has returned.

    Args:
        module: its name in `policy.named_modules()`; for ACT `"model.encoder"`, whose states are [M, B, D].
        batch_first: False for states [M, B, D].
    """

    def embed(policy: Any, batch: Batch) -> tuple[Tensor, Tensor]:
        caught: list[Any] = []
        hook = policy.get_submodule(module).register_forward_hook(
            lambda _module, _inputs, output: caught.append(output)
        )
        try:
            policy.predict_action_chunk(batch)
        finally:
            hook.remove()
        if not caught or not isinstance(caught[0], Tensor) or caught[0].ndim != 3:
            found = "nothing" if not caught else getattr(caught[0], "shape", type(caught[0]).__name__)
            raise ValueError(f"module {module!r} gave {found}, expected a tensor with three axes; name another module")
        tokens = caught[0] if batch_first else caught[0].transpose(0, 1)
        return tokens, torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)

    return embed


def weights_fingerprint(module: nn.Module) -> str:
    """Hash of all weights and buffers of a module."""
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        update_digest(digest, name, value)
    return digest.hexdigest()[:16]
