"""`vla-rl sft`: one supervised stage from a saved policy to a saved policy, alone or under a launcher."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import tyro
from rich.console import Console
from rich.progress import Progress

from vla_rl.encoders.lora import LoRASettings
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

    def run(self, console: Console) -> None:
        """Train."""
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
            console.print(f"loss {loss:.4f} after {self.sl.steps} steps{where}; policy: {self.out}", soft_wrap=True)

    def _train(self, job: SupervisedJob, processes: Processes, *, console: Console) -> float:
        """Run the job with a progress bar."""
        with Progress(console=console, transient=True, disable=processes.process_index > 0) as progress:
            bar = progress.add_task("supervised", total=self.sl.steps)

            def on_step(step: int, loss: float) -> None:
                progress.update(bar, completed=step + 1, description=f"loss {loss:.4f}")

            return run_job(job, on_step=on_step, processes=processes)
