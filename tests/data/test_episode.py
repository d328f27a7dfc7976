import numpy as np
import pytest
from episode_maker import make_episode


def test_properties_follow_from_the_arrays():
    episode = make_episode(steps=4, rewards=np.array([0.0, 0.5, 0.25, 1.0]))
    assert episode.total_steps == 4
    assert episode.return_ == 1.75
    assert episode.image_keys == ("image",)


def observations(**changes):
    values = {**make_episode().observations, **changes}
    return {"observations": {key: value for key, value in values.items() if value is not None}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"actions": np.zeros((5, 4))}, "actions must be float32 .*got float64"),
        ({"actions": np.zeros(5, np.float32)}, r"actions must be float32 \[T, A\], got float32 \[5\]"),
        ({"actions": np.full((5, 4), np.nan, np.float32)}, "actions holds NaN"),
        ({"actions": np.zeros((0, 4), np.float32)}, "at least one step"),
        ({"actions": [[0.0]]}, "actions must be float32 .*got list"),
        ({"rewards": np.zeros(6)}, "rewards has length 6, expected T = 5"),
        ({"rewards": np.zeros(5, np.float32)}, "rewards must be float64"),
        ({"terminations": np.zeros(5, int)}, "terminations must be bool"),
        ({"truncations": np.zeros(4, bool)}, "truncations has length 4"),
        ({"infos": {"x": np.zeros(5)}}, r'infos\["x"\] has length 5, expected T \+ 1 = 6'),
        ({"infos": {"x": np.array(["a"] * 6)}}, r'infos\["x"\] must be an array .* of numbers or bools'),
        ({"task": ""}, "task must be a text, for source and task not an empty one; got ''"),
        ({"task": 3}, "task must be a text"),
        ({"instruction": None}, "instruction must be a text"),
        ({"infos": {"arm/x": np.zeros(6)}}, "infos have the name 'arm/x'; expected a text without a slash"),
        (observations(**{"arm/joints": np.zeros(6)}), "observations have the name 'arm/joints'"),
        (observations(**{"": np.zeros(6)}), "observations have the name ''"),
        (observations(image=np.zeros((6, 8, 8, 3), np.float32)), r'"image"\] must be uint8 .*got float32'),
        (observations(image=np.zeros((6, 3, 8, 8), np.uint8)), "three colours last"),
        (observations(image=np.zeros((5, 8, 8, 3), np.uint8)), r"length 5, expected T \+ 1 = 6"),
        (observations(image=None), 'need "image"'),
        (observations(task_id=None), 'need "task_id"'),
        (observations(task_id=np.full(6, -1)), "negative"),
        (observations(state=np.zeros((6, 3))), "must be float32"),
    ],
)
def test_each_mistake_is_named(changes, message):
    with pytest.raises(ValueError, match=message):
        make_episode(**changes)
