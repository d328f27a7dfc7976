import json

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.envs.registration import EnvSpec
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import SyncVectorEnv
from walks import PIXELS, TABLE, Conventional, Robot, Walk

from vla_rl.data.foreign import Labels, assemble
from vla_rl.envs import VLAObservation, instruction_table, instructions_for, resize_area
from vla_rl.vector import WorkerVectorEnv


def wrap(**kwargs):
    kwargs = {"success_key": "is_success", "task_id": 0, **kwargs}
    return VLAObservation(Walk(render_mode="rgb_array"), instructions=TABLE, **kwargs)


def test_a_box_becomes_the_state_and_the_rendering_the_image():
    env = wrap(task_id=1)
    obs, info = env.reset(seed=3)
    bare = Walk(render_mode="rgb_array")
    raw, _ = bare.reset(seed=3)
    assert obs["state"].dtype == np.float32 and obs["state"].tolist() == raw.ravel().tolist()
    np.testing.assert_array_equal(obs["image"], bare.render())
    assert obs["task_id"] == 1
    assert info == {"success": False, "instruction": "open the drawer"}
    assert env.observation_space["image"].shape == (4, 6, 3)
    assert env.observation_space["task_id"] == spaces.Discrete(3)
    flags = [env.step(env.action_space.sample())[4]["success"] for _ in range(3)]
    assert flags == [False, True, False] and all(type(flag) is bool for flag in flags)


def test_it_passes_the_environment_checker():
    check_env(wrap(image_size=(2, 3)), skip_render_check=True)


def test_a_dict_with_two_cameras_and_a_state_of_two_parts():
    env = VLAObservation(
        Robot(), instructions=["go"], image_key=["wrist", "front"], state_key=["joints", "grip"], success_key=None
    )
    obs, _ = env.reset(seed=0)
    assert set(obs) == {"image_wrist", "image_front", "state", "task_id"}
    np.testing.assert_array_equal(obs["image_wrist"], obs["image_front"] + 1)
    np.testing.assert_allclose(obs["state"], [0.1, 0.2, 0, 0, 1])  # grip 2 of 3, one-hot
    assert env.observation_space.contains(obs)


def test_one_camera_of_a_dict_and_no_state():
    env = VLAObservation(Robot(), instructions=["go"], image_key="front", success_key=None)
    obs, _ = env.reset(seed=0)
    assert set(obs) == {"image", "task_id"}
    assert env.step(env.action_space.sample())[4]["success"] is False


def test_success_from_a_function_of_the_step():
    env = wrap(success_key=lambda observation, reward, terminated, truncated, info: observation[1, 0] >= 3)
    env.reset(seed=0)
    assert [env.step(env.action_space.sample())[4]["success"] for _ in range(4)] == [False, False, True, True]


@pytest.mark.parametrize("returned", [None, np.array([True, False])])
def test_a_function_that_does_not_say_whether_it_succeeded(returned):
    env = wrap(success_key=lambda *step: returned)
    env.reset(seed=0)
    with pytest.raises(ValueError, match=r"function returned .* has to return True or False"):
        env.step(env.action_space.sample())


def test_a_reset_without_info_is_named():
    class Old(Walk):
        def reset(self, **kwargs):
            return {"joints": 1, "image": 2}

    with pytest.raises(TypeError, match=r"Old.* gave no \(observation, info dict\)"):
        VLAObservation(Old(render_mode="rgb_array"), instructions=["go"], image_size=4).reset()


def test_a_missing_success_key_names_the_keys_there_are():
    env = wrap(success_key="success")
    env.reset(seed=0)
    with pytest.raises(KeyError, match=r"no 'success', only \['is_success'\].*success_key"):
        env.step(env.action_space.sample())


def test_an_env_of_the_convention_keeps_its_task_id_table_and_state():
    env = VLAObservation(Conventional(task_id=2), image_size=2)
    obs, info = env.reset(seed=0)
    assert obs["task_id"] == 2 and info["instruction"] == TABLE[2] and env.instructions == TABLE
    assert obs["image"].shape == (2, 2, 3) and obs["state"].tolist() == [0.0]


