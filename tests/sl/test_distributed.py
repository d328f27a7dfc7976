"""Supervised learning in two processes, by gloo on a CPU, against one process with the whole batch."""

import json
import os
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import tiny_policy

from vla_rl.data import BalancedSampler, EpisodeStore, compute_statistics
from vla_rl.encoders import LoRASettings
from vla_rl.policy import VLAPolicy
from vla_rl.sl.job import SupervisedJob, run_job
from vla_rl.sl.processes import OneProcess, full_weights, start_processes
from vla_rl.sl.snapshots import Snapshots
from vla_rl.sl.supervised import SLConfig, train_supervised

accelerate = pytest.importorskip("accelerate")

CASES = {  # 15 rows: 8 for the first process, 7 for the second
    "lora": {"scope": "lora"},
    "all": {"scope": "all", "random_shift": 2},
    "head": {"scope": "head"},
    "parts": {"scope": "all", "random_shift": 2, "gradient_accumulation": 3},
    "half": {"scope": "all"},
    "resumed": {"scope": "all", "random_shift": 2},
}
SHARDED = {
    "sharded-lora": {"scope": "lora"},
    "sharded-all": {"scope": "all", "random_shift": 2, "gradient_accumulation": 2},
    "sharded-checkpointing": {"scope": "all", "gradient_checkpointing": True},
    "sharded-half": {"scope": "all"},
    "sharded-resumed": {"scope": "all", "random_shift": 2},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, expert_path):
    """Two policies to start from, and the store that they learn from."""
    folder = tmp_path_factory.mktemp("together")
    with EpisodeStore(expert_path, mode="r") as store:
        policy = tiny_policy(statistics=compute_statistics([store]))
    policy.encoder.image_size = (32, 32)
    policy.save_pretrained(folder / "plain")
    policy.encoder.add_lora(LoRASettings(r=4, alpha=8))
    policy.save_pretrained(folder / "lora")
    (folder / "expert").symlink_to(expert_path)
    return folder


def start(folder, name):
    dtype = torch.bfloat16 if name.endswith("half") else torch.float32
    with warnings.catch_warnings(action="ignore"):  # the fingerprint is another with another dtype
        return VLAPolicy.from_pretrained(folder / ("lora" if "lora" in name else "plain"), dtype=dtype)


def config_of(case):
    return SLConfig(steps=4, batch_size=15, weight_decay=0.1, **case)


class StopError(Exception):
    pass


def train(folder, name, case, processes=None, *, snapshots=None, last=3):
    """Losses and weights after four steps, or an error after step `last`."""
    policy, losses = start(folder, name), []

    def on_step(step, loss):
        losses.append(loss)
        if step == last < 3:
            raise StopError

    with EpisodeStore(folder / "expert", mode="r") as store:
        train_supervised(
            policy,
            BalancedSampler([store], batch_size=15, seed=3),
            config=config_of(case),
            seed=5,
            on_step=on_step,
            processes=processes,
            snapshots=snapshots,
        )
    return losses, full_weights(policy)


