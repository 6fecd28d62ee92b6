"""From token files to batches, for training and validation."""

import contextlib
import operator
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, SupportsIndex, final

import grain
import numpy as np
from jaxtyping import Int32

from pallas.checked import checked
from rattn_eqx.data.files import DamagedError, open_regular
from rattn_eqx.data.pretrained_tokenizer import Tokens
from rattn_eqx.data.tokenizers import DOCUMENT

Batch = dict[str, Int32[np.ndarray, "batch context"]]
Window = dict[str, Int32[np.ndarray, "context"]]


@final
class TokenWindows:
    """The windows of one token file, as a grain data source: window i reads tokens i * context to (i + 1) * context.

    Documents are packed end to end and cut every `context` tokens: no position is padding, and any window can be read
    alone. An item holds `tokens`, `targets` (the tokens one place on) and `segment_ids`, the number of document
    markers up to and with each position, each Int32["context"].

    Args:
      path: a token file that `tokenize` wrote.
      context: tokens in a window.
      document: the tokenizer's document marker.

    Raises:
      ValueError: a file shorter than one window and its last target, or one that is no token file.
    """

    def __init__(self, path: Path, context: int, document: int = DOCUMENT):
        if context < 1:
            raise ValueError(f"TokenWindows: context must be at least 1; got {context}")
        self._path = Path(path)
        self._context = context
        self._document = document
        num_tokens = len(_open_tokens(self._path, document))
        if num_tokens < context + 1:
            raise ValueError(
                f"TokenWindows: the split is shorter than one window; got {num_tokens} tokens in {path}, and"
                f" context={context} needs {context + 1}; give more text or a smaller context"
            )
        self._num_windows = (num_tokens - 1) // context
        self._tokens: np.ndarray | None = None

    def __len__(self) -> int:
        return self._num_windows

    @checked
    def __getitem__(self, index: SupportsIndex) -> Window:
        index = operator.index(index)
        if not 0 <= index < self._num_windows:
            raise IndexError(f"TokenWindows: no window {index} among {self._num_windows}")
        if self._tokens is None:  # threads that come here together open it twice, which does no harm
            self._tokens = _open_tokens(self._path, self._document)
        start = index * self._context
        window = self._tokens[start : start + self._context + 1].astype(np.int32)
        return _window_items(window[:-1], window[1:], self._document)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_tokens": None}  # a copy of the memory map would carry the whole file

    def __repr__(self) -> str:
        return f"TokenWindows({str(self._path)!r}, context={self._context}, document={self._document})"


def training_batches(
    path: Path,
    *,
    context: int,
    batch_size: int,
    seed: int,
    document: int = DOCUMENT,
    process_index: int = 0,
    process_count: int = 1,
) -> grain.DatasetIterator[Batch]:
    """Return an endless grain iterator over shuffled batches of windows, read ahead by threads.

    Every epoch is a new shuffle of all windows. Processes get disjoint shares of it, equally many each, so they pass
    from epoch to epoch together; up to `process_count - 1` windows are left out of an epoch, others in each.

    `get_state()` gives a small dictionary that JSON can hold; `set_state` with it continues exactly there, in this
    epoch or a later one. It counts batches, so restore it only under the same arguments. Call `close()` when done.

    Args:
      path: a token file that `tokenize` wrote.
      context: tokens in a window.
      batch_size: windows in a batch of this process.
      seed: of the shuffle, 0 to 2**32 - 1.
      document: the tokenizer's document marker.
      process_index: which share this process reads, 0 to `process_count - 1`.
      process_count: the number of shares.

    Raises:
      ValueError: fewer windows than processes, sizes below 1, or a process index out of range.
    """
    if batch_size < 1:
        raise ValueError(f"training_batches: batch_size must be at least 1; got {batch_size}")
    if not 0 <= process_index < process_count:
        raise ValueError(
            "training_batches: process_index must lie between 0 and process_count - 1;"
            f" got process_index={process_index}, process_count={process_count}"
        )
    windows = TokenWindows(path, context, document)
    if len(windows) < process_count:
        raise ValueError(
            f"training_batches: every process needs a window; got {len(windows)} windows and"
            f" process_count={process_count}; give more text or a smaller context"
        )
    shared = len(windows) // process_count * process_count
    share = grain.MapDataset.source(windows).seed(seed).shuffle().slice(slice(process_index, shared, process_count))
    batches = share.repeat().batch(batch_size, drop_remainder=True)
    # Threads, as reading a memory map lets go of the interpreter lock and worker processes only add copies.
    return iter(batches.to_iter_dataset(grain.ReadOptions(num_threads=4, prefetch_buffer_size=16)))


