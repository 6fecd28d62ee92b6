"""The workbench without a browser: what it draws is what its controls say, of random vectors and of a model."""

import csv
import io
import json
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.image
import numpy as np
import pytest
from small_model import drawn

from pallas import feature_map as maps
from pallas.numerics import relative_rms
from rattn_eqx.data.tokenizers import ByteTokenizer
from rattn_eqx.evaluation.heads import head_inputs
from rattn_eqx.figures import pair_map
from rattn_eqx.model.config import ModelConfig
from rattn_eqx.weights import own

pytest.importorskip("ipywidgets", reason="ipywidgets is not installed")
pytest.importorskip("plotly", reason="plotly is not installed")

from rattn_eqx.figures import workbench as module
from rattn_eqx.figures.workbench import OWN, RANDOM, Workbench

CONFIG = ModelConfig(
    vocabulary_size=258, model_width=16, num_layers=3, num_heads=4, num_kv_heads=2, head_size=8, feed_forward_width=16,
    window=5, pattern=("local", "local", "global"), feature_map="learned", sinks=True,
)  # fmt: skip
TEXT = "The miller keeps the key."
TOKENS = np.array([256, *TEXT.encode()], np.int32)


def half(x):
    return x / 2


@pytest.fixture(scope="module")
def bench() -> Workbench:
    return Workbench(maps={"half": half}, length=20, window=4, head_size=8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made") / "model"
    own.save(drawn(CONFIG, size=0.5), folder, tokenizer=ByteTokenizer())
    return folder


def same(x: pair_map.PairMap, y: pair_map.PairMap) -> bool:
    names = ("window_weights", "softmax_weights", "feature_weights")
    return all(relative_rms(getattr(x, name), getattr(y, name)) < 1e-6 for name in names)


CHANGES = {"feature_map": "relu", "window": 7, "head_size": 16, "scale": 2.0, "length": 30, "seed": 1}


@pytest.mark.parametrize(("control", "value"), [*CHANGES.items(), ("query", 9), ("view", "arcs"), ("compare", True)])
def test_each_control_draws_another_picture(bench, control, value):
    before = [repr(trace) for trace in bench.live.widget.data]
    setattr(bench, control, value)
    assert bench.error is None
    assert getattr(bench, control) == bench.controls[control].value == value
    assert [repr(trace) for trace in bench.live.widget.data] != before


def test_what_is_drawn_is_what_the_controls_say():
    bench = Workbench(**CHANGES, compare=True, other_map="exp")
    q, k, v = pair_map.random_head(length=30, head_size=16, scale=2, seed=1)
    for side, name in zip(bench.sides, ("relu", "exp"), strict=True):
        assert same(side.found, pair_map.pair_map(q, k, v, window=7, feature_map=maps.named[name]))


def test_a_query_at_the_end_stays_there_and_another_stays_where_it_is(folder):
    bench = Workbench(length=30)
    assert bench.query == 29
    bench.length = 50
    assert bench.query == 49
    bench.query = 10
    bench.set(source=str(folder), text=TEXT)
    assert bench.query == 10
    assert Workbench(folder, text=TEXT).query == len(TOKENS) - 1
    assert Workbench(length=100, query=63).query == 63


def test_the_mouse_does_what_python_does(bench):
    bench.controls["window"].value = 3
    assert bench.sides[0].found.window == 3
    (heat, *_) = bench.live.widget.data
    heat._dispatch_on_click(points(query=6), None)
    assert bench.query == 6


def points(query: int):
    from plotly.callbacks import Points

    return Points(point_inds=[(query, 0)], xs=[0], ys=[query], trace_name="", trace_index=0)


def test_several_are_set_and_drawn_once(bench, monkeypatch):
    drawn = []
    show = bench.live.show
    monkeypatch.setattr(bench.live, "show", lambda *arguments: drawn.append(arguments) or show(*arguments))
    bench.set(window=6, query=2, feature_map="exp", length=25)
    assert len(drawn) == 1
    bench.add("again", lambda x: 3 * x)
    assert len(drawn) == 2


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"windows": 3}, "Workbench: no setting windows; the settings are source, "),
        ({"window": -1}, "Workbench: window must lie between 0 and 20; got -1"),
        ({"length": 0}, "Workbench: length must lie between 1 and 1024; got 0"),
        ({"feature_map": "none"}, "Workbench: feature_map cannot be 'none': "),
        ({"seed": "x"}, "Workbench: seed cannot be 'x': "),
    ],
)
def test_what_is_refused(settings, said):
    bench = Workbench(length=20)
    with pytest.raises(ValueError, match=f"^{said}"):
        bench.set(**settings)
    assert bench.length == 20


