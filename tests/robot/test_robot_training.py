"""SACfD on one environment: learning between episodes, everything recorded, continued after an interruption."""

from queue import Queue

import gymnasium as gym
import numpy as np
import pytest
import torch
from steps import FakeClock, Steps
from tiny import differing, parameters, tiny_encoder, tiny_policy, toy_env

from vla_rl.data import EpisodeStore
from vla_rl.heads import GaussianHead
from vla_rl.policy import VLAPolicy
from vla_rl.rl.sac_learner import SACLearner
from vla_rl.robot import (
    ControlRate,
    EarlyStop,
    ManualReset,
    Operator,
    OperatorQuit,
    RecordEpisodes,
    SuccessDetector,
    SuccessSignal,
    evaluate_on_robot,
    robot_settings,
    train_on_robot,
)

SETTINGS = {"num_demos": 1, "learning_starts": 12, "utd_ratio": 1.0, "num_critics": 2, "batch_size": 8}
SETTINGS |= {"critic_warmup_updates": 4}


def counting_env(horizon=4, good=(3, 4)):
    """Episodes of 4 steps; in those numbered `good` the third one succeeds."""
    return SuccessSignal(
        Steps(horizon=horizon),
        lambda observation, ended: observation["state"][1] in good and observation["state"][0] == 3,
    )


@pytest.fixture
def policy():
    torch.manual_seed(0)
    encoder = tiny_encoder()
    return VLAPolicy(encoder, GaussianHead(encoder.feature_dim, 2, state_dim=2, width=16, num_queries=2, hidden_dim=16))


def test_learning_waits_for_the_end_of_the_episode(policy, tmp_path, monkeypatch):
    """Updates fall after the last step of an episode and before the next reset, so that no step waits for them."""
    clock, happened = FakeClock(), []
    robot = Steps(clock, horizon=4)
    rate = ControlRate(robot, 10, clock=clock, sleep=clock.sleep)
    env = ManualReset(SuccessSignal(rate, lambda *_: False), lambda question: happened.append("reset"))
    step, update = robot.step, SACLearner.update

    def noted_step(action):
        happened.append("step")
        return step(action)

    def slow_update(self, *args, **kwargs):
        happened.append("update")
        clock.spend(10.0)
        return update(self, *args, **kwargs)

    monkeypatch.setattr(robot, "step", noted_step)
    monkeypatch.setattr(SACLearner, "update", slow_update)
    run = train_on_robot(
        policy, env, task="count", workdir=tmp_path, config=robot_settings(total_timesteps=20, **SETTINGS)
    )
    episode = ["reset", *["step"] * 4]
    assert happened == [*episode * 3, *["update"] * 4, *episode, *["update"] * 4, *episode, *["update"] * 4]
    assert (run.num_episodes, run.num_env_steps, run.num_overruns, run.finished) == (5, 20, 0, True)
    np.testing.assert_allclose(np.diff(robot.started)[[0, 1, 2, 4, 5, 6]], 0.1)


def test_everything_is_recorded_and_only_the_head_learns(policy, tmp_path):
    before, vlm = parameters(policy.head), parameters(policy.encoder.model)
    figures = []
    run = train_on_robot(
        policy,
        counting_env(),
        task="count",
        workdir=tmp_path,
        iteration=2,
        config=robot_settings(total_timesteps=26, **SETTINGS),
        log=lambda values, step: figures.append((step, values["charts/success_rate"], values["charts/overruns"])),
    )
    with EpisodeStore(tmp_path / "episodes", mode="r") as store:
        expected = [(4, False), (4, False), (3, True), (3, True), *[(4, False)] * 3]
        assert [(e.total_steps, e.success) for e in store] == expected
        assert {(e.task, e.source, e.iteration, e.policy_version) for e in store} == {
            ("count", "rl", 2, policy.encoder.fingerprint)
        }
    assert (run.num_episodes, run.num_successes, run.num_env_steps) == (7, 2, 26)
    assert [step for step, *_ in figures] == [4, 8, 11, 14, 18, 22, 26]
    assert [rate for _, rate, _ in figures] == [0, 0, 1, 1, 0, 0, 0] and {late for *_, late in figures} == {0}
    assert differing(before, parameters(policy.head)) and not differing(vlm, parameters(policy.encoder.model))


def test_a_run_that_was_ended_goes_on_with_its_head_and_its_episodes(policy, tmp_path, monkeypatch):
    operator = Operator(iter(Queue().get, None), say=lambda text: None)
    robot = counting_env(good=(2, 3))
    fresh = parameters(policy.head)
    config = robot_settings(total_timesteps=40, **SETTINGS)

    def stop():
        if robot.unwrapped.resets == 6 and robot.unwrapped.count == 2:
            operator.tell("q")
        return operator.stop()

    run = train_on_robot(policy, EarlyStop(robot, stop), task="count", workdir=tmp_path, config=config)
    assert not run.finished and (run.num_episodes, run.num_successes, run.num_env_steps) == (6, 2, 20)
    left = parameters(policy.head)
    with EpisodeStore(tmp_path / "episodes", mode="r") as store:
        assert bool(store[5].infos["aborted"][-1]) and store[5].total_steps == 2

    policy.head.load_state_dict(fresh)
    seen = []

    def update(self, batch, **kwargs):
        seen.append((len(batch), kwargs["num_demos"]))
        return {}

    monkeypatch.setattr(SACLearner, "update", update)
    run = train_on_robot(policy, counting_env(good=()), task="count", workdir=tmp_path, config=config)
    assert run.finished and run.num_env_steps == 20  # of the 40
    assert seen[0] == (8, 4)  # at once, half from the two successes of before
    now = parameters(policy.head)
    assert differing(fresh, left) >= {"mean.weight", "log_std"} and differing(left, now) <= {"log_std"}
    again = train_on_robot(policy, counting_env(), task="count", workdir=tmp_path, config=config)
    assert again.finished and again.num_episodes == 0


