"""Train this map: its trials, its lines in the file, its curves, its two guesses, and that it can be stopped."""

import dataclasses
import math
from typing import Any

import numpy as np
import pytest

from rattn_eqx.ablation.grids import grids, product, quick
from rattn_eqx.ablation.layer import NO_DEPARTURES
from rattn_eqx.ablation.rows import append_rows, read_rows
from rattn_eqx.ablation.run import run_trial
from rattn_eqx.ablation.table import table
from rattn_eqx.tasks.recall import mqar

pytest.importorskip("ipywidgets", reason="ipywidgets is not installed")
pytest.importorskip("plotly", reason="plotly is not installed")

import ipywidgets as widgets

from rattn_eqx.figures import training_panel
from rattn_eqx.figures.training_panel import TrainingPanel, guesses, trials

STEPS = 4


@pytest.fixture
def small(monkeypatch):
    """One layer, no convolution: what takes the time is to compile."""
    (trial,) = quick()
    model = dataclasses.replace(trial.model, num_layers=1)
    one = dataclasses.replace(trial, model=model, departures=NO_DEPARTURES, test_samples=8)
    monkeypatch.setattr(training_panel, "quick", lambda: [one])


def test_the_trials_are_those_of_ablate():
    made = trials("exp", 300)
    expected = product(grids["quick"](), {"model.feature_map": ["exp", "softmax", "relu"]})
    assert list(made.values()) == expected
    assert list(trials("relu", 300)) == ["relu", "softmax"]


def test_guesses_are_what_is_got_by_guessing():
    """The loss of giving each value its share of the sample's pairs, over samples."""
    (trial,) = quick()
    options: dict[str, Any] = dict(trial.task_options)
    batch = mqar(3, 4000, trial.training.context, **options)
    num_keys = options["vocabulary_size"] * 3 // 8
    answers = np.where(batch.scored, batch.targets, -1)
    losses = []
    end = trial.training.context + 1 - 2 * options["num_queries"]
    for tokens, row in zip(batch.tokens, answers, strict=True):
        values = [x for x in tokens[:end] if num_keys <= x < 2 * num_keys]  # fillers are other ids
        assert len(values) == options["num_pairs"]
        losses += [-math.log(values.count(answer) / len(values)) for answer in row[row >= 0]]
    chance, copied = guesses(trial).values()
    assert chance == pytest.approx(-math.log(batch.chance))
    assert copied == pytest.approx(np.mean(losses), abs=0.02)


@pytest.mark.standard_dtype_promotion
@pytest.mark.usefixtures("small")
def test_lines_and_curves(tmp_path):
    out = tmp_path / "mine.jsonl"
    (relu,) = [trial for name, trial in trials("exp", STEPS).items() if name == "relu"]
    append_rows(out, run_trial(relu, [0], None, show_progress=False))
    panel = TrainingPanel(widgets, lambda: "exp")
    panel.controls["steps"].value, panel.controls["seeds"].value, panel.controls["out"].value = STEPS, 2, str(out)
    panel.start()
    assert panel.running
    assert panel.controls["train"].disabled
    panel.wait(300)
    assert panel.error is None
    assert not panel.controls["train"].disabled
    rows = read_rows(out)
    names = [f"quick feature_map={name} steps={STEPS}" for name in ("relu", "exp", "exp", "softmax", "softmax", "relu")]
    assert [row["name"] for row in rows] == names
    assert [row["seed"] for row in rows] == [0, 0, 1, 0, 1, 1], "the line that was there was not made again"
    assert names[1] in table(rows)
    assert [row["name"] for row in panel.rows] == [names[i] for i in (1, 2, 3, 4, 0, 5)]
    for trace, of in zip(panel.curves.data, (rows[1:3], rows[3:5]), strict=False):
        assert trace.x.tolist() == list(range(1, STEPS + 1))
        expected = np.mean([[loss for _, loss in row["losses"]] for row in of], axis=0)
        np.testing.assert_allclose(trace.y, expected, atol=1e-4)
    assert [trace.name for trace in panel.curves.data] == [
        "exp", "softmax", "relu", "chance: one of the 6 values: 1.79", "copy: one of the sample's values: 1.06",
    ]  # fmt: skip

    before = out.read_bytes()
    panel.start()
    panel.wait(60)
    assert out.read_bytes() == before
    assert "already in" in panel.message.value
    np.testing.assert_allclose(panel.curves.data[0].y, np.mean([[x for _, x in row["losses"]] for row in rows[1:3]], 0))


@pytest.mark.standard_dtype_promotion
@pytest.mark.usefixtures("small")
def test_it_stops(tmp_path):
    out = tmp_path / "mine.jsonl"
    panel = TrainingPanel(widgets, lambda: "softmax")
    panel.controls["steps"].value, panel.controls["out"].value = 100_000, str(out)
    panel.start()
    with pytest.raises(TimeoutError):
        panel.wait(0.01)
    panel.stop()
    panel.wait(120)
    assert panel.error is None
    assert "Stopped." in panel.message.value
    assert read_rows(out) == []
    assert not panel.controls["train"].disabled


def test_what_cannot_be_trained_is_said(tmp_path):
    def none() -> str:
        raise ValueError("put it into a file")

    panel = TrainingPanel(widgets, none)
    panel.start()
    assert panel.error == "ValueError: put it into a file"
    assert "put it into a file" in panel.message.value
    other = tmp_path / "other.jsonl"
    other.write_text("{}\n")
    panel = TrainingPanel(widgets, lambda: "softmax")
    panel.controls["out"].value = str(other)
    panel.start()
    assert not panel.running
    assert "line 1 of" in (panel.error or "")
    assert training_panel.COLOURS["softmax"] == training_panel.ORANGE
