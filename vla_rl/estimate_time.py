"""Seconds of a gradient step and an env step: a model cut to few layers is timed, and a layer's share multiplied."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from vla_rl.encoders import FrozenVLMEncoder
from vla_rl.encoders.loading import require_transformers
from vla_rl.estimate import Workload
from vla_rl.heads import GaussianHead

_MOST = 4  # layers: the more there are, the less the clock's errors are multiplied
_COUNTS = ("num_hidden_layers", "num_layers", "n_layer", "depth")


@dataclass(frozen=True)
class Times:
    """Seconds.

    Attributes:
        gradient_step: One gradient step from the cache: all parts of the batch, clipping and optimiser included.
        env_step: The VLM's part of one env step of one environment in stage 1, from frame to features.
    """

    gradient_step: float
    env_step: float


def measure_times(
    config: Any,
    processor: Any,
    workload: Workload,
    *,
    image_size: int,
    instruction: str,
    prompt: str = "{instruction}",
    device: torch.device | str = "cpu",
    action_dim: int = 7,
    state_dim: int = 8,
    repeats: int = 3,
) -> Times:
    """Time real steps of the model with one and four layers of text and vision, random weights, and extrapolate.

    Seconds are linear in the number of layers, all else (embeddings, projector, processor, head, optimiser) included in
    the smallest model. With one torch thread on a CPU it is processor time, which other processes disturb less.

    Args:
        config: Configuration of an image-text-to-text model of transformers.
        processor: Its processor.
        workload: What the step does; `tokens` and `vision_tokens` are not used, the prompt decides.
        image_size: Height and width of the frames.
        instruction: Of every row.
        prompt: Format string with `{instruction}`.
        device: Where to time.
        action_dim: Of the Gaussian head.
        state_dim: Of the Gaussian head.
        repeats: Least runs of each, of which the median counts.

    Raises:
        ValueError: The configuration does not say how many layers there are.
    """
    text, vision = _layers(config.get_text_config()), _layers(config.vision_config)
    if not text or not vision:
        raise ValueError(f"{type(config).__name__} does not say how many layers it has; measure it as a whole")
    text = min(text, workload.truncate_layers or text)
    top = min(workload.lora.top_layers or text, text) if workload.scope == "lora" else text
    below = int(top < text)  # one layer stands for those that do not run in a gradient step
    frames = torch.randint(0, 256, (workload.batch_size, image_size, image_size, 3), dtype=torch.uint8)

    nothing_kept = workload.scope == "text"

    def timed(text_layers: int, vision_layers: int, *, adapted: int) -> tuple[float, float]:
        nonlocal nothing_kept
        cut = copy.deepcopy(config)
        _cut(cut.get_text_config(), text_layers)
        _cut(cut.vision_config, vision_layers)
        encoder = FrozenVLMEncoder(_random_model(cut, device), processor, dtype=workload.dtype, prompt=prompt)
        if workload.scope == "lora":
            encoder.add_lora(replace(workload.lora, top_layers=adapted if below else None))
            encoder.to(device)
            nothing_kept = not encoder.frozen_layers and not encoder.supports_vision_cache
        encode = lambda: encoder.encode(frames[:1], [instruction])  # noqa: E731
        env_step = _median(encode, device, repeats=repeats)
        head = GaussianHead(encoder.feature_dim, action_dim, state_dim=state_dim).to(device)
        step = _gradient_step(encoder, head, workload, frames, instruction, device=device, repeats=repeats)
        return step, env_step

    def per_layer(more: tuple[float, float], count: int) -> list[float]:
        return [(b - a) / max(count - 1, 1) for a, b in zip(least, more, strict=True)]

    least = timed(1 + below, 1, adapted=1)
    texts, visions = min(text - below, _MOST), min(vision, _MOST)
    per_text = per_layer(timed(texts + below, 1, adapted=texts) if texts > 1 else least, texts)
    per_vision = per_layer(timed(1 + below, visions, adapted=1) if visions > 1 else least, visions)
    env_step = least[1] + max(per_text[1], 0.0) * (top - 1) + max(per_vision[1], 0.0) * (vision - 1)
    if below:  # layers without an adapter, which an env step runs too, are faster
        per_plain = per_layer(timed(texts + below, 1, adapted=1) if texts > 1 else least, texts)
        env_step += max(per_plain[1], 0.0) * (text - top - below)
    gradient_step = least[0] + max(per_text[0], 0.0) * (top - 1)
    if nothing_kept:  # the tower runs in every step
        gradient_step += max(per_vision[0], 0.0) * (vision - 1)
    return Times(gradient_step, env_step)


def _gradient_step(
    encoder: FrozenVLMEncoder,
    head: GaussianHead,
    work: Workload,
    frames: Tensor,
    instruction: str,
    *,
    device: torch.device | str,
    repeats: int,
) -> float:
    """Seconds of a step like those of `train_supervised`, from what it would keep."""
    parts = list(frames.split(-(-len(frames) // work.gradient_accumulation)))
    texts = [[instruction] * len(part) for part in parts]
    name, keep = "", None
    if work.scope == "lora" and encoder.frozen_layers:
        name, keep = "lower", encoder.encode_lower
    elif work.scope == "lora" and encoder.supports_vision_cache:
        name, keep = "vision", lambda images, _: encoder.encode_vision(images)
    kept = [keep(part, text) for part, text in zip(parts, texts, strict=True)] if keep else parts
    features = [encoder.encode(part, text) for part, text in zip(parts, texts, strict=True)]
    state = torch.zeros(len(frames), head.config()["state_dim"], device=device)
    actions = torch.zeros(len(frames), head.config()["action_dim"], device=device)

    def run(weights: list[nn.Parameter]) -> float:
        groups = [{"params": [*weights, *head.parameters()]}]
        optimizer = torch.optim.AdamW(groups)

        def step() -> None:
            optimizer.zero_grad(set_to_none=True)
            for i, text in enumerate(texts):
                if work.scope == "head":
                    seen = features[i]
                elif name:
                    seen = encoder.forward(None, text, **{name: kept[i]})
                else:
                    seen = encoder.forward(parts[i], text)
                loss = head.supervised_loss(seen, state[: len(text)], actions[: len(text)])
                (loss * (len(text) / len(frames))).backward()
            nn.utils.clip_grad_norm_(groups[0]["params"], 1.0)
            optimizer.step()

        return _median(step, device, repeats=repeats)

    if work.scope == "head":
        return run([])
    with encoder.trainable(work.scope, checkpointing=work.gradient_checkpointing) as weights:
        return run(weights)


def _median(work: Callable[[], object], device: torch.device | str, *, repeats: int) -> float:
    """Median seconds of some runs, after one that does not count; short ones run more often, for half a second."""
    times: list[float] = []
    work()
    while len(times) < repeats or (sum(times) < 0.5 and len(times) < 10 * repeats):
        start = _clock(device)
        work()
        times.append(_clock(device) - start)
    return statistics.median(times)


def _clock(device: torch.device | str) -> float:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
    elif torch.get_num_threads() == 1:
        return time.process_time()
    return time.perf_counter()


def _random_model(config: Any, device: torch.device | str) -> Any:
    transformers = require_transformers()
    with torch.random.fork_rng(devices=[]), torch.device(device):
        torch.manual_seed(0)
        return transformers.AutoModelForImageTextToText.from_config(config)


def _layers(config: Any) -> int:
    """Number of layers that a configuration names; 0 if it names none."""
    found = [getattr(config, name, None) for name in _COUNTS]
    return next((count for count in found if isinstance(count, int)), 0)


def _cut(config: Any, count: int) -> None:
    """Leave so many layers, in everything that the configuration lists by layer."""
    total = _layers(config)
    for name, value in list(vars(config).items()):
        if name in _COUNTS and value == total:
            setattr(config, name, count)
        elif isinstance(value, (list, tuple)) and len(value) == total and "layer" in name:
            setattr(config, name, value[:count])
