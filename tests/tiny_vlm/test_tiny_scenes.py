import cameras
import colours
import gymnasium as gym
import numpy as np
import parts
import pytest
from scenes import CELLS, LABELS, UNKNOWN_COLOUR, SceneSampler, draw
from texts import BINS, location, parse_location, write_pairs
from worlds import ALL_TASKS, make_world, scene_of, target_of

pytestmark = pytest.mark.simulator

METAWORLD, KITCHEN = "vla_rl_envs:VLA/MetaWorld-v0", "vla_rl_envs:VLA/FrankaKitchen-v0"


@pytest.fixture(scope="module")
def sampler():
    return SceneSampler(size=64)


@pytest.fixture(scope="module")
def samples(sampler):
    rng = np.random.default_rng(3)
    tasks = ("drawer-open", "bin-picking", "kettle", "coffee-pull", "button-press-wall")
    return [sample for task in tasks for sample in sampler.session(rng, 12, task=task)]


def test_projection_against_a_hand_calculation():
    # From (2, 0, 0) towards the origin with 90 degrees: the picture reaches 2 m to each side at depth 2; y is right.
    view = cameras.look_at(np.array([2.0, 0.0, 0.0]), np.zeros(3), fovy=90.0)
    points = np.array([[0, 0, 0], [0, 1, 0], [0, 0, 1], [1, -0.5, -0.5], [3, 0, 0]], dtype=float)
    places, depth = cameras.project(points, view)
    np.testing.assert_allclose(places[:4], [(0.5, 0.5), (0.75, 0.5), (0.5, 0.25), (0.25, 0.75)], atol=1e-12)
    np.testing.assert_allclose(depth, [2, 2, 2, 1, -1], atol=1e-12)
    rolled = cameras.look_at(np.array([2.0, 0.0, 0.0]), np.zeros(3), roll=np.pi / 2, fovy=90.0)
    # A quarter turn brings what was up to the picture's side.
    np.testing.assert_allclose(cameras.project(points[2:3], rolled)[0][0], (0.75, 0.5), atol=1e-12)


@pytest.mark.parametrize(("env_id", "task"), [(METAWORLD, "window-open"), (KITCHEN, "kettle")])
def test_the_own_view_is_the_environments_picture(env_id, task):
    options = {"variation": 0.0} if env_id == KITCHEN else {}
    env = gym.make(env_id, task=task, image_size=64, **options)
    expected = env.reset(seed=0)[0]["image"].astype(int)
    world = make_world(task)
    world.kinematics()
    world.place_camera(world.view)
    picture = world.renderer(64).render(world.model, world.data, world.mujoco_camera())
    assert np.abs(picture - expected).mean() < 1.0
    assert np.abs(picture[::-1, ::-1] - expected).mean() > 20
    world.close()


def test_a_seed_decides_everything_whatever_was_drawn_before(sampler):
    fresh = SceneSampler(size=64)
    sampler.session(np.random.default_rng(8), 3, task="drawer-open", style="varied")
    for task in ("drawer-close", "knob-on"):
        first, second = (s.session(np.random.default_rng(5), 4, task=task) for s in (sampler, fresh))
        for one, other in zip(first, second, strict=True):
            assert np.array_equal(one.image, other.image)
            assert one.things == other.things
            texts = [write_pairs(sample, np.random.default_rng(1)) for sample in (one, other)]
            assert texts[0] == texts[1]
    again = sampler.session(np.random.default_rng(6), 1, task="drawer-close")[0]
    assert not np.array_equal(again.image, first[0].image)


def test_sampling_leaves_the_environments_as_they_were(sampler):
    env = gym.make(METAWORLD, task="drawer-open", image_size=64)
    before = env.reset(seed=2)[0]["image"]
    sampler.session(np.random.default_rng(0), 4, task="drawer-open", style="varied")
    assert np.array_equal(env.reset(seed=2)[0]["image"], before)
    other = gym.make(METAWORLD, task="drawer-open", image_size=64)
    assert np.array_equal(other.reset(seed=2)[0]["image"], before)


def test_projected_middles_fall_on_the_pixels_that_show_the_thing(samples):
    """The projection and the picture come by different ways: geometry, and which geom the renderer drew."""
    shapes = [thing for s in samples for thing in s.things if thing.name in ("cube", "ball", "cylinder")]
    seen = [thing for thing in shapes if thing.area >= 8 and min(thing.centre) > 0.1 and max(thing.centre) < 0.9]
    errors = [np.hypot(*np.subtract(thing.point, thing.centre)) for thing in seen]
    assert len(errors) >= 10
    assert np.median(errors) < 0.02
    assert np.quantile(errors, 0.9) < 0.06


def test_named_colours_are_those_of_the_pixels(samples):
    named = [(sample, thing) for sample in samples for thing in sample.things if thing.colour and thing.area >= 20]
    assert len(named) > 30
    right = 0
    for sample, thing in named:
        column, row = (int(value * 64) for value in thing.point)
        patch = sample.image[max(row - 1, 0) : row + 2, max(column - 1, 0) : column + 2].reshape(-1, 3) / 255
        right += any(colours.looks_like(thing.colour, pixel) for pixel in patch)
    assert right / len(named) > 0.85


