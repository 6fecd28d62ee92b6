"""The wheel holds both packages, and is enough: nothing here runs on the repository's own files."""

import importlib.util
import json
import os
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
PACKAGES = ("rattn_eqx", "pallas")

IMPORT_EVERYTHING = """
import importlib, json, pkgutil, time
started = time.perf_counter()
import rattn_eqx
seconds = time.perf_counter() - started
import pallas
found = {"seconds": seconds, "files": [], "modules": []}
for package in (rattn_eqx, pallas):
    found["files"].append(package.__file__)
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        if not module.name.endswith("__main__"):
            found["files"].append(importlib.import_module(module.name).__file__)
from jax._src import xla_bridge  # JAX has no public name for this question
found["device"] = xla_bridge.backends_are_initialized()
print(json.dumps(found))
"""


def check_output(*command, **options) -> str:
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built without a network where hatchling is installed; else in an isolated environment, which downloads it."""
    folder = tmp_path_factory.mktemp("wheel")
    isolation = ["--no-isolation"] if importlib.util.find_spec("hatchling") else []
    check_output(sys.executable, "-m", "build", "--wheel", *isolation, "--outdir", folder, ROOT)
    [wheel] = folder.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def python(wheel, tmp_path_factory) -> Path:
    """The interpreter of a new environment that holds the wheel and what the wheel asks for, from the registry."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=True)
    python = folder / ("Scripts" if os.name == "nt" else "bin") / "python"
    check_output(python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", wheel)
    return python


def run_installed(python, folder, *arguments) -> str:
    """In an empty folder, with none of this environment's paths."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    return check_output(python, "-P", *arguments, env=environment, cwd=folder)


def test_it_holds_both_packages_and_nothing_else(wheel):
    names = [name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name]
    sources = [path.relative_to(ROOT).as_posix() for package in PACKAGES for path in (ROOT / package).rglob("*.py")]
    assert sorted(name for name in names if name.endswith(".py")) == sorted(sources)
    assert {name.split("/")[0] for name in names} == set(PACKAGES)


def test_it_imports_quickly_and_touches_no_device(python, tmp_path):
    run_installed(python, tmp_path, "-c", "import rattn_eqx")  # compiles the bytecode, once
    found = json.loads(run_installed(python, tmp_path, "-c", IMPORT_EVERYTHING))
    outside = [file for file in found["files"] if not Path(file).is_relative_to(python.parents[1])]
    assert not outside
    sources = [file for package in PACKAGES for file in (ROOT / package).rglob("*.py") if file.name != "__main__.py"]
    assert len(set(found["files"])) == len(sources)
    assert found["seconds"] < 3, "`import rattn_eqx`"
    assert not found["device"]


def test_a_foreign_model_trains_on_it(python, tmp_path):
    script = "import sys, runpy, pallas; print(pallas.__file__); runpy.run_path(sys.argv[1])"
    output = run_installed(python, tmp_path, "-c", script, ROOT / "tests" / "model" / "foreign_model.py")
    assert Path(output.splitlines()[0]).is_relative_to(python.parents[1])


def test_the_command_is_installed(python, tmp_path):
    assert "usage: rattn" in check_output(python.parent / "rattn", "--help", cwd=tmp_path)
