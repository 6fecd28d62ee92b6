"""The command line: a module for each command of `rattn`, named as it is, with its arguments and what it does.

Nothing slow is imported before a command runs: help is quick.
"""

import argparse
import linecache
import os
import sys
import traceback

from rattn_eqx import interrupt
from rattn_eqx.commands import ablate, cache, convert, cost, evaluate, generate, import_, pretrain
from rattn_eqx.console import close_output, open_streams, say


def run(given: list[str]) -> int:
    """Run one command, as `__main__.main`, which heeds Ctrl-C."""
    open_streams()
    try:
        options = _parser().parse_args(given)
        options.run(options)
        sys.stdout.flush()
    except BrokenPipeError:
        return 141  # as of a process that SIGPIPE ends
    except MemoryError as error:
        return _out_of_memory(error)
    except Exception as error:
        if interrupt.caused(error):
            raise KeyboardInterrupt from error
        if isinstance(error, RuntimeError) and str(error).startswith("RESOURCE_EXHAUSTED"):  # as XLA says it
            return _out_of_memory(error)
        if not _is_refusal(error):
            raise
        say(str(error))
        return 2
    finally:
        close_output()
    return 0


def _is_refusal(error: Exception) -> bool:
    """Whether the system refused something, or a `raise` of ours: anything else is a bug, and shows its traceback."""
    if isinstance(error, OSError | ImportError):
        return True
    if not isinstance(error, ValueError | NotImplementedError | FloatingPointError):
        return False
    *_, (frame, line) = traceback.walk_tb(error.__traceback__)
    file = frame.f_code.co_filename
    statement = linecache.getline(file, line).strip()  # none where there are no sources
    root = os.path.dirname(os.path.dirname(os.path.dirname(__file__)))
    packages = [os.path.join(root, name, "") for name in ("rattn_eqx", "pallas")]
    return not statement or (file.startswith(tuple(packages)) and statement.startswith("raise"))


def _out_of_memory(error: Exception) -> int:
    reason = str(error).partition("\n")[0]
    say(f"out of memory{f' ({reason})' if reason else ''}; give smaller sizes, such as fewer samples or sequences")
    return 2


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise ValueError(f"{message}; see {self.prog} --help")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="rattn", description="Train, sample and price RATTENTION language models.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in (pretrain, import_, convert, generate, evaluate, ablate, cost, cache):
        command.add(commands)
    return parser