def test_a_head_is_the_models(folder):
    bench = Workbench(folder, text=TEXT, layer=1, head=2)
    assert (bench.window, bench.feature_map, bench.controls["query"].max) == (5, OWN, 25)
    head = head_inputs(drawn(CONFIG, size=0.5), TOKENS, 1, 2)
    assert head.feature_map is not None
    options: dict[str, Any] = dict(q_window=head.q_window, k_window=head.k_window, sink=head.sink)
    expected = pair_map.pair_map(head.q, head.k, head.v, window=5, feature_map=head.feature_map, **options)
    assert same(bench.sides[0].found, expected)
    bench.head = 3
    assert not same(bench.sides[0].found, expected)
    bench.set(head=2, compare=True, other_layer=1, other_head=3, other_map="relu")
    assert same(bench.sides[0].found, expected)
    assert bench.sides[1].where == "layer 1, head 3"
    head = head_inputs(drawn(CONFIG, size=0.5), TOKENS, 1, 3)
    options = dict(q_window=head.q_window, k_window=head.k_window, sink=head.sink)
    assert same(
        bench.sides[1].found, pair_map.pair_map(head.q, head.k, head.v, window=5, feature_map=maps.relu, **options)
    )
    assert bench.live.widget.layout.xaxis5.ticktext[:5] == ("¶", "T", "h", "e", "␣")
    bench.source = RANDOM
    assert OWN not in bench.controls["feature_map"].options
    assert bench.sides[0].where == ""


def test_what_is_the_readers_own_is_said(folder):
    model = drawn(CONFIG, size=0.5)
    bench = Workbench(model, tokenizer=ByteTokenizer(), text=TEXT, length=12, window=3, query=63)
    assert bench.sentences[:2] == [
        "Query 63 is beyond the 12 tokens: the last one's row is drawn.",
        "The text has 26 tokens: the first 12 are read; length says how many.",
    ]
    assert "In the model, the window of layer 0 is 5." in bench.sentences
    bench.set(layer=2, feature_map="relu")
    assert any(text.startswith("Layer 2 is global: in the model it is full attention.") for text in bench.sentences)
    with pytest.raises(ValueError, match="has no tokenizer; give the model and one"):
        Workbench(model)
    with pytest.raises(ValueError, match="nowhere"):
        bench.source = "nowhere"
    assert bench.source == "the model given"


@pytest.mark.parametrize(
    ("feature_map", "said"),
    [
        (lambda x: 0 * x, "mine gives 0 for every residual pair: the branch adds nothing."),
        (lambda x: jnp.where(x[..., :1] > 0, x, 0), "mine gives 0 for every residual pair of "),
        (maps.identity, "% of the weights of mine are negative: those values are subtracted (black)."),
    ],
    ids=["zero", "sometimes zero", "negative"],
)
def test_what_is_odd_is_said_beside_the_picture(bench, feature_map, said):
    bench.set(length=20, window=4)
    bench.add("mine", feature_map)
    assert bench.error is None
    assert any(said in text for text in bench.sentences)
    assert said in bench.message.value
    bench.remove("mine")
    assert not any("mine" in text for text in bench.sentences)


def test_a_window_beyond_the_length_stays_and_is_said():
    bench = Workbench(length=40, window=30)
    bench.controls["length"].value = 20
    assert bench.window == 30
    assert "The window, 30, is beyond the 20 tokens: the residual branch has no pair." in bench.sentences
    bench.window = 19
    assert not any("beyond the 20 tokens: the residual" in text for text in bench.sentences)
    assert bench.sides[0].found.in_state.sum() == 1


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        (lambda x: x.sum(axis=-1), "ValueError: pair_map: phi_q and phi_k must map"),
        (lambda x: jnp.log(x - 100), "ValueError: pair_map: features must be finite"),
        (
            lambda x: x - x.max(axis=0, keepdims=True),
            "ValueError: pair_map: phi_q must act on the last axis alone; <lambda>",
        ),
        ("<b>no place</b>", "Workbench: '<b>no place</b>' must be a map, or a place such as mine.py:phi"),
    ],
    ids=["no axis", "not finite", "mixes tokens", "no map"],
)
def test_a_bad_map_is_said_and_the_last_picture_stays(bench, bad, said):
    bench.feature_map = "relu"
    before = [repr(trace) for trace in bench.live.widget.data]
    bench._press(lambda: bench.add("bad", bad))
    assert said in bench.error
    assert "workbench-error" in bench.message.value
    assert "<b>no place" not in bench.message.value, "the message is not escaped"
    assert [repr(trace) for trace in bench.live.widget.data] == before
    bench.feature_map = "exp"
    assert bench.error is None


