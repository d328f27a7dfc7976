"""Stage 2 as a job on another machine: LoRA, head and new episodes go there by Ray, LoRA and head come back."""

from __future__ import annotations

import socket
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
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
        host: name of the machine that it ran on.
        node: Ray's id of that machine.
        bytes_sent: of LoRA, head, and those episodes that the machine did not have; 0 on this one. Where the job was
            run again, of the last time alone.
        bytes_received: of LoRA and head; 0 on this machine.
    """

    loss: float
    host: str
    node: str
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
    sent = ray.put(Adaptation.of(policy))
    episodes = [[_reference(episode) for episode in episodes] for episodes in found]
    remote: Any = ray.remote(_supervise)
    report, back = ray.get(remote.options(**placement.options(), max_retries=3).remote(job, [sent], episodes))
    back.apply(policy)
    away = report.node != ray.get_runtime_context().get_node_id()
    return replace(report, bytes_received=back.nbytes if away else 0)


def _supervise(job: _Job, sent: list[Any], found: list[list[Any]]) -> tuple[RemoteSupervised, Adaptation]:
    """Runs on the other machine; what it is given it fetches itself, to see how much of that has to travel."""
    torch.set_num_threads(job.threads)
    policy = load_base(job.base, job.device)
    num_bytes = _missing(sent)
    adaptation: Adaptation = ray.get(sent[0])
    adaptation.apply(policy)
    with tempfile.TemporaryDirectory() as folder:
        stores = [EpisodeStore(path, mode="r") for path in job.expert]
        for number, references in enumerate(found):
            path = Path(folder) / str(number)
            num_bytes += _missing(references)
            with EpisodeStore(path, mode="w-") as store:
                for reference in references:
                    store.append(ray.get(reference))
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
    node = ray.get_runtime_context().get_node_id()
    return RemoteSupervised(loss, socket.gethostname(), node, num_bytes, 0), Adaptation.of(policy)


def _missing(references: Sequence[Any]) -> int:
    """Bytes of those objects that this machine does not have yet."""
    from ray.experimental import get_object_locations

    here = ray.get_runtime_context().get_node_id()
    places = get_object_locations(list(references))
    return sum(place["object_size"] for place in places.values() if here not in place["node_ids"])


def _reference(episode: Any) -> Any:
    return ray.put(episode) if isinstance(episode, Episode) else episode
