"""Every guard against the failure that it is there for; more in test_trainer.py, rl/test_ppo.py and test_vector.py."""

from dataclasses import replace
from functools import partial

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode
from rich.console import Console
from safetensors.torch import load_file
from tiny import differing, parameters, tiny_policy, toy_env
from trainers import SHORT as CONFIG
from trainers import guards_of

from vla_rl import trainer as trainer_module
from vla_rl.collect import run_expert
from vla_rl.config import with_method
from vla_rl.data import EpisodeStore
from vla_rl.evaluation import EpisodeOutcome, EvaluationResult, TaskResult
from vla_rl.guards import (
    GuardConfig,
    PictureError,
    below_start,
    blank_problem,
    first_not_finite,
    never_succeeded,
    orientation_problem,
    weights_problem,
)
from vla_rl.rl.ppo import DeadGradients, PPOConfig, UpdateError
from vla_rl.rl.sac import SACfDConfig
from vla_rl.rl.stage1 import Stage1Result, run_ppo
from vla_rl.sl import launch
from vla_rl.trainer import IterativeTrainer
from vla_rl.vector import WorkerVectorEnv

SFT = with_method(CONFIG, "sft")


@pytest.fixture
def make_trainer(tmp_path, expert_path):
    def make(*, config=SFT, make_envs=toy_env, expert=expert_path, **more):
        arguments = {"rl_tasks": ["reach-red"], "workdir": tmp_path / "run", "console": Console(quiet=True), **more}
        store = EpisodeStore(expert, mode="r")
        policy = tiny_policy(init_std=1.0)
        return IterativeTrainer(policy, expert=store, make_envs=make_envs, config=config, **arguments)

    return make


# Pictures


def scene(seed=0, *, count=8):
    """A sky above a floor, and something red at the left; with noise."""
    rng = np.random.default_rng(seed)
    image = np.full((32, 32, 3), 60)
    image[:14] = (120, 160, 220)
    image[10:24, 2:9] = (220, 30, 30)
    return np.clip(image + rng.integers(-30, 30, (count, 32, 32, 3)), 0, 255).astype(np.uint8)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda image: image[:, ::-1], "upside down"),
        (lambda image: image[:, :, ::-1], "mirrored"),
        (lambda image: image[:, ::-1, ::-1], "turned by 180 degrees"),
        (lambda image: image[..., ::-1], "red and blue exchanged"),
        (lambda image: image[:, ::2, ::2], "16 x 16, the expert data's 32 x 32"),
        (lambda image: image, None),
        (lambda image: np.clip(image * 1.3, 0, 255).astype(np.uint8), None),
    ],
)
def test_pictures_of_another_orientation_are_told(change, words):
    problem = orientation_problem(scene(0), change(scene(1)))
    assert problem is None if words is None else words in problem


def test_nothing_is_said_of_scenes_that_look_the_same_both_ways():
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (16, 32, 32, 3), dtype=np.uint8)
    assert orientation_problem(noise, rng.integers(0, 256, (16, 32, 32, 3), dtype=np.uint8)) is None
    symmetrical = np.broadcast_to(np.hypot(*np.mgrid[-16:16, -16:16])[None, :, :, None] * 10, (4, 32, 32, 3))
    assert orientation_problem(symmetrical.astype(np.uint8), symmetrical[:, ::-1].astype(np.uint8)) is None


def test_one_picture_with_a_picture_in_it_is_enough():
    black = np.zeros((3, 8, 8, 3), np.uint8)
    assert "all 3 images of the env are black" in blank_problem(black, whose="the env")
    assert "of one colour [9, 9, 9]" in blank_problem(black + 9, whose="the env")
    black[1, 2, 3] = 1
    assert blank_problem(black, whose="the env") is None


class Paint(gym.ObservationWrapper):
    """Changes the picture."""

    def __init__(self, env, change):
        super().__init__(env)
        self.change = change

    def observation(self, observation):
        return {**observation, "image": self.change(observation["image"])}


def black(image):
    return np.zeros_like(image)


