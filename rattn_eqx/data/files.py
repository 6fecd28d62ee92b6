"""Files and folders that are on the disk whole or not at all, read only where they are what they should be.

What is written appears under its name when it is complete and on the disk, whenever the process or the machine stops.
What is read must be a regular file no larger than its reader allows: a FIFO or a device would hang it, and a sparse
file would fill the memory. Where we write or delete, links are not followed. A lock is the system's own (`flock`),
which a killed process cannot leave behind.
"""

import contextlib
import errno
import hashlib
import json
import os
import secrets
import shutil
import stat
import time
from collections.abc import Iterator
from io import BufferedReader
from pathlib import Path
from typing import Any, BinaryIO

try:
    import fcntl
except ImportError:  # Windows: one process at a time is the user's to see to
    fcntl = None

UNFINISHED = ".unfinished-"  # begins the name of what is being written; a killed process leaves it to the next
SMALL = 2**20  # bytes of a configuration or a manifest, at most; JSON may take thirty times its length in memory
LOCK = ".lock"  # hidden, so that a corpus of the folder above does not read it
DEAD = 24 * 3600  # seconds after which unfinished work is a dead process's, where the file system has no locks


class DamagedError(ValueError):
    """A file is not what was written: its content, its size or its kind."""


class LockedError(OSError):
    """Another process holds a lock."""


def sync(file: Any) -> None:
    """Wait until what was written to an open file is on the disk."""
    file.flush()
    os.fsync(file.fileno())


