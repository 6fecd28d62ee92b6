"""The command line of the kernels: `python -m pallas check`, `bench`, `compile`."""

import importlib
import sys

COMMANDS = {  # each is the function `main(arguments)` of the module of that name in `pallas.tools`
    "check": "hold random calls to the definition on this machine: the first thing to run on a new one",
    "bench": "time our ops and their peers on this machine's device",
    "compile": "compile our kernels for devices that are not here",
}


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    name, *options = (sys.argv[1:] if arguments is None else arguments) or [""]
    if name in COMMANDS:
        return importlib.import_module(f"pallas.tools.{name}").main(options)
    print("usage: python -m pallas COMMAND ...\n")
    print("\n".join(f"  {command:8} {what}" for command, what in COMMANDS.items()))
    print("\n`python -m pallas COMMAND --help` lists its options")
    return 0 if name in ("-h", "--help") else 2


if __name__ == "__main__":
    sys.exit(main())
