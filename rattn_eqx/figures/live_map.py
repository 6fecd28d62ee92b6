"""A head's pairs as a figure that is updated in place: maps of pairs, and what one query reads. Needs plotly.

Colours of a cell are numbers from 0 to 129 (`codes`): 0 the future, 1 a negative weight, then 64 shades of the window
and 64 of the residual branch, from an eighth of the mean weight of the row's branch, or less, to eight times, or more.
"""

import dataclasses
import functools
import html
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, UInt8
from matplotlib.colors import to_rgb

from pallas.checked import checked
from rattn_eqx.figures.names import BLACK, BLUE, ORANGE
from rattn_eqx.figures.pair_map import FUTURE, PairMap

SHADES, FUTURE_CODE, NEGATIVE_CODE, WINDOW_CODE, RESIDUAL_CODE, LAST_CODE = 64, 0, 1, 2, 66, 129
NEGATIVE = "#000000"
WIDTH, HEIGHT = 905, 390  # pixels: what a notebook of JupyterLab has beside its file browser, on a screen of 1366 x 768
MOST_TOLD = 128  # tokens, up to which each pair has its number under the mouse
HOVER = "query %{y}, key %{x}"
ARC_LEVELS = ((0.5, 1.0, 2.5), (0.2, 0.6, 1.6), (0.05, 0.35, 0.9))  # share of the row's largest, opacity, line width


@dataclasses.dataclass(frozen=True)
class Side:
    """What is drawn of one map and head: `name` of the map, and `where` it is: a layer and head, or empty."""

    name: str
    found: PairMap
    where: str = ""


@checked
def codes(found: PairMap, residual_weights: Float[np.ndarray, "t t"] | None) -> UInt8[np.ndarray, "t t"]:
    """The colour of each pair: the window's weights, and these of the residual branch. None: which branch sees it."""
    made = np.full(found.in_window.shape, FUTURE_CODE, np.uint8)
    if residual_weights is None:
        made[found.in_window], made[found.in_state] = WINDOW_CODE + 40, RESIDUAL_CODE + 40
        return made
    for pairs, weights, first in (
        (found.in_window, found.window_weights, WINDOW_CODE),
        (found.in_state, residual_weights, RESIDUAL_CODE),
    ):
        times = (weights * pairs.sum(axis=1, keepdims=True))[pairs]
        shade = np.rint((np.log2(np.clip(np.abs(times), 1 / 8, 8)) + 3) / 6 * (SHADES - 1))
        made[pairs] = np.where(times < 0, NEGATIVE_CODE, first + shade)
    return made


@functools.cache
def colour_scale(residual: str) -> list[tuple[float, str]]:
    """Plotly's colours of `codes`, with the residual branch's weights in shades of this colour."""
    colours = [FUTURE, NEGATIVE, *_shades(BLUE), *_shades(residual)]
    return [(code / LAST_CODE, colour) for code, colour in enumerate(colours)]


def _shades(colour: str) -> list[str]:
    """From nearly white by the colour itself to a darker one."""
    stops = np.array([0.94 + 0.06 * np.array(to_rgb(colour)), to_rgb(colour), 0.45 * np.array(to_rgb(colour))])
    at = np.linspace(0, 2, SHADES)
    mixed = np.stack([np.interp(at, [0, 1.4, 2], channel) for channel in stops.T], axis=1)
    return ["#" + "".join(f"{round(255 * x):02x}" for x in row) for row in mixed]


def legend() -> str:
    """What the colours mean, as HTML."""
    bar = lambda colours: f'<span style="display:inline-block;width:40px;height:9px;background:{colours}"></span>'
    fade = lambda colour: bar(f"linear-gradient(90deg,{','.join(_shades(colour)[::9])})")
    parts = [f"{fade(BLUE)} window", f"{fade(BLACK)} softmax, residual", f"{fade(ORANGE)} φ, residual",
             f"{bar(NEGATIVE)} negative", f"{bar(FUTURE)} the future"]  # fmt: skip
    parts.append("shades: 1/8 to 8 times the row's mean; a click chooses the query")
    return f'<div style="font-size:11px;line-height:1.3">{" &nbsp; ".join(parts)}</div>'


def arcs(query: int, keys: Bool[np.ndarray, "t"], height: float) -> tuple[np.ndarray, np.ndarray]:
    """One line from the query to each of the keys and back, in arcs of that height at the longest distance."""
    turn = np.linspace(0, np.pi, 21)
    x, y = [np.array([float(query)])], [np.zeros(1)]
    for key in np.flatnonzero(keys):
        span = query - key
        there = query - span * (1 - np.cos(turn)) / 2
        up = height * (0.25 + 0.75 * span / len(keys)) * np.sin(turn)
        x += [there, there[::-1]]
        y += [up, up[::-1]]
    return np.concatenate(x).astype(np.float32), np.concatenate(y).astype(np.float32)


