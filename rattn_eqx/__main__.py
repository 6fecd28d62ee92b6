"""The program `rattn`: a command of `commands`, and what Ctrl-C does from the first moment on."""

import os
import sys

from rattn_eqx import interrupt


def main(arguments: list[str] | None = None) -> int:
    """Run one command. Returns the exit status; a mistake of the user's prints one line and gives 2.

    Ctrl-C prints how to go on and gives 130; a reader of the output that goes away ends it quietly with 141. Arguments
    that are not given are those of the process, which ends with the command.
    """
    given = sys.argv[1:] if arguments is None else arguments
    with interrupt.insistent(for_good=arguments is None):
        try:
            from rattn_eqx.commands import run

            return run(given)
        except KeyboardInterrupt:
            interrupt.arrived()
            import shlex

            from rattn_eqx.console import close_output, say

            resumes = given[:1] in (["pretrain"], ["ablate"], ["convert"])
            say(f"stopped, resume with: {shlex.join(['rattn', *given])}" if resumes else "stopped", start="\n")
            if arguments is None:  # at once: XLA crashes where the interpreter ends while it compiles
                close_output()
                os._exit(130)
            return 130


if __name__ == "__main__":
    sys.exit(main())
