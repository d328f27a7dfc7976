"""Stage 1 of iRe-VLA on one robot that cannot be sped up: here a process of its own behind a clock, with latency.

python examples/integrations/real_robot.py --out runs/robot
python examples/integrations/real_robot.py --out runs/robot --terminal    (you say when an episode begins and ends)

`SimulatedRobot` stands for the driver of a robot: replace it by your own Gymnasium environment and `Person` by
yourself, and keep `wrapped`. The robot never waits: it moves on while the policy thinks, obeys a command only after a
delay, stops by itself when commands fail to come, and shows pictures that are already old.
"""

from __future__ import annotations

import json
import multiprocessing
import time
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

import gymnasium as gym
import numpy as np
import torch
import tyro
from gymnasium import spaces
from vla_rl_envs.toy import ToyEnv

from vla_rl import EpisodeStore, GaussianHead, VLAPolicy
from vla_rl.collect import run_expert
from vla_rl.data import BalancedSampler, compute_statistics
from vla_rl.encoders import small_vlm
from vla_rl.envs import VLAObservation
from vla_rl.robot import (
    ControlRate,
    EarlyStop,
    ManualReset,
    Operator,
    Pause,
    RecordEpisodes,
    SafetyLimits,
    SuccessDetector,
    SuccessSignal,
    evaluate_on_robot,
    robot_settings,
    train_on_robot,
)
from vla_rl.sl.supervised import SLConfig, train_supervised

SENTENCE = "reach the red square"
PLACES = {"original": (0.4, 0.4), "new": (0.1, 0.4)}


@dataclass
class Args:
    """Settings of the robot and of learning."""

    out: Path
    """folder for episodes, head and figures; the same one again continues"""
    hz: float = 10.0
    """control steps per second"""
    latency: float = 0.03
    """seconds until a command is obeyed, and again until a picture is seen"""
    jitter: float = 0.02
    """at most so much more, at random"""
    horizon: int = 20
    """control steps in an episode, at most"""
    total_timesteps: int = 2_500
    """control steps of learning"""
    learning_starts: int = 1_000
    """of these, at most, before learning starts"""
    sft_steps: int = 150
    """supervised steps of stage 0"""
    eval_episodes: int = 30
    """episodes of the deterministic policy before and after"""
    judge: Literal["person", "classifier"] = "person"
    """who says that the task is solved; the classifier learns from what the person said of the first evaluation"""
    terminal: bool = False
    """ask for resets at the terminal, and listen to p, f, s and q while the robot moves"""
    seed: int = 0
    """of everything but the clock"""