def long_documents(path: Path, length: int, *, document: int = DOCUMENT) -> Int32[np.ndarray, "n length"]:
    """The first `length` tokens, markers included, of every document of a token file that has as many; maybe none.

    Args:
      path: a token file that `tokenize` wrote.
      document: the tokenizer's document marker, which begins each document.

    Raises:
      ValueError: a length below 1, or a file that is no token file.
    """
    if length < 1:
        raise ValueError(f"long_documents: length must be at least 1; got {length}")
    num_tokens, start, found = len(_open_tokens(path, document)), 0, [np.zeros(0, np.int64)]
    for begin in range(0, num_tokens, _BLOCK):
        stream = _open_tokens(path, document)  # mapped anew, which lets go of the blocks before
        starts = begin + np.flatnonzero(stream[begin : begin + _BLOCK] == document)
        end = [num_tokens] if begin + _BLOCK >= num_tokens else []
        bounds = np.concatenate([[start], starts, end]).astype(np.int64)
        found.append(bounds[:-1][np.diff(bounds) >= length])
        start = bounds[-1]
    starts = np.concatenate(found)
    documents = np.empty((len(starts), length), np.int32)
    for begin in range(0, len(starts), 1024):
        stream = _open_tokens(path, document)
        for row, start in zip(documents[begin:], starts[begin : begin + 1024], strict=False):
            row[:] = stream[start : start + length]
    return documents


def validation_batches(
    path: Path,
    *,
    context: int,
    batch_size: int,
    document: int = DOCUMENT,
    padding: int | None = None,
    max_tokens: int | None = None,
) -> Iterator[Batch]:
    """Return batches that hold every target of a token file, or its first `max_tokens` targets, once and in order.

    Windows follow one another as in `TokenWindows`. What the last window and the last batch lack is filled with the
    padding token, in `tokens` and in `targets`: mask the targets that equal it.

    Args:
      path: a token file that `tokenize` wrote.
      context: tokens in a window.
      batch_size: windows in a batch.
      document: the tokenizer's document marker.
      padding: its padding; None is the token after the document marker, as of bytes and our own byte pairs.
      max_tokens: the most targets to read; None reads all.

    Raises:
      ValueError: a file of fewer than two tokens, or sizes below 1.
    """
    for name, value in (("context", context), ("batch_size", batch_size), ("max_tokens", max_tokens)):
        if value is not None and value < 1:
            raise ValueError(f"validation_batches: {name} must be at least 1; got {value}")
    stream = _open_tokens(path, document)
    padding = document + 1 if padding is None else padding
    num_targets = len(stream) - 1 if max_tokens is None else min(len(stream) - 1, max_tokens)
    if num_targets < 1:
        raise ValueError(f"validation_batches: {path} has no token after its document marker; give more text")

    def batches() -> Iterator[Batch]:
        for start in range(0, num_targets, batch_size * context):
            tokens, targets = np.full((2, batch_size * context), padding, np.int32)
            part = stream[start : min(start + batch_size * context, num_targets) + 1]
            tokens[: len(part) - 1], targets[: len(part) - 1] = part[:-1], part[1:]
            yield _window_items(tokens.reshape(-1, context), targets.reshape(-1, context), document)

    return batches()


def _window_items(
    tokens: Int32[np.ndarray, "*batch context"], targets: Int32[np.ndarray, "*batch context"], document: int
) -> dict[str, Int32[np.ndarray, "*batch context"]]:
    segment_ids = np.cumsum(tokens == document, axis=-1, dtype=np.int32)
    return {"tokens": tokens, "targets": targets, "segment_ids": segment_ids}


_BLOCK = 2**22  # tokens
_SHAPE = rb"\(((?:\d{1,18}, ?)*(?:\d{1,18})?)\)"
_HEADER = re.compile(
    rb"\{'descr': '([<>|][biufcSUVO]\d{0,4})', 'fortran_order': (?:False|True), 'shape': " + _SHAPE + rb", \} *\n"
)


def _open_tokens(path: Path, document: int) -> Tokens:
    """Map a token file into memory; its first token shows whether the caller knows its document marker.

    Raises:
      DamagedError: a file that is no .npy, is cut off, or is no regular file. OSError: it cannot be read.
      ValueError: an array of another kind, or with another document marker.
    """
    with open_regular(path) as file:
        magic = file.read(10)  # NumPy's own reader evaluates what follows as Python
        header = _HEADER.fullmatch(file.read(int.from_bytes(magic[8:], "little")))
        if not magic.startswith(b"\x93NUMPY\x01\0") or header is None:
            raise DamagedError(f"token file: {path} must be a .npy file as NumPy writes it; write it with tokenize")
        kind, shape = header[1].decode(), tuple(int(size) for size in header[2].split(b",") if size.strip())
        dtype = next((dtype for dtype in map(np.dtype, (np.uint16, np.uint32)) if dtype.str == kind), None)
        if dtype is None or len(shape) != 1 or shape[0] == 0:
            with contextlib.suppress(TypeError, ValueError):  # such as "<u3"
                kind = str(np.dtype(kind))
            raise ValueError(
                f"token file: {path} must hold one dimension of uint16 or uint32; got {kind} of shape {shape};"
                " write it with tokenize"
            )
        start, size = file.tell(), os.fstat(file.fileno()).st_size
        if size != start + dtype.itemsize * shape[0]:
            raise DamagedError(
                f"token file: {path} must hold the {shape[0]:,} tokens that it claims; got {size - start:,} bytes of"
                " them; write it with tokenize"
            )
        tokens = np.memmap(file, dtype, "r", start, shape)
    if tokens[0] != document:
        raise ValueError(
            f"token file: {path} must begin with the document marker; got {tokens[0]} for document={document};"
            " pass document=tokenizer.document"
        )
    return tokens
