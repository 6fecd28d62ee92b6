"""What a branch contributes: off, the other one is left; parts sum to the whole; memory ends exactly where it must."""

import dataclasses
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import Array, Float, Int
from test_text_loss import CONTEXT
from training_child import MODEL, SAMPLE

import pallas
from rattn_eqx.data.batches import validation_batches
from rattn_eqx.data.corpus import build_corpus
from rattn_eqx.data.tokenizers import ByteTokenizer, tokenize
from rattn_eqx.evaluation import attribution
from rattn_eqx.evaluation.attribution import (
    EffectiveMemory,
    accuracy_by_branch,
    branch_shares,
    contributions,
    effective_memory,
    loss_by_branch,
    switched,
)
from rattn_eqx.evaluation.recall import predict
from rattn_eqx.evaluation.text import evaluate, switch_off
from rattn_eqx.figures import curves
from rattn_eqx.model.attention import RAttention
from rattn_eqx.model.language_model import LanguageModel
from rattn_eqx.tasks.recall import mqar, score

WINDOW, LAYERS = 5, 2
REACH = LAYERS * (WINDOW - 1)


def make_model(**changes) -> LanguageModel:
    changes = {
        "num_layers": LAYERS,
        "pattern": ("local",),
        "window": WINDOW,
        "swa_gain": 0.7,
        "rla_gain": 0.4,
    } | changes
    return eqx.filter_jit(LanguageModel)(dataclasses.replace(MODEL, **changes), key=jax.random.key(0))


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return make_model()


@pytest.fixture(scope="module")
def tokens() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (3, 24)).astype(np.int32)


def replace_layers(model: LanguageModel, change: Callable) -> LanguageModel:
    layers = lambda model: [block.attention for block in model.blocks]
    return eqx.tree_at(layers, model, [change(layer) for layer in layers(model)])


class Wrapped(eqx.Module):
    """A local layer of another class, which has gains and is called as `RAttention` is."""

    layer: RAttention

    @property
    def swa_gain(self) -> Array | None:
        return self.layer.swa_gain

    @property
    def rla_gain(self) -> Array | None:
        return self.layer.rla_gain

    def __call__(self, x: Array, segment_ids: Array | None = None) -> Array:
        return self.layer(x, segment_ids)


class NormedSum(Wrapped):
    """Not linear in its gains."""

    def __call__(self, x: Array, segment_ids: Array | None = None) -> Array:
        y = self.layer(x, segment_ids)
        return y / (1 + jnp.linalg.norm(y, axis=-1, keepdims=True))


class Plain(eqx.Module):
    """One branch alone, from the projections on."""

    layer: Any
    branch: str

    def __call__(self, x: Float[Array, "t m"], segment_ids: Int[Array, "t"] | None = None) -> Float[Array, "t m"]:
        layer, t = self.layer, len(x)
        q, k, v = layer.projections.project(x)
        if self.branch == "residual":
            heads: Any = pallas.residual_linear_attention(q, k, v, window=layer.window, implementation="reference")
        else:
            angles = np.arange(t)[:, None] * layer.rope_theta ** (-np.arange(0, 8, 2) / 8)
            cos, sin = (jnp.asarray(f(angles), jnp.float32)[:, None] for f in (np.cos, np.sin))
            turn = lambda y: jnp.concatenate(
                [y[..., :4] * cos - y[..., 4:] * sin, y[..., 4:] * cos + y[..., :4] * sin], -1
            )
            q, k = map(turn, layer.projections.norm(q, k))
            heads = jax.nn.dot_product_attention(q, k, v, is_causal=True, local_window_size=(layer.window - 1, 0))
        heads = heads / jnp.sqrt(jnp.mean(heads**2, axis=-1, keepdims=True) + 1e-6)
        gain = layer.rla_gain if self.branch == "residual" else layer.swa_gain
        assert gain is not None
        return jnp.einsum("thd,hdm->tm", heads * gain[None], layer.projections.out_weight)


@pytest.mark.parametrize("off", ["window", "residual"])
def test_switched_off_equals_the_other_branch_computed_alone(model, tokens, off):
    left = {"window": "residual", "residual": "window"}[off]
    plain = replace_layers(model, lambda layer: Plain(layer, left))
    got, expected = (eqx.filter_jit(m)(jnp.asarray(tokens[0])) for m in (switch_off(model, off), plain))
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)
    assert jnp.abs(got - eqx.filter_jit(model)(jnp.asarray(tokens[0]))).max() > 1e-2


