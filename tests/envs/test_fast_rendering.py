import copy
import ctypes.util
import multiprocessing
import os
import subprocess
import sys
import tempfile
import threading

import gymnasium as gym
import numpy as np
import pytest
import vla_rl_envs

pytest.importorskip("metaworld")
pytestmark = pytest.mark.simulator


def make(task="drawer-open", **kwargs):
    return gym.make("vla_rl_envs:VLA/MetaWorld-v0", task=task, **kwargs)


def project(env, point, size, camera=2):
    """Pixel (column, row) of a world point in a picture turned by 180 degrees, from the camera's pose alone."""
    inner = env.unwrapped
    local = inner.data.cam_xmat[camera].reshape(3, 3).T @ (point - inner.data.cam_xpos[camera])
    focal = 0.5 * size / np.tan(np.deg2rad(inner.model.cam_fovy[camera]) / 2)
    column = size / 2 + focal * local[0] / -local[2]
    row = size / 2 - focal * local[1] / -local[2]
    return size - 1 - column, size - 1 - row


@pytest.mark.parametrize("quality", ["fast", "full"])
def test_picture_is_upright_and_in_register(quality):
    size = 128
    env = make(render_quality=quality, image_size=size)
    observation, _ = env.reset(seed=1)
    image = observation["image"].astype(int)
    green = (image[..., 1] > image[..., 0] + 25) & (image[..., 1] > image[..., 2] + 25)
    rows, columns = np.nonzero(green)
    inner = env.unwrapped
    drawer = inner.data.body("drawercase_link").xpos
    column, row = project(env, drawer, size)
    assert abs(np.median(columns) - column) < 6 and abs(np.median(rows) - row) < 6
    up = np.array([0.0, 0.0, 0.1])
    above, below = project(env, drawer + up, size)[1], project(env, drawer - up, size)[1]
    assert above < below


def test_moving_right_in_the_world_moves_the_picture_consistently():
    env = make(image_size=128)
    image, _ = env.reset(seed=0)
    centres = []
    for x in (-0.1, 0.1):
        low = np.array([x, 0.9, 0.0])
        env.unwrapped.simulator._random_reset_space = gym.spaces.Box(low, low, dtype=np.float64)
        image = env.reset(seed=0)[0]["image"].astype(int)
        green = (image[..., 1] > image[..., 0] + 25) & (image[..., 1] > image[..., 2] + 25)
        seen = np.median(np.nonzero(green)[1])
        centres.append((seen, project(env, env.unwrapped.data.body("drawercase_link").xpos, 128)[0]))
    (seen_a, want_a), (seen_b, want_b) = centres
    assert abs((seen_b - seen_a) - (want_b - want_a)) < 6 and abs(want_b - want_a) > 5


def undecimated_picture(env):
    """What the fast renderer would draw with all triangles and MuJoCo's own settings, by ``mujoco.Renderer``."""
    import mujoco

    inner = env.unwrapped
    model = copy.copy(inner.model)
    model.vis.quality.offsamples = 0
    with mujoco.Renderer(model, inner.image_size, inner.image_size) as renderer:
        renderer.scene.flags[mujoco.mjtRndFlag.mjRND_SHADOW] = False
        renderer.scene.flags[mujoco.mjtRndFlag.mjRND_REFLECTION] = False
        renderer.update_scene(inner.data, "corner2")
        return renderer.render()[::-1, ::-1]


@pytest.mark.parametrize("task", ["drawer-open", "door-open", "basketball", "window-close", "coffee-pull"])
def test_decimation_hardly_changes_the_picture(task):
    from skimage.metrics import structural_similarity

    env = make(task=task, image_size=128)
    image = env.reset(seed=0)[0]["image"]
    full = make(task=task, image_size=128, render_quality="full").reset(seed=0)[0]["image"]
    undecimated = undecimated_picture(env)
    assert structural_similarity(image, undecimated, channel_axis=2) > 0.95
    assert structural_similarity(image, full, channel_axis=2) > 0.85
    assert np.abs(image.astype(float) - undecimated).mean() < 2


