"""Data sets that Minari itself writes, of every kind of action and observation, against gymnasium.spaces.flatten."""

import io
import json

import h5py
import numpy as np
import pytest
from gymnasium import spaces

from vla_rl.data import EpisodeStore, Labels, UnsafeFileError, import_minari, verify

minari = pytest.importorskip("minari")
STEPS = 5
LABELS = Labels(instruction="go", success=True)
ARM = spaces.Box(-1, 1, (3,), np.float32)
IMAGE = spaces.Box(0, 255, (32, 40, 3), np.uint8)
ACTIONS = {
    "box": ARM,
    "box of two dimensions": spaces.Box(-2, 2, (2, 3), np.float32),
    "box of integers": spaces.Box(-100, 100, (4,), np.int16),
    "discrete": spaces.Discrete(7),
    "discrete from -3": spaces.Discrete(5, start=-3),
    "multi-discrete": spaces.MultiDiscrete([2, 5, 3]),
    "multi-discrete, two dimensions, started": spaces.MultiDiscrete([[2, 3], [4, 2]], start=[[1, 0], [-2, 7]]),
    "multi-binary": spaces.MultiBinary(4),
    "multi-binary of two dimensions": spaces.MultiBinary([2, 2]),
    "text": spaces.Text(6, min_length=2, charset="zyabc"),
    "dict": spaces.Dict({"wrist": ARM, "gripper": spaces.Discrete(2), "base": spaces.MultiBinary(3)}),
    "tuple": spaces.Tuple((spaces.Discrete(3), ARM)),
    "nested": spaces.Dict(
        {
            "z": spaces.Tuple((spaces.Dict({"b": ARM, "a": spaces.Discrete(2, start=1)}), spaces.MultiDiscrete([3]))),
            "a": spaces.Dict({"y": spaces.Tuple((ARM, ARM)), "x": spaces.Text(3, charset="ab")}),
        }
    ),
}
FORMS = ("hdf5", "arrow", "parquet")


def gather(space, values):
    """Values of single steps as the buffers of Minari hold them: a column per array, texts in lists."""
    if isinstance(space, spaces.Dict):
        return {key: gather(part, [value[key] for value in values]) for key, part in space.items()}
    if isinstance(space, spaces.Tuple):
        return tuple(gather(part, [value[k] for value in values]) for k, part in enumerate(space))
    return list(values) if isinstance(space, spaces.Text) else np.stack([np.asarray(value) for value in values])


@pytest.fixture
def record(tmp_path, monkeypatch):
    """Lets Minari write two episodes of samples, and gives these."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))

    def write(observations, actions, form, **options):
        observations.seed(1)
        actions.seed(2)
        told, buffers = [], []
        for number in range(2):
            seen = [observations.sample() for _ in range(STEPS + 1)]
            done = [actions.sample() for _ in range(STEPS)]
            told.append((seen, done))
            buffers.append(
                minari.data_collector.EpisodeBuffer(
                    id=number,
                    observations=gather(observations, seen),
                    actions=gather(actions, done),
                    rewards=[0.5 * k for k in range(STEPS)],
                    terminations=[False] * (STEPS - 1) + [True],
                    truncations=[False] * STEPS,
                )
            )
        minari.create_dataset_from_buffers(
            "test/spaces-v0", buffers, observation_space=observations, action_space=actions, data_format=form, **options
        )
        return told

    return write


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ACTIONS)
def test_actions_are_the_vectors_that_gymnasium_makes_of_them(tmp_path, record, name, form):
    if form != "hdf5":
        pytest.importorskip("pyarrow")
    space = ACTIONS[name]
    told = record(spaces.Dict({"image": IMAGE, "state": ARM}), space, form, jpeg_encoding=False)
    space = minari.load_dataset("test/spaces-v0").action_space  # a text's characters are sorted in it
    store = import_minari("test/spaces-v0", tmp_path / "s", labels=LABELS)
    for stored, (seen, done) in zip(store, told, strict=True):
        expected = np.stack([spaces.flatten(space, action) for action in done])
        assert stored.actions.shape == (STEPS, spaces.flatdim(space))
        np.testing.assert_array_equal(stored.actions, expected)
        np.testing.assert_array_equal(stored.observations["image"], np.stack([value["image"] for value in seen]))
        np.testing.assert_array_equal(stored.observations["state"], np.stack([value["state"] for value in seen]))
        assert stored.rewards.tolist() == [0.5 * k for k in range(STEPS)] and stored.terminations[-1]
        if name not in ("text", "nested"):  # Gymnasium does not turn texts back
            for vector, action in zip(stored.actions, done, strict=True):
                back = spaces.unflatten(space, vector)
                assert spaces.flatten(space, back).tolist() == spaces.flatten(space, action).tolist()
    assert [finding for finding in verify(store.path).findings if "outside [-1, 1]" not in finding.message] == []


def test_what_minari_itself_reads_is_what_is_imported(tmp_path, record):
    """Its own reader, so that the spaces are those of its metadata, whose dictionaries are sorted."""
    from collections import OrderedDict

    space = spaces.Dict(OrderedDict([("z", ARM), ("a", spaces.Discrete(3))]))
    record(spaces.Dict({"image": IMAGE}), space, "hdf5", jpeg_encoding=False)
    store = import_minari("test/spaces-v0", tmp_path / "s", labels=LABELS)
    dataset = minari.load_dataset("test/spaces-v0")
    for stored, theirs in zip(store, dataset, strict=True):
        for step, vector in enumerate(stored.actions):
            action = {key: part[step] for key, part in theirs.actions.items()}
            np.testing.assert_array_equal(vector, spaces.flatten(dataset.action_space, action))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("form", FORMS)
def test_data_sets_of_minigrid(tmp_path, record, form):
    """Its spaces: the picture is too small for Minari's JPEG, and the sentence is the instruction."""
    if form != "hdf5":
        pytest.importorskip("pyarrow")
    mission = spaces.Text(40, charset="abcdefghijklmnopqrstuvwxyz ,")
    grid = spaces.Box(0, 255, (7, 7, 3), np.uint8)
    space = spaces.Dict({"direction": spaces.Discrete(4), "image": grid, "mission": mission})
    told = record(space, spaces.Discrete(7), form)
    store = import_minari("test/spaces-v0", tmp_path / "s", labels=Labels(success=True))
    for number, (stored, (seen, done)) in enumerate(zip(store, told, strict=True)):
        assert stored.instruction == seen[0]["mission"]
        assert stored.observations["task_id"].tolist() == [number] * (STEPS + 1)
        np.testing.assert_array_equal(stored.observations["image"], np.stack([value["image"] for value in seen]))
        assert stored.observations["direction"].tolist() == [value["direction"] for value in seen]
        assert stored.observations["direction"].dtype == np.int64
        np.testing.assert_array_equal(stored.actions, np.eye(7)[done])
    labels = Labels(success=True, state_keys=("direction",))
    store = import_minari("test/spaces-v0", tmp_path / "t", labels=labels)
    assert store[1].observations["state"][:, 0].tolist() == [value["direction"] for value in told[1][0]]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("jpeg", [False, True])
