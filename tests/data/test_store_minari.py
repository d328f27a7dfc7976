"""Minari itself is the judge of the layout."""

import numpy as np
import pytest
from episode_maker import make_episode

from vla_rl.data import EpisodeStore

minari = pytest.importorskip("minari")


@pytest.fixture
def episodes():
    return [
        make_episode(0, size=64),
        make_episode(1, size=64, steps=8, task="drawer-close", task_id=3, seed=None, infos={}),
        make_episode(2, size=64, steps=2, task_id=1),
    ]


def fill(root, episodes):
    store = EpisodeStore(root)
    for episode in episodes:
        store.append(episode)
    return store


def compare(dataset, episodes):
    assert len(dataset) == dataset.total_episodes == len(episodes)
    assert dataset.total_steps == sum(episode.total_steps for episode in episodes)
    for index, (stored, episode) in enumerate(zip(dataset.iterate_episodes(), episodes, strict=True)):
        assert stored.id == index
        assert stored.observations.keys() == episode.observations.keys()
        for name in ("observations", "infos"):
            for key, value in getattr(episode, name).items():
                read = getattr(stored, name)[key]
                assert read.dtype == value.dtype
                np.testing.assert_array_equal(read, value)
        for name in ("actions", "rewards", "terminations", "truncations"):
            assert getattr(stored, name).dtype == getattr(episode, name).dtype
            np.testing.assert_array_equal(getattr(stored, name), getattr(episode, name))
        first = {key: value[0] for key, value in stored.observations.items()}
        assert dataset.observation_space.contains(first)
        assert dataset.action_space.contains(stored.actions[0])
        assert f"total_steps={episode.total_steps}" in repr(stored)


def test_minari_reads_the_folder_while_it_is_open_and_after(tmp_path, episodes):
    store = fill(tmp_path / "demos", episodes)
    dataset = minari.MinariDataset(tmp_path / "demos" / "data")
    assert dataset.id == "demos-v0"
    compare(dataset, episodes)
    store.close()
    compare(minari.MinariDataset(tmp_path / "demos" / "data"), episodes)


def test_minari_loads_the_dataset_by_name(tmp_path, episodes, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    fill(tmp_path / "vla" / "drawers-v2", episodes).close()
    dataset = minari.load_dataset("vla/drawers-v2")
    compare(dataset, episodes)
    assert dataset.id == "vla/drawers-v2"
    assert dataset.env_spec is None
    assert dataset.spec.minari_version in minari.supported_dataset_versions
    assert "vla/drawers-v2" in minari.list_local_datasets(compatible_minari_version=True)


def test_minari_sees_the_spaces_and_our_attributes(tmp_path, episodes):
    fill(tmp_path / "demos", episodes).close()
    dataset = minari.MinariDataset(tmp_path / "demos" / "data")
    space = dataset.observation_space
    assert space["image"].shape == (64, 64, 3) and space["image"].dtype == np.uint8
    assert (space["image"].low.min(), space["image"].high.max()) == (0, 255)
    assert space["state"].shape == (3,) and space["task_id"].n == 4
    assert dataset.action_space.shape == (4,) and dataset.action_space.dtype == np.float32
    attributes = list(dataset.storage.get_episode_metadata([0, 1]))
    assert attributes[0]["seed"] == 0 and "seed" not in attributes[1]
    assert [entry["success"] for entry in attributes] == [False, True]
    assert [entry["task"] for entry in attributes] == ["drawer-open", "drawer-close"]
    assert [entry["total_steps"] for entry in attributes] == [5, 8]
    assert (attributes[0]["source"], attributes[0]["iteration"], attributes[0]["policy_version"]) == (
        "expert",
        1,
        "abc",
    )


def test_minari_filters_and_ignores_extras(tmp_path, episodes):
    with EpisodeStore(tmp_path / "demos") as store:
        for episode in episodes:
            store.append(episode, extras={"features": np.zeros((2, 3))})
    dataset = minari.MinariDataset(tmp_path / "demos" / "data")
    compare(dataset, episodes)
    assert dataset.filter_episodes(lambda episode: len(episode) > 3).total_episodes == 2
