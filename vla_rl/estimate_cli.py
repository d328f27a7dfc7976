"""`vla-rl estimate`: memory and time of supervised learning with a VLM, before it is downloaded or loaded."""

from __future__ import annotations

import inspect
import time
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch
from rich.console import Console
from rich.table import Table

from vla_rl.encoders import LoRASettings, loading, small_vlm
from vla_rl.encoders.checkpoint import EncoderSettings
from vla_rl.encoders.prompts import PromptInputs
from vla_rl.encoders.saving import weights_of
from vla_rl.estimate import Estimate as Figures
from vla_rl.estimate import Workload, estimate
from vla_rl.estimate_time import Times, measure_times
from vla_rl.presets import PRESETS

_STAGE_OPTIONS = ("batch_size", "gradient_accumulation", "gradient_checkpointing", "optimizer", "offload", "scope")
_INSTRUCTION = "put the second red block that lies behind the open drawer on top of the blue one"


@dataclass
class Estimate:
    """Memory and time of supervised learning (stages 0 and 2) and of an env step in stage 1, from a configuration.

    Example: vla-rl estimate --model HuggingFaceTB/SmolVLM-256M-Instruct --batch-size 32 --top-layers 8 --tflops 100
    """

    model: str
    """a preset of `vla-rl train` with its VLM and stage 2, or a directory or hub id, of which the configuration is read
    alone"""
    scope: Literal["head", "lora", "text"] = "lora"
    """what learns beside the head"""
    batch_size: int = 256
    """rows per gradient step"""
    gradient_accumulation: int = 1
    """parts that a batch is split into"""
    gradient_checkpointing: bool = False
    """keep only each layer's input for the backward pass"""
    optimizer: Literal["adamw", "adamw8bit"] = "adamw"
    """moments in 32 or 8 bits"""
    offload: bool = False
    """frozen parts of the VLM lie on the CPU once their output is cached"""
    lora_rank: int = 16
    """rank of the adapter"""
    top_layers: int | None = None
    """adapt only the last so many text layers, and cache what lies below; None for all"""
    truncate_layers: int | None = None
    """keep only the first so many text layers; None for all"""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """type of the VLM's matrix products"""
    tokens: int | None = None
    """tokens per observation, images and prompt; None, with `vision_tokens`, asks the model's processor"""
    vision_tokens: int | None = None
    """of these, image tokens"""
    image_size: int = 64
    """pixels of the frames, for the processor"""
    rows: int = 10_000
    """env steps in the data, for the size of the cache"""
    tflops: float | None = None
    """operations per second that the device sustains, in 10^12 (an eager bf16 model reaches 30 to 50 % of a GPU's data
    sheet); None times a few layers of the model here, or bare matrix products if `tokens` is given"""

    def run(self, console: Console) -> None:
        """Estimate."""
        config, work, probe = self.workload()
        figures = estimate(config, work)
        if self.tflops is None and probe is not None:
            device = "cuda" if torch.cuda.is_available() else "cpu"
            times = measure_times(config, workload=work, instruction=_INSTRUCTION, device=device, **probe)
            flops = figures.env_step_flops / times.env_step
            layers = "one and up to four layers of each kind"
            source = f"Memory is simulated; times are extrapolated from {layers} on this {device}."
        else:
            flops = self.tflops * 1e12 if self.tflops is not None else measure_flops(work.dtype)
            times = Times(figures.step_flops / flops, figures.env_step_flops / flops)
            origin = "as given" if self.tflops is not None else "measured: bare matrix products on this CPU"
            source = f"Estimated, not measured; times at {flops / 1e12:.3g} TFLOP/s ({origin})."
        console.print(table(figures, work, times, rows=self.rows, flops=flops))
        console.print(source)

    def workload(self) -> tuple[Any, Workload, dict[str, Any] | None]:
        """Configuration of the model, the work to simulate, and what `measure_times` needs beside them, if it is there.

        Raises:
            ValueError: If the processor is not there to say how many tokens a prompt has, or an option has no use.
        """
        if (self.tokens is None) != (self.vision_tokens is None):
            raise ValueError(
                f"--tokens {self.tokens} with --vision-tokens {self.vision_tokens}: give both, or neither, to ask the "
                "processor"
            )
        options: dict[str, Any] = {option: getattr(self, option) for option in _STAGE_OPTIONS} | {
            "lora": LoRASettings(r=self.lora_rank, alpha=2 * self.lora_rank, top_layers=self.top_layers),
            "truncate_layers": self.truncate_layers,
            "dtype": getattr(torch, self.dtype),
        }
        name, size, prompt, patch = self.model, self.image_size, None, 16
        if name in PRESETS:
            preset = PRESETS[name][1]
            model, stage = preset.model, preset.train.stage2
            name, size, prompt = model.vlm, preset.env.image_size, model.prompt
            patch = model.patch_size
            own = {field.name: field.default for field in fields(self)}
            for option in ("lora_rank", "top_layers", "truncate_layers", "dtype", "image_size", *_STAGE_OPTIONS):
                if getattr(self, option) != own[option]:
                    raise ValueError(
                        f"preset {self.model!r} has a {option} of its own, so {getattr(self, option)} would be "
                        f"ignored; give --model its VLM, {model.vlm}, and the options that you want"
                    )
            if stage.scope == "all":
                raise ValueError(f"stage 2 of preset {self.model!r} trains the vision tower too; give --model its VLM")
            options |= {option: getattr(stage, option) for option in _STAGE_OPTIONS} | {
                "lora": LoRASettings(r=model.lora_rank, alpha=2 * model.lora_rank, top_layers=model.lora_top_layers),
                "truncate_layers": model.truncate_layers,
                "dtype": getattr(torch, model.dtype),
            }
        saved = EncoderSettings(source=name) if name == "small" else EncoderSettings.read(name)
        prompt = prompt or saved.prompt
        options["truncate_layers"] = options["truncate_layers"] or saved.truncate_layers
        if name == "small":
            encoder = small_vlm([_INSTRUCTION], image_size=size, patch_size=patch)
            config, tokens, vision, processor = (
                encoder.model.config,
                encoder.prompt_length([_INSTRUCTION]),
                encoder.vision_shape()[0],
                encoder.processor,
            )
        else:
            source = weights_of(saved, name)
            config, tokens, vision, processor = _prompt_size(
                source, size=size, prompt=prompt, known=self.tokens is not None
            )
        if self.tokens is not None and self.vision_tokens is not None:
            tokens, vision = self.tokens, self.vision_tokens
        probe = None if self.tokens is not None else {"processor": processor, "image_size": size, "prompt": prompt}
        return config, Workload(tokens=tokens, vision_tokens=vision, **options), probe


