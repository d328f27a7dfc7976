import re
import sys
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def gallery():
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import gallery

    sys.path.remove(str(ROOT / "benchmarks"))
    return gallery


class Documented(gym.Env):
    """Moves a dot.

    More about the dot.

    ## Observation
    ``x`` in metres.

    ## Version history
    * v1: slower.

    Args:
        speed: metres per step; a long text goes on
            in the next line.
        mode: ``"a"`` or None.

    Raises:
        some.where.DotError: for no dot.
    """

    observation_space = gym.spaces.Box(np.array([-1, -2], np.float32), np.array([1, 1], np.float32))
    action_space = gym.spaces.Discrete(3, start=1)

    def __init__(self, speed: "float", *, mode: "str | None" = None) -> None:
        self.speed, self.mode = speed, mode


@pytest.fixture
def page(gallery, monkeypatch):
    monkeypatch.setattr(gallery.gym, "make", lambda env_id: Documented(1.0))
    monkeypatch.setattr(gallery.gym, "spec", lambda env_id: SimpleNamespace(entry_point=f"{__name__}:Documented"))
    return gallery.Page("dot", "Dot", "Dot-v1", 'task="up"', (("up", "move up", ("new",)), ("down", "move down", ())))


def test_a_page_has_all_that_docstring_signature_spaces_and_table_say(gallery, page):
    text = gallery.render_page(page)
    headings = re.findall("^## (.+)$", text, flags=re.MULTILINE)
    assert headings == ["Description", "Tasks", "Observation space", "Version history", "Arguments", "Errors"]
    assert "Moves a dot.\n\nMore about the dot.\n\n## Tasks\n\n2 tasks" in text
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert [row for row in rows if "---" not in row] == [
        "| task_id | Task | Instruction | Variants besides `original` |",
        "| 0 | `up` | move up | new |",
        "| 1 | `down` | move down |  |",
        "| Shape | Type | Min | Max |",
        "| `(2,)` | `float32` | [-1, -2] | 1 |",
        "| Argument | Type | Default | Meaning |",
        "| `speed` | `float` |  | metres per step; a long text goes on in the next line. |",
        '| `mode` | `str \\| None` | `None` | ``"a"`` or None. |',
    ]
    assert "* `some.where.DotError`: for no dot." in text and "* v1: slower." in text


def test_a_later_version_needs_a_history(gallery, page, monkeypatch):
    monkeypatch.setattr(Documented, "__doc__", Documented.__doc__.replace("## Version history", "## Versions"))
    with pytest.raises(ValueError, match="Dot-v1 is not a first version: add '## Version history'"):
        gallery.render_page(page)


def test_an_argument_without_a_text_is_an_error(gallery, page, monkeypatch):
    monkeypatch.setattr(Documented, "__doc__", Documented.__doc__.replace("mode:", "node:"))
    with pytest.raises(ValueError, match="'mode' of Documented has no text"):
        gallery.render_page(page)


def test_a_dict_shows_its_keys_and_a_discrete_space_its_numbers(gallery):
    lines = gallery.space_table(gym.spaces.Dict(move=Documented.action_space)).splitlines()
    assert [lines[0], lines[2]] == ["| Key | Shape | Type | Min | Max |", "| `move` | `()` | `int64` | 1 | 3 |"]


def test_differing_names_the_pages_that_are_missing_or_changed(gallery, tmp_path, monkeypatch):
    monkeypatch.setattr(gallery, "texts", lambda: {"a.md": "one", "b.md": "two", "c.md": "three"})
    (tmp_path / "a.md").write_text("one")
    (tmp_path / "b.md").write_text("2")
    assert gallery.differing(tmp_path) == ["b.md", "c.md"]


def test_a_sheet_shows_every_tile_in_its_place(gallery):
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255)]
    tiles = [("name-of-it", "a sentence", np.full((40, 40, 3), colour, np.uint8)) for colour in colours]
    picture = np.asarray(gallery.sheet(tiles, columns=2, size=80))
    assert picture.shape[1] == 8 + 2 * 88
    found = [[tuple(picture[top, left]) for left in (48, 136)] for top in (48, picture.shape[0] - 80)]
    assert found == [[colours[0], colours[1]], [colours[2], (255, 255, 255)]]
    beneath = picture[90 : picture.shape[0] // 2]
    assert beneath[:, 8:88].min() < 100, "the caption is there"
    assert (beneath[:, :8] == 255).all() and (beneath[:, 89:96] == 255).all(), "and stays beneath its tile"


def test_lines_break_where_they_are_full(gallery):
    font = SimpleNamespace(getlength=len)
    assert gallery.wrap("button-press-topdown-wall", font, 13) == ["button-press-", "topdown-wall"]
    assert gallery.wrap("slide the small door", font, 9) == ["slide the", "small", "door"]


def test_the_toy_gallery_shows_every_task_and_variant(gallery):
    tiles = gallery.toy_tiles()
    assert [name for name, _, _ in tiles] == [
        f"reach-{colour} ({variant})" for variant in ("original", "new") for colour in ("red", "blue", "green")
    ]
    env = gym.make("vla_rl_envs:VLA/Toy-v0", task="reach-blue", variant="new", image_size=320)
    obs, info = env.reset(seed=3)
    np.testing.assert_array_equal(tiles[4][2], obs["image"])
    assert tiles[4][1] == info["instruction"]


@pytest.mark.simulator
def test_the_committed_pages_are_what_the_code_says(gallery):
    assert gallery.differing(gallery.OUTPUT) == [], "run python benchmarks/gallery.py --text"


def test_everything_that_the_pages_show_is_there_and_small(gallery):
    for path in gallery.OUTPUT.glob("*.md"):
        for link in re.findall(r"\]\(([^)]+)\)", path.read_text()):
            assert (path.parent / link).is_file(), f"{path.name} shows {link}"
    pictures = [path for path in gallery.OUTPUT.iterdir() if path.suffix in (".jpg", ".png")]
    assert {path.stem for path in pictures} >= {"metaworld", "kitchen", "toy"}
    assert sum(path.stat().st_size for path in pictures) < 1_500_000
