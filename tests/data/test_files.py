"""Files and folders appear whole, locks end with their process, and only regular files are read."""

import multiprocessing
import os
import sys
import time
from pathlib import Path

import pytest

from rattn_eqx.data import files
from rattn_eqx.data.files import (
    DamagedError,
    LockedError,
    lock,
    new_file,
    new_folder,
    open_append,
    open_regular,
    read_bytes,
    read_json,
    read_text,
    remove_unfinished,
    write_json,
    write_text,
)

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="POSIX permissions and locks")


def apart(function, *arguments) -> None:
    """Run a function in another process, and fail with it."""
    process = multiprocessing.get_context("spawn").Process(target=function, args=arguments)
    process.start()
    process.join(60)
    assert process.exitcode == 0


def is_locked(folder: Path, holder: int) -> None:
    with pytest.raises(LockedError, match=rf"test: process {holder} holds it; wait for that process or stop it"):
        lock(folder, "test").__enter__()
    remove_unfinished(folder.parent)


def is_free(folder: Path) -> None:
    with lock(folder, "test"):
        pass


def test_a_written_file_has_the_callers_permissions_and_replaces_a_link(tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_text("theirs")
    (tmp_path / "file").symlink_to(elsewhere)
    before = os.umask(0o027)
    try:
        write_text(tmp_path / "file", "é")
        with new_folder(tmp_path / "folder") as unfinished:
            (unfinished / "file").touch()
    finally:
        os.umask(before)
    assert elsewhere.read_text() == "theirs"
    assert not (tmp_path / "file").is_symlink()
    assert (tmp_path / "file").read_bytes() == "é".encode()
    assert [oct((tmp_path / name).stat().st_mode & 0o777) for name in ("file", "folder")] == ["0o640", "0o750"]


def test_a_block_that_fails_leaves_nothing(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "file", float("nan"))
    for make in (lambda: new_folder(tmp_path / "folder"), lambda: lock(tmp_path / "run", "test")):
        with pytest.raises(ZeroDivisionError), make():
            _ = 1 / 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("make", [new_file, new_folder])
def test_a_full_disk_is_told_with_the_name(tmp_path, make):
    message = f"{tmp_path / 'target'} could not be written: No space left on device; free some space"
    with pytest.raises(OSError, match=message), make(tmp_path / "target"):
        raise OSError(28, "No space left on device")
    assert list(tmp_path.iterdir()) == []


def test_a_lock_keeps_other_processes_out_and_ends(tmp_path):
    folder = tmp_path / "run"
    with lock(folder, "test"), lock(folder, "again"), new_folder(tmp_path / "new"):
        apart(is_locked, folder, os.getpid())
        (folder / "file").touch()
    apart(is_free, folder)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "run"], "what was being written was taken away"
    assert sorted(path.name for path in folder.iterdir()) == [".lock", "file"]


def test_a_shared_lock_keeps_those_out_who_want_it_alone(tmp_path):
    shared = lambda: lock(tmp_path, "test", shared=True)
    with shared(), shared(), pytest.raises(LockedError, match="test: other processes hold it"), lock(tmp_path, "test"):
        pass
    is_free(tmp_path)


def test_what_killed_processes_left_is_removed(tmp_path):
    (tmp_path / ".unfinished-0" / "sub").mkdir(parents=True)
    (tmp_path / ".unfinished-1").write_text("half")
    (tmp_path / ".unfinished-2").symlink_to(tmp_path)
    (tmp_path / "kept").touch()
    remove_unfinished(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


def test_where_there_are_no_locks_only_what_is_old_is_taken_for_dead(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "fcntl", None)
    for name, age in ((".unfinished-0", 0), (".unfinished-1", 2 * files.DEAD)):
        (tmp_path / name).mkdir()
        then = time.time() - age
        os.utime(tmp_path / name, (then, then))
    with lock(tmp_path / "run", "test"), new_folder(tmp_path / "new"):
        remove_unfinished(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".unfinished-0", "new"]


@pytest.mark.parametrize("has_lock", [False, True])
def test_what_may_only_be_read_is_read_under_a_shared_lock(tmp_path, monkeypatch, has_lock: bool):
    if has_lock:
        is_free(tmp_path)
    opened, really_open = [], os.open

    def read_only(path, flags, *mode):
        if flags & os.O_CREAT:
            raise PermissionError(13, "Permission denied")
        opened.append(flags)
        return really_open(path, flags, *mode)

    monkeypatch.setattr(os, "open", read_only)
    with lock(tmp_path, "test", shared=True):
        assert len(opened) == 1
    with pytest.raises(PermissionError), lock(tmp_path, "test"):
        pass


def test_what_is_no_folder_is_told_from_a_lock(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(DamagedError, match=r"test: .*file must be a folder; it is not; give another path"):
        lock(tmp_path / "file", "test").__enter__()


def test_only_regular_files_of_a_bounded_size_are_read(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "device").symlink_to("/dev/zero")
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    with open(tmp_path / "sparse", "wb") as file:
        file.truncate(2**40)
    for name, message in [
        ("fifo", "it is a pipe or a device"),
        ("device", "it is a pipe or a device"),
        ("circle", "must be a regular file"),
        ("", "it is a folder"),
        ("sparse", "must have at most 1,048,576 bytes; it has 1,099,511,627,776; put back a good copy"),
    ]:
        with pytest.raises(DamagedError, match=message):
            read_bytes(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        open_regular(tmp_path / "none")
    for name in ("fifo", "device", "circle", ""):
        with pytest.raises(DamagedError, match="must be a regular file and no link; give another path"):
            open_append(tmp_path / name)


@pytest.mark.parametrize("content", [b"\xff", b"", b"[" * 100_000, b"{", b"[NaN]"])
def test_what_is_no_json_is_named(tmp_path, content: bytes):
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(DamagedError, match=rf"^{tmp_path / 'file'} must be .*put back a good copy$"):
        read_json(tmp_path / "file")
    if content != b"\xff":
        assert read_text(tmp_path / "file").encode() == content
