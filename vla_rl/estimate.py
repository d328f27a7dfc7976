"""How much memory and time supervised learning of a VLM takes, from its configuration: nothing is loaded or computed.

A training step runs on tensors that have shapes and no data, through the model's own code, while the bytes of every
live tensor and the floating point operations are counted. What this leaves out: the caching allocator's rounding and
kernels' workspaces (a GPU context alone takes about half a gigabyte), and for the time all that is no matrix product.
"""

from __future__ import annotations

import copy
import weakref
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from torch.utils.weak import WeakIdKeyDictionary

from vla_rl.encoders.features import Features
from vla_rl.encoders.hidden import LowerLayers
from vla_rl.encoders.loading import require_transformers, text_backbone
from vla_rl.encoders.lora import LoRASettings, add_lora, first_adapted_layer
from vla_rl.encoders.truncation import truncate_text
from vla_rl.encoders.vision import VisionPath
from vla_rl.encoders.weights import half_weights, scope_parameters, zero_dropout
from vla_rl.heads import GaussianHead

Scope = Literal["head", "lora", "text"]


@dataclass(frozen=True)
class Workload:
    """A supervised training step."""

    tokens: int
    """tokens per observation: image tokens of all views and the prompt"""
    vision_tokens: int
    """of these, image tokens"""
    batch_size: int = 256
    """rows per gradient step"""
    gradient_accumulation: int = 1
    """parts that a batch is split into"""
    scope: Scope = "lora"
    """what learns beside the head"""
    lora: LoRASettings = field(default_factory=LoRASettings)
    """adapter, for scope "lora\""""
    truncate_layers: int | None = None
    """text layers kept; None for all"""
    dtype: torch.dtype = torch.bfloat16
    """type of the VLM's matrix products"""
    gradient_checkpointing: bool = False
    """keep only each layer's input for the backward pass"""
    optimizer: Literal["adamw", "adamw8bit"] = "adamw"
    """moments in 32 or 8 bits"""
    offload: bool = False
    """the vision tower, and text layers below the adapter, lie elsewhere"""


