"""What `vla-rl estimate` counts for families whose frames are kept otherwise than a plain row of vision tokens."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from families import FAMILIES, SIZE
from transformers import AutoConfig

from vla_rl.encoders import FrozenVLMEncoder
from vla_rl.estimate import Workload, estimate


def test_what_cannot_be_kept_is_computed_in_every_step(tmp_path):
    config = AutoConfig.from_pretrained(FAMILIES["florence2"].save(tmp_path))
    work = Workload(tokens=24, vision_tokens=8, batch_size=4, dtype=torch.float32)
    kept, none_kept = estimate(config, replace(work, scope="head")), estimate(config, replace(work, scope="lora"))
    vision = kept.env_step_flops - kept.fill_flops
    assert kept.cache_row > 0 == none_kept.cache_row == none_kept.fill_flops
    assert vision == pytest.approx(0, abs=1) and none_kept.step_flops > 4 * (none_kept.env_step_flops - kept.step_flops)


@pytest.mark.parametrize("family", ["qwen3_vl", "qwen2_5_vl"])
def test_a_row_of_the_cache_counts_what_deeper_layers_get(family, tmp_path):
    path = FAMILIES[family].save(tmp_path)
    encoder = FrozenVLMEncoder.from_pretrained(path, dtype=torch.float32)
    row = encoder.encode_vision(np.zeros((1, SIZE, SIZE, 3), np.uint8))[0]
    figures = estimate(
        encoder.model.config, Workload(tokens=24, vision_tokens=len(row), batch_size=4, dtype=torch.float32)
    )
    assert figures.cache_row == row.nbytes
