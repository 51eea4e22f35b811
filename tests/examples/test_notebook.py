"""examples/quickstart.ipynb runs from top to bottom, with fewer steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

FOLDER = Path(__file__).parents[2] / "examples"


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.model
def test_the_notebook_runs(tmp_path: Path, smollm2_dir: Path) -> None:
    read: Any = nbformat.read  # theirs has no types
    notebook = read(FOLDER / "quickstart.ipynb", as_version=4)
    settings = next(cell for cell in notebook.cells if cell.source.startswith("STEPS"))
    settings.source = f"STEPS, OUTPUT = 2, {str(tmp_path / 'run')!r}"
    client = NotebookClient(
        notebook, timeout=800, kernel_name="python3", resources={"metadata": {"path": str(FOLDER)}}
    )
    client.execute()
    shown = [
        output.data
        for cell in notebook.cells
        for output in cell.get("outputs", ())
        if "data" in output
    ]
    assert any("RunMetrics(" in data.get("text/plain", "") for data in shown)
    assert any("<table>" in data.get("text/html", "") for data in shown)
    assert "<iframe" in shown[-1]["text/html"]  # the report, inline
