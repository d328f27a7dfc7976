"""Pages of the single-file scripts: their sections, and links from implementation details to the lines meant."""

import re
import runpy

import pytest
from pages import DOCS, ROOT

pytest.importorskip("mkdocs")

HOOK = runpy.run_path(str(DOCS / "hooks" / "repository.py"))
SCRIPT_PAGES = sorted(path for path in (DOCS / "scripts").glob("*.md") if path.name != "index.md")
TRAINING = [path for path in SCRIPT_PAGES if path.stem not in ("collect_demos", "evaluate")]


def sections(path):
    """Text by heading of the second level; the overview is under ""."""
    parts = re.split(r"^## (.+)$", path.read_text(), flags=re.MULTILINE)
    return {"": parts[0]} | dict(zip(parts[1::2], parts[2::2], strict=True))


def links(text):
    return [
        (target, anchor[1:]) for _, target, anchor in HOOK["LINK"].findall(text) if target.endswith(".py") and anchor
    ]


@pytest.mark.parametrize("path", SCRIPT_PAGES, ids=lambda path: path.stem)
def test_a_page_has_its_sections(path):
    found = sections(path)
    wanted = ["", "Usage", "Implementation details", "Parity"]
    if path in TRAINING:
        wanted += ["Logged metrics", "Results"]
    assert [name for name in wanted if len(found.get(name, "").split()) < 3] == []
    assert f"(../../examples/{path.stem}.py)" in found[""] and f"examples/{path.stem}.py" in found["Usage"]


@pytest.mark.parametrize("path", SCRIPT_PAGES, ids=lambda path: path.stem)
def test_every_implementation_detail_leads_to_a_line(path):
    items = re.split(r"^\d+\. ", sections(path)["Implementation details"], flags=re.MULTILINE)[1:]
    assert len(items) >= 2
    for item in items:
        assert links(item), item
    for target, name in links(path.read_text()):
        source = HOOK["repository_path"](target, path.relative_to(DOCS).as_posix())
        assert source == f"examples/{path.stem}.py"
        line = (ROOT / source).read_text().splitlines()[HOOK["line_of"](source, name) - 1]
        last = name.rsplit(".")[-1]
        assert re.search(rf"(def|class) {last}\b|^ +{last}:", line) or name.split("-")[0] in line.lower()


def test_a_name_that_is_gone_is_an_error():
    line_of, source = HOOK["line_of"], "examples/ppo_frozen_vlm.py"
    lines = (ROOT / source).read_text().splitlines()
    assert lines[line_of(source, "VLM.encode") - 1].startswith("    def encode(")
    assert lines[line_of(source, "Args.target_kl") - 1].startswith("    target_kl: float")
    assert "# bootstrap value if not terminated" in lines[line_of(source, "bootstrap-value") - 1]
    for name in ("VLM.encoded", "bootstrap-val", "try-not-to-modify"):  # unknown, half a word, several
        with pytest.raises(ValueError, match=name):
            line_of(source, name)
