"""The wheel holds both packages, and is enough: nothing here runs on the repository's own files."""

import importlib.util
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
PACKAGES = ("rattn_eqx", "pallas")

IMPORT_EVERYTHING = """
import importlib, json, pkgutil, time
started = time.process_time()
import rattn_eqx
seconds = time.process_time() - started
import pallas
found = {"seconds": seconds, "files": [], "modules": []}
for package in (rattn_eqx, pallas):
    found["files"].append(package.__file__)
    for module in pkgutil.iter_modules(package.__path__, package.__name__ + "."):
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
def installed(wheel, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("installed")
    options = ["--no-deps", "--no-index", "--disable-pip-version-check", "--target", folder]
    check_output(sys.executable, "-m", "pip", "install", *options, wheel)
    return folder


def run_installed(installed, *arguments) -> str:
    """A fresh interpreter that finds the wheel before anything else, and neither its script's folder nor its cwd."""
    environment = os.environ | {"PYTHONPATH": str(installed)}
    return check_output(sys.executable, "-P", *arguments, env=environment, cwd=installed.parent)


def test_it_holds_both_packages_and_nothing_else(wheel):
    names = [name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name]
    sources = [path.relative_to(ROOT).as_posix() for package in PACKAGES for path in (ROOT / package).rglob("*.py")]
    assert sorted(name for name in names if name.endswith(".py")) == sorted(sources)
    assert {name.split("/")[0] for name in names} == set(PACKAGES)


def test_it_imports_quickly_and_touches_no_device(installed):
    found = json.loads(run_installed(installed, "-c", IMPORT_EVERYTHING))
    outside = [file for file in found["files"] if not Path(file).is_relative_to(installed)]
    assert not outside
    assert len(found["files"]) > 20
    assert found["seconds"] < 3, "CPU seconds of `import rattn_eqx`"
    assert not found["device"]


def test_a_foreign_model_trains_on_it(installed):
    script = "import sys, runpy, pallas; print(pallas.__file__); runpy.run_path(sys.argv[1])"
    output = run_installed(installed, "-c", script, ROOT / "tests" / "foreign_model.py")
    assert Path(output.splitlines()[0]).is_relative_to(installed)
