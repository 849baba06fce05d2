"""The tutorials as they are stored: run through, in order, without noise, and none that CI would skip."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest

FOLDER = Path(__file__).parents[1] / "tutorials"
PATHS = sorted(FOLDER.glob("*.ipynb"))
EXPECTED = {
    "batch_features", "erythropoiesis", "figures", "geneformer_multidgd", "is_it_real", "multiome", "naming_with_go", "quickstart",
    "scvi", "settings", "simulation",
}  # fmt: skip
LARGEST = 1_000_000
"""Bytes: whoever clones the repository gets every version of each."""
SKIPPED = {"skip-execution", "raises-exception"}


def read(path: Path) -> nbformat.NotebookNode:
    return nbformat.read(path, as_version=4)


def code(path: Path) -> list[nbformat.NotebookNode]:
    return [cell for cell in read(path).cells if cell.cell_type == "code"]


pytestmark = pytest.mark.skipif(
    not FOLDER.exists(), reason="the tutorials are in the repository, not in the source package"
)


def test_all_are_there():
    assert {path.stem for path in PATHS} == EXPECTED


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_was_run_from_a_clean_kernel_to_the_end(path):
    cells = code(path)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert path.stat().st_size < LARGEST


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_no_cell_is_left_out_by_ci(path):
    assert [tag for cell in code(path) for tag in cell.metadata.get("tags", []) if tag in SKIPPED] == []


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_no_warning_and_no_error_is_shown(path):
    outputs = [output for cell in code(path) for output in cell.outputs]
    assert [output for output in outputs if output.output_type == "error"] == []
    said = [output.text for output in outputs if output.output_type == "stream" and output.name == "stderr"]
    assert said == []


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_one_figure_is_the_thumbnail(path):
    tagged = [cell for cell in code(path) if "thumbnail" in cell.metadata.get("tags", [])]
    assert len(tagged) == 1
    assert any("image/png" in output.get("data", {}) for output in tagged[0].outputs)
