"""A Python file of the user's, run for what it defines. What it raises is told as an error of its own line."""

import os
import sys
import traceback
import types
from pathlib import Path
from typing import Any

from rattn_eqx.data import files

_running: set[str] = set()  # files whose program is running now


def read_source(op: str, path: Path, limit: int = files.SMALL) -> str:
    """The text of a regular file of at most `limit` bytes.

    Raises:
      ValueError: no such file, a folder, a pipe, a file that is too large or not UTF-8, and one whose program asks.
      OSError: as `open`.
    """
    if os.path.realpath(path) in _running:
        raise ValueError(f"{op}: {path} reads itself; put what it reads into a file of its own")
    try:
        return files.read_bytes(path, limit).decode("utf-8")
    except FileNotFoundError as error:
        raise ValueError(f"{op}: there is no file {path}; give the path of a Python file") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{op}: {path} must be UTF-8 text; {error}; save it so") from error
    except files.DamagedError as error:
        reason = str(error).rpartition(";")[0]
        raise ValueError(f"{op}: {reason}; give a Python file") from error


def run_source(op: str, path: Path, source: str, module_name: str) -> dict[str, Any]:
    """What the source defines. It stays in `sys.modules` as the module of that name, which its classes need.

    Raises:
      ValueError: for whatever it raises, SystemExit among it; names the line.
    """
    module = sys.modules[module_name] = types.ModuleType(module_name)
    module.__file__, place = str(path), os.path.realpath(path)
    _running.add(place)
    try:
        exec(compile(source.encode("utf-8"), module.__file__, "exec"), module.__dict__)
    except (Exception, SystemExit) as error:  # the user's program: whatever it raises is of the user's line
        del sys.modules[module_name]
        raise ValueError(f"{op}: {path} raised {told(error, path)}; mend it") from error
    except BaseException:
        del sys.modules[module_name]
        raise
    finally:
        _running.discard(place)
    return module.__dict__


def told(error: BaseException, path: Path) -> str:
    """An error's kind, the first line of its message, and the line of the user's file that it comes from."""
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename == str(path)]
    line = error.lineno if isinstance(error, SyntaxError) and not lines else lines[-1] if lines else None
    message = str(error).partition("\n")[0]
    return f"{type(error).__name__}: {message} ({f'line {line}' if line else 'reading it'})"
