"""Every script that trains, on a device that is not the CPU: it mixes no devices, and its curves are the CPU's."""

from pathlib import Path

import numpy as np
import pytest
from mirror_device import run
from scripts import EXAMPLES, RUNS, run_script, scalars


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_a_script_learns_there_what_it_learns_here(name, sft, demos, root, monkeypatch):
    options = RUNS[name].format(sft=sft, demos=demos).replace(" --dtype float32", "")
    options += f" --dtype float32 --eval-episodes 2 --save-model --exp-name {Path(name).stem}"
    here = scalars(root, run_script(monkeypatch, root, name, f"{options}-here"))
    run("mirror_device.py", EXAMPLES / name, *f"{options}-there".split(), cwd=root)
    (folder,) = root.glob(f"runs/*/*__{Path(name).stem}-there__*")
    there = scalars(root, {"run_name": str(folder.relative_to(root / "runs"))})
    compared = {tag for tag in here if tag.startswith(("losses/", "eval/"))}
    assert compared and there.keys() == here.keys()
    for tag in compared:
        np.testing.assert_allclose(there[tag], here[tag], rtol=1e-3, atol=1e-5, err_msg=tag)
