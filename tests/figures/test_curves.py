"""Figures of runs."""

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from rattn_eqx.evaluation.attribution import EffectiveMemory
from rattn_eqx.figures import curves, pair_map
from rattn_eqx.figures.names import BLACK, BLUE, ORANGE, PURPLE

ROWS = [{"step": step, "bits_per_byte": 8 - 0.05 * step} for step in range(1, 51)]
ROWS += [{"step": step, "validation_bits_per_byte": 8.1 - 0.05 * step} for step in (25, 50)]


def texts(figure: Figure) -> list[str]:
    legend = figure.axes[0].get_legend()
    assert legend is not None
    return [text.get_text() for text in legend.get_texts()]


def test_axes_are_labelled_and_the_legend_names_everything():
    figure = curves.loss_curves({"first": ROWS, "second": ROWS[::2]}, {"order-3 byte model": 6.25, "gzip -9": 7.0})
    (axes,) = figure.axes
    assert axes.get_xlabel() == "optimiser step"
    assert axes.get_ylabel() == "bits per byte (log scale)"
    assert texts(figure) == [
        *("first, training", "first, validation", "second, training", "second, validation"),
        *("order-3 byte model: 6.25", "gzip -9: 7.00"),
    ]


def test_curves_show_what_was_measured():
    figure = curves.loss_curves({"first": ROWS}, {"gzip -9": 7.0}, smooth=10)
    training, validation, line = figure.axes[0].get_lines()
    steps, means = np.asarray(training.get_xdata()), np.asarray(training.get_ydata())
    assert steps.tolist() == list(range(10, 51))
    np.testing.assert_allclose(means, 8 - 0.05 * (steps - 4.5), err_msg="mean of the last ten steps")
    assert np.asarray(validation.get_xdata()).tolist() == [25, 50]
    np.testing.assert_allclose(np.asarray(validation.get_ydata()), [6.85, 5.6])
    assert list(np.asarray(line.get_ydata())) == [7.0, 7.0]
    low, high = figure.axes[0].get_ylim()
    assert low < 5.6 < 8.0 - 0.05 * 5.5 < high
    assert training.get_color() == validation.get_color()
    assert training.get_color() not in (BLACK, BLUE, ORANGE), "a colour that says what the run is, which nobody said"
    chosen = curves.loss_curves({"first": ROWS}, colours={"first": ORANGE})
    assert {drawn.get_color() for drawn in chosen.axes[0].get_lines()} == {ORANGE}


@pytest.mark.parametrize("rows", [[], ROWS[:1], ROWS[-1:], ROWS[:3]], ids=["none", "one step", "validation", "three"])
@pytest.mark.parametrize("lines", [None, {"gzip -9": 7.0}])
def test_few_rows_are_drawn_and_saved(tmp_path, rows, lines):
    path = tmp_path / "loss.png"
    curves.save(curves.loss_curves({"first": rows}, lines), path)
    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_a_skipped_step_leaves_the_figure_readable(tmp_path):
    rows = [*ROWS[:20], {"step": 21, "bits_per_byte": float("nan")}, *ROWS[21:]]
    figure = curves.loss_curves({"first": rows})
    curves.save(figure, tmp_path / "loss.png")
    low, high = figure.axes[0].get_ylim()
    assert 0 < low < 5.6 < high < 16
    drawn = np.asarray(figure.axes[0].get_lines()[0].get_ydata(), float)
    assert np.isfinite(drawn[-10:]).all()


def test_everything_measured_lies_inside_the_axes():
    short = [{"step": step, "bits_per_byte": 8.5} for step in range(1, 7)]
    short += [{"step": 6, "validation_bits_per_byte": 7.0}]
    figure = curves.loss_curves({"first": short}, {"order-3 byte model": 1.6, "gzip -9": 6.6})
    low, high = figure.axes[0].get_ylim()
    assert low < 1.6
    assert high > 7.0, "the run's last loss and a line to compare with are cut off"


def line(residual: bool, window: int, seed: int, bits: float) -> dict:
    model = {"residual": residual, "window": window}
    tests = [{"length": length, "exact": 1 / seed} for length in (512, 2048)]
    return {
        "trial": {"model": model, "training": {"context": 512}},
        "seed": seed,
        "bits_per_byte": bits,
        "tests": tests,
    }


