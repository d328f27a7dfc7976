"""A pool of Ray actors that hold the environments of a stage 1: sharing out, versions of the head, and replacement."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from vla_rl.integrations.ray_policy import Adaptation, copied, policy_files
from vla_rl.integrations.ray_worker import MakeEnvs, Reply, RolloutWorker, Share
from vla_rl.policy import VLAPolicy
from vla_rl.preemption import PreemptedError, sigterm_arrived

try:
    import ray
    from ray.exceptions import RayError, RayTaskError
except ImportError as error:
    raise ImportError('vla_rl.integrations.ray needs Ray; install it with `pip install "vla-rl[ray]"`') from error

Request = tuple[str, tuple[Any, ...]]
BEGIN: Request = ("begin", ())
ACCIDENT = 0.5
"""Seconds after which the loss of a worker is an accident, and not the end of the whole job by SIGTERM."""


@dataclass(frozen=True)
class Placement:
    """What a worker or job takes of a machine; Ray starts it where that is free, on another machine first."""

    num_cpus: float = 1
    """cores"""
    num_gpus: float = 0
    """GPUs, or a part of one; with any, the VLM runs there"""
    resources: Mapping[str, float] = field(default_factory=dict)
    """the cluster's own resources, such as {"simulator": 1}, as given to `ray start --resources`"""

    @property
    def device(self) -> str:
        """Where the policy goes."""
        return "cuda" if self.num_gpus else "cpu"

    def options(self) -> dict[str, Any]:
        """Ray's options."""
        return {
            "num_cpus": self.num_cpus,
            "num_gpus": self.num_gpus,
            "resources": dict(self.resources),
            "scheduling_strategy": "SPREAD",
        }


class WorkerLossError(RuntimeError):
    """Workers died more often than they may."""