def _prompt_size(source: str, *, size: int, prompt: str, known: bool) -> tuple[Any, int, int, Any]:
    """Configuration of a model, and tokens and image tokens of some prompt, and processor, if not `known`."""
    transformers = loading.require_transformers()
    config = transformers.AutoConfig.from_pretrained(source)
    if known:
        return config, 0, 0, None
    try:
        processor = loading.load_processor(source, revision=None, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{source} has no processor to count tokens with; give --tokens and --vision-tokens"
        ) from error
    model_class = transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(config)]
    inputs = PromptInputs(
        processor,
        image_token_id=loading.image_token_id(config),
        prompt=prompt,
        accepted=frozenset(inspect.signature(model_class.forward).parameters),
    )
    ids = inputs.get(_INSTRUCTION, (size, size))["input_ids"][0]
    return config, len(ids), int((ids == loading.image_token_id(config)).sum()), processor


def table(figures: Figures, work: Workload, times: Times, *, rows: int, flops: float) -> Table:
    """What to print."""
    result = Table("", "", title=f"{figures.parameters / 1e6:,.0f} M weights, {figures.trainable / 1e6:,.2f} M learn")
    cache = figures.cache_row * rows
    for name, value in (
        ("weights", _size(figures.weights)),
        (f"optimiser ({work.optimizer})", _size(figures.optimizer)),
        (f"activations and gradients, {-(-work.batch_size // work.gradient_accumulation)} rows", _size(figures.step)),
        ("peak on the device", _size(figures.peak)),
        (f"cache of {rows:,} rows, in RAM or a file", f"{_size(cache)} ({_size(figures.cache_row)} each)"),
        ("to fill it", _time(figures.fill_flops * rows / flops)),
        (f"gradient step of {work.batch_size} rows", _time(times.gradient_step)),
        ("env step in stage 1, the VLM's part", _time(times.env_step)),
    ):
        result.add_row(name, value)
    return result


@torch.no_grad()
def measure_flops(dtype: torch.dtype, *, size: int = 1024, seconds: float = 0.5) -> float:
    """Operations per second of processor time of matrix products `[size, size]` on this CPU, with torch's threads."""
    left, right = (torch.randn(size, size).to(dtype) for _ in range(2))
    torch.matmul(left, right)
    start, products = time.process_time(), 0
    while time.process_time() - start < seconds or products < 2:
        torch.matmul(left, right)
        products += 1
    return 2 * size**3 * products / (time.process_time() - start) * torch.get_num_threads()


def _size(count: float) -> str:
    return f"{count / 1e9:,.2f} GB" if count >= 1e9 else f"{count / 1e6:,.2f} MB"


def _time(seconds: float) -> str:
    return f"{seconds / 3600:,.1f} h" if seconds > 7200 else f"{seconds:,.3g} s"
