"""The notebooks, executed in Jupyter's own kernel, and what their runs reached."""

import json
from pathlib import Path

import pytest

from vla_rl.evaluation import paired_difference
from vla_rl.runs import read_run

FOLDER = Path(__file__).parents[2] / "examples" / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))


def execute(name, directory):
    """Run a notebook in a directory; returns it with its outputs."""
    nbformat = pytest.importorskip("nbformat", reason='notebooks need "vla-rl[test]"')
    client = pytest.importorskip("nbclient", reason='notebooks need "vla-rl[test]"')
    pytest.importorskip("ipykernel", reason='notebooks need "vla-rl[test]"')
    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    kernel = client.NotebookClient(
        notebook, timeout=900, kernel_name="python3", resources={"metadata": {"path": directory}}
    )
    return kernel.execute()


def printed(notebook):
    """Everything that the cells printed."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    return "".join(output["text"] for output in outputs if output["output_type"] == "stream")


@pytest.mark.slow
def test_improve_a_policy(tmp_path):
    notebook = execute("improve_a_policy", tmp_path)
    evaluations = read_run(tmp_path / "runs" / "ten-minutes").evaluations
    sft, practised, taught = evaluations.values()
    assert sft["expert"].mean > 0.9 and sft["rl"].mean < 0.7
    assert practised["rl"].mean > 0.9 and taught["expert"].mean > 0.9
    difference, low, _ = paired_difference(sft["rl"], taught["rl"])
    assert low > 0 and f"the new task: {difference:+.2f}" in printed(notebook)
    assert "data:image/webp" in (tmp_path / "runs" / "ten-minutes" / "report.html").read_text()


@pytest.mark.slow
def test_bring_your_own_env(tmp_path):
    pytest.importorskip("pygame", reason="Gymnasium draws the car with pygame")
    notebook = execute("bring_your_own_env", tmp_path)
    (result,) = read_run(tmp_path / "runs" / "car").evaluations.values()
    assert result["expert"].mean > 0.8
    assert f"expert   {result['expert'].mean:.2f} [" in printed(notebook)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_are_kept_without_outputs(path):
    cells = json.loads(path.read_text())["cells"]
    assert len(cells) > 8
    for cell in cells:
        assert cell["cell_type"] == "markdown" or (cell["outputs"] == [] and cell["execution_count"] is None)
