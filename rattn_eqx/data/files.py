"""Files and folders that are on the disk whole or not at all, whenever the process or the machine stops."""

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def sync(file: Any) -> None:
    """Wait until what was written to an open file is on the disk."""
    file.flush()
    os.fsync(file.fileno())


def rename(unfinished: Path, path: Path) -> None:
    """Give a file or folder whose content is on the disk its name, in place of a file that had it."""
    os.replace(unfinished, path)
    _sync_path(path.parent)


def write_text(path: Path, text: str) -> None:
    """Write a small file whole or not at all."""
    unfinished = path.with_name(path.name + ".tmp")
    with open(unfinished, "w", encoding="utf-8") as file:
        file.write(text)
        sync(file)  # else a loss of power could leave the new name with no content
    rename(unfinished, path)


def write_json(path: Path, value: Any) -> None:
    """`write_text` of a value as indented JSON."""
    write_text(path, json.dumps(value, indent=2) + "\n")


@contextlib.contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """Yield an empty folder that becomes `target` when the block ends well, and vanishes when it does not.

    A reader sees the whole of `target` or nothing. If another process has made `target` meanwhile, its work stands.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=".unfinished-", dir=target.parent))
    try:
        yield unfinished
        for path in unfinished.rglob("*"):
            _sync_path(path)
        _sync_path(unfinished)
        unfinished.chmod(0o755)  # mkdtemp makes it private; a shared cache is for others too
        try:
            rename(unfinished, target)
        except OSError:
            if not target.is_dir():
                raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _sync_path(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
