"""Stage 2 as a job on another machine: LoRA, head and new episodes go there by Ray, LoRA and head come back."""

from __future__ import annotations

import socket
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vla_rl.data.episode import Episode
from vla_rl.data.sampler import BalancedSampler
from vla_rl.data.store import EpisodeStore
from vla_rl.integrations.ray_policy import Adaptation, load_base
from vla_rl.integrations.ray_workers import Placement, ray
from vla_rl.policy import VLAPolicy
from vla_rl.sl.supervised import SLConfig, train_supervised


@dataclass(frozen=True)
class RemoteSupervised:
    """What a remote stage 2 did.

    Attributes:
        loss: mean over the last tenth of the steps.
        host: machine that it ran on.
        bytes_sent: of LoRA, head and episodes.
        bytes_received: of LoRA and head.
    """

    loss: float
    host: str
    bytes_sent: int
    bytes_received: int


@dataclass(frozen=True)
class _Job:
    base: str
    expert: tuple[str, ...]
    config: SLConfig
    seed: int
    data_seed: int
    task_weights: Mapping[str, float]
    device: str
    threads: int


def share_episodes(episodes: Iterable[Episode]) -> list[Any]:
    """Put episodes into the object store, one by one.

    A machine that has had them keeps them in its own store as long as there is room: give `supervised_remote` the same
    references in the next round, and only the new ones travel.

    Returns:
        Ray's references; the episodes live as long as these.
    """
    return [ray.put(episode) for episode in episodes]


def supervised_remote(
    policy: VLAPolicy,
    *,
    base: str,
    expert: Sequence[str | Path],
    found: Sequence[Iterable[Any]],
    config: SLConfig,
    seed: int = 0,
    data_seed: int = 0,
    task_weights: Mapping[str, float] | None = None,
    placement: Placement | None = None,
) -> RemoteSupervised:
    """`train_supervised` where `placement` fits; in place, and with the weights that it would give here.

    The weights are bit-equal to those of a local call on the same kind of machine with as many threads as
    `placement.num_cpus`. If the machine dies, Ray runs the job again on another, three times at most.

    Args:
        policy: learns; only LoRA and head travel, both ways.
        base: directory or hub id of a policy with the VLM's other weights, as the remote machine knows it.
        expert: paths of stores with demonstrations, as the remote machine knows them.
        found: stores of new episodes here, or lists of `Episode` or of what `share_episodes` returned.
        config: hyperparameters; the scope is "lora" or "head".
        seed: of the training.
        data_seed: of the sampler.
        task_weights: of the sampler.
        placement: what the job takes of its machine.

    Returns:
        Loss, and what travelled.

    Raises:
        ValueError: the scope is another, there is no adapter, or the remote VLM differs from the local one.
    """
    if config.scope not in ("lora", "head"):
        raise ValueError(f'scope="{config.scope}" changes weights that do not travel; use "lora" or "head"')
    if config.scope == "lora" and policy.encoder.lora is None:
        raise ValueError("the policy has no LoRA adapter; call policy.encoder.add_lora(LoRASettings()) first")
    placement = placement or Placement()
    job = _Job(
        base=base,
        expert=tuple(str(path) for path in expert),
        config=config,
        seed=seed,
        data_seed=data_seed,
        task_weights=dict(task_weights or {}),
        device=placement.device,
        threads=max(1, int(placement.num_cpus)),
    )
    sent = Adaptation.of(policy)
    episodes = [[_reference(episode) for episode in episodes] for episodes in found]
    remote: Any = ray.remote(_supervise)
    loss, host, num_bytes, back = ray.get(
        remote.options(**placement.options(), max_retries=3).remote(job, ray.put(sent), episodes)
    )
    back.apply(policy)
    return RemoteSupervised(loss, host, sent.nbytes + num_bytes, back.nbytes)


def _supervise(job: _Job, sent: Adaptation, found: list[list[Any]]) -> tuple[float, str, int, Adaptation]:
    """Runs on the other machine."""
    torch.set_num_threads(job.threads)
    policy = load_base(job.base, job.device)
    sent.apply(policy)
    num_bytes = 0
    with tempfile.TemporaryDirectory() as folder:
        stores = [EpisodeStore(path, mode="r") for path in job.expert]
        for number, references in enumerate(found):
            path = Path(folder) / str(number)
            with EpisodeStore(path, mode="w-") as store:
                for reference in references:
                    episode: Episode = ray.get(reference)
                    num_bytes += sum(array.nbytes for array in (*episode.observations.values(), episode.actions))
                    store.append(episode)
            stores.append(EpisodeStore(path, mode="r"))
        sampler = BalancedSampler(
            stores,
            batch_size=job.config.batch_size,
            seed=job.data_seed,
            task_weights=job.task_weights,
            chunk=policy.head.chunk,
        )
        torch.manual_seed(job.seed)
        loss = train_supervised(policy, sampler, config=job.config, seed=job.seed)
    return loss, socket.gethostname(), num_bytes, Adaptation.of(policy)


def _reference(episode: Any) -> Any:
    return ray.put(episode) if isinstance(episode, Episode) else episode
