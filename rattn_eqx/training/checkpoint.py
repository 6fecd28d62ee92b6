"""A training run's checkpoints: one npz file each, written whole or not at all, and checked before use.

A file is called `step_00001000.<first 16 hex digits of its SHA-256>.npz`, so its name is its check. It holds every
array leaf of a pytree under its `jax.tree_util.keystr` path, and a JSON document under `metadata`. The check finds
damage, not malice: who edits a file can rename it to fit. Loading never runs code, whatever the file holds, and takes
no more memory than the file is long.
"""

import contextlib
import hashlib
import json
import math
import os
import re
import stat
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from rattn_eqx.data.files import SMALL, open_regular, parse_json, remove_unfinished, rename, sync, unfinished_in

_NAME = re.compile(r"step_(\d{8,})\.([0-9a-f]{16})\.npz")
_DOCUMENT = "metadata"
# What numpy.save writes before the numbers, read without NumPy's own parser, which evaluates it as Python. Not objects.
_HEADER = re.compile(
    rb"\x93NUMPY\x01\x00..\{'descr': '(?P<dtype>[<>|=][bBiufc]\d{1,2})', 'fortran_order': (?P<fortran>True|False), "
    rb"'shape': \((?P<shape>(\d{1,19}(, ?|(?=\))))*)\), \} *\n",
    re.DOTALL,
)
_LONGEST_HEADER = 2**12
KEPT = 2  # checkpoints of a run
_MORE = 2**26  # bytes that a checkpoint may have more than twice what its arrays have
# What zipfile and NumPy raise on a file that is not what it should be.
_UNREADABLE = (OSError, EOFError, ValueError, RuntimeError, zipfile.BadZipFile)


class CheckpointError(ValueError):
    """A checkpoint is damaged, or does not fit the state it is loaded into."""