RAMP = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)
GREY = RAMP[:, :, 0]


@pytest.mark.parametrize(
    ("image", "low", "high", "expected"),
    [
        (RAMP, 0, 255, RAMP),
        (GREY, 0, 255, np.stack([GREY] * 3, axis=2)),
        (GREY[:, :, None], 0, 255, np.stack([GREY] * 3, axis=2)),
        (GREY[None], 0, 255, np.stack([GREY] * 3, axis=2)),
        (np.moveaxis(RAMP, 2, 0), 0, 255, RAMP),
        (np.concatenate([RAMP, RAMP[:, :, :1]], axis=2), 0, 255, RAMP),
        ((RAMP / 255).astype(np.float32), 0, 1, RAMP),
        ((RAMP / 127.5 - 1).astype(np.float64), -1, 1, RAMP),
    ],
    ids=["rgb", "grey", "grey-last", "grey-first", "rgb-first", "rgba", "0-to-1", "-1-to-1"],
)
def test_images_of_every_kind_become_the_same_picture(image, low, high, expected):
    class Camera(Walk):
        observation_space = spaces.Dict(eye=spaces.Box(low, high, image.shape, image.dtype))

        def observe(self):
            return {"eye": image}

    env = VLAObservation(Camera(), instructions=["look"], image_key="eye", success_key=None)
    obs, _ = env.reset(seed=0)
    assert env.observation_space.contains(obs)
    np.testing.assert_array_equal(obs["image"], expected)
    assert not np.shares_memory(obs["image"], image), "an environment may reuse its buffer at the next step"


class Nested(Walk):
    """Three levels of Dict, with the task in words and a camera next to the joints."""

    words = ("push", "pull")
    observation_space = spaces.Dict(
        arm=spaces.Dict(
            joints=spaces.Box(-3, 3, (3,), np.float64),
            hand=spaces.Dict(force=spaces.Box(0, 9, (1,), np.float64), eye=PIXELS),
        ),
        word=spaces.Text(9),
    )

    def observe(self):
        hand = {"force": np.array([7.0]), "eye": np.full((4, 6, 3), 50, np.uint8)}
        return {"arm": {"joints": np.arange(3.0), "hand": hand}, "word": self.words[int(self.x) % 2]}


def test_a_float_image_that_its_space_does_not_hold():
    class Painted(gym.Env):
        action_space = gym.spaces.Box(-1, 1, (1,), np.float32)

        def __init__(self, high, value):
            self.observation_space = gym.spaces.Box(0, high, (4, 4, 3), np.float32)
            self.value = value

        def reset(self, *, seed=None, options=None):
            return np.full((4, 4, 3), self.value, np.float32), {}

    def shown(high, value):
        return VLAObservation(Painted(high, value), instructions=["go"]).reset()[0]["image"].max()

    assert shown(1, 1.005) == 255 and shown(255, 0) == 0
    with pytest.raises(ValueError, match="values from 200 to 200, its space 0 to 1; correct"):
        shown(1, 200)
    with pytest.warns(UserWarning, match="from 0.5 to 0.5, its space goes to 255: all but black"):
        shown(255, 0.5)


def test_nested_keys():
    env = VLAObservation(
        Nested(),
        instructions=["go"],
        image_key=["arm/hand/eye"],
        state_key=["arm/hand/force", "arm/joints"],
        success_key=None,
    )
    obs, _ = env.reset(seed=0)
    assert env.observation_space.contains(obs) and set(obs) == {"image_arm_hand_eye", "state", "task_id"}
    assert obs["state"].tolist() == [7, 0, 1, 2]
    assert env.observation_space["state"].high.tolist() == [9, 3, 3, 3]