def lit(image):
    """Light from above, which gives the toy env's empty scene an up and a down."""
    return image // 2 + np.linspace(120, 0, len(image)).astype(np.uint8)[:, None, None]


def lit_upside_down(image):
    return lit(image)[::-1]


def painted(label, *, change):
    return Paint(toy_env(label), change)


def test_black_pictures_of_an_env_stop_the_run_before_stage_1(make_trainer):
    trainer = make_trainer(make_envs=partial(painted, change=black))
    with pytest.raises(PictureError, match=r"images of the env \(rl tasks\) are black; check the renderer"):
        trainer.run()
    assert guards_of(trainer) == [("PictureError", "eval-stage0")]


def test_pictures_with_the_colours_first_are_named(make_trainer):
    images = np.random.default_rng(0).integers(0, 256, (2, 3, 32, 32), dtype=np.uint8)
    with pytest.raises(PictureError, match=r"of some env are uint8 \[3, 32, 32\], expected uint8 \[H, W, 3\].*VLAObs"):
        make_trainer().watch.check_env_images({"image": images}, whose="some env", phase="eval-stage0")


def test_black_expert_data_stop_the_run_before_stage_0(make_trainer, tmp_path, expert_path):
    with EpisodeStore(tmp_path / "black") as store:
        for episode in EpisodeStore(expert_path, mode="r"):
            pictures = np.zeros_like(episode.observations["image"])
            store.append(replace(episode, observations={**episode.observations, "image": pictures}))
    trainer = make_trainer(expert=tmp_path / "black")
    with pytest.raises(PictureError, match="images of the expert data are black"):
        trainer.run()
    assert trainer.run_dir.state["done"] == []


def test_an_env_upside_down_is_noted(make_trainer, tmp_path):
    from vla_rl_envs import make_expert

    env = painted("reach-red", change=lit)
    with EpisodeStore(tmp_path / "lit") as store:
        for seed in range(4):
            store.append(run_expert(env, make_expert(env), task="reach-red", seed=seed, noise=0.1))
    trainer = make_trainer(expert=tmp_path / "lit", make_envs=partial(painted, change=lit_upside_down))
    trainer.run()
    assert ("orientation", "eval-stage0") in guards_of(trainer)
    message = next(e["message"] for e in trainer.run_dir.read_results()["guards"] if e["guard"] == "orientation")
    assert "upside down" in message or "180 degrees" in message


# Success


def result(successes, *, returns=0.0):
    episodes = tuple(EpisodeOutcome(k, bool(s), 5, returns) for k, s in enumerate(successes))
    return EvaluationResult({"reach-red": TaskResult(episodes)})


def test_below_start_needs_the_whole_interval_and_patience():
    good, bad, alike = result([1] * 20), result([0] * 20), result([1] * 19 + [0])
    assert not below_start([good], patience=1)
    assert below_start([good, bad], patience=1)
    assert not below_start([good, bad], patience=2)
    assert below_start([good, good, bad, bad], patience=2)
    assert not below_start([good, bad, alike, bad], patience=2)
    assert not below_start([good, bad, bad], patience=0)


def test_no_success_at_all_is_told_with_what_to_look_at():
    told = never_succeeded({"rl": result([0, 0], returns=1.5), "expert": result([0])})
    assert "none of 3 evaluation episodes" in told and "mean return 1.00" in told and "info['success']" in told
    assert never_succeeded({"rl": result([0, 0]), "expert": result([1])}) is None


class NeverSuccessful(gym.Wrapper):
    """Gives rewards, and says of success what an adapter with the wrong key would."""

    def step(self, action):
        observation, reward, terminated, truncated, info = self.env.step(action)
        return observation, reward, terminated, truncated, {**info, "success": False}


def never_successful(label):
    return NeverSuccessful(toy_env(label, horizon=10))


def test_an_env_that_never_reports_success_is_noted(make_trainer):
    trainer = make_trainer(config=CONFIG, make_envs=never_successful)
    trainer.run()
    found = guards_of(trainer)
    assert ("never_succeeded", "after-stage0") in found
    assert ("no_success", "task0-round0-stage1") in found


