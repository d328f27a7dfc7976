"""A small correction on top of a frozen head."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vla_rl.encoders.features import Features
from vla_rl.heads.base import ActionHead
from vla_rl.heads.distributions import DiagonalGaussian
from vla_rl.heads.gaussian import Exploration, GaussianHead
from vla_rl.heads.pooling import Pooler
from vla_rl.importing import import_path, load_object


class ResidualHead(GaussianHead):
    """`base + scale * tanh(residual)`, with a frozen base and a Gaussian around it (PLD 2511.00091, ResFiT 2509.19301).

    The base's action enters the residual network, whose last layer starts at zero: the new head acts as the base until
    it has learned something, and never further than `scale` from it. The base is any `ActionHead`; only its `predict`
    is used, so it need not have log-probs. Its weights are saved with this head's.

    Args:
        feature_dim: D of the encoder's tokens.
        action_dim: A, as the base's.
        base: import path of the base's class, `"package.module:Class"`.
        base_kwargs: its constructor's arguments (its `config()`).
        scale: most that the mean may differ from the base, in normalised action units.
        state_dim: S; 0 without proprioception.
        width: width of the residual's token learner.
        num_queries: learned queries of the residual's token learner.
        hidden_dim: size of the residual's last hidden layer.
        exploration: "gsde" (held for an episode) or "gaussian" (independent per step).
        init_std: standard deviation of the exploration at the start of stage 1, in normalised action units.
        pooler: from tokens to one vector; see `vla_rl.heads.pooling`.

    Raises:
        ValueError: `base` is no `ActionHead`, or its actions have another size.
    """

    def __init__(
        self,
        feature_dim: int,
        action_dim: int,
        *,
        base: str,
        base_kwargs: dict[str, Any],
        scale: float = 0.2,
        state_dim: int = 0,
        width: int = 128,
        num_queries: int = 8,
        hidden_dim: int = 256,
        exploration: Exploration = "gsde",
        init_std: float = 0.1,
        pooler: Pooler = "token_learner",
    ):
        super().__init__(
            feature_dim,
            action_dim,
            state_dim=state_dim,
            width=width,
            num_queries=num_queries,
            hidden_dim=hidden_dim,
            exploration=exploration,
            init_std=init_std,
            pooler=pooler,
        )
        self._config |= {"base": base, "base_kwargs": base_kwargs, "scale": scale}
        self.scale = scale
        self.mean = nn.Sequential(
            nn.Linear(hidden_dim + action_dim, hidden_dim), nn.GELU(), nn.Linear(hidden_dim, action_dim)
        )
        for parameter in self.mean[-1].parameters():
            nn.init.zeros_(parameter)
        base_class = load_object(base)
        if not (isinstance(base_class, type) and issubclass(base_class, ActionHead)):
            raise ValueError(f"base {base!r} is no ActionHead; give the import path of a head")
        self.base = base_class(**base_kwargs).requires_grad_(False).eval()
        if int(self.base.config()["action_dim"]) != action_dim:
            raise ValueError(
                f"the base's action_dim is {self.base.config()['action_dim']}, this head's is {action_dim}; give both "
                "the same"
            )
        self.chunk = self.base.chunk

    @classmethod
    def over(cls, base: ActionHead, **kwargs: Any) -> ResidualHead:
        """A residual over a copy of a trained head; `kwargs` as for the constructor.

        Sizes that are not given are the base's.
        """
        config = base.config()
        sizes = ("feature_dim", "action_dim", "state_dim", "width", "num_queries", "hidden_dim")
        kwargs = {key: config[key] for key in sizes if key in config} | kwargs
        head = cls(base=import_path(type(base)), base_kwargs=config, **kwargs)
        head.base.load_state_dict(base.state_dict())
        return head.to(next(base.parameters()).device)

    def train(self, mode: bool = True) -> ResidualHead:
        """Training mode for the residual alone."""
        super().train(mode)
        self.base.eval()
        return self

    def distribution(self, features: Features, state: Tensor | None) -> DiagonalGaussian:
        """Gaussian around base plus residual, batch [B], event [A]."""
        latent = self.body(features, state)
        return self._around(self._corrected(latent, features, state), latent)

    def predict(self, features: Features, state: Tensor | None) -> Tensor:
        """Base plus residual, [B, A]."""
        return self._corrected(self.body(features, state), features, state)

    def _corrected(self, latent: Tensor, features: Features, state: Tensor | None) -> Tensor:
        with torch.no_grad():
            base = self.base.predict(features, state)
        return base + self.scale * torch.tanh(self.mean(torch.cat([latent, base], dim=-1)))
