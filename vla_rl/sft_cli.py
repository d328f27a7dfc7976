"""`vla-rl sft`: one supervised stage from a saved policy to a saved policy, alone or under a launcher."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import tyro
from rich.console import Console
from rich.progress import Progress

from vla_rl.cost import config_lines
from vla_rl.data import EpisodeStore
from vla_rl.encoders.lora import LoRASettings
from vla_rl.policy import policy_directory
from vla_rl.preemption import EXIT_CODE, PreemptedError, stop_on_sigterm
from vla_rl.sl.job import SupervisedJob, run_job
from vla_rl.sl.processes import Processes, start_processes
from vla_rl.sl.supervised import SLConfig


@dataclass
class Sft:
    """Supervised learning of a saved policy on episode stores, in as many processes as torchrun starts.

    Example: vla-rl sft runs/first/checkpoints/stage0 --data demos --out taught
    """

    policy: tyro.conf.Positional[str]
    """directory written by save_pretrained (a run's checkpoints/<phase>), or a hub id"""
    data: tuple[Path, ...]
    """directories of episode stores"""
    out: Path
    """directory for the trained policy; it must not exist"""
    seed: int = 0
    """of batches, augmentation and a fresh adapter"""
    lora_rank: int = 16
    """rank of the LoRA weights that scope "lora" adds to a policy without any; 0 for none"""
    sl: SLConfig = field(default_factory=SLConfig)
    """hyperparameters"""
    dry_run: bool = False
    """check what is given, print the configuration and what it will cost, and stop"""

    def run(self, console: Console) -> None:
        """Train."""
        if self.dry_run:
            self._dry_run(console)
            return
        job = SupervisedJob(
            policy=self.policy,
            data=[str(path) for path in self.data],
            out=str(self.out),
            config=self.sl,
            seed=self.seed,
            data_seed=self.seed,
            lora=LoRASettings(r=self.lora_rank, alpha=2 * self.lora_rank) if self.lora_rank else None,
        )
        processes = start_processes()
        try:
            with stop_on_sigterm():
                loss = self._train(job, processes, console=console)
        except PreemptedError:
            if processes.process_index == 0:
                kept = job.snapshot_folder if job.snapshot_folder.is_dir() else "the beginning"
                console.print(f"SIGTERM: the same command goes on from {kept} (exit code {EXIT_CODE})", soft_wrap=True)
            raise
        if processes.process_index == 0:
            number = processes.num_processes
            where = f" in {number} processes" if number > 1 else ""
            where += " with FSDP2" if processes.is_fsdp2 else ""
            console.print(f"loss {loss:.4f} after {self.sl.steps} steps{where}; policy: {self.out}", soft_wrap=True)

    def _train(self, job: SupervisedJob, processes: Processes, *, console: Console) -> float:
        """Run the job with a progress bar."""
        with Progress(console=console, transient=True, disable=processes.process_index > 0) as progress:
            bar = progress.add_task("supervised", total=self.sl.steps)

            def on_step(step: int, loss: float) -> None:
                progress.update(bar, completed=step + 1, description=f"loss {loss:.4f}")

            return run_job(job, on_step=on_step, processes=processes)

    def _dry_run(self, console: Console) -> None:
        if self.out.exists():
            raise FileExistsError(f"{self.out} exists; give a new directory for the trained policy")
        if Path(self.policy).is_dir() or self.policy.count("/") != 1:  # what may be on the hub is not fetched
            policy_directory(self.policy)
        episodes = steps = 0
        for path in self.data:
            with EpisodeStore(path, mode="r") as store:
                episodes, steps = episodes + len(store), steps + store.total_steps
        samples = self.sl.steps * self.sl.batch_size
        for line in (
            *config_lines(self),
            "",
            f"{episodes:,} episodes with {steps:,} steps to learn from",
            f"{self.sl.steps:,} gradient steps, {samples:,} samples: {samples / max(steps, 1):.1f} passes over them",
            "minutes and memory: `vla-rl estimate` computes those of a step",
        ):
            console.print(line, markup=False, highlight=False, soft_wrap=not console.is_terminal)