class Judge:
    """In place of an Evaluator: whatever the policy, success is what the test says."""

    outcomes: list

    def __init__(self, env_fns, **kwargs):
        self.envs = self
        self.num_envs, self.timeout = 1, None

    def reset(self, seed):
        return {"image": scene()}, {}

    def run(self, policy, **kwargs):
        return result(self.outcomes.pop(0))

    def close(self):
        pass


def test_success_below_sft_rolls_back_and_says_so(make_trainer, monkeypatch):
    """SFT solves the task; two evaluations later nothing is left of that, and training goes on from SFT's weights."""
    begun_from = []

    def spoil(policy, *args, **kwargs):
        begun_from.append(parameters(policy))
        with torch.no_grad():
            policy.head.mean.bias.add_(1)
        return Stage1Result([], 0, 0, 0, False, 0.0, 0.0) if args and hasattr(args[0], "step") else 0.0

    monkeypatch.setattr(trainer_module, "run_ppo", spoil)
    monkeypatch.setattr(launch, "train_supervised", spoil)
    monkeypatch.setattr(trainer_module, "Evaluator", Judge)
    Judge.outcomes = [[1] * 20, [0] * 20, [0] * 20, [1] * 20, [1] * 20]
    trainer = make_trainer(config=replace(CONFIG, rounds=2))
    trainer.run()
    _, after_sft, after_rl, after_rollback, _ = begun_from
    assert differing(after_sft, after_rl)
    assert not differing(after_sft, after_rollback)
    (guard,) = (e for e in trainer.run_dir.read_results()["guards"] if e["guard"] == "rollback")
    assert guard["phase"] == "task0-round0-after-stage2"
    assert "(0.00) lay below that after stage 0 (1.00) in 2 evaluations in a row" in guard["message"]
    state = trainer.run_dir.state
    assert state["after"][state["done"].index("task0-round0-eval2")] == "checkpoints/stage0"


def test_rolling_back_can_be_switched_off(make_trainer, monkeypatch):
    monkeypatch.setattr(trainer_module, "Evaluator", Judge)
    Judge.outcomes = [[1] * 20, [0] * 20, [0] * 20]
    trainer = make_trainer(config=CONFIG, guards=GuardConfig(rollback_after=0))
    trainer.run()
    assert "rollback" not in [guard for guard, _ in guards_of(trainer)]


# Gradients and NaN


def toys(*, num_envs=4, **kwargs):
    thunks = [partial(toy_env, horizon=20, reward="dense", **kwargs)] * num_envs
    return WorkerVectorEnv(thunks, num_workers=0, autoreset_mode=AutoresetMode.NEXT_STEP)


PPO = PPOConfig(
    total_timesteps=600, num_envs=4, rollout_steps=25, minibatch_size=50, update_epochs=1, critic_warmup_updates=1
)


def test_a_head_that_gets_no_gradient_stops_stage_1():
    policy = tiny_policy()
    policy.head.requires_grad_(False)
    with pytest.raises(UpdateError, match=r"no gradient in 3 updates in a row .*dead_updates=0"):
        run_ppo(policy, toys(), task="reach-red", config=PPO)


class SameReward(gym.RewardWrapper):
    def reward(self, reward):
        return 1.0


def test_advantages_that_are_all_alike_stop_stage_1():
    """The same reward at every step and a critic that stays at 0: the entropy's gradient is all that is left."""
    thunks = [lambda: SameReward(toy_env(horizon=20))] * 4
    env = WorkerVectorEnv(thunks, num_workers=0, autoreset_mode=AutoresetMode.NEXT_STEP)
    config = replace(PPO, gamma=0.0, gae_lambda=0.0, critic_learning_rate=0.0, ent_coef=0.01)
    logged = []
    with pytest.raises(UpdateError, match=r"in 3 updates in a row \(policy loss -?0, gradient"):
        run_ppo(tiny_policy(), env, task="reach-red", config=config, log=lambda metrics, steps: logged.append(metrics))
    updates = [metrics for metrics in logged if "losses/policy_loss" in metrics]
    assert len(updates) == 3
    assert all(metrics["losses/policy_loss"] == 0 < metrics["losses/actor_grad_norm"] for metrics in updates)


