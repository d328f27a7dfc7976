"""Stage 1 by TorchRL: encoded vector environments as its EnvBase, our heads as actor and critic, its VLA keys."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, VectorEnv
from torch import Tensor, nn

from vla_rl.encoders.features import Features
from vla_rl.heads.gaussian import GaussianHead
from vla_rl.heads.tanh_gaussian import TanhGaussianHead
from vla_rl.heads.value import ValueHead
from vla_rl.policy import VLAPolicy

try:
    from tensordict import TensorDict, TensorDictBase
    from tensordict.nn import InteractionType, TensorDictModule
    from torchrl.data import Binary, Bounded, Categorical, Composite, Unbounded
    from torchrl.envs import EnvBase
    from torchrl.modules import IndependentNormal, ProbabilisticActor, TanhNormal, ValueOperator
    from torchrl.modules.vla import VLAWrapperBase
except ImportError as error:
    raise ImportError(
        'vla_rl.integrations.torchrl needs torchrl 0.14 or later; install it with `pip install "vla-rl[torchrl]"`'
    ) from error

if TYPE_CHECKING:
    from vla_rl.encoders import FrozenVLMEncoder

TOKENS, MASK, STATE = ("observation", "tokens"), ("observation", "mask"), ("observation", "state")


class EncodedEnv(EnvBase):
    """A Gymnasium vector environment with features, that is `EncodeObservation`, as one TorchRL environment.

    The batch size is [N]. Keys: `("observation", "tokens")` float32 [N, M, D], `("observation", "mask")` bool [N, M],
    `("observation", "state")` float32 [N, S] where there is one, `"success"` bool [N, 1] beside the usual `"action"`,
    `"reward"`, `"done"`, `"terminated"` and `"truncated"`. Actions are clipped to their box on the way to the
    environment. Only the rows that TorchRL resets are encoded anew.

    Args:
        env: `EncodeObservation` in `AutoresetMode.DISABLED`: TorchRL says itself which rows to reset.

    Raises:
        ValueError: the environment resets by itself, or gives no tokens and mask.
    """

    def __init__(self, env: VectorEnv):
        mode = AutoresetMode(env.metadata.get("autoreset_mode", AutoresetMode.NEXT_STEP))
        if mode is not AutoresetMode.DISABLED:
            raise ValueError(
                f"the vector environment resets in {mode}, but TorchRL resets single rows itself; build it with "
                "autoreset_mode=AutoresetMode.DISABLED"
            )
        single: Any = env.single_observation_space
        parts = single.spaces if isinstance(single, spaces.Dict) else {}
        if not {"tokens", "mask"} <= parts.keys():
            raise ValueError(
                f"the observation has the keys {sorted(parts)}; EncodedEnv needs tokens and mask: wrap the vector "
                "environment in vla_rl.envs.EncodeObservation"
            )
        super().__init__(device="cpu", batch_size=torch.Size([env.num_envs]))
        self.env = env
        self._next_seed: int | None = None
        self._has_state = "state" in parts
        count = env.num_envs
        shapes = {key: torch.Size((count, *(part.shape or ()))) for key, part in parts.items()}
        observation: dict[str, Any] = {
            "tokens": Unbounded(shapes["tokens"]),
            "mask": Binary(n=shapes["mask"][1], shape=shapes["mask"], dtype=torch.bool),
        }
        if self._has_state:
            observation["state"] = Unbounded(shapes["state"])
        flag = Categorical(2, shape=torch.Size((count, 1)), dtype=torch.bool)
        self.observation_spec = Composite(
            observation=Composite(observation, shape=(count,)), success=flag, shape=(count,)
        )
        box: Any = env.action_space
        self._low, self._high = box.low, box.high
        self.action_spec = Bounded(
            low=torch.as_tensor(box.low), high=torch.as_tensor(box.high), shape=box.shape, dtype=torch.float32
        )
        self.reward_spec = Unbounded(torch.Size((count, 1)))
        self.done_spec = Composite(done=flag.clone(), terminated=flag.clone(), truncated=flag.clone(), shape=(count,))

    def _reset(self, tensordict: TensorDictBase | None = None, **kwargs: Any) -> TensorDictBase:
        options: dict[str, Any] | None = None
        reset = None if tensordict is None else tensordict.get("_reset", None)
        if reset is not None and not reset.all():
            options = {"reset_mask": reset.reshape(-1).numpy()}
        observations, _ = self.env.reset(seed=self._next_seed, options=options)
        self._next_seed = None
        flags = {
            name: torch.zeros(*self.batch_size, 1, dtype=torch.bool) for name in ("done", "terminated", "truncated")
        }
        return self._pack(observations, np.zeros(self.batch_size, dtype=np.bool_), flags)

    def _step(self, tensordict: TensorDictBase) -> TensorDictBase:
        actions = tensordict.get("action").detach().numpy()
        if actions.shape != self._low.shape:  # numpy would spread one over the other
            raise ValueError(
                f"the actor gave actions {list(actions.shape)}, the environments take {list(self._low.shape)}; build "
                "its head with their action_dim"
            )
        actions = np.clip(actions, self._low, self._high)
        observations, rewards, terminated, truncated, infos = self.env.step(actions)
        flags = {"terminated": terminated, "truncated": truncated, "done": terminated | truncated}
        more: dict[str, Tensor] = {name: torch.from_numpy(np.array(flag))[:, None] for name, flag in flags.items()}
        more["reward"] = torch.from_numpy(np.asarray(rewards, dtype=np.float32))[:, None]
        success = np.asarray(infos.get("success", np.zeros(self.batch_size)), dtype=np.bool_)
        return self._pack(observations, success, more)

    def _set_seed(self, seed: int | None) -> None:
        self._next_seed = seed

    def close(self, *, raise_if_closed: bool = True) -> None:
        """Close the environments."""
        super().close(raise_if_closed=raise_if_closed)
        self.env.close()

    def _pack(self, observations: dict[str, np.ndarray], success: np.ndarray, more: dict[str, Tensor]) -> TensorDict:
        observation = {
            "tokens": torch.from_numpy(observations["tokens"]),
            "mask": torch.from_numpy(observations["mask"]).bool(),
        }
        if self._has_state:
            observation["state"] = torch.from_numpy(np.array(observations["state"], dtype=np.float32))
        packed = {"observation": observation, "success": torch.from_numpy(success)[:, None], **more}
        return TensorDict(packed, batch_size=self.batch_size)


class _Inputs(nn.Module):
    """Tokens, mask and state by TorchRL's keys as a head wants them."""

    def __init__(self, policy: VLAPolicy):
        super().__init__()
        self.register_buffer("state_mean", policy.state_mean.clone())
        self.register_buffer("state_std", policy.state_std.clone())
        self.state_mean: Tensor
        self.state_std: Tensor

    def forward(self, tokens: Tensor, mask: Tensor, state: Tensor | None) -> tuple[Features, Tensor | None]:
        batch = tokens.shape[:-2]
        features = Features(tokens.reshape(-1, *tokens.shape[-2:]), mask.reshape(-1, mask.shape[-1]), "")
        if state is None:
            return features, None
        return features, ((state - self.state_mean) / self.state_std).reshape(batch.numel(), -1)


