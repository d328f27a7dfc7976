"""The code blocks of docs/guides/code-bases.md, run one after the other as they stand."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from gymnasium.vector import SyncVectorEnv
from torch import nn

pytest.importorskip("stable_baselines3")
pytest.importorskip("torchrl")

GUIDE = Path(__file__).parents[2] / "docs" / "guides" / "code-bases.md"
SENTENCES = ["reach the red square"] * 4


@pytest.fixture(scope="module")
def page():
    """What the blocks leave behind, and the head's mean (not clipped) after each of them."""
    namespace, means = {}, []
    torch.manual_seed(0)
    for block in re.findall(r"```python\n(.*?)```", GUIDE.read_text(), flags=re.DOTALL):
        exec(block, namespace)
        policy = namespace["policy"]
        raw, _ = SyncVectorEnv([namespace["make_env"]] * 4).reset(seed=0)
        with torch.no_grad():
            means.append(policy.head.predict(policy.encode(raw, SENTENCES), torch.from_numpy(raw["state"])).numpy())
    return namespace | {"means": means, "raw": raw}


@pytest.mark.slow
def test_the_policy_takes_over_what_each_library_has_learned(page):
    start, after_sb3, after_torchrl, after_cleanrl = page["means"]
    raw, policy = page["raw"], page["policy"]
    features = policy.encode(raw, SENTENCES)
    inputs = {"tokens": features.tokens.float().numpy(), "mask": features.mask.numpy().astype(np.int8)}
    tensors, _ = page["model"].policy.obs_to_tensor({**inputs, "state": raw["state"], "task_id": raw["task_id"]})
    with torch.no_grad():
        np.testing.assert_allclose(after_sb3, page["model"].policy.get_distribution(tensors).mode(), atol=1e-5)
    assert start.shape == (4, 2)
    assert np.abs(after_torchrl - after_sb3).max() > 1e-5 and np.array_equal(after_cleanrl, after_torchrl)


@pytest.mark.slow
def test_a_cleanrl_agent_trains_on_the_flat_features(page):
    """CleanRL's `ppo_continuous_action.py` in short: its agent, its buffers, its first minibatch."""
    envs, policy = page["envs"], page["policy"]
    size = int(np.prod(envs.single_observation_space.shape))
    obs, _ = envs.reset(seed=1)
    raw, _ = SyncVectorEnv([page["make_env"]] * 4).reset(seed=1)
    features = policy.encode(raw, SENTENCES)
    task = np.eye(3, dtype=np.float32)[raw["task_id"]]
    tokens = features.tokens.float().flatten(1).numpy()
    np.testing.assert_allclose(obs, np.concatenate([features.mask.numpy(), raw["state"], task, tokens], 1), atol=2e-3)
    assert size == obs.shape[1]

    torch.manual_seed(0)
    actor = nn.Sequential(nn.Linear(size, 64), nn.Tanh(), nn.Linear(64, 2))
    log_std = nn.Parameter(torch.zeros(1, 2))
    optimizer = torch.optim.Adam([*actor.parameters(), log_std], lr=3e-4, eps=1e-5)
    stored = torch.zeros((25, 4, *envs.single_observation_space.shape))
    actions, log_probs = torch.zeros((25, 4, 2)), torch.zeros((25, 4))
    lengths, next_obs = [], torch.Tensor(obs)
    for step in range(25):
        stored[step] = next_obs
        with torch.no_grad():
            normal = torch.distributions.Normal(actor(next_obs), log_std.exp().expand(4, 2))
            actions[step] = normal.sample()
            log_probs[step] = normal.log_prob(actions[step]).sum(1)
        next_obs, _, _, _, infos = envs.step(actions[step].clamp(-1, 1).numpy())
        next_obs = torch.Tensor(next_obs)
        if "episode" in infos:
            lengths += infos["episode"]["l"][infos["_episode"]].tolist()
    assert lengths and max(lengths) <= 20
    normal = torch.distributions.Normal(actor(stored.flatten(0, 1)), log_std.exp())
    ratio = (normal.log_prob(actions.flatten(0, 1)).sum(1) - log_probs.flatten()).exp()
    torch.testing.assert_close(ratio, torch.ones(100), atol=1e-4, rtol=0)
    ratio.mean().backward()
    optimizer.step()
