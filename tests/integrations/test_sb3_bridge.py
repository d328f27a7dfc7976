from functools import partial

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from tiny import HEAD, tiny_encoder, tiny_policy, toy_env

from vla_rl.data import Statistics
from vla_rl.envs import EncodeObservation
from vla_rl.heads import GaussianHead
from vla_rl.heads.bounds import unit_box
from vla_rl.heads.tanh_gaussian import TanhGaussianHead
from vla_rl.policy import VLAPolicy

sb3 = pytest.importorskip("stable_baselines3")

from stable_baselines3.common.vec_env import VecMonitor  # noqa: E402

from vla_rl.integrations.stable_baselines3 import (  # noqa: E402
    CriticWarmup,
    EncodedVecEnv,
    FrozenVLMExtractor,
    copy_back,
    policy_kwargs,
    to_policy,
    warm_start,
)

STATISTICS = Statistics(
    action_mean=np.array([0.2, -0.1], np.float32),
    action_std=np.array([0.5, 0.8], np.float32),
    state_mean=np.array([0.3, -0.3], np.float32),
    state_std=np.array([0.25, 0.5], np.float32),
    num_steps=10,
    num_episodes=1,
)


class Counter(gym.Env):
    """Ends after `length` steps: by success if `solved`, else by truncation; the state counts steps and resets."""

    instructions = ("count",)
    action_space = spaces.Box(-1, 1, (2,), np.float32)
    observation_space = spaces.Dict(
        image=spaces.Box(0, 255, (2, 2, 3), np.uint8),
        state=spaces.Box(-9, 9, (2,), np.float32),
        task_id=spaces.Discrete(1),
    )

    def __init__(self, length, *, solved=False):
        self.length, self.solved, self.episodes = length, solved, 0

    def _observe(self):
        image = np.full((2, 2, 3), 10 * self.episodes + self.steps, np.uint8)
        return {"image": image, "state": np.array([self.steps, self.episodes], np.float32), "task_id": 0}

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps, self.episodes = 0, self.episodes + 1
        return self._observe(), {"success": False, "seed": -1 if seed is None else seed}

    def step(self, action):
        self.steps += 1
        last = self.steps == self.length
        # Solved in the middle of the episode: the flag is down again when it ends.
        info = {"success": self.solved and self.steps == 1, "steps": self.steps}
        return self._observe(), float(action[0]), last and self.solved, last and not self.solved, info


def counters(mode=AutoresetMode.SAME_STEP):
    return SyncVectorEnv([lambda: Counter(2), lambda: Counter(3, solved=True)], autoreset_mode=mode)


def test_the_vec_env_reports_ends_as_stable_baselines3_wants_them():
    inner = EncodedVecEnv(counters())
    env = VecMonitor(inner)
    env.seed(7)
    obs = env.reset()
    assert [info["seed"] for info in inner.reset_infos] == [7, 8]
    np.testing.assert_array_equal(obs["state"], [[0, 1], [0, 1]])
    actions = np.full((2, 2), 0.5, np.float32)

    obs, rewards, dones, infos = env.step(actions)
    assert rewards.dtype == np.float32 and rewards.tolist() == [0.5, 0.5] and dones.tolist() == [False, False]
    assert infos == [{"success": False, "steps": 1}, {"success": True, "steps": 1}]

    obs, _, dones, infos = env.step(actions)
    assert dones.tolist() == [True, False]
    np.testing.assert_array_equal(obs["state"], [[0, 2], [2, 1]])
    np.testing.assert_array_equal(infos[0]["terminal_observation"]["state"], [2, 1])
    assert infos[0]["TimeLimit.truncated"] is True and infos[0]["is_success"] is False and infos[0]["steps"] == 2
    assert infos[0]["episode"]["r"] == 1.0 and infos[0]["episode"]["l"] == 2
    assert "terminal_observation" not in infos[1] and "is_success" not in infos[1]
    assert inner.reset_infos[0] == {"success": False, "seed": -1}

    obs, _, dones, infos = env.step(actions)
    assert dones.tolist() == [False, True]
    np.testing.assert_array_equal(infos[1]["terminal_observation"]["state"], [3, 1])
    assert infos[1]["TimeLimit.truncated"] is False and infos[1]["is_success"] is True
    *_, infos = env.step(actions)
    assert infos[0]["is_success"] is False and "is_success" not in infos[1]