class Cameras(gym.Env):
    """Pictures under the given paths, each of one colour, the first of 0; ``told`` is an array with the task."""

    action_space = spaces.Box(-1, 1, (1,), np.float32)

    def __init__(self, *paths):
        self.observation, space = {"told": np.array([1])}, {"told": spaces.Box(0, 1, (1,), np.int64)}
        self.observation["task_id"], space["task_id"] = self.observation["told"], space["told"]
        for color, path in enumerate(paths):
            *above, name = path.split("/")
            observation, part = self.observation, space
            for key in above:
                observation, part = observation.setdefault(key, {}), part.setdefault(key, {})
            observation[name], part[name] = np.full((4, 6, 3), color, np.uint8), PIXELS
        self.observation_space = spaces.Dict(
            {key: spaces.Dict(part) if isinstance(part, dict) else part for key, part in space.items()}
        )

    def reset(self, *, seed=None, options=None):
        return self.observation, {}


@pytest.mark.parametrize(
    ("keys", "names"),
    [
        (["image", "wrist_image"], ["image", "image_wrist_image"]),  # LIBERO's
        (["front", "arm/wrist"], ["image_front", "image_arm_wrist"]),
        (["image", "image_top"], ["image", "image_top"]),
    ],
)
def test_cameras_have_the_names_that_an_import_gives_them(keys, names):
    obs, _ = VLAObservation(Cameras(*keys), instructions=["go", "stop"], image_key=keys, success_key=None).reset()
    assert {name: obs[name][0, 0, 0] for name in names} == {names[0]: 0, names[1]: 1}
    assert obs.keys() == {*names, "task_id"} and obs["task_id"] == 1
    paths = [f"observations/{key.replace('/', '.')}" for key in keys]
    imported = {path: np.full((2, 4, 6, 3), color, np.uint8) for color, path in enumerate(paths)}
    assert {name: array[0, 0, 0, 0] for name, array in assembled(imported).items()} == {names[0]: 0, names[1]: 1}


@pytest.mark.parametrize("keys", [["front", "image_front"], ["arm/wrist", "arm_wrist"]])
def test_two_cameras_of_one_name_are_refused(keys):
    said = rf"the cameras '{keys[0]}' and '{keys[1]}' would both be 'image_\w+'; rename or drop one"
    with pytest.raises(ValueError, match=f"image_key: {said}"):
        VLAObservation(Cameras(*keys), instructions=["go", "stop"], image_key=keys, success_key=None)
    with pytest.raises(ValueError, match=f"file 'x': {said}".replace("/", ".")):
        assembled({f"observations/{key.replace('/', '.')}": np.zeros((2, 4, 6, 3), np.uint8) for key in keys})


def assembled(pictures):
    """The cameras of an episode of one step that is made of foreign arrays."""
    end = np.ones(1, bool)
    arrays = {"actions": np.zeros((1, 2), np.float32), "rewards": np.zeros(1), "terminations": end, "truncations": ~end}
    episode = assemble(
        arrays | pictures,
        labels=Labels(instruction="go", success=True),
        render=None,
        attributes={},
        where="file 'x'",
        default_task="go",
        instructions={},
    )
    return {key: episode.observations[key] for key in episode.image_keys}


def test_the_only_image_of_a_dict_needs_no_key_and_several_do():
    obs, _ = VLAObservation(Nested(), instructions=["go"], success_key=None).reset(seed=0)
    assert (obs["image"] == 50).all()
    with pytest.raises(ValueError, match=r"has the images \['wrist', 'front'\]; say by image_key"):
        VLAObservation(Robot(), instructions=["go"])


def test_rendering_instead_of_what_an_env_calls_its_image():
    class Symbols(Walk):
        observation_space = spaces.Dict(image=PIXELS)

        def observe(self):
            return {"image": np.zeros((4, 6, 3), np.uint8)}

    given, rendered = (
        VLAObservation(Symbols(render_mode="rgb_array"), instructions=["go"], image_key=key, success_key=None)
        for key in (None, "render()")
    )
    assert not given.reset(seed=0)[0]["image"].any()
    obs, _ = rendered.reset(seed=0)
    assert obs["image"].any()
    np.testing.assert_array_equal(obs["image"], rendered.env.render())


