"""Where a supervised stage stands, on disk: each process writes its part, and all go on from there after a kill."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vla_rl.data.sampler import BalancedSampler
from vla_rl.rundir import read_json, write_json
from vla_rl.sl.processes import Processes

_GROUP = ("lr", "betas")  # what the schedule changes


class Snapshots:
    """Snapshots of one supervised stage: trained weights, moments, and every generator of random numbers.

    Under FSDP2 each process writes the shards that lie in it; else the first one writes everything. A snapshot has its
    name once it is whole, and the one before it is removed then. The same number of processes goes on from it.

    Args:
        folder: for snapshots of this stage alone, which all processes see.
        every: gradient steps between two snapshots.
        of: what the stage does, of JSON types; snapshots of another one are refused.
    """

    def __init__(self, folder: str | Path, *, every: int, of: Mapping[str, Any]):
        self.folder, self.every, self.of = Path(folder), every, json.loads(json.dumps(of))

    def save(
        self,
        losses: list[float],
        *,
        optimizer: torch.optim.Optimizer,
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
            for index, weight in enumerate(_weights(optimizer)):
                tensors[f"{index}/weight"] = _local(weight.detach())
                for name, value in optimizer.state.get(weight, {}).items():
                    if isinstance(value, Tensor):
                        tensors[f"{index}/{name}"] = _local(value)
                    else:
                        plain[f"{index}/{name}"] = value
        save_file({name: value.cpu().contiguous().clone() for name, value in tensors.items()}, temporary / _file(rank))
        processes.wait_for_everyone()
        if rank == 0:
            state = {
                "of": self.of,
                "processes": processes.num_processes,
                "sharded": processes.is_fsdp2,
                "losses": losses,
                "sampler": sampler.state_dict(),
                "groups": [{key: group[key] for key in _GROUP} for group in optimizer.param_groups],
                "plain": plain,
            }
            write_json(temporary / "state.json", state)
            temporary.rename(final)
            for other in self._whole():
                if other != final:
                    shutil.rmtree(other)
        processes.wait_for_everyone()

    def restore(
        self,
        *,
        optimizer: torch.optim.Optimizer,
        schedule: torch.optim.lr_scheduler.LRScheduler,
        sampler: BalancedSampler,
        generator: torch.Generator,
        processes: Processes,
    ) -> list[float]:
        """Go on from the newest snapshot, if there is one; returns the losses until then.

        Raises:
            ValueError: it is of another stage, or was written by another number of processes, or sharded otherwise.
        """
        whole = self._whole()
        if not whole:
            return []
        state = read_json(whole[-1] / "state.json")
        changed = [key for key, value in self.of.items() if state["of"].get(key) != value]
        if changed:
            raise ValueError(f"{whole[-1]} was begun with another {changed[0]}; go on with the same, or remove it")
        written = state["processes"], state["sharded"]
        if written != (processes.num_processes, processes.is_fsdp2):
            raise ValueError(
                f"{whole[-1]} was written by {written[0]} processes {'with' if written[1] else 'without'} FSDP2; go on "
                "with as many, or remove it to begin anew"
            )
        own = load_file(whole[-1] / _file(processes.process_index))
        shards = own if processes.is_fsdp2 else load_file(whole[-1] / _file(0))
        for index, weight in enumerate(_weights(optimizer)):
            prefix = f"{index}/"
            with torch.no_grad():
                _local(weight).copy_(shards[f"{prefix}weight"])
            names = [name for name in shards if name.startswith(prefix) and name != f"{prefix}weight"]
            moments: dict[str, Any] = {name.removeprefix(prefix): _like(weight, shards[name]) for name in names}
            moments |= {k.removeprefix(prefix): v for k, v in state["plain"].items() if k.startswith(prefix)}
            if moments:
                optimizer.state[weight] = moments
        for group, saved in zip(optimizer.param_groups, state["groups"], strict=True):
            group.update(lr=saved["lr"], betas=tuple(saved["betas"]))
        schedule.last_epoch = len(state["losses"])
        sampler.load_state_dict(state["sampler"])
        generator.set_state(own["shifts"])
        torch.set_rng_state(own["rng"])
        if "cuda_rng" in own:
            torch.cuda.set_rng_state(own["cuda_rng"])
        return state["losses"]

    def _whole(self) -> list[Path]:
        """All snapshots that have been written to the end, the newest last."""
        return sorted(self.folder.glob("step*"))


def _file(rank: int) -> str:
    return f"process{rank:05d}.safetensors"


def _weights(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [weight for group in optimizer.param_groups for weight in group["params"]]


def _local(tensor: Tensor) -> Tensor:
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
