"""Standard streams of a command: any text can be printed, and a stream that fails is given up quietly."""

import contextlib
import os
import sys


def open_streams() -> None:
    """Standard streams that replace what they cannot show; to nowhere where the process has none."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 (as long as the process)
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def close_output() -> None:
    """Write out what is left; where that fails, give up what would fail again when the interpreter ends."""
    try:
        sys.stdout.flush()
    except OSError:
        with contextlib.suppress(OSError), open(os.devnull, "w", encoding="utf-8") as nowhere:
            os.dup2(nowhere.fileno(), sys.stdout.fileno())


def say(message: str, start: str = "") -> None:
    """One line on the standard error."""
    with contextlib.suppress(OSError):
        print(f"{start}rattn: {' '.join(message.splitlines())}", file=sys.stderr, flush=True)