class HeadParameters(nn.Module):
    """A policy's head as a module from features to mean and standard deviation of the action, [*B, A].

    The head is the policy's own, not a copy: what TorchRL learns, the policy has learned. Outputs are in env units;
    those of a `TanhGaussianHead` are before squashing.
    """

    def __init__(self, policy: VLAPolicy):
        super().__init__()
        self.head: GaussianHead = _require_gaussian(policy)
        self.inputs = _Inputs(policy)
        self.register_buffer("action_mean", policy.action_mean.clone())
        self.register_buffer("action_std", policy.action_std.clone())
        self.action_mean: Tensor
        self.action_std: Tensor

    def forward(self, tokens: Tensor, mask: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation, each [*B, A]."""
        distribution: Any = self.head.distribution(*self.inputs(tokens, mask, state))
        if isinstance(self.head, TanhGaussianHead):
            mean, std = distribution.base.mean, distribution.base.std
        else:
            mean = distribution.mean * self.action_std + self.action_mean
            std = distribution.std * self.action_std
        shape = (*tokens.shape[:-2], mean.shape[-1])
        return mean.reshape(shape), std.reshape(shape)


class _Value(nn.Module):
    def __init__(self, policy: VLAPolicy, critic: ValueHead):
        super().__init__()
        self.inputs, self.critic = _Inputs(policy), critic

    def forward(self, tokens: Tensor, mask: Tensor, state: Tensor | None = None) -> Tensor:
        features, normalised = self.inputs(tokens, mask, state)
        return self.critic(features, normalised).reshape(*tokens.shape[:-2], 1)


def make_actor(policy: VLAPolicy) -> ProbabilisticActor:
    """The policy's head as TorchRL's actor: the keys of `EncodedEnv` in, `"action"` in env units out.

    It explores unless `set_exploration_type(ExplorationType.DETERMINISTIC)` says otherwise; TorchRL's own default is
    not to, and actions that are the mean give no policy gradient. Noise is independent per step; with gSDE it has the
    standard deviation of the head's noise, but is drawn anew.

    Raises:
        TypeError: the head is no `GaussianHead` or `TanhGaussianHead`.
    """
    head = _require_gaussian(policy)
    module = TensorDictModule(HeadParameters(policy), in_keys=_in_keys(policy), out_keys=["loc", "scale"])
    distribution: dict[str, Any] = {"distribution_class": IndependentNormal}
    if isinstance(head, TanhGaussianHead):
        low, high = (torch.from_numpy(policy.env_action(bound)) for bound in (head.low, head.high))
        distribution = {
            "distribution_class": TanhNormal,
            "distribution_kwargs": {"low": low, "high": high, "tanh_loc": False, "event_dims": 1},
        }
    return ProbabilisticActor(
        module,
        in_keys=["loc", "scale"],
        out_keys=["action"],
        return_log_prob=True,
        default_interaction_type=InteractionType.RANDOM,
        **distribution,
    )


def make_critic(policy: VLAPolicy) -> ValueOperator:
    """A fresh critic with the shape of the policy's head: the keys of `EncodedEnv` in, `"state_value"` out."""
    config = policy.head.config()
    shared = {key: config[key] for key in ("width", "num_queries", "hidden_dim") if key in config}
    critic = ValueHead(config["feature_dim"], state_dim=len(policy.state_mean), **shared).to(policy.device)
    return ValueOperator(_Value(policy, critic), in_keys=_in_keys(policy))


def to_policy(actor: nn.Module, encoder: FrozenVLMEncoder) -> VLAPolicy:
    """A policy of its own from a trained actor, also one that was copied, loaded or trained in another process.

    The policy that `make_actor` was called with has learned already and needs no conversion.

    Args:
        actor: what `make_actor` gave, or any module that contains it.
        encoder: the encoder that made the features it was trained on.

    Raises:
        TypeError: there is not exactly one head of ours in it.
    """
    found = [module for module in actor.modules() if isinstance(module, HeadParameters)]
    if len(found) != 1:
        raise TypeError(f"{type(actor).__name__} holds {len(found)} heads; give an actor made by make_actor")
    parameters = found[0]
    policy = VLAPolicy(encoder, copy.deepcopy(parameters.head)).to(encoder.device)
    policy.state_mean.copy_(parameters.inputs.state_mean)
    policy.state_std.copy_(parameters.inputs.state_std)
    policy.action_mean.copy_(parameters.action_mean)
    policy.action_std.copy_(parameters.action_std)
    return policy


class VLAPolicyModule(VLAWrapperBase):
    """A policy, VLM included, by TorchRL's canonical VLA keys, to act in its stack and be compared there.

    Reads `("observation", "image")` uint8 [*B, 3, H, W] (or a float image in 0..1), `("observation", "state")` if the
    policy takes proprioception, and `"language_instruction"`; writes `("vla_action", "chunk")` float32 [*B, H, A], the
    deterministic actions for H env steps (1 but for heads over chunks).

    Args:
        policy: acts; it is not trained through this module.
    """

    def __init__(self, policy: VLAPolicy):
        super().__init__(
            action_dim=len(policy.action_mean) // policy.head.chunk,
            chunk_size=policy.head.chunk,
            action_head="continuous",
            use_state=policy.uses_state,
        )
        self.policy = policy

    def _predict_chunk(self, tensordict: TensorDictBase) -> Tensor:
        image = self._get_image(tensordict)
        if image.ndim < 3 or image.shape[-3] != 3:
            raise ValueError(
                f"the image is {list(image.shape)}, expected [*B, 3, H, W]; move its channels before H and W"
            )
        batch = image.shape[:-3]
        if image.is_floating_point():
            image = (image * 255).round().clamp(0, 255).to(torch.uint8)
        obs = {"image": image.movedim(-3, -1).reshape(-1, *image.shape[-2:], 3).cpu().numpy()}
        if self.use_state:
            obs["state"] = self._get_state(tensordict).reshape(batch.numel(), -1).cpu().numpy()
        instruction: Any = self._get_instruction(tensordict)
        sentences = instruction.tolist() if hasattr(instruction, "tolist") else instruction
        if isinstance(sentences, str):
            sentences = [sentences] * batch.numel()
        actions = torch.from_numpy(self.policy.act(obs, list(sentences)))
        return actions.reshape(*batch, self.policy.head.chunk, -1).to(image.device)


def _in_keys(policy: VLAPolicy) -> list[Any]:
    return [TOKENS, MASK, STATE] if policy.uses_state else [TOKENS, MASK]


def _require_gaussian(policy: VLAPolicy) -> GaussianHead:
    head = policy.head
    if type(head) not in (GaussianHead, TanhGaussianHead):
        raise TypeError(
            f"the head is a {type(head).__name__}, expected GaussianHead or TanhGaussianHead, whose distributions "
            "TorchRL has; give a policy with such a head, or train this one with vla_rl.rl"
        )
    assert isinstance(head, GaussianHead)
    return head
