"""Does the method learn? The toy's square lies in one place for the expert, and elsewhere, in other shades, for RL."""

from functools import partial

import numpy as np
import pytest
from rich.console import Console
from tiny import tiny_policy
from vla_rl_envs.toy import ToyEnv

from vla_rl.collect import run_expert
from vla_rl.config import IterativeConfig
from vla_rl.data import EpisodeStore, compute_statistics
from vla_rl.encoders import LoRASettings
from vla_rl.evaluation import EvaluationResult, paired_difference
from vla_rl.rl.ppo import PPOConfig
from vla_rl.sl.supervised import SLConfig
from vla_rl.trainer import IterativeTrainer

PLACES = {"original": (0.4, 0.4), "new": (0.1, 0.4)}


class Fixed(ToyEnv):
    """The toy env with the red square always in the same place; the random one takes more demonstrations to learn."""

    def reset(self, *, seed=None, options=None):
        _, info = super().reset(seed=seed)
        self._squares = np.array([PLACES[self.variant], (-0.8, -0.8), (0.8, -0.8)])
        while True:
            self.position = self.np_random.uniform(-0.9, 0.9, 2)
            if np.linalg.norm(self.position - self.target) > 0.3:
                return self._observe(), info


def expert(env):
    return np.clip((env.target - env.position) / env.step_size, -1, 1).astype(np.float32)


@pytest.mark.slow
def test_rl_learns_the_new_variant_and_supervised_learning_keeps_the_old_one(tmp_path):
    with EpisodeStore(tmp_path / "expert") as store:
        for seed in range(20):
            store.append(run_expert(Fixed(), expert, task="original", seed=seed, noise=0.2))
        supervised = SLConfig(
            steps=150, batch_size=64, scope="all", random_shift=0, learning_rate=3e-3, encoder_learning_rate=3e-3
        )
        trainer = IterativeTrainer(
            tiny_policy(statistics=compute_statistics([store]), init_std=0.5),
            expert=store,
            rl_tasks=["new"],
            make_envs=partial(Fixed, "reach-red"),
            eval_tasks={"expert": ["original"], "rl": ["new"]},
            config=IterativeConfig(
                stage0=supervised,
                stage1=PPOConfig(
                    total_timesteps=40_000,
                    num_envs=32,
                    rollout_steps=32,
                    minibatch_size=256,
                    learning_rate=2e-3,
                    critic_learning_rate=2e-3,
                    gamma=0.9,
                ),
                stage2=SLConfig(steps=500, batch_size=64, scope="lora", learning_rate=3e-3, encoder_learning_rate=3e-3),
                eval_episodes=60,
                rl_eval_episodes=60,
                eval_envs=30,
                num_workers=0,
                video_episodes=0,
            ),
            lora=LoRASettings(r=8, alpha=16),
            workdir=tmp_path / "run",
            console=Console(quiet=True),
        )
        results = trainer.run()
    stages = ("after-stage0", "task0-round0-after-stage1", "task0-round0-after-stage2")
    sft, rl, last = (
        {group: EvaluationResult.from_dict(results[stage][group]) for group in ("expert", "rl")} for stage in stages
    )
    assert sft["expert"].mean > 0.9 and sft["rl"].mean < 0.5
    assert rl["rl"].mean > 0.9
    assert last["expert"].mean > 0.9 and last["rl"].mean > 0.5
    _, low, _ = paired_difference(sft["rl"], last["rl"])
    assert low > 0