def test_only_some_numbers_of_the_state():
    kwargs = {"instructions": ["go"], "image_key": "front", "state_key": ["joints", "grip"], "success_key": None}
    env = VLAObservation(Robot(), state_indices=range(1, 4), **kwargs)
    obs, _ = env.reset(seed=0)
    np.testing.assert_allclose(obs["state"], [0.2, 0, 0])
    assert env.observation_space["state"].low.tolist() == [-1, 0, 0]
    with pytest.raises(ValueError, match=r"state_indices=\[5\] must be indices into the state of 5"):
        VLAObservation(Robot(), state_indices=[5], **kwargs)
    for wrong in (np.array([True, False, False, True, False]), [True, False], slice(0, 2), [0.5, 1.0]):
        with pytest.raises(ValueError, match="expected a list of whole numbers"):
            VLAObservation(Robot(), state_indices=wrong, **kwargs)
    with pytest.raises(ValueError, match="there is no state"):
        VLAObservation(Robot(), state_indices=[0], **{**kwargs, "state_key": None})


def test_which_of_several_instructions_is_no_guess():
    with pytest.raises(ValueError, match=r"which of \('pull', 'push'\) is this environment's\? Give task_id or instr"):
        VLAObservation(Nested(), instructions=["pull", "push"], success_key=None)


def test_the_instruction_is_read_from_the_observation_or_the_info():
    env = VLAObservation(Nested(), instructions=["pull", "push"], instruction_key="word", success_key=None)
    for seed in range(6):
        obs, info = env.reset(seed=seed)
        raw, _ = Nested().reset(seed=seed)
        assert info["instruction"] == env.instructions[obs["task_id"]] == raw["word"]
        assert env.step(env.action_space.sample())[0]["task_id"] == obs["task_id"]

    class Told(Walk):
        told = "pull"

        def reset(self, *, seed=None, options=None):
            return super().reset(seed=seed)[0], {"language": self.told}

    told = VLAObservation(
        Told(render_mode="rgb_array"), instructions=["push", "pull"], instruction_key="language", success_key=None
    )
    assert told.reset(seed=0)[0]["task_id"] == 1
    told.env.told = np.int64(0)
    assert told.reset(seed=0)[1]["instruction"] == "push"
    told.env.told = "fly"
    with pytest.raises(ValueError, match="'language' is 'fly', which is not in the table of 2"):
        told.reset(seed=0)
    lost = VLAObservation(Walk(render_mode="rgb_array"), instructions=["go"], instruction_key="language")
    with pytest.raises(KeyError, match="'language' is in neither"):
        lost.reset(seed=0)


def test_with_an_image_size_nothing_is_drawn_before_the_first_reset():
    """AsyncVectorEnv forks after it has constructed an environment, and no OpenGL context survives that."""

    class Undrawn(Walk):
        def render(self):
            raise AssertionError("drawn too early")

    env = VLAObservation(Undrawn(render_mode="rgb_array"), instructions=["go"], image_size=4)
    assert env.observation_space["image"].shape == (4, 4, 3)


@pytest.mark.parametrize("size", [5, np.int64(5), [5, 5], (np.int32(5), 5)])
def test_sizes_may_be_any_whole_numbers(size):
    env = VLAObservation(Walk(render_mode="rgb_array"), instructions=["go"], image_size=size)
    assert env.observation_space["image"].shape == env.reset(seed=0)[0]["image"].shape == (5, 5, 3)
    json.dumps(env._saved_kwargs)  # what a spec is made of


