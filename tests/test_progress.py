"""What a terminal shows while a run goes on: a bar per phase, with the time that is left."""

import io
import re

from rich.console import Console


class Clock:
    """A time that passes when it is told to."""

    now = 0.0

    def __call__(self):
        return self.now


def terminal(clock):
    return Console(file=io.StringIO(), force_terminal=True, width=100, color_system=None, get_time=clock)


def last_frame(console):
    """The last line of a bar that was drawn, without control codes."""
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", console.file.getvalue())
    return [line for line in re.split(r"[\r\n]+", text) if "stage0" in line][-1]


def test_a_terminal_shows_a_bar_and_the_time_that_is_left(make_trainer):
    clock = Clock()
    trainer = make_trainer(console=terminal(clock))
    with trainer._progress("stage0", 100) as advance:
        for completed in (10, 20, 30):
            clock.now += 20
            advance(completed, "loss 0.5000")
    frame = last_frame(trainer.console)
    name, bar, passed, left, note = re.fullmatch(r"(\S+) ([━╸╺ ]+) (\S+) (\S+) (.*?) *", frame).groups()
    assert (name, note) == ("stage0", "loss 0.5000") and "━" in bar
    assert passed == "0:01:00" and left == "0:02:20", "30 steps took a minute, 70 are left"


def test_a_run_draws_its_phases_and_a_file_gets_none(make_trainer):
    seen = make_trainer(console=terminal(Clock()), workdir="seen")
    plain = make_trainer(console=Console(file=io.StringIO(), width=100), workdir="plain")
    for trainer in (seen, plain):
        with trainer._progress("stage0", None) as advance:
            advance(1, "an episode", 2)
    assert "━" in last_frame(seen.console) and "an episode" in last_frame(seen.console)
    assert "stage0" not in plain.console.file.getvalue()
