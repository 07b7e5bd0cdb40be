"""Every notebook of examples/notebooks runs from top to bottom, and is stored without outputs."""

from __future__ import annotations

import copy
from pathlib import Path

import nbclient
import nbformat
import pytest

NOTEBOOKS = sorted((Path(__file__).resolve().parents[2] / "examples" / "notebooks").glob("*.ipynb"))
CELL_TIMEOUT_S = 240


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def notebook(request: pytest.FixtureRequest) -> nbformat.NotebookNode:
    read = nbformat.read(request.param, as_version=4)
    nbformat.validate(read)
    return read


def test_notebook_is_stored_without_outputs(notebook: nbformat.NotebookNode) -> None:
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert (cell.outputs, cell.execution_count) == ([], None), cell.source


def test_notebook_runs(notebook: nbformat.NotebookNode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work, temporary, jupyter = (tmp_path / name for name in ("work", "temporary", "jupyter"))
    for folder in (work, temporary, jupyter):
        folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    for variable in ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR"):
        monkeypatch.setenv(variable, str(jupyter))
    client = nbclient.NotebookClient(
        copy.deepcopy(notebook),
        timeout=CELL_TIMEOUT_S,
        kernel_name="python3",
        resources={"metadata": {"path": str(work)}},
    )
    client.execute()
    assert {path.name for path in work.iterdir()} <= {"runs"}, "written outside ./runs and the temporary folder"
    assert not list(temporary.glob("first_steps_*")), "the notebook leaves its temporary folder behind"
