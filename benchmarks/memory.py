"""Memory and time of supervised learning: what `vla_rl.estimate` says beside what a run takes.

    python benchmarks/memory.py                      every model, n = 3, into benchmarks/results/memory.json
    python benchmarks/memory.py --models small wide  some of them
    python benchmarks/memory.py --device cuda        the allocator's peak on a GPU instead of the process's memory
    python benchmarks/memory.py --models paligemma-3b blip2-opt-2.7b --rows 4   measures these too, with 4 rows a step

Each model runs in a process of its own, on random weights. On a CPU, memory is the resident set: before the model is
made, after it, and its highest mark (`VmHWM`) from the second gradient step on, when the optimiser's moments exist. The
rows of the cache are subtracted: they are a figure of their own. Time is processor time on one thread, which other
processes disturb less than the clock. The large models are estimated alone, for batches of 64, and their
measurements null. With --rows, LoRA on their top layers is measured as well, once, on weights in bfloat16: some 5
minutes and 9 GB of RAM.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

RESULTS = Path(__file__).parent / "results" / "memory.json"
INSTRUCTION = "open the drawer and put the red block inside"
LARGE = ("blip2-opt-2.7b", "paligemma-3b")
MODELS = ("small", "wide", "smolvlm-256m", *LARGE)
BATCH = {"small": 64, "wide": 32, "smolvlm-256m": 4, "blip2-opt-2.7b": 64, "paligemma-3b": 64}
TOP = {"small": 1, "wide": 2, "smolvlm-256m": 8, "blip2-opt-2.7b": 8, "paligemma-3b": 5}
TOKENS = {"blip2-opt-2.7b": (56, 32), "paligemma-3b": (276, 256)}


def cases(name: str) -> dict[str, dict[str, Any]]:
    """Ways to run stage 2, as fields of `Workload` and `SLConfig`."""
    from vla_rl.encoders import LoRASettings

    everywhere, top = LoRASettings(), LoRASettings(top_layers=TOP[name])
    found = {
        "LoRA on all layers": {"scope": "lora", "lora": everywhere},
        "LoRA on all layers, checkpointing": {"scope": "lora", "lora": everywhere, "gradient_checkpointing": True},
        "LoRA on all layers, 4 parts": {"scope": "lora", "lora": everywhere, "gradient_accumulation": 4},
        f"LoRA on the top {TOP[name]}": {"scope": "lora", "lora": top},
    }
    if name in LARGE:
        found |= {
            f"LoRA on the top {TOP[name]}, offload": {"scope": "lora", "lora": top, "offload": True},
            "text backbone, checkpointing, adamw8bit": {
                "scope": "text",
                "lora": everywhere,
                "gradient_checkpointing": True,
                "optimizer": "adamw8bit",
                "gradient_accumulation": 8,
            },
        }
    return found


def config_of(name: str) -> Any:
    """Configuration of a real-size model, from its published sizes."""
    import transformers

    if name == "smolvlm-256m":
        text = {"model_type": "llama", "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30}
        text |= {"num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49280}
        vision = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
        vision |= {"image_size": 512, "patch_size": 16}
        return transformers.SmolVLMConfig(text_config=text, vision_config=vision, scale_factor=4, image_token_id=49190)
    if name == "paligemma-3b":
        text = {"model_type": "gemma", "hidden_size": 2048, "intermediate_size": 16384, "num_hidden_layers": 18}
        text |= {"num_attention_heads": 8, "num_key_value_heads": 1, "head_dim": 256, "vocab_size": 257216}
        vision = {"model_type": "siglip_vision_model", "hidden_size": 1152, "intermediate_size": 4304}
        vision |= {"num_hidden_layers": 27, "num_attention_heads": 16, "patch_size": 14, "image_size": 224}
        vision |= {"projection_dim": 2048, "vision_use_head": False}
        sizes = {"hidden_size": 2048, "projection_dim": 2048}
        return transformers.PaliGemmaConfig(text_config=text, vision_config=vision, **sizes)
    text = {"model_type": "opt", "hidden_size": 2560, "word_embed_proj_dim": 2560, "ffn_dim": 10240}
    text |= {"num_hidden_layers": 32, "num_attention_heads": 32, "vocab_size": 50304}
    return transformers.Blip2Config(text_config=text, num_query_tokens=32)  # its vision and Q-Former are the defaults


def encoder_of(name: str) -> Any:
    """An encoder of random weights."""
    import torch

    from vla_rl.encoders import FrozenVLMEncoder, small_vlm

    half: dict[str, Any] = {"dtype": torch.bfloat16}
    if name == "small":
        return small_vlm([INSTRUCTION], **half)
    if name == "wide":
        return small_vlm([INSTRUCTION], width=512, vision_layers=4, text_layers=8, heads=8, **half)
    import transformers
    import transformers.models.smolvlm.processing_smolvlm as module
    from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

    from vla_rl.encoders.loading import without_video
    from vla_rl.encoders.small import train_tokenizer

    module.num2words = module.num2words or str  # spells out numbers of video frames, which there are none of
    specials = {"image_token": "<image>", "fake_image_token": "<fake_token_around_image>"}
    specials |= {"global_image_token": "<global-img>", "end_of_utterance_token": "<end_of_utterance>"}
    inner = train_tokenizer([INSTRUCTION]).backend_tokenizer
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", extra_special_tokens=specials
    )
    chat = "{% for c in messages[0]['content'] %}{{ '<image>' if c['type'] == 'image' else c['text'] }}{% endfor %}"
    edge = {"longest_edge": 512}
    processor = without_video(transformers.SmolVLMProcessor)(
        image_processor=SmolVLMImageProcessorPil(size=edge, max_image_size=edge, do_image_splitting=False),
        tokenizer=tokenizer,
        video_processor=None,
        image_seq_len=64,
        chat_template=chat,
    )
    config = config_of(name)
    config.image_token_id = tokenizer.convert_tokens_to_ids("<image>")
    torch.manual_seed(0)
    return FrozenVLMEncoder(transformers.SmolVLMForConditionalGeneration(config), processor, **half)


def large_encoder_of(name: str) -> Any:
    """An encoder of a published size, with a small tokenizer and random weights in bfloat16."""
    import torch
    import transformers

    from vla_rl.encoders import FrozenVLMEncoder, small_vlm

    if name == "paligemma-3b":
        tiny: dict[str, Any] = {"width": 32, "vision_layers": 1, "text_layers": 1, "heads": 2}
        processor = small_vlm([INSTRUCTION], image_size=224, patch_size=14, **tiny).processor
    else:
        sys.path.append(str(Path(__file__).parents[1] / "tests" / "encoders"))
        import families

        processor = families.blip("Blip2", "opt")[1]
        processor.image_processor.size = {"height": 224, "width": 224}
        processor.num_query_tokens = 32
    config = config_of(name)
    config.image_token_id = config.image_token_index = processor.tokenizer.convert_tokens_to_ids("<image>")
    torch.manual_seed(0)
    model = transformers.AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
    return FrozenVLMEncoder(model, processor, dtype=torch.bfloat16)


class Rows:
    """What `train_supervised` needs of a sampler: the same few random frames, over and over."""

    instructions = (INSTRUCTION,)

    def __init__(self, count: int, size: int) -> None:
        from vla_rl.data.sampler import Batch

        draw = np.random.default_rng(0)
        numbers = np.arange(count)
        self.num_rows = self.batch_size = count
        self.batch = Batch(
            images=draw.integers(0, 256, (count, size, size, 3), dtype=np.uint8),
            state=draw.normal(size=(count, 8)).astype(np.float32),
            actions=draw.normal(size=(count, 7)).astype(np.float32),
            task_id=np.zeros(count, np.int64),
            instructions=[INSTRUCTION] * count,
            store_index=np.zeros(count, np.int64),
            episode_index=numbers,
            step_index=numbers,
            row_id=numbers,
        )

    def draw(self) -> np.ndarray:
        """All rows' ids."""
        return self.batch.row_id

    def rows(self, ids: np.ndarray) -> Any:
        """Some rows."""
        values = {name: np.asarray(value)[ids] for name, value in vars(self.batch).items()}
        return replace(self.batch, **{**values, "instructions": [INSTRUCTION] * len(ids)})


