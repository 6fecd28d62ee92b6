"""A button that trains the `quick` trial with a map of one's own beside softmax and relu, and draws it meanwhile."""

import dataclasses
import functools
import html
import math
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

from rattn_eqx.ablation.grids import quick
from rattn_eqx.ablation.rows import append_rows, read_rows, summary
from rattn_eqx.ablation.run import check_trial, run_trial
from rattn_eqx.ablation.trial import Trial
from rattn_eqx.data import files
from rattn_eqx.figures.live_map import HEIGHT, WIDTH, load_plotly
from rattn_eqx.figures.names import BLACK, GREEN, GREY, ORANGE, PURPLE
from rattn_eqx.model.map_files import short

BESIDE = ("softmax", "relu")
COLOURS = {"softmax": ORANGE, "relu": PURPLE}  # the paper's map is RATTENTION; any other GREEN


class Stopped(Exception):
    """The stop button was pressed."""


def trials(feature_map: str, steps: int) -> dict[str, Trial]:
    """The `quick` trial of so many steps with the map and with softmax and relu, by the map's name in a config."""
    (base,) = quick()
    made = {}
    for name in dict.fromkeys((feature_map, *BESIDE)):
        training = dataclasses.replace(base.training, steps=steps, warmup_steps=min(40, steps // 4))
        model = dataclasses.replace(base.model, feature_map=name)
        title = f"quick feature_map={short(name)}" + ("" if steps == base.training.steps else f" steps={steps}")
        made[name] = dataclasses.replace(base, name=title, model=model, training=training)
    return made


def guesses(trial: Trial) -> dict[str, float]:
    """The loss of an answer, in nats, of two who do not recall: one knows the values there are, one the sample's.

    The second gives each value the share that it has of the sample's pairs.
    """
    num_pairs, vocabulary_size = (int(trial.task_options[name]) for name in ("num_pairs", "vocabulary_size"))
    num_values = vocabulary_size * 3 // 8
    others = num_pairs - 1
    again = [math.comb(others, n) * (num_values - 1) ** (others - n) / num_values**others for n in range(num_pairs)]
    copied = sum(p * math.log(num_pairs / (1 + n)) for n, p in enumerate(again))
    return {f"chance: one of the {num_values} values": math.log(num_values), "copy: one of the sample's values": copied}


class TrainingPanel:
    """Buttons, curves and the file of results.

    Attributes:
      controls: by name: `steps`, `seeds`, `out` (the file that lines are appended to), the buttons `train` and `stop`.
      curves: the figure widget; losses are means over seeds.
      error: what ended the last training, or None.
      rows: the lines of the last training, the map's own first.
    """

    def __init__(self, widgets: Any, chosen: Any):
        """chosen: gives the config's name of the map to train; raises a ValueError where it has none."""
        self._chosen = chosen
        narrow = {"description_width": "initial"}
        number = lambda value, most, text: widgets.BoundedIntText(
            value, 1, most, description=text, style=narrow, layout={"width": "110px"}
        )
        self.controls: dict[str, Any] = {
            "steps": number(quick()[0].training.steps, 100_000, "steps"),
            "seeds": number(1, 32, "seeds"),
            "out": widgets.Text("my_maps.jsonl", description="results", style=narrow, continuous_update=False),
            "train": widgets.Button(description="Train this map", button_style="primary"),
            "stop": widgets.Button(description="Stop", disabled=True, layout={"width": "80px"}),
        }
        self.message = widgets.HTML()
        self.controls["train"].on_click(lambda _: self.start())
        self.controls["stop"].on_click(lambda _: self.stop())
        self.error: str | None = None
        self.rows: list[dict[str, Any]] = []
        self._thread: threading.Thread | None = None
        self._stopping = threading.Event()

    @functools.cached_property
    def curves(self) -> Any:
        return _curves()

    @property
    def running(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def start(self) -> None:
        """Begin to train in the background; lines that the file has already are not made again."""
        if self.running:
            return
        self.error, self.rows = None, []
        self._stopping.clear()
        try:
            made, seeds = trials(self._chosen(), self.controls["steps"].value), self.controls["seeds"].value
            out = Path(self.controls["out"].value).expanduser()
            for trial in made.values():
                check_trial(trial, seeds, None)
            read_rows(out)
            out.parent.mkdir(parents=True, exist_ok=True)
            files.open_append(out).close()  # before the work
        except Exception as error:
            self._end(f"{type(error).__name__}: {error}")
            return
        self.controls["train"].disabled, self.controls["stop"].disabled = True, False
        self._begin(made)
        self._thread = threading.Thread(target=self._train, args=(made, list(range(seeds)), out), daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End training after the steps that are under way; nothing is written of a map that is not done."""
        self._stopping.set()

    def wait(self, seconds: float | None = None) -> None:
        """Until training has ended.

        Raises:
          TimeoutError: it has not, after so long.
        """
        if self._thread is not None:
            self._thread.join(seconds)
        if self.running:
            raise TimeoutError(f"TrainingPanel: still training after {seconds} s")

    def _begin(self, made: dict[str, Trial]) -> None:
        self._losses: dict[str, list[np.ndarray]] = {name: [] for name in made}
        first = next(iter(made.values()))
        with self.curves.batch_update():
            for trace, name in zip(self.curves.data[:3], (*made, None), strict=False):
                trace.x = trace.y = []
                trace.visible = name is not None
                trace.name = name and short(name)
                trace.line.color = COLOURS.get(name or "", GREEN)
            for trace, (name, loss) in zip(self.curves.data[3:], guesses(first).items(), strict=True):
                trace.x, trace.y, trace.name = [0, first.training.steps], [loss, loss], f"{name}: {loss:.2f}"
        self.message.value = "compiling …"

    def _train(self, made: dict[str, Trial], seeds: list[int], out: Path) -> None:
        said: list[str] = []
        try:
            for number, (name, trial) in enumerate(made.items()):
                began, steps = time.monotonic(), trial.training.steps
                done = {row["seed"]: row for row in read_rows(out) if row["trial"] == trial.to_json()}
                missing = [seed for seed in seeds if seed not in done]

                def told(losses: np.ndarray, name=name, number=number, began=began, steps=steps) -> None:
                    if self._stopping.is_set():
                        raise Stopped
                    self._losses[name].append(losses.mean(axis=1))
                    y = np.concatenate(self._losses[name])
                    with self.curves.batch_update():
                        trace = self.curves.data[number]
                        trace.x, trace.y = np.arange(1, len(y) + 1, dtype=np.int32), y.astype(np.float32)
                    now = f"{short(name)}: step {len(y)} of {steps}, {time.monotonic() - began:.0f} s"
                    self._say([*said, now])

                rows = [done[seed] for seed in seeds if seed in done]
                if missing:
                    made_now = run_trial(trial, missing, None, show_progress=False, on_losses=told)
                    append_rows(out, made_now)
                    rows += made_now
                else:
                    kept = np.mean([[loss for _, loss in row["losses"]] for row in rows], axis=0)
                    trace = self.curves.data[number]
                    with self.curves.batch_update():
                        trace.x, trace.y = [step for step, _ in rows[0]["losses"]], kept.astype(np.float32)
                self.rows += rows
                said.append(f"{short(name)}: {summary(rows)}" + ("" if missing else f", already in {out}"))
                self._say(said)
            said.append(f"The lines are in {out}: rattn ablate --table --out {out}")
            self._end(None, said)
        except Stopped:
            self._end(None, [*said, "Stopped."])
        except Exception as error:
            self._end(f"{type(error).__name__}: {error}", said)

    def _say(self, lines: list[str]) -> None:
        self.message.value = (
            f'<div style="line-height:1.25;font-size:12px">{"<br>".join(map(html.escape, lines))}</div>'
        )

    def _end(self, error: str | None, said: list[str] | None = None) -> None:
        self.error = error
        self._say([*(said or []), *([error] if error else [])])
        self.controls["train"].disabled, self.controls["stop"].disabled = False, True


def _curves() -> Any:
    graphs = load_plotly()
    figure = graphs.FigureWidget()
    for _ in range(3):
        figure.add_trace(graphs.Scatter(mode="lines", line={"width": 1.5}, x=[], y=[]))
    for colour, dash in ((BLACK, "dot"), (GREY, "dash")):
        figure.add_trace(graphs.Scatter(mode="lines", line={"color": colour, "dash": dash, "width": 1.5}, x=[], y=[]))
    figure.update_layout(
        width=WIDTH, height=HEIGHT, margin={"l": 50, "r": 8, "t": 8, "b": 40}, plot_bgcolor="white", showlegend=True,
        legend={"x": 0.99, "y": 0.99, "xanchor": "right", "bgcolor": "rgba(255,255,255,0.8)"}, hovermode="x",
        xaxis={"title": "optimiser step", "rangemode": "tozero", "ticks": "outside"},
        yaxis={"title": "loss on answers (nats)", "rangemode": "tozero", "ticks": "outside"},
    )  # fmt: skip
    return figure
