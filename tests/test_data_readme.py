"""data/README.md tells the truth about what is committed beside it."""

import base64
import hashlib
import importlib.util
import json
import re
from pathlib import Path

import pytest

DATA = Path(__file__).parents[1] / "data"


@pytest.fixture(scope="module")
def make_sample():
    spec = importlib.util.spec_from_file_location("make_sample", DATA / "make_sample.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def documented_row(path: str) -> str:
    [row] = [line for line in (DATA / "README.md").read_text("utf-8").splitlines() if line.startswith(f"| `{path}`")]
    return row


def test_readme_gives_the_hashes_and_size_of_what_is_committed():
    sample = b"".join(path.read_bytes() for path in sorted((DATA / "sample").iterdir()))
    assert hashlib.sha256(sample).hexdigest() in documented_row("sample/*.txt")
    assert f"{len(sample):,} bytes" in documented_row("sample/*.txt")
    assert hashlib.sha256((DATA / "make_sample.py").read_bytes()).hexdigest() in documented_row("make_sample.py")


def test_generator_writes_the_committed_sample_again(make_sample):
    committed = {path.name: path.read_bytes() for path in (DATA / "sample").iterdir()}
    assert committed == {name: text.encode("ascii") for name, text in make_sample.sample_files().items()}
    assert sum(map(len, committed.values())) <= 400_000


def test_sample_is_python_whose_names_come_back_from_far_above(make_sample):
    for name, text in make_sample.sample_files().items():
        definitions: dict = {}
        exec(compile(text, name, "exec"), definitions)
        definitions["check"]()
        constants = re.findall(r"^([A-Z_]+) = (\d+)", text, re.MULTILINE)
        assert len(constants) == 6
        for constant, value in constants:
            assert text.rindex(f"assert {constant} == {value}") - text.index(constant) > 4000


def test_every_committed_file_has_a_row_with_its_hash():
    for path in sorted(DATA.rglob("*")):
        name = path.relative_to(DATA).as_posix()
        if path.is_file() and "__pycache__" not in name and name != "README.md" and not name.startswith("sample/"):
            assert hashlib.sha256(path.read_bytes()).hexdigest() in documented_row(name), name


@pytest.mark.parametrize(
    ("figure", "notebook"), [("without_global_layers", "06_ablations"), ("converted", "09_a_real_model")]
)
def test_a_figure_is_the_notebooks(figure, notebook):
    cells = json.loads((DATA.parent / "notebooks" / f"{notebook}.ipynb").read_text("utf-8"))["cells"]
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    pictures = [base64.b64decode(x["data"]["image/png"]) for x in outputs if "image/png" in x.get("data", {})]
    assert (DATA / f"{figure}.png").read_bytes() in pictures
