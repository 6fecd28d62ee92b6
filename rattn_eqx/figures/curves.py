"""Figures of runs. Each function returns a matplotlib Figure; none touches global state.

Colours are those of `names`: full attention black, a window blue, RATTENTION orange; dashed where a branch is off.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, LogLocator, NullLocator

from rattn_eqx.ablation import table
from rattn_eqx.data.files import new_file
from rattn_eqx.evaluation.attribution import BranchShares, EffectiveMemory
from rattn_eqx.figures.names import BLACK, BLUE, GREEN, ORANGE, PLAIN, PURPLE, RED, label, legend, shown

# Of curves that are neither a window, RATTENTION nor full attention.
OTHERS = (GREEN, PURPLE, "#56B4E9", RED, "#777777")
BRANCHES = {"whole": (ORANGE, "-"), "window off": (ORANGE, "--"), "residual off": (BLUE, "--")}


def loss_curves(
    runs: dict[str, list[dict[str, Any]]],
    lines: dict[str, float] | None = None,
    *,
    smooth: int = 20,
    colours: Mapping[str, str] | None = None,
) -> Figure:
    """Training loss (lines, averaged over `smooth` steps) and validation loss (dots) of runs, in bits per byte.

    Steps without a finite loss are left out.

    Args:
      runs: rows of metrics.jsonl by the run's name.
      lines: horizontal lines to compare with, by name, in bits per byte.
      colours: of runs, by name; the others get some that mean nothing.
    """
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    for number, (name, rows) in enumerate(runs.items()):
        colour = (colours or {}).get(name, OTHERS[number % len(OTHERS)])
        steps, bits = _column(rows, "bits_per_byte")
        width = min(smooth, len(bits))
        if width:
            means = np.convolve(bits, np.ones(width) / width, mode="valid")
            axes.plot(steps[width - 1 :], means, color=colour, linewidth=1, alpha=0.7, label=label(f"{name}, training"))
        at, held_out = _column(rows, "validation_bits_per_byte")
        if len(at):
            axes.plot(at, held_out, "o", color=colour, markersize=4, label=label(f"{name}, validation"))
    for style, (name, value) in enumerate((lines or {}).items()):
        dashes = ("--", ":", "-.")[style % 3]
        axes.axhline(value, color=BLACK, linestyle=dashes, linewidth=1, label=label(f"{name}: {value:.2f}"))
    axes.set(xlabel="optimiser step", ylabel="bits per byte (log scale)", yscale="log")
    ticks_at(axes.yaxis, [1, 1.25, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 10])
    axes.grid(alpha=0.3)
    if axes.has_data():
        legend(axes)
    return figure


def branch_shares(shares: BranchShares, window: int) -> Figure:
    """The residual branch's share of the norm of each local layer's output, by position; the rest is the window's."""
    figure = Figure(figsize=(7, 3.5), layout="constrained")
    axes = figure.add_subplot()
    colours = colormaps["YlOrBr"](np.linspace(0.45, 0.9, len(shares.layers)))
    for layer, share, colour in zip(shares.layers, shares.residual, colours, strict=True):
        axes.plot(share, color=colour, linewidth=1.2, label=f"layer {layer}, mean {share[window:].mean():.2f}")
    axes.axvline(
        window, color=BLACK, linestyle=":", linewidth=1, label=f"window, {window}: nothing is behind it before"
    )
    axes.set(xlabel="position (tokens)", ylabel="residual branch's share of\nthe output norm", ylim=(0, 1))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, ncols=1 + len(shares.layers) // 8)
    return figure


