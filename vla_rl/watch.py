"""RunWatch: the guards of a run that need its directory, its expert data or its earlier evaluations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from rich.console import Console

from vla_rl.data.statistics import action_range
from vla_rl.data.store import EpisodeStore
from vla_rl.evaluation import EvaluationResult
from vla_rl.guards import GuardConfig, PictureError, below_start, blank_problem, never_succeeded, orientation_problem
from vla_rl.policy import stack_cameras
from vla_rl.rl.practice import Stage1Result
from vla_rl.rundir import RunDirectory

FAR = 1.5
"""Expert actions beyond this are noted: policies act in [-1, 1], and an expert may ask for a little more."""


class RunWatch:
    """Notes what guards find, in the results and on the console, and decides on rolling back.

    Args:
        run_dir: of the run.
        config: thresholds.
        expert: expert data, for its pictures.
        console: where to print.
    """

    def __init__(
        self, run_dir: RunDirectory, *, config: GuardConfig, expert: Sequence[EpisodeStore], console: Console
    ) -> None:
        self.run_dir, self.config, self.expert, self.console = run_dir, config, expert, console

    def note(self, guard: str, message: str, *, phase: str, **more: str) -> None:
        """Put a finding into the results' list `guards`, and print it."""
        self.run_dir.add_guard({"guard": guard, "phase": phase, "message": message, **more})
        self.console.print(f"  {phase}: {message}", style="yellow", markup=False)

    def check_expert_images(self) -> None:
        """Raise PictureError if the expert data's first frames are all of one colour."""
        if (problem := blank_problem(first_frames(self.expert), whose="the expert data")) is not None:
            raise PictureError(problem)

    def check_expert_steps(self) -> None:
        """Note expert actions far outside [-1, 1], where policies act, and failures among the expert episodes."""
        actions = np.concatenate([action_range(store).ravel() for store in self.expert if len(store)])
        if np.abs(actions).max() > FAR:
            self.note(
                "expert_actions",
                f"the expert data's actions reach from {actions.min():.3g} to {actions.max():.3g}, and policies act in "
                "[-1, 1]: what is beyond is cut off; scale them as the env's actions are scaled",
                phase="the start",
            )
        successes = [info.success for store in self.expert for info in store.index]
        if 0 < sum(successes) < len(successes):
            self.note(
                "expert_failures",
                f"{len(successes) - sum(successes)} of {len(successes)} expert episodes are no successes and imitated "
                "like the others; `vla-rl data filter --where success` leaves them out",
                phase="the start",
            )

    def check_env_images(self, obs: Mapping[str, np.ndarray], *, whose: str, phase: str) -> None:
        """Look at observations after a reset; compare them with the expert data in the first evaluation.

        (Later ones would say the same again, and a resumed run would say it in another phase.)

        Raises:
            PictureError: they are all of one colour, or no uint8 [B, H, W, 3].
        """
        images = _one_camera(stack_cameras(obs))
        if images.dtype != np.uint8 or images.shape[-1] != 3:
            raise PictureError(
                f"the images of {whose} are {images.dtype} {list(images.shape[1:])}, expected uint8 [H, W, 3]; wrap "
                "the env in vla_rl.envs.VLAObservation, which converts them"
            )
        if (problem := blank_problem(images, whose=whose)) is not None:
            raise PictureError(problem)
        if phase != "eval-stage0":
            return
        if (problem := orientation_problem(first_frames(self.expert), images)) is not None:
            self.note("orientation", problem, phase=phase)

    def check_stage1(self, result: Stage1Result, *, task: str, phase: str, learns: bool) -> None:
        """Note a stage 1 without a success, and one that was to learn (not only to collect) and never came to it."""
        if not result.successes:
            few = f"none of {result.num_episodes} noisy episodes on {task!r} succeeded"
            if not result.num_episodes:
                few = f"no episode on {task!r} ended within {result.num_env_steps:,} env steps"
            self.note("no_success", f"{few}; stage 2 gets nothing from it", phase=phase)
        if learns and not result.num_actor_updates:
            self.note(
                "no_actor_update",
                f"the actor was not updated once in {result.num_env_steps:,} env steps: raise total_timesteps, or "
                "lower what comes first (critic_warmup_updates, or SACfD's learning_starts and num_demos)",
                phase=phase,
            )

    def rollback(self, label: str, outcome: Mapping[str, EvaluationResult]) -> str | None:
        """Look at a new evaluation; the best checkpoint if the latest ones all lie below the one after SFT."""
        if (problem := never_succeeded(outcome)) is not None:
            self.note("never_succeeded", problem, phase=label)
        done = self._evaluations()
        if not done or "rl" not in outcome:
            return None
        noted = self.run_dir.read_results().get("guards", [])
        turned = [entry["phase"] for entry in noted if entry["guard"] == "rollback"]
        since = max((k + 1 for k, entry in enumerate(done) if entry[0] in turned), default=1)
        start, now = done[0][2], outcome["rl"]
        best, checkpoint, result = max(done, key=lambda entry: entry[2].mean)
        history = [start, *(entry[2] for entry in done[since:]), now]
        if checkpoint is None or not below_start(history, patience=self.config.rollback_after):
            return None
        self.note(
            "rollback",
            f"the RL tasks' success ({now.mean:.2f}) lay below that after stage 0 ({start.mean:.2f}) in "
            f"{self.config.rollback_after} evaluations in a row; going on from the weights of {best} "
            f"({result.mean:.2f}), in {checkpoint}",
            phase=label,
            evaluation=best,
        )
        return checkpoint

    def best_checkpoint(self) -> str | None:
        """The checkpoint with the highest success on the RL tasks so far."""
        done = self._evaluations()
        return max(done, key=lambda entry: entry[2].mean)[1] if done else None

    def _evaluations(self) -> list[tuple[str, str | None, EvaluationResult]]:
        """Label, checkpoint and result on the RL tasks of every finished evaluation, in order."""
        results, state = self.run_dir.read_results(), self.run_dir.state
        found = []
        for phase, checkpoint, before in zip(
            state["done"], state["after"], [None, *state["after"]][: len(state["done"])], strict=True
        ):
            label = phase.replace("-eval", "-after-stage") if "-eval" in phase else phase.replace("eval-", "after-")
            if label != phase and "rl" in results.get(label, {}):
                # An evaluation that ended in a rollback says nothing of the checkpoint that it went back to.
                found.append((label, before or checkpoint, EvaluationResult.from_dict(results[label]["rl"])))
        return found


def first_frames(stores: Sequence[EpisodeStore], *, count: int = 16) -> np.ndarray:
    """uint8 [N, H, W, 3]: first frames of up to `count` episodes of every store, of the first camera."""
    frames = [
        _one_camera(stack_cameras(store.read_steps(i, [0])[0]))
        for store in stores
        for i in np.linspace(0, len(store) - 1, min(count, len(store))).astype(int)
    ]
    return np.concatenate(frames)


def _one_camera(images: np.ndarray) -> np.ndarray:
    """[B, H, W, 3] from [B, H, W, 3] or, for several cameras, [B, N, H, W, 3]."""
    return images if images.ndim == 4 else images[:, 0]
