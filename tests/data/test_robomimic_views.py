"""Views that `export_robomimic` makes have their pictures whatever paths and tasks are called."""

import h5py
import numpy as np
import pytest
from episode_maker import make_episode

from vla_rl.data import EpisodeStore, export_robomimic


@pytest.mark.parametrize("folder", ["50%", "at 50% of it", "100%% done", "%b"])
def test_a_view_has_its_pictures_whatever_the_paths(tmp_path, folder):
    episode = make_episode(1)
    episode.observations["rate%b"] = np.arange(6.0)
    with EpisodeStore(tmp_path / folder / "demos") as store:
        store.append(episode)
    (tmp_path / "far/away").mkdir(parents=True)
    (tmp_path / "far/away/old.hdf5").touch()
    link = tmp_path / "link.hdf5"
    link.symlink_to(tmp_path / "far/away/old.hdf5")
    (tmp_path / "there").symlink_to(tmp_path / "far/away")
    for out in (tmp_path / "plain.hdf5", link, tmp_path / "there/in.hdf5", tmp_path / folder / "beside.hdf5"):
        with h5py.File(export_robomimic(store, out, overwrite=out == link)) as file:
            demo = file["data/demo_0"]
            assert demo["obs/image"].is_virtual
            for key, array in episode.observations.items():
                np.testing.assert_array_equal(demo[f"obs/{key}"][()], array[:-1])
                np.testing.assert_array_equal(demo[f"next_obs/{key}"][()], array[1:])


def test_every_task_has_a_mask_of_its_own(tmp_path):
    tasks = ["a b", "a_b", "a/b", "\u5f00\u95e8", "\u5173\u95e8", "."]
    with EpisodeStore(tmp_path / "demos") as store:
        for number, task in enumerate([*tasks, "a/b"]):
            store.append(make_episode(number, task=task))
    with h5py.File(export_robomimic(store, tmp_path / "views.hdf5")) as file:
        masks = {name: demos[()].tolist() for name, demos in file["mask"].items()}
    assert masks == {
        "a b": [b"demo_0"],
        "a_b": [b"demo_1"],
        "a_b_": [b"demo_2", b"demo_6"],
        "\u5f00\u95e8": [b"demo_3"],
        "\u5173\u95e8": [b"demo_4"],
        "_": [b"demo_5"],
    }
