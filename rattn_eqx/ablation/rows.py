"""The file of an ablation's results: a line of JSON for each trial and seed."""

import json
import math
import os
import re
from pathlib import Path
from typing import Any

import numpy as np

from rattn_eqx.ablation.trial import Trial, migrated
from rattn_eqx.data import files
from rattn_eqx.model.map_files import is_source_of

LIMIT = 2**30  # bytes of a file of results
SOURCE = "feature_map_source"  # of a line: the text of the Python file that its feature map is of
_NUMBER = (int, float)
_OPTIONAL = (int, float, type(None))
_LINE = {"name": str, "trial": dict, "seed": int, "corpus": (str, type(None)), "bits_per_byte": _OPTIONAL,
    "tests": list, "seconds": _NUMBER, "commit": str, "device": str}  # fmt: skip
_TRIAL = {"model": dict, "training": dict}
_TEST = {"task": str, "length": int, "exact": _OPTIONAL, "accuracy": _OPTIONAL}


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The lines of a result file, with trials as they are written now (`trial.migrated`); none if there is no file.

    Raises:
      ValueError: for a line that is no result, with its number and what is wrong with it.
    """
    return [_row(line, f"line {number} of {path}") for number, line in enumerate(_lines(path), 1) if line.strip()]


def replayed(place: str) -> dict[str, Any]:
    """The line of results at "FILE:LINE", counted from 1.

    Raises:
      ValueError: no such file or line, or a line that is no result.
    """
    file, _, number = place.rpartition(":")
    lines = _lines(Path(file)) if file else []
    if not re.fullmatch("[0-9]{1,9}", number) or not 1 <= int(number) <= len(lines):
        raise ValueError(f"ablate: replay needs FILE:LINE with a line from 1 to {len(lines)}; got {place!r:.200}")
    return _row(lines[int(number) - 1], f"line {number} of {file}")


def append_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """Add lines at the end of a file, all or none, in one write: other processes may add theirs meanwhile.

    A number that is not finite, which JSON lacks, is written as null.

    Raises:
      OSError: as of a full disk. ValueError: the path is no regular file.
    """
    text = "".join(json.dumps(without_nonfinite(row), allow_nan=False) + "\n" for row in rows)
    with files.open_append(path) as file:
        data = (b"" if _ends_a_line(path) else b"\n") + text.encode("utf-8")
        written = 0
        try:
            while written < len(data):
                written += os.write(file.fileno(), data[written:])
            files.sync(file)
        except OSError:
            end = os.lseek(file.fileno(), 0, os.SEEK_CUR)
            if written and os.fstat(file.fileno()).st_size == end:
                os.ftruncate(file.fileno(), end - written)
            raise


def without_nonfinite(value: Any) -> Any:
    """A value of JSON with None in place of NaN and infinities."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: without_nonfinite(part) for key, part in value.items()}
    return [without_nonfinite(part) for part in value] if isinstance(value, list | tuple) else value


def summary(rows: list[dict[str, Any]]) -> str:
    """One line: bits per byte, and whole answers right at each length, mean over seeds and each seed's."""
    parts = []
    if bits := [row["bits_per_byte"] for row in rows if row["bits_per_byte"] is not None]:
        parts.append(f"{np.mean(bits):.3f} bits/byte")
    for i, tested in enumerate(rows[0]["tests"]):
        exact = [row["tests"][i]["exact"] for row in rows if row["tests"][i]["exact"] is not None]
        shown = f"{np.mean(exact):.3f} ({', '.join(f'{share:.3f}' for share in exact)})" if exact else "none"
        parts.append(f"{tested['task']} {tested['length']}: {shown}")
    if any(row.get("skipped") for row in rows):
        skipped = ", ".join(str(row.get("skipped")) for row in rows)
        parts.append(f"steps skipped because loss or gradients were not finite: {skipped}")
    if lost := sum(without_nonfinite(row) != row for row in rows):
        parts.append(f"numbers that are not finite, written as null, in {lost} of {len(rows)} lines")
    return f"{'; '.join(parts)}; {rows[0]['seconds']:.0f} s"


def _ends_a_line(path: Path) -> bool:
    with files.open_regular(path) as file:
        if file.seek(0, os.SEEK_END):
            file.seek(-1, os.SEEK_END)
        return file.read(1) in (b"", b"\n")


def _lines(path: Path) -> list[str]:
    return files.read_text(path, LIMIT).removesuffix("\n").split("\n") if path.exists() else []


def _row(line: str, where: str) -> dict[str, Any]:
    try:
        row: Any = files.parse_json(line, where)
        _require(row, _LINE)
        _require(row["trial"], _TRIAL)
        _require({"departures": {}} | row["trial"], {"departures": dict})
        for test in row["tests"]:
            _require(test, _TEST)
        trial = Trial.from_json(row["name"], row["trial"])
        if (source := row.get(SOURCE)) is not None:
            _require(row, {SOURCE: str})
            if not is_source_of(source, trial.model.feature_map):
                raise ValueError(f"{SOURCE} is not that of model.feature_map, {trial.model.feature_map}")
    except (ValueError, TypeError) as error:  # a departure that is given twice
        raise files.DamagedError(f"ablate: {where} is no result: {error}; put back a good copy or remove it") from error
    return row | {"trial": migrated(row["trial"])}


def _require(values: Any, kinds: dict[str, Any]) -> None:
    if not isinstance(values, dict):
        raise ValueError(f"an object is needed, got {values!r:.80}")
    for name, kind in kinds.items():
        if name not in values or not isinstance(values[name], kind) or isinstance(values[name], bool):
            raise ValueError(f"{name} is {values.get(name, 'missing')!r:.80}")
