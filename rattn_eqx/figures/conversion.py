"""Figures of converted models: what their layers lost while they learned, and the arms of a study."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from rattn_eqx.figures.curves import ticks_at
from rattn_eqx.figures.names import BLACK, BLUE, GREY, ORANGE, label, legend

Row = dict[str, Any]
COLOURS = {"full": BLACK, "window": BLUE, "rattention": ORANGE}


def lost_shares(rows: Sequence[Row]) -> Figure:
    """Of a transfer's metrics.jsonl: the mean lost share by step, and each layer's, of the first and of the last tenth.

    The lost share of a layer is sum |new - old|^2 / sum |old|^2 of its output.
    """
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    by_step, by_layer = figure.subplots(1, 2)
    steps = [row["step"] for row in rows]
    by_step.plot(steps, [row["lost"] for row in rows], color=ORANGE, linewidth=1)
    by_step.set(xlabel="step of the transfer", ylabel="lost share of a layer's output, mean", ylim=(0, None))
    names = [name for name in rows[-1] if name.startswith("layer ")]
    tenth = max(1, len(rows) // 10)
    for part, colour, when in ((rows[:tenth], GREY, "first"), (rows[-tenth:], ORANGE, "last")):
        shares = [np.mean([np.nan if row[name] is None else row[name] for row in part]) for name in names]
        place = np.arange(len(names)) + (0.2 if when == "last" else -0.2)
        by_layer.bar(place, shares, width=0.4, color=colour, label=f"{when} {tenth} steps")
    by_layer.set(xlabel="local layer, from the first", ylabel="lost share of its output")
    by_layer.legend()
    for axes in (by_step, by_layer):
        axes.grid(alpha=0.3)
    return figure


def arms(rows: Sequence[Row], ratio: str, domains: Sequence[str]) -> Figure:
    """Loss by position of the arms of a study, a panel for each domain; dotted, the same with the residual branch off.

    Seeds of an arm are drawn one by one.

    Args:
      rows: of `conversion.study`; drawn are full attention and the arms of the ratio, "3:1", "7:1" or "none".
      domains: names of the held-out text.
    """
    figure = Figure(figsize=(3.6 * len(domains), 3.8), layout="constrained")
    drawn = [row for row in rows if row["arm"] == "full" or row["arm"].split("-")[2] == ratio]
    seen = set()
    for axes, domain in zip(figure.subplots(1, len(domains), squeeze=False)[0], domains, strict=True):
        for row in drawn:
            colour = COLOURS[row["arm"].split("-")[0]]
            for what, style in (("loss", "-"), ("branch_off", ":")):
                if what not in row:
                    continue
                bins = row[what][domain]["by_position"]
                name = row["arm"] + (", residual branch off" if what == "branch_off" else "")
                shown = label(name) if name not in seen else None
                seen.add(name)
                centres = [(low + high) / 2 for low, high, _ in bins]
                axes.plot(centres, [nats for *_, nats in bins], f"o{style}", color=colour, markersize=3, label=shown)
        axes.set(xscale="log", xlabel="position (tokens, log scale)", ylabel="nats per token", title=domain)
        ticks_at(axes.xaxis, [64, 128, 256, 512, 1024, 2048, 4096, 8192])
        axes.grid(alpha=0.3)
    if drawn:
        legend(figure, loc="outside upper center", ncols=4, fontsize=8)
    return figure