def _row(found: PairMap, query: int, view: str) -> dict[int, tuple[np.ndarray, np.ndarray]]:
    """x and y of the parts of a query's row: bars of the window, of the residual branch, dots of softmax, six arcs."""
    near, far = found.in_window[query], found.in_state[query]
    of_window, of_map, exact = (
        x[query].astype(np.float32) for x in (found.window_weights, found.feature_weights, found.softmax_weights)
    )
    if view == "bars":
        parts = enumerate(((near, of_window), (far, of_map), (far, exact)))
        return {part: (np.flatnonzero(keys).astype(np.int32), shares[keys]) for part, (keys, shares) in parts}
    lines = {}
    for first, shares, height in ((3, of_window, 1.0), (6, of_map, -1.0)):
        sizes = np.abs(shares)
        most, above = sizes.max(initial=0), np.inf
        for level, (least, _, _) in enumerate(ARC_LEVELS):
            keys = (sizes >= least * most) & (sizes < above) & (sizes > 0)
            lines[first + level], above = arcs(query, keys, height), least * most
    return lines


class LiveMap:
    """One `plotly` figure widget with up to four maps of pairs above, and one or two pictures of a query's row below.

    Attributes:
      widget: the figure.
    """

    def __init__(self, choose: Callable[[int], object]):
        """choose: told the query whose row was clicked."""
        graphs = load_plotly()
        figure = graphs.FigureWidget(layout=_layout())
        flat = dict(zmin=0, zmax=LAST_CODE, showscale=False, hoverongaps=False)
        for pane in range(4):
            place = {"xaxis": _axis("x", pane), "yaxis": _axis("y", pane)}
            figure.add_trace(graphs.Heatmap(z=np.zeros((1, 1), np.uint8), **flat, **place))
        for row in range(2):
            place = {"xaxis": _axis("x", 4 + row), "yaxis": _axis("y", 4 + row)}
            share = "key %{x}: %{y:.3f}<extra></extra>"
            for colour in (BLUE, ORANGE):
                figure.add_trace(
                    graphs.Bar(marker={"color": colour, "line": {"width": 0}}, hovertemplate=share, **place)
                )
            dots = {"color": BLACK, "size": 4}
            figure.add_trace(graphs.Scatter(mode="markers", marker=dots, hovertemplate=share, **place))
            for colour in (BLUE, ORANGE):
                for _, opacity, width in ARC_LEVELS:
                    line = {"color": colour, "width": width}
                    figure.add_trace(
                        graphs.Scatter(mode="lines", line=line, opacity=opacity, hoverinfo="skip", **place)
                    )
        self.widget = figure
        self._sent: dict[Any, Any] = {}
        for heat in figure.data[:4]:
            heat.on_click(lambda trace, points, state: choose(int(points.ys[0])) if points.ys else None)

    def show(self, sides: Sequence[Side], labels: Sequence[str], query: int, view: str) -> None:
        """Draw one side, or two beside each other.

        Args:
          labels: a short one of each token.
          query: the token whose row is drawn, from 0.
          view: "bars" or "arcs".
        """
        one, rows = sides[0].found, len(sides)
        if rows == 1:
            panes = [(one, None, ORANGE), (one, one.softmax_weights, BLACK), (one, one.feature_weights, ORANGE)]
            titles = ["which branch sees the pair", "softmax over residual pairs", f"φ = {_short(sides[0].name)}", ""]
        else:
            panes = [
                (side.found, weights, colour)
                for side in sides
                for weights, colour in ((side.found.softmax_weights, BLACK), (side.found.feature_weights, ORANGE))
            ]
            titles = [f"{letter}: {what}" for letter, side in zip("AB", sides, strict=True)
                      for what in ("softmax", f"φ = {_short(side.name, 16)}")]  # fmt: skip
        begin = ("",) if rows == 1 else ("A: ", "B: ")
        token = "" if labels[query] == str(query) else f", {labels[query]!r}"
        titles += [f"{side}what query {query}{token} reads: shares of each branch" for side in begin]
        with self.widget.batch_update():
            if self._is_new("arrangement", [len(panes), *labels]):
                self._arrange(len(panes), rows, len(labels), labels)
            self._say(titles, query)
            if self._is_new("view", view):
                for number in (4, 5):
                    axis, bars = self.widget.layout[_layout_axis("y", number)], view == "bars"
                    axis.showticklabels, axis.ticks = bars, "outside" if bars else ""
            for pane, (found, weights, colour) in enumerate(panes):
                far = found.feature_weights if weights is None else weights
                self._set(pane, z=codes(found, weights), colorscale=colour_scale(colour))
                if len(labels) <= MOST_TOLD:
                    shares = np.where(found.in_window, found.window_weights, far).astype(np.float32)
                    self._set(pane, customdata=shares, hovertemplate=HOVER + ": %{customdata:.3f}<extra></extra>")
                else:
                    self._set(pane, hovertemplate=HOVER + "<extra></extra>")
            self._set(3, visible=len(panes) == 4)
            for row in range(2):
                parts = _row(sides[row].found, query, view) if row < rows else {}
                for part in range(9):  # empty, not hidden: what is shown anew, plotly tells of at length
                    x, y = parts.get(part, (np.zeros(0, np.int32), np.zeros(0, np.float32)))
                    self._set(4 + 9 * row + part, x=x, y=y)

    def _arrange(self, panes: int, rows: int, length: int, labels: Sequence[str]) -> None:
        """Places of the panes, their ranges and labels."""
        low = 0.44 if panes == 3 else 0.52
        wide, narrow = _domains(panes, 0.035), _domains(rows, 0.05)
        ticks: dict[str, Any] = {"tickmode": "auto"}
        if rows * length * (7 * max(map(len, labels)) + 2) <= WIDTH - 40:  # they fit below the row
            ticks = {"tickmode": "array", "tickvals": list(range(length)), "ticktext": list(labels)}
        layout, end = self.widget.layout, length - 0.5
        for number in range(6):
            above, pane = number < 4, number % 4
            shown = pane < (panes if above else rows)
            x, y = layout[_layout_axis("x", number)], layout[_layout_axis("y", number)]
            x.visible = y.visible = layout.annotations[number].visible = shown
            place, height = (wide, [low, 0.945]) if above else (narrow, [0.0, low - 0.125])
            if shown:
                x.domain, y.domain, x.range = place[pane], height, [-0.5, end]
                layout.annotations[number].update(x=sum(place[pane]) / 2, y=height[1] + 0.01)
                if above:
                    y.range = [end, -0.5]
                    layout.shapes[number].update(x0=-0.5, x1=end)
                else:
                    x.update(ticks)
            if above:
                layout.shapes[number].visible = shown

    def _say(self, titles: Sequence[str], query: int) -> None:
        """Titles of the panes in the order of their axes, and the line at the query."""
        for number, title in enumerate(titles):
            if self._is_new(("title", number), title):
                self.widget.layout.annotations[number].text = html.escape(title, quote=False)  # plotly reads tags
        if self._is_new("query", query):
            for shape in self.widget.layout.shapes:
                shape.update(y0=query, y1=query)

    def _is_new(self, key: Any, value: Any) -> bool:
        before, self._sent[key] = self._sent.get(key), value
        return before is None or not np.array_equal(before, value)

    def _set(self, trace: int, **values: Any) -> None:
        """Change a trace where it is another than was sent before."""
        for key, value in values.items():
            if self._is_new((trace, key), value):
                setattr(self.widget.data[trace], key, value)


