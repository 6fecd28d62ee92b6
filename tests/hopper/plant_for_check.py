"""Plants one bug after the other in a copy of the kernels, and has `python -m pallas check` find it: by hand.

    python tests/hopper/plant_for_check.py --minutes 6                 # interpreted, all of them
    python tests/hopper/plant_for_check.py mask state group --minutes 1      # on a Hopper GPU, three

Ends with status 1 if a bug is not found.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "pallas"
BUGS = {  # name: file, what is right, what is wrong
    "mask": ("hopper/window_forward", "(distance < plan.window)", "(distance <= plan.window)"),
    "edge": ("hopper/residual_key_backward", "distance >= plan.window", "distance > plan.window"),
    "keep": ("hopper/state_sweep", "total = total * inputs.carry_keep[batch, index]", "pass"),
    "state": ("hopper/state_sweep", "else index + 1", "else index + 2"),
    "group": ("hopper/plan", "position=self.first + row", "position=self.first + tile * self.span"),  # odd ones
    "row sums": (
        "hopper/residual_forward",
        "return phi, phi.astype(jnp.float32).sum(axis=1)",
        "return phi, zero_rows(ROWS, 1.0)",
    ),
    "clip": (
        "hopper/warpgroup",
        "return _softmax(x) if row is softmax else row.value(x)",
        'return _softmax(x) if row is softmax else _exp(x) if row.name == "exp" else row.value(x)\n\n\n'
        "def _exp(x):\n    return jnp.exp(x)",
    ),
    "half block": (
        "hopper/plan",
        "last = some & (newest < (end - 1) * self.chunk + ROWS)",
        "last = some & (newest < (end - 1) * self.chunk + 2 * ROWS)",
    ),
    "delta": ("hopper/window_backward", "(d_weights - down(delta, ROWS))", "d_weights"),
    "start": ("hopper/plan", "segment_start > 0 if tile % 2 else", "segment_start >= 0 if tile % 2 else"),
    "gain": ("hopper/warpgroup", "sum_rows(d_out * y)", "sum_rows(d_out)"),
    "segment": (
        "hopper/residual_key_backward",
        "seen &= iota(*square, 0) + key >= down(start, ROWS)",
        "seen &= down(start, ROWS) >= 0",
    ),
}


def find(name: str, minutes: float, options: list[str]) -> bool:
    """Has check find one; prints what it found, and the least call that fails."""
    file, right, wrong = BUGS[name]
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(PACKAGE, Path(folder) / "pallas")
        changed = Path(folder) / "pallas" / f"{file}.py"
        source = changed.read_text()
        if right not in source:
            raise SystemExit(f"the line to change is gone: {right}")
        changed.write_text(source.replace(right, wrong))
        command = [sys.executable, "-m", "pallas", "check", "--implementation", "gpu", "--exitfirst"]
        command += ["--minutes", str(minutes), *options]
        paths = [folder, *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in paths if path)}
        began = time.time()
        done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder)
    lines = done.stdout.splitlines()
    failures = [line for line in lines if re.match(r"FAILED (?!hung|aborted|error)", line)]
    summary = next((line for line in reversed(lines) if re.match(r"\d+ calls", line)), done.stderr[-300:])
    print(f"{name}: {summary} ({time.time() - began:.0f} s)")
    smaller = next((i for i, line in enumerate(lines) if line.startswith("making ")), len(lines))
    for line in failures[:1] + lines[smaller + 1 : smaller + 4]:
        print(f"  {line[:200]}")
    return bool(failures)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="BUG", help=", ".join(BUGS))
    parser.add_argument("--minutes", default="6")
    arguments, options = parser.parse_known_args()
    missed = [name for name in arguments.names or BUGS if not find(name, float(arguments.minutes), options)]
    print(f"not found: {', '.join(missed)}" if missed else "every one was found")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
