"""What `export_robomimic` writes, read by robomimic's own loader, from a folder that nothing else sees."""

import subprocess
import sys

import numpy as np
import pytest
from episode_maker import make_episode

from vla_rl.data import EpisodeStore, export_robomimic

pytestmark = pytest.mark.slow

READ = """
import sys
import numpy as np
import robomimic.utils.obs_utils as obs_utils
from robomimic.utils.dataset import SequenceDataset

obs_utils.initialize_obs_utils_with_obs_specs({"obs": {"rgb": ["image"], "low_dim": ["state"]}})
dataset = SequenceDataset(sys.argv[1], obs_keys=("image", "state"), dataset_keys=("actions", "rewards", "dones"))
items = {"image": [], "state": [], "actions": [], "rewards": [], "dones": []}
for item in (dataset[index] for index in range(len(dataset))):
    for key, rows in items.items():
        rows.append((item if key in item else item["obs"])[key][0])
np.savez(sys.argv[2], demos=dataset.demos, **items)
"""


@pytest.fixture(scope="module")
def robomimic(tmp_path_factory):
    """A folder with robomimic 0.3.0 and, of the packages it asks for, what its loader uses beside torch."""
    folder = tmp_path_factory.mktemp("robomimic")
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(folder)]
    done = subprocess.run([*command, "robomimic==0.3.0", "termcolor"], capture_output=True, text=True)
    if done.returncode and "No matching distribution" in done.stderr:
        pytest.skip("pip finds no robomimic")
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("materialize", [False, True], ids=["view", "alone"])
def test_robomimic_reads_every_step(tmp_path, robomimic, materialize):
    with EpisodeStore(tmp_path / "demos") as store:
        for seed, steps in enumerate((5, 3, 8)):
            store.append(make_episode(seed, steps=steps))
    out = export_robomimic(store, tmp_path / "demos.hdf5", materialize=materialize)
    command = [sys.executable, "-c", READ, str(out), str(tmp_path / "read.npz")]
    done = subprocess.run(command, capture_output=True, text=True, env={"PYTHONPATH": str(robomimic)})
    assert done.returncode == 0, done.stderr
    read = np.load(tmp_path / "read.npz")
    assert read["demos"].tolist() == ["demo_0", "demo_1", "demo_2"]
    episodes = list(EpisodeStore(tmp_path / "demos", "r"))
    for key in ("actions", "rewards"):
        written = np.concatenate([getattr(episode, key) for episode in episodes])
        assert read[key].dtype == written.dtype
        assert np.array_equal(read[key], written), key
    for key in ("image", "state"):
        written = np.concatenate([episode.observations[key][:-1] for episode in episodes])
        assert read[key].dtype == written.dtype
        assert np.array_equal(read[key], written), key
    ends = np.cumsum([episode.total_steps for episode in episodes]) - 1
    assert np.flatnonzero(read["dones"]).tolist() == ends.tolist()
