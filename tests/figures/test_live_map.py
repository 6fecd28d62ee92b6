"""The colours and lines of the live picture are the weights of the head."""

import numpy as np
import pytest
from matplotlib.colors import to_rgb

from pallas import feature_map as maps
from rattn_eqx.figures import live_map, pair_map
from rattn_eqx.figures.names import BLUE, ORANGE

pytest.importorskip("plotly", reason="plotly is not installed")


def found(name: str = "identity", window: int = 6):
    return pair_map.pair_map(*pair_map.random_head(length=20, head_size=8), window=window, feature_map=maps.named[name])


def test_a_cell_has_the_colour_of_its_branch_and_size():
    pairs = found()
    made = live_map.codes(pairs, pairs.feature_weights)
    near, far = pairs.in_window, pairs.in_state
    negative = far & (pairs.feature_weights < 0)
    assert negative.any()
    assert (made[negative] == live_map.NEGATIVE_CODE).all()
    assert (made[~near & ~far] == live_map.FUTURE_CODE).all()
    first = live_map.RESIDUAL_CODE
    assert (made[near] >= live_map.WINDOW_CODE).all()
    assert (made[near] < first).all()
    assert (made[far & ~negative] >= first).all()
    for t in range(7, 20):  # darker is more, in each row and branch
        for pairs_of, weights in ((near, pairs.window_weights), (far & ~negative, pairs.feature_weights)):
            row, shades = weights[t][pairs_of[t]], made[t][pairs_of[t]].astype(int)
            assert (np.diff(shades[np.argsort(row)]) >= 0).all()
    mean = live_map.codes(pairs, far / np.maximum(far.sum(axis=1, keepdims=True), 1))
    assert set(mean[far].tolist()) <= {first + 31, first + 32}, "the mean is the middle of the shades"


def test_without_weights_the_colour_is_the_branch():
    pairs = found()
    made = live_map.codes(pairs, None)
    scale = live_map.colour_scale(ORANGE)
    assert len(scale) == live_map.LAST_CODE + 1
    for where, colour in ((pairs.in_window, BLUE), (pairs.in_state, ORANGE)):
        (code,) = set(made[where].tolist())
        assert np.abs(np.subtract(to_rgb(scale[code][1]), to_rgb(colour))).max() < 0.1


def test_arcs_go_from_the_query_to_the_keys_that_are_told():
    keys = np.zeros(20, bool)
    keys[[2, 9, 12]] = True
    x, y = live_map.arcs(12, keys, -1.0)
    assert set(x[np.abs(y) < 1e-6].round(4).tolist()) == {2.0, 9.0, 12.0}
    assert y.max() < 1e-6
    assert x[np.argmin(y)] == pytest.approx(7), "the longest is the deepest"


def shown(live) -> list[int]:
    """The traces in which something is drawn."""
    has = lambda trace: len(trace.z if trace.type == "heatmap" else trace.x) > 0
    return [number for number, trace in enumerate(live.widget.data) if trace.visible is not False and has(trace)]


def picture(live):
    return [(x.visible, x.z if x.type == "heatmap" else (x.x, x.y)) for x in live.widget.data]


@pytest.mark.parametrize("view", ["bars", "arcs"])
def test_the_row_is_the_querys_and_each_side_has_its_own(view):
    live, labels = live_map.LiveMap(print), [f"t{i}" for i in range(20)]
    one, other = (live_map.Side(name, found(name)) for name in ("relu", "exp"))
    live.show([one, other], labels, 15, view)
    visible = shown(live)
    parts = range(3) if view == "bars" else range(3, 9)
    assert visible == [0, 1, 2, 3, *(4 + part for part in parts), *(13 + part for part in parts)]
    for pane, weights in ((1, one.found.feature_weights), (3, other.found.feature_weights)):
        expected = np.where(one.found.in_window, one.found.window_weights, weights)
        np.testing.assert_allclose(live.widget.data[pane].customdata, expected, rtol=1e-6)
    if view == "bars":
        for first, side in ((4, one), (13, other)):
            near, far, exact = live.widget.data[first : first + 3]
            np.testing.assert_allclose(near.y, side.found.window_weights[15, 10:16], rtol=1e-6)
            np.testing.assert_allclose(far.y, side.found.feature_weights[15, :10], rtol=1e-6)
            np.testing.assert_allclose(exact.y, side.found.softmax_weights[15, :10], rtol=1e-6)
            assert far.x.tolist() == list(range(10))
    else:
        near = np.concatenate([live.widget.data[4 + part].x for part in range(3, 6)])
        far = np.concatenate([live.widget.data[4 + part].x for part in range(6, 9)])
        assert near.min() >= 10
        assert far.min() < 10
    live.show([one], labels, 15, view)
    assert shown(live)[-1] < 13


def test_only_what_has_changed_is_sent():
    live, labels = live_map.LiveMap(print), [str(i) for i in range(20)]
    side = live_map.Side("relu", found("relu"))
    live.show([side], labels, 15, "bars")
    before = picture(live)
    live.show([side], labels, 16, "bars")
    changed = [number for number, (x, y) in enumerate(zip(before, picture(live), strict=True)) if repr(x) != repr(y)]
    assert changed == [4, 5, 6]
    assert live.widget.layout.shapes[0].y0 == 16
    assert live.widget.layout.annotations[4].text == "what query 16 reads: shares of each branch"


def test_a_name_is_no_markup():
    live = live_map.LiveMap(print)
    live.show([live_map.Side("<b>mine", found())], ["<"] * 20, 3, "bars")
    texts = [x.text for x in live.widget.layout.annotations]
    assert texts[2] == "φ = &lt;b&gt;mine"
    assert texts[4].startswith("what query 3, '&lt;'")
