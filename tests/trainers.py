"""Settings and helpers that the tests of the trainer share; the fixture `make_trainer` is in `conftest.py`."""

from dataclasses import replace

from rich.console import Console
from tiny import parameters, tiny_policy, toy_env

from vla_rl.config import IterativeConfig
from vla_rl.data import EpisodeStore
from vla_rl.encoders import LoRASettings
from vla_rl.policy import VLAPolicy
from vla_rl.rl.ppo import PPOConfig
from vla_rl.rl.sac import SACfDConfig
from vla_rl.sl.supervised import SLConfig
from vla_rl.trainer import IterativeTrainer

SL = SLConfig(steps=6, batch_size=16, scope="all", random_shift=0)
CONFIG = IterativeConfig(
    stage0=SL,
    stage1=PPOConfig(
        total_timesteps=500, num_envs=8, rollout_steps=25, minibatch_size=100, update_epochs=1, critic_warmup_updates=1
    ),
    sacfd=SACfDConfig(
        total_timesteps=500,
        num_envs=8,
        num_demos=4,
        learning_starts=300,
        utd_ratio=0.1,
        batch_size=16,
        critic_warmup_updates=2,
        num_critics=2,
    ),
    stage2=replace(SL, scope="lora"),
    collect_episodes=8,
    eval_episodes=4,
    rl_eval_episodes=4,
    eval_envs=2,
    num_workers=0,
    video_episodes=1,
    stop_at_zero=False,
)
GROUPS = {"expert": ["reach-red"], "rl": ["reach-red:new"]}
SHORT = IterativeConfig(
    stage0=SLConfig(steps=2, batch_size=8, scope="head", random_shift=0),
    stage1=PPOConfig(
        total_timesteps=100, num_envs=4, rollout_steps=25, minibatch_size=50, update_epochs=1, critic_warmup_updates=1
    ),
    stage2=SLConfig(steps=2, batch_size=8, scope="head", random_shift=0),
    eval_episodes=2,
    rl_eval_episodes=2,
    eval_envs=2,
    num_workers=0,
    video_episodes=0,
    stop_at_zero=False,
)
"""Ends in seconds: for what goes wrong on the way."""


def files(path):
    return {p.relative_to(path).as_posix(): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}


def saved(workdir):
    """Weights of every checkpoint of a run."""
    return {
        path.name: parameters(VLAPolicy.from_pretrained(path)) for path in sorted((workdir / "checkpoints").iterdir())
    }


def trainers_in(tmp_path, expert_path):
    """Trainers of one test share their expert data; each is given its workdir by name."""
    trainers = []

    def make(workdir="run", *, config=CONFIG, policy=None, resume=False, **more):
        arguments = {
            "expert": EpisodeStore(expert_path, mode="r"),
            "rl_tasks": ["reach-red:new"],
            "make_envs": toy_env,
            "eval_tasks": GROUPS,
            "config": config,
            "lora": LoRASettings(r=2, alpha=4),
            "console": Console(quiet=True),
            **more,
        }
        policy = tiny_policy(init_std=1.0) if policy is None else policy
        if resume:
            trainers.append(IterativeTrainer.resume(tmp_path / workdir, policy=policy, **arguments))
        else:
            trainers.append(IterativeTrainer(policy, workdir=tmp_path / workdir, **arguments))
        return trainers[-1]

    yield make
    for trainer in trainers:
        trainer.close()


def guards_of(trainer):
    """Guard and phase of every note of a run."""
    return [(entry["guard"], entry["phase"]) for entry in trainer.run_dir.read_results().get("guards", [])]
