"""Every notebook runs from top to bottom, with few training steps of a small network."""

import os
from pathlib import Path

import nbclient
import nbformat
import pytest
import tiny_pipelines

COLABS = Path(__file__).parent.parent / "colabs"


@pytest.mark.parametrize("path", sorted(COLABS.glob("*.ipynb")), ids=lambda path: path.stem)
def test_notebook_runs(path, tmp_path):
    notebook = nbformat.read(path, as_version=4)
    parameters = [c for c in notebook.cells if "parameters" in c.metadata.get("tags", ())]
    assert len(parameters) == 1, "one cell is tagged 'parameters'"
    parameters[0].source += "\nsteps = 20\nwidths = (8, 16)\n"
    if path.stem == "stable_diffusion":
        tiny_pipelines.whole(folder=tmp_path)
        parameters[0].source += f"steps = 4\nmodel = {str(tmp_path)!r}\n"
    client = nbclient.NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": COLABS}}
    )
    flags = os.environ["XLA_FLAGS"].replace("device_count=4", "device_count=1")
    client.execute(env=os.environ | {"XLA_FLAGS": flags})
    pictures = [
        output
        for cell in notebook.cells
        for output in cell.get("outputs", ())
        if "image/png" in output.get("data", {})
    ]
    assert len(pictures) >= 5