def test_triangles_follow_the_projected_size():
    from vla_rl_envs.meshes import MIN_TRIANGLES, PIXELS_PER_TRIANGLE, surface_areas, triangle_budgets
    from vla_rl_envs.rendering import fixed_camera, import_mujoco, pixel_sizes

    mujoco = import_mujoco()
    points = np.random.default_rng(0).normal(size=(2000, 3))
    points /= np.linalg.norm(points, axis=1, keepdims=True)
    meshes = "".join(
        f'<mesh name="{name}" vertex="{" ".join(f"{x:.4f}" for x in (radius * points).ravel())}"/>'
        for name, radius in (("small", 0.1), ("large", 1.0))
    )
    model = mujoco.MjModel.from_xml_string(
        f"""<mujoco><asset>{meshes}</asset><worldbody><camera name="eye" pos="0 0 10" fovy="53.13"/>
        <geom type="mesh" mesh="small" pos="2 0 0"/><geom type="mesh" mesh="large"/></worldbody></mujoco>"""
    )
    areas = surface_areas(model)
    np.testing.assert_allclose(areas, [4 * np.pi * 0.01, 4 * np.pi], rtol=0.01)
    # With a focal length of `height` pixels (2 tan 26.57 deg = 1), a pixel at distance d is d / height metres wide.
    near = 10 - model.geom_rbound[1]
    for height in (128, 512):
        pixels = pixel_sizes(model, fixed_camera(model, "eye"), height=height)
        assert near / height / 2**0.5 < pixels[1] <= near / height * 1.0001
        small, large = triangle_budgets(areas, np.array([near / height] * 2))
        assert abs(large - np.pi * (height / near) ** 2 / PIXELS_PER_TRIANGLE) < 0.01 * large + 1
        assert small == MIN_TRIANGLES


@pytest.mark.slow
def test_a_second_process_finds_the_decimated_meshes_and_constructs_fast(tmp_path):
    code = (
        "import time, gymnasium as gym\n"
        "import vla_rl_envs.meshes as meshes\n"
        "calls = []\n"
        "original = meshes._decimate_mesh\n"
        "meshes._decimate_mesh = lambda *a: calls.append(1) or original(*a)\n"
        "gym.make('vla_rl_envs:VLA/MetaWorld-v0').reset(seed=0)\n"
        "print(len(calls))"
    )
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    counts = [
        int(subprocess.run([sys.executable, "-c", code], check=True, env=environment, capture_output=True).stdout)
        for _ in range(2)
    ]
    assert counts[0] > 10 and counts[1] == 0


def test_full_quality_equals_mujoco_renderer():
    import mujoco

    env = make(render_quality="full", image_size=64)
    image = env.reset(seed=0)[0]["image"]
    inner = env.unwrapped
    renderer = mujoco.Renderer(inner.model, 64, 64)
    renderer.update_scene(inner.data, "corner2")
    np.testing.assert_array_equal(image, renderer.render()[::-1, ::-1])
    renderer.close()


def test_environments_share_a_renderer_and_keep_their_own_colours():
    a, b = make(), make(variant="recoloured")
    first, second = a.reset(seed=0)[0]["image"], b.reset(seed=0)[0]["image"]
    assert a.unwrapped._renderer is b.unwrapped._renderer
    assert not np.array_equal(first, second)
    np.testing.assert_array_equal(a.reset(seed=0)[0]["image"], first)


def test_returned_pictures_are_not_overwritten():
    env = make()
    first = env.reset(seed=0)[0]["image"]
    kept = first.copy()
    env.step(np.ones(4, np.float32))
    np.testing.assert_array_equal(first, kept)
    assert not np.array_equal(env.unwrapped.render(), kept)


def _picture(seed, queue):
    try:
        queue.put(make().reset(seed=seed)[0]["image"])
    except RuntimeError as error:
        queue.put(str(error))