class RolloutWorkers:
    """Actors that share the environments of a stage 1 between them; pass it where a local run has its vector env.

    A worker that dies, with its machine or alone, or gives no answer in time, is replaced: its environments begin anew,
    with other seeds, and what was asked of it is asked of the new one. A rollout that comes back for another version of
    the head than the present one is refused and asked for again.

    Args:
        base: a directory or hub id of the policy that every machine can read, or a policy, whose files travel once.
        make_envs: number of environments -> vector env in the observation convention, called in the workers.
        num_envs: environments in all.
        num_workers: actors; `num_envs` must be a multiple.
        placement: what each actor takes of its machine.
        timeout: seconds without any answer after which workers count as hanging, ten times as many while one loads its
            policy and environments; None waits for ever.
        max_restarts: how many workers may be replaced.

    Attributes:
        version: of the head that the workers are to act with; it counts up with every change.
        num_restarts: workers replaced so far.
        dropped_episodes: unfinished episodes that went with them, one per environment.
        refused_rollouts: rollouts of another version than the present one.

    Raises:
        ValueError: the environments cannot be shared equally.
    """

    def __init__(
        self,
        base: str | VLAPolicy,
        make_envs: MakeEnvs,
        *,
        num_envs: int,
        num_workers: int,
        placement: Placement | None = None,
        timeout: float | None = None,
        max_restarts: int = 10,
    ):
        if num_workers < 1 or num_envs < 1 or num_envs % num_workers:
            raise ValueError(
                f"num_envs={num_envs} cannot be shared equally by num_workers={num_workers}; give a multiple"
            )
        self.num_envs, self.num_workers = num_envs, num_workers
        self.placement = placement or Placement()
        self.timeout, self.max_restarts = timeout, max_restarts
        self.version = 0
        self.num_restarts = self.dropped_episodes = self.refused_rollouts = 0
        self._base: Any = ray.put(base if isinstance(base, str) else policy_files(base))
        self._make_envs: Any = ray.put(make_envs)
        self._actors: list[Any] = [self._start() for _ in range(num_workers)]
        self._restarts = [0] * num_workers
        self._begun: set[int] = set()
        self._pending: dict[Any, tuple[int, Request]] = {}
        self._weights: dict[str, Tensor] = {}
        self._head: Any = None
        self._adaptation: Any = None
        self._share: Share | None = None

    @property
    def envs_per_worker(self) -> int:
        """Environments of each worker."""
        return self.num_envs // self.num_workers

    def begin(self, policy: VLAPolicy, share: Share) -> list[Reply]:
        """Send LoRA and head, and reset every environment; `share` is that of the first worker."""
        self._share, self._adaptation = share, ray.put(Adaptation.of(policy))
        self.version += 1
        self.broadcast(policy)
        return self.run(BEGIN)

    def broadcast(self, policy: VLAPolicy) -> None:
        """Put the head into the object store as a new version, if it has changed."""
        weights = policy.head.state_dict()
        same = self._weights.keys() == weights.keys() and all(
            torch.equal(value.cpu(), self._weights[name]) for name, value in weights.items()
        )
        if not same:
            self._weights = copied(weights)
            self._head = ray.put(self._weights)
            self.version += 1

    def ask(self, request: Request) -> None:
        """Send a request to every worker that is not at work on one."""
        busy = {index for index, _ in self._pending.values()}
        for index in range(self.num_workers):
            if index not in busy:
                self._send(index, request)

    def run(self, request: Request) -> list[Reply]:
        """What every worker answers, in their order, whatever happens to them meanwhile.

        Raises:
            WorkerLossError: more workers died than may.
        """
        self.ask(request)
        replies: dict[int, Reply] = {}
        while len(replies) < self.num_workers:
            for ref in self._wait():
                index, answered = self._pending.pop(ref)
                try:
                    reply: Reply = ray.get(ref)
                except RayTaskError:  # the worker lives; what it ran has failed, as it would have here
                    self._pending.clear()  # what the others say to it is no answer to the next request
                    raise
                except RayError as error:
                    if getattr(error, "actor_init_failed", False):  # its arguments cannot be read there: no accident
                        raise
                    self._replace(index, repr(error))
                    continue
                self._begun.add(index)
                if answered == request and reply.version == self.version:
                    replies[index] = reply
                else:
                    self.refused_rollouts += answered != BEGIN
                    self._send(index, request)
        return [replies[index] for index in range(self.num_workers)]

    def close(self) -> None:
        """End the workers, by force after five seconds."""
        if self._actors and ray.is_initialized():
            ray.wait([actor.close.remote() for actor in self._actors], num_returns=len(self._actors), timeout=5)
            for actor in self._actors:
                ray.kill(actor)
        self._actors, self._pending = [], {}

    def __enter__(self) -> RolloutWorkers:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # After SIGTERM the cluster may be gone, and Ray would look for it for a minute; it ends the workers with this
        # process.
        if kind is None or not issubclass(kind, PreemptedError):
            self.close()

    def _start(self) -> Any:
        actor: Any = ray.remote(RolloutWorker)
        return actor.options(**self.placement.options()).remote(self._base, self._make_envs, self.placement.device)

    def _send(self, index: int, request: Request) -> None:
        method, arguments = request
        if request == BEGIN:
            assert self._share is not None
            first = index * self.envs_per_worker
            share = replace(self._share, first=first, num_envs=self.envs_per_worker, restarts=self._restarts[index])
            arguments = (self._adaptation, share)
        ref = getattr(self._actors[index], method).remote(self.version, self._head, *arguments)
        self._pending[ref] = (index, request)

    def _wait(self) -> list[Any]:
        """Requests that are done, at least one; workers that hang are replaced."""
        while True:
            loading = any(request == BEGIN for _, request in self._pending.values())
            patience = None if self.timeout is None else self.timeout * (10 if loading else 1)
            done, _ = ray.wait(list(self._pending), timeout=patience)
            if done:
                return done
            for index, _ in list(self._pending.values()):
                self._replace(index, f"no answer within {patience} seconds")

    def _replace(self, index: int, why: str) -> None:
        time.sleep(ACCIDENT)
        if sigterm_arrived():
            raise PreemptedError
        ray.kill(self._actors[index])
        self._pending = {ref: work for ref, work in self._pending.items() if work[0] != index}
        if self.num_restarts == self.max_restarts:
            raise WorkerLossError(
                f"worker {index} is lost ({why}) after {self.num_restarts} others were replaced; look at the machines, "
                "or raise max_restarts"
            )
        self.num_restarts += 1
        self._restarts[index] += 1
        if index in self._begun:
            self._begun.remove(index)
            self.dropped_episodes += self.envs_per_worker
        self._actors[index] = self._start()
        self._send(index, BEGIN)