def test_a_map_of_a_file_is_added_anew_and_removed(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("def phi(x):\n    return x * x\n")
    bench, place = Workbench(length=20, window=4, head_size=8), f"{file}:phi"
    bench.add(place)
    first = bench.sides[0].found
    file.write_text(
        "def phi(x):\n    return x * x * x\n\n\ndef mixing(x):\n    return x - x.max(axis=0, keepdims=True)\n"
    )
    bench.add(place)
    assert not same(bench.sides[0].found, first)
    assert bench.controls["feature_map"].options.count(place) == 1
    with pytest.raises(ValueError, match="must act on the last axis alone; mixing"):
        bench.add(f"{file}:mixing")
    assert f"{file}:mixing" not in bench.controls["feature_map"].options
    bench.remove(place)
    assert bench.feature_map == "softmax"
    with pytest.raises(ValueError, match="'relu' was not added; maps that were: none"):
        bench.remove("relu")


def test_a_line_of_python_makes_the_view_again(bench, folder, tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("def phi(x):\n    return x * x\n")
    bench.set(feature_map="half", window=5, length=22, scale=0.5, query=7, view="arcs", compare=True, other_map="exp")
    of_model = Workbench(str(folder), {f"{file}:phi": f"{file}:phi"}, text=TEXT, layer=1, head=3, window=2)
    of_model.set(compare=True, other_map=f"{file}:phi", other_head=1)
    for one in (bench, of_model):
        again = eval(one.line.value, {"Workbench": Workbench, "half": half})
        assert again.line.value == one.line.value == one.as_python()
        assert len(again.sides) == len(one.sides) == 2
        assert all(same(x.found, y.found) for x, y in zip(again.sides, one.sides, strict=True))
        names = ("query", "view", "window", "layer", "head", "other_head", "scale", "length", "seed")
        assert [getattr(one, name) for name in names] == [getattr(again, name) for name in names]


def test_exports_are_what_is_drawn(folder, tmp_path):
    bench = Workbench(folder, text=TEXT, compare=True, other_map="identity")
    a, b = (side.found for side in bench.sides)
    rows = list(csv.DictReader(bench.export(tmp_path / "head.csv").read_text("utf-8").splitlines()))
    assert len(rows) == 2 * (a.in_window.sum() + a.in_state.sum())
    for row in rows[:: len(rows) // 50]:
        found, at = (a if row["side"] == "A" else b), (int(row["query"]), int(row["key"]))
        for name in ("window", "softmax", "feature"):
            assert float(row[name]) == pytest.approx(getattr(found, f"{name}_weights")[at], rel=1e-5)
        assert (row["branch"] == "window") == found.in_window[at]
        assert row["query_token"] == ("¶" + TEXT.replace(" ", "␣"))[at[0]]
    content = json.loads(bench.export(tmp_path / "head.json").read_text("utf-8"))
    assert content["settings"]["python"] == bench.as_python()
    assert [side["distance"] for side in content["sides"]] == pytest.approx([a.distance, b.distance])
    picture = matplotlib.image.imread(bench.export(tmp_path / "head.png"))
    assert picture.shape[:2] == (2 * 740, 1200)
    title = "layer 0, head 0, φ = the model's own, W = 5, T = 26"
    assert bench.figure().get_suptitle() == title
    alone = matplotlib.image.imread(io.BytesIO(pair_map.png(pair_map.draw(a, title), 100)))
    np.testing.assert_allclose(picture[:740], alone[..., :3], atol=1e-6)
    for name, said in (("head.txt", "must end in .png, .csv, .json; got 'head.txt'"), ("head.csv", "exists already")):
        with pytest.raises(ValueError, match=said):
            bench.export(tmp_path / name)


def test_pairs_are_computed_once_for_all_that_is_drawn_of_them(monkeypatch):
    bench, computed = Workbench(length=20), []
    find = pair_map.pair_map
    monkeypatch.setattr(module.pair_map, "pair_map", lambda *a, **b: computed.append(1) or find(*a, **b))
    bench.query, bench.view = 3, "arcs"
    assert not computed
    bench.window = 5
    assert len(computed) == 1


def test_a_saved_page_says_what_it_cannot_show(bench):
    bundle = bench._repr_mimebundle_()
    assert bundle["text/plain"] == "the live workbench: run the notebook to see and use it"
    assert bundle["application/vnd.jupyter.widget-view+json"]["model_id"] == bench.box.model_id


def test_a_learned_map_begins_as_a_hedgehog():
    bench = Workbench(length=20, head_size=8, feature_map="Hedgehog", window=4)
    hedgehog = maps.Hedgehog(8, key=jax.random.key(0))
    expected = pair_map.pair_map(*pair_map.random_head(length=20, head_size=8), window=4, feature_map=hedgehog)
    assert same(bench.sides[0].found, expected)


def test_the_map_to_train_is_the_one_at_hand(bench, folder, tmp_path):
    bench.set(feature_map="Hedgehog")
    assert bench._config() == "learned"
    bench.feature_map = "half"
    with pytest.raises(ValueError, match=r"^Train this map: half is known to this session alone.*put it into a file"):
        bench._config()
    assert Workbench(folder)._config() == "learned"
    (tmp_path / "mine.py").write_text("def phi(x):\n    return x * x\n")
    bench.add("square", f"{tmp_path}/mine.py:phi")
    assert bench._config().startswith("mine.py:phi:")