def effective_memory(curves: dict[str, EffectiveMemory], window: int, num_local: int) -> Figure:
    """How much a changed token moves the logits, by how far back it lies; triangles stand for exactly 0.

    The token itself, distance 0, is left out.

    Args:
      curves: by name, such as those of `attribution.switched`.
      window, num_local: of the model; marked are what one window sees and what `num_local` of them reach together.
    """
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    for number, (name, memory) in enumerate(curves.items()):
        colour, style = BRANCHES.get(name, (OTHERS[number % len(OTHERS)], "-"))
        distance = np.arange(1, len(memory.change))
        change = memory.change[1:]
        drawn = np.where(change > 0, change, np.nan)
        axes.plot(distance, drawn, style, marker=".", color=colour, markersize=3, label=label(name))
        zeros, height = distance[change == 0], 0.02 + 0.03 * number
        axes.plot(zeros, np.full(len(zeros), height), "v", color=colour, markersize=3,
                  transform=axes.get_xaxis_transform())  # fmt: skip
    axes.plot([], [], "v", color=BLACK, markersize=4, label="exactly 0")
    for distance, style, what in (
        (window - 1, "--", "window's last key"),
        (num_local * (window - 1), ":", f"{num_local} windows' last"),
    ):
        axes.axvline(distance + 0.5, color=BLACK, linestyle=style, linewidth=1, label=f"{what}, {distance} back")
    axes.set(xlabel="distance of the changed token (tokens)", ylabel="|change of logits| / |logits|")
    axes.set(xscale="log", yscale="log")
    axes.xaxis.set_major_locator(LogLocator(2))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.grid(alpha=0.3)
    legend(axes, fontsize=8)
    return figure


def by_window(rows: list[dict[str, Any]], *metrics: str) -> Figure:
    """Results of `rattn ablate` by window, a panel for each: means, 95% intervals over seeds, each seed a dot.

    Intervals are `table.interval`'s. A window of the context or more is full attention, drawn as a line across.

    Args:
      rows: lines that differ in window, in whether there is a residual branch, and in seed.
      metrics: as of `table.result`.
    """
    figure = Figure(figsize=(7 if len(metrics) == 1 else 5 * len(metrics), 4), layout="constrained")
    for axes, metric in zip(figure.subplots(1, len(metrics), squeeze=False)[0], metrics, strict=True):
        _by_window(axes, rows, metric)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=3)
    return figure


def _by_window(axes: Axes, rows: list[dict[str, Any]], metric: str) -> None:
    groups: dict[tuple[bool, int], list[float]] = {}
    full: list[float] = []
    for row in rows:
        model, value = row["trial"]["model"], table.result(row, metric)
        sees_all = model["window"] >= row["trial"]["training"]["context"]
        if value is not None:
            (full if sees_all else groups.setdefault((model["residual"], model["window"]), [])).append(value)
    for residual, name, colour in ((False, "window alone", BLUE), (True, "RATTENTION", ORANGE)):
        windows = sorted(window for has, window in groups if has == residual)
        found = [groups[residual, window] for window in windows]
        at = np.asarray(windows) * (1.04 if residual else 0.96)  # beside each other
        means = np.array([np.mean(values) for values in found])
        ends = np.array([table.interval(values, metric) for values in found]).reshape(-1, 2).T
        bars = np.abs(ends - means)
        axes.errorbar(at, means, bars, color=colour, marker="o", capsize=3, label=name)
        _dots(axes, at, found, colour)
    if full:
        axes.axhline(float(np.mean(full)), color=BLACK, linestyle="--", linewidth=1, label="full attention")
        axes.axhspan(*table.interval(full, metric), color=BLACK, alpha=0.08)
        axes.plot([0.985] * len(full), full, ".", color=BLACK, alpha=0.5, transform=axes.get_yaxis_transform())
    if table.is_share(metric):
        axes.set_ylim(-0.03, 1.03)
    axes.set(xlabel="window of the local layers, in tokens", ylabel=_metric_name(metric), xscale="log")
    ticks_at(axes.xaxis, sorted({window for _, window in groups}))
    axes.grid(alpha=0.3)


