"""What pretraining minimises: the answer's next token, picture against caption, and where things are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from batches import Batch
from scenes import CELLS, LABELS, UNKNOWN_COLOUR
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Weights:
    """How much each loss counts."""

    answer: float = 1.0
    contrast: float = 0.1
    place: float = 2.0
    cells: float = 0.5
    contrast_rows: int = 128
    """rows of a batch that are compared; captions cost a pass of their own"""


class Learner(nn.Module):
    """A PaliGemma with what is needed to train it and not shipped: heads for contrast, for places and for cells.

    The place heads read the last layer's image tokens, each voting for an offset from its patch with a weight. Location
    tokens alone teach places as names without neighbours; a distance has a slope from the first step on, and it puts
    the place into the image tokens, from which action heads read. The cell heads ask the vision tower what is at every
    place and of what colour, all at once: a question gives it some ten tokens to learn from, the map 256 cells.

    Args:
        model: a PaliGemmaForConditionalGeneration.
        width: size of the space in which pictures and captions are compared.
    """

    def __init__(self, model: Any, *, width: int = 128) -> None:
        super().__init__()
        self.model = model
        hidden, vision = model.config.text_config.hidden_size, model.config.vision_config.projection_dim
        side = model.config.vision_config.image_size // model.config.vision_config.patch_size
        if CELLS % side:
            raise ValueError(f"{side} patches per side do not divide {CELLS} cells; choose image and patch size so")
        self.side = side
        self.fine = CELLS // side
        self.labels = nn.Linear(vision, self.fine**2 * (len(LABELS) + 1))
        self.colours = nn.Linear(vision, self.fine**2 * UNKNOWN_COLOUR)
        self.picture = nn.Linear(vision, width, bias=False)
        self.caption = nn.Linear(hidden, width, bias=False)
        self.temperature = nn.Parameter(torch.tensor(2.3))
        self.votes = nn.Linear(hidden, 6)
        nn.init.zeros_(self.votes.weight)
        nn.init.zeros_(self.votes.bias)
        centres = (torch.arange(side) + 0.5) / side
        rows, columns = torch.meshgrid(centres, centres, indexing="ij")
        self.centres: Tensor
        self.register_buffer("centres", torch.stack([columns, rows], dim=-1).reshape(-1, 2))

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Last hidden states [B, T, D], projected vision tokens [B, V, D] and places [B, 2, 2] (asked, gripper)."""
        pixels = (batch.frames.permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.5
        size = self.model.config.vision_config.image_size
        if pixels.shape[-1] != size:
            pixels = F.interpolate(pixels, size=(size, size), mode="bilinear", antialias=True)
        output = self.model.model(
            input_ids=batch.ids,
            pixel_values=pixels,
            attention_mask=batch.mask,
            token_type_ids=batch.answer.long(),
            use_cache=False,
        )
        hidden = output.last_hidden_state
        votes = self.votes(hidden[:, : len(self.centres)]).float().unflatten(-1, (2, 3))
        share = votes[..., 0].softmax(dim=1)
        places = (share.unsqueeze(-1) * (self.centres[:, None] + votes[..., 1:])).sum(dim=1)
        return hidden, output.image_hidden_states, places

    def logits(self, hidden: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Logits [N, V] and labels [N] of all answer tokens of a batch, row after row."""
        before = batch.answer[:, 1:]
        return self.model.lm_head(hidden[:, :-1][before]), batch.ids[:, 1:][before]

    def losses(self, batch: Batch, weights: Weights) -> tuple[Tensor, dict[str, Tensor]]:
        """Weighted sum, and each loss by name with the accuracy of the answers' tokens."""
        hidden, vision, places = self(batch)
        logits, labels = self.logits(hidden, batch)
        answer = F.cross_entropy(logits.float(), labels)
        contrast = self._contrast(vision, batch, weights.contrast_rows)
        truth = torch.stack([batch.place, batch.gripper], dim=1)
        known = ~truth.isnan()
        error = F.smooth_l1_loss(places, truth.nan_to_num(), beta=0.05, reduction="none")
        place = (error * known).sum() / known.sum().clamp_min(1)
        label, colour, cell_accuracy = self._cells(vision, batch)
        total = weights.answer * answer + weights.contrast * contrast + weights.place * place
        total = total + weights.cells * (label + colour)
        right = (logits.detach().argmax(-1) == labels).float().mean()
        apart = ((places - truth).detach().nan_to_num() * known).norm(dim=-1)
        distance = apart.sum(0) / known[..., 0].sum(0).clamp_min(1)
        return total, {
            "answer": answer.detach(),
            "contrast": contrast.detach(),
            "place": place.detach(),
            "label": label.detach(),
            "colour": colour.detach(),
            "cell_accuracy": cell_accuracy,
            "token_accuracy": right,
            "asked_distance": distance[0],
            "gripper_distance": distance[1],
        }

    def _cells(self, vision: Tensor, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Losses of labels and colours of the cells, and the share of things (not all the rest) labelled rightly."""
        labels, shades = batch.cells.unbind(1)
        guesses = self._spread(self.labels(vision))
        rest = len(LABELS)
        balance = torch.ones(rest + 1, device=vision.device)
        balance[rest] = 0.3
        label = F.cross_entropy(guesses, labels, weight=balance)
        colour = F.cross_entropy(
            self._spread(self.colours(vision)), shades, ignore_index=UNKNOWN_COLOUR, reduction="sum"
        )
        colour = colour / (shades != UNKNOWN_COLOUR).sum().clamp_min(1)
        things = labels != rest
        return label, colour, ((guesses.argmax(1) == labels) & things).sum() / things.sum().clamp_min(1)

    def _spread(self, values: Tensor) -> Tensor:
        """From values of patches [B, side * side, fine * fine * K] to values of cells [B, K, CELLS, CELLS]."""
        side, fine = self.side, self.fine
        cells = values.float().unflatten(1, (side, side)).unflatten(-1, (fine, fine, -1))
        return cells.permute(0, 5, 1, 3, 2, 4).reshape(len(values), -1, side * fine, side * fine)

    def _contrast(self, vision: Tensor, batch: Batch, rows: int) -> Tensor:
        ids, mask = batch.caption_ids[:rows], batch.caption_mask[:rows]
        words = self.model.model.language_model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        real = mask.unsqueeze(-1)
        pictures = F.normalize(self.picture(vision[:rows].float().mean(dim=1)), dim=-1)
        captions = F.normalize(self.caption((words.float() * real).sum(1) / real.sum(1)), dim=-1)
        scores = self.temperature.exp().clamp(max=100.0) * pictures @ captions.T
        # A caption that two pictures share is no wrong answer.
        same = (ids[:, None] == ids[None]).all(-1)
        scores = scores.masked_fill(same & ~torch.eye(len(scores), dtype=torch.bool, device=scores.device), -1e4)
        target = torch.arange(len(scores), device=scores.device)
        return (F.cross_entropy(scores, target) + F.cross_entropy(scores.T, target)) / 2


def autocast(device: str) -> torch.autocast:
    """bfloat16 matrix products on ``device``."""
    return torch.autocast(torch.device(device).type, dtype=torch.bfloat16)
