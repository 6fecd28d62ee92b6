"""A departure from the paper's layer computes what its definition says, and leaves causality and packing alone."""

import dataclasses
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas.feature_map import relu
from pallas.numerics import relative_rms
from rattn_eqx.ablation.layer import (
    AblatedAttention,
    DecayGate,
    Departures,
    ValuedSinks,
    ablate,
    causal_convolution,
    gated_residual,
    window_with_valued_sinks,
)
from rattn_eqx.model.attention import RAttention
from rattn_eqx.model.config import ModelConfig
from rattn_eqx.model.language_model import LanguageModel

CONFIG = ModelConfig(
    vocabulary_size=13,
    model_width=16,
    num_layers=1,
    num_heads=4,
    num_kv_heads=2,
    head_size=6,
    feed_forward_width=8,
    window=5,
    pattern=("local",),
)
IDS = np.repeat([3, 1, 3], 11)  # the first id comes back, as another segment
RUNS = np.repeat([0, 1, 2], 11)
T = len(IDS)
CHANGES = {  # of the model and of where it departs from the paper's, by the field's name
    "sum": {"branch_norm": "sum"},
    "none": {"branch_norm": "none"},
    "normed": {"feature_input": "normed"},
    "split": {"head_split": True, "num_meta_tokens": 2},
    "gate": {"decay_gate": True, "learned_feature_scale": True},
    "sinks": {"num_valued_sinks": 2},
    "convolution": {"conv_width": 3},
    "window alone": {"residual": False, "num_valued_sinks": 1, "conv_width": 2},
    "all": {
        "decay_gate": True,
        "num_valued_sinks": 1,
        "conv_width": 2,
        "branch_norm": "none",
        "feature_input": "normed",
    },
}


def draw(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng([seed, *shape]).standard_normal(shape), jnp.float32)


def parts(changes: dict) -> tuple[ModelConfig, Departures]:
    names = [field.name for field in dataclasses.fields(Departures)]
    departures = Departures(**{name: value for name, value in changes.items() if name in names})
    model = {name: value for name, value in changes.items() if name not in names}
    return dataclasses.replace(CONFIG, **model), departures


def ablated(changes: dict) -> LanguageModel:
    config, departures = parts(changes)
    return ablate(LanguageModel(config, implementation="reference", key=jax.random.key(0)), departures)


def make(changes: dict) -> AblatedAttention:
    """The layer with every parameter away from what it begins at."""
    layer: Any = ablated(changes).blocks[0].attention
    assert isinstance(layer, AblatedAttention)
    return jax.tree.map(lambda x: x + 0.3 * draw(*x.shape) if eqx.is_array(x) else x, layer)


@pytest.mark.parametrize("changes", CHANGES.values(), ids=CHANGES.keys())
def test_packed_equals_separate_and_the_future_is_unseen(changes):
    layer, x = eqx.filter_jit(make(changes)), draw(T, 16)
    out = layer(x, jnp.asarray(IDS))
    pieces = [layer(x[a : a + 11], None) for a in (0, 11, 22)]
    assert relative_rms(out, jnp.concatenate(pieces)) < 1e-5
    changed = layer(x.at[20].add(1.0), jnp.asarray(IDS))
    assert jnp.array_equal(changed[:20], out[:20])
    assert not jnp.allclose(changed[20], out[20])


def test_a_model_without_departures_has_the_papers_layer():
    model = ablated({})
    assert isinstance(model.blocks[0].attention, RAttention)
    assert ablate(model, Departures()) is model
    assert all(parts(changes)[1] != Departures() for changes in CHANGES.values())


@pytest.mark.parametrize("changes", CHANGES.values(), ids=CHANGES.keys())
def test_every_departure_changes_the_layer_and_every_parameter_of_it_counts(changes):
    layer, x = make(changes), draw(T, 16)
    weights = draw(T, 16)

    @eqx.filter_jit
    def outputs_and_gradient(layer):
        return layer(x), layer.layer(x), eqx.filter_grad(lambda layer: jnp.sum(weights * layer(x)))(layer)

    out, of_the_paper, gradient = outputs_and_gradient(layer)
    assert relative_rms(out, of_the_paper) > 1e-3
    added = eqx.tree_at(lambda layer: layer.layer, gradient, None)
    assert all(float(jnp.abs(each).max()) > 1e-3 for each in jax.tree.leaves(added))


@pytest.mark.parametrize("changes", CHANGES.values(), ids=CHANGES.keys())
def test_ablating_leaves_every_other_parameter_and_the_global_layers_as_they_are(changes):
    config, departures = parts(changes | {"num_layers": 2, "pattern": ("local", "global")})
    model = LanguageModel(config, key=jax.random.key(0))
    changed = ablate(model, departures)
    local: Any = changed.blocks[0].attention
    assert eqx.tree_equal(eqx.tree_at(lambda model: model.blocks[0].attention, changed, local.layer), model)