def test_contributions_sum_to_the_layers_output(model):
    without_norm = eqx.tree_at(lambda layer: layer.swa_gain, model.blocks[0].attention, None)
    for layer in (model.blocks[0].attention, Wrapped(model.blocks[1].attention), without_norm):
        x = jax.random.normal(jax.random.key(1), (19, MODEL.model_width))
        segment_ids = jnp.repeat(jnp.arange(2), jnp.array([12, 7]), total_repeat_length=19)
        for ids in (None, segment_ids):
            window, residual = eqx.filter_jit(contributions)(layer, x, ids)
            whole = eqx.filter_jit(layer)(x, ids)
            np.testing.assert_allclose(window + residual, whole, rtol=1e-5, atol=1e-6)
        assert jnp.all(residual[:WINDOW] == 0)
        assert jnp.all(jnp.any(residual[WINDOW:12] != 0, axis=1))
        assert jnp.all(residual[12 : 12 + WINDOW] == 0)
        assert jnp.all(jnp.any(window != 0, axis=1))


@pytest.mark.parametrize("wrap", [lambda layer: layer, Wrapped])
def test_shares_by_hand(tokens, wrap):
    model = make_model(num_layers=3, pattern=("local", "global", "local"))
    layers: Any = lambda model: [model.blocks[i].attention for i in (0, 2)]
    wrapped = eqx.tree_at(layers, model, [wrap(layer) for layer in layers(model)])
    shares = branch_shares(wrapped, tokens)
    assert shares.layers == (0, 2)
    expected = np.zeros((2, tokens.shape[1]))
    for sample in tokens:
        x = model.embedding[sample] * 4.0
        for row, block in ((0, model.blocks[0]), (None, model.blocks[1]), (1, model.blocks[2])):
            if row is not None:
                y = block.attention_norm(x)
                window, residual = (eqx.filter_jit(Plain(block.attention, b))(y) for b in ("window", "residual"))
                sizes = [np.linalg.norm(c, axis=1) for c in (window, residual)]
                expected[row] += sizes[1] / (sizes[0] + sizes[1]) / len(tokens)
            x = eqx.filter_jit(block)(x)
    np.testing.assert_allclose(shares.residual, expected, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(shares.window + shares.residual, 1)
    assert (shares.residual[:, :WINDOW] == 0).all()
    assert (shares.residual[:, WINDOW:] > 0.05).all()


def test_memory_ends_exactly_where_the_branches_do(model, tokens):
    """Both read all, windows reach layers * (window - 1), the residual branch alone nothing nearer than the window."""
    memory = {name: effective_memory(m, tokens, num_places=24) for name, m in switched(model).items()}
    distance = np.arange(tokens.shape[1])
    for name, seen in (
        ("whole", distance >= 0),
        ("residual off", distance <= REACH),
        ("window off", (distance == 0) | (distance >= WINDOW)),
    ):
        np.testing.assert_array_equal(memory[name].change > 0, seen, err_msg=name)
        np.testing.assert_array_equal(memory[name].pairs, 3 * (24 - distance))
    assert [memory[name].reach for name in memory] == [23, 23, REACH]
    with_global = effective_memory(switch_off(make_model(pattern=("local", "global")), "residual"), tokens)
    assert (with_global.change > 0).all()


def test_memory_by_hand(model, tokens):
    """Every change and distance, for given places and positions read; the new token is the only other one."""
    two = np.where(tokens < 128, 3, 200).astype(np.int32)
    places = np.array([[2, 9], [0, 1], [22, 23]])
    read = np.zeros(two.shape, bool)
    read[:, 5:20] = read[:, 23] = True
    read[1, 8] = False
    got = effective_memory(model, two, places=places, read=read)
    total, pairs = np.zeros(24), np.zeros(24)
    logits_of = eqx.filter_jit(lambda tokens: model(tokens) - model(tokens).mean(axis=1, keepdims=True))
    for sample in range(3):
        for place in places[sample]:
            changed = two[sample].copy()
            changed[place] = 203 - changed[place]
            before, after = (np.asarray(logits_of(jnp.asarray(x)), np.float64) for x in (two[sample], changed))
            for position in np.flatnonzero(read[sample]):
                if position >= place:
                    difference = np.linalg.norm(after[position] - before[position])
                    total[position - place] += difference / np.linalg.norm(before[position])
                    pairs[position - place] += 1
    np.testing.assert_array_equal(got.pairs, pairs)
    np.testing.assert_allclose(got.change[pairs > 0], (total / np.maximum(pairs, 1))[pairs > 0], rtol=1e-3, atol=1e-6)
    assert np.isnan(got.change[pairs == 0]).all()


def test_memory_repeats_and_depends_on_its_seed(model, tokens):
    first, again, other = (effective_memory(model, tokens, num_places=2, seed=seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first.change, again.change)
    assert not np.array_equal(first.pairs, other.pairs)
    assert EffectiveMemory(np.zeros(3), np.ones(3, np.int64)).reach == -1


def test_scores_with_a_branch_off(model, tmp_path):
    batch = mqar(0, 8, 48, num_pairs=3, num_queries=3)
    scores = accuracy_by_branch(model, batch)
    assert list(scores) == ["whole", "window off", "residual off"]
    assert scores["residual off"] == score(batch, predict(switch_off(model, "residual"), batch.tokens))
    corpus = build_corpus(SAMPLE, tmp_path)
    tokenizer = ByteTokenizer()
    _, path = tokenize(corpus, tokenizer, tmp_path)
    batches = [*validation_batches(path, context=CONTEXT, batch_size=2, document=tokenizer.document, max_tokens=100)]
    losses = loss_by_branch(model, batches, tokenizer)
    assert losses == {name: evaluate(variant, batches, tokenizer) for name, variant in switched(model).items()}
    assert len({round(loss, 4) for loss in losses.values()}) == 3


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda m, x: switch_off(m, "state"),  # pyright: ignore
            "switch_off: branch must be 'window' or 'residual'; got 'state'",
        ),
        (
            lambda m, x: switch_off(make_model(residual=False), "window"),
            "got a model without one; train one with resid",
        ),
        (lambda m, x: switched(make_model(residual=False)), "beside a residual branch only"),
        (
            lambda m, x: branch_shares(make_model(residual=False), x),
            "branch_shares: no layer of this model has a resid",
        ),
        (lambda m, x: branch_shares(replace_layers(m, NormedSum), x), r"differs by \d+% in layer [01]; use a model"),
        (lambda m, x: effective_memory(m, x, num_places=25), "num_places must be 1 to 24, the samples' length; got 25"),
        (lambda m, x: effective_memory(m, x, num_places=0), "got 0"),
        (lambda m, x: effective_memory(m, x, places=np.full((3, 1), 24)), "got 1, from 24 to 24"),
        (lambda m, x: effective_memory(m, x, places=np.full((3, 1), -1)), "positions 0 to 23 of the samples"),
        (lambda m, x: effective_memory(m, x, places=np.zeros((3, 0), int)), "at least one; got 0"),
        (lambda m, x: effective_memory(m, np.zeros_like(x)), r"at least two ids, .*; got \[0\]; give other samples"),
        (lambda m, x: effective_memory(m, x, read=np.zeros(x.shape, bool)), "no position is read at or after a place"),
        (lambda m, x: effective_memory(m, x, seed=-1), "effective_memory: seed must be at least 0"),
    ],
)
def test_bad_arguments_are_errors_that_say_what_to_do(model, tokens, call, message):
    with pytest.raises(ValueError, match=message):
        call(model, tokens)