def test_a_table_too_short_for_the_environments_own_task_ids_is_refused():
    """An id of 2 would be looked up in a table of one, at the reset of whichever episode has it."""
    with pytest.raises(ValueError, match=r"task_id 2 is not in the table of 1 instructions; .*task_id="):
        VLAObservation(Conventional(2), instructions=["go"])
    env = VLAObservation(Conventional(2), instructions=["go"], task_id=0)
    assert env.reset(seed=0)[1]["instruction"] == "go"


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"instructions": None}, "instructions=None"),
        ({"instructions": "go"}, "list of one string per task"),
        ({"task_id": 3}, "task_id 3 is not in the table of 3"),
        ({"image_key": "front", "task_id": 0}, "image_key 'front' is None"),
        ({"state_key": "joints", "task_id": 0}, "state_key 'joints' is not in"),
        ({"task_id": 1, "instruction_key": "language"}, "both choose; give one"),
        ({"task_id": 0, "image_key": []}, r"image_key '\[\]' is None in the observation"),
        ({"task_id": 0, "image_size": 0}, "image_size=0; give a side in whole pixels"),
        ({"task_id": 0, "image_size": 16.0}, r"image_size=16\.0; give a side in whole pixels"),
        ({"task_id": 0, "image_size": (4, 5, 3)}, r"image_size=\(4, 5, 3\); .* or \(height, width\)"),
    ],
)
def test_mistakes_are_named(kwargs, message):
    with pytest.raises(ValueError, match=message):
        VLAObservation(Walk(render_mode="rgb_array"), **{"instructions": TABLE, **kwargs})


def test_no_picture_to_be_had():
    with pytest.raises(ValueError, match="render_mode is None"):
        VLAObservation(Walk(), instructions=TABLE, task_id=0)


def test_the_wrapper_is_recorded_in_the_spec():
    gym.register("Walk-v0", entry_point=f"{__name__}:Walk")
    try:
        env = VLAObservation(gym.make("Walk-v0", render_mode="rgb_array"), instructions=TABLE, task_id=2)
        again = gym.make(EnvSpec.from_json(env.spec.to_json()))
        obs, info = again.reset(seed=0)
        assert obs["task_id"] == 2 and info["instruction"] == TABLE[2]
    finally:
        gym.registry.pop("Walk-v0")


def test_in_worker_processes():
    envs = WorkerVectorEnv([wrap, wrap], num_workers=1)
    try:
        assert instruction_table(envs) == TABLE
        obs, infos = envs.reset(seed=0)
        assert obs["image"].shape == (2, 4, 6, 3) and infos["success"].tolist() == [False, False]
    finally:
        envs.close()


def test_instruction_tables_must_agree():
    same = SyncVectorEnv([lambda: Conventional(0), lambda: Conventional(2)])
    assert instruction_table(same) == TABLE
    different = SyncVectorEnv([lambda: VLAObservation(Conventional(), instructions=TABLE[::-1]), Conventional])
    with pytest.raises(ValueError, match="sub-environment 1 has the instructions"):
        instruction_table(different)
    with pytest.raises(ValueError, match="VLAObservation"):
        instruction_table(SyncVectorEnv([Walk]))


def test_instructions_for():
    assert instructions_for(TABLE, np.array([2, 0])) == [TABLE[2], TABLE[0]]
    for wrong in (3, -1):
        with pytest.raises(ValueError, match=f"task_id {wrong} is not in the table of 3"):
            instructions_for(TABLE, [0, wrong])


def test_resize_area():
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (12, 8, 3), dtype=np.uint8)
    blocks = image.reshape(4, 3, 4, 2, 3).mean(axis=(1, 3))
    np.testing.assert_allclose(resize_area(image, (4, 4)), blocks, atol=0.5)
    # 3 -> 2: each new pixel covers one and a half old ones.
    row = np.array([0, 90, 255], np.uint8).reshape(1, 3, 1).repeat(3, axis=2)
    assert resize_area(row, (1, 2))[0, :, 0].tolist() == [30, 200]
    assert resize_area(row[:, :2], (2, 4))[1, :, 0].tolist() == [0, 0, 90, 90]
