"""A torch device named "mirror" in the host's memory: code that mixes devices fails on it as it would on a GPU.

Values and random numbers are the host's, so that a run there must give what one on the CPU gives. Bytes that cross are
counted. A device is known to a whole process, so it is for processes of their own; as a program, this runs a
single-file script there:

    python mirror_device.py SCRIPT OPTIONS...
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import types
from collections import Counter
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import torchgen
import yaml
from torch.utils import _pytree as pytree
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

aten = torch.ops.aten
INDEXED = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}
"""What takes indices of the host's, as on a GPU."""
moved: Counter[str] = Counter()
"""Bytes by direction: "to host" and "to device"."""
_libraries: list[torch.library.Library] = []  # what they register lives as long as they do


class MirrorTensor(torch.Tensor):
    """A tensor on the mirror device, whose values lie in the CPU tensor `host`."""

    host: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, host: torch.Tensor) -> torch.Tensor:
        layout = {"strides": host.stride(), "storage_offset": host.storage_offset(), "dtype": host.dtype}
        tensor = torch.Tensor._make_wrapper_subclass(cls, host.size(), **layout, device=torch.device("mirror", 0))
        tensor.host = host  # pyright: ignore[reportAttributeAccessIssue]
        return tensor

    @classmethod
    def __torch_dispatch__(cls, op: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return compute(op, *args, **(kwargs or {}))

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["host"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, torch.Tensor], meta: None, size: Any, stride: Any) -> MirrorTensor:
        return MirrorTensor(inner["host"])

    def __deepcopy__(self, memo: dict[int, Any]) -> MirrorTensor:
        copy = MirrorTensor(self.host.clone()).requires_grad_(self.requires_grad)
        copy._is_param = getattr(self, "_is_param", False)
        memo[id(self)] = copy
        return copy

    def __repr__(self) -> str:
        return f"mirror({self.host})"

    # Torch refuses these to subclasses, though not to a device's own tensors.

    def tolist(self) -> Any:
        moved["to host"] += self.host.nbytes
        return self.host.tolist()

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.host.untyped_storage()

    def data_ptr(self) -> int:
        return self.host.data_ptr()


def compute(op: Any, *args: Any, **kwargs: Any) -> Any:
    """The result of an operation on tensors of the mirror device, or that makes one there.

    Raises:
        RuntimeError: it mixes devices; single numbers and indices of the host's are taken, as on a GPU.
    """
    leaves, spec = pytree.tree_flatten((args, {name: value for name, value in kwargs.items() if name != "pin_memory"}))
    ours = [leaf for leaf in leaves if isinstance(leaf, MirrorTensor)]
    others = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor) and not isinstance(leaf, MirrorTensor)]
    strangers = [leaf for leaf in others if leaf.ndim and not (op in INDEXED and _is_index(leaf, args))]
    if ours and strangers and op is not aten.copy_.default:
        raise RuntimeError(f"{op}: tensors on mirror:0 and, of shapes {[tuple(x.shape) for x in strangers]}, on cpu")
    if ours and str(op).removeprefix("aten.").removesuffix(".default") in host_only():
        raise NotImplementedError(f"torch has {op} for the CPU and not for CUDA")
    host_args, host_kwargs = pytree.tree_unflatten([_on_host(leaf) for leaf in leaves], spec)
    result = op(*host_args, **host_kwargs)
    if op is aten.copy_.default:
        if others:
            moved["to device" if isinstance(args[0], MirrorTensor) else "to host"] += args[1].nbytes
        return args[0]
    stale = [tensor.shape for tensor in ours if tensor.shape != tensor.host.shape]
    assert not stale, (
        f"{op} changed the shape of {stale}, which a MirrorTensor cannot do: give it a kernel in `register`"
    )
    device = kwargs.get("device")
    if isinstance(result, (bool, int, float)):
        device = "cpu"
    if ours if device is None else torch.device(device).type == "mirror":
        if op is aten._to_copy.default:
            moved["to device"] += sum(other.nbytes for other in others)
        given = {id(tensor.host): tensor for tensor in ours}  # what works in place gives back what it was given
        return pytree.tree_map_only(torch.Tensor, lambda x: given[id(x)] if id(x) in given else MirrorTensor(x), result)
    moved["to host"] += sum(leaf.nbytes for leaf in ours)
    return result


