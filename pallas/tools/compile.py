"""`python -m pallas compile`: compile our kernels for devices that are not here, and print what the compiler says.

compile_gpu.py compiles for GPUs and compile_tpu.py for TPUs; programs.py says what a program is.
"""

import argparse
import os
from pathlib import Path

from pallas.tools import compile_gpu, compile_tpu


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m pallas compile",
        description="Compile our kernels for a device that is not here. Ends with status 1 if one does not compile or "
        "spills too much, or if the longest case takes too much memory.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--target", nargs="+", default=["h100"], help="devices: h100, or any of v5e, v5p, v6e, tpu7x")
    add("--only", default="", help="cases whose title holds one of these words, comma-separated: relu,alone")
    add("--quick", action="store_true", help="TPUs: the cases of 3b, 8 x 4096, window 512 alone")
    add("--most-spilled", type=int, default=compile_gpu.MOST_SPILLED, help="bytes that a kernel may spill")
    add("--jobs", type=int, default=min(os.cpu_count() or 1, 8), help="cases compiled at the same time")
    add("--out", type=Path, help="file that one JSON object a case is added to")
    add("--commit", help="saved with the numbers; default: what git says")
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> int:
    """Compile the cases and print the table; returns the exit status."""
    options = parse(arguments)
    family = compile_tpu if any(target in compile_tpu.TOPOLOGIES for target in options.target) else compile_gpu
    return family.run(options)
