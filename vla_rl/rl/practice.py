"""What every stage 1 counts and finds, whatever it learns by, and how it goes on from a snapshot."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from vla_rl.data.episode import Episode
from vla_rl.policy import VLAPolicy
from vla_rl.rl.exploration import ExplorationConfig
from vla_rl.rl.rollout import RolloutCollector
from vla_rl.rl.snapshots import StageSnapshots, State, in_pieces, random_state, set_random_state
from vla_rl.timing import Stopwatch


@dataclass
class Stage1Result:
    """What a stage 1 did."""

    successes: list[Episode]
    num_env_steps: int
    num_episodes: int
    num_vlm_frames: int
    converged: bool
    first_success_rate: float
    last_success_rate: float
    num_actor_updates: int = 0


class EpisodeRecord:
    """Success and length of every episode, and the latest successes whole."""

    def __init__(self, max_successes: int):
        self.outcomes: list[tuple[bool, int]] = []
        self.successes: deque[Episode] = deque(maxlen=max_successes)

    def __call__(self, episode: Episode) -> None:
        """Take note of a finished episode."""
        self.outcomes.append((episode.success, episode.total_steps))
        if episode.success:
            self.successes.append(episode)

    def state_dict(self) -> State:
        """Everything noted so far, but for the successes themselves."""
        return {"outcomes": list(self.outcomes)}

    def load_state_dict(self, state: State, successes: Iterable[State]) -> None:
        """Take over what `state_dict` and `in_pieces` of the successes gave."""
        self.outcomes = [(success, length) for success, length in state["outcomes"]]
        for piece in successes:
            self.successes.extendleft(Episode(**fields) for fields in piece["episodes"])


class Practice:
    """What every stage 1 counts and finds, whatever it learns by.

    Args:
        policy: acts.
        env: vector env.
        collector: steps it.
        record: of the episodes.
        frames: how many the encoder had seen before.
        curriculum: whether the environments are in `StartCurriculum`.

    Attributes:
        watch: seconds in rollouts and updates.
        rates: noisy success, update by update.
        converged: whether these are high enough.
    """

    def __init__(
        self,
        policy: VLAPolicy,
        env: Any,
        *,
        collector: RolloutCollector,
        record: EpisodeRecord,
        frames: int,
        curriculum: bool = False,
    ):
        self.policy, self.env, self.collector, self.record, self.frames = policy, env, collector, record, frames
        self.curriculum = curriculum
        self.watch = Stopwatch()
        self.rates: list[float] = []
        self.converged = False
        self._restarts, self._progress = 0, None
        self.look()

    def look(self) -> None:
        """Ask the environments how far their curricula are, while none is in a step.

        Those of a worker that was started again know nothing of it, and are told what was seen last; so are all others.
        """
        if not self.curriculum:
            return
        restarts = getattr(self.env, "num_restarts", 0)
        if restarts > self._restarts and self._progress is not None:
            self.env.set_attr("progress", self._progress)
        try:
            self._restarts, self._progress = restarts, list(self.env.get_attr("progress"))
        except AttributeError as error:
            raise ValueError(
                "start_curriculum=True, but the environments have no `progress`; wrap each in "
                "vla_rl.curriculum.StartCurriculum, or set start_curriculum=False"
            ) from error

    def state_dict(self) -> State:
        """All of it but the episodes that are running, with the curricula as last seen."""
        return {
            "head": self.policy.head.state_dict(),
            "collector": self.collector.state_dict(),
            "record": self.record.state_dict(),
            "curriculum": self._progress,
            "seconds": dict(self.watch.seconds),
            "rates": list(self.rates),
            "converged": self.converged,
            "frames": self.policy.encoder.num_frames - self.frames,
            "random": random_state(),
            "pieces": {"successes": in_pieces(self.record.successes)},
        }

    def load_state_dict(self, state: State) -> None:
        """Go on from where `state_dict` was taken, with new episodes; curricula are set by `go_on`."""
        self.policy.head.load_state_dict(state["head"])
        self.collector.load_state_dict(state["collector"])
        self.record.load_state_dict(state["record"], state["pieces"]["successes"])
        self.watch.seconds.update(state["seconds"])
        self.rates[:], self.converged = state["rates"], state["converged"]
        self.frames -= state["frames"]
        set_random_state(state["random"])
        self.collector.redraw_noise()

    def dropped(self, state: State) -> State:
        """What is lost by going on from a state: episodes, with those that are running, and env steps since then."""
        ended = len(self.record.outcomes) - len(state["record"]["outcomes"])
        return {
            "episodes": ended + sum(length > 0 for length in self.collector.running_lengths),
            "steps": self.collector.num_env_steps - state["collector"]["num_env_steps"],
        }

    def result(self, *, num_actor_updates: int = 0) -> Stage1Result:
        """What the stage did."""
        return Stage1Result(
            list(self.record.successes),
            self.collector.num_env_steps,
            len(self.record.outcomes),
            self.policy.encoder.num_frames - self.frames,
            converged=self.converged,
            first_success_rate=self.rates[0] if self.rates else float("nan"),
            last_success_rate=self.rates[-1] if self.rates else float("nan"),
            num_actor_updates=num_actor_updates,
        )


def go_on(snapshots: StageSnapshots, env: Any, exploration: ExplorationConfig | None) -> tuple[State | None, bool]:
    """The state to go on from, if there is one, with the environments' curricula set to it; and whether they have one.

    (Those of Ray's workers cannot be asked and are left alone.) To be called before the environments are reset.
    """
    curriculum = exploration is not None and exploration.start_curriculum and hasattr(env, "get_attr")
    state = snapshots.load()
    if state is not None and curriculum:
        env.set_attr("progress", state["curriculum"])
    return state, curriculum