def save_checkpoint(folder: Path, step: int, tree: Any, metadata: dict[str, Any], *, keep: int = KEPT) -> Path:
    """Writes the array leaves of `tree` to a new checkpoint, then removes all but the newest `keep`.

    A run killed at any moment leaves the new checkpoint complete or the ones before it as they were; the disk must have
    room for `keep + 1`. Of the older checkpoints, damaged ones are removed and do not count towards `keep`. Another one
    of the same step is replaced; those of later steps are left alone.

    Args:
        folder: created if it is missing. Only one run may write to it.
        step: optimiser steps taken so far.
        tree: the leaves that `equinox.is_array` finds are stored, as jax arrays. Other leaves (functions, strings,
            Python numbers) are not: on loading they come from `like`.
        metadata: anything that JSON can hold; tuples come back as lists and keys as strings.
        keep: at least 1. With 1 there is nothing to fall back on.

    Returns:
        The path of the new checkpoint.

    Raises:
        ValueError: for a bad `step` or `keep`, metadata that JSON cannot hold, or a leaf that cannot be stored.
        OSError: when the disk is full or fails; the checkpoints already in the folder stay usable.
    """
    if step < 0 or keep < 1:
        raise ValueError(f"save_checkpoint: step must be at least 0 and keep at least 1; got step={step}, keep={keep}")
    arrays = {path: np.asarray(leaf) for path, leaf in _array_leaves("save_checkpoint", tree).items()}
    views = {path: array.dtype.name for path, array in arrays.items() if array.dtype.isbuiltin != 1}
    for path in views:  # npz forgets the name of a dtype that is not NumPy's own, such as bfloat16: store its bits
        arrays[path] = arrays[path].view(f"u{arrays[path].dtype.itemsize}")
    try:
        document = json.dumps({"step": step, "views": views, "metadata": metadata})
    except (TypeError, ValueError) as error:
        raise ValueError(f"save_checkpoint: metadata must be plain JSON values; {error}") from error
    arrays[_DOCUMENT] = np.frombuffer(document.encode(), np.uint8)

    folder.mkdir(parents=True, exist_ok=True)
    remove_unfinished(folder)
    temporary = unfinished_in(folder)
    try:
        with explained(f"save_checkpoint: step {step}", folder):
            with temporary.open("xb") as file:
                np.savez(file, **arrays)  # pyright: ignore[reportArgumentType]
                sync(file)
            path = folder / f"step_{step:08d}.{_digest(temporary)}.npz"
            if path.is_dir() and not path.is_symlink():  # the same step taken again has the same name
                path.rename(path.with_name(f"{unfinished_in(folder).name[1:]}-{path.name}"))
            rename(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    prune(path, keep)
    return path


@contextlib.contextmanager
def explained(what: str, folder: Path) -> Iterator[None]:
    """An OSError inside, such as a full disk, comes out saying what could not be saved and what to do about it."""
    try:
        yield
    except OSError as error:
        remedy = "free some space or choose another folder, then resume; checkpoints already there are untouched"
        raise OSError(error.errno, f"{what} could not be saved: {error.strerror}; {remedy}", str(folder)) from error


def load_checkpoint(path: Path, like: Any) -> tuple[Any, dict[str, Any]]:
    """Reads one checkpoint into the structure of `like`.

    Args:
        path: as `save_checkpoint` returned it.
        like: a pytree of the same structure. Its array leaves, which may be `jax.ShapeDtypeStruct`, are replaced by the
            stored ones, bit for bit, on the default device; its other leaves are kept.

    Returns:
        The filled pytree and the metadata.

    Raises:
        CheckpointError: if the file is damaged or renamed, or if its leaves, shapes or dtypes are not those of `like`.
    """
    with _opened(path, like) as checkpoint:
        return _fill(checkpoint, like), checkpoint.metadata


def restore_latest(
    folder: Path,
    like: Any,
    *,
    report: Callable[[str], object] = print,
    obstacle: Callable[[dict[str, Any]], str | None] = lambda metadata: None,
) -> tuple[Any, dict[str, Any], Path] | None:
    """Loads the newest checkpoint of `folder` that is not damaged; None if there is no checkpoint at all.

    Another process may be saving to the folder.

    Args:
        folder: where `save_checkpoint` wrote; it need not exist.
        like: see `load_checkpoint`.
        report: called with one sentence for every checkpoint that is passed over.
        obstacle: why a checkpoint with this metadata is not to be used, such as that another run wrote it; or None.

    Returns:
        The filled pytree, the metadata and the path they came from.

    Raises:
        CheckpointError: if every checkpoint is damaged or has an obstacle, or if a sound one does not fit `like` (it
            belongs to another configuration: an older one would not be the answer).
    """
    refusals: dict[Path, str] = {}
    while True:
        before, listed = _last_change(folder), _newest_first(folder)
        for path in listed:
            if path in refusals:
                continue
            try:
                with _opened(path, like) as checkpoint:
                    if (reason := obstacle(checkpoint.metadata)) is None:
                        filled = _fill(checkpoint, like)
                        for refusal in refusals.values():
                            report(f"{refusal}; trying the one before it")
                        return filled, checkpoint.metadata, path
                refusals[path] = f"checkpoint {path} refused: {reason}"
            except FileNotFoundError:
                break  # removed since it was listed, for newer ones
            except _MisfitError:
                raise
            except CheckpointError as error:
                refusals[path] = str(error)
        else:
            if _last_change(folder) != before:
                continue  # a listing misses what takes its name meanwhile
            if refusals:
                reasons = "; ".join(refusals.values())
                remedy = "put back a good copy, or train in another folder"
                raise CheckpointError(f"restore_latest: no usable checkpoint in {folder}: {reasons}; {remedy}")
            return None


def claimed_metadata(folder: Path) -> dict[Path, dict[str, Any]]:
    """The metadata of each file in `folder` that may be a checkpoint, newest first, found without reading arrays.

    Nothing of it has been checked: for a first look, where `like` would be costly to make.
    """
    found = {}
    for path in _newest_first(folder):
        with contextlib.suppress(KeyError, *_UNREADABLE), open_regular(path) as file, zipfile.ZipFile(file) as archive:
            _, _, found[path] = _read_document(archive, _entry(archive, archive.getinfo(f"{_DOCUMENT}.npy")))
    return found


def _array_leaves(op: str, tree: Any) -> dict[str, Any]:
    """The array leaves of `tree` by path; a ValueError for one that would not come back as it is."""
    leaves: dict[str, Any] = {}
    for key_path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if not (eqx.is_array(leaf) or isinstance(leaf, jax.ShapeDtypeStruct)):
            continue
        path, dtype = jax.tree_util.keystr(key_path), leaf.dtype
        if path in leaves or path == _DOCUMENT:
            raise ValueError(f"{op}: two leaves are called {path!r}; give the pytree's nodes distinct keys")
        if jnp.issubdtype(dtype, jax.dtypes.extended):
            raise ValueError(f"{op}: leaf {path} is a typed key ({dtype}); store jax.random.key_data of it instead")
        if dtype.isbuiltin == 0 or dtype.hasobject:
            raise ValueError(f"{op}: leaf {path} has dtype {dtype}, which no jax array has; convert it or leave it out")
        if jax.dtypes.canonicalize_dtype(dtype) != dtype:
            raise ValueError(
                f"{op}: leaf {path} has dtype {dtype}, which jax would narrow; convert it or enable jax_enable_x64"
            )
        leaves[path] = leaf
    return leaves


class _Entry(NamedTuple):
    """An array of a checkpoint: how it is stored, and the name in the archive."""

    dtype: np.dtype
    shape: tuple[int, ...]
    fortran_order: bool
    offset: int  # of the data in the entry
    name: str


class _Checkpoint(NamedTuple):
    """An open checkpoint, which is sound: its directory has been read, its arrays have not."""

    path: Path
    archive: zipfile.ZipFile
    entries: dict[str, _Entry]
    views: dict[str, str]
    metadata: dict[str, Any]

    def read(self, leaf: str) -> np.ndarray:
        dtype, shape, fortran_order, offset, name = self.entries[leaf]
        try:
            data = self.archive.read(name)
        except _UNREADABLE as error:
            raise CheckpointError(f"checkpoint {self.path} refused: {error}") from error
        if leaf in self.views:
            dtype = jnp.dtype(self.views[leaf])
        return np.frombuffer(data, dtype, offset=offset).reshape(shape, order="F" if fortran_order else "C")

    def described(self, leaf: str) -> str:
        dtype, shape = self.entries[leaf][:2]
        return f"{self.views.get(leaf) or (dtype.name if dtype.isnative else dtype.str)}{shape}"


class _MisfitError(CheckpointError):
    """A sound checkpoint of another pytree."""


@contextlib.contextmanager
def _opened(path: Path, like: Any) -> Iterator[_Checkpoint]:
    """A sound checkpoint, open; a CheckpointError with the reason for any other, FileNotFoundError if it is gone.

    No array has been read: what the file claims is held against its length first.
    """
    largest = (
        2 * sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in _array_leaves("like", like).values()) + _MORE
    )
    with contextlib.ExitStack() as stack:
        try:
            checkpoint = _inspected(path, largest, stack)
        except _UNREADABLE as error:
            if isinstance(error, FileNotFoundError) and not os.path.lexists(path):
                raise
            raise CheckpointError(f"checkpoint {path} refused: {error}") from error
        yield checkpoint


