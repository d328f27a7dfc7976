"""Stage 2 of a finished run once more: with the run's own rates it is the run's, with others it is not."""

import pytest
import torch
from stage2_rates import again, entry
from test_tables_runs import TINY
from tiny import differing, parameters

from vla_rl.cli import main
from vla_rl.experiment import ExperimentConfig
from vla_rl.experiment_file import read_experiment
from vla_rl.policy import VLAPolicy
from vla_rl.runs import read_run


@pytest.mark.slow
def test_the_rates_of_the_run_give_its_weights_again(tmp_path):
    assert main(["train", "toy", "--workdir", str(tmp_path), *TINY, "--train.no-stop-at-zero"]) == 0
    torch.set_num_threads(1)
    config, _, _ = read_experiment(tmp_path, ExperimentConfig)
    stage2 = config.train.stage2
    rates = {"learning_rate": stage2.learning_rate, "encoder_learning_rate": stage2.encoder_learning_rate}
    checkpoint = tmp_path / "checkpoints" / "task0-round0-stage2"
    last = parameters(VLAPolicy.from_pretrained(checkpoint, dtype=torch.float32))
    policy, loss = again(tmp_path, config, rates)
    assert not differing(last, parameters(policy))
    other, other_loss = again(tmp_path, config, dict.fromkeys(rates, 1e-5))
    assert differing(last, parameters(other)) and other_loss != loss
    played = entry(tmp_path, rates)["evaluation"]
    counts = {group: {task: found["n"] for task, found in tasks.items()} for group, tasks in played.items()}
    last_one = list(read_run(tmp_path).evaluations.values())[-1]
    assert counts == {
        group: {task: found.n for task, found in result.tasks.items()} for group, result in last_one.items()
    }
    (tmp_path / "state.json").write_text("{}")
    (tmp_path / "results.json").write_text("{}")
    with pytest.raises(SystemExit, match="has not finished; vla-rl train --resume"):
        entry(tmp_path, rates)
