"""A worker's share of a rollout: policy, some of the environments, and the collector over them. It knows no Ray."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor

from vla_rl.data.episode import Episode
from vla_rl.encoders.features import Features
from vla_rl.heads.base import ActionHead
from vla_rl.integrations.ray_policy import Adaptation, Base, load_base
from vla_rl.policy import VLAPolicy
from vla_rl.rl.rollout import RolloutCollector

MakeEnvs = Callable[[int], gym.vector.VectorEnv]
"""Number of environments -> vector env in the observation convention."""


class NoiseByEnv:
    """Exploration noise that depends on seed, environment and episode alone, not on what other environments do.

    As `draw_noise` of a `RolloutCollector` it gives the same noise however the environments are split among workers.
    A head that draws anew at every step (`draw_noise` gives None) does so from torch's global generator all the same.

    Args:
        head: whose noise is drawn.
        seed: of the run.
        first: number of the first environment.
        restarts: another number gives other noise.
    """

    def __init__(self, head: ActionHead, *, seed: int, first: int = 0, restarts: int = 0):
        self._head, self._seed, self._first, self._restarts = head, seed, first, restarts
        self._draws: Counter[int] = Counter()

    def __call__(self, envs: Sequence[int]) -> Tensor | None:
        """Noise of the next episodes of these environments, counted from the first; None from heads that hold none."""
        drawn = [self._draw(self._first + env) for env in envs]
        tensors = [noise for noise in drawn if noise is not None]
        return torch.cat(tensors) if tensors else None

    def _draw(self, env: int) -> Tensor | None:
        seed = mixed_seed(self._seed, self._restarts, env, self._draws[env])
        self._draws[env] += 1
        device = next((weight.device for weight in self._head.parameters()), torch.device("cpu"))
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            return self._head.draw_noise(1)


def mixed_seed(*numbers: int) -> int:
    """A seed from several numbers, below 2^63."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)


@dataclass(frozen=True)
class Share:
    """Which environments of a stage 1 a worker has, and what its episodes are labelled with.

    Attributes:
        seed: of the stage; environment i of all is reset with seed + i.
        first: number of the worker's first environment among all.
        num_envs: how many it has.
        restarts: how often the worker was replaced; other seeds then.
        task: label.
        policy_version: label.
        iteration: label.
    """

    seed: int
    first: int
    num_envs: int
    restarts: int
    task: str
    policy_version: str
    iteration: int


@dataclass
class Reply:
    """What a request brought: rows of `RolloutCollector.steps` as arrays, and where the worker stands.

    A row's `tokens` and `mask` replace its `features`, `episodes` are those that ended in it, and `step` counts the
    steps of its environments within the request.
    """

    version: int
    rows: list[dict[str, Any]]
    tokens: np.ndarray | None
    mask: np.ndarray | None
    state: np.ndarray | None
    fingerprint: str
    running: list[int]
    table: tuple[str, ...]
    forwards: int
    frames: int
    seconds: dict[str, float]


