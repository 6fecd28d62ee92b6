"""The controls of a workbench, and where they stand."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rattn_eqx.figures.live_map import legend

RANDOM = "random vectors"
TEXT = "The mill stands by the river. The miller keeps the key of the mill in the pocket of his coat."
HEAD_SIZES = (8, 16, 32, 64, 128)
LONGEST, OF_TEXT = 1024, 512  # tokens: the most, and what is read of a text until something else is said


def make(widgets: Any, maps: Sequence[str]) -> dict[str, Any]:
    """Every control by its name, as a workbench begins."""
    look = lambda width, text: {
        "description": text,
        "layout": {"width": f"{width}px"},
        "style": {"description_width": "initial"},
    }
    slider = lambda value, low, high, text, width=235: widgets.IntSlider(value, low, high, **look(width, text))
    choice = lambda options, text, width: widgets.Dropdown(options=options, **look(width, text))
    shipped = [
        str(path.parent) for root in (".", "..") for path in sorted(Path(root).glob("data/models/*/config.json"))
    ]
    return {
        "source": widgets.Combobox(
            value=RANDOM,
            options=[RANDOM, *shipped],
            ensure_option=False,
            continuous_update=False,
            **look(270, "source"),
        ),
        "layer": choice([0], "layer", 125),
        "head": choice([0], "head", 90),
        "text": widgets.Text(TEXT, continuous_update=False, **look(390, "text")),
        "length": slider(64, 1, LONGEST, "length"),
        "head_size": widgets.Dropdown(options=HEAD_SIZES, value=32, **look(135, "head size")),
        "scale": widgets.FloatLogSlider(
            1.0, base=2, min=-3, max=3, step=0.25, readout_format=".2f", **look(235, "scale")
        ),
        "seed": widgets.BoundedIntText(0, 0, 2**31 - 1, **look(110, "seed")),
        "feature_map": choice(maps, "φ", 190),
        "window": slider(16, 0, 64, "window"),
        "query": slider(63, 0, 63, "query"),
        "view": choice(("bars", "arcs"), "as", 85),
        "compare": widgets.Checkbox(False, indent=False, **look(80, "compare")),
        "other_map": choice(maps, "B: φ", 220),
        "other_layer": choice([0], "layer", 125),
        "other_head": choice([0], "head", 90),
    }


def arrange(widgets: Any, bench: Any) -> Any:
    """One box of the controls of a workbench above its picture; the other picture with the tab of training."""
    look: dict[str, Any] = {"style": {"description_width": "initial"}}
    of = lambda *names: row(widgets, bench.controls, *names)
    button = lambda text, act, width=70: _button(widgets, text, lambda: bench._press(act), width)
    place = widgets.Text(
        placeholder="mine.py:phi", description="a map of your own, FILE.py:NAME", layout={"width": "480px"}, **look
    )
    file = widgets.Text("head.png", description="file: .png, .csv or .json", layout={"width": "400px"}, **look)
    bench.place, bench.file = place, file
    tabs = widgets.Tab(
        [
            widgets.VBox([of("source", "layer", "head", "text"), of("length", "scale", "head_size", "seed")]),
            widgets.VBox([
                widgets.HBox([place, button("Add", lambda: bench.add(place.value)),
                              button("Remove φ", lambda: bench.remove(bench.feature_map), 90)]),
                widgets.HTML("φ is chosen below. In Python: <code>workbench.add(\"sharper\", lambda x: …)</code>."),
            ]),
            widgets.VBox([
                widgets.HBox([file, button("Export", lambda: bench._export(file.value), 80),
                              bench.written]),
                bench.line,
            ]),
            widgets.VBox([
                widgets.HBox([bench.training.controls[name] for name in ("train", "stop", "steps", "seeds", "out")]),
                bench.training.message,
            ]),
        ],
        titles=["Source", "Maps", "Export", "Train this map"],
    )  # fmt: skip
    bench.tabs = tabs
    rows = [of("feature_map", "window", "query", "view", "compare"), bench.other_row]
    below = widgets.HTML(legend())
    pictures = [bench.message, bench.live.widget, below]
    box = widgets.VBox([tabs, *rows, *pictures])

    def turn(change: Any) -> None:
        box.children = [tabs, *rows, *([bench.training.curves] if tabs.selected_index == 3 else pictures)]

    tabs.observe(turn, "selected_index")
    return box


def row(widgets: Any, controls: dict[str, Any], *names: str) -> Any:
    return widgets.HBox([controls[name] for name in names])


def _button(widgets: Any, text: str, act: Any, width: int) -> Any:
    made = widgets.Button(description=text, layout={"width": f"{width}px"})
    made.on_click(lambda _: act())
    return made
