"""Stage 1 by stable-baselines3: encoded environments, our head as its policy, and what it learned back again."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor, nn

from vla_rl.encoders.features import Features
from vla_rl.heads.gaussian import GaussianHead
from vla_rl.heads.pooling import PooledMLP, Pooler
from vla_rl.heads.tanh_gaussian import TanhGaussianHead
from vla_rl.policy import VLAPolicy

try:
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.distributions import StateDependentNoiseDistribution
    from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
    from stable_baselines3.sac.policies import SACPolicy

    from vla_rl.integrations._sb3_vec_env import EncodedVecEnv
except ImportError as error:
    raise ImportError(
        'vla_rl.integrations.stable_baselines3 needs stable-baselines3; install it with `pip install "vla-rl[sb3]"`'
    ) from error

if TYPE_CHECKING:
    from stable_baselines3.common.base_class import BaseAlgorithm

    from vla_rl.encoders import FrozenVLMEncoder

__all__ = [
    "CriticWarmup",
    "EncodedVecEnv",
    "FrozenVLMExtractor",
    "copy_back",
    "policy_kwargs",
    "to_policy",
    "warm_start",
]

_BODY = ("width", "num_queries", "hidden_dim", "pooler")


class FrozenVLMExtractor(BaseFeaturesExtractor):
    """Token learner and MLP of our heads over what `EncodeObservation` gives, for any policy of stable-baselines3.

    Args:
        observation_space: Dict with `tokens` [M, D], `mask` [M] and perhaps `state` [S].
        width: width of the token learner.
        num_queries: learned queries of the token learner.
        hidden_dim: size L of the latent, which is `features_dim`.
        pooler: from tokens to one vector, one of `vla_rl.heads.pooling`.
        use_state: False leaves `state` out.
        state_mean: [S], subtracted from the state; zero if None.
        state_std: [S], divides the state; one if None.
    """

    def __init__(
        self,
        observation_space: spaces.Dict,
        *,
        width: int = 128,
        num_queries: int = 8,
        hidden_dim: int = 256,
        pooler: Pooler = "token_learner",
        use_state: bool = True,
        state_mean: Sequence[float] | None = None,
        state_std: Sequence[float] | None = None,
    ):
        super().__init__(observation_space, features_dim=hidden_dim)
        shapes = {key: part.shape for key, part in observation_space.items()}
        if not {"tokens", "mask"} <= shapes.keys():
            raise ValueError(
                f"the observation has the keys {sorted(shapes)}; FrozenVLMExtractor needs tokens and mask, as "
                "vla_rl.envs.EncodeObservation gives them"
            )
        state_shape = shapes.get("state") if use_state else None
        state_dim = state_shape[0] if state_shape else 0
        self.body_config: dict[str, Any] = {
            "width": width,
            "num_queries": num_queries,
            "hidden_dim": hidden_dim,
            "pooler": pooler,
        }
        self.body = PooledMLP(_shape(shapes["tokens"])[1], state_dim=state_dim, **self.body_config)
        self.register_buffer("state_mean", _vector(state_mean, state_dim, fill=0.0))
        self.register_buffer("state_std", _vector(state_std, state_dim, fill=1.0))
        self.state_mean: Tensor
        self.state_std: Tensor

    def forward(self, observations: Mapping[str, Tensor]) -> Tensor:
        """Latent [B, L] of a batch of observations."""
        features = Features(observations["tokens"], observations["mask"].bool(), "")
        state = (observations["state"].float() - self.state_mean) / self.state_std if len(self.state_mean) else None
        return self.body(features, state)


class CriticWarmup(BaseCallback):
    """Let the first updates of an actor-critic algorithm (PPO, A2C, SAC) train the fresh critic alone.

    A critic that knows nothing yet gives advantages that undo what supervised learning has taught the actor.

    Args:
        num_updates: updates during which the actor rests; for SAC, env steps in all environments (`train_freq=1`).
    """

    def __init__(self, num_updates: int = 2):
        super().__init__()
        self.num_updates = num_updates
        self._rollouts = 0

    def _on_rollout_start(self) -> None:
        for parameter in _actor_parameters(self.model.policy):
            parameter.requires_grad_(self._rollouts >= self.num_updates)
        self._rollouts += 1

    def _on_training_end(self) -> None:
        for parameter in _actor_parameters(self.model.policy):
            parameter.requires_grad_(True)

    def _on_step(self) -> bool:
        return True


def policy_kwargs(policy: VLAPolicy) -> dict[str, Any]:
    """What to pass as `policy_kwargs` so that `"MultiInputPolicy"` has the shape of a policy's head.

    Actor and critic get a token learner each, as in the paper. Give `use_sde=True` to PPO or A2C if the head explores
    by gSDE. SAC's critics, which also take the action, get two further layers.

    Raises:
        TypeError: the head is no `GaussianHead` or `TanhGaussianHead`.
    """
    config = _head(policy, (GaussianHead, TanhGaussianHead)).config()
    extractor = {key: config[key] for key in _BODY} | {"use_state": policy.uses_state}
    if policy.uses_state:
        extractor |= {"state_mean": policy.state_mean.tolist(), "state_std": policy.state_std.tolist()}
    return {
        "features_extractor_class": FrozenVLMExtractor,
        "features_extractor_kwargs": extractor,
        "share_features_extractor": False,
        "net_arch": {"pi": [], "vf": [], "qf": [256, 256]},
    }


@torch.no_grad()
def warm_start(model: BaseAlgorithm, policy: VLAPolicy, *, obs: Mapping[str, np.ndarray] | None = None) -> None:
    """Copy a policy's head into the actor, which then acts exactly as the policy does; PPO's critic starts at zero.

    PPO and A2C take a `GaussianHead`. It works in normalised action units and stable-baselines3 in those of the
    environment, so the last layer is multiplied by the actions' standard deviation and shifted by their mean. SAC
    squashes by tanh and takes a `TanhGaussianHead` over the environment's box; its noise starts independent of the
    observation, and its critics stay as they are.

    Args:
        model: algorithm built with `"MultiInputPolicy"` and `policy_kwargs(policy)`.
        policy: its head is copied.
        obs: encoded observations of the RL task, as `EncodedVecEnv.reset` gives them: on these the exploration, the
            head's own too, is set to the head's `init_std`. None takes the head's exploration as it is.

    Raises:
        TypeError: the algorithm's policy has not that shape, or the head is of another class.
        ValueError: one of the two explores by gSDE and the other does not, or the head's box or the algorithm's is not
            [-1, 1].
    """
    actor = _Actor(model)
    head = actor.head_of(policy)
    if actor.uses_gsde != (head.exploration == "gsde"):
        raise ValueError(
            f"the head explores by {head.exploration!r}, the algorithm has use_sde={actor.uses_gsde}; give the "
            "algorithm use_sde=True where the head has exploration='gsde', and neither to SAC"
        )
    if obs is not None:
        tokens, mask = torch.as_tensor(obs["tokens"]), torch.as_tensor(obs["mask"]).bool()
        head.start_exploration(Features(tokens, mask, "").to(policy.device), policy.normalize_state(obs.get("state")))
    actor.extractor.body.load_state_dict(head.body.state_dict())
    actor.extractor.state_mean.copy_(policy.state_mean)
    actor.extractor.state_std.copy_(policy.state_std)
    std, mean = actor.units(policy)
    actor.mean.weight.copy_(std[:, None] * head.mean.weight)
    actor.mean.bias.copy_(std * head.mean.bias + mean)
    if isinstance(actor.log_std, nn.Linear):
        nn.init.zeros_(actor.log_std.weight)
        actor.log_std.bias.copy_(head.log_std)
    else:
        actor.log_std.copy_(head.log_std + std.log())
        actor_critic: Any = model.policy
        for parameter in actor_critic.value_net.parameters():
            nn.init.zeros_(parameter)


@torch.no_grad()
def copy_back(model: BaseAlgorithm, policy: VLAPolicy) -> None:
    """Write what the actor has learned into the head of a policy of the same shape, for stage 2.

    The inverse of `warm_start`: the policy keeps its action normalisation, and acts as the algorithm's deterministic
    policy does, up to rounding. From SAC, whose noise depends on the observation, the head takes the mean alone.

    Raises:
        TypeError: the algorithm's policy has not the shape of `policy_kwargs`, or the head is of another class.
        ValueError: the head's box or the algorithm's is not [-1, 1].
    """
    actor = _Actor(model)
    head = actor.head_of(policy)
    head.body.load_state_dict(actor.extractor.body.state_dict())
    policy.state_mean.copy_(actor.extractor.state_mean)
    policy.state_std.copy_(actor.extractor.state_std)
    std, mean = actor.units(policy)
    head.mean.weight.copy_(actor.mean.weight / std[:, None])
    head.mean.bias.copy_((actor.mean.bias - mean) / std)
    if not isinstance(actor.log_std, nn.Linear):
        head.log_std.copy_(actor.log_std - std.log())


def to_policy(model: BaseAlgorithm, encoder: FrozenVLMEncoder) -> VLAPolicy:
    """A new policy that acts as the algorithm's deterministic policy does, for a model that started from nothing.

    Args:
        model: PPO, A2C or SAC whose policy uses `FrozenVLMExtractor` with `net_arch` pi=[].
        encoder: the encoder that made the features it was trained on.

    Raises:
        TypeError: the policy has another shape.
    """
    actor = _Actor(model)
    head = actor.head_class(
        encoder.feature_dim,
        actor.mean.out_features,
        state_dim=len(actor.extractor.state_mean),
        exploration="gsde" if actor.uses_gsde else "gaussian",
        **actor.extractor.body_config,
    )
    policy = VLAPolicy(encoder, head).to(encoder.device)
    copy_back(model, policy)
    return policy


class _Actor:
    """The parts of an algorithm's actor that correspond to a head's."""

    def __init__(self, model: BaseAlgorithm):
        policy: Any = model.policy
        squashed = isinstance(policy, SACPolicy)
        self.head_class: type[GaussianHead] = TanhGaussianHead if squashed else GaussianHead
        holder = policy.actor if squashed else policy
        names = ("pi_features_extractor", "mlp_extractor", "action_net")
        if squashed:
            names = ("features_extractor", "latent_pi", "mu")
        extractor, hidden, mean = (getattr(holder, name, None) for name in names)
        hidden = getattr(hidden, "policy_net", hidden)
        if (
            not isinstance(extractor, FrozenVLMExtractor)
            or not isinstance(mean, nn.Linear)
            or not isinstance(hidden, nn.Sequential)
            or len(hidden)
        ):
            raise TypeError(
                f"the {type(policy).__name__} of {type(model).__name__} has not the shape of a head; build PPO, A2C or "
                "SAC with 'MultiInputPolicy' and policy_kwargs=policy_kwargs(policy), that is FrozenVLMExtractor and "
                "net_arch pi=[], and SAC without use_sde"
            )
        self.extractor, self.mean, self.log_std = extractor, mean, holder.log_std
        self.action_space: Any = model.action_space
        self.uses_gsde = isinstance(holder.action_dist, StateDependentNoiseDistribution)

    def head_of(self, policy: VLAPolicy) -> GaussianHead:
        """The policy's head, if it is of the class that corresponds to the algorithm."""
        head = _head(policy, (self.head_class,))
        box, count = self.action_space, len(policy.action_mean)
        if box.shape != (count,) or (box.low != -1).any() or (box.high != 1).any():
            raise ValueError(
                f"the algorithm's action space is {box}, a policy's is [-1, 1] with the {count} entries of its head: "
                "use gymnasium.wrappers.RescaleAction, and build the head with the environment's action_dim"
            )
        if isinstance(head, TanhGaussianHead):
            low, high = (policy.env_action(bound) for bound in (head.low, head.high))
            if not (np.allclose(low, -1, atol=1e-4) and np.allclose(high, 1, atol=1e-4)):
                raise ValueError(
                    f"the head's box is {low} to {high} in env units, SAC's is -1 to 1; build the head with "
                    "**unit_box(statistics)"
                )
        return head

    def units(self, policy: VLAPolicy) -> tuple[Tensor, Tensor]:
        """Standard deviation and mean [A] that take the last layer's output from the head's units to the actor's.

        A squashed actor works in tanh's own units, in which the head works too.
        """
        if self.head_class is TanhGaussianHead:
            return torch.ones_like(policy.action_std), torch.zeros_like(policy.action_mean)
        return policy.action_std, policy.action_mean