def _in_child(method, seed):
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    child = context.Process(target=_picture, args=(seed, queue))
    child.start()
    try:
        return queue.get(timeout=60)
    finally:
        child.join(timeout=10)


@pytest.mark.slow
def test_children_draw_the_same_or_explain_why_not():
    image = make().reset(seed=4)[0]["image"]
    np.testing.assert_array_equal(_in_child("spawn", 4), image)
    assert "forkserver" in _in_child("fork", 4)


def test_decimated_copy_leaves_the_model_alone(tmp_path, monkeypatch):
    from vla_rl_envs.meshes import decimated

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    model = make(render_quality="none").unwrapped.model
    before = model.mesh_face.copy(), model.mesh_facenum.copy()
    slim = decimated(model, np.full(model.nmesh, 0.008))
    np.testing.assert_array_equal(before[0], model.mesh_face)
    np.testing.assert_array_equal(before[1], model.mesh_facenum)
    assert slim.mesh_facenum.sum() < 0.15 * model.mesh_facenum.sum()
    for mesh in range(model.nmesh):
        faces = slim.mesh_face[slim.mesh_faceadr[mesh] :][: slim.mesh_facenum[mesh]]
        assert faces.min() >= 0 and faces.max() < slim.mesh_vertnum[mesh]
    assert len(list((tmp_path / "vla_rl").glob("*.npz"))) == 1
    again = decimated(model, np.full(model.nmesh, 0.008))
    np.testing.assert_array_equal(slim.mesh_face, again.mesh_face)
    np.testing.assert_array_equal(slim.mesh_facenormal, again.mesh_facenormal)


def test_a_broken_cache_file_is_ignored(tmp_path, monkeypatch):
    from vla_rl_envs.meshes import decimated, mesh_fingerprint

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    model = make(render_quality="none").unwrapped.model
    good = decimated(model, np.full(model.nmesh, 0.008))
    (path,) = (tmp_path / "vla_rl").glob(f"*{mesh_fingerprint(model)}*.npz")
    path.write_bytes(path.read_bytes()[:1000])
    np.testing.assert_array_equal(decimated(model, np.full(model.nmesh, 0.008)).mesh_face, good.mesh_face)


def test_fast_render_wrapper():
    env = gym.make("HalfCheetah-v5", render_mode="rgb_array", width=96, height=64)
    env.reset(seed=0)
    truth = env.render()
    np.testing.assert_array_equal(vla_rl_envs.FastRender(env, quality="full").render(), truth)
    fast = vla_rl_envs.FastRender(env).render()
    assert fast.shape == (64, 96, 3) and np.corrcoef(fast.ravel(), truth.ravel())[0, 1] > 0.8
    with pytest.raises(ValueError, match="rgb_array"):
        vla_rl_envs.FastRender(gym.make("HalfCheetah-v5"))
    with pytest.raises(TypeError, match="MuJoCo"):
        vla_rl_envs.FastRender(gym.make("CartPole-v1"))


@pytest.mark.parametrize("env_id", ["Ant-v5", "Humanoid-v5", "FetchPickAndPlace-v4", "AdroitHandDoor-v1"])
def test_fast_render_draws_what_others_draw(env_id):
    from skimage.metrics import structural_similarity

    gymnasium_robotics = pytest.importorskip("gymnasium_robotics")
    gym.register_envs(gymnasium_robotics)
    env = gym.make(env_id, render_mode="rgb_array", width=128, height=128)
    env.reset(seed=0)
    for _ in range(5):
        env.step(env.action_space.sample() * 0)
    truth = env.render()
    fast = vla_rl_envs.FastRender(env).render()
    assert fast.shape == truth.shape and structural_similarity(fast, truth, channel_axis=2) > 0.8
    np.testing.assert_array_equal(vla_rl_envs.FastRender(env, quality="full").render(), truth)
    np.testing.assert_array_equal(env.render(), truth)  # Gymnasium's renderer expects its GL context to stay current