def differences(rows: list[dict[str, Any]], names: Sequence[str], baseline: str, metric: str) -> Figure:
    """Trials less a baseline, from the top: mean difference over seeds, its 95% `table.interval`, each seed a dot.

    Filled and purple where the interval leaves 0 out, else hollow and grey.

    Args:
      rows: lines of `rattn ablate`.
      names: of the trials to draw, each with a seed that the baseline has too (`table.paired_difference`).
      baseline: name of the trial that is subtracted.
      metric: as of `table.result`.
    """
    figure = Figure(figsize=(7, 1.2 + 0.3 * len(names)), layout="constrained")
    axes = figure.add_subplot()
    for place, name in enumerate(names):
        found = table.paired_difference(rows, name, baseline, metric)
        colour, inside = (PURPLE, PURPLE) if found.is_clear else ("#777777", "white")
        bars = [[found.mean - found.low], [found.high - found.mean]]
        axes.errorbar(found.mean, place, xerr=bars, color=colour, marker="o", markerfacecolor=inside, capsize=3)
        seeds = list(found.by_seed.values())
        axes.plot(seeds, [place] * len(seeds), ".", color=colour, alpha=0.5)
    axes.axvline(0, color=BLACK, linestyle="--", linewidth=1)
    axes.set_yticks(range(len(names)), [shown(name) for name in names], **PLAIN)
    axes.set_xlabel(f"{_metric_name(metric)}, less that of '{shown(baseline)}'", **PLAIN)
    axes.invert_yaxis()
    axes.grid(axis="x", alpha=0.3)
    return figure


def _metric_name(metric: str) -> str:
    kind, _, length = metric.partition(" ")
    names = {"bits_per_byte": "bits per byte", "exact": "whole answers right", "accuracy": "accuracy"}
    return names.get(kind, kind) + (f" at length {int(length):,}" if length else "")


def by_length(rows: dict[str, list[dict[str, Any]]], trained: int) -> Figure:
    """Whole answers right, of `rattn ablate`, by the length of the test: means over seeds, each seed a dot.

    Full attention is black, a window blue, RATTENTION orange; curves of one kind differ in dashes and marker.

    Args:
      rows: lines of each curve, by its name.
      trained: tokens in a training sequence; marked by a line.
    """
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    drawn: list[str] = []
    for number, (name, lines) in enumerate(rows.items()):
        lengths = sorted({test["length"] for row in lines for test in row["tests"]})
        found = [[table.result(row, f"exact {length}") for row in lines] for length in lengths]
        seen = [np.array([value for value in values if value is not None], float) for values in found]
        colour = _colour(lines[0]["trial"])
        dashes = ("-", "--", ":", "-.")[drawn.count(colour) % 4]
        drawn.append(colour)
        style: dict[str, Any] = {"color": colour, "linestyle": dashes, "marker": "osD^v"[number % 5]}
        style["markersize"] = 9 - 2 * (number % 4)  # what lies on another is seen
        axes.plot(lengths, [values.mean() if len(values) else np.nan for values in seen], label=label(name), **style)
        _dots(axes, [length * 1.03 ** (number - (len(rows) - 1) / 2) for length in lengths], seen, colour)
    axes.axvline(trained, color=BLACK, linestyle="--", linewidth=1, label="length of training")
    axes.set(xlabel="length of the test, in tokens", ylabel="share of answers right", xscale="log", ylim=(-0.03, 1.05))
    ticks_at(axes.xaxis, lengths, lambda x, _: f"{x / 1024:g}k" if x >= 1024 else f"{x:g}")
    axes.grid(alpha=0.3)
    legend(axes)
    return figure


def _colour(trial: dict[str, Any]) -> str:
    """Of full attention, a window or RATTENTION."""
    if trial["model"]["window"] >= trial["training"]["context"]:
        return BLACK
    return ORANGE if trial["model"]["residual"] else BLUE


def save(figure: Figure, path: Path) -> None:
    """Write a PNG of 150 dots per inch, whole or not at all."""
    with new_file(path) as file:
        figure.savefig(file, dpi=150, format="png")


def _column(rows: list[dict[str, Any]], name: str) -> tuple[np.ndarray, np.ndarray]:
    pairs = [(row["step"], row[name]) for row in rows if row.get(name) is not None and np.isfinite(row[name])]
    steps, values = zip(*pairs, strict=True) if pairs else ((), ())
    return np.asarray(steps), np.asarray(values, float)


def ticks_at(axis: Axis, places: Sequence[float], form: str | Callable = "{x:g}") -> None:
    """Of a logarithmic axis: these and no others."""
    axis.set_major_locator(FixedLocator(places))
    axis.set_major_formatter(form)
    axis.set_minor_locator(NullLocator())


def _dots(axes: Axes, places: Iterable[float], groups: Iterable, colour: str) -> None:
    """Each group's values above one another at its place."""
    for place, values in zip(places, groups, strict=True):
        axes.plot([place] * len(values), values, ".", color=colour, alpha=0.5)
