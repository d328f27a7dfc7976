"""Replay memory of env steps whose observations are cached VLM features: every frame is stored once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from vla_rl.encoders.features import Features

_ARRAYS = ("tokens", "mask", "state", "actions", "rewards", "bootstrap", "next", "valid")
"""What the ring has one row of per frame."""


@dataclass(frozen=True)
class LatentBatch:
    """`B` transitions, each over up to n steps.

    Attributes:
        features: what the action was chosen from.
        state: normalised, `[B, S]`, or None.
        actions: as the env received them, in [-1, 1], `[B, A]`.
        rewards: discounted sum over the steps, `[B]`.
        next_features: where the steps led to; the frame acted on where an episode terminated whose last one is unknown.
        next_state: normalised, `[B, S]`, or None.
        discounts: what the value of `next_features` counts, `[B]`: gamma^n, and 0 where the episode terminated.
    """

    features: Features
    state: Tensor | None
    actions: Tensor
    rewards: Tensor
    next_features: Features
    next_state: Tensor | None
    discounts: Tensor

    def __len__(self) -> int:
        return len(self.rewards)

    def to(self, device: torch.device | str) -> LatentBatch:
        """The same batch on another device."""
        return LatentBatch(
            self.features.to(device),
            None if self.state is None else self.state.to(device),
            self.actions.to(device),
            self.rewards.to(device),
            self.next_features.to(device),
            None if self.next_state is None else self.next_state.to(device),
            self.discounts.to(device),
        )

    @classmethod
    def cat(cls, batches: list[LatentBatch]) -> LatentBatch:
        """One batch after the other."""
        if len(batches) == 1:
            return batches[0]
        states = [batch.state for batch in batches if batch.state is not None]
        next_states = [batch.next_state for batch in batches if batch.next_state is not None]
        return cls(
            features=Features.cat([batch.features for batch in batches]),
            state=torch.cat(states) if states else None,
            actions=torch.cat([batch.actions for batch in batches]),
            rewards=torch.cat([batch.rewards for batch in batches]),
            next_features=Features.cat([batch.next_features for batch in batches]),
            next_state=torch.cat(next_states) if next_states else None,
            discounts=torch.cat([batch.discounts for batch in batches]),
        )


class LatentBuffer:
    """A ring of frames (tokens as encoded, mask, state), some of them with the step that was taken from them.

    Frames get a number when they are added, counting up for ever; a step says from which frame to which later one it
    led. The oldest frames make room for new ones, and with a frame goes the step taken from it, so that no step ever
    points to a frame that is gone.

    Args:
        capacity: frames, at most.
        action_dim: A.
        fingerprint: of the encoder whose features come in.
        device: where the frames lie and batches are given.
        max_bytes: memory, at most; lowers the capacity where the frames are large.
    """

    def __init__(
        self,
        capacity: int,
        *,
        action_dim: int,
        fingerprint: str,
        device: torch.device | str = "cpu",
        max_bytes: int = 4_000_000_000,
    ):
        if capacity < 2:
            raise ValueError(f"capacity={capacity}; a step joins two frames, so expected at least 2")
        self.capacity, self.action_dim, self.fingerprint, self.max_bytes = capacity, action_dim, fingerprint, max_bytes
        self.device = torch.device(device)
        self.num_added = 0
        self._tokens: Tensor | None = None
        self._state: Tensor | None = None
        self._rows: Tensor | None = None

    def __len__(self) -> int:
        """Steps to draw from."""
        return 0 if self._tokens is None else len(self._valid_rows())

    @property
    def nbytes(self) -> int:
        """Bytes that the ring takes once it is full."""
        if self._tokens is None:
            return 0
        tensors = (self._tokens, self._mask, self._state, self._actions, self._rewards, self._next)
        return sum(tensor.nbytes for tensor in tensors if tensor is not None) + 2 * self.capacity

    def alive(self, ids: Tensor) -> Tensor:
        """Which of the frames numbered `ids` are still here, bool."""
        return (ids >= max(0, self.num_added - self.capacity)) & (ids < self.num_added)

    def add_frames(self, features: Features, state: Tensor | None) -> Tensor:
        """Store B frames and return their numbers, int64 [B].

        Args:
            features: of B frames.
            state: normalised, [B, S], or None.

        Raises:
            ValueError: the features come from another encoder, or they are more than the ring holds.
        """
        if features.fingerprint != self.fingerprint:
            raise ValueError(
                f"the buffer holds features of encoder {self.fingerprint}, these are of {features.fingerprint}: the "
                "VLM changed; make a new buffer"
            )
        if self._tokens is None:
            self._limit(features, state)
            self._allocate(features.tokens.shape, None if state is None else state.shape[-1], features.tokens.dtype)
            assert self._tokens is not None
        if len(features) > self.capacity:
            raise ValueError(
                f"{len(features)} frames at once do not fit into a buffer of {self.capacity}; raise its capacity"
            )
        self._widen(features.tokens.shape[1])
        spare = self._tokens.shape[1] - features.tokens.shape[1]
        ids = torch.arange(self.num_added, self.num_added + len(features), device=self.device)
        slots = ids % self.capacity
        self._tokens[slots] = F.pad(features.tokens, (0, 0, 0, spare)).to(self._tokens)
        self._mask[slots] = F.pad(features.mask, (0, spare), value=False).to(self.device)
        if self._state is not None and state is not None:
            self._state[slots] = state.to(self.device)
        self._valid[slots] = False
        self._rows = None
        self.num_added += len(features)
        return ids

    def add_steps(self, ids: Tensor, *, actions: Tensor, rewards: Tensor, bootstrap: Tensor, next_ids: Tensor) -> None:
        """Say what was done in frames that are here; steps from frames that are gone are dropped.

        Args:
            ids: numbers of the frames acted on, [B].
            actions: as executed, [B, A].
            rewards: [B].
            bootstrap: bool [B], False where the step terminated the episode; a truncated one bootstraps.
            next_ids: numbers of the frames that followed, [B]; where a step terminated no value is taken of it.
        """
        ids, actions, rewards, bootstrap, next_ids = (
            part.to(self.device) for part in (ids, actions, rewards, bootstrap, next_ids)
        )
        kept = self.alive(ids)
        slots = ids[kept] % self.capacity
        self._actions[slots] = actions[kept].float()
        self._rewards[slots] = rewards[kept].float()
        self._bootstrap[slots] = bootstrap[kept]
        self._next[slots] = next_ids[kept] % self.capacity
        self._valid[slots] = True
        self._rows = None

    def add_episode(
        self, features: Features, state: Tensor | None, *, actions: Tensor, rewards: Tensor, terminated: bool
    ) -> None:
        """Store one whole episode: T + 1 frames, actions [T, A] as executed, rewards [T]."""
        ids = self.add_frames(features, state)
        bootstrap = torch.ones(len(actions), dtype=torch.bool)
        bootstrap[-1] = not terminated
        self.add_steps(ids[:-1], actions=actions, rewards=rewards, bootstrap=bootstrap, next_ids=ids[1:])

    def state_dict(self) -> dict[str, Any]:
        """What the ring is, without what it holds, which `pieces` gives."""
        if self._tokens is None:
            return {"num_added": 0}
        return {
            "num_added": self.num_added,
            "capacity": self.capacity,
            "shape": list(self._tokens.shape),
            "dtype": str(self._tokens.dtype).removeprefix("torch."),
            "state_dim": None if self._state is None else self._state.shape[-1],
        }

    def pieces(self, max_bytes: int) -> list[dict[str, Any]]:
        """What the ring holds, as views of parts of about `max_bytes`, the newest first.

        Without some of the last parts the ring lacks the oldest frames with their steps, and nothing else.
        """
        arrays = {name: getattr(self, f"_{name}") for name in _ARRAYS} if self._tokens is not None else {}
        most = max(1, max_bytes * self.capacity // max(self.nbytes, 1))
        pieces, end, oldest = [], self.num_added, max(0, self.num_added - self.capacity)
        while end > oldest:
            last = (end - 1) % self.capacity
            count = min(most, end - oldest, last + 1)
            rows = slice(last + 1 - count, last + 1)
            views = {name: None if array is None else array[rows] for name, array in arrays.items()}
            pieces.append({"count": count, "first": rows.start, "arrays": views})
            end -= count
        return pieces

    def load_state_dict(self, state: dict[str, Any], pieces: Iterable[dict[str, Any]]) -> None:
        """Take over what `state_dict` and `pieces` gave, into an empty buffer."""
        if not state["num_added"]:
            return
        self.num_added, self.capacity = state["num_added"], state["capacity"]
        self._allocate(state["shape"], state["state_dim"], getattr(torch, state.get("dtype", "float16")))
        for piece in pieces:
            rows = slice(piece["first"], piece["first"] + piece["count"])
            for name, array in piece["arrays"].items():
                if array is not None:
                    getattr(self, f"_{name}")[rows] = array.to(self.device)
        self._rows = None

    def frames(self, ids: Tensor) -> tuple[Features, Tensor | None]:
        """Features and states of frames that are here."""
        return self._frames(ids % self.capacity)

    def steps(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Actions [B, A] and rewards [B] of the steps taken from frames that are here."""
        slots = ids % self.capacity
        return self._actions[slots], self._rewards[slots]

    def sample(
        self, batch_size: int, *, gamma: float, n_step: int = 1, generator: torch.Generator | None = None
    ) -> LatentBatch:
        """Draw transitions uniformly, with replacement.

        A transition follows its episode for `n_step` steps or to its end, whatever comes first.

        Raises:
            ValueError: there is no step yet.
        """
        rows = self._valid_rows() if self._tokens is not None else torch.empty(0)
        if not len(rows):
            raise ValueError("the buffer holds no step to draw; collect some first")
        drawn = rows[torch.randint(len(rows), (batch_size,), generator=generator).to(self.device)]
        rewards, discounts, following = self._follow(drawn, gamma, n_step)
        features, state = self._frames(drawn)
        next_features, next_state = self._frames(following)
        return LatentBatch(features, state, self._actions[drawn], rewards, next_features, next_state, discounts)

    def _follow(self, rows: Tensor, gamma: float, n_step: int) -> tuple[Tensor, Tensor, Tensor]:
        """Reward sum, discount and slot of the last frame, over up to `n_step` steps from `rows`."""
        rewards = self._rewards[rows]
        discounts = gamma * self._bootstrap[rows]
        following = self._next[rows]
        for _ in range(n_step - 1):
            goes_on = (discounts > 0) & self._valid[following]
            rewards = rewards + torch.where(goes_on, discounts * self._rewards[following], 0.0)
            discounts = torch.where(goes_on, discounts * gamma * self._bootstrap[following], discounts)
            following = torch.where(goes_on, self._next[following], following)
        return rewards, discounts, following

    def _frames(self, slots: Tensor) -> tuple[Features, Tensor | None]:
        assert self._tokens is not None
        features = Features(self._tokens[slots], self._mask[slots], self.fingerprint)
        return features, None if self._state is None else self._state[slots]

    def _valid_rows(self) -> Tensor:
        if self._rows is None:
            self._rows = self._valid.nonzero().squeeze(-1)
        return self._rows

    def _limit(self, features: Features, state: Tensor | None) -> None:
        """Lower the capacity to what `max_bytes` allows for frames like these."""
        _, length, width = features.tokens.shape
        state_dim = 0 if state is None else state.shape[-1]
        row = length * (features.tokens.element_size() * width + 1) + 4 * (state_dim + self.action_dim) + 4 + 8 + 2
        self.capacity = min(self.capacity, self.max_bytes // row)
        if self.capacity < 2:
            raise ValueError(f"a frame of {length} x {width} tokens takes {row} bytes, max_bytes={self.max_bytes}")

    def _allocate(self, shape: Sequence[int], state_dim: int | None, dtype: torch.dtype) -> None:
        """Make room for everything, for tokens [_, M, D] of a frame."""
        rows = self.capacity
        # Not zeroed, so that pages are only taken as frames come in.
        self._tokens = torch.empty(rows, *shape[1:], dtype=dtype, device=self.device)
        self._mask = torch.zeros(rows, shape[1], dtype=torch.bool, device=self.device)
        self._state = None if state_dim is None else torch.zeros(rows, state_dim, device=self.device)
        self._actions = torch.zeros(rows, self.action_dim, device=self.device)
        self._rewards = torch.zeros(rows, device=self.device)
        self._bootstrap = torch.zeros(rows, dtype=torch.bool, device=self.device)
        self._next = torch.zeros(rows, dtype=torch.int64, device=self.device)
        self._valid = torch.zeros(rows, dtype=torch.bool, device=self.device)

    def _widen(self, length: int) -> None:
        """Pad the ring to frames of `length` tokens, if that is more than it has room for."""
        assert self._tokens is not None
        missing = length - self._tokens.shape[1]
        if missing > 0:
            self._tokens = F.pad(self._tokens, (0, 0, 0, missing))
            self._mask = F.pad(self._mask, (0, missing), value=False)