@pytest.mark.parametrize(
    "image", [IMAGE, spaces.Box(0, 255, (40, 32), np.uint8), spaces.Box(0, 255, (48, 32, 1), np.uint8)]
)
def test_observations_that_are_a_picture(tmp_path, record, form, jpeg, image):
    """By itself, in colour or in grey, compressed as Minari does or not."""
    pillow = pytest.importorskip("PIL.Image")
    if form != "hdf5":
        pytest.importorskip("pyarrow")
    if jpeg and image.shape[-1] == 1:
        pytest.skip("Minari does not write these")
    told = record(image, spaces.Discrete(2), form, jpeg_encoding=jpeg)
    store = import_minari("test/spaces-v0", tmp_path / "s", labels=LABELS)
    assert store.step_shapes.keys() == {"image", "task_id", "actions"}
    for stored, (seen, _) in zip(store, told, strict=True):
        for frame, picture in zip(stored.observations["image"], seen, strict=True):
            if jpeg:
                buffer = io.BytesIO()
                pillow.fromarray(picture).save(buffer, "JPEG")
                picture = np.asarray(pillow.open(buffer))
            shown = picture if picture.shape[-1] == 3 else np.stack([picture.reshape(picture.shape[:2])] * 3, axis=-1)
            np.testing.assert_array_equal(frame, shown)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("form", FORMS)
def test_nested_observations_and_pictures_drawn_from_them(tmp_path, record, form):
    if form != "hdf5":
        pytest.importorskip("pyarrow")
    space = spaces.Dict(
        {
            "robot": spaces.Dict({"joints": ARM, "touch": spaces.MultiBinary([2, 2])}),
            "objects": spaces.Tuple((spaces.Discrete(3, start=1), spaces.MultiDiscrete([[4, 5], [6, 7]]))),
            "scale": spaces.Box(0, 1, (), np.float64),
        }
    )
    told = record(space, spaces.Tuple((spaces.Discrete(2), ARM)), form)

    def render(arrays):
        assert arrays["actions"].shape == (STEPS, 5)
        brightness = (arrays["observations/robot.joints"][:, 0] * 100 + 100).astype(np.uint8)
        return np.broadcast_to(brightness[:, None, None, None], (STEPS + 1, 8, 8, 3))

    labels = Labels(instruction="go", success=False, state_keys=("scale", "robot.joints", "objects.0"))
    with pytest.raises(ValueError, match=r"no pictures, only .*'objects\.1'.*--render"):
        import_minari("test/spaces-v0", tmp_path / "s", labels=labels)
    store = import_minari("test/spaces-v0", tmp_path / "s", labels=labels, render=render)
    for stored, (seen, _) in zip(store, told, strict=True):
        parts = [np.array([np.r_[v["scale"], v["robot"]["joints"], v["objects"][0]] for v in seen])]
        np.testing.assert_array_equal(stored.observations["state"], np.concatenate(parts).astype(np.float32))
        np.testing.assert_array_equal(stored.observations["objects.1"], [value["objects"][1] for value in seen])
        np.testing.assert_array_equal(stored.observations["robot.touch"], [value["robot"]["touch"] for value in seen])
        joint = np.array([value["robot"]["joints"][0] for value in seen])
        np.testing.assert_array_equal(stored.observations["image"][:, 3, 3, 1], (joint * 100 + 100).astype(np.uint8))