class RolloutWorker:
    """Collects with its share of the environments; nothing heavy is built before `begin`.

    Every method takes the version of the head, and its weights, which are loaded where the version is another than the
    last one.
    """

    def __init__(self, base: Base, make_envs: MakeEnvs, device: str):
        self._base: Base | None = base
        self._make_envs, self._device = make_envs, device
        self._version = -1
        self._ended: list[Episode] = []
        self._env: gym.vector.VectorEnv | None = None

    def begin(self, version: int, head: Mapping[str, Tensor], adaptation: Adaptation, share: Share) -> Reply:
        """Take over LoRA and head, and reset the environments."""
        torch.set_num_threads(1)
        if self._base is not None:
            self.policy: VLAPolicy = load_base(self._base, self._device)
            self._base = None
        if self._env is None:
            self._env = self._make_envs(share.num_envs)
        if self._env.num_envs != share.num_envs:
            raise ValueError(
                f"make_envs({share.num_envs}) gave a vector environment of {self._env.num_envs}; return as many "
                "environments as it is asked for"
            )
        adaptation.apply(self.policy)
        self.policy.train(False)
        self._take_over(version, head)
        seed = share.seed + share.first
        if share.restarts:
            seed = mixed_seed(share.seed, share.first, share.restarts) >> 32
        torch.manual_seed(seed)
        self._ended.clear()
        self.collector = RolloutCollector(
            self.policy,
            self._env,
            task=share.task,
            on_episode=self._ended.append,
            seed=seed,
            policy_version=share.policy_version,
            iteration=share.iteration,
            draw_noise=NoiseByEnv(self.policy.head, seed=share.seed, first=share.first, restarts=share.restarts),
        )
        self._forwards, self._frames = self.policy.encoder.num_forwards, self.policy.encoder.num_frames
        return self._reply([], current=False)

    def redraw_noise(self, version: int, head: Mapping[str, Tensor]) -> Reply:
        """Draw the exploration noise anew."""
        self._take_over(version, head)
        self.collector.redraw_noise()
        return self._reply([])

    def collect(self, version: int, head: Mapping[str, Tensor], num_steps: int, keep_images: bool) -> Reply:
        """Step every environment `num_steps` times."""
        self._take_over(version, head)
        steps = self.collector.steps(num_steps, keep_images=keep_images)
        return self._reply([_packed(row) for row in self._numbered(steps)])

    def collect_episodes(self, version: int, head: Mapping[str, Tensor], num_episodes: int) -> Reply:
        """Finish `num_episodes`, the same number in every environment; rows hold nothing but them and the counts."""
        self._take_over(version, head)
        kept = ("step", "envs", "counted", "episodes")
        rows = self._numbered(self.collector.episode_steps(num_episodes))
        return self._reply([{key: row[key] for key in kept} for row in rows], current=False)

    def look(self, version: int, head: Mapping[str, Tensor]) -> Reply:
        """Encode the current observations."""
        self._take_over(version, head)
        return self._reply([])

    def close(self) -> None:
        """Close the environments."""
        if self._env is not None:
            self._env.close()

    def _take_over(self, version: int, head: Mapping[str, Tensor]) -> None:
        if version != self._version:
            self.policy.head.load_state_dict(dict(head))
            self._version = version

    def _numbered(self, rows: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """Rows with their `step` and the `episodes` that ended in them."""
        steps: Counter[int] = Counter()
        for row in rows:
            group = row["envs"].start
            yield row | {"step": steps[group], "episodes": list(self._ended)}
            steps[group] += 1
            self._ended.clear()

    def _reply(self, rows: list[dict[str, Any]], *, current: bool = True) -> Reply:
        features, state = self.collector.current() if current else (None, None)
        encoder, seconds = self.policy.encoder, dict(self.collector.watch.seconds)
        self.collector.watch.seconds.clear()
        forwards, frames = encoder.num_forwards - self._forwards, encoder.num_frames - self._frames
        self._forwards, self._frames = encoder.num_forwards, encoder.num_frames
        return Reply(
            version=self._version,
            rows=rows,
            tokens=None if features is None else to_array(features.tokens),
            mask=None if features is None else to_array(features.mask),
            state=None if state is None else to_array(state),
            fingerprint=encoder.fingerprint,
            running=self.collector.running_lengths,
            table=self.collector.table,
            forwards=forwards,
            frames=frames,
            seconds=seconds,
        )


def _packed(row: dict[str, Any]) -> dict[str, Any]:
    features: Features = row["features"]
    tensors = {"tokens": features.tokens, "mask": features.mask, "state": row["state"], "actions": row["actions"]}
    arrays = {name: None if value is None else to_array(value) for name, value in tensors.items()}
    return {key: value for key, value in row.items() if key != "features"} | arrays


def to_array(tensor: Tensor) -> np.ndarray:
    """The tensor as an array, which Ray's store hands over without copying; bfloat16 as the int16 of the same bits."""
    tensor = tensor.detach().cpu()
    return (tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


def to_tensor(array: np.ndarray, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """The reverse of `to_array`; `dtype` torch.bfloat16 if it was that. On a CPU it shares the array's memory."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # arrays of the store are read-only; nothing here writes to them
        tensor = torch.from_numpy(array)
    return (tensor.view(torch.bfloat16) if dtype == torch.bfloat16 else tensor).to(device)
