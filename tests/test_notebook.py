"""The notebook's cells, run in a kernel with a small network; only its parameters are replaced."""

from __future__ import annotations

import json
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

NOTEBOOK = Path(__file__).parent.parent / "notebooks" / "colab_t4.ipynb"

SMALL = {
    "SOURCE": "",  # is installed already
    "DATASET": "mnist5k",
    "PRESET": "quick",
    "OPTIONS": "--limit 300 --epochs 2 --lambda-warmup 1 --steps 2 --validation-steps 2 --device cpu --threads 1",
    "POINTS": 8,
}


def filled(**values: object) -> nbformat.NotebookNode:
    """The notebook with other parameters, in a cell after the one that is tagged so."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    (place,) = [i for i, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", ())]
    values = SMALL | values
    for name in values:
        assert f"\n{name} = " in f"\n{notebook.cells[place].source}"
    lines = [f"{name} = {value!r}" for name, value in values.items()]
    notebook.cells.insert(place + 1, nbformat.v4.new_code_cell("\n".join(lines)))
    return notebook


def executed(notebook: nbformat.NotebookNode, folder: Path) -> nbformat.NotebookNode:
    return NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(folder)}}).execute()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[nbformat.NotebookNode, Path]:
    folder = tmp_path_factory.mktemp("notebook")
    return executed(filled(), folder), folder


def test_it_is_kept_without_outputs() -> None:
    cells = [cell for cell in nbformat.read(NOTEBOOK, as_version=4).cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in cells)


def test_a_run_comes_out(run: tuple[nbformat.NotebookNode, Path]) -> None:
    notebook, folder = run
    made = folder / "runs" / "first"
    (evaluation,) = json.loads((made / "eval.json").read_text())["evaluations"]
    assert evaluation["points"] == 8
    assert list(evaluation["attacks"]) == ["fgsm", "pgd20", "autoattack"]
    assert (made / "export" / "first.pt").is_file()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    shown = [output for output in outputs if "image/png" in output.get("data", {})]
    drawn = {picture.stem for picture in (made / "plots").glob("*.png")}
    assert drawn >= {"curves", "entropy-sensitivity", "gallery"}  # the rest depends on which epoch was best
    assert len(shown) == len(drawn)
    printed = "".join(output.get("text", "") for output in outputs)
    assert "no problems found" in printed
    assert "autoattack" in printed
    assert "Traceback" not in printed


def test_what_is_installed_must_be_there(tmp_path: Path) -> None:
    with pytest.raises(CellExecutionError, match="no archive and no folder"):
        executed(filled(SOURCE="nowhere.zip"), tmp_path)


def test_a_failed_command_stops_it(tmp_path: Path) -> None:
    """What follows would only hide why."""
    notebook = filled(OPTIONS="--epochs many")
    with pytest.raises(CellExecutionError, match="training failed") as raised:
        executed(notebook, tmp_path)
    assert "--epochs" in str(raised.value)
