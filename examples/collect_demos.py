# docs: ../docs/scripts/collect_demos.md
"""Runs scripted experts under action noise and writes their successes to one HDF5 file in Minari's layout."""

import contextlib
import importlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gymnasium as gym
import h5py
import numpy as np
import tyro


@dataclass
class Args:
    """Everything that can be set; see docs/scripts/collect_demos.md."""

    out: str = "demos/toy"
    """directory of the new data set; `data/main_data.hdf5` in it must not exist yet"""
    env_id: str = "vla_rl_envs:VLA/Toy-v0"
    """the id of the environment"""
    tasks: tuple[str, ...] = ("reach-red", "reach-blue")
    """task labels, each `task` or `task:variant`"""
    image_size: int | None = None
    """height and width of the pictures (the environment's own if None)"""
    horizon: int | None = None
    """most steps in an episode (the environment's own if None)"""
    expert: str = "vla_rl_envs:make_expert"
    """import path of a function that gives `expert(env) -> action` for an environment"""
    episodes: int = 100
    """episodes per task, failures included"""
    noise: float = 0.2
    """standard deviation of the noise on the executed action"""
    seed: int = 1
    """seed of the first episode of each task; the next ones count up"""


def task_env(args: Args, label: str) -> gym.Env:
    """The environment of a task label."""
    task, _, variant = label.partition(":")
    settings = {"task": task, "variant": variant, "image_size": args.image_size, "horizon": args.horizon}
    return gym.make(args.env_id, **{key: value for key, value in settings.items() if value})


def spec_json(env: gym.Env) -> str | None:
    """For Minari, the environment's spec, or what was registered if a setting has no JSON, as a function has none."""
    for spec in (env.spec, gym.spec(env.spec.id)) if env.spec else ():
        with contextlib.suppress(TypeError, ValueError):
            return spec.to_json()
    return None


def write_episode(file: h5py.File, episode: dict[str, Any], **attributes: Any) -> None:
    """Append an episode of T steps: observations [T + 1, ...], the rest [T, ...]; frames one chunk each."""
    group = file.create_group(f"episode_{len(file)}")
    for key, array in episode.items():
        chunks = (1, *array.shape[1:]) if key == "observations/image" else None
        group.create_dataset(key, data=array, chunks=chunks)
    group.create_group("infos")
    group.attrs.update(id=len(file) - 1, total_steps=len(episode["actions"]), **attributes)
    file.flush()


if __name__ == "__main__":
    args = tyro.cli(Args)
    path = Path(args.out) / "data" / "main_data.hdf5"
    path.parent.mkdir(parents=True, exist_ok=True)
    module, _, name = args.expert.partition(":")
    make_expert = getattr(importlib.import_module(module), name)

    with h5py.File(path, "w-") as file:
        total_steps = 0
        for label in args.tasks:
            env = task_env(args, label)
            spec = spec_json(env)
            instructions = env.get_wrapper_attr("instructions")
            expert = make_expert(env)
            solved = 0
            for seed in range(args.seed, args.seed + args.episodes):
                rng = np.random.default_rng(seed)
                obs, _ = env.reset(seed=seed)
                observations, actions, rewards, success = [obs], [], [], False
                terminated = truncated = False
                while not (terminated or truncated):
                    action = np.asarray(expert(env), dtype=np.float32)
                    # Executed is the noisy action, stored the one that the expert meant: it shows how to come back
                    # from a deviation (DART, Laskey et al. 2017, arXiv 1703.09327).
                    executed = np.clip(action + args.noise * rng.standard_normal(action.shape), -1, 1)
                    obs, reward, terminated, truncated, info = env.step(executed.astype(np.float32))
                    observations.append(obs)
                    actions.append(action)
                    rewards.append(float(reward))
                    success |= bool(info["success"])
                if not success:
                    continue
                solved += 1
                total_steps += len(actions)
                ends = np.arange(len(actions)) == len(actions) - 1
                episode = {f"observations/{key}": np.stack([o[key] for o in observations]) for key in obs}
                episode |= {
                    "actions": np.stack(actions),
                    "rewards": np.array(rewards),
                    "terminations": ends & terminated,
                    "truncations": ends & truncated,
                }
                instruction = instructions[int(obs["task_id"])]
                write_episode(
                    file, episode, seed=seed, task=label, instruction=instruction, source="expert", success=True
                )
            print(f"{label}: {solved} of {args.episodes} solved")
            env.close()
        metadata = {
            "total_episodes": len(file),
            "total_steps": total_steps,
            "data_format": "hdf5",
            "dataset_id": f"{path.parent.parent.name}-v0",
            "minari_version": "0.5.4",
            "jpeg_encoding": False,
        }
        if spec is not None:
            metadata["env_spec"] = spec
        (path.parent / "metadata.json").write_text(json.dumps(metadata))
    print(f"wrote {path}")