def test_fast_render_draws_the_goal_where_it_is_without_a_picture_before():
    gym.register_envs(pytest.importorskip("gymnasium_robotics"))
    pictures = []
    for drawing in (lambda env: env.render(), lambda env: vla_rl_envs.FastRender(env, quality="full").render()):
        env = gym.make("FetchReach-v4", render_mode="rgb_array", width=128, height=128)
        env.reset(seed=0)
        pictures.append(drawing(env))
        env.close()
    np.testing.assert_array_equal(*pictures)


@pytest.mark.parametrize("env_id", ["PointMaze_UMaze-v3", "AntMaze_UMaze-v5"])
def test_fast_render_takes_camera_and_size_from_an_environment_within(env_id):
    gym.register_envs(pytest.importorskip("gymnasium_robotics"))
    env = gym.make(env_id, render_mode="rgb_array", width=96, height=64)
    env.reset(seed=0)
    truth = env.render()
    np.testing.assert_array_equal(vla_rl_envs.FastRender(env, quality="full").render(), truth)


def test_what_was_drawn_before_does_not_show():
    """Scenes of the same meshes and textures that differ in the rest: floors, distances, heights of a field."""
    import mujoco

    def truth_and_picture(env):
        env.reset(seed=0)
        return env.render(), vla_rl_envs.FastRender(env, quality="full").render()

    for env_id in ("Hopper-v5", "Humanoid-v5", "Swimmer-v5"):
        truth, picture = truth_and_picture(gym.make(env_id, render_mode="rgb_array", width=96, height=96))
        np.testing.assert_array_equal(picture, truth, err_msg=env_id)
    for task in ("button-press", "button-press-topdown"):
        env = make(task=task, render_quality="full")
        picture = env.reset(seed=0)[0]["image"]
        with mujoco.Renderer(env.unwrapped.model, 64, 64) as renderer:
            renderer.update_scene(env.unwrapped.data, camera="corner2")
            np.testing.assert_array_equal(picture, renderer.render()[::-1, ::-1], err_msg=task)


def test_colours_and_places_are_no_other_scene():
    from vla_rl_envs.meshes import mesh_fingerprint, scene_key

    model = copy.copy(make(render_quality="none").unwrapped.model)
    key = scene_key(model, mesh_fingerprint(model))
    model.geom_rgba[:], model.mat_rgba[:], model.body_pos[:], model.cam_pos[:] = 0.5, 0.5, 0.5, 0.5
    assert scene_key(model, mesh_fingerprint(model)) == key
    for change in ("mat_texrepeat", "mat_texuniform", "mesh_normal", "tex_type"):
        array = getattr(model, change)
        before = array.copy()
        array[-1] = 1 - array[-1]
        assert scene_key(model, mesh_fingerprint(model)) != key, change
        array[:] = before
    assert scene_key(model, mesh_fingerprint(model)) == key
    model.stat.extent *= 2
    assert scene_key(model, mesh_fingerprint(model)) != key


def test_import_is_light_and_sets_the_backend_later():
    code = (
        "import sys, vla_rl_envs, gymnasium; gymnasium.spec('VLA/MetaWorld-v0');"
        "assert not {'mujoco', 'metaworld', 'torch'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="back ends of Linux")
@pytest.mark.parametrize(
    "broken", [{"MUJOCO_GL": "osmesa", "PYOPENGL_PLATFORM": "egl"}, {"MUJOCO_GL": "glfw", "PYOPENGL_PLATFORM": "glx"}]
)
def test_missing_gl_names_the_packages(broken, tmp_path):
    code = (
        "import gymnasium as gym\n"
        "try:\n    gym.make('vla_rl_envs:VLA/MetaWorld-v0').reset(seed=0)\n"
        "except ImportError as e:\n    assert 'libegl1' in str(e) and 'libosmesa6' in str(e), e\n"
        "else:\n    raise SystemExit('no error')"
    )
    environment = {**os.environ, **broken}
    environment.pop("DISPLAY", None)
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, cwd=tmp_path)  # MuJoCo logs there


