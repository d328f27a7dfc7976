"""Pretrain the ``tiny`` VLM from nothing: ``python benchmarks/tiny/pretrain.py --minutes 120`` (run again: resumes)."""

from __future__ import annotations

import json
import os
import platform
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import transformers
import tyro
from batches import Collator, Stream
from evaluate import evaluate
from generate import SHARD, start_workers, validation
from learner import Learner, Weights, autocast
from shards import Shard, load, saved
from texts import vocabulary_texts
from torch.utils.tensorboard import SummaryWriter

from vla_rl import FrozenVLMEncoder
from vla_rl.encoders import small_vlm


@dataclass
class Args:
    """Options of a run; a resumed run must have the same model and seed."""

    out: Path = Path("runs/tiny")
    """directory of data, checkpoint, logs and, at the end, the model"""
    minutes: float = 120.0
    """training time, without generation; the schedule is over this time"""
    steps: int | None = None
    """train for so many steps instead of a time"""
    samples: int = 200_000
    """pictures to generate before training; 0 if there are enough"""
    shard: int = SHARD
    """pictures in a shard"""
    workers: int = 2
    """processes that generate"""
    stream: bool = False
    """keep generating new shards while training, replacing the oldest; for machines with many cores"""
    device: Literal["cpu", "cuda"] = "cpu"
    threads: int = 2
    """threads of PyTorch on the CPU"""
    batch_size: int = 256
    learning_rate: float = 1e-3
    weight_decay: float = 0.05
    warmup: float = 0.04
    """share of the schedule in which the learning rate rises"""
    clip: float = 1.0
    """largest norm of the gradient"""
    image_size: int = 64
    patch_size: int = 16
    width: int = 192
    vision_layers: int = 4
    text_layers: int = 3
    heads: int = 6
    vocab_size: int = 1536
    weights: Weights = field(default_factory=Weights)
    seed: int = 0
    checkpoint_minutes: float = 4.0
    evaluate_minutes: float = 10.0
    evaluate_limit: int = 4000
    """texts per evaluation while training; the last one uses all"""


def build(args: Args) -> tuple[FrozenVLMEncoder, Learner]:
    """An untrained encoder, for its processor, and the learner around its model."""
    encoder = small_vlm(
        vocabulary_texts(),
        image_size=args.image_size,
        patch_size=args.patch_size,
        width=args.width,
        vision_layers=args.vision_layers,
        text_layers=args.text_layers,
        heads=args.heads,
        vocab_size=args.vocab_size,
        seed=args.seed,
    )
    encoder.model.requires_grad_(True).train()
    if args.device == "cpu":
        # PyTorch's fused attention takes half of a step on a CPU at this size: 140 samples/s against 270 without.
        encoder.model.set_attn_implementation("eager")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(args.seed)
        learner = Learner(encoder.model)
    return encoder, learner


