"""A training run's checkpoints: one npz file each, written whole or not at all, and checked before use.

A file is called `step_00001000.<first 16 hex digits of its SHA-256>.npz`, so its name is its check. It holds every
array leaf of a pytree under its `jax.tree_util.keystr` path, and a JSON document under `metadata`. The check finds
damage, not malice: who edits a file can rename it to fit. Loading never runs code, whatever the file holds.
"""

import contextlib
import hashlib
import json
import re
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from rattn_eqx.data.files import rename, sync

_NAME = re.compile(r"step_(\d{8,})\.([0-9a-f]{16})\.npz")
_DOCUMENT = "metadata"
# What numpy, zipfile and json raise on a file that is not what it should be.
_UNREADABLE = (OSError, EOFError, ValueError, TypeError, KeyError, RuntimeError, zipfile.BadZipFile, zlib.error)


class CheckpointError(ValueError):
    """A checkpoint is damaged, or does not fit the state it is loaded into."""


def save_checkpoint(folder: Path, step: int, tree: Any, metadata: dict[str, Any], *, keep: int = 2) -> Path:
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
    for leftover in folder.glob("step_*.tmp"):
        leftover.unlink()
    temporary = folder / f"step_{step:08d}.tmp"
    try:
        with explained(f"save_checkpoint: step {step}", folder):
            with temporary.open("wb") as file:
                np.savez(file, **arrays)  # pyright: ignore[reportArgumentType]
                sync(file)
            path = folder / f"step_{step:08d}.{_digest(temporary)}.npz"
            rename(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    _prune(path, keep)
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
    return _fill(path, _read(path), like)


def restore_latest(
    folder: Path, like: Any, *, report: Callable[[str], object] = print
) -> tuple[Any, dict[str, Any], Path] | None:
    """Loads the newest checkpoint of `folder` that is not damaged; None if there is no checkpoint at all.

    Args:
        folder: where `save_checkpoint` wrote; it need not exist.
        like: see `load_checkpoint`.
        report: called with one sentence for every damaged checkpoint that is passed over.

    Returns:
        The filled pytree, the metadata and the path they came from.

    Raises:
        CheckpointError: if every checkpoint is damaged, or if a sound one does not fit `like` (it belongs to another
            configuration: an older one would not be the answer).
    """
    refusals = []
    for path in _newest_first(folder):
        if refusals:
            report(f"{refusals[-1]}; trying the one before it")
        try:
            contents = _read(path)
        except CheckpointError as error:
            refusals.append(str(error))
            continue
        return *_fill(path, contents, like), path
    if refusals:
        remedy = "put back a good copy, or empty the folder to start afresh"
        raise CheckpointError(f"restore_latest: no usable checkpoint in {folder}: {'; '.join(refusals)}; {remedy}")
    return None


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


def _read(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The arrays and the metadata of a sound checkpoint; a CheckpointError with the reason for any other."""
    step, digest = _name_parts(path)
    try:
        if step < 0:
            raise ValueError("it is not named step_<8 digits>.<16 hex digits>.npz")
        if (found := _digest(path)) != digest:
            raise ValueError(f"its bytes have SHA-256 {found}..., not the {digest}... of its name")
        if not zipfile.is_zipfile(path):
            raise ValueError("it is not an npz archive")
        with np.load(path, allow_pickle=False) as stored:
            arrays = {key: stored[key] for key in stored.files}
        document = json.loads(arrays.pop(_DOCUMENT).tobytes())
        if document["step"] != step:
            raise ValueError(f"it holds step {document['step']}, not the {step} of its name")
        for leaf, dtype in document["views"].items():
            arrays[leaf] = arrays[leaf].view(jnp.dtype(dtype))
        return arrays, document["metadata"]
    except _UNREADABLE as error:
        reason = f"no entry {error}" if isinstance(error, KeyError) else error
        raise CheckpointError(f"checkpoint {path} refused: {reason}") from error


def _fill(path: Path, contents: tuple[dict[str, np.ndarray], dict[str, Any]], like: Any) -> tuple[Any, dict[str, Any]]:
    """`like` with its array leaves replaced; a CheckpointError naming those that do not match."""
    arrays, metadata = contents
    describe = lambda leaves: {leaf: f"{array.dtype.name}{array.shape}" for leaf, array in leaves.items()}
    stored, wanted = describe(arrays), describe(_array_leaves("load_checkpoint", like))
    unequal = [
        f"leaf {leaf} is {stored.get(leaf, 'absent')} in the checkpoint and {wanted.get(leaf, 'absent')} in `like`"
        for leaf in sorted(stored.keys() | wanted.keys())
        if stored.get(leaf) != wanted.get(leaf)
    ]
    if unequal:
        more = f" and {len(unequal) - 3} more" if len(unequal) > 3 else ""
        remedy = "use the configuration it was saved with, or another folder"
        raise CheckpointError(f"checkpoint {path} does not fit: {'; '.join(unequal[:3])}{more}; {remedy}")
    leaves, structure = jax.tree_util.tree_flatten_with_path(like)
    filled = [
        jnp.asarray(arrays[name]) if (name := jax.tree_util.keystr(key_path)) in wanted else leaf
        for key_path, leaf in leaves
    ]
    return jax.tree_util.tree_unflatten(structure, filled), metadata


def _prune(written: Path, keep: int) -> None:
    """Keeps `written` and the `keep - 1` newest sound checkpoints of earlier steps."""
    written_step, kept = _name_parts(written)[0], 1
    for path in _newest_first(written.parent):
        step, digest = _name_parts(path)
        if path == written or not 0 <= step <= written_step:
            continue
        if step < written_step and kept < keep and _digest(path) == digest:
            kept += 1
        else:
            path.unlink()


def _newest_first(folder: Path) -> list[Path]:
    # Two files of one step can only come from a run killed between writing and pruning: the later one counts.
    key = lambda path: (_name_parts(path)[0], path.stat().st_mtime_ns)
    return sorted(folder.glob("step_*.npz"), key=key, reverse=True)


def _name_parts(path: Path) -> tuple[int, str]:
    """The step and the digest in a checkpoint's name; (-1, "") for any other name."""
    name = _NAME.fullmatch(path.name)
    return (int(name[1]), name[2]) if name else (-1, "")


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]