def run_both(folder, cases, sharded):
    """What each of the two processes runs."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    if sharded:
        os.environ |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
    processes = start_processes()
    for name, case in cases.items():
        if name.endswith("resumed"):
            snapshots = Snapshots(folder / f"{name}-steps", every=2, of=case)
            with pytest.raises(StopError):
                train(folder, name, case, processes, snapshots=snapshots, last=2)
            losses, weights = train(folder, name, case, processes, snapshots=snapshots)
            losses = [*json.loads((folder / f"{name}-steps" / "step0000004" / "state.json").read_text())["losses"]]
        else:
            losses, weights = train(folder, name, case, processes)
        path = folder / f"{name}-{processes.process_index}"
        save_file({key: value.contiguous().clone() for key, value in weights.items()}, f"{path}.safetensors")
        found = {"losses": losses, "number": processes.num_processes, "sharded": processes.is_fsdp2}
        path.with_suffix(".json").write_text(json.dumps(found))
    if sharded:
        config = config_of(SHARDED["sharded-all"])
        job = SupervisedJob(
            str(folder / "plain"), [str(folder / "expert")], str(folder / "job"), config, seed=5, data_seed=3
        )
        run_job(job, processes=processes)


@pytest.fixture(scope="module")
def together(folder):
    accelerate.debug_launcher(run_both, (folder, CASES, False))
    accelerate.debug_launcher(run_both, (folder, SHARDED, True))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", [*CASES, *SHARDED])
def test_two_processes_learn_what_one_learns_from_the_whole_batch(together, name):
    losses, weights = train(together, name, (CASES | SHARDED)[name])
    before = full_weights(start(together, name))
    half = name.endswith("half")
    assert len(losses) == 4 and losses[-1] != pytest.approx(losses[0], rel=1e-2)
    for rank in (0, 1):
        found = json.loads((together / f"{name}-{rank}.json").read_text())
        assert found["number"] == 2 and found["sharded"] == name.startswith("sharded")
        assert found["losses"] == pytest.approx(losses, rel=5e-3 if half else 1e-4)
        after = load_file(together / f"{name}-{rank}.safetensors")
        assert after.keys() == weights.keys()
        for key, value in weights.items():
            # Adam scales up the rounding errors of gradients that are zero but for them, as softmax makes these.
            if value.numel() and not key.endswith("k_proj.bias"):
                moved = (value - before[key]).float()
                if half:  # shards stay float32 until they are put together; a rounding that flips is a whole step
                    apart = after[key].to(value.dtype).float() - value.float()
                    assert apart.norm() <= 0.2 * moved.norm(), key
                else:
                    atol = 0.02 * moved.abs().max().item() + 1e-7
                    torch.testing.assert_close(after[key], value, rtol=0, atol=atol, msg=key)
        other = load_file(together / f"{name}-{1 - rank}.safetensors")
        assert all(torch.equal(after[key], other[key]) for key in after)


@pytest.mark.slow
def test_each_process_writes_its_shards_alone(together):
    """Half of weights and moments each; without shards, the first process writes them all."""
    whole, nothing = stored(together / "resumed-steps" / "step0000004")
    shards = stored(together / "sharded-resumed-steps" / "step0000004")
    assert whole > 0 and nothing == 0 and sum(shards) == whole
    assert all(0.4 * whole < shard < 0.6 * whole for shard in shards)


def stored(folder):
    """Numbers in the weights and moments that each process has written, in the order of the processes."""
    files = sorted(folder.glob("*.safetensors"))
    assert [file.name for file in files] == ["process00000.safetensors", "process00001.safetensors"]
    named = [load_file(file).items() for file in files]
    return [sum(value.numel() for name, value in tensors if name[0].isdigit() and value.ndim) for tensors in named]


@pytest.mark.slow
def test_a_sharded_policy_is_written_as_any_other(together):
    policy = VLAPolicy.from_pretrained(together / "job")
    expected = load_file(together / "sharded-all-0.safetensors")
    for key, value in policy.state_dict().items():
        torch.testing.assert_close(value, expected[key], rtol=0, atol=1e-6, msg=key)


def test_a_stage_that_was_broken_off_goes_on_with_the_same_numbers(folder, tmp_path):
    case = {"scope": "all", "random_shift": 2}
    losses, weights = train(folder, "plain", case)
    snapshots = Snapshots(tmp_path / "steps", every=2, of=case)
    with pytest.raises(StopError):
        train(folder, "plain", case, snapshots=snapshots, last=2)
    assert [path.name for path in (tmp_path / "steps").iterdir()] == ["step0000002"]
    (tmp_path / "steps" / ".tmp").mkdir()  # as a kill leaves it
    torch.manual_seed(99)
    later, resumed = train(folder, "plain", case, snapshots=snapshots)
    assert later == losses[2:]
    assert all(torch.equal(resumed[key], value) for key, value in weights.items())


def test_snapshots_of_another_stage_or_number_of_processes_are_refused(folder, tmp_path):
    case = {"scope": "head"}
    train(folder, "head", case, snapshots=Snapshots(tmp_path, every=2, of={"seed": 1, "data": "a"}))
    with pytest.raises(ValueError, match="begun with another data; go on with the same, or remove it"):
        train(folder, "head", case, snapshots=Snapshots(tmp_path, every=2, of={"seed": 1, "data": "b"}))

    class Two(OneProcess):
        num_processes = 2

    with pytest.raises(ValueError, match="written by 1 processes without FSDP2; go on with as many"):
        train(folder, "head", case, Two(), snapshots=Snapshots(tmp_path, every=2, of={"seed": 1, "data": "a"}))


def test_a_process_without_a_row_is_refused(folder):
    class Hundred:
        num_processes, process_index, is_fsdp2 = 100, 0, False

    with pytest.raises(ValueError, match=r"gradient_accumulation=1 in each of 100 processes, expected .* 15, in all"):
        train(folder, "head", {"scope": "head"}, Hundred())


def test_sharding_a_frozen_vlm_is_refused(folder):
    class Shards:
        num_processes, process_index, is_fsdp2 = 2, 0, True

    with pytest.raises(ValueError, match='scope="head" has no VLM weights that learn'):
        train(folder, "head", {"scope": "head"}, Shards())


def test_fsdp_1_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "1")
    with pytest.raises(ValueError, match="set fsdp_version: 2"):
        start_processes()


def test_several_processes_without_accelerate_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setitem(__import__("sys").modules, "accelerate", None)
    with pytest.raises(ImportError, match=r"pip install 'vla-rl\[lora\]'"):
        start_processes()


@pytest.mark.parametrize(("name", "kind"), [("ddp", "MULTI_GPU"), ("fsdp2", "FSDP")])
def test_accelerate_reads_the_ready_settings(name, kind):
    from accelerate.commands.config.config_args import load_config_from_file

    settings = load_config_from_file(str(Path(__file__).parents[2] / "examples" / "accelerate" / f"{name}.yaml"))
    assert settings.distributed_type.value == kind
    assert settings.num_processes == 4 and settings.mixed_precision == "no"
    if name == "fsdp2":
        assert settings.fsdp_config["fsdp_version"] == 2
        assert not settings.fsdp_config["fsdp_cpu_ram_efficient_loading"]
