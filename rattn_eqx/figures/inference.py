"""Figures of `python -m rattn_eqx.inference.bench`: how long a step takes, and how long the reading of a prompt.

`python -m rattn_eqx.figures.inference FILE --out PNG` draws the rows of a file that the benchmark wrote.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pallas.tools.provenance import in_words
from rattn_eqx.figures.curves import save, ticks_at
from rattn_eqx.figures.names import BLACK, BLUE, ORANGE, shown

Row = dict[str, Any]
# As in the notebooks: RATTENTION orange, a plain window blue, full attention black; a second of a kind is paler.
COLOURS = {"RATTENTION": (ORANGE, "#D55E00"), "window": (BLUE, "#56B4E9"), "full": (BLACK, "#777777")}
OTHERS = ("#009E73", "#CC79A7", "#F0E442")


def read_rows(path: Path) -> list[Row]:
    """The lines of a file that the benchmark wrote.

    Raises:
      OSError: there is none. ValueError: a line is no row, with its number.
    """
    rows = []
    for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            row = None
        if not isinstance(row, dict) or not {"kind", "attention", "context", "batch"} <= row.keys():
            raise ValueError(f"read_rows: line {number} of {path} is no row of rattn_eqx.inference.bench")
        rows.append(row)
    return rows


def step_times(rows: list[Row]) -> Figure:
    """The time of a decoding step by context, a panel for each batch; dashed, the floor: its bytes at the bandwidth.

    Of rows that agree in attention, context and batch the last counts; what is "not available" is left out, and so is
    the floor of rows without "bytes" or "bandwidth".

    Args:
      rows: as the benchmark writes them; those of another kind are ignored.
    """
    found = _measured(rows, "decode")
    batches = sorted({row["batch"] for row in found})
    figure = Figure(figsize=(max(6.4, 1.6 + 3.2 * len(batches)), 4), layout="constrained")
    panels = figure.subplots(1, max(len(batches), 1), squeeze=False, sharey=True)[0]
    colours = _colours(found)
    for axes, batch in zip(panels, batches, strict=False):
        for number, (name, colour) in enumerate(colours.items()):
            curve = sorted((row for row in found if (row["attention"], row["batch"]) == (name, batch)), key=_context)
            _draw(axes, curve, name, colour, number)
            known = [row for row in curve if "bytes" in row and "bandwidth" in row]
            floor = [1e3 * sum(row["bytes"].values()) / row["bandwidth"] for row in known]
            axes.plot([row["context"] for row in known], floor, "--", color=colour, linewidth=1)
        axes.set_title(f"batch {batch}")
        _by_context(axes, [row for row in found if row["batch"] == batch])
    panels[0].set_ylabel("milliseconds a step")
    if any("bytes" in row and "bandwidth" in row for row in found):
        panels[0].plot([], [], "--", color="#222222", linewidth=1, label="floor: its bytes at the bandwidth of a copy")
    _finish(figure, panels[0], found)
    return figure


def prefill_times(rows: list[Row]) -> Figure:
    """The time to read one prompt, by its length. Args: as of `step_times`."""
    found = _measured(rows, "prefill")
    figure = Figure(figsize=(6.4, 4), layout="constrained")
    axes = figure.add_subplot()
    for number, (name, colour) in enumerate(_colours(found).items()):
        _draw(axes, sorted((row for row in found if row["attention"] == name), key=_context), name, colour, number)
    _by_context(axes, found)
    axes.set(xlabel="prompt (tokens)", ylabel="milliseconds to read it")
    _finish(figure, axes, found)
    return figure


def _measured(rows: list[Row], kind: str) -> list[Row]:
    """The rows of a kind that have a time, the last of each case."""
    rows = [row for row in rows if row["kind"] == kind and "median" in row]
    return list({(row["attention"], row["context"], row["batch"]): row for row in rows}.values())


def _context(row: Row) -> int:
    return row["context"]


def _colours(rows: list[Row]) -> dict[str, str]:
    """A colour for each name, in the order in which they come."""
    names, taken = dict.fromkeys(row["attention"] for row in rows), dict.fromkeys(("", *COLOURS), 0)
    colours = {}
    for name in names:
        kind = next((kind for kind in COLOURS if name.startswith(kind)), "")
        shades = COLOURS.get(kind, OTHERS)
        colours[name] = shades[taken[kind] % len(shades)]
        taken[kind] += 1
    return colours


def _draw(axes: Axes, curve: list[Row], name: str, colour: str, number: int) -> None:
    """Times by context; later ones have smaller markers, so that equal ones show."""
    style: dict[str, Any] = {"marker": "osD^v"[number % 5], "markersize": 8 - 2 * (number % 3), "color": colour}
    axes.plot([row["context"] for row in curve], [1e3 * row["median"] for row in curve], label=shown(name), **style)


def _by_context(axes: Axes, rows: list[Row]) -> None:
    axes.set(xlabel="context (tokens)", xscale="log", yscale="log")
    places = sorted({row["context"] for row in rows})
    ticks_at(axes.xaxis, places, lambda x, _: f"{x / 1024:g}k" if x >= 1024 else f"{x:g}")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(lambda x, _: f"{x:g}" if f"{x:.0e}"[0] in "25" else "")
    axes.grid(alpha=0.3, which="both", axis="y")
    axes.grid(alpha=0.3, axis="x")


def _finish(figure: Figure, axes: Axes, rows: list[Row]) -> None:
    """A legend above, and below where the numbers come from."""
    if not rows:
        axes.text(0.5, 0.5, "no row has a time", ha="center", transform=axes.transAxes)
        return
    handles, names = axes.get_legend_handles_labels()
    figure.legend(handles, names, loc="outside upper center", ncols=2, fontsize=8)
    sources = {
        f"{row['device']}, {row['dtype']}, {row['date'][:10]}, commit {row['commit']}, {in_words(row['versions'])}"
        for row in rows
        if "device" in row
    }
    figure.supxlabel("\n".join(sorted(sources)), fontsize=6, color="#555555")


def main(arguments: list[str] | None = None) -> int:
    """Draw a file's rows; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m rattn_eqx.figures.inference", description="Draw what python -m rattn_eqx.inference.bench wrote."
    )
    parser.add_argument("file", type=Path, help="of rows, that the benchmark's --out wrote")
    parser.add_argument("--what", choices=("decode", "prefill"), default="decode", help="steps, or reading a prompt")
    parser.add_argument("--out", type=Path, required=True, help="PNG to write")
    options = parser.parse_args(arguments)
    draw = step_times if options.what == "decode" else prefill_times
    save(draw(read_rows(options.file)), options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
