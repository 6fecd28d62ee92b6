"""What a workbench draws, as files."""

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from rattn_eqx.ablation.rows import without_nonfinite
from rattn_eqx.data import files
from rattn_eqx.figures import pair_map
from rattn_eqx.figures.live_map import Side
from rattn_eqx.figures.words import numbers

KINDS = (".png", ".csv", ".json")


def write(path: Path, sides: Sequence[Side], labels: Sequence[str], settings: dict[str, Any]) -> Path:
    """Write the sides to a file of one of `KINDS`: the static figures, one above the other; a row for each pair, the
    future left out; settings, numbers and tokens.

    Raises:
      ValueError: another ending, a file that exists, or no side.
    """
    if path.suffix not in KINDS:
        raise ValueError(f"export: the name must end in {', '.join(KINDS)}; got {path.name!r:.80}")
    if not sides:
        raise ValueError("export: nothing is drawn yet; mend the settings first")
    if path.exists():
        raise ValueError(f"export: {path} exists already; give another name, or remove it")
    make = {".png": _png, ".csv": _csv, ".json": _json}[path.suffix]
    with files.new_file(path) as file:
        file.write(make(sides, labels, settings))
    return path


def figure(side: Side) -> Figure:
    """The static figure of a side."""
    where = f"{side.where}, " if side.where else ""
    title = f"{where}φ = {side.name}, W = {side.found.window}, T = {len(side.found.in_window)}"
    return pair_map.draw(side.found, title)


def _png(sides: Sequence[Side], labels: Sequence[str], settings: dict[str, Any]) -> bytes:
    from PIL import Image

    pictures = [Image.open(io.BytesIO(pair_map.png(figure(side), 100))) for side in sides]
    whole = Image.new("RGB", (pictures[0].width, sum(x.height for x in pictures)))
    top = 0
    for picture in pictures:
        whole.paste(picture, (0, top))
        top += picture.height
    buffer = io.BytesIO()
    whole.save(buffer, "PNG")
    return buffer.getvalue()


def _csv(sides: Sequence[Side], labels: Sequence[str], settings: dict[str, Any]) -> bytes:
    buffer = io.StringIO()
    rows = csv.writer(buffer, lineterminator="\n")
    rows.writerow(
        ["side", "map", "where", "query", "key", "query_token", "key_token", "branch", "window", "softmax", "feature"]
    )
    for letter, side in zip("AB", sides, strict=False):
        found = side.found
        for query, key in np.argwhere(found.in_window | found.in_state):
            branch = "window" if found.in_window[query, key] else "residual"
            weights = (found.window_weights, found.softmax_weights, found.feature_weights)
            shares = [f"{x[query, key]:.7g}" for x in weights]
            rows.writerow([letter, side.name, side.where, query, key, labels[query], labels[key], branch, *shares])
    return buffer.getvalue().encode()


def _json(sides: Sequence[Side], labels: Sequence[str], settings: dict[str, Any]) -> bytes:
    of = lambda side: {"map": side.name, "where": side.where} | numbers(side.found)
    content = {"settings": settings, "tokens": list(labels), "sides": [of(side) for side in sides]}
    return json.dumps(without_nonfinite(content), indent=1, ensure_ascii=False, allow_nan=False).encode()
