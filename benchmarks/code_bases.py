"""Stage 1 on the toy env by three code bases from one start: ours, stable-baselines3 (PPO, SAC) and TorchRL.

python benchmarks/code_bases.py writes benchmarks/results/code_bases.json; a run that is in there is not repeated.
"""

from __future__ import annotations

import copy
import importlib.util
import json
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import gymnasium as gym
import numpy as np
import torch
import tyro
from gymnasium.vector import AutoresetMode
from vla_rl_envs.toy import ToyEnv

from vla_rl.collect import run_expert
from vla_rl.data import BalancedSampler, EpisodeStore, compute_statistics
from vla_rl.encoders import small_vlm
from vla_rl.envs import EncodeObservation
from vla_rl.evaluation import EvaluationResult, evaluate, paired_difference
from vla_rl.heads import GaussianHead, TanhGaussianHead, unit_box
from vla_rl.policy import VLAPolicy
from vla_rl.rl.ppo import PPOConfig
from vla_rl.rl.stage1 import run_ppo
from vla_rl.sl.supervised import SLConfig, train_supervised
from vla_rl.vector import WorkerVectorEnv

EXAMPLES = Path(__file__).parents[1] / "examples" / "integrations"
PLACES = {"original": (0.4, 0.4), "new": (0.1, 0.4)}
SAC_GRADIENT_STEPS, SAC_RATE, SAC_ENTROPY, SAC_WARMUP = 4, 1e-3, 0.003, 64
STEPS, ENVS, ROLLOUT, MINIBATCH, EPOCHS, RATE, GAMMA, WARMUP = 40_960, 32, 32, 256, 8, 2e-3, 0.9, 2


class FixedToy(ToyEnv):
    """`VLA/Toy-v0` with the squares in one place each: the expert's is another than the one that RL has to find."""

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[dict, dict]:
        """Place the dot away from the square."""
        _, info = super().reset(seed=seed)
        self._squares = np.array([PLACES[self.variant], (-0.8, -0.8), (0.8, -0.8)])
        while True:
            self.position = self.np_random.uniform(-0.9, 0.9, 2)
            if np.linalg.norm(self.position - self.target) > 0.3:
                return self._observe(), info


def expert(env: gym.Env) -> np.ndarray:
    """Straight to the square."""
    toy: Any = env
    return np.clip((toy.target - toy.position) / toy.step_size, -1, 1).astype(np.float32)


@dataclass
class Args:
    """What to run."""

    out: Path = Path("benchmarks/results/code_bases.json")
    """JSON file, added to"""
    seeds: tuple[int, ...] = (0, 1, 2)
    """of start and training"""
    libraries: tuple[str, ...] = ("vla_rl", "stable_baselines3", "torchrl", "stable_baselines3_sac")
    """which to run; SAC starts from a head that squashes by tanh"""
    episodes: int = 100
    """per evaluation, with the same resets before and after"""


def start(seed: int, *, squashed: bool) -> VLAPolicy:
    """Supervised learning of a small VLM and head on 20 demonstrations of the expert's place."""
    torch.manual_seed(seed)
    with tempfile.TemporaryDirectory() as folder, EpisodeStore(Path(folder) / "expert", mode="w-") as store:
        for episode in range(20):
            store.append(run_expert(FixedToy(), expert, task="original", seed=1000 * seed + episode, noise=0.2))
        size: dict[str, Any] = {"image_size": 32, "patch_size": 16, "width": 32, "vision_layers": 1, "text_layers": 1}
        encoder = small_vlm(FixedToy().instructions, **size, heads=2, seed=seed)
        statistics = compute_statistics([store])
        body: dict[str, Any] = {"state_dim": 2, "width": 16, "num_queries": 2, "hidden_dim": 16, "init_std": 0.5}
        if squashed:
            body |= {"exploration": "gaussian", **unit_box(statistics)}
        head = (TanhGaussianHead if squashed else GaussianHead)(encoder.feature_dim, 2, **body)
        policy = VLAPolicy(encoder, head, statistics=statistics)
        config = SLConfig(
            steps=150, batch_size=64, scope="all", random_shift=0, learning_rate=3e-3, encoder_learning_rate=3e-3
        )
        train_supervised(policy, BalancedSampler([store], batch_size=64, seed=seed), config=config, seed=seed)
    return policy