def handmade(root, space, actions):
    """A data set of one episode with an action space and actions of any kind, which need not fit each other."""
    (root / "data").mkdir(parents=True)
    metadata = {"total_episodes": 1, "data_format": "hdf5", "action_space": json.dumps(space)}
    (root / "data" / "metadata.json").write_text(json.dumps(metadata))
    with h5py.File(root / "data" / "main_data.hdf5", "w") as file:
        group = file.create_group("episode_0")
        group["observations"] = np.zeros((4, 8, 8, 3), np.uint8)
        for name, array in {"rewards": np.zeros(3), "terminations": [False] * 3, "truncations": [False] * 3}.items():
            group[name] = array
        for name, array in actions.items():
            group[name] = array
    return root


DISCRETE = {"type": "Discrete", "n": 3, "start": 0}


@pytest.mark.parametrize(
    ("space", "actions", "message"),
    [
        (DISCRETE, np.array([0, 1, 3]), r"outside their space of \[3\] values from \[0\] on"),
        (DISCRETE, np.array([0, -1, 2]), "outside their space"),
        (DISCRETE, np.zeros((3, 2), int), "expected 1 whole numbers per step"),
        (DISCRETE, np.array([0.0, 1.0, 2.0]), r"float64 \[3\], expected 1 whole"),
        (DISCRETE | {"n": 1 << 30}, np.zeros(3, int), "vectors of 1,073,741,824 numbers; refused"),
        (DISCRETE | {"n": 1 << 80}, np.zeros(3, int), "not that of a Minari data set: its action_space is none"),
        (DISCRETE | {"n": 0}, np.zeros(3, int), "choice between no values"),
        ({"type": "MultiDiscrete", "nvec": [[2], [3, 4]], "start": 0}, np.zeros(3, int), "its action_space is none"),
        ({"type": "Box", "shape": [-1], "dtype": "float32"}, np.zeros(3, int), "its action_space is none"),
        ({"type": "Box", "shape": [1], "dtype": "bogus"}, np.zeros(3, int), "its action_space is none"),
        ({"type": "Graph"}, np.zeros(3, int), "it has a 'Graph'"),
        ({"type": "Text", "charset": "ab", "max_length": 2}, ["a", "b", "c"], "text 'c', which is outside"),
        ({"type": "Text", "charset": "ab", "max_length": 2}, ["a", "b", "aab"], "text 'aab', which is outside"),
        ({"type": "Text", "charset": "ab", "max_length": 2}, np.zeros(3), "no values of a Text"),
        ({"type": "Text", "charset": "ab", "max_length": 1 << 40}, ["a", "b", "c"], "refused"),
        ({"type": "Dict", "subspaces": {"a": DISCRETE}}, np.zeros(3, int), r"no 'actions/a', though its action_space"),
        ({"type": "Dict", "subspaces": {}}, np.zeros(3, int), "different lengths, or none"),
        ([], np.zeros(3, int), "its action_space is none"),
    ],
)
def test_actions_outside_their_space_and_hostile_spaces_are_refused(tmp_path, space, actions, message):
    root = handmade(tmp_path / "bad", space, {"actions": actions})
    with pytest.raises(ValueError, match=message):
        import_minari(root, tmp_path / "s", labels=LABELS)
    assert not (tmp_path / "s").exists()


def test_a_space_that_nests_without_end_is_refused(tmp_path):
    space = DISCRETE
    for _ in range(50):
        space = {"type": "Tuple", "subspaces": [space]}
    with pytest.raises(ValueError, match="nests too deep"):
        import_minari(handmade(tmp_path / "bad", space, {"actions": [0, 1, 2]}), tmp_path / "s", labels=LABELS)


def test_rows_that_all_refer_to_one_long_text_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("vla_rl.data.foreign.MAX_TEXTS", 25_000)
    space = {"type": "Text", "charset": "a", "max_length": 10_000}
    root = handmade(tmp_path / "bad", space, {"actions": ["a" * 9_000] * 3})
    with pytest.raises(UnsafeFileError, match="more than 25,000 characters"):
        import_minari(root, tmp_path / "s", labels=LABELS)


def test_a_round_trip_of_vectors_needs_no_space(tmp_path):
    """What was imported is a data set of floats, also for Minari."""
    root = handmade(tmp_path / "a", DISCRETE, {"actions": np.array([2, 0, 1])})
    import_minari(root, tmp_path / "s", labels=LABELS)
    again = import_minari(tmp_path / "s", tmp_path / "t")
    np.testing.assert_array_equal(again[0].actions, [[0, 0, 1], [1, 0, 0], [0, 1, 0]])
    assert EpisodeStore(tmp_path / "t", "r")[0].actions.dtype == np.float32
    theirs = minari.MinariDataset(tmp_path / "s" / "data")
    np.testing.assert_array_equal(theirs[0].actions, again[0].actions)
