"""Every Python block of the documentation runs, page by page, in one namespace and an empty directory per page."""

import importlib.util
import sys

import pytest
import torch
from pages import DOCS, PAGES, ROOT, blocks

CODE = {path: [block for block in blocks(path) if block.language == "python"] for path in PAGES}
HEAVY = ("slow", "simulator")


def page_cases():
    """Each page with what runs anywhere; and once more with everything, where it has blocks that do not."""
    for path, found in CODE.items():
        marks, name = {block.mark for block in found}, path.relative_to(DOCS).as_posix()
        if marks & {"", "needs"}:
            yield pytest.param(path, ("", "needs", "setup"), id=name)
        if heavy := [getattr(pytest.mark, mark) for mark in HEAVY if mark in marks]:
            yield pytest.param(path, ("", "needs", "setup", *HEAVY), id=f"{name}, whole", marks=heavy)


def interpreter(path):
    """This Python under another name, for pages that name one."""
    path.parent.mkdir(parents=True)
    path.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    path.chmod(0o755)


@pytest.mark.parametrize(("path", "wanted"), page_cases())
def test_the_blocks_of_a_page_run(path, wanted, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    interpreter(tmp_path / "path" / "to" / "another" / "python")
    # Functions defined in "__main__" are pickled by value, as in a script; stand-ins of a page are taken back.
    namespace = {"__name__": "__main__", "monkeypatch": monkeypatch}
    for block in CODE[path]:
        missing = block.mark == "needs" and importlib.util.find_spec(block.reason) is None
        if block.mark in wanted and not missing:
            padding = "\n" * (block.line - 1)  # so that a traceback names the line of the page
            exec(compile(padding + block.code, str(path), "exec"), namespace)


def test_a_block_that_is_not_run_here_is_run_elsewhere():
    named = {(block.page, block.reason) for found in CODE.values() for block in found if block.mark == "elsewhere"}
    assert {page for page, _ in named} == {"guides/cluster.md", "environments/robohive.md"}
    for page, test in named:
        assert page in (ROOT / (test or "tests/envs/test_robohive.py")).read_text()


def test_blocks_are_found_with_their_marks(tmp_path, monkeypatch):
    page = DOCS / "guides" / "data.md"
    first = next(block for block in blocks(page) if block.language == "python" and block.mark != "setup")
    assert page.read_text().splitlines()[first.line - 1] == first.code.splitlines()[0]
    assert sum(block.mark == "" for found in CODE.values() for block in found) > 10

    monkeypatch.setattr("pages.DOCS", tmp_path)
    path = tmp_path / "page.md"
    path.write_text(
        "<!-- test: setup\nx = 1\n-->\n<!-- test: slow: a minute -->\n```python\ny = x\n```\n```bash\nls\n```\n"
    )
    kinds = [(block.language, block.mark, block.reason, block.line) for block in blocks(path)]
    assert kinds == [("python", "setup", "", 1), ("python", "slow", "a minute", 6), ("bash", "", "", 9)]
    for wrong in ("slow -->\n```python\n```\n", "fast: no -->\n```python\n```\n", "skip: no block -->"):
        path.write_text(f"<!-- test: {wrong}")
        with pytest.raises(ValueError, match=r"page\.md"):
            blocks(path)
