"""What a person or a classifier says about an episode: success, an early end, a pause, and that the scene is ready."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gymnasium as gym

Judge = Callable[[Any, bool], bool]
"""(observation after a step, whether the episode ends with it anyway) -> whether the task is solved."""

QUESTION = "put the scene back, step away from the robot, and press Enter"


class SuccessSignal(gym.Wrapper, gym.utils.RecordConstructorArgs):
    """Success from outside the environment: a person, or a classifier over frames.

    At success the episode terminates with reward 1; every other step has reward 0, as in the paper, whatever the
    environment's own reward. `info["success"]` is a bool after `reset` (False) and every step.

    Args:
        env: any environment.
        judge: called after every step with the observation and whether the episode ends with it, such as
            `Operator.success` or a `SuccessDetector`. If it, or the object whose method it is, has a method `begin`,
            that is called with every reset.
    """

    def __init__(self, env: gym.Env, judge: Judge) -> None:
        gym.utils.RecordConstructorArgs.__init__(self, _disable_deepcopy=True, judge=judge)
        gym.Wrapper.__init__(self, env)
        self.judge = judge

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Reset the environment; adds `success` (False) to the info."""
        observation, info = self.env.reset(seed=seed, options=options)
        _begin(self.judge)
        return observation, {**info, "success": False}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """Step the environment and ask the judge."""
        observation, _, terminated, truncated, info = self.env.step(action)
        success = bool(self.judge(observation, bool(terminated or truncated)))
        return observation, float(success), bool(terminated or success), truncated, {**info, "success": success}


class EarlyStop(gym.Wrapper, gym.utils.RecordConstructorArgs):
    """Ends an episode when asked to, as truncated; `info["aborted"]` is a bool after every step.

    Args:
        env: any environment.
        stop: asked before every step; such as `Operator.stop`. The step that it stops is the episode's last one, and
            is still executed. If it, or the object whose method it is, has a method `begin`, that is called with every
            reset.

    Attributes:
        num_aborted: episodes so far.
    """

    def __init__(self, env: gym.Env, stop: Callable[[], bool]) -> None:
        gym.utils.RecordConstructorArgs.__init__(self, _disable_deepcopy=True, stop=stop)
        gym.Wrapper.__init__(self, env)
        self.stop = stop
        self.num_aborted = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Reset the environment; what was wanted of the episode before is forgotten."""
        result = self.env.reset(seed=seed, options=options)
        _begin(self.stop)
        return result

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """Ask whether to go on, then step the environment, perhaps for the last time."""
        stop = bool(self.stop())
        observation, reward, terminated, truncated, info = self.env.step(action)
        aborted = stop and not (terminated or truncated)
        self.num_aborted += aborted
        return observation, reward, terminated, truncated or aborted, {**info, "aborted": aborted}


class Pause(gym.Wrapper, gym.utils.RecordConstructorArgs):
    """Holds the next step back while somebody wants to; a `ControlRate` below does not count that as a delay.

    No command is sent meanwhile: what the robot does then is up to its controller, which should hold its position. The
    step that waits is executed afterwards with the action chosen before, so a pause is for looking, not for moving
    things.

    Args:
        env: any environment.
        wait: waits while there is a pause, and says whether there was one; such as `Operator.wait_if_paused`.

    Attributes:
        num_pauses: so far.
    """

    def __init__(self, env: gym.Env, wait: Callable[[], bool]) -> None:
        gym.utils.RecordConstructorArgs.__init__(self, _disable_deepcopy=True, wait=wait)
        gym.Wrapper.__init__(self, env)
        self.wait = wait
        self.num_pauses = 0

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """Wait for the end of the pause, if there is one, then step."""
        paused = bool(self.wait())
        self.num_pauses += paused
        if paused and self.env.has_wrapper_attr("restart_clock"):
            self.env.get_wrapper_attr("restart_clock")()
        observation, reward, terminated, truncated, info = self.env.step(action)
        return observation, reward, terminated, truncated, {**info, "paused": paused}


class ManualReset(gym.Wrapper, gym.utils.RecordConstructorArgs):
    """Resets together with a person: the robot goes home, the person puts the scene back, the episode begins.

    Args:
        env: environment whose `reset` returns an observation of the scene as it is then.
        ask: says the question and returns when the person is ready; such as `Operator.ready`, or `input`.
        home: moves the robot out of the way before the person is asked; None leaves it where it is.
        question: what to say.

    Attributes:
        num_resets: so far.
    """

    def __init__(
        self,
        env: gym.Env,
        ask: Callable[[str], object],
        *,
        home: Callable[[], object] | None = None,
        question: str = QUESTION,
    ) -> None:
        gym.utils.RecordConstructorArgs.__init__(self, _disable_deepcopy=True, ask=ask, home=home, question=question)
        gym.Wrapper.__init__(self, env)
        self.ask, self.home, self.question = ask, home, question
        self.num_resets = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Move the robot home, wait for the person, reset the environment."""
        if self.home is not None:
            self.home()
        self.ask(self.question)
        self.num_resets += 1
        return self.env.reset(seed=seed, options=options)


def _begin(asked: Callable[..., bool]) -> None:
    """Tell whoever is asked that an episode begins, if that is of interest."""
    begin = getattr(getattr(asked, "__self__", asked), "begin", None)
    if begin is not None:
        begin()