@dataclass(frozen=True)
class Estimate:
    """Bytes and floating point operations of training from the cache, which is not part of `peak`: it lies in CPU RAM.

    Filling the cache comes before: it needs all weights, `offload` or not, and a forward pass without gradients.

    Attributes:
        parameters: Weights of VLM and head.
        trainable: Those that learn.
        weights: Bytes of all weights, in the types that an encoder holds them in.
        optimizer: Bytes of the optimiser's moments.
        step: Most bytes of activations, gradients and inputs at any moment of a step.
        cache_row: Bytes of one row of the cache.
        fill_flops: Operations to compute one row of the cache, vision tower included; 0 where nothing is kept.
        step_flops: Operations of one gradient step, from the cache where there is one.
        env_step_flops: Operations of the VLM for one frame in stage 1.
    """

    parameters: int
    trainable: int
    weights: int
    optimizer: int
    step: int
    cache_row: int
    fill_flops: float
    step_flops: float
    env_step_flops: float

    @property
    def peak(self) -> int:
        """Most bytes on the device at any moment."""
        return self.weights + self.optimizer + self.step


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors made inside it that are alive.

    Attributes:
        now: Bytes alive.
        peak: Most bytes alive at any moment.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known = WeakIdKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and count what it makes."""
        output = func(*args, **(kwargs or {}))
        given = {id(leaf.untyped_storage()) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        for leaf in tree_leaves(output):
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                if id(storage) not in given and storage not in self._known:
                    self._add(storage)
        return output

    def _add(self, storage: torch.UntypedStorage) -> None:
        size = storage.nbytes()
        self._known[storage] = size
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._drop, size)

    def _drop(self, size: int) -> None:
        self.now -= size


def estimate(config: Any, workload: Workload, *, action_dim: int = 7, state_dim: int = 8) -> Estimate:
    """Simulate a supervised training step.

    Args:
        config: Configuration of an image-text-to-text model of transformers.
        workload: What the step does.
        action_dim: Of the Gaussian head.
        state_dim: Of the Gaussian head.

    Raises:
        ValueError: If the model's code needs data where there is none; the message says which.
    """
    from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

    try:
        model = _meta_model(copy.deepcopy(config), workload)
        with FakeTensorMode():
            _without_data(model)
            return _simulate(model, config, workload, action_dim, state_dim)
    except DataDependentOutputException as error:
        raise ValueError(f"the code of {type(config).__name__}'s model looks at data ({error}); measure it") from error


def _meta_model(config: Any, work: Workload) -> Any:
    """The model that an encoder would hold, frozen, with an adapter if one learns, on the meta device."""
    transformers = require_transformers()
    from transformers.initialization import no_init_weights

    with torch.device("meta"), no_init_weights():
        model = transformers.AutoModelForImageTextToText.from_config(config)
    model.tie_weights()
    model.eval().requires_grad_(False)
    zero_dropout(model)
    if work.truncate_layers is not None:
        truncate_text(model, work.truncate_layers)
    if work.dtype != torch.float32:
        for weight in half_weights(model):
            weight.data = weight.data.to(work.dtype)
    if work.scope == "lora":
        add_lora(model, work.lora)
        model.requires_grad_(False)
    if work.scope != "head":
        for weight in scope_parameters(model, work.scope):
            weight.data = weight.data.float()
    return model


def _without_data(model: nn.Module) -> None:
    """Replace all tensors by such that claim to lie on the CPU; for use in a `FakeTensorMode`."""
    made: dict[int, Tensor] = {}
    for module in model.modules():
        for name, weight in module._parameters.items():
            if weight is not None:
                fake = made.setdefault(id(weight), nn.Parameter(_empty(weight), requires_grad=False))
                module._parameters[name] = fake  # type: ignore[assignment]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = made.setdefault(id(buffer), _empty(buffer))


def _empty(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")


def _simulate(model: Any, config: Any, work: Workload, action_dim: int, state_dim: int) -> Estimate:
    learning: list[nn.Parameter] = []
    if work.scope != "head":
        learning = scope_parameters(model, work.scope)
        for weight in learning:
            weight.requires_grad_(True)
    backbone = text_backbone(model)
    if work.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
    dim: int = getattr(backbone.config, "hidden_size", None) or backbone.config.d_model
    head = GaussianHead(dim, action_dim, state_dim=state_dim)
    below = first_adapted_layer(model) if work.scope == "lora" else 0
    lower = LowerLayers(model, below) if below else None
    rows = -(-work.batch_size // work.gradient_accumulation)
    step_flops, live = _step(backbone, lower, head, work, rows)
    lower_flops, all_flops = _forward_flops(backbone, lower, dim, work)
    vision = vision_flops(model, config, work.vision_tokens)
    tower = model.get_encoder(modality="image")
    idle = [] if tower is model else [tower]
    idle += lower.modules if lower else []
    trained = sum(weight.numel() for weight in [*learning, *head.parameters()])
    deeper = len(getattr(config.vision_config, "deepstack_visual_indexes", None) or ())  # what Qwen3-VL adds to layers
    lora = 4 * dim * work.tokens if below else work.dtype.itemsize * (1 + deeper) * dim * work.vision_tokens
    cached = {"head": 2 * work.tokens * (dim + 1), "lora": lora if below or VisionPath(model).supported else 0}
    kept = work.scope in cached and cached[work.scope] > 0
    return Estimate(
        parameters=sum(weight.numel() for weight in [*model.parameters(), *head.parameters()]),
        trainable=trained,
        weights=_bytes(model) + _bytes(head) - (sum(map(_bytes, idle)) if work.offload else 0),
        optimizer=trained * (8 if work.optimizer == "adamw" else 2),
        step=live,
        cache_row=cached.get(work.scope, 0),
        fill_flops=vision + {"head": all_flops, "lora": lower_flops}[work.scope] if kept else 0.0,
        step_flops=step_flops * work.batch_size / rows + (0.0 if kept else vision * work.batch_size),
        env_step_flops=vision + all_flops,
    )


def _step(backbone: Any, lower: LowerLayers | None, head: GaussianHead, work: Workload, rows: int) -> tuple[float, int]:
    """Operations of one part of a batch, and most live bytes of a step: forward and backward pass of its parts."""
    parts = min(work.gradient_accumulation, 2)  # from the second part on, the gradients of the first are there
    counter, live = _counter(), LiveBytes()
    for mode in (live, counter):  # not at once: the counter keeps tensors alive
        for weight in (*backbone.parameters(), *head.parameters()):
            weight.grad = None
        with mode:
            _parts(backbone, lower, head, work, rows, parts)
    return counter.get_total_flops() / parts, live.peak


def _counter() -> FlopCounterMode:
    """A counter that knows the CPU's fused attention too, which PyTorch's own leaves out."""

    def forward(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
        return sdpa_flop_count(query, key, value)

    def backward(gradient: Any, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
        return sdpa_backward_flop_count(gradient, query, key, value)

    operations = torch.ops.aten
    return FlopCounterMode(
        display=False,
        custom_mapping={
            operations._scaled_dot_product_flash_attention_for_cpu: forward,
            operations._scaled_dot_product_flash_attention_for_cpu_backward: backward,
        },
    )


def _parts(backbone: Any, lower: LowerLayers | None, head: GaussianHead, work: Workload, rows: int, parts: int) -> None:
    """Forward and backward pass of some parts of a batch."""
    sizes = head.config()
    for _ in range(parts):
        kind = torch.float16 if work.scope == "head" else torch.float32
        tokens = torch.zeros(rows, work.tokens, sizes["feature_dim"], dtype=kind)
        if work.scope != "head":
            tokens = _run(backbone, lower, tokens, work, embed=work.scope == "text").float()
        features = Features(tokens, torch.ones(rows, work.tokens, dtype=torch.bool), "estimate")
        state, actions = torch.zeros(rows, sizes["state_dim"]), torch.zeros(rows, sizes["action_dim"])
        head.supervised_loss(features, state, actions).backward()


def _run(backbone: Any, lower: LowerLayers | None, inputs: Tensor, work: Workload, *, embed: bool = False) -> Tensor:
    """Hidden states of the text backbone, its lower layers standing aside if given."""
    mask = torch.ones(inputs.shape[:2], dtype=torch.long)
    given = {"input_ids": torch.zeros(inputs.shape[:2], dtype=torch.long)} if embed else {"inputs_embeds": inputs}
    half = work.dtype != torch.float32
    with torch.autocast("cpu", dtype=work.dtype if half else None, enabled=half):
        if lower is None:
            return backbone(**given, attention_mask=mask, use_cache=False)[0]
        with lower.replaced_by(inputs):
            return backbone(**given, attention_mask=mask, use_cache=False)[0]


@torch.no_grad()
def _forward_flops(backbone: Any, lower: LowerLayers | None, dim: int, work: Workload) -> tuple[float, float]:
    """Operations of one row's forward pass: of the layers below the adapter, and of all."""
    flops = []
    for aside in (None, lower):
        with _counter() as counter:
            _run(backbone, aside, torch.zeros(1, work.tokens, dim), work)
        flops.append(counter.get_total_flops())
    return flops[0] - flops[1], flops[0]


def vision_flops(model: Any, config: Any, vision_tokens: int) -> float:
    """Operations of the vision tower for one frame: twice its weights per patch, and its attention.

    The number of patches is the configuration's `(image_size / patch_size)^2`, or `vision_tokens` where it names none.
    """
    tower = model.get_encoder(modality="image")
    if tower is model:
        return 0.0
    vision = config.vision_config
    size, patch = getattr(vision, "image_size", None), getattr(vision, "patch_size", None)
    patches = (size // patch) ** 2 if isinstance(size, int) and isinstance(patch, int) else vision_tokens
    weights = sum(module.weight.numel() for module in tower.modules() if isinstance(module, (nn.Linear, nn.Conv2d)))
    layers = getattr(vision, "num_hidden_layers", None) or getattr(vision, "depth", 0)
    width = getattr(vision, "hidden_size", 0)  # without one width for all layers, their attention is left out
    return 2.0 * weights * patches + 4.0 * layers * patches**2 * width


def _bytes(module: nn.Module) -> int:
    tensors = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
