"""What the documentation shows does run."""

import doctest
import importlib.util
import pkgutil
import re
from pathlib import Path

import pytest

import pallas
import rattn_eqx

MODULES = [
    name
    for package in (pallas, rattn_eqx)
    for name in [package.__name__, *(x.name for x in pkgutil.walk_packages(package.__path__, package.__name__ + "."))]
    if (spec := importlib.util.find_spec(name)) and spec.origin and ">>>" in Path(spec.origin).read_text()
]


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings(name):
    failed, attempted = doctest.testmod(importlib.import_module(name))
    assert attempted
    assert not failed


def test_the_example_in_the_readme():
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    (example,) = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    shown: dict = {}
    exec(example, shown)
    assert shown["out"].shape == (2, 500, 128)


def test_the_readme_is_read_in_a_minute():
    assert len((Path(__file__).parents[1] / "README.md").read_text().split()) <= 900