@pytest.mark.parametrize("mode", [AutoresetMode.NEXT_STEP, AutoresetMode.DISABLED])
def test_other_autoreset_modes_are_refused(mode):
    with pytest.raises(ValueError, match=r"autoreset_mode=AutoresetMode\.SAME_STEP"):
        EncodedVecEnv(counters(mode))


def test_the_environments_behind_are_reached():
    env = EncodedVecEnv(counters())
    assert env.get_attr("length") == [2, 3] and env.get_attr("length", 1) == [3]
    assert env.env_is_wrapped(VecMonitor) == [False, False]
    env.set_attr("length", 5)
    assert env.get_attr("length") == [5, 5]
    with pytest.raises(ValueError, match="reaches all or none"):
        env.set_attr("length", 5, indices=[0])


def encoded(policy, *, num_envs=3):
    fn = partial(toy_env, reward="dense")
    envs = SyncVectorEnv([fn] * num_envs, autoreset_mode=AutoresetMode.SAME_STEP)
    return EncodedVecEnv(EncodeObservation(envs, policy.encoder))


def ppo(policy, env, **options):
    options = {
        "n_steps": 8,
        "batch_size": 12,
        "n_epochs": 2,
        "seed": 0,
        "use_sde": policy.head.exploration == "gsde",
    } | options
    return sb3.PPO("MultiInputPolicy", env, policy_kwargs=policy_kwargs(policy), **options)


def raw_observations(count=4):
    envs = SyncVectorEnv([toy_env] * count)
    obs, _ = envs.reset(seed=3)
    return obs


def encoded_observations(policy, obs):
    features = policy.encode(obs, ["reach the red square"] * len(obs["state"]))
    return {"tokens": features.tokens.float().numpy(), "mask": features.mask.numpy().astype(np.int8)} | {
        key: obs[key] for key in ("state", "task_id")
    }


