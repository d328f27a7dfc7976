"""Run by `make wheel` beside an installed wheel, far from the checkout: what a user would do first."""

import json
from pathlib import Path

import gymnasium as gym
import numpy as np
import vla_rl_envs

import vla_rl
from vla_rl import FrozenVLMEncoder, VLAPolicy
from vla_rl.presets import METAWORLD_BASE

for package in (vla_rl, vla_rl_envs):
    place = Path(package.__file__).parent
    assert "site-packages" in place.parts, f"{package.__name__} comes from {place}, not from the wheel"
    assert (place / "py.typed").is_file(), f"{place} has no py.typed"

assert json.loads((Path(METAWORLD_BASE) / "policy.json").read_text())
policy = VLAPolicy.from_pretrained(METAWORLD_BASE)
env = gym.make("vla_rl_envs:VLA/Toy-v0", image_size=64)
obs, info = env.reset(seed=0)
features = policy.encode({key: value[None] for key, value in obs.items()}, [info["instruction"]])
assert features.tokens.shape[0] == 1 and bool(features.tokens.isfinite().all())
encoder = FrozenVLMEncoder.from_pretrained("tiny")  # its weights came in the wheel, too
picture = np.random.default_rng(0).integers(0, 256, (1, 64, 64, 3), dtype=np.uint8)
tokens = encoder.encode(picture, ["open the drawer"]).tokens
assert tokens.shape[0] == 1 and tokens.shape[2] == 192 and float(tokens.std()) > 0
print(f"vla_rl {vla_rl.__version__} works from its wheel")