@cache
def host_only() -> set[str]:
    """Operations that torch has for the CPU and not for CUDA, by its own list."""
    listed = yaml.safe_load((Path(torchgen.__file__).parent / "packaged/ATen/native/native_functions.yaml").read_text())
    functions = {function["func"].partition("(")[0]: function for function in listed}

    def backends(name: str) -> set[str]:
        keys = functions[functions[name].get("structured_delegate", name)].get("dispatch", {})
        return {backend.strip() for key in keys for backend in key.split(",")}

    found = {name: backends(name) for name in functions}
    return {name for name, keys in found.items() if "CPU" in keys and not re.search("CUDA|Composite", str(keys))}


def _is_index(leaf: torch.Tensor, args: tuple) -> bool:
    return any(leaf is index for index in args[1])


def _on_host(leaf: Any) -> Any:
    if isinstance(leaf, MirrorTensor):
        return leaf.host
    return torch.device("cpu") if isinstance(leaf, torch.device) and leaf.type == "mirror" else leaf


def register() -> None:
    """Make the device known to torch in this process."""
    module = types.ModuleType("torch.mirror")
    module.__dict__.update(
        is_available=lambda: True,
        is_initialized=lambda: True,
        device_count=lambda: 1,
        current_device=lambda: 0,
        set_device=lambda device: None,
        synchronize=lambda device=None: None,
        manual_seed=lambda seed: None,  # the host's generator is the only one
        manual_seed_all=lambda seed: None,
        get_rng_state=lambda device=None: torch.get_rng_state(),
        set_rng_state=lambda state, device=None: torch.set_rng_state(state),
        get_amp_supported_dtype=lambda: [torch.bfloat16, torch.float16],
        _is_in_bad_fork=lambda: False,
    )
    _setup_privateuseone_for_python_backend("mirror", backend_module=module)
    everything = torch.library.Library("_", "IMPL")
    everything.fallback(compute, "PrivateUse1")
    particular = torch.library.Library("aten", "IMPL")  # torch.tensor(..., device="mirror") comes past the fallback
    copy = partial(compute, aten.copy_.default)
    particular.impl("_copy_from", lambda source, target, _=False: copy(target, source), "PrivateUse1")
    particular.impl("_local_scalar_dense", partial(compute, aten._local_scalar_dense.default), "PrivateUse1")
    for op in (aten.arange.default, aten.arange.start, aten.arange.start_step):  # would resize an empty tensor
        particular.impl(op, partial(compute, op), "PrivateUse1")
    _libraries.extend([everything, particular])
    torch.__future__.set_swap_module_params_on_conversion(True)  # the way for parameters that are a subclass


def run(program: str, *arguments: object, cwd: Path | None = None) -> None:
    """Run a program of this folder in a process of its own, where the device may be made known."""
    command = [sys.executable, Path(__file__).parent / program, *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, env=environment)
    assert not done.returncode, done.stderr[-3000:]


def main(script: str, *options: str) -> dict[str, Any]:
    """Run a single-file script on the device that it would take for a GPU; returns its module-level names."""
    register()
    chooses = 'torch.device("cuda" if torch.cuda.is_available() and args.cuda else "cpu")'
    text = Path(script).read_text()
    assert chooses in text
    module = types.ModuleType("__main__")
    module.__file__, sys.modules["__main__"], sys.argv = script, module, [script, *options]
    exec(compile(text.replace(chooses, 'torch.device("mirror")'), script, "exec"), module.__dict__)
    return module.__dict__


if __name__ == "__main__":
    main(*sys.argv[1:])
