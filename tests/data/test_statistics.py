import numpy as np
import pytest
from episode_maker import make_episode

from vla_rl.data import BalancedSampler, EpisodeStore, TaskSummary, compute_statistics, summarize


def stored(root, episodes):
    with EpisodeStore(root) as store:
        for episode in episodes:
            store.append(episode)
    return store


def test_streaming_equals_numpy_over_all_steps(tmp_path):
    episodes = [make_episode(seed, steps=1 + 7 * seed) for seed in range(6)]
    for episode in episodes:
        episode.actions[:, 1] = 0.25
        episode.observations["state"][:, 0] += 1000  # a mean far from zero, where the sum of squares would lose digits
        episode.observations["state"][-1] = 1e6  # after the last action: not a step
    stores = [stored(tmp_path / "one", episodes[:2]), stored(tmp_path / "two", episodes[2:])]
    statistics = compute_statistics([*stores, EpisodeStore(tmp_path / "empty")])
    actions = np.concatenate([episode.actions for episode in episodes]).astype(np.float64)
    states = np.concatenate([episode.observations["state"][:-1] for episode in episodes]).astype(np.float64)
    assert (statistics.num_steps, statistics.num_episodes) == (len(actions), 6) == (111, 6)
    np.testing.assert_allclose(statistics.action_mean, actions.mean(0), rtol=1e-6)
    np.testing.assert_allclose(statistics.action_std[[0, 2, 3]], actions.std(0)[[0, 2, 3]], rtol=1e-6)
    np.testing.assert_allclose(statistics.state_mean, states.mean(0), rtol=1e-6)
    np.testing.assert_allclose(statistics.state_std, states.std(0), rtol=1e-6)
    assert statistics.action_std[1] == np.float32(1e-3)
    assert statistics.action_mean.dtype == statistics.state_std.dtype == np.float32


def test_no_state_no_statistics_of_it(tmp_path):
    statistics = compute_statistics([stored(tmp_path, [make_episode(state=None)])])
    assert statistics.state_mean is None and statistics.state_std is None


def test_mistakes_are_named(tmp_path):
    with pytest.raises(ValueError, match="no episodes"):
        compute_statistics([EpisodeStore(tmp_path / "empty")])
    stores = [stored(tmp_path / "one", [make_episode()]), stored(tmp_path / "two", [make_episode(state=5)])]
    with pytest.raises(ValueError, match="'state' differs between the stores"):
        compute_statistics(stores)


def test_a_store_or_a_path_in_place_of_a_list_is_named(tmp_path):
    with EpisodeStore(tmp_path / "store") as store:
        for given in (store, str(tmp_path), [tmp_path]):
            with pytest.raises(TypeError, match=r"expected a list of stores; give \[EpisodeStore"):
                compute_statistics(given)
            with pytest.raises(TypeError, match=r"expected a list of stores; give \[EpisodeStore"):
                BalancedSampler(given, batch_size=1, seed=0)


def test_summary_per_task_and_source(tmp_path):
    store = stored(
        tmp_path,
        [
            make_episode(0, steps=4, task="b", success=True),
            make_episode(1, steps=6, task="a", success=True, source="rl"),
            make_episode(2, steps=3, task="a", success=False, source="rl"),
            make_episode(3, steps=8, task="a", success=True),
            make_episode(4, steps=9, task="a", success=True, source="rl"),
        ],
    )
    assert summarize(store) == [
        TaskSummary("a", "expert", episodes=1, steps=8, success_rate=1.0, mean_length=8.0),
        TaskSummary("a", "rl", episodes=3, steps=18, success_rate=2 / 3, mean_length=6.0),
        TaskSummary("b", "expert", episodes=1, steps=4, success_rate=1.0, mean_length=4.0),
    ]
    assert summarize(EpisodeStore(tmp_path / "empty")) == []
