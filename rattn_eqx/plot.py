"""Figures of runs. Each function returns a matplotlib Figure; none touches global state."""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator


def loss_curves(
    runs: dict[str, list[dict[str, Any]]], lines: dict[str, float] | None = None, *, smooth: int = 20
) -> Figure:
    """Training loss (lines, averaged over `smooth` steps) and validation loss (dots) of runs, in bits per byte.

    Steps without a finite loss are left out.

    Args:
      runs: rows of metrics.jsonl by the run's name.
      lines: horizontal lines to compare with, by name, in bits per byte.
    """
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    for colour, (name, rows) in enumerate(runs.items()):
        steps, bits = _column(rows, "bits_per_byte")
        width = min(smooth, len(bits))
        if width:
            means = np.convolve(bits, np.ones(width) / width, mode="valid")
            axes.plot(steps[width - 1 :], means, color=f"C{colour}", linewidth=1, alpha=0.7, label=f"{name}, training")
        at, held_out = _column(rows, "validation_bits_per_byte")
        if len(at):
            axes.plot(at, held_out, "o", color=f"C{colour}", markersize=4, label=f"{name}, validation")
    for style, (name, value) in enumerate((lines or {}).items()):
        dashes = ("--", ":", "-.")[style % 3]
        axes.axhline(value, color="black", linestyle=dashes, linewidth=1, label=f"{name}: {value:.2f}")
    axes.set(xlabel="optimiser step", ylabel="bits per byte (log scale)", yscale="log")
    axes.yaxis.set_major_locator(FixedLocator([1, 1.25, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 10]))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_locator(NullLocator())
    axes.grid(alpha=0.3)
    if axes.has_data():
        axes.legend()
    return figure


def save(figure: Figure, path: Path) -> None:
    """Write a PNG of 150 dots per inch."""
    figure.savefig(path, dpi=150)


def _column(rows: list[dict[str, Any]], name: str) -> tuple[np.ndarray, np.ndarray]:
    pairs = [(row["step"], row[name]) for row in rows if row.get(name) is not None and np.isfinite(row[name])]
    steps, values = zip(*pairs, strict=True) if pairs else ((), ())
    return np.asarray(steps), np.asarray(values, float)
