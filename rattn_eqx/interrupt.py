"""Ctrl-C that is not lost: a destructor or a callback may swallow a KeyboardInterrupt, so it comes again."""

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType

AGAIN = 0.05  # seconds from one KeyboardInterrupt to the next, until one arrives
SOON = 0.02  # seconds to the next of one that a callback swallowed, and from one look at an import that must end first
PATIENCE = 500  # such looks: an extension module whose import is cut short may crash
_tries = 0


@contextlib.contextmanager
def insistent(*, for_good: bool = False) -> Iterator[None]:
    """Within the block Ctrl-C raises KeyboardInterrupt again and again, until `arrived` is called or the block ends.

    None is raised during an import, and no other while one is being handled, by a `finally` on its way out. A process
    in which Ctrl-C is ignored, as in the background of a script, goes on ignoring it. On Windows, which has no such
    timer, it is raised once.

    Args:
      for_good: whether Ctrl-C is ignored from the block's end on, where nothing is left to stop.
    """
    global _tries
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or before in (None, signal.SIG_IGN):
        yield
        return
    hook, timers = sys.unraisablehook, hasattr(signal, "setitimer")
    alarm = signal.signal(signal.SIGALRM, _raise) if timers else None

    def swallowed(said) -> None:
        if not caused(said.exc_value):
            hook(said)
        elif timers and signal.getsignal(signal.SIGINT) is _raise:
            signal.setitimer(signal.ITIMER_REAL, SOON)

    sys.unraisablehook = swallowed
    _tries = 0
    signal.signal(signal.SIGINT, _raise)
    try:
        yield
    finally:
        arrived()
        sys.unraisablehook = hook
        if timers:
            signal.signal(signal.SIGALRM, alarm)
        if not for_good:
            signal.signal(signal.SIGINT, before)


def arrived() -> None:
    """The command has stopped: from here on Ctrl-C is ignored."""
    if signal.getsignal(signal.SIGINT) is _raise:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        if hasattr(signal, "setitimer"):
            signal.setitimer(signal.ITIMER_REAL, 0)


def caused(error: BaseException | None) -> bool:
    """Whether an error is a KeyboardInterrupt, or was raised while one was handled."""
    seen = set()
    while error is not None and id(error) not in seen:
        if isinstance(error, KeyboardInterrupt):
            return True
        seen.add(id(error))
        error = error.__cause__ or error.__context__
    return False


def _raise(number: int, frame: FrameType | None) -> None:
    global _tries
    _tries += 1
    if hasattr(signal, "setitimer"):
        wait = _tries < PATIENCE and _importing(frame)
        signal.setitimer(signal.ITIMER_REAL, SOON if wait else AGAIN)
        if wait:
            return
    if not caused(sys.exc_info()[1]):
        raise KeyboardInterrupt


def _importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
            return True
        frame = frame.f_back
    return False