def test_figures_show_what_was_measured():
    share = np.linspace(0, 1, 20)
    shares = attribution.BranchShares((0, 3), np.stack([1 - share, share]), np.stack([share, 1 - share]))
    figure = curves.branch_shares(shares, 4)
    (axes,) = figure.axes
    first, second, window = axes.get_lines()
    np.testing.assert_array_equal(first.get_ydata(), share)
    np.testing.assert_array_equal(second.get_ydata(), 1 - share)
    np.testing.assert_array_equal(window.get_xdata(), [4, 4])
    legend = figure.axes[0].get_legend()
    assert legend is not None
    labels = [text.get_text() for text in legend.get_texts()]
    assert [label.split(",")[0] for label in labels] == ["layer 0", "layer 3", "window"]

    memory = EffectiveMemory(np.array([9, 0.5, 0.25, 0, np.nan]), np.array([4, 3, 2, 1, 0]))
    (axes,) = curves.effective_memory({"whole": memory}, 3, 2).axes
    curve, zeros, _, window, stack = axes.get_lines()
    np.testing.assert_array_equal(curve.get_ydata(), [0.5, 0.25, np.nan, np.nan])
    np.testing.assert_array_equal(curve.get_xdata(), [1, 2, 3, 4])
    np.testing.assert_array_equal(zeros.get_xdata(), [3])
    np.testing.assert_array_equal(window.get_xdata(), [2.5, 2.5])
    np.testing.assert_array_equal(stack.get_xdata(), [4.5, 4.5])
