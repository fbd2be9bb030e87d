"""The tutorial runs from its first cell to its last in a kernel of its own, as a user's notebook does."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parent.parent / "documentation" / "tutorial.ipynb"


def test_tutorial_has_no_errors_and_no_paths_of_the_machine_that_ran_it():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    text = NOTEBOOK.read_text()
    assert "/tmp/" not in text
    assert "/root/" not in text
    kinds = {output["output_type"] for cell in notebook.cells for output in cell.get("outputs", [])}
    assert "error" not in kinds
    assert "stream" in kinds, "the tutorial is kept with its outputs"


@pytest.mark.nightly
def test_tutorial_runs_in_its_short_form(tmp_path, monkeypatch):
    for name in ("raw", "preprocessed", "results"):
        monkeypatch.delenv(f"nnUNet_{name}", raising=False)
    monkeypatch.setenv("NNSSL_TUTORIAL", "short")
    monkeypatch.setenv("PYTHONPATH", str(NOTEBOOK.parent.parent))  # the kernel starts in the working folder
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    NotebookClient(notebook, timeout=None, resources={"metadata": {"path": str(tmp_path)}}).execute()
    results = tmp_path / "nnssl_workspace" / "results" / "Dataset004_MyTask"
    assert (results / "nnssl_benchmark_study" / "report.html").exists()
    assert (tmp_path / "weights_for_nnunet.pth").exists()