class Meter:
    """Memory of this process, or of the GPU."""

    def __init__(self, device: str) -> None:
        self.device = device

    def now(self) -> int:
        """Bytes in use."""
        import torch

        gc.collect()
        if self.device == "cuda":
            return torch.cuda.memory_allocated()
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        return self._status("VmRSS")

    def restart(self) -> None:
        """Forget the highest mark."""
        import torch

        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        else:
            Path("/proc/self/clear_refs").write_text("5")

    def peak(self) -> int:
        """Highest mark since `restart`, bytes."""
        import torch

        return torch.cuda.max_memory_allocated() if self.device == "cuda" else self._status("VmHWM")

    @staticmethod
    def _status(name: str) -> int:
        line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
        return int(line.split()[1]) * 1024

    def clock(self) -> float:
        """Seconds."""
        import torch

        if self.device == "cuda":
            torch.cuda.synchronize()
            return time.perf_counter()
        return time.process_time()


def measure(name: str, *, device: str, repeats: int, rows: int | None) -> dict[str, Any]:
    """One model: every case, measured and estimated; runs in a process of its own."""
    import torch

    from vla_rl.estimate import Workload, estimate
    from vla_rl.estimate_cli import measure_flops
    from vla_rl.heads import GaussianHead
    from vla_rl.policy import VLAPolicy
    from vla_rl.sl.supervised import SLConfig, train_supervised

    torch.set_num_threads(1)
    flops = measure_flops(torch.bfloat16) if device == "cpu" else None
    result: dict[str, Any] = {"batch_size": BATCH[name], "flops": flops, "cases": {}}
    if name in LARGE and rows is None:
        for case, options in cases(name).items():
            tokens, vision = TOKENS[name]
            work = Workload(tokens=tokens, vision_tokens=vision, batch_size=BATCH[name], **options)
            figures = estimate(config_of(name), work)
            result["cases"][case] = {"estimate": {**asdict(figures), "peak": figures.peak}, "measured": None}
        return result
    batch = result["batch_size"] = rows if rows and name in LARGE else BATCH[name]
    size = {"smolvlm-256m": 512, **dict.fromkeys(LARGE, 224)}.get(name, 64)
    for case, options in cases(name).items():
        if name in LARGE and case != f"LoRA on the top {TOP[name]}":
            continue
        meter = Meter(device)
        measured: dict[str, list[float]] = {"weights": [], "peak": [], "step_s": [], "env_step_s": []}
        for attempt in range(1 if name in LARGE else repeats + 1):  # beside gigabytes, imports count for little
            if attempt == 1:  # the first one is for imports and other things that are loaded once
                measured = {key: [] for key in measured}
            before = meter.now()
            encoder = (large_encoder_of if name in LARGE else encoder_of)(name).to(device)
            if options["scope"] == "lora":
                encoder.add_lora(options["lora"])
            head = GaussianHead(encoder.feature_dim, 7, state_dim=8)
            policy = VLAPolicy(encoder, head).to(device)
            measured["weights"].append(meter.now() - before)
            data = Rows(batch, size)
            encoder.encode(data.batch.images[:1], [INSTRUCTION])
            start = meter.clock()
            encoder.encode(data.batch.images[:1], [INSTRUCTION])
            measured["env_step_s"].append(meter.clock() - start)
            work = Workload(
                tokens=encoder.prompt_length([INSTRUCTION]),
                vision_tokens=encoder.vision_shape()[0],
                batch_size=batch,
                **options,
            )
            fields = {field: value for field, value in options.items() if field != "lora"}
            config = SLConfig(steps=4, batch_size=batch, random_shift=0, **fields)
            marks: list[float] = []
            train_supervised(policy, data, config=config, on_step=_marker(meter, marks))  # type: ignore[arg-type]
            peak = meter.peak() - before
            figures = estimate(encoder.model.config, work)
            measured["peak"].append(peak - (figures.cache_row * batch if device == "cpu" else 0))
            measured["step_s"] += list(np.diff(marks))
            del encoder, head, policy
        result["cases"][case] = {"estimate": {**asdict(figures), "peak": figures.peak}, "measured": measured}
        print(
            name,
            case,
            f"{figures.peak / 1e6:.0f} MB estimated",
            [f"{v / 1e6:.0f}" for v in measured["peak"]],
            flush=True,
        )
    return result


def _marker(meter: Meter, marks: list[float]) -> Callable[[int, float], None]:
    def on_step(step: int, loss: float) -> None:
        if step == 0:
            meter.restart()
        marks.append(meter.clock())

    return on_step


def main() -> None:
    """Measure each model in a process of its own, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=MODELS, choices=MODELS)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rows", type=int, help="rows a step of the large models, to measure them as well")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        found = measure(args.one, device=args.device, repeats=args.repeats, rows=args.rows)
        args.out.write_text(json.dumps(found))
        return
    results = json.loads(args.out.read_text()) if args.out.is_file() else {}
    # Blocks of their own per tensor go back to the system when freed, so that the resident set is what is in use.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    for name in args.models:
        part = args.out.with_suffix(f".{name}.part")
        options = ["--one", name, "--device", args.device, "--repeats", str(args.repeats), "--out", str(part)]
        if args.rows:
            options += ["--rows", str(args.rows)]
        subprocess.run([sys.executable, __file__, *options], check=True, env=environment)
        rows = f", {args.rows} rows" if args.rows and name in LARGE else ""
        results[f"{name} {args.device}{rows}"] = json.loads(part.read_text())
        part.unlink()
        args.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
