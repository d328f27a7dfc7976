"""The processes that learn together: this one alone, or all that a launcher started, by accelerate."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from vla_rl.policy import VLAPolicy


class Processes(Protocol):
    """What supervised learning uses of `accelerate.Accelerator`, with its names."""

    @property
    def num_processes(self) -> int:
        """How many they are."""
        ...

    @property
    def process_index(self) -> int:
        """Which one this is, from 0."""
        ...

    @property
    def is_fsdp2(self) -> bool:
        """Whether weights are in shards."""
        ...

    @property
    def device(self) -> torch.device:
        """Where this one computes."""
        ...

    def prepare(self, *objects: Any) -> Any:
        """Model and optimiser as the processes use them."""
        ...

    def no_sync(self, model: nn.Module) -> AbstractContextManager[Any]:
        """Inside, gradients stay within the process."""
        ...

    def backward(self, loss: Tensor) -> None:
        """Add the gradients, averaged over processes."""
        ...

    def reduce(self, tensor: Tensor, reduction: str) -> Any:
        """The sum over processes."""
        ...

    def wait_for_everyone(self) -> None:
        """Return once every process has come here."""
        ...


class OneProcess:
    """A process on its own.

    Args:
        device: where it computes.
    """

    num_processes, process_index, is_fsdp2 = 1, 0, False

    def __init__(self, device: torch.device | str = "cpu"):
        self.device = torch.device(device)

    def prepare(self, *objects: Any) -> Any:
        """The objects as they are."""
        return objects

    def no_sync(self, model: nn.Module) -> AbstractContextManager[None]:
        """Nothing."""
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        """Add the gradients."""
        loss.backward()

    def reduce(self, tensor: Tensor, reduction: str) -> Tensor:
        """The tensor itself."""
        return tensor

    def wait_for_everyone(self) -> None:
        """Return at once."""


def start_processes() -> Processes:
    """Join the processes that `torchrun` or `accelerate launch` started; this one alone without a launcher.

    They share the work by DDP, or by FSDP2 where the launcher's settings ask for it (`accelerate launch --config_file`,
    or `ACCELERATE_USE_FSDP=true FSDP_VERSION=2`), on GPUs if there are any, else on CPUs by gloo.

    Raises:
        ImportError: there are several, and accelerate is missing.
        RuntimeError: accelerate does not find all of them.
        ValueError: the settings ask for FSDP 1.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        return OneProcess("cuda" if torch.cuda.is_available() else "cpu")
    try:
        from accelerate import Accelerator, DistributedDataParallelKwargs
    except ImportError as error:
        raise ImportError("several processes need accelerate; install it with `pip install 'vla-rl[lora]'`") from error
    # A head may have weights that the supervised loss leaves alone, such as the size of its exploration noise.
    options = DistributedDataParallelKwargs(find_unused_parameters=True)
    plugin = _fsdp2() if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true" else None
    cpu = not torch.cuda.is_available()  # where accelerate is not told, it takes each process for a single one
    accelerator = Accelerator(cpu=cpu, mixed_precision="no", kwargs_handlers=[options], fsdp_plugin=plugin)
    if accelerator.num_processes != world:
        raise RuntimeError(
            f"{world} processes were started and accelerate sees {accelerator.num_processes}; start them with torchrun"
        )
    if plugin is not None and not accelerator.is_fsdp2:
        # accelerate ignores the plug-in on a CPU, though all that it does works there too.
        from accelerate import DistributedType
        from accelerate.state import PartialState

        PartialState._shared_state["distributed_type"] = DistributedType.FSDP
        accelerator.state._shared_state.update(distributed_type=DistributedType.FSDP, fsdp_plugin=plugin)
    return accelerator


def _fsdp2() -> Any:
    """What the environment says of FSDP2, with what our models need."""
    from accelerate import FullyShardedDataParallelPlugin

    if os.environ.get("FSDP_VERSION", "1") != "2":
        raise ValueError(
            "FSDP 1 cannot shard a model of which parts are frozen; set fsdp_version: 2 (or FSDP_VERSION=2)"
        )
    return FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        cpu_ram_efficient_loading=False,  # it cannot load buffers
    )


def full_weights(policy: VLAPolicy, *, keep: bool = True) -> dict[str, Tensor]:
    """Every weight and buffer by name, put together on the CPU from the shards of all processes; all must call it.

    Args:
        policy: after `train_supervised`.
        keep: False where this process only takes part, and needs no copy.
    """
    full = {}
    for name, value in policy.state_dict().items():
        whole = value.full_tensor() if hasattr(value, "full_tensor") else value
        if keep:
            full[name] = whole.cpu()
    return full
