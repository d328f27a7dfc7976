"""Which demonstrations share a batch with what an env gives."""

import numpy as np
import pytest
from gymnasium import spaces
from tiny import toy_env, toy_store

from vla_rl.chunks import ChunkActions, EnsembleActions
from vla_rl.data import Episode, EpisodeStore
from vla_rl.fitting import require_same_steps, require_unit_box


@pytest.fixture
def demos(tmp_path):
    return EpisodeStore(toy_store(tmp_path / "demos", episodes=1), mode="r")


def require(stores, env, *, chunk=1):
    require_same_steps(stores, observation=env.observation_space, action=env.action_space, chunk=chunk)


def test_demonstrations_of_the_env_fit_in_chunks_too(demos):
    require([demos], toy_env())
    for wrapper in (ChunkActions, EnsembleActions):
        require([demos], wrapper(toy_env(), chunk=4), chunk=4)
        with pytest.raises(
            ValueError, match=r"hold \{'actions': \[2\]\}, the env gives \{'actions': \[8\]\}; make them"
        ):
            require([demos], wrapper(toy_env(), chunk=4), chunk=2)


def test_only_cameras_state_and_actions_count(demos, tmp_path):
    episode = demos[0]
    force = np.zeros((episode.total_steps + 1, 3), np.float32)
    with EpisodeStore(tmp_path / "more") as more:
        names = ("actions", "rewards", "terminations", "truncations", "success", "source", "task", "instruction")
        rest = {name: getattr(episode, name) for name in names}
        more.append(Episode(observations={**episode.observations, "force": force}, **rest))
        require([more, EpisodeStore(tmp_path / "none")], toy_env())
    env = toy_env()
    env.observation_space = spaces.Dict({**env.observation_space.spaces, "depth": spaces.Box(0, 1, (8, 8))})
    require([demos], env)


def test_the_store_that_does_not_fit_is_named(demos, tmp_path):
    pictures = np.zeros((3, 32, 32, 3), np.uint8)
    observations = {"image": pictures, "image_wrist": pictures, "task_id": np.zeros(3, np.int64)}
    ends = np.array([False, True])
    labels = {"success": True, "source": "expert", "task": "t", "instruction": "i"}
    with EpisodeStore(tmp_path / "two") as two:
        two.append(Episode(observations, np.zeros((2, 2), np.float32), np.zeros(2), ends, ~ends & False, **labels))
        said = r"two' hold \{'image_wrist': \[32, 32, 3\]\}, the env gives \{'state': \[2\]\}; make them agree"
        with pytest.raises(ValueError, match=said):
            require([demos, two], toy_env())


@pytest.mark.parametrize(
    ("space", "advice"),
    [
        (spaces.Discrete(4), "wrap the env in a gymnasium.ActionWrapper"),
        (spaces.Dict(arm=spaces.Box(-1, 1, (3,))), "wrap the env in a gymnasium.ActionWrapper"),
        (spaces.Box(-1, 1, (3, 2)), "wrap the env in a gymnasium.ActionWrapper"),
        (spaces.Box(-np.inf, np.inf, (2,)), "RescaleAction, after bounds for all of it"),
        (spaces.Box(0, 1, (2,)), "RescaleAction$"),
    ],
)
def test_the_advice_fits_the_action_space(space, advice):
    with pytest.raises(ValueError, match=advice):
        require_unit_box(space)
