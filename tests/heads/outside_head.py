"""A head as its user would write it: it knows `ActionHead`, and nothing of the library knows it."""

import torch
from torch import nn

from vla_rl.heads import ActionHead, DiagonalGaussian


class LinearHead(ActionHead):
    """Mean of the tokens, one linear layer, a Gaussian of fixed width."""

    supports_rl = True

    def __init__(self, feature_dim, action_dim, *, state_dim=0, std=0.1):
        super().__init__()
        self.sizes = {"feature_dim": feature_dim, "action_dim": action_dim, "state_dim": state_dim, "std": std}
        self.linear = nn.Linear(feature_dim + state_dim, action_dim)

    def config(self):
        return self.sizes

    def distribution(self, features, state):
        pooled = features.tokens.float().mean(1)
        mean = self.linear(pooled if state is None else torch.cat([pooled, state], -1))
        return DiagonalGaussian(mean, torch.full_like(mean, self.sizes["std"]))

    def supervised_loss(self, features, state, actions):
        return (self.predict(features, state) - actions).abs().mean()
