"""Where a supervised stage stands, on disk: each process writes its part, and all go on from there after a kill."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vla_rl.data.sampler import BalancedSampler
from vla_rl.rundir import file_digest, read_json, sync, write_json
from vla_rl.saved_files import check_arguments
from vla_rl.sl.processes import Processes

_GROUP = ("lr", "betas")  # what the schedule changes
_KEPT = 2


@dataclass
class _State:
    """What `state.json` holds."""

    of: dict[str, Any]
    processes: int
    sharded: bool
    losses: Sequence[float]
    sampler: dict[str, Any]
    groups: Sequence[dict[str, Any]]
    plain: dict[str, Any]


class Snapshots:
    """Snapshots of one supervised stage: trained weights, moments, buffers, and every generator of random numbers.

    Under FSDP2 each process writes the shards that lie in it; else the first one writes everything. A snapshot has its
    name once it is whole and on the disk, with the checksum of every file; the two newest are kept, and a damaged one
    is passed over. The same number of processes goes on from it.

    Args:
        folder: for snapshots of this stage alone, which all processes see.
        every: gradient steps between two snapshots; 0 for those alone that SIGTERM asks for.
        of: what the stage does, of JSON types; snapshots of another one are refused.
    """

    def __init__(self, folder: str | Path, *, every: int, of: Mapping[str, Any]):
        self.folder, self.every, self.of = Path(folder), every, json.loads(json.dumps(of))

    def due(self, step: int) -> bool:
        """Whether one is to be written after `step` steps."""
        return self.every > 0 and step % self.every == 0

    def save(
        self,
        losses: list[float],
        *,
        optimizer: torch.optim.Optimizer,
        buffers: Mapping[str, Tensor],
        sampler: BalancedSampler,
        generator: torch.Generator,
        processes: Processes,
    ) -> None:
        """Write a snapshot after `len(losses)` steps; every process calls this."""
        step, rank = len(losses), processes.process_index
        temporary, final = self.folder / ".tmp", self.folder / f"step{step:07d}"
        if rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        processes.wait_for_everyone()
        tensors = {"rng": torch.get_rng_state(), "shifts": generator.get_state()}
        if torch.cuda.is_available():
            tensors["cuda_rng"] = torch.cuda.get_rng_state()
        plain: dict[str, Any] = {}
        if rank == 0 or processes.is_fsdp2:
            tensors |= {f"buffer/{name}": buffer for name, buffer in buffers.items()}
            for index, weight in enumerate(_weights(optimizer)):
                tensors[f"{index}/weight"] = local_part(weight.detach())
                for name, value in optimizer.state.get(weight, {}).items():
                    if isinstance(value, Tensor):
                        tensors[f"{index}/{name}"] = local_part(value)
                    else:
                        plain[f"{index}/{name}"] = value
        save_file({name: value.cpu().contiguous().clone() for name, value in tensors.items()}, temporary / _file(rank))
        written = [temporary / _file(rank)]
        if rank == 0:
            state = _State(
                of=self.of,
                processes=processes.num_processes,
                sharded=processes.is_fsdp2,
                losses=losses,
                sampler=sampler.state_dict(),
                groups=[{key: group[key] for key in _GROUP} for group in optimizer.param_groups],
                plain=plain,
            )
            write_json(temporary / "state.json", vars(state))
            written.append(temporary / "state.json")
        sync(written[0])
        write_json(temporary / _checksums(rank), {path.name: file_digest(path) for path in written})
        processes.wait_for_everyone()
        if rank == 0:
            publish(temporary, final)
        processes.wait_for_everyone()

    def restore(
        self,
        *,
        optimizer: torch.optim.Optimizer,
        buffers: Mapping[str, Tensor],
        schedule: torch.optim.lr_scheduler.LRScheduler,
        sampler: BalancedSampler,
        generator: torch.Generator,
        processes: Processes,
    ) -> list[float]:
        """Go on from the newest snapshot, if there is one; returns the losses until then.

        A damaged one is passed over with a warning.

        Raises:
            ValueError: it is of another stage, or was written by another number of processes, or sharded otherwise.
        """
        finished = self._finished()
        while finished:
            snapshot = finished.pop()
            problem = self._damage(snapshot, processes)
            others = processes.reduce(torch.tensor(float(problem is not None), device=processes.device), "sum")
            if not float(others):
                break
            if problem is not None:
                before = f"from {finished[-1]}" if finished else "from the beginning of the stage"
                warnings.warn(f"{snapshot} is damaged ({problem}); going on {before}", stacklevel=2)
        else:
            return []
        state = _State(**read_json(snapshot / "state.json"))
        own = load_file(snapshot / _file(processes.process_index))
        shards = own if processes.is_fsdp2 else load_file(snapshot / _file(0))
        for index, weight in enumerate(_weights(optimizer)):
            prefix = f"{index}/"
            with torch.no_grad():
                local_part(weight).copy_(shards[f"{prefix}weight"])
            names = [name for name in shards if name.startswith(prefix) and name != f"{prefix}weight"]
            moments: dict[str, Any] = {name.removeprefix(prefix): _like(weight, shards[name]) for name in names}
            moments |= {k.removeprefix(prefix): v for k, v in state.plain.items() if k.startswith(prefix)}
            if moments:
                optimizer.state[weight] = moments
        for name, buffer in buffers.items():
            buffer.copy_(shards[f"buffer/{name}"])
        for group, saved in zip(optimizer.param_groups, state.groups, strict=True):
            group.update(lr=saved["lr"], betas=tuple(saved["betas"]))
        schedule.last_epoch = len(state.losses)
        sampler.load_state_dict(state.sampler)
        generator.set_state(own["shifts"])
        torch.set_rng_state(own["rng"])
        if "cuda_rng" in own:
            torch.cuda.set_rng_state(own["cuda_rng"])
        return list(state.losses)

    def _finished(self) -> list[Path]:
        """All snapshots that have been written to the end, the newest last."""
        return list_snapshots(self.folder)

    def _damage(self, snapshot: Path, processes: Processes) -> str | None:
        """What is wrong with the files that this process needs, once it is clear that they are for it."""
        try:
            compare_files(snapshot, _checksums(0), ["state.json"])
            values = read_json(snapshot / "state.json")
            check_arguments(_State, values, where="state.json")
        except ValueError as error:
            return str(error)
        state = _State(**values)
        changed = [key for key, value in self.of.items() if state.of.get(key) != value]
        if changed:
            raise ValueError(f"{snapshot} was begun with another {changed[0]}; go on with the same, or remove it")
        if (state.processes, state.sharded) != (processes.num_processes, processes.is_fsdp2):
            raise ValueError(
                f"{snapshot} was written by {state.processes} processes {'with' if state.sharded else 'without'} FSDP2;"
                " go on with as many, or remove it to begin anew"
            )
        try:
            for rank in {processes.process_index} if state.sharded else {0, processes.process_index}:
                compare_files(snapshot, _checksums(rank), [_file(rank)])
        except ValueError as error:
            return str(error)
        return None


def list_snapshots(folder: Path) -> list[Path]:
    """All snapshots in a folder that have been written to the end, the oldest first."""
    return sorted(folder.glob("step*"))


def publish(temporary: Path, final: Path) -> None:
    """Give a whole snapshot its name, and remove what it makes superfluous: later ones, and all but the newest two.

    Args:
        temporary: where it was written.
        final: its name, beside those of others.
    """
    earlier = [snapshot for snapshot in list_snapshots(final.parent) if snapshot.name < final.name]
    if final.exists():  # a damaged one that was passed over
        shutil.rmtree(final)
    temporary.rename(final)
    sync(final.parent)
    for other in list_snapshots(final.parent):
        if other not in (final, *earlier[1 - _KEPT :]):
            shutil.rmtree(other)


def compare_files(snapshot: Path, checksums: str, names: Sequence[str]) -> None:
    """Raise ValueError if a file of a snapshot is not what was written.

    Args:
        snapshot: its folder.
        checksums: name of the JSON file that holds them.
        names: of the files to look at.
    """
    expected = read_json(snapshot / checksums)
    for name in names:
        path = snapshot / name
        if not path.is_file() or file_digest(path) != expected.get(name):
            raise ValueError(f"{name} {'has other content than was written' if path.is_file() else 'is missing'}")


def _file(rank: int) -> str:
    return f"process{rank:05d}.safetensors"


def _checksums(rank: int) -> str:
    return f"process{rank:05d}.json"


def _weights(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [weight for group in optimizer.param_groups for weight in group["params"]]


def local_part(tensor: Tensor) -> Tensor:
    """The part of a tensor that lies in this process."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor  # type: ignore[operator]


def _like(weight: Tensor, value: Tensor) -> Tensor:
    """A moment of a weight, in shards where the weight is."""
    if value.ndim == 0 or not hasattr(weight, "to_local"):
        return value if value.ndim == 0 else value.to(weight.device)
    from torch.distributed.tensor import DTensor

    assert isinstance(weight, DTensor)
    return DTensor.from_local(
        value.to(weight.device),
        weight.device_mesh,
        weight.placements,
        run_check=False,
        shape=weight.shape,
        stride=weight.stride(),
    )
