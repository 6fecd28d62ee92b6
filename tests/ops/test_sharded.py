"""The ops over a sequence that is cut over devices, in a process with eight simulated ones."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from sharded_child import BUGS, CASES

QUICK = ["window over several pieces", "no window, ids on the borders"]


def differences(*names):
    child = Path(__file__).with_name("sharded_child.py")
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, child, *names], capture_output=True, text=True, env=environment, timeout=900)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    "names", [QUICK, pytest.param([x for x in CASES if x not in QUICK], marks=[pytest.mark.slow, pytest.mark.long])]
)
def test_pieces_give_the_whole_in_values_and_gradients(names):
    for name, errors in differences(*names).items():
        assert errors["out"] < 1e-6, name
        assert all(error < 1e-5 for error in errors.values()), (name, errors)


@pytest.mark.slow
@pytest.mark.long
def test_planted_bugs_are_seen():
    for bug, errors in differences(*BUGS).items():
        assert max(errors.values()) > 1e-3, bug
