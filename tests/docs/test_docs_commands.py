"""Every command of the documentation is one that bash, and the command line or script that is meant, understands."""

import argparse
import re
import runpy
import shlex
import subprocess
import sys

import pytest
import tyro
from pages import OTHERS, PAGES, ROOT, blocks, commands

import vla_rl.cli


class UnderstoodError(Exception):
    """The command line was parsed; nothing is run."""


def lines(path):
    """Line number and words of every `vla-rl` on a page, also where torchrun starts it."""
    for number, words in commands(path):
        if words[0] == "vla-rl":
            yield number, words[1:]
        elif words[0] == "torchrun" and ["-m", "vla_rl"] in [words[at : at + 2] for at in range(len(words))]:
            yield number, words[words.index("vla_rl") + 1 :]


def scripts(path):
    """Line number and words of every script that a page runs, also of those that launch.py is to run."""
    for number, words in commands(path):
        if words[0] == "python" and words[1].endswith(".py"):
            yield number, words[1:]
            if "--command" in words:
                yield number, shlex.split(words[words.index("--command") + 1])[1:]


PAGES_WITH_COMMANDS = [path for path in PAGES + OTHERS if list(lines(path))]
PAGES_WITH_SCRIPTS = [path for path in PAGES + OTHERS if list(scripts(path))]


def name(path):
    return path.relative_to(ROOT).as_posix()


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


@pytest.mark.parametrize("path", PAGES_WITH_COMMANDS, ids=name)
def test_the_commands_of_a_page_are_understood(path, refusal):
    for number, words in lines(path):
        assert (said := refusal(words)) is None, f"{path}:{number}: `vla-rl {' '.join(words)}` is refused:\n{said}"


def test_a_command_that_does_not_exist_is_noticed(refusal):
    assert "no-such-option" in refusal(["train", "toy", "--no-such-option", "1"])


def understood(words, monkeypatch, capsys):
    """Whether a script's own parser takes these words; the script ends there, and a word that is wrong is an error."""
    real_cli, real_parse = tyro.cli, argparse.ArgumentParser.parse_args

    def cli(*args, **kwargs):
        real_cli(*args, **kwargs)
        raise UnderstoodError

    def parse(self, args=None, namespace=None):
        real_parse(self, args, namespace)
        raise UnderstoodError

    with monkeypatch.context() as patch:
        patch.setattr(tyro, "cli", cli)
        patch.setattr(argparse.ArgumentParser, "parse_args", parse)
        patch.setattr(sys, "argv", words)
        patch.setattr(sys, "path", [str((ROOT / words[0]).parent), *sys.path])
        try:
            runpy.run_path(str(ROOT / words[0]), run_name="__main__")
        except UnderstoodError:
            return True
        except SystemExit:
            return False
    raise AssertionError(f"{words[0]} has read no words")


@pytest.mark.slow
@pytest.mark.simulator
@pytest.mark.parametrize("path", PAGES_WITH_SCRIPTS, ids=name)
def test_the_scripts_of_a_page_understand_their_options(path, monkeypatch, capsys):
    for number, words in scripts(path):
        words = [re.sub(r"^\$\w+$", "1", word) for word in words]  # a loop's variable
        assert understood(words, monkeypatch, capsys), f"{name(path)}:{number}: {shlex.join(words)}"


@pytest.mark.slow
def test_an_option_that_a_script_does_not_have_is_noticed(monkeypatch, capsys):
    assert understood(["examples/evaluate.py", "--policy", "x"], monkeypatch, capsys)
    assert not understood(["examples/evaluate.py", "--polycy", "x"], monkeypatch, capsys)


def test_scripts_are_found():
    assert sum(len(list(scripts(path))) for path in PAGES) > 20


@pytest.mark.parametrize("path", PAGES + OTHERS, ids=name)
def test_bash_reads_every_block(path):
    for block in blocks(path):
        if block.language in ("bash", "sh", "console"):
            done = subprocess.run(["bash", "-n"], input=block.code, capture_output=True, text=True, timeout=60)
            assert (done.returncode, done.stderr) == (0, ""), f"{name(path)}:{block.line}"
            words = re.sub(r"#.*", "", block.code).replace("<address of this repository>", "")
            assert not re.search(r"<\w", words), f"{name(path)}:{block.line}: bash takes `<` for a redirection"
