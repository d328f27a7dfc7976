"""Every `vla-rl` command of the documentation is one that the command line understands."""

import pytest
import tyro
from pages import DOCS, PAGES, ROOT, commands

import vla_rl.cli


class UnderstoodError(Exception):
    """The command line was parsed; nothing is run."""


def lines(path):
    return [(number, words[1:]) for number, words in commands(path) if words[0] == "vla-rl"]


PAGES_WITH_COMMANDS = [path for path in PAGES if lines(path)]


@pytest.fixture
def refusal(monkeypatch, capsys):
    """words -> what the command line has against them, or None; no command is run."""
    real = tyro.cli

    def cli(*args, **kwargs):
        real(*args, **kwargs)
        raise UnderstoodError

    def told(words):
        try:
            vla_rl.cli.main(words)
        except UnderstoodError:
            return None
        except SystemExit as end:
            return capsys.readouterr().err[-1000:] if end.code else None

    monkeypatch.setattr(tyro, "cli", cli)
    return told


@pytest.mark.parametrize("path", PAGES_WITH_COMMANDS, ids=lambda path: path.relative_to(DOCS).as_posix())
def test_the_commands_of_a_page_are_understood(path, refusal):
    for number, words in lines(path):
        assert (said := refusal(words)) is None, f"{path}:{number}: `vla-rl {' '.join(words)}` is refused:\n{said}"


def test_a_command_that_does_not_exist_is_noticed(refusal):
    assert "no-such-option" in refusal(["train", "toy", "--no-such-option", "1"])


def test_python_commands_name_files_that_exist():
    named = [
        (path, number, words[1])
        for path in PAGES
        for number, words in commands(path)
        if words[0] == "python" and words[1].endswith(".py")
    ]
    assert len(named) > 10
    missing = [f"{path}:{number}: {script}" for path, number, script in named if not (ROOT / script).is_file()]
    assert missing == []
