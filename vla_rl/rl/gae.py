"""Generalised advantage estimation, as a pure function of one rollout."""

from __future__ import annotations

import torch
from torch import Tensor


def gae(
    rewards: Tensor,
    values: Tensor,
    next_values: Tensor,
    terminated: Tensor,
    done: Tensor,
    valid: Tensor,
    *,
    gamma: float,
    gae_lambda: float,
) -> tuple[Tensor, Tensor]:
    r"""Advantages and returns of a rollout, with the end of an episode treated according to its kind.

    ``delta_t = r_t + gamma * V_next_t * (1 - terminated_t) - V_t`` and
    ``A_t = delta_t + gamma * gae_lambda * (1 - done_t) * A_{t+1}`` (Schulman et al. 2016, "High-dimensional continuous
    control using generalized advantage estimation", eq. 16). A truncated step bootstraps from the value of its final
    observation; only a terminated one does not.

    What ``next_values`` and ``valid`` hold in each of Gymnasium's autoreset modes:

    * ``NEXT_STEP``: ``V(obs[t + 1])`` always (the row of the end already sees the final observation); the row after an
      end is the reset (its action was ignored) and is not valid.
    * ``SAME_STEP``: ``V(infos["final_obs"])`` where done, ``V(obs[t + 1])`` elsewhere; all rows are valid.
    * ``DISABLED``: ``V(obs[t + 1])`` taken before the caller resets; all rows are valid.

    Args:
        rewards: float [T, N].
        values: float [T, N], value of the observation that the action of row t was chosen from.
        next_values: float [T, N], value of the observation that the action of row t led to.
        terminated: bool [T, N], the episode ended in a terminal state at row t.
        done: bool [T, N], terminated or truncated at row t.
        valid: bool [T, N], False for rows without a real transition.
        gamma: discount factor.
        gae_lambda: trace decay, 0 (one-step) to 1 (Monte Carlo).

    Returns:
        ``(advantages, returns)``, both float [T, N]; returns = advantages + values, both zero where not valid.

    Raises:
        ValueError: if the shapes are not all the same [T, N].
    """
    tensors = {"values": values, "next_values": next_values, "terminated": terminated, "done": done, "valid": valid}
    for name, tensor in tensors.items():
        if rewards.ndim != 2 or tensor.shape != rewards.shape:
            raise ValueError(
                f"gae got rewards {tuple(rewards.shape)} and {name} {tuple(tensor.shape)}; give every tensor as [T, N]."
            )
    valid = valid.bool()
    deltas = rewards + gamma * torch.where(terminated.bool(), 0.0, next_values) - values
    deltas = torch.where(valid, deltas, 0.0)
    carries = gamma * gae_lambda * (valid & ~done.bool()).to(deltas.dtype)
    advantages = torch.zeros_like(deltas)
    following = torch.zeros_like(deltas[0])
    for t in reversed(range(len(deltas))):
        following = deltas[t] + carries[t] * following
        advantages[t] = following
    return advantages, torch.where(valid, advantages + values, 0.0)