def example(name: str) -> ModuleType:
    """One of the example scripts as a module."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def practise(policy: VLAPolicy, library: str, seed: int) -> None:
    """Stage 1 on the new place, in place."""
    make_env = partial(FixedToy, variant="new")
    if library == "vla_rl":
        torch.manual_seed(seed)
        config = PPOConfig(
            total_timesteps=STEPS,
            num_envs=ENVS,
            rollout_steps=ROLLOUT,
            minibatch_size=MINIBATCH,
            update_epochs=EPOCHS,
            learning_rate=RATE,
            critic_learning_rate=RATE,
            gamma=GAMMA,
            critic_warmup_updates=WARMUP,
            converged_success=1.1,
        )
        envs = WorkerVectorEnv([make_env] * ENVS, num_workers=0, autoreset_mode=AutoresetMode.DISABLED)
        run_ppo(policy, envs, task="new", config=config, seed=seed)
        envs.close()
    elif library == "stable_baselines3":
        script = example("sb3_frozen_vlm")
        script.train(
            policy,
            make_env,
            script.PPOArgs(
                total_timesteps=STEPS,
                num_envs=ENVS,
                num_workers=0,
                n_steps=ROLLOUT,
                batch_size=MINIBATCH,
                n_epochs=EPOCHS,
                learning_rate=RATE,
                gamma=GAMMA,
                sde_sample_freq=20,
                critic_warmup=WARMUP,
                seed=seed,
            ),
        )
    elif library == "stable_baselines3_sac":
        practise_by_sac(policy, make_env, seed)
    else:
        script = example("torchrl_frozen_vlm")
        script.train(
            policy,
            make_env,
            script.PPOArgs(
                total_timesteps=STEPS,
                num_envs=ENVS,
                num_workers=0,
                rollout_steps=ROLLOUT,
                minibatch_size=MINIBATCH,
                update_epochs=EPOCHS,
                learning_rate=RATE,
                gamma=GAMMA,
                critic_warmup=WARMUP,
                seed=seed,
            ),
        )


def practise_by_sac(policy: VLAPolicy, make_env: Callable[[], gym.Env], seed: int) -> None:
    """Stage 1 by stable-baselines3's SAC, in place: the actor rests while its critics are new."""
    from stable_baselines3 import SAC
    from stable_baselines3.common.vec_env import VecMonitor

    from vla_rl.integrations.stable_baselines3 import CriticWarmup, EncodedVecEnv, copy_back, policy_kwargs, warm_start

    envs = WorkerVectorEnv([make_env] * ENVS, num_workers=0, autoreset_mode=AutoresetMode.SAME_STEP)
    env = VecMonitor(EncodedVecEnv(EncodeObservation(envs, policy.encoder)))
    model = SAC(
        "MultiInputPolicy",
        env,
        policy_kwargs=policy_kwargs(policy),
        buffer_size=STEPS,
        learning_starts=0,  # before that it would act at random, and not as the policy does
        batch_size=MINIBATCH,
        train_freq=1,
        gradient_steps=SAC_GRADIENT_STEPS,
        learning_rate=SAC_RATE,
        gamma=GAMMA,
        ent_coef=SAC_ENTROPY,
        seed=seed,
    )
    warm_start(model, policy, obs=env.reset())
    model.learn(STEPS, callback=CriticWarmup(SAC_WARMUP))
    copy_back(model, policy)
    env.close()


def score(policy: VLAPolicy, episodes: int) -> EvaluationResult:
    """Deterministic success on the new place."""
    fns = {"new": partial(FixedToy, variant="new")}
    return evaluate(policy, fns, episodes_per_task=episodes, seed=10_000, num_envs_per_task=25, num_workers=0)


def summary(result: EvaluationResult) -> dict[str, Any]:
    """Success, its interval and n."""
    task = result.tasks["new"]
    return {"success": task.rate, "interval": list(task.interval), "n": task.n}


def main(args: Args) -> None:
    """Run what is missing and write after every run."""
    torch.set_num_threads(1)
    results = json.loads(args.out.read_text()) if args.out.is_file() else {}
    for seed in args.seeds:
        missing = [name for name in args.libraries if str(seed) not in results.get(name, {})]
        if not missing:
            continue
        starts: dict[bool, tuple[VLAPolicy, EvaluationResult]] = {}
        for name in missing:
            squashed = name.endswith("_sac")
            if squashed not in starts:
                policy = start(seed, squashed=squashed)
                starts[squashed] = policy, score(policy, args.episodes)
            policy, before = starts[squashed]
            trained, began = copy.deepcopy(policy), time.perf_counter()
            practise(trained, name, seed)
            seconds = time.perf_counter() - began
            after = score(trained, args.episodes)
            difference, low, high = paired_difference(before, after)
            results.setdefault(name, {})[str(seed)] = {
                "before": summary(before),
                "after": summary(after),
                "gain": {"mean": difference, "interval": [low, high]},
                "env_steps": STEPS,
            }
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.write_text(json.dumps(results, indent=2) + "\n")
            print(name, seed, f"{before.mean:.2f} -> {after.mean:.2f}", f"{seconds:.0f} s", flush=True)


if __name__ == "__main__":
    main(tyro.cli(Args))
