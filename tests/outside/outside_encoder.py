"""An encoder as its user would write it: it knows `Encoder`, and nothing of the library knows it."""

import torch
from torch import nn

from vla_rl.encoders import Encoder


class PatchEncoder(Encoder):
    """One token per patch of the image, moved by a learned vector for each word of the instruction."""

    def __init__(self, feature_dim=16, *, patch=8, words=64):
        super().__init__()
        self.sizes = {"feature_dim": feature_dim, "patch": patch, "words": words}
        self.feature_dim = feature_dim
        self.patches = nn.Conv2d(3, feature_dim, patch, stride=patch)
        self.words = nn.Embedding(words, feature_dim)
        self.requires_grad_(False).eval()

    def config(self):
        return self.sizes

    def tokens(self, images, instructions):
        seen = self.patches(images.permute(0, 3, 1, 2).float() / 255).flatten(2).transpose(1, 2)
        numbers = [[sum(map(ord, word)) % self.sizes["words"] for word in text.split()] for text in instructions]
        spoken = torch.stack([self.words(torch.tensor(row, device=images.device)).mean(0) for row in numbers])
        tokens = seen + spoken[:, None]
        return tokens, torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
