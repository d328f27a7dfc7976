"""`vla-rl data` as typed: every tool, its output in a pipe, its exit status, and its help on one screen."""

import os
import subprocess
import sys

import numpy as np
import pytest

import vla_rl.data
from vla_rl.cli import main
from vla_rl.data import Episode, EpisodeStore

TOOLS = (
    "info", "ls", "stats", "verify", "repair", "merge", "split", "filter", "relabel", "sample", "pack", "play",
    "export minari", "export robomimic", "export lerobot", "import minari", "import robomimic", "import lerobot",
    "import roboset", "import rlds", "re-encode",
)  # fmt: skip


def make_episode(number, task):
    rng = np.random.default_rng(number)
    return Episode(
        observations={
            "image": rng.integers(0, 256, (6, 8, 8, 3), dtype=np.uint8),
            "task_id": np.zeros(6, np.int64),
            "state": rng.standard_normal((6, 3)).astype(np.float32),
        },
        actions=rng.uniform(-1, 1, (5, 4)).astype(np.float32),
        rewards=np.full(5, 0.5),
        terminations=np.arange(5) == 4,
        truncations=np.zeros(5, dtype=bool),
        success=bool(number % 2),
        source="expert",
        task=task,
        instruction=f"do {task}",
        seed=number,
    )


@pytest.fixture
def demos(tmp_path):
    with EpisodeStore(tmp_path / "demos") as store:
        for number in range(6):
            store.append(make_episode(number, "a-task-with-quite-a-long-name" if number % 3 else "door-open"))
    return tmp_path / "demos"


@pytest.fixture
def run(capsys):
    def run(*words, status=0):
        assert main(["data", *map(str, words)]) == status
        captured = capsys.readouterr()
        return captured.err if status and not captured.out else captured.out

    return run


@pytest.mark.parametrize("tool", ["info", "stats", "ls", "verify"])
def test_looking_imports_neither_torch_nor_gymnasium(demos, tool):
    code = (
        "import sys; from vla_rl.cli import main; main(sys.argv[1:]); "
        "print([name for name in ('torch', 'transformers', 'gymnasium', 'matplotlib') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "data", tool, str(demos)], capture_output=True, text=True, timeout=120
    )
    assert done.stdout.splitlines()[-1] == "[]", done.stderr


def test_looking(run, demos, tmp_path):
    lines = run("info", demos).splitlines()
    assert "6 episodes, 30 steps" in lines[0] and len(lines) == 4
    assert lines[2].split() == ["a-task-with-quite-a-long-name", "expert", "4", "20", "0.50", "0.15", "..", "0.85", "5"]
    lines = run("ls", demos, "--where", "success and index > 1", "--limit", "1").splitlines()
    assert lines[1].split()[:7] == ["3", "door-open", "expert", "yes", "5", "2.5", "3"]
    assert lines[2] == "... 1 more; --limit 0 shows all" and len(lines) == 3
    assert len(run("ls", demos, "--limit", "0").splitlines()) == 7
    text = run("stats", demos, "--where", "task == 'door-open'")
    actions = np.concatenate([make_episode(n, "door-open").actions for n in (0, 3)])
    assert "door-open: 2 episodes, 10 steps, success 0.50" in text and "a-task" not in text
    shown = [float(word) for word in text.splitlines()[3].split()[2:]]
    np.testing.assert_allclose(shown, actions.mean(axis=0), atol=5e-4)
    for name in ("sheet.png", "video.gif"):
        assert "2 episodes" in run("play", demos, "--episodes", "0", "4", "--out", tmp_path / name)
        assert (tmp_path / name).stat().st_size > 1000


def test_checking_and_repairing(run, demos):
    assert "6 whole episodes, 42 of 42 arrays with a right checksum, 0 errors" in run("verify", demos)
    assert "nothing to repair" in run("repair", demos)
    os.truncate(demos / "data" / "episodes" / "000002.hdf5", 500)
    assert "error: data/episodes/000002.hdf5: no whole episode" in run("verify", demos, status=1)
    text = run("repair", demos)
    assert "lost: data/episodes/000002.hdf5" in text and "episode 5 is now episode 4" in text
    assert f"wrote 5 complete episodes to {demos}-repaired" in text
    assert "5 whole episodes" in run("verify", f"{demos}-repaired")


def test_cutting_and_joining(run, demos, tmp_path):
    def seeds(name):
        return [info.seed for info in EpisodeStore(tmp_path / name, "r").index]

    run("filter", demos, "--where", "success and task == 'door-open'", "--out", tmp_path / "f")
    run("merge", tmp_path / "f", demos, "--out", tmp_path / "m")
    run("split", demos, "--out", tmp_path / "p", "--fraction", "0.5")
    run("split", demos, "--out", tmp_path / "t")
    run("sample", demos, "--number", "2", "--where", "not success", "--out", tmp_path / "s")
    run("relabel", demos, "--where", "index == 0", "--task", "new", "--out", tmp_path / "r")
    assert (seeds("f"), seeds("m")) == ([3], [3, 0, 1, 2, 3, 4, 5])
    assert sorted(seeds("p/train") + seeds("p/val")) == list(range(6)) and len(seeds("p/train")) == 3
    assert seeds("t/door-open") == [0, 3] and set(seeds("s")) < {0, 2, 4}
    assert [info.task for info in EpisodeStore(tmp_path / "r", "r").index].count("new") == 1


