import json
import sys
import time
from types import ModuleType

import pytest

from vla_rl.cli import main
from vla_rl.tracking import Follower


class Service(ModuleType):
    """A tracking service that remembers what it was told."""

    def __init__(self, name):
        super().__init__(name)
        self.calls = []

    def init(self, **kwargs):
        self.calls.append(("init", kwargs))

    def log(self, metrics):
        self.calls.append(("log", metrics))

    def finish(self):
        self.calls.append(("finish", None))

    def logged(self):
        return [metrics for name, metrics in self.calls if name == "log"]


@pytest.fixture
def service(monkeypatch):
    module = Service("trackio")
    monkeypatch.setitem(sys.modules, "trackio", module)
    return module


def append(path, *entries):
    with (path / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps(entry) + "\n" for entry in entries)


def test_lines_are_sent_as_they_are_written_and_the_rest_at_the_end(service, tmp_path):
    append(tmp_path, {"phase": "stage0", "step": 0, "losses/bc_loss": 1.0})
    with Follower(tmp_path, tool="trackio", config={"seed": 3}, every=0.01):
        append(tmp_path, {"phase": "p1", "step": 5, "losses/approx_kl": 0.1})
        for _ in range(500):
            if service.logged():
                break
            time.sleep(0.01)
        assert service.logged() == [{"p1/losses/approx_kl": 0.1, "p1/step": 5}], "and not what was there before"
        with (tmp_path / "metrics.jsonl").open("a") as file:
            file.write('{"phase": "after-stage2", "step": 3, "eval/rl": 0.5}\n{"phase": "torn')
    assert service.logged()[1:] == [{"eval/rl": 0.5, "after-stage2/step": 3}]
    assert service.calls[0] == ("init", {"project": "vla-rl", "name": tmp_path.name, "config": {"seed": 3}})
    assert service.calls[-1] == ("finish", None)


def test_the_command_line_sends_a_run(service, tmp_path):
    args = {
        "workdir": tmp_path / "run", "method": "sft", "expert-episodes": 3, "train.num-workers": 0, "track": "trackio",
        "train.stage0.steps": 25, "train.stage0.batch-size": 8, "train.eval-episodes": 2, "train.rl-eval-episodes": 2,
        "train.seed": 4,
    }  # fmt: skip
    assert main(["train", "toy", *(text for name, value in args.items() for text in (f"--{name}", str(value)))]) == 0
    (kind, begun), (end, _) = service.calls[0], service.calls[-1]
    assert (kind, begun["name"], begun["config"]["train"]["seed"], end) == ("init", "run", 4, "finish")
    written = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(service.logged()) == len(written) > 2
    losses = [sent["stage0/losses/bc_loss"] for sent in service.logged() if "stage0/losses/bc_loss" in sent]
    assert losses == [entry["losses/bc_loss"] for entry in written if "losses/bc_loss" in entry] and len(losses) == 2
    assert any("eval/rl" in sent for sent in service.logged())


def test_steps_of_a_phase_are_its_axis_where_the_service_has_axes(service, tmp_path):
    service.define_metric = lambda name, step_metric: service.calls.append(("axis", (name, step_metric)))
    with Follower(tmp_path, tool="trackio", config={}):
        append(tmp_path, *({"phase": "p1", "step": step, "x": 0.0} for step in range(3)))
    assert [call for call in service.calls if call[0] == "axis"] == [("axis", ("p1/*", "p1/step"))]


def test_a_service_that_fails_does_not_end_the_run(service, tmp_path):
    def fail(metrics):
        raise ConnectionError("no route")

    service.log = fail
    with pytest.warns(UserWarning, match="trackio takes no more curves .no route.; the run goes on"):  # noqa: SIM117
        with Follower(tmp_path, tool="trackio", config={}):
            append(tmp_path, {"phase": "p1", "step": 5, "x": 0.1})
    assert service.calls[-1] == ("finish", None)


def test_a_missing_package_names_the_extra(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ImportError, match=r'pip install "vla-rl\[wandb\]"'):
        Follower(tmp_path, tool="wandb", config={})