class Scene(ToyEnv):
    """The toy's field with the red square in one place: where the demonstrations had it, or where it now lies."""

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Put the dot anywhere but on the square."""
        _, info = super().reset(seed=seed, options=options)
        self._squares = np.array([PLACES[self.variant], (-0.8, -0.8), (0.8, -0.8)])
        while np.linalg.norm(self.position - self.target) < 0.3:
            self.position = self.np_random.uniform(-0.9, 0.9, 2)
        return self._observe(), info


def expert(env: gym.Env) -> np.ndarray:
    """Straight to the square."""
    scene: Any = env.unwrapped
    return np.clip((scene.target - scene.position) / scene.step_size, -1, 1).astype(np.float32)


def run_robot(pipe: Connection, args: Args) -> None:
    """The robot: a dot with a velocity controller of its own, five times as fast as the policy."""
    rng = np.random.default_rng(args.seed)
    scene = Scene("reach-red", "new")
    scene.reset(seed=args.seed)
    period, velocity, watchdog = 0.2 / args.hz, np.zeros(2), 0.0
    commands: deque[tuple[float, np.ndarray]] = deque()
    pictures: deque[tuple[float, Any]] = deque()
    tick = time.perf_counter()
    while True:
        while pipe.poll():
            kind, value = pipe.recv()
            now = time.perf_counter()
            if kind == "stop":
                return
            if kind == "scene":
                scene.reset()
                commands.clear()
                velocity = np.zeros(2)
            else:
                commands.append((now + args.latency + args.jitter * rng.random(), value))
        now = time.perf_counter()
        while commands and commands[0][0] <= now:
            velocity, watchdog = commands.popleft()[1], now + 3.0 / args.hz
        if now > watchdog:  # nobody has said anything for three control steps
            velocity = np.zeros(2)
        scene.position = np.clip(scene.position + 0.2 * scene.step_size * velocity, -1.0, 1.0)
        reached = float(np.linalg.norm(scene.position - scene.target)) < scene.radius
        view = {"image": scene.render(), "state": scene.position.astype(np.float32)}
        pictures.append((now + args.latency + args.jitter * rng.random(), (view, reached)))
        while pictures and pictures[0][0] <= now:
            pipe.send(pictures.popleft()[1])
        tick = max(tick + period, time.perf_counter())
        time.sleep(max(0.0, tick - time.perf_counter()))


class SimulatedRobot(gym.Env[dict[str, np.ndarray], np.ndarray]):
    """The driver: `step` sends a velocity and returns the latest picture; it knows nothing of success."""

    def __init__(self, args: Args) -> None:
        self.observation_space = spaces.Dict(
            {"image": spaces.Box(0, 255, (32, 32, 3), np.uint8), "state": spaces.Box(-1.0, 1.0, (2,), np.float32)}
        )
        self.action_space = spaces.Box(-1.0, 1.0, (2,), np.float32)
        self.reached = False
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=run_robot, args=(theirs, args), daemon=True)
        self._process.start()
        theirs.close()
        self._pipe.poll(300)  # until it is up: it imports all that this file does

    def place(self) -> None:
        """What the person's hands do: another start."""
        self._pipe.send(("scene", None))
        self._look(time.perf_counter() + 0.2)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Stand still, and look."""
        super().reset(seed=seed, options=options)
        return self._look(time.perf_counter()), {}

    def step(self, action: np.ndarray) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """Send a velocity, and look."""
        self._pipe.send(("velocity", np.asarray(action, dtype=np.float64)))
        return self._look(0.0), 0.0, False, False, {}

    def close(self) -> None:
        """Stop the robot."""
        if self._process.is_alive():
            self._pipe.send(("stop", None))
            self._process.join(5)

    def _look(self, until: float) -> dict[str, np.ndarray]:
        """The latest picture, at least one, and all that come before `until`."""
        if not self._pipe.poll(30):
            raise ConnectionError("the robot has sent no picture for 30 seconds; look whether it is switched on")
        view = None
        while view is None or self._pipe.poll() or time.perf_counter() < until:
            view, self.reached = self._pipe.recv()
        return view


class Person:
    """Stands for you: puts the scene back when asked to, and sees when the square is reached."""

    def __init__(self, robot: SimulatedRobot, operator: Operator | None) -> None:
        self.robot, self.operator = robot, operator

    def put_back(self, question: str) -> None:
        """Another start, and, at the terminal, Enter."""
        self.robot.place()
        if self.operator is not None:
            self.operator.ready(question)

    def sees_success(self, observation: Any, ended: bool) -> bool:
        """Looks at the robot, not at its picture."""
        return self.robot.reached or (self.operator is not None and self.operator.success())


def wrapped(
    robot: gym.Env,
    args: Args,
    *,
    judge: Callable[[Any, bool], bool],
    put_back: Callable[[str], object],
    operator: Operator | None,
) -> gym.Env:
    """From a driver to an environment that a policy can learn in; innermost first."""
    env: gym.Env = SafetyLimits(robot, max_delta=1.0)
    env = ControlRate(env, args.hz)
    env = gym.wrappers.TimeLimit(env, args.horizon)
    env = VLAObservation(env, instructions=[SENTENCE], success_key=None)
    env = SuccessSignal(env, judge)
    if operator is not None:
        env = Pause(EarlyStop(env, operator.stop), operator.wait_if_paused)
    return ManualReset(env, put_back)


def taught(args: Args) -> VLAPolicy:
    """Stage 0: a small VLA that has seen the square elsewhere, in other shades, without latency."""
    torch.manual_seed(args.seed)
    encoder = small_vlm(
        [SENTENCE], image_size=32, patch_size=16, width=32, vision_layers=1, text_layers=1, heads=2, seed=args.seed
    )
    with EpisodeStore(args.out / "demos") as demos:
        for seed in range(len(demos), 20):
            demos.append(run_expert(Scene(), expert, task="original", seed=seed, noise=0.2))
        head = GaussianHead(encoder.feature_dim, 2, state_dim=2, width=16, num_queries=2, hidden_dim=16, init_std=0.5)
        policy = VLAPolicy(encoder, head, statistics=compute_statistics([demos]))
        settings = SLConfig(
            steps=args.sft_steps, batch_size=64, scope="all", random_shift=0, learning_rate=3e-3,
            encoder_learning_rate=3e-3,
        )  # fmt: skip
        train_supervised(policy, BalancedSampler([demos], batch_size=64, seed=0), config=settings, seed=args.seed)
    return policy


def main(args: Args) -> dict[str, Any]:
    """Stage 0, evaluation on the robot, stage 1 on the robot, evaluation; returns the figures."""
    policy = taught(args)
    robot = SimulatedRobot(args)
    operator = Operator() if args.terminal else None
    person = Person(robot, operator)
    hands: dict[str, Any] = {"put_back": person.put_back, "operator": operator}
    env = wrapped(robot, args, judge=person.sees_success, **hands)

    def evaluate(name: str) -> dict[str, Any]:
        with EpisodeStore(args.out / name) as store:
            recorded = RecordEpisodes(env, store, task="new", source="evaluation")
            successes, n, interval = evaluate_on_robot(policy, recorded, episodes=args.eval_episodes)
        print(f"{name}: {successes} of {n}, 95 % interval {interval[0]:.2f} to {interval[1]:.2f}")
        return {"successes": successes, "n": n, "interval": interval}

    figures: dict[str, Any] = {"args": {**asdict(args), "out": str(args.out)}, "before": evaluate("evaluation-before")}
    learning = env
    if args.judge == "classifier":
        with EpisodeStore(args.out / "evaluation-before", mode="r") as seen:
            detector = SuccessDetector.fit(policy, seen, instruction=SENTENCE)
        learning = wrapped(robot, args, judge=detector, **hands)
    run = train_on_robot(
        policy,
        learning,
        task="new",
        workdir=args.out,
        config=robot_settings(
            total_timesteps=args.total_timesteps, learning_starts=args.learning_starts, num_demos=10, gamma=0.9
        ),
        seed=args.seed,
    )
    figures["learning"] = asdict(run)
    figures["after"] = evaluate("evaluation-after")
    for layer in (env, learning):
        print(f"{layer.get_wrapper_attr('num_overruns')} of {layer.get_wrapper_attr('num_steps')} steps came late")
    figures["worst_lateness_s"] = learning.get_wrapper_attr("worst_lateness")
    env.close()
    (args.out / "figures.json").write_text(json.dumps(figures, indent=2) + "\n")
    print(json.dumps(figures["learning"]))
    return figures


if __name__ == "__main__":
    main(tyro.cli(Args))