def make_optimizer(learner: Learner, args: Args) -> torch.optim.AdamW:
    """AdamW that decays matrices alone."""
    matrices = [weight for weight in learner.parameters() if weight.requires_grad and weight.ndim > 1]
    others = [weight for weight in learner.parameters() if weight.requires_grad and weight.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": args.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=args.learning_rate, betas=(0.9, 0.98))


def one_cycle(progress: float, *, warmup: float) -> float:
    """Share of the peak learning rate after ``progress`` of the schedule: a linear rise, then a half cosine to 0."""
    if progress < warmup:
        return max(progress / warmup, 0.01)
    return 0.5 * (1 + float(np.cos(np.pi * min((progress - warmup) / (1 - warmup), 1.0))))


def train_step(
    learner: Learner, optimizer: torch.optim.Optimizer, batch: Any, args: Args, *, rate: float
) -> dict[str, torch.Tensor]:
    """One update at ``rate`` times the learning rate; returns the losses."""
    for group in optimizer.param_groups:
        group["lr"] = args.learning_rate * rate
    with autocast(args.device):
        loss, metrics = learner.losses(batch, args.weights)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    metrics["gradient_norm"] = torch.nn.utils.clip_grad_norm_(learner.parameters(), args.clip)
    if not torch.isfinite(metrics["gradient_norm"]):
        raise FloatingPointError("the gradient is not finite; lower --learning-rate and resume from the checkpoint")
    optimizer.step()
    return {"loss": loss.detach(), **metrics}


def save_checkpoint(path: Path, learner: Learner, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Write everything a run needs to go on, all or nothing."""
    temporary = path.with_suffix(".part")
    torch.save({"learner": learner.state_dict(), "optimizer": optimizer.state_dict(), **state}, temporary)
    os.replace(temporary, path)


def export(encoder: FrozenVLMEncoder, learner: Learner, directory: Path, card: dict[str, Any]) -> None:
    """Write model (float16), tokenizer and processor as a Hugging Face directory, and ``training.json`` beside them."""
    weights = {name: value.detach().cpu().half() for name, value in learner.model.state_dict().items()}
    weights.pop("lm_head.weight", None)
    directory.mkdir(parents=True, exist_ok=True)
    learner.model.save_pretrained(directory, state_dict=weights)
    encoder.processor.save_pretrained(directory)
    (directory / "training.json").write_text(json.dumps(card, indent=2) + "\n")


class Log:
    """Numbers of a run as lines of JSON, for TensorBoard and on the screen.

    Args:
        directory: where to; what is there is continued.
        batch_size: pictures per step.
    """

    def __init__(self, directory: Path, *, batch_size: int) -> None:
        self.board = SummaryWriter(str(directory / "tensorboard"))
        self.file = (directory / "metrics.jsonl").open("a")
        self.batch_size = batch_size

    def write(self, values: dict[str, float], *, step: int, seconds: float, show: bool = False) -> None:
        """Record values at a step."""
        row = {"step": step, "seconds": round(seconds, 1), "samples": step * self.batch_size, **values}
        self.file.write(json.dumps(row) + "\n")
        self.file.flush()
        for name, value in values.items():
            self.board.add_scalar(name, value, step)
        if show:
            line = " ".join(f"{name.rpartition('/')[2]} {value:.3f}" for name, value in values.items())
            print(f"{step} {seconds / 60:.1f} min {line}", flush=True)


def prepare(args: Args) -> tuple[dict[str, Shard], list[BaseProcess]]:
    """Draw the pictures that are missing; returns held-out shards by name, and the processes that go on drawing."""
    data, fewest = args.out / "data", -(-args.samples // args.shard)
    settings = {"workers": args.workers, "seed": args.seed, "count": args.shard, "size": args.image_size}
    if len(saved(data)) < fewest:
        workers = start_workers(data, stop=fewest, **settings)
        for worker in workers:
            worker.join()
        if any(worker.exitcode for worker in workers):
            raise RuntimeError("a worker that draws pictures failed; its error is above")
    held_out = {name: load(path) for name, path in validation(data, size=args.image_size, seed=args.seed).items()}
    if not args.stream:
        return held_out, []
    newest = max(int(path.stem.removeprefix("shard-")) for path in saved(data))
    keep = max(1, fewest // args.workers)
    return held_out, start_workers(data, stop=None, first=newest + 1, keep=keep, **settings)


class Run:
    """Model, optimiser and how far the training is; goes on from a checkpoint where there is one.

    Args:
        args: options of the run.
        held_out: shards for the evaluation, by name.
    """

    def __init__(self, args: Args, held_out: dict[str, Shard]) -> None:
        self.args, self.held_out = args, held_out
        self.encoder, self.learner = build(args)
        self.learner.to(args.device)
        self.optimizer = make_optimizer(self.learner, args)
        self.collator = Collator(self.encoder.processor)
        self.checkpoint = args.out / "checkpoint.pt"
        self.log = Log(args.out, batch_size=args.batch_size)
        self.step, self.seconds = 0, 0.0
        if self.checkpoint.exists():
            state = torch.load(self.checkpoint, map_location=args.device, weights_only=True)
            self.learner.load_state_dict(state["learner"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.step, self.seconds = state["step"], state["seconds"]
            print(f"resumed at step {self.step}, {self.seconds / 60:.1f} min", flush=True)

    @property
    def progress(self) -> float:
        """Share of the schedule that is done."""
        if self.args.steps is not None:
            return self.step / self.args.steps
        return self.seconds / (60 * self.args.minutes)

    def save(self) -> None:
        """Write the checkpoint."""
        save_checkpoint(self.checkpoint, self.learner, self.optimizer, {"step": self.step, "seconds": self.seconds})

    def test(self, limit: int | None) -> dict[str, Any]:
        """Evaluate on the held-out shards, with at most ``limit`` texts of each."""
        options = {"device": self.args.device, "limit": limit}
        results = {
            name: evaluate(self.learner, self.collator, shard, **options) for name, shard in self.held_out.items()
        }
        values = {
            f"{name}/{kind}_{what}": float(value)
            for name, kinds in results.items()
            for kind, scores in kinds.items()
            for what, value in scores.items()
            if what != "n"
        }
        self.log.write(values, step=self.step, seconds=self.seconds)
        return results

    def train(self) -> None:
        """Train to the end of the schedule; evaluation and checkpoints are not counted as training time."""
        args = self.args
        stream = Stream(args.out / "data", self.collator, batch_size=args.batch_size, seed=args.seed)
        saved_at = tested_at = self.seconds
        since = (self.step, self.seconds)
        with ThreadPoolExecutor(1) as reader:
            upcoming = reader.submit(stream.batch, self.step)
            while self.progress < 1.0:
                start = time.perf_counter()
                batch = upcoming.result().to(args.device)
                upcoming = reader.submit(stream.batch, self.step + 1)
                rate = one_cycle(self.progress, warmup=args.warmup)
                metrics = train_step(self.learner, self.optimizer, batch, args, rate=rate)
                self.step += 1
                self.seconds += time.perf_counter() - start
                if self.step % 20 == 0:
                    values = {f"train/{name}": float(value) for name, value in metrics.items()}
                    speed = (self.step - since[0]) * args.batch_size / max(self.seconds - since[1], 1e-9)
                    values["train/samples_per_second"] = speed
                    self.log.write(values, step=self.step, seconds=self.seconds, show=True)
                    since = (self.step, self.seconds)
                if self.seconds - tested_at > 60 * args.evaluate_minutes:
                    self.test(args.evaluate_limit)
                    tested_at = self.seconds
                if self.seconds - saved_at > 60 * args.checkpoint_minutes:
                    self.save()
                    saved_at = self.seconds
        self.save()


def main(args: Args) -> None:
    """Draw what is missing, train, evaluate, export."""
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    settings = json.loads(json.dumps(asdict(args), default=str))
    (args.out / "args.json").write_text(json.dumps(settings, indent=2) + "\n")
    held_out, drawing = prepare(args)
    try:
        run = Run(args, held_out)
        run.train()
    finally:
        for worker in drawing:
            worker.terminate()
    gpu = torch.cuda.get_device_name() if args.device == "cuda" else None
    card = {
        "args": {name: value for name, value in settings.items() if name != "out"},
        "steps": run.step,
        "samples_seen": run.step * args.batch_size,
        "pictures": len(saved(args.out / "data")) * args.shard,
        "training_seconds": round(run.seconds),
        "parameters": sum(weight.numel() for weight in run.learner.model.parameters()),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "machine": gpu or f"{args.threads} {platform.machine()} threads",
        "held_out": run.test(None),
    }
    export(run.encoder, run.learner, args.out / "model", card)
    print(json.dumps(card["held_out"], indent=1))
    print(f"model in {args.out / 'model'}")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