def _head(policy: VLAPolicy, classes: tuple[type[GaussianHead], ...]) -> GaussianHead:
    """The policy's head, if it is of one of these classes exactly: a subclass may compute something else."""
    head = policy.head
    if type(head) not in classes:
        raise TypeError(
            f"the head is a {type(head).__name__}, expected {' or '.join(c.__name__ for c in classes)}: "
            "stable-baselines3's PPO and A2C correspond to GaussianHead and its SAC to TanhGaussianHead; give a policy "
            "with such a head, or train this one with vla_rl.rl"
        )
    assert isinstance(head, GaussianHead)
    return head


def _actor_parameters(actor: Any) -> Iterable[nn.Parameter]:
    if isinstance(actor, SACPolicy):
        yield from actor.actor.parameters()
        return
    yield from actor.pi_features_extractor.parameters()
    yield from actor.mlp_extractor.policy_net.parameters()
    yield from actor.action_net.parameters()
    yield actor.log_std


def _shape(shape: tuple[int, ...] | None) -> tuple[int, ...]:
    assert shape is not None
    return shape


def _vector(values: Sequence[float] | None, size: int, *, fill: float) -> Tensor:
    if values is None:
        return torch.full((size,), fill)
    if len(values) != size:
        raise ValueError(f"the state has {size} entries, its normalisation {len(values)}; give one number per entry")
    return torch.tensor(values, dtype=torch.float32)