def test_a_start_up_that_hangs_ends_in_an_error(monkeypatch):
    import mujoco.egl
    from vla_rl_envs import rendering

    released = threading.Event()
    monkeypatch.setattr(mujoco.egl, "GLContext", lambda *size: released.wait(30))
    monkeypatch.setattr(rendering, "GL_TIMEOUT", 0.2)
    monkeypatch.setattr(rendering, "_cache", rendering._ProcessCache())
    monkeypatch.setenv("MUJOCO_GL", "egl")
    with pytest.raises(ImportError, match=r"did not start within 0\.2 s.*libegl1"):
        make().reset(seed=0)
    released.set()


@pytest.mark.skipif(ctypes.util.find_library("OSMesa") is None, reason="libosmesa6 is not installed")
def test_osmesa_draws_the_same_scene():
    from skimage.metrics import structural_similarity

    code = (
        "import sys, numpy as np, gymnasium as gym\n"
        "np.save(sys.argv[1], gym.make('vla_rl_envs:VLA/MetaWorld-v0').reset(seed=0)[0]['image'])"
    )
    environment = {key: value for key, value in os.environ.items() if key != "PYOPENGL_PLATFORM"}
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "image.npy")
        subprocess.run([sys.executable, "-c", code, path], check=True, env={**environment, "MUJOCO_GL": "osmesa"})
        assert structural_similarity(np.load(path), make().reset(seed=0)[0]["image"], channel_axis=2) > 0.98


@pytest.mark.skipif(ctypes.util.find_library("OSMesa") is None, reason="libosmesa6 is not installed")
def test_osmesa_gives_back_the_context_that_another_renderer_counts_on():
    code = (
        "import gymnasium as gym, numpy as np, vla_rl_envs\n"
        "env = gym.make('Ant-v5', render_mode='rgb_array', width=64, height=64)\n"
        "env.reset(seed=0)\n"
        "before = env.render()\n"
        "vla_rl_envs.FastRender(env).render()\n"
        "assert before.std() > 10 and np.array_equal(before, env.render())"
    )
    environment = {key: value for key, value in os.environ.items() if key != "PYOPENGL_PLATFORM"}
    subprocess.run([sys.executable, "-c", code], check=True, env={**environment, "MUJOCO_GL": "osmesa"})


def test_cgl_gives_back_the_context_that_was_current(monkeypatch):
    from types import ModuleType, SimpleNamespace

    from vla_rl_envs.contexts import current

    state = {"context": 7}
    backend, bindings = ModuleType("mujoco.cgl"), ModuleType("mujoco.cgl.cgl")
    # As on macOS: contexts are pointers, and mujoco.cgl has no name for the function that tells the current one.
    bindings._CGL = SimpleNamespace(CGLGetCurrentContext=ctypes.CFUNCTYPE(ctypes.c_void_p)(lambda: state["context"]))
    bindings.CGLSetCurrentContext = lambda context: state.update(context=context)
    backend.cgl = bindings
    monkeypatch.setitem(sys.modules, "mujoco.cgl", backend)
    monkeypatch.setitem(sys.modules, "mujoco.cgl.cgl", bindings)

    class GLContext:
        __module__ = "mujoco.cgl"
        _context = ctypes.c_void_p(9)

        def make_current(self):
            state["context"] = self._context.value

    for before, after in ((7, 7), (9, 9), (None, 9)):
        state["context"] = before
        with current(GLContext()):
            assert state["context"] == 9
        assert state["context"] == after


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="EGL is chosen on Linux only")
def test_mujoco_may_be_imported_first_without_a_display():
    code = (
        "import mujoco, gymnasium as gym\n"
        "image = gym.make('vla_rl_envs:VLA/MetaWorld-v0').reset(seed=0)[0]['image']\n"
        "assert image.std() > 10"
    )
    environment = {key: value for key, value in os.environ.items() if key not in ("MUJOCO_GL", "DISPLAY")}
    environment.pop("PYOPENGL_PLATFORM", None)
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)