@pytest.mark.parametrize("exploration", ["gaussian", "gsde"])
def test_a_warm_started_ppo_is_the_policy_and_comes_back_after_learning(exploration):
    policy = tiny_policy(statistics=STATISTICS, exploration=exploration, init_std=0.25)
    env = encoded(policy)
    env.seed(0)
    model = ppo(policy, env)
    warm_start(model, policy, obs=env.reset())
    raw = raw_observations()
    inputs = encoded_observations(policy, raw)
    sentences = ["reach the red square"] * 4
    np.testing.assert_allclose(model.predict(inputs, deterministic=True)[0], policy.act(raw, sentences), atol=1e-5)

    # The whole distribution agrees, with the change of units from normalised to env actions in the density.
    normalised = torch.randn(4, 2, generator=torch.Generator().manual_seed(1))
    state = policy.normalize_state(raw["state"])
    with torch.no_grad():
        expected = policy.head.distribution(policy.encode(raw, sentences), state)
        tensors, _ = model.policy.obs_to_tensor(inputs)
        actions = torch.from_numpy(policy.env_action(normalised))
        values, log_prob, entropy = model.policy.evaluate_actions(tensors, actions)
    units = np.log(STATISTICS.action_std).sum()
    np.testing.assert_allclose(log_prob, expected.log_prob(normalised) - units, rtol=1e-3, atol=1e-3)
    if exploration == "gaussian":
        np.testing.assert_allclose(entropy, expected.entropy() + units, atol=1e-4)
    assert (values == 0).all()

    before = policy.act(raw, sentences)
    model.learn(48)
    assert np.abs(model.predict(inputs, deterministic=True)[0] - before).max() > 1e-4
    np.testing.assert_array_equal(policy.act(raw, sentences), before)
    copy_back(model, policy)
    np.testing.assert_allclose(policy.act(raw, sentences), model.predict(inputs, deterministic=True)[0], atol=1e-5)
    with torch.no_grad():
        again = policy.head.distribution(policy.encode(raw, sentences), state).log_prob(normalised)
        _, log_prob, _ = model.policy.evaluate_actions(tensors, actions)
    np.testing.assert_allclose(log_prob, again - units, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("algorithm", ["PPO", "A2C"])
def test_a_model_that_started_from_nothing_becomes_a_policy(algorithm, tmp_path):
    encoder = tiny_encoder()
    policy = VLAPolicy(encoder, GaussianHead(encoder.feature_dim, 2, **HEAD))  # no state
    kwargs = {**policy_kwargs(policy), "features_extractor_kwargs": HEAD}  # with the state, not normalised
    model = getattr(sb3, algorithm)("MultiInputPolicy", encoded(policy), policy_kwargs=kwargs, n_steps=4, seed=0)
    model.learn(12)
    learned = to_policy(model, encoder)
    assert learned.uses_state and learned.head.exploration == "gaussian"
    raw, sentences = raw_observations(), ["reach the red square"] * 4
    expected = model.predict(encoded_observations(policy, raw), deterministic=True)[0]
    np.testing.assert_allclose(learned.act(raw, sentences), expected, atol=1e-5)
    learned.save_pretrained(tmp_path / "policy")
    again = VLAPolicy.from_pretrained(tmp_path / "policy")
    np.testing.assert_array_equal(again.act(raw, sentences), learned.act(raw, sentences))


def test_a_warm_started_sac_is_the_policy_and_comes_back_after_learning():
    encoder = tiny_encoder()
    torch.manual_seed(0)
    head = TanhGaussianHead(encoder.feature_dim, 2, state_dim=2, exploration="gaussian", **unit_box(STATISTICS), **HEAD)
    policy = VLAPolicy(encoder, head, statistics=STATISTICS)
    kwargs = {"policy_kwargs": policy_kwargs(policy), "buffer_size": 300, "batch_size": 16, "seed": 0}
    model = sb3.SAC("MultiInputPolicy", encoded(policy), learning_starts=30, train_freq=4, **kwargs)
    warm_start(model, policy)
    raw, sentences = raw_observations(), ["reach the red square"] * 4
    inputs = encoded_observations(policy, raw)
    start = policy.act(raw, sentences)
    np.testing.assert_allclose(model.predict(inputs, deterministic=True)[0], start, atol=1e-5)
    tensors, _ = model.policy.obs_to_tensor(inputs)
    with torch.no_grad():
        _, log_std, _ = model.actor.get_action_dist_params(tensors)
    np.testing.assert_allclose(log_std.exp(), head.init_std, rtol=1e-5)

    model.learn(90)
    assert model._n_updates > 0
    copy_back(model, policy)
    learned = model.predict(inputs, deterministic=True)[0]
    assert np.abs(learned - start).max() > 1e-4
    np.testing.assert_allclose(policy.act(raw, sentences), learned, atol=1e-5)
    np.testing.assert_allclose(to_policy(model, encoder).act(raw, sentences), learned, atol=1e-5)


def test_the_critic_warms_up_alone():
    policy = tiny_policy(exploration="gaussian")
    env = encoded(policy)
    model = ppo(policy, env)
    warm_start(model, policy)
    raw, sentences = raw_observations(), ["reach the red square"] * 4
    inputs = encoded_observations(policy, raw)
    start = policy.act(raw, sentences)
    critic = model.policy.vf_features_extractor.body.mlp[0].weight.detach().clone()
    model.learn(24, callback=CriticWarmup(1))
    np.testing.assert_allclose(model.predict(inputs, deterministic=True)[0], start, atol=1e-5)
    assert not torch.equal(model.policy.vf_features_extractor.body.mlp[0].weight, critic)
    model.learn(48, callback=CriticWarmup(1))
    assert np.abs(model.predict(inputs, deterministic=True)[0] - start).max() > 1e-4
    assert all(weight.requires_grad for weight in model.policy.parameters())


def test_the_critics_of_sac_warm_up_alone_too():
    encoder = tiny_encoder()
    head = TanhGaussianHead(encoder.feature_dim, 2, state_dim=2, exploration="gaussian", **unit_box(STATISTICS), **HEAD)
    policy = VLAPolicy(encoder, head, statistics=STATISTICS)
    kwargs = {"policy_kwargs": policy_kwargs(policy), "buffer_size": 300, "batch_size": 16, "seed": 0}
    model = sb3.SAC("MultiInputPolicy", encoded(policy), learning_starts=0, train_freq=1, **kwargs)
    warm_start(model, policy)
    inputs = encoded_observations(policy, raw_observations())
    start = model.predict(inputs, deterministic=True)[0]
    critic = model.critic.qf0[0].weight.detach().clone()
    model.learn(20, callback=CriticWarmup(100))
    np.testing.assert_array_equal(model.predict(inputs, deterministic=True)[0], start)
    assert model._n_updates > 0 and not torch.equal(model.critic.qf0[0].weight, critic)
    model.learn(20, callback=CriticWarmup(2))
    assert np.abs(model.predict(inputs, deterministic=True)[0] - start).max() > 1e-4
    assert all(weight.requires_grad for weight in model.actor.parameters())


@pytest.mark.parametrize("box", [spaces.Box(-2, 2, (2,), np.float32), spaces.Box(-1, 1, (1,), np.float32)])
def test_an_env_with_other_actions_is_refused(box):
    policy = tiny_policy(exploration="gaussian")
    envs = SyncVectorEnv([toy_env] * 2, autoreset_mode=AutoresetMode.SAME_STEP)
    env = EncodedVecEnv(EncodeObservation(envs, policy.encoder))
    env.action_space = box
    model = sb3.PPO("MultiInputPolicy", env, policy_kwargs=policy_kwargs(policy), n_steps=4, batch_size=4)
    with pytest.raises(
        ValueError, match=r"action space is Box.*the 2 entries of its head: use gymnasium.*RescaleAction"
    ):
        warm_start(model, policy)


def test_what_does_not_fit_is_refused():
    policy = tiny_policy(exploration="gaussian")
    env = encoded(policy)
    with pytest.raises(ValueError, match="explores by 'gaussian', the algorithm has use_sde=True"):
        warm_start(ppo(policy, env, use_sde=True), policy)
    deep = sb3.PPO("MultiInputPolicy", env, policy_kwargs={**policy_kwargs(policy), "net_arch": [8]})
    with pytest.raises(TypeError, match=r"net_arch pi=\[\]"):
        warm_start(deep, policy)
    with pytest.raises(TypeError, match="of PPO has not the shape"):
        to_policy(sb3.PPO("MultiInputPolicy", env), policy.encoder)
    sac = sb3.SAC("MultiInputPolicy", env, policy_kwargs=policy_kwargs(policy), buffer_size=100)
    with pytest.raises(TypeError, match="is a GaussianHead, expected TanhGaussianHead"):
        warm_start(sac, policy)
    head = TanhGaussianHead(policy.encoder.feature_dim, 2, state_dim=2, exploration="gaussian", **HEAD)
    narrow = VLAPolicy(policy.encoder, head, statistics=STATISTICS)
    with pytest.raises(ValueError, match=r"build the head with \*\*unit_box"):
        warm_start(sac, narrow)

    class Other(GaussianHead):
        def predict(self, features, state):
            return 2 * super().predict(features, state)

    other = VLAPolicy(policy.encoder, Other(policy.encoder.feature_dim, 2, **HEAD))
    with pytest.raises(TypeError, match="is a Other, expected GaussianHead or TanhGaussianHead"):
        policy_kwargs(other)
    with pytest.raises(ValueError, match="needs tokens and mask"):
        FrozenVLMExtractor(spaces.Dict(state=spaces.Box(-1, 1, (2,))))
    with pytest.raises(ValueError, match="state has 2 entries, its normalisation 1"):
        FrozenVLMExtractor(env.observation_space, state_mean=[0.0])