def test_every_tool_is_a_function_of_the_library():
    functions = {
        "info": "summarize", "ls": "select", "filter": "filter_episodes", "re-encode": "reencode"
    }  # fmt: skip
    for tool in TOOLS:
        assert callable(getattr(vla_rl.data, functions.get(tool, tool.replace(" ", "_")))), tool


def test_packing_and_unpacking(run, demos, tmp_path):
    size = sum(info.num_bytes for info in EpisodeStore(demos, "r").index) / 1e6
    assert f"6 episodes, {size:,.1f} MB before" in run("pack", demos, "--images", "png", "--out", tmp_path / "small")
    run("pack", tmp_path / "small", "--images", "raw", "--out", tmp_path / "again")
    for old, new in zip(EpisodeStore(demos, "r"), EpisodeStore(tmp_path / "again", "r"), strict=True):
        assert np.array_equal(old.observations["image"], new.observations["image"])


def test_handing_on(run, demos, tmp_path):
    run("export", "minari", demos, "--out", tmp_path / "drawers-v0")
    run("import", "minari", tmp_path / "drawers-v0", "--out", tmp_path / "back")
    run("export", "robomimic", demos, "--out", tmp_path / "view.hdf5")
    run("export", "robomimic", demos, "--out", tmp_path / "demos.hdf5", "--materialize")
    assert (tmp_path / "view.hdf5").is_file()
    text = run("import", "robomimic", tmp_path / "demos.hdf5", "--out", tmp_path / "there", "--source", "x")
    assert "door-open" in text and "expert" in text  # what the file says goes before the option
    for name in ("back", "there"):
        for index, episode in enumerate(EpisodeStore(tmp_path / name, "r")):
            expected = make_episode(index, episode.task)
            assert episode.actions.tobytes() == expected.actions.tobytes()
            assert episode.observations["image"].tobytes() == expected.observations["image"].tobytes()


def test_handing_on_to_lerobot(run, demos, tmp_path):
    pytest.importorskip("pyarrow")
    assert "wrote" in run("export", "lerobot", demos, "--out", tmp_path / "set", "--fps", "10", "--where", "success")
    assert "3 episodes, 15 steps" in run("import", "lerobot", tmp_path / "set", "--out", tmp_path / "back")
    truth = (make_episode(n, "x").actions.tobytes() for n in (1, 3, 5))
    assert [episode.actions.tobytes() for episode in EpisodeStore(tmp_path / "back", "r")] == list(truth)


def test_a_render_function_is_found_by_its_path(run, tmp_path, monkeypatch):
    import h5py

    (tmp_path / "my_render.py").write_text(
        "import numpy as np\n"
        "def draw(arrays):\n"
        "    return np.full((len(arrays['observations/joints']), 8, 8, 3), 7, np.uint8)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with h5py.File(tmp_path / "low_dim.hdf5", "w") as file:
        demo = file.create_group("data/demo_0")
        demo["obs/joints"], demo["actions"] = np.zeros((2, 3)), np.full((2, 2), 0.1)
        demo["rewards"], demo["dones"] = np.ones(2), np.array([0, 1])
    words = ("import", "robomimic", tmp_path / "low_dim.hdf5", "--out", tmp_path / "s", "--instruction", "lift")
    assert "no pictures" in run(*words, status=1)
    assert "cannot load 'my_render:nothing'" in run(*words, "--render", "my_render:nothing", status=1)
    assert "warning: actions of float64 were rounded to float32" in run(*words, "--render", "my_render:draw")
    assert EpisodeStore(tmp_path / "s", "r")[0].observations["image"].max() == 7
    sys.modules.pop("my_render", None)


def test_errors_are_one_sentence(run, demos, tmp_path):
    for words, expected in (
        (("filter", demos, "--where", "tusk == 1", "--out", tmp_path / "x"), "did you mean 'task'?"),
        (("filter", demos, "--where", "success", "--out", demos), "say --overwrite"),
        (("ls", demos, "--where", "import os"), "is not an expression"),
        (("play", demos, "--out", tmp_path / "x.bmp"), "should end in"),
        (("play", demos, "--episodes", "77", "--out", tmp_path / "x.png"), "episode 77 of a store with 6"),
        (("import", "minari", "nobody/none-v0", "--out", tmp_path / "x"), "no Minari data set"),
        (("verify", tmp_path / "none"), "no episode store"),
        (("merge", "--out", tmp_path / "x"), "no stores to merge"),
    ):
        text = run(*words, status=1)
        assert expected in text and text.startswith("vla-rl: ") and text.count("\n") == 1, text
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("tool", TOOLS)
def test_help_fits_a_screen_and_shows_an_example(tool, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as caught:
        main(["data", *tool.split(), "--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert f"Example: vla-rl data {tool}" in text
    assert len(text.splitlines()) <= 50
