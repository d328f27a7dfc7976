"""A supervised stage as a job of its own: from a policy directory and episode stores to a policy directory."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, nullcontext, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vla_rl.data.sampler import BalancedSampler
from vla_rl.data.store import EpisodeStore
from vla_rl.encoders.lora import LoRASettings
from vla_rl.policy import VLAPolicy, consent
from vla_rl.preemption import stop_on_sigterm
from vla_rl.rundir import read_json, write_json
from vla_rl.saved_files import check_arguments
from vla_rl.sl.caches import Scope, SupervisedError
from vla_rl.sl.processes import Processes, full_weights, start_processes
from vla_rl.sl.snapshots import Snapshots
from vla_rl.sl.supervised import SLConfig, train_supervised


@dataclass
class SupervisedJob:
    """What every process of a job must know.

    Args:
        policy: directory of the policy to start from; it is only read.
        data: directories of episode stores.
        out: directory for the trained policy; it must not exist, and appears once the job has succeeded.
        config: hyperparameters.
        seed: of augmentation, a fresh adapter, and what heads draw.
        data_seed: of the batches.
        task_weights: how often to draw a task relative to the others; 1 where not given.
        lora: adapter to add for scope "lora", if the policy has none.
        trust_remote_code: whether the policy's VLM may run code that came with its weights.
    """

    policy: str
    data: Sequence[str]
    out: str
    config: SLConfig = field(default_factory=SLConfig)
    seed: int = 0
    data_seed: int = 0
    task_weights: Mapping[str, float] = field(default_factory=dict)
    lora: LoRASettings | None = None
    trust_remote_code: bool = False

    def write(self, path: Path) -> None:
        """Write the job as JSON."""
        write_json(path, asdict(self))

    @classmethod
    def read(cls, path: Path) -> SupervisedJob:
        """The job in a file that `write` has written.

        Raises:
            ValueError: the file is damaged, or of another version.
        """
        values = read_json(path)
        check_arguments(cls, values, where=str(path))
        for name, kind in (("config", SLConfig), ("lora", LoRASettings)):
            if values.get(name) is not None:
                check_arguments(kind, values[name], where=f"{name!r} in {path}")
                values[name] = kind(**values[name])
        return cls(**values)

    def sampler(self, stores: Sequence[EpisodeStore], *, chunk: int) -> BalancedSampler:
        """Draws the batches of the job, for a head over `chunk` env steps."""
        return BalancedSampler(
            stores,
            batch_size=self.config.batch_size,
            seed=self.data_seed,
            task_weights=self.task_weights,
            chunk=chunk,
        )

    @property
    def snapshot_folder(self) -> Path:
        """Beside `out`, hidden."""
        out = Path(self.out)
        return out.with_name(f".{out.name}.steps")

    def snapshots(self, policy: VLAPolicy, stores: Sequence[EpisodeStore]) -> Snapshots:
        """Those of the job that begins with `policy` and learns from `stores`, wherever these lie."""
        of: dict[str, Any] = asdict(self) | {"policy": _digest(policy), "data": _content(stores)}
        for free in ("out", "trust_remote_code"):
            del of[free]
        for free in ("snapshot_every", "cache_dir"):
            del of["config"][free]
        return Snapshots(self.snapshot_folder, every=self.config.snapshot_every, of=of)


def run_job(
    job: SupervisedJob, *, on_step: Callable[[int, float], None] | None = None, processes: Processes | None = None
) -> float:
    """Train, and write the trained policy; every process of the job calls this.

    Args:
        job: what to do.
        on_step: called with step number and loss, in the first process alone.
        processes: the others; None to join them here.

    Returns:
        Mean loss over the last tenth of the steps.

    Raises:
        FileExistsError: `job.out` exists.
        FileNotFoundError: the policy, a store, or the directory around `job.out` does not exist.
        PreemptedError: after SIGTERM, inside `vla_rl.preemption.stop_on_sigterm`; the same job goes on later.
        SupervisedError: the loss, the gradient or what was learned is not finite; nothing is written.
        ValueError: snapshots lie beside `job.out` that are of another job.
    """
    out = Path(job.out)
    if out.exists():
        raise FileExistsError(f"{out} exists; give a new directory for the trained policy")
    if not out.absolute().parent.is_dir():
        raise FileNotFoundError(f"{out.absolute().parent} does not exist; make it before a policy is written into it")
    processes = processes or start_processes()
    first = processes.process_index == 0
    trusted: dict[str, Any] = {"trust_remote_code": True} if job.trust_remote_code else {}
    policy = VLAPolicy.from_pretrained(job.policy, device=str(processes.device), **trusted)
    torch.manual_seed(job.seed)
    if job.config.scope == "lora" and policy.encoder.lora is None and job.lora is not None:
        policy.encoder.add_lora(job.lora)
    torch.manual_seed(job.seed + processes.process_index)  # what a head draws for its rows differs between processes
    with ExitStack() as stack:
        stores = [stack.enter_context(EpisodeStore(path, mode="r")) for path in job.data]
        loss = train_supervised(
            policy,
            job.sampler(stores, chunk=policy.head.chunk),
            config=job.config,
            seed=job.seed,
            on_step=on_step if first else None,
            processes=processes,
            snapshots=job.snapshots(policy, stores),
        )
    if processes.is_fsdp2:
        policy = _put_together(policy, job, first=first)
    if first:
        temporary = out.with_name(f".{out.name}.tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        policy.save_pretrained(temporary)
        temporary.rename(out)
        discard(job.snapshot_folder)
    processes.wait_for_everyone()
    return loss


def discard(folder: Path) -> None:
    """Remove a folder, if it is there; a kill leaves the whole of it or nothing under its name."""
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    with suppress(FileNotFoundError):
        folder.rename(old)
    shutil.rmtree(old, ignore_errors=True)


def _put_together(policy: VLAPolicy, job: SupervisedJob, *, first: bool) -> VLAPolicy:
    """In the first process, the policy of the job with the weights that lie in shards in all processes."""
    weights = full_weights(policy, keep=first)
    if not first:
        return policy
    whole = VLAPolicy.from_pretrained(job.policy, **consent(policy))
    if policy.encoder.lora is not None and whole.encoder.lora is None:
        whole.encoder.add_lora(policy.encoder.lora)
    whole.encoder.image_size = policy.encoder.image_size
    take_over(whole, weights, scope=job.config.scope)
    return whole


def take_over(policy: VLAPolicy, weights: Mapping[str, Tensor], *, scope: Scope) -> None:
    """Give a policy the weights that training with a scope has led to."""
    with nullcontext() if scope == "head" else policy.encoder.trainable(scope):
        policy.load_state_dict(weights)


def _digest(policy: VLAPolicy) -> str:
    """Identity of a policy: of its encoder, and of all weights beside it."""
    digest = hashlib.blake2b(policy.encoder.fingerprint.encode(), digest_size=8)
    for name, value in sorted(policy.head.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _content(stores: Sequence[EpisodeStore]) -> str:
    """Identity of data, without reading pictures: what indices know of every episode's numbers and words."""
    known = [
        [(e.task, e.instruction, e.success, e.total_steps, e.seed, e.moments) for e in store.index] for store in stores
    ]
    return hashlib.blake2b(json.dumps(known).encode(), digest_size=8).hexdigest()


def main(folder: Path) -> None:
    """What every process that `supervise` has started runs."""
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))
    job = SupervisedJob.read(folder / "job.json")
    processes = start_processes()

    with stop_on_sigterm(), (folder / "steps.jsonl").open("a") as file:

        def on_step(step: int, loss: float) -> None:
            here = folder / "steps.jsonl"
            if not here.is_file() or not os.path.samestat(here.stat(), os.fstat(file.fileno())):
                raise SupervisedError(f"{folder} was given to another job, so this one ends")
            file.write(json.dumps([step, loss]) + "\n")
            file.flush()

        loss = run_job(job, on_step=on_step, processes=processes)
    if processes.process_index == 0:
        write_json(folder / "result.json", {"loss": loss, "num_processes": processes.num_processes})


if __name__ == "__main__":
    main(Path(sys.argv[1]))