def test_dead_updates_are_counted_in_a_row():
    dead, alive = {"policy_loss": 0.0, "actor_grad_norm": 0.0, "gradient_steps": 2.0}, {"policy_loss": 0.1}
    alive |= {"actor_grad_norm": 0.5, "gradient_steps": 2.0}
    counter = DeadGradients(2)
    resting = {"policy_loss": 0.1, "gradient_steps": 1.0, "actor_steps": 0.0}
    for stats in (dead, alive, dead, {"value_loss": 1.0}, resting, alive, resting, resting, resting):
        counter.check(stats)
    counter.check(dead)
    with pytest.raises(UpdateError, match="policy loss 0, gradient norm 0"):
        counter.check(dead)
    patient = DeadGradients(0)
    for _ in range(9):
        patient.check(dead)


EARLY = {"num_envs": 4, "total_timesteps": 100, "num_critics": 2, "batch_size": 8}


@pytest.mark.parametrize(
    ("changes", "noted"),
    [
        ({}, False),
        ({"stage1": replace(CONFIG.stage1, critic_warmup_updates=10**9)}, True),
        ({"stage1": replace(CONFIG.stage1, update_epochs=0)}, True),
        ({"stage1_mode": "sacfd", "sacfd": SACfDConfig(**EARLY)}, True),
        ({"stage1_mode": "sacfd", "sacfd": SACfDConfig(**EARLY, num_demos=0, critic_warmup_updates=0)}, False),
        ({"stage1_mode": "collect", "collect_episodes": 4}, False),
    ],
)
def test_a_stage_1_in_which_the_actor_never_learned_is_noted(make_trainer, tmp_path, changes, noted):
    config = replace(CONFIG, stage2_data="none", **changes)
    trainer = make_trainer(config=config, make_envs=partial(toy_env, horizon=10))
    trainer.run()
    start, end = (load_file(path / "head.safetensors") for path in sorted((tmp_path / "run/checkpoints").iterdir()))
    learned = differing(start, end) - {"head.log_std"}  # the size of the exploration is set all the same
    assert bool(learned) == (not noted and config.stage1_mode != "collect")
    assert (("no_actor_update", "task0-round0-stage1") in guards_of(trainer)) == noted


def test_nan_weights_stop_before_an_env_is_given_their_actions():
    policy = tiny_policy()
    with torch.no_grad():
        policy.head.mean.bias[0] = float("nan")
    with pytest.raises((ValueError, UpdateError), match=r"hold NaN|NaN"):
        run_ppo(policy, toys(), task="reach-red", config=PPO)


def test_what_is_not_finite_is_named():
    tensors = {"a": torch.ones(3), "b": None, "c": torch.tensor([1.0, float("inf"), float("nan")]), "d": torch.ones(2)}
    assert first_not_finite(tensors) == "c (2 of 3 entries)"
    policy = tiny_policy()
    assert weights_problem(policy) is None
    policy.state_std[0] = float("nan")
    assert "state_std (1 of 2 entries)" in weights_problem(policy)


def test_weights_that_became_nan_are_never_saved(make_trainer, monkeypatch):
    def broken(policy, *args, **kwargs):
        with torch.no_grad():
            policy.head.mean.bias.fill_(float("nan"))
        return 0.0

    monkeypatch.setattr(launch, "train_supervised", broken)
    trainer = make_trainer()
    with pytest.raises(UpdateError, match=r"stage0 ended with NaN or infinite weights in head.mean.bias"):
        trainer.run()
    assert guards_of(trainer) == [("UpdateError", "stage0")]
    assert not (trainer.run_dir.path / "checkpoints").exists()


def test_thresholds_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match="keep_checkpoints=0"):
        GuardConfig(keep_checkpoints=0)
    with pytest.raises(ValueError, match="rollback_after=-1"):
        GuardConfig(rollback_after=-1)
    with pytest.raises(ValueError, match="worker_timeout=0; expected a number above 0"):
        GuardConfig(worker_timeout=0)