def test_what_cannot_be_continued(policy, tmp_path):
    with pytest.raises(ValueError, match="num_envs=4; a robot is one environment"):
        several = robot_settings(num_envs=4, learn_between_episodes=False)
        train_on_robot(policy, counting_env(), task="c", workdir=tmp_path, config=several)
    with pytest.raises(ValueError, match="learn_between_episodes=True with num_envs=4: the others would step on"):
        robot_settings(num_envs=4)
    config = robot_settings(total_timesteps=4, **SETTINGS)
    train_on_robot(policy, counting_env(), task="count", workdir=tmp_path, config=config)
    other = tiny_policy(seed=1)
    with pytest.raises(ValueError, match=r"belongs to encoder .* give the policy that this run began with"):
        train_on_robot(other, counting_env(), task="count", workdir=tmp_path, config=config)


def test_evaluation_counts_whole_episodes(policy):
    said = []
    successes, n, interval = evaluate_on_robot(policy, counting_env(good=(2, 3)), episodes=4, say=said.append)
    assert (successes, n) == (2, 4) and interval == pytest.approx((0.150, 0.850), abs=1e-3)
    assert said[1] == "episode 2: success, 1 of 2"

    def ask(question):
        if env.num_resets == 2:
            raise OperatorQuit

    env = ManualReset(counting_env(good=(1,)), ask)
    assert evaluate_on_robot(policy, env, episodes=4)[:2] == (1, 2)


def test_a_robot_in_units_of_its_own_is_not_evaluated(policy):
    env = counting_env()
    env.action_space = gym.spaces.Box(-2, 2, (2,), np.float32)
    with pytest.raises(ValueError, match=r"policies act in \[-1, 1\]: use gymnasium.wrappers.RescaleAction"):
        evaluate_on_robot(policy, env, episodes=1)


def test_a_classifier_learns_what_success_looks_like(policy, tmp_path):
    """Bright frames are success; it never sees the label of the frames that it is asked about."""
    rng = np.random.default_rng(0)

    class Lamp(Steps):
        def _look(self):
            look = super()._look()
            bright = self.resets % 2 and self.count >= 4
            return look | {"image": rng.integers(0, 100, (8, 8, 3)).astype(np.uint8) + np.uint8(120 * bool(bright))}

    def play(env, episodes):
        for _ in range(episodes):
            env.reset()
            ended = False
            while not ended:
                *_, terminated, truncated, _ = env.step(np.zeros(2, np.float32))
                ended = terminated or truncated

    with EpisodeStore(tmp_path / "labelled") as store:
        labelled = SuccessSignal(Lamp(horizon=8), lambda observation, ended: observation["image"].mean() > 110)
        play(RecordEpisodes(labelled, store, task="lamp"), 8)
        detector = SuccessDetector.fit(policy, store, instruction="count", steps=100)
        assert [e.success for e in store] == [True, False] * 4
    with EpisodeStore(tmp_path / "new") as store:
        play(RecordEpisodes(SuccessSignal(Lamp(horizon=8), detector), store, task="lamp"), 6)
        assert [(e.success, e.total_steps) for e in store] == [(True, 5), (False, 8)] * 3  # two frames in a row
        assert detector.false_alarms(store) == (0, 3)
        with pytest.raises(ValueError, match="0 frames of success"):
            SuccessDetector.fit(policy, [store[1]], instruction="count")
    with EpisodeStore(tmp_path / "cut") as store:  # bright in its last two frames, 4 and 5, and called a failure
        play(RecordEpisodes(SuccessSignal(Lamp(horizon=5), lambda *_: False), store, task="lamp"), 1)
        assert not store[0].success and detector.false_alarms(store) == (1, 1)

    # An episode that another wrapper ended left one bright frame; the next one needs two of its own.
    env = EarlyStop(SuccessSignal(Lamp(horizon=8), detector), lambda: env.unwrapped.count == 3)
    env.reset()
    assert [env.step(np.zeros(2, np.float32))[3] for _ in range(4)] == [False, False, False, True]
    assert detector._in_a_row == 1
    env.reset()
    assert detector._in_a_row == 0


def test_the_same_env_in_the_librarys_own_convention(tmp_path):
    """Any env of the convention does, such as the toy; its own success is the judge."""
    env = toy_env("reach-red", horizon=5)
    assert isinstance(env, gym.Env)
    run = train_on_robot(
        tiny_policy(), env, task="reach-red", workdir=tmp_path, config=robot_settings(total_timesteps=15, **SETTINGS)
    )
    assert run.finished and run.num_env_steps >= 15 and (tmp_path / "head.safetensors").is_file()


def test_another_task_wants_another_directory(policy, tmp_path):
    settings = robot_settings(total_timesteps=8, **SETTINGS)
    train_on_robot(policy, counting_env(), task="count", workdir=tmp_path, config=settings)
    with pytest.raises(ValueError, match="holds episodes of 'count'; give 'stack' a directory of its own"):
        train_on_robot(policy, counting_env(), task="stack", workdir=tmp_path, config=settings)
