"""A loop in the style of RLlib's: one environment, episodes as lists, one gradient step at the end of some of them."""

import numpy as np
import torch
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from tiny import differing, parameters, tiny_policy, toy_env

from vla_rl.encoders import Features
from vla_rl.envs import EncodeObservation


def one_env(encoder):
    return EncodeObservation(
        SyncVectorEnv([lambda: toy_env(horizon=12)], autoreset_mode=AutoresetMode.DISABLED), encoder
    )


def test_episodes_of_one_env_train_the_head_on_features_that_were_made_once():
    """REINFORCE with a reward for coming nearer; a single frame is encoded per step, and none while learning."""
    torch.manual_seed(0)
    policy = tiny_policy(init_std=0.5)
    policy.head.requires_grad_(True)
    env = one_env(policy.encoder)
    before, frozen = parameters(policy.head), parameters(policy.encoder)
    optimizer = torch.optim.Adam(policy.head.parameters(), lr=3e-3)

    def acted(rows):
        tokens = torch.tensor(np.stack([row["tokens"] for row in rows]))
        mask = torch.tensor(np.stack([row["mask"] for row in rows])).bool()
        state = policy.normalize_state(np.stack([row["state"] for row in rows]))
        return policy.head.distribution(Features(tokens, mask, policy.encoder.fingerprint), state)

    frames, steps, resets = policy.encoder.num_frames, 0, 0
    for seed in range(6):
        batch, _ = env.reset(seed=seed)
        resets += 1
        episode, ended = {"obs": [], "actions": [], "rewards": []}, False
        while not ended:
            row = {key: value[0] for key, value in batch.items()}
            assert env.single_observation_space.contains(row)
            with torch.no_grad():
                action = acted([row]).sample()
            batch, _, terminated, truncated, _ = env.step(np.clip(policy.env_action(action), -1, 1))
            steps += 1
            moved = batch["state"][0] - row["state"]
            episode["obs"].append(row)
            episode["actions"].append(action[0])
            episode["rewards"].append(float(moved @ np.array([1.0, 0.0])))
            ended = bool(terminated[0] or truncated[0])
        returns = torch.tensor(episode["rewards"]).flip(0).cumsum(0).flip(0)
        spread = (returns - returns.mean()) / (returns.std() + 1e-6) if len(returns) > 1 else returns
        loss = -(acted(episode["obs"]).log_prob(torch.stack(episode["actions"])) * spread).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert policy.encoder.num_frames - frames == steps + resets
    assert "mean.weight" in differing(before, parameters(policy.head))
    assert not differing(frozen, parameters(policy.encoder))