def test_cells_tell_what_is_at_their_middle(samples):
    told = 0
    for sample in samples:
        shown = {LABELS[label] if label < len(LABELS) else "" for label in sample.cells[0].ravel()}
        assert shown <= {thing.name for thing in sample.things if thing.area} | {"arm", "gripper", ""}
        for thing in sample.things:
            same = [other for other in sample.things if other.name == thing.name]
            if len(same) == 1 and thing.area > 150 and thing.name != "counter":
                rows, columns = np.nonzero(sample.cells[0] == LABELS.index(thing.name))
                # A cell stands for 16 pixels.
                assert abs(16 * len(rows) - thing.area) < 0.6 * thing.area
                assert (
                    np.hypot(*np.subtract(((columns + 0.5).mean() / CELLS, (rows + 0.5).mean() / CELLS), thing.point))
                    < 0.2
                )
                colour = sample.cells[1][rows, columns]
                assert set(colour.tolist()) == {colours.NAMES.index(thing.colour) if thing.colour else UNKNOWN_COLOUR}
                told += 1
    assert told > 20


@pytest.mark.parametrize("name", colours.NAMES)
def test_a_drawn_colour_has_its_name_and_no_other(name):
    rng = np.random.default_rng(0)
    for _ in range(50):
        rgb = colours.draw(name, rng)
        assert colours.name_of(rgb) == name
        assert colours.looks_like(name, rgb)
        chromatic = set(colours.NAMES) - {"white", "grey", "black", "brown", "orange", name}
        assert name in ("brown", "orange") or not any(colours.looks_like(other, rgb) for other in chromatic)


# Scene, part, axis and sign of the way that its middle goes from its first state to its second.
MOVES = [
    ("drawer-open", "drawer handle", 1, -1),
    ("lever-pull", "lever", 2, 1),
    ("handle-press", "handle", 2, -1),
    ("door-unlock", "lock", 2, -1),
    ("button-press-topdown", "button", 2, -1),
    ("coffee-button", "button", 1, 1),
    ("window-open", "window handle", 0, 1),
    ("hammer", "nail", 1, 1),
    ("slide-door-open", "slide door handle", 0, 1),
    ("microwave-open", "microwave handle", 1, -1),
    ("left-door-open", "left door handle", 1, -1),
    ("hinge-cabinet", "right door handle", 1, -1),
]


@pytest.mark.parametrize(("task", "name", "axis", "sign"), MOVES)
def test_states_are_what_the_joints_do(task, name, axis, sign):
    world = make_world(task)
    index = next(i for i, part in enumerate(world.parts) if part.name == name)
    part, places = world.parts[index], []
    joint = world.model.body(part.moves).jntadr[0]
    for end in part.ends:
        world.data.qpos[:] = world.qpos
        world.data.qpos[world.model.jnt_qposadr[joint]] = end
        world.kinematics()
        places.append(world.data.geom_xpos[world.part_geoms[index]].mean(axis=0)[axis])
    assert sign * (places[1] - places[0]) > 0.01


@pytest.mark.parametrize("task", ["drawer-open", "kettle"])
def test_an_open_gripper_is_wider_than_a_closed_one(task):
    world = make_world(task)
    widths = []
    for fingers in world.finger_ends:
        world.data.qpos[:] = world.qpos
        world.data.qpos[world.fingers] = fingers
        world.kinematics()
        ends = world.data.geom_xpos[world.tips]
        widths.append(np.linalg.norm(ends[0] - ends[1]))
    assert widths[1] > widths[0] + 0.02


def test_answers_follow_from_the_truth(samples):
    rng, kinds = np.random.default_rng(0), set()
    for sample in samples:
        things = {thing.name: thing for thing in (*sample.things, sample.gripper)}
        for pair in write_pairs(sample, rng):
            kinds.add(pair.kind)
            words = pair.prompt.split()
            if pair.kind == "state":
                thing = things[" ".join(words[2:-1])]
                assert thing.fraction < 0.25 or thing.fraction > 0.6
                assert (pair.answer == "yes") == (words[-1] == thing.states[int(thing.fraction > 0.5)])
            elif pair.kind == "colour":
                assert things[" ".join(words[4:])].colour == pair.answer
            elif pair.kind == "where" and pair.answer != "hidden":
                assert np.abs(np.subtract(parse_location(pair.answer), pair.place)).max() <= 0.5 / BINS + 1e-3
            elif pair.kind == "presence" and pair.answer == "no":
                assert " ".join(words[3:]) not in things
            elif pair.kind == "instruction":
                target = things[sample.target]
                assert pair.answer.startswith(f"{target.name} {'<loc' if target.visible else 'hidden'}")
    assert len(kinds) == 8


def test_locations_are_row_first_as_in_paligemma():
    assert location((0.0, 0.999)) == "<loc1008><loc0016>"
    assert parse_location("red <loc1008><loc0016> open") == (16 / 1024, 1008 / 1024)
    assert parse_location("hidden") is None
    assert parse_location("<loc0016> open") is None


def test_every_task_has_its_part_and_held_out_scenes_are_left_out():
    for task in ALL_TASKS:
        names = [
            part.name for part in (parts.KITCHEN if scene_of(task) == "kitchen" else parts.METAWORLD[scene_of(task)])
        ]
        assert target_of(task) in names, task
    tasks = SceneSampler(exclude=parts.HELD_OUT).tasks
    assert {scene_of(task) for task in ALL_TASKS} - {scene_of(task) for task in tasks} == set(parts.HELD_OUT)


def test_scaling_and_moving_are_only_drawn():
    world = make_world("push")
    before = world.qpos.copy()
    rng = np.random.default_rng(0)
    places = [draw(world, "push", rng, size=64, style="varied", camera="own").things[0].xyz for _ in range(5)]
    assert np.ptp(np.array(places), axis=0)[:2].min() > 0.05
    free = [int(world.model.jnt_qposadr[j]) for j in range(world.model.njnt) if world.model.jnt_type[j] == 0]
    np.testing.assert_array_equal(world.data.qpos[free], before[free])
    world.close()