def rename(unfinished: Path, path: Path) -> None:
    """Give a file or folder whose content is on the disk its name, in place of a file or link that had it."""
    os.replace(unfinished, path)
    _sync_path(path.parent)


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    """An error of a full disk, which names no file, comes out with one and a remedy."""
    try:
        yield
    except OSError as error:
        if error.filename is not None or error.errno is None:
            raise
        message = f"{path} could not be written: {error.strerror}; free some space or give another folder, then go on"
        raise OSError(error.errno, message) from error


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[BinaryIO]:
    """Yield an empty file that becomes `path` when the block ends well, and vanishes when it does not.

    Its permissions are those that the caller's umask gives. A link at `path` is replaced, not followed.
    """
    unfinished = unfinished_in(path.parent)
    try:
        with _named(path), unfinished.open("xb") as file:
            yield file
            sync(file)  # else a loss of power could leave the new name with no content
        rename(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def unfinished_in(folder: Path) -> Path:
    """A path for what is being written, which nobody can foresee."""
    return folder / f"{UNFINISHED}{secrets.token_hex(8)}"


def write_text(path: Path, text: str) -> None:
    """Write a small UTF-8 file whole or not at all."""
    with new_file(path) as file:
        file.write(text.encode("utf-8"))


def write_json(path: Path, value: Any) -> None:
    """`write_text` of a value as indented JSON.

    Raises:
      ValueError: for a number that JSON lacks: NaN, an infinity.
    """
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


@contextlib.contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """Yield an empty folder that becomes `target` when the block ends well, and vanishes when it does not.

    A reader sees the whole of `target` or nothing. If another process has made `target` meanwhile, its work stands.
    Permissions are those that the caller's umask gives. What killed processes left beside it is removed first.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    remove_unfinished(target.parent)
    with contextlib.ExitStack() as stack, _named(target):
        unfinished = _held_folder(target.parent, stack)
        yield unfinished
        for path in unfinished.rglob("*"):
            _sync_path(path)
        _sync_path(unfinished)
        try:
            rename(unfinished, target)
        except OSError:
            if not target.is_dir():
                raise


def remove_unfinished(folder: Path) -> None:
    """Remove what killed processes began to write in a folder, and leave what a process is writing now.

    Files are removed whether or not they are being written: only the holder of the folder's lock may ask for them. What
    belongs to somebody else stays.
    """
    for path in list(folder.glob(f"{UNFINISHED}*")):
        with contextlib.suppress(LockedError, FileNotFoundError, PermissionError):
            if path.is_symlink() or not path.is_dir():
                path.unlink()
                continue
            with contextlib.ExitStack() as stack:
                if _hold(path, stack) or time.time() - path.stat().st_mtime > DEAD:
                    shutil.rmtree(path, ignore_errors=True)


def open_regular(path: Path, limit: int | None = None) -> BufferedReader:
    """Open a regular file, or a link to one, for reading.

    Raises:
      FileNotFoundError, PermissionError and other OSError: as `open`.
      DamagedError: for what is no regular file, such as a FIFO, or has more than `limit` bytes.
    """
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)  # opening a FIFO waits for ever
    if os.path.isdir(path):
        raise DamagedError(f"{path} must be a regular file; it is a folder; give another path")
    try:
        descriptor = os.open(path, flags)
    except OSError as error:
        if error.errno in (errno.ENXIO, errno.ELOOP):  # a socket, a circle of links
            raise DamagedError(f"{path} must be a regular file; {error.strerror}; give another path") from error
        raise
    file = os.fdopen(descriptor, "rb")
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        file.close()
        raise DamagedError(f"{path} must be a regular file; it is a pipe or a device; give another path")
    if limit is not None and status.st_size > limit:
        file.close()
        raise DamagedError(f"{path} must have at most {limit:,} bytes; it has {status.st_size:,}; put back a good copy")
    return file


def open_append(path: Path) -> BinaryIO:
    """Open a regular file, made if it is missing, to write at its end; links are not followed.

    Raises:
      OSError: as `open`. DamagedError: for a link, and for what is no regular file.
    """
    return os.fdopen(_open_own(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, str(path)), "ab")


def read_bytes(path: Path, limit: int = SMALL) -> bytes:
    """The content of a regular file of at most `limit` bytes; raises as `open_regular`."""
    with open_regular(path, limit) as file:
        return file.read(limit)


def read_text(path: Path, limit: int = SMALL) -> str:
    """The content of a regular UTF-8 file; raises as `open_regular`, and a DamagedError for other bytes."""
    try:
        return read_bytes(path, limit).decode("utf-8")
    except UnicodeDecodeError as error:
        raise DamagedError(f"{path} must be UTF-8 text; {error}; put back a good copy") from error


def read_json(path: Path, limit: int = SMALL) -> Any:
    """The value that a regular file holds as JSON; raises as `read_text`, and a DamagedError for other text."""
    return parse_json(read_text(path, limit), str(path))


def parse_json(text: str, where: str) -> Any:
    """The value of JSON text, NaN and infinities refused.

    Raises:
      DamagedError: for anything else; `where` says what the text is of.
    """

    def refuse(constant: str) -> Any:
        raise ValueError(f"{constant} is no number of JSON")

    try:
        return json.loads(text, parse_constant=refuse)
    except (ValueError, RecursionError) as error:  # lists in lists by the thousand
        raise DamagedError(f"{where} must be JSON; {error}; put back a good copy") from error


def sha256(path: Path) -> str:
    """Of the content of a regular file, in hexadecimal; raises as `open_regular`."""
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def lock(folder: Path, what: str, *, shared: bool = False) -> Iterator[None]:
    """Hold a folder's lock, made with its file `.lock` if missing, while the block runs.

    Any number of processes may hold it `shared`, or one alone, which may ask for it again, in any of its threads. The
    lock ends with the process that holds it, however that ends. A folder that the block leaves with nothing but the
    lock is removed if it was not there before. Where the file system has no locks, and where a folder may be read but
    not written (`shared`), nobody is kept out.

    Args:
      what: begins the message, such as "train: runs/tiny".

    Raises:
      LockedError: another process holds it; with the process id if that holds it alone.
      DamagedError: no folder, or another thing than a file in the lock's place.
      OSError: the folder cannot be made or written.
    """
    key = os.path.realpath(folder)
    if key in _alone:
        yield
        return
    made = not folder.exists()
    path = folder / LOCK
    with contextlib.ExitStack() as stack:
        while True:  # until the locked file is the one of this name: another process may have removed the folder
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except (FileExistsError, NotADirectoryError) as error:
                raise DamagedError(f"{what}: {folder} must be a folder; it is not; give another path") from error
            descriptor = _open_lock(path, what, shared)
            if descriptor is None:
                yield
                return
            stack.callback(os.close, descriptor)
            try:
                _flock(descriptor, shared)
            except LockedError as error:
                holder = os.read(descriptor, 32).decode("ascii", "replace").strip()
                who = f"process {holder} holds" if holder else "other processes hold"
                message = f"{what}: {who} it; wait for that process or stop it, or use another folder"
                raise LockedError(error.errno, message, str(folder)) from None
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.stat(path), os.fstat(descriptor)):
                    break
        if made:
            stack.callback(_remove_if_empty, folder, descriptor)
        if not shared:
            os.ftruncate(descriptor, 0)
            os.write(descriptor, f"{os.getpid()}\n".encode())
            stack.callback(os.ftruncate, descriptor, 0)
            _alone.add(key)
            stack.callback(_alone.discard, key)
        yield


_alone: set[str] = set()  # folders whose lock this process holds, not shared


def _open_lock(path: Path, what: str, shared: bool) -> int | None:
    """Open a lock's file; None where only readers may come, and there is none."""
    try:
        return _open_own(path, os.O_RDWR | os.O_CREAT, f"{what}: {path}")
    except OSError as error:
        if not shared or error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise
    try:
        return _open_own(path, os.O_RDONLY, f"{what}: {path}")
    except (FileNotFoundError, PermissionError):
        return None


def _open_own(path: Path, flags: int, what: str) -> int:
    """Open a file of ours to write: a regular one, and no link."""
    flags |= getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    remedy = "must be a regular file and no link; give another path"
    try:
        descriptor = os.open(path, flags, 0o666)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
            raise DamagedError(f"{what} {remedy}") from error
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise DamagedError(f"{what} {remedy}")
    return descriptor


def _remove_if_empty(folder: Path, descriptor: int) -> None:
    """Remove a folder with nothing but its lock, if nobody else holds that."""
    with contextlib.suppress(OSError):
        _flock(descriptor, shared=False)
        if [entry.name for entry in os.scandir(folder)] == [LOCK]:
            (folder / LOCK).unlink()
            folder.rmdir()


def _held_folder(parent: Path, stack: contextlib.ExitStack) -> Path:
    """A new folder for unfinished work, locked so that no other process takes it for a dead one's."""
    while True:
        folder = unfinished_in(parent)
        folder.mkdir()
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        with contextlib.suppress(LockedError, FileNotFoundError):  # one that removes what is left behind was quicker
            _hold(folder, stack)
            if folder.exists():
                return folder


def _hold(folder: Path, stack: contextlib.ExitStack) -> bool:
    """Hold a lock on a folder itself until the stack ends; a LockedError where another process does.

    Returns whether it is held: not where there are no locks.
    """
    if fcntl is None:
        return False
    descriptor = os.open(folder, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0))
    stack.callback(os.close, descriptor)
    return _flock(descriptor, shared=False)


def _flock(descriptor: int, shared: bool) -> bool:
    """Take a lock, and say whether there is one to take."""
    if fcntl is None:
        return False
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise LockedError(error.errno, error.strerror) from error
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):  # a file system without locks
            raise
        return False
    return True


def _sync_path(path: Path) -> None:
    if os.name == "nt" and path.is_dir():  # Windows opens no folders, and syncs what is open for writing
        return
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # a file system that syncs no folders
            raise
    finally:
        os.close(descriptor)