def _inspected(path: Path, largest: int, stack: contextlib.ExitStack) -> _Checkpoint:
    step, digest = _name_parts(path)
    if step < 0:
        raise ValueError("it is not named step_<8 digits>.<16 hex digits>.npz")
    file = stack.enter_context(open_regular(path, largest))
    if (found := _digest_of(file)) != digest:
        raise ValueError(f"its bytes have SHA-256 {found}..., not the {digest}... of its name")
    if not zipfile.is_zipfile(file):
        raise ValueError("it is not an npz archive")
    archive = stack.enter_context(zipfile.ZipFile(file))
    entries = {info.filename.removesuffix(".npy"): _entry(archive, info) for info in archive.infolist()}
    if len(entries) < len(archive.infolist()) or _DOCUMENT not in entries:
        raise ValueError(f"it must have one entry {_DOCUMENT} and each other once")
    stated, views, metadata = _read_document(archive, entries.pop(_DOCUMENT))
    if stated != step:
        raise ValueError(f"it holds step {stated}, not the {step} of its name")
    if metadata.get("step", step) != step:
        raise ValueError(f"its metadata is of step {metadata['step']!r:.40}, not the {step} of its name")
    for leaf, name in views.items():
        stored = entries.get(leaf)
        if stored is None or not isinstance(name, str) or not _is_view(name, stored.dtype):
            raise ValueError(f"its views must name dtypes of entries; got {leaf!r}: {name!r:.40}")
    return _Checkpoint(path, archive, entries, views, metadata)


def _read_document(archive: zipfile.ZipFile, entry: _Entry) -> tuple[int, dict[str, Any], dict[str, Any]]:
    """Step, views and metadata; a ValueError for another document."""
    if math.prod(entry.shape) > SMALL:
        raise ValueError(f"its {_DOCUMENT} must have at most {SMALL:,} bytes; it has {math.prod(entry.shape):,}")
    match parse_json(archive.read(entry.name)[entry.offset :].decode(), f"its {_DOCUMENT}"):
        case {"step": int(step), "views": dict(views), "metadata": dict(metadata)}:
            return step, views, metadata
    raise ValueError(f"its {_DOCUMENT} must hold step, views and metadata")