def test_results_by_window_are_means_of_seeds():
    rows = [
        line(residual, window, seed, seed + window)
        for residual in (True, False)
        for window in (8, 64)
        for seed in (1, 3)
    ]
    rows += [line(False, 2**20, seed, seed) for seed in (1, 2)]
    figure = curves.by_window(rows, "bits_per_byte", "exact 2048")
    axes, other = figure.axes
    assert axes.get_ylabel() == "bits per byte"
    assert other.get_ylabel() == "whole answers right at length 2,048"
    means = [np.asarray(container[0].get_ydata()).tolist() for container in axes.containers]
    assert means == [[10.0, 66.0], [10.0, 66.0]]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        "full attention",
        "window alone",
        "RATTENTION",
    ]
    assert 1.5 in [np.asarray(line.get_ydata())[0] for line in axes.get_lines()]
    assert [container[0].get_color() for container in axes.containers] == [BLUE, ORANGE]


def test_intervals_of_shares_stay_between_0_and_1():
    """1, 1/5 and 1/7: by Student's t their mean's interval would be -0.65 to 1.55."""
    rows = [line(residual, 8, seed, seed) for residual in (True, False) for seed in (1, 5, 7)]
    rows += [line(False, 2**20, seed, seed) for seed in (1, 5, 7)]
    axes = curves.by_window(rows, "exact 2048").axes[0]
    segments = [part.get_segments() for drawn in axes.containers for part in drawn[2]]
    ends = [[y for _, y in segment] for (segment,) in segments]
    assert ends == [pytest.approx([1 / 7, 1])] * 2
    (span,) = axes.patches
    assert isinstance(span, Rectangle)
    assert (span.get_y(), span.get_height()) == pytest.approx((1 / 7, 6 / 7))


def test_differences_are_drawn_from_the_baseline_and_coloured_where_they_are_clear():
    rows = [line(True, 8, seed, seed) | {"name": "base"} for seed in (1, 2, 3)]
    rows += [line(True, 8, seed, seed + 1) | {"name": "worse"} for seed in (1, 2, 3)]
    rows += [line(True, 8, seed, seed + noise) | {"name": "alike"} for seed, noise in ((1, -1), (2, 0), (3, 1.5))]
    (axes,) = curves.differences(rows, ["worse", "alike"], "base", "bits_per_byte").axes
    assert [text.get_text() for text in axes.get_yticklabels()] == ["worse", "alike"]
    centres = [container[0] for container in axes.containers]
    assert [np.asarray(centre.get_xdata()).item() for centre in centres] == pytest.approx([1.0, 0.5 / 3])
    assert [centre.get_markerfacecolor() for centre in centres] == [PURPLE, "white"]


def test_results_by_length_show_the_length_of_training():
    figure = curves.by_length({"one": [line(True, 8, seed, 0) for seed in (1, 2)]}, 512)
    (axes,) = figure.axes
    assert texts(figure) == ["one", "length of training"]
    assert np.asarray(axes.get_lines()[0].get_ydata()).tolist() == [0.75, 0.75]


def test_a_curve_by_length_has_the_colour_of_what_it_is():
    kinds = {"a map": (True, 8), "full": (False, 2**20), "alone": (False, 8), "another map": (True, 8)}
    figure = curves.by_length({name: [line(*kind, 1, 0)] for name, kind in kinds.items()}, 512)
    means = [drawn for drawn in figure.axes[0].get_lines() if str(drawn.get_label()).lstrip("\u200b") in kinds]
    assert [drawn.get_color() for drawn in means] == [ORANGE, BLACK, BLUE, ORANGE]
    assert means[0].get_linestyle() != means[3].get_linestyle()


@pytest.mark.parametrize("name", [r"a$\x$", "_hidden", "two\nlines", "not UTF-8 \udce9"])
def test_names_are_drawn_as_they_are(name, tmp_path):
    drawn = name.encode("unicode_escape").decode("ascii") if not name.isprintable() else name
    memory = EffectiveMemory(np.array([1, 0.5, 0]), np.array([1, 1, 1]))
    rows = [line(True, 8, seed, seed) | {"name": each} for seed in (1, 2) for each in (name, "b")]
    title = pair_map.pair_map(*pair_map.random_head(length=4, head_size=2), window=2, feature_map=lambda x: x)
    figures = {
        "loss": curves.loss_curves({name: ROWS}, {name: 7.0}),
        "memory": curves.effective_memory({name: memory}, 2, 1),
        "length": curves.by_length({name: rows}, 512),
        "differences": curves.differences(rows, [name, "b"], name, "bits_per_byte"),
        "title": pair_map.draw(title, name),
    }
    for each, figure in figures.items():
        curves.save(figure, tmp_path / f"{each}.png")
    assert texts(figures["loss"]) == [f"{drawn}, training", f"{drawn}, validation", f"{drawn}: 7.00"]
    assert texts(figures["memory"])[0] == texts(figures["length"])[0] == figures["title"].get_suptitle() == drawn
    (axes,) = figures["differences"].axes
    assert [text.get_text() for text in axes.get_yticklabels()] == [drawn, "b"]
    assert axes.get_xlabel() == f"bits per byte, less that of '{drawn}'"
