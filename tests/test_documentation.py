"""What the documentation shows does run."""

import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import pytest

import pallas
import rattn_eqx

MODULES = [
    module.name
    for package in (pallas, rattn_eqx)
    for module in pkgutil.iter_modules(package.__path__, package.__name__ + ".")
    if ">>>" in Path(package.__path__[0], module.name.split(".")[1] + ".py").read_text()
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
    assert shown["out"].shape == shown["local"].shape == shown["far"].shape == (1000, 8, 64)
    assert shown["batch"](*(x[None] for x in (shown["q"], shown["k"], shown["v"]))).shape == (1, 1000, 8, 64)