def _is_view(name: str, stored: np.dtype) -> bool:
    """Whether bits of a dtype that NumPy lacks, such as bfloat16, are stored as this one."""
    try:
        dtype = jnp.dtype(name)
    except TypeError:
        return False
    return dtype.isbuiltin != 1 and not dtype.hasobject and np.dtype(f"u{dtype.itemsize}") == stored


def _entry(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> _Entry:
    """What an entry's header says, once it agrees with the entry's length."""
    if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
        raise ValueError(f"its entry {info.filename!r:.80} is compressed")
    with archive.open(info) as file:
        header = _HEADER.match(file.read(_LONGEST_HEADER))
    if header is None:
        raise ValueError(f"its entry {info.filename!r:.80} has no header of an array of numbers")
    shape = tuple(int(size) for size in header["shape"].split(b",") if size.strip())
    try:
        dtype = np.dtype(header["dtype"].decode())
    except TypeError as error:
        raise ValueError(f"its entry {info.filename!r:.80} has an unknown dtype; {error}") from error
    if not dtype.isnative:
        raise ValueError(f"its entry {info.filename!r:.80} has numbers in another order of bytes, {dtype.str}")
    offset = header.end()
    if math.prod(shape) * dtype.itemsize != info.file_size - offset:
        raise ValueError(f"its entry {info.filename!r:.80} claims shape {shape} of {dtype} in {info.file_size} bytes")
    return _Entry(dtype, shape, header["fortran"] == b"True", offset, info.filename)


def _fill(checkpoint: _Checkpoint, like: Any) -> Any:
    """`like` with its array leaves replaced; a CheckpointError naming those that do not match."""
    leaves = _array_leaves("load_checkpoint", like)
    stored = {leaf: checkpoint.described(leaf) for leaf in checkpoint.entries}
    wanted = {leaf: f"{array.dtype.name}{array.shape}" for leaf, array in leaves.items()}
    unequal = [
        f"leaf {leaf:.200} is {stored.get(leaf, 'absent')} in the checkpoint and {wanted.get(leaf, 'absent')} in `like`"
        for leaf in sorted(stored.keys() | wanted.keys())
        if stored.get(leaf) != wanted.get(leaf)
    ]
    if unequal:
        more = f" and {len(unequal) - 3} more" if len(unequal) > 3 else ""
        remedy = "use the configuration it was saved with, or another folder"
        raise _MisfitError(f"checkpoint {checkpoint.path} does not fit: {'; '.join(unequal[:3])}{more}; {remedy}")
    flat, structure = jax.tree_util.tree_flatten_with_path(like)
    filled = [
        jnp.asarray(checkpoint.read(name)) if (name := jax.tree_util.keystr(key_path)) in wanted else leaf
        for key_path, leaf in flat
    ]
    return jax.tree_util.tree_unflatten(structure, filled)


def prune(written: Path, keep: int = KEPT) -> None:
    """Keeps `written` and the `keep - 1` newest sound checkpoints of earlier steps; leaves alone what is no file.

    `save_checkpoint` ends with it, and a run goes on with it: what it goes on from may have been killed in between.
    """
    written_step, kept = _name_parts(written)[0], 1
    largest = 2 * written.stat().st_size + _MORE
    for path in _newest_first(written.parent):
        step, digest = _name_parts(path)
        with contextlib.suppress(FileNotFoundError):
            status = path.lstat()
            if path == written or not 0 <= step <= written_step or not stat.S_ISREG(status.st_mode):
                continue
            if step < written_step and kept < keep and status.st_size <= largest and _digest(path) == digest:
                kept += 1
            else:
                path.unlink()


def _newest_first(folder: Path) -> list[Path]:
    # Two files of one step can only come from a run killed between writing and pruning: the later one counts.
    found = []
    for path in folder.glob("step_*.npz"):
        with contextlib.suppress(FileNotFoundError):  # removed since, for newer ones
            found.append((_name_parts(path)[0], path.lstat().st_mtime_ns, path))
    return [path for *_, path in sorted(found, reverse=True)]


def _last_change(folder: Path) -> int:
    return folder.stat().st_mtime_ns if folder.exists() else 0


def _name_parts(path: Path) -> tuple[int, str]:
    """The step and the digest in a checkpoint's name; (-1, "") for any other name."""
    name = _NAME.fullmatch(path.name)
    return (int(name[1]), name[2]) if name else (-1, "")


def _digest(path: Path) -> str:
    with open_regular(path) as file:
        return _digest_of(file)


def _digest_of(file: Any) -> str:
    digest = hashlib.file_digest(file, "sha256").hexdigest()[:16]
    file.seek(0)
    return digest
