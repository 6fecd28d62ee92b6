"""The panel of notebook 06 without a browser: every control draws, and a bad map leaves the last picture."""

import io

import jax.numpy as jnp
import matplotlib.image
import numpy as np
import pytest

from pallas import feature_map as maps
from rattn_eqx.figures import pair_map, panel

pytest.importorskip("ipywidgets", reason="ipywidgets is not installed")


@pytest.fixture(scope="module")
def live() -> panel.Panel:
    return panel.Panel({"half": lambda x: x / 2}, length=20, window=4, head_size=8)


def test_offers_the_named_maps_and_ones_own(live):
    assert live.feature_map.options == (*maps.named, "half")
    assert live.feature_map.value == "softmax"


CHANGES = {"feature_map": "relu", "window": 7, "head_size": 16, "scale": 2}


@pytest.mark.parametrize(("control", "value"), CHANGES.items())
def test_each_control_draws_another_picture(live, control, value):
    before = live.picture.value
    getattr(live, control).value = value
    assert live.error is None
    assert live.picture.value != before
    assert live.message.value.startswith("drawn in ")


def test_the_picture_is_the_figure_of_the_controls(live):
    for control, value in CHANGES.items():
        getattr(live, control).value = value
    q, k, v = pair_map.random_head(length=20, head_size=16, scale=2, seed=0)
    found = pair_map.pair_map(q, k, v, window=7, feature_map=maps.relu)
    title = "φ = relu, W = 7, d = 16, scale 2, T = 20"
    drawn, expected = (
        matplotlib.image.imread(io.BytesIO(x)) for x in (live.picture.value, pair_map.png(pair_map.draw(found, title)))
    )
    np.testing.assert_array_equal(drawn, expected)


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        (lambda x: x.sum(axis=-1), "mine: ValueError: pair_map: phi_q and phi_k must map"),
        (lambda x: jnp.log(x - 100), "mine: ValueError: pair_map: features must be finite"),
        (lambda x: x @ jnp.ones((3, 3)), "mine: ValueError: pair_map: phi_q and phi_k must map"),
        ("<b>no callable</b>", "mine: TypeCheckError: "),
    ],
    ids=["no axis", "not finite", "another head size", "no callable"],
)
def test_a_bad_map_is_said_and_the_last_picture_stays(live, bad, said):
    before = live.picture.value
    live.add("mine", bad)
    assert live.picture.value == before
    assert said in live.message.value
    assert "panel-error" in live.message.value
    assert "<b>no callable" not in live.message.value, "the message is not escaped"
    live.feature_map.value = "identity"
    assert live.error is None
    assert live.picture.value != before
    live.feature_map.value = "relu"


def test_a_map_of_the_same_name_takes_its_place(live):
    live.add("mine", lambda x: x)
    first = live.picture.value
    assert live.feature_map.value == "mine"
    live.add("mine", lambda x: x**2)
    assert live.picture.value != first
    assert live.feature_map.options.count("mine") == 1


def test_draws_once_for_each_change(live, monkeypatch):
    drawn = []
    draw = pair_map.draw
    monkeypatch.setattr(pair_map, "draw", lambda *arguments: drawn.append(arguments) or draw(*arguments))
    live.add("another", lambda x: 3 * x)
    assert len(drawn) == 1
    live.window.value += 1
    assert len(drawn) == 2


def test_a_saved_page_says_what_it_cannot_show(live):
    bundle = live._repr_mimebundle_()
    assert bundle["text/plain"] == "the live panel: run the notebook to see and use it"
    assert bundle["application/vnd.jupyter.widget-view+json"]["model_id"] == live.box.model_id
