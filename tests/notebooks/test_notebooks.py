"""Notebooks run with the code of their folded answers, each pasted where a reader would paste it: below its cell."""

import re
from pathlib import Path

import nbformat
import pytest
from conftest import AS_USERS
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
DOCUMENTS = [*NOTEBOOKS, *ROOT.glob("*.md"), ROOT / "data" / "README.md"]


def answers(markdown: str) -> list[str]:
    """The Python code of each folded answer."""
    folded = re.findall(r"<details>.*?</details>", markdown, re.DOTALL)
    return [code for text in folded for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL)]


def execute(notebook, folder: Path) -> None:
    """With its answers; the cell that fails is named by its code."""
    cells = []
    for cell in notebook.cells:
        cells.append(cell)
        if cell.cell_type == "markdown":
            cells += [new_code_cell(f"# a folded answer\n{code}") for code in answers(cell.source)]
    notebook.cells = cells
    resources = {"metadata": {"path": str(folder)}}
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources=resources).execute()


@pytest.fixture
def fast(monkeypatch):
    for name, value in {"RATTN_NOTEBOOK_FAST": "1", **AS_USERS}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("PJRT_NPROC")


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
@pytest.mark.usefixtures("fast")
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs_with_its_answers(path):
    execute(nbformat.read(path, 4), path.parent)


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_a_wrong_answer_is_seen(tmp_path):
    answer = "<details><summary>Answer</summary>\n\n```python\nassert x == 2\n```\n\n</details>"
    execute(new_notebook(cells=[new_code_cell("x = 2"), new_markdown_cell(answer)]), tmp_path)
    with pytest.raises(CellExecutionError, match="folded answer"):
        execute(new_notebook(cells=[new_code_cell("x = 3"), new_markdown_cell(answer)]), tmp_path)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_committed_whole_and_clean(path):
    notebook = nbformat.read(path, 4)
    assert set(notebook.metadata) <= {"kernelspec", "language_info"}
    for cell in notebook.cells:
        assert not cell.metadata, f"{cell.id}: metadata of a run"
        if cell.cell_type == "code":
            assert cell.source.count("\n") < 25, f"{cell.id}: longer than 25 lines"
            assert cell.execution_count, f"{cell.id}: not executed"
            assert all(output.get("name") != "stderr" and output.output_type != "error" for output in cell.outputs)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(path):
    text = path.read_text("utf-8")
    if path.suffix == ".ipynb":
        text = "\n".join(cell.source for cell in nbformat.reads(text, 4).cells if cell.cell_type == "markdown")
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if not link.startswith(("http", "#")):
            assert (path.parent / link.partition("#")[0]).exists(), link