def _short(name: str, most: int = 26) -> str:
    return name if len(name) <= most else "…" + name[1 - most :]


def _domains(count: int, gap: float) -> list[list[float]]:
    """Equal parts of the figure's width, with a gap between."""
    size = (1 - gap * (count - 1)) / count
    return [[i * (size + gap), i * (size + gap) + size] for i in range(count)]


def _axis(letter: str, number: int) -> str:
    return letter if number == 0 else f"{letter}{number + 1}"


def _layout_axis(letter: str, number: int) -> str:
    return f"{letter}axis" if number == 0 else f"{letter}axis{number + 1}"


def _layout() -> dict[str, Any]:
    plain = {"showgrid": False, "zeroline": False, "ticks": "outside", "ticklen": 3, "tickfont": {"size": 10}}
    plain |= {"fixedrange": True}
    layout: dict[str, Any] = dict(
        width=WIDTH, height=HEIGHT, margin={"l": 34, "r": 6, "t": 2, "b": 20}, showlegend=False, barmode="overlay",
        bargap=0.15, plot_bgcolor="rgba(0,0,0,0)", paper_bgcolor="white", hovermode="closest", dragmode=False,
    )  # fmt: skip
    title = {
        "text": "",
        "xref": "paper",
        "yref": "paper",
        "showarrow": False,
        "xanchor": "center",
        "yanchor": "bottom",
        "font": {"size": 12},
    }
    layout["annotations"] = [title] * 6
    line = {"type": "line", "line": {"color": BLACK, "width": 1, "dash": "dot"}}
    layout["shapes"] = [line | {"xref": _axis("x", pane), "yref": _axis("y", pane)} for pane in range(4)]
    for number in range(6):
        layout[_layout_axis("x", number)] = plain | {"anchor": _axis("y", number)}
        layout[_layout_axis("y", number)] = plain | {"anchor": _axis("x", number), "nticks": 6}
    return layout


def load_plotly() -> Any:
    """`plotly.graph_objects`, with what its figure widget needs."""
    try:
        import anywidget  # noqa: F401 (plotly's figure widget asks for it when it is made)
        import plotly.graph_objects as graphs
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("Workbench needs plotly and anywidget: pip install 'rattn-eqx[notebooks]'") from error
    return graphs
