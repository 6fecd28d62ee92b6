"""Files in the safetensors format, one tensor at a time: a JSON header that says where each lies, then their bytes.

The header is held against the file's length before anything is read; nothing in a file is executed.
"""

import dataclasses
import json
import math
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from rattn_eqx.data.files import new_file, open_regular, parse_json

LONGEST_HEADER = 2**22  # bytes; of a model of 100 layers it is some 200,000
_MOST_AXES = 8
_DTYPES = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


@dataclasses.dataclass(frozen=True)
class Entry:
    """Where a tensor lies in a file."""

    dtype: np.dtype
    shape: tuple[int, ...]
    start: int


@dataclasses.dataclass(frozen=True)
class TensorFile:
    """A sound file of floating-point tensors, whose header has been read.

    metadata: texts by name, of the header.
    """

    path: Path
    entries: dict[str, Entry]
    metadata: dict[str, str]

    def read(self, name: str) -> np.ndarray:
        """One tensor, in its own dtype. A ValueError where the file has changed since its header was read."""
        entry = self.entries[name]
        array = np.empty(entry.shape, entry.dtype)
        with open_regular(self.path) as file:
            file.seek(entry.start)
            if file.readinto(array.reshape(-1).view(np.uint8).data) != array.nbytes:
                raise ValueError(f"load: {self.path} refused: it has become shorter; put back a good copy")
        return array


def open_tensors(path: Path) -> TensorFile:
    """Read a file's header.

    Raises:
      ValueError: for what is no sound safetensors file, or holds other numbers than F32, F16 and BF16; names path
        and reason.
      OSError: as `open`.
    """
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= min(LONGEST_HEADER, size - 8):
                raise ValueError(
                    f"its header must have 2 to {LONGEST_HEADER:,} bytes and lie within the file; it claims {length:,} "
                    f"of {size:,}"
                )
            data = file.read(length)
        header = parse_json(data.decode("utf-8"), "its header")
        if not isinstance(header, dict):
            raise ValueError(f"its header must be an object; got {header!r:.80}")
        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
            raise ValueError(f"its __metadata__ must be texts by name; got {metadata!r:.80}")
        return TensorFile(path, _entries(header, 8 + length, size), metadata)
    except ValueError as error:
        raise ValueError(f"load: {path} refused: {error}; give a sound safetensors file") from error


def _entries(header: dict[str, Any], first: int, size: int) -> dict[str, Entry]:
    """Where each tensor lies: they fill the file from `first` on, without gaps or overlap."""
    entries, spans = {}, []
    for name, stated in header.items():
        what = f"tensor {name!r:.80}"
        match stated:
            case {"dtype": str(kind), "shape": list(shape), "data_offsets": [int(start), int(end)]}:
                pass
            case _:
                raise ValueError(f"{what} must have dtype, shape and data_offsets; got {stated!r:.80}")
        if kind not in _DTYPES:
            raise ValueError(f"{what} must be of {', '.join(_DTYPES)}; it is of {kind!r:.40}")
        if len(shape) > _MOST_AXES or not all(type(axis) is int and 0 <= axis < 2**48 for axis in shape):
            raise ValueError(f"{what} must have at most {_MOST_AXES} axes of sizes below 2**48; got {shape!r:.80}")
        num_bytes = math.prod(shape) * _DTYPES[kind].itemsize
        if not 0 <= start <= end <= size - first or end - start != num_bytes:
            raise ValueError(
                f"{what} must lie within the file's {size - first:,} bytes of tensors; shape {shape} of {kind} has "
                f"{num_bytes:,} bytes, and it claims those from {start:,} to {end:,}"
            )
        entries[name] = Entry(_DTYPES[kind], tuple(shape), first + start)
        spans.append((start, end, name))
    at = 0
    for start, end, name in sorted(spans):
        if start != at:
            raise ValueError(
                f"tensors must follow one another without gap or overlap; {name!r:.80} begins at {start:,}, not {at:,}"
            )
        at = end
    if at != size - first:
        raise ValueError(f"tensors must fill the file; {size - first - at:,} bytes at its end belong to none")
    return entries


def write_tensors(
    path: Path, shapes: dict[str, tuple[int, ...]], read: Callable[[str], np.ndarray], metadata: dict[str, str]
) -> None:
    """Write a file whole or not at all, one tensor in memory at a time, each in the dtype in which it is read.

    Args:
      shapes: of each tensor, by name, in the order in which they are written.
      read: gives a tensor of that shape.

    Raises:
      ValueError: for a dtype that is none of F32, F16 and BF16, and for another shape.
      OSError: as `open`, and for a full disk.
    """
    room = len(_header(metadata, {name: (np.dtype(np.float32), shape) for name, shape in shapes.items()}))
    room += len(shapes) + 8  # "BF16" has a letter more than "F32"
    room += -room % 8
    written: dict[str, tuple[np.dtype, tuple[int, ...]]] = {}
    with new_file(path) as file:
        file.seek(8 + room)
        for name, shape in shapes.items():
            array = np.asarray(read(name), order="C")
            if array.dtype not in _NAMES or array.shape != shape:
                raise ValueError(
                    f"save: {name} must be of shape {list(shape)} and of {', '.join(map(str, _NAMES))}; got "
                    f"{array.dtype}{list(array.shape)}; convert it"
                )
            file.write(array.reshape(-1).view(np.uint8).data)
            written[name] = (array.dtype, shape)
        file.seek(0)
        file.write(room.to_bytes(8, "little") + _header(metadata, written).ljust(room))


def _header(metadata: dict[str, str], tensors: dict[str, tuple[np.dtype, tuple[int, ...]]]) -> bytes:
    header: dict[str, Any] = {"__metadata__": metadata}
    at = 0
    for name, (dtype, shape) in tensors.items():
        end = at + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [at, end]}
        at = end
    return json.dumps(header, separators=(",", ":")).encode()


def shards(sizes: Iterable[tuple[str, int]], most: int) -> list[list[str]]:
    """Names of tensors, in order, in as few files of at most so many bytes as come of filling one after another."""
    files: list[list[str]] = [[]]
    held = 0
    for name, size in sizes:
        if files[-1] and held + size > most:
            files.append([])
            held = 0
        files[-1].append(name)
        held += size
    return files
