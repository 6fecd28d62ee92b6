"""Figures of the benchmark of generation: what was measured is where it was measured, and nothing else is drawn."""

import json

import numpy as np
import pytest

from rattn_eqx.figures import inference

ABOUT = {"device": "a device", "date": "2026-11-28T10:00:00", "commit": "abc", "versions": {"jax": "0.11.2"},
    "dtype": "bfloat16", "bandwidth": 2e12}  # fmt: skip


def row(kind: str, attention: str, context: int, batch: int, **measured) -> dict:
    return {"kind": kind, "attention": attention, "context": context, "batch": batch} | measured | ABOUT


def step(attention: str, context: int, batch: int, milliseconds: float) -> dict:
    needed = {"parameters": 10**9, "keys and values": context * batch * 10**4, "states": 0}
    return row("decode", attention, context, batch, median=milliseconds / 1e3, bytes=needed)


ROWS = [
    step("RATTENTION 512", 8192, 64, 7.0),  # a file may hold a case twice, and in any order
    step("RATTENTION 512", 8192, 64, 2.0),
    step("RATTENTION 512", 4096, 64, 1.0),
    step("full attention", 4096, 64, 5.0),
    row("decode", "full attention", 8192, 64, **{"not available": "no memory"}),
    row("decode", "full attention", 8192, 256, **{"not available": "no memory"}),
    step("RATTENTION 512", 4096, 1, 0.5),
    row("prefill", "window 4096", 4096, 1, median=0.25, piece=4096),
    row("prefill", "full attention", 4096, 1, **{"not available": "no memory"}),
]


def drawn(axes) -> list[tuple[str, str, list, list]]:
    """(colour, style, places, heights) of each line that has points."""
    lines = [(x.get_color(), x.get_linestyle(), np.asarray(x.get_xdata()), np.asarray(x.get_ydata()))
        for x in axes.get_lines()]  # fmt: skip
    return [(colour, style, x.tolist(), y.tolist()) for colour, style, x, y in lines if len(x)]


def test_steps_stand_in_the_panel_of_their_batch_with_their_floor():
    figure = inference.step_times(ROWS)
    alone, many = figure.axes
    assert [axes.get_title() for axes in figure.axes] == ["batch 1", "batch 64"]
    orange, black = "#E69F00", "#222222"
    floor = [1e3 * (10**9 + context * 64 * 10**4) / 2e12 for context in (4096, 8192)]
    assert drawn(alone) == [(orange, "-", [4096], [0.5]), (orange, "--", [4096], [pytest.approx(0.52048)])]
    assert drawn(many) == [
        (orange, "-", [4096, 8192], [1.0, 2.0]),
        (orange, "--", [4096, 8192], pytest.approx(floor)),
        (black, "-", [4096], [5.0]),
        (black, "--", [4096], pytest.approx(floor[:1])),
    ]
    assert alone.get_ylabel() == "milliseconds a step"
    (legend,) = figure.legends
    words = [text.get_text() for text in legend.get_texts()]
    assert words[:2] == ["RATTENTION 512", "full attention"]
    assert figure.get_supxlabel() == "a device, bfloat16, 2026-11-28, commit abc, jax 0.11.2"


def test_without_bytes_there_is_no_floor():
    (axes,) = inference.step_times([row("decode", "window 64", 64, 1, median=1e-3)]).axes
    assert drawn(axes) == [("#0072B2", "-", [64], [1.0])]


def test_prompts():
    (axes,) = inference.prefill_times(ROWS).axes
    assert drawn(axes) == [("#0072B2", "-", [4096], [250.0])]
    assert axes.get_xlabel() == "prompt (tokens)"


@pytest.mark.parametrize("rows", [[], ROWS[4:6]], ids=["none", "none that was available"])
def test_nothing_measured_is_said(rows):
    for draw in (inference.step_times, inference.prefill_times):
        (axes,) = draw(rows).axes
        assert [text.get_text() for text in axes.texts] == ["no row has a time"]


def test_a_file_is_drawn(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS), "utf-8")
    assert inference.read_rows(file) == ROWS
    for what in ("decode", "prefill"):
        out = tmp_path / f"{what}.png"
        assert inference.main([str(file), "--what", what, "--out", str(out)]) == 0
        assert out.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


@pytest.mark.parametrize("line", ["{", "[]", '{"kind": "decode"}'])
def test_a_line_that_is_no_row_is_named(tmp_path, line):
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(ROWS[0]) + "\n" + line + "\n", "utf-8")
    with pytest.raises(ValueError, match=r"line 2 of .*rows.jsonl is no row"):
        inference.read_rows(file)