@pytest.mark.parametrize("norm", ["group", "sum", "none"])
@pytest.mark.parametrize("split", [False, True])
def test_branches_are_normed_and_added_as_defined(norm, split):
    layer = make({"branch_norm": norm, "head_split": split, "feature_map": "relu", "num_valued_sinks": 1})
    x, of_layer = draw(T, 16), layer.layer
    q_swa, k_swa, q_rla, k_rla, v = of_layer.inputs(x)
    options = dict(segment_ids=None, implementation="reference")
    if split:
        swa = layer._swa(q_swa[:, :2], k_swa[:, :1], v[:, :1], **options)
        rla = layer._rla(q_rla[:, 2:], k_rla[:, 1:], v[:, 1:], x, 0, **options)
        swa, rla = (np.concatenate(pair, axis=1) for pair in ((swa, 0 * swa), (0 * rla, rla)))
    else:
        swa = layer._swa(q_swa, k_swa, v, **options)
        rla = layer._rla(q_rla, k_rla, v, x, 5, **options)
    swa, rla = (np.asarray(x, np.float64) for x in (swa, rla))
    rms = lambda y: y / np.sqrt(np.mean(y**2, axis=-1, keepdims=True) + 1e-6)
    g_swa, g_rla = (np.asarray(gain, np.float64)[None] for gain in (layer.swa_gain, layer.rla_gain))
    if norm == "group":
        expected = g_swa * rms(swa) + g_rla * rms(rla)
    else:
        expected = g_swa * swa + g_rla * rla
        expected = rms(expected) if norm == "sum" else expected
    expected = np.einsum("thd,hdm->tm", expected, np.asarray(of_layer.projections.out_weight, np.float64))
    assert relative_rms(layer(x), jnp.asarray(expected)) < 1e-5


def test_the_residual_branch_reads_normed_queries_and_keys_where_told():
    changed = make({"feature_input": "normed", "learned_feature_scale": True})
    layer, x = changed.layer, draw(T, 16)
    raw, normed = layer.inputs(x), changed.inputs(x)
    assert all(jnp.array_equal(raw[i], normed[i]) for i in (0, 1, 4))
    q, k, _ = layer.projections.project(x)
    q, k = layer.projections.norm(q, k)
    scale: Any = layer.feature_scale
    assert relative_rms(normed[2], q * scale.query[None]) < 1e-6
    assert relative_rms(normed[3], k * scale.key[None]) < 1e-6


@pytest.mark.parametrize("window", [1, 5, 8, 50])
def test_window_with_valued_sinks_is_softmax_over_both(window):
    q, k, v = draw(T, 4, 6), draw(T, 2, 6, seed=1), draw(T, 2, 6, seed=2)
    logits, values = draw(3, 4), draw(3, 2, 6)
    got = window_with_valued_sinks(q, k, v, logits, values, window=window, segment_ids=jnp.asarray(IDS))
    expected = np.zeros((T, 4, 6))
    for t in range(T):
        for head in range(4):
            seen = [s for s in range(T) if t - window < s <= t and RUNS[s] == RUNS[t]]
            scores = np.asarray(k)[seen, head // 2] @ np.asarray(q)[t, head] / 6**0.5
            weights = np.exp(np.concatenate([np.asarray(logits)[:, head], scores]))
            rows = np.concatenate([np.asarray(values)[:, head // 2], np.asarray(v)[seen, head // 2]])
            expected[t, head] = weights @ rows / weights.sum()
    assert relative_rms(got, jnp.asarray(expected)) < 1e-5


@pytest.mark.parametrize("window", [0, 1, 5, 8, 50])
def test_the_gated_state_decays_as_defined(window):
    q, k, v = draw(T, 4, 6), draw(T, 2, 6, seed=1), draw(T, 2, 5, seed=2)
    log_gate = -jnp.abs(draw(T, 2)) * 0.3
    options: dict[str, Any] = dict(window=window, feature_map=relu, segment_ids=jnp.asarray(IDS))
    total = np.cumsum(np.asarray(log_gate, np.float64), axis=0)
    phi_q, phi_k = np.asarray(relu(q)), np.asarray(relu(k))
    expected = np.zeros((T, 4, 5))
    for t in range(T):
        for s in range(max(0, t - window + 1)):
            if RUNS[s] == RUNS[t]:
                for head in range(4):
                    decay = np.exp(total[t - window, head // 2] - total[s, head // 2])
                    expected[t, head] += decay * (phi_q[t, head] @ phi_k[s, head // 2]) * np.asarray(v)[s, head // 2]
    for chunk in (8, 64):
        assert relative_rms(gated_residual(q, k, v, log_gate, chunk=chunk, **options), jnp.asarray(expected)) < 1e-5


def test_convolution_reads_tokens_before_of_its_own_segment():
    x, taps = draw(T, 3), draw(4, 3)
    got = causal_convolution(x, taps, jnp.asarray(IDS))
    expected = np.zeros((T, 3))
    for t in range(T):
        for i in range(4):
            if t >= i and RUNS[t - i] == RUNS[t]:
                expected[t] += np.asarray(taps)[i] * np.asarray(x)[t - i]
    assert relative_rms(got, jnp.asarray(expected)) < 1e-6


def test_a_gate_begins_at_its_timescales_and_sinks_at_nothing():
    gate = DecayGate(16, 3)
    forgets = -1 / gate(draw(2, 16))
    assert np.allclose(forgets[0], [128.5, 724.6, 4096.5], rtol=1e-3)  # 1 / log(1 + 1/n) is n + 1/2
    sinks = ValuedSinks(2, 4, 2, 6)
    assert not jnp.any(sinks.logits) and not jnp.any(sinks.values)  # noqa: PT018


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"residual": False, "decay_gate": True}, "need the residual branch"),
        ({"residual": False, "branch_norm": "sum"}, "need the residual branch"),
        ({"num_heads": 3, "num_kv_heads": 3, "head_split": True}, "an even num_kv_heads"),
        ({"window": 0, "num_valued_sinks": 1}, "a window of at least 1"),
        ({"decay_gate": True, "num_meta_tokens": 1}, "starts from zero"),
        ({"branch_norm": "layer"}, "branch_norm must be 'group' or 'sum' or 'none'"),
        ({"conv_width": -1}, "conv_width must be at least 0"),
        ({"pattern": ("global",), "num_valued_sinks": 1}, "belong to local layers"),
    ],
)
def test_departures_that_do_not_fit_are_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        ablated(changes)
