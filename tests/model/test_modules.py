"""The modules are their equations: each is held to NumPy, and the model to what causality and packing promise."""

import dataclasses
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import token_loop

from pallas.feature_map import Hedgehog
from pallas.numerics import relative_rms, relative_rms_by_name
from rattn_eqx.model.attention import GlobalAttention, RAttention
from rattn_eqx.model.block import Block
from rattn_eqx.model.config import ModelConfig
from rattn_eqx.model.feed_forward import FeedForward
from rattn_eqx.model.language_model import LanguageModel
from rattn_eqx.model.presets import paper_3b, paper_12b
from rattn_eqx.model.rotary import RopeScaling, rotary

CONFIG = ModelConfig(
    vocabulary_size=13,
    model_width=8,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_size=4,
    feed_forward_width=12,
    window=4,
    pattern=("local", "global"),
    learned_feature_scale=True,
    num_meta_tokens=3,
    rope_theta=50.0,
)
SIZES: dict[str, Any] = dict(num_heads=4, num_kv_heads=2, head_size=4)
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 13, 21), jnp.int32)


COMPILER_OPTIONS = {"xla_backend_optimization_level": 0}  # compiling is most of the time


@eqx.filter_jit(compiler_options=COMPILER_OPTIONS)  # pyright: ignore[reportCallIssue] (handed on to jax.jit)
def run(module, *arguments):
    return module(*arguments)


def make(build):
    """A module whose every parameter is random, also those that begin at 1: nothing hides behind a neutral value."""
    generator = np.random.default_rng(1)

    def draw(leaf):
        if not isinstance(leaf, jax.ShapeDtypeStruct):
            return leaf
        return jnp.asarray(0.3 + 0.4 * generator.standard_normal(leaf.shape), leaf.dtype)

    return jax.tree.map(draw, eqx.filter_eval_shape(build, jax.random.key(0)))


def make_model(config=CONFIG, implementation: str | None = "reference", **options):
    return make(lambda key: LanguageModel(config, implementation=implementation, **options, key=key))


def make_attention(**options):
    return make(lambda key: RAttention(8, **(SIZES | {"window": 4, "rope_theta": 50.0} | options), key=key))


def inputs(t=15, width=8):
    return jnp.asarray(np.random.default_rng(2).standard_normal((t, width)), jnp.float32)


def shapes(module):
    leaves = jax.tree_util.tree_leaves_with_path(eqx.filter(module, lambda x: hasattr(x, "shape")))
    return {jax.tree_util.keystr(path).lstrip("."): leaf.shape for path, leaf in leaves}


def float64(x):
    return np.asarray(x, np.float64)


def rotated_by_hand(x, theta):
    """Channels i and i + d / 2 are the two parts of a complex number, which position p turns by p theta^(-2 i / d)."""
    half = x.shape[-1] // 2
    turn = np.exp(1j * np.arange(len(x))[:, None, None] * theta ** (-np.arange(half) / half))
    x = float64(x)
    turned = (x[..., :half] + 1j * x[..., half:]) * turn
    return np.concatenate([turned.real, turned.imag], axis=-1)


def projected_by_hand(projections, x):
    weights = (projections.query_weight, projections.key_weight, projections.value_weight)
    return [np.einsum("tm,mhd->thd", float64(x), float64(weight)) for weight in weights]


def normed_by_hand(norm, x):
    return x if norm is None else x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + 1e-6) * float64(norm.weight)


def merged_by_hand(projections, heads):
    return heads.reshape(len(heads), -1) @ float64(projections.out_weight).reshape(-1, 8)


def rattention_by_hand(layer, x, segment_ids=None):
    q, k, v = projected_by_hand(layer.projections, x)
    q_local = rotated_by_hand(normed_by_hand(layer.projections.query_norm, q), layer.rope_theta)
    k_local = rotated_by_hand(normed_by_hand(layer.projections.key_norm, k), layer.rope_theta)
    options: dict[str, Any] = dict(window=layer.window, segment_ids=segment_ids)
    if layer.sink_logits is not None:
        options["sink_logits"] = float64(layer.sink_logits)
    if layer.rla_gain is None:
        heads = token_loop.sliding_window_attention(q_local, k_local, v, **options)
        return merged_by_hand(layer.projections, heads)
    if layer.feature_projection is not None:
        q = np.stack([q[:, head] @ matrix for head, matrix in enumerate(float64(layer.feature_projection.query))], 1)
        k = np.stack([k[:, head] @ matrix for head, matrix in enumerate(float64(layer.feature_projection.key))], 1)
    if layer.feature_scale is not None:
        q, k = q * float64(layer.feature_scale.query), k * float64(layer.feature_scale.key)
    state = None
    if layer.meta_tokens is not None:
        keys, values = float64(layer.meta_tokens.keys), float64(layer.meta_tokens.values)
        pairs = np.ndindex(keys.shape[:2])
        state = np.zeros((keys.shape[1], 2 * keys.shape[2], values.shape[2]))
        for token, head in pairs:
            state[head] += np.outer(token_loop.softmax_map(keys[token, head]), values[token, head])
    swa_gain = None if layer.swa_gain is None else float64(layer.swa_gain)
    gains = dict(swa_gain=swa_gain, rla_gain=float64(layer.rla_gain))
    states = dict(initial_state=state, segment_state=state)
    heads, _ = token_loop.rattention(q_local, k_local, v, q_rla=q, k_rla=k, **gains, **states, **options)
    return merged_by_hand(layer.projections, heads)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"learned_scale": True, "num_meta_tokens": 3, "segments": (6, 1, 8)},
        {"qk_norm": False, "implementation": "reference", "segments": (3, 12)},
        {"residual": False},
        {"window": 0},
        {"window": 15, "num_meta_tokens": 2},
        {"num_kv_heads": 1, "window": 1},
        {"swa_gain": None, "sinks": True, "segments": (9, 6), "feature_projection": True, "learned_scale": True},
        {"residual": False, "sinks": True},
    ],
    ids=lambda options: "-".join(options) or "plain",
)
def test_rattention(options):
    options = dict(options)
    segments = options.pop("segments", None)
    ids = None if segments is None else token_loop.segment_ids(*segments)
    layer, x = make_attention(**options), inputs()
    expected = rattention_by_hand(layer, x, ids)
    assert relative_rms(run(layer, x, ids), expected) < 1e-5


def test_a_window_of_the_whole_sequence_is_full_attention_with_rope():
    layer, x = make_attention(window=15, residual=False), inputs()

    def full(layer, x):
        q, k, v = layer.projections.project(x)
        q, k = (rotary(y, jnp.arange(15), theta=50.0) for y in layer.projections.norm(q, k))
        heads = jax.nn.dot_product_attention(q[None], k[None], v[None], is_causal=True)[0]
        return layer.projections.merge(heads)

    assert relative_rms(run(layer, x), run(lambda x: full(layer, x), x)) < 1e-5


def test_global_attention_sees_everything_and_no_positions():
    layer, x = make(lambda key: GlobalAttention(8, **SIZES, key=key)), inputs()
    q, k, v = projected_by_hand(layer.projections, x)
    q, k = normed_by_hand(layer.projections.query_norm, q), normed_by_hand(layer.projections.key_norm, k)
    for ids in (None, token_loop.segment_ids(5, 10)):
        heads = token_loop.sliding_window_attention(q, k, v, window=15, segment_ids=ids)
        assert relative_rms(run(layer, x, ids), merged_by_hand(layer.projections, heads)) < 1e-5
    shuffled = jnp.concatenate([x[13::-1], x[-1:]])
    assert relative_rms(run(layer, shuffled)[-1], run(layer, x)[-1]) < 1e-5


def test_global_attention_with_positions_and_biases():
    options: dict[str, Any] = dict(rope_theta=50.0, qkv_bias=True, norm_eps=0.1)
    layer, x = make(lambda key: GlobalAttention(8, **SIZES, **options, key=key)), inputs()
    projections = layer.projections
    biases = (projections.query_bias, projections.key_bias, projections.value_bias)
    q, k, v = (y + float64(bias) for y, bias in zip(projected_by_hand(projections, x), biases, strict=True))
    normed = lambda norm, y: y / np.sqrt(np.mean(y**2, axis=-1, keepdims=True) + 0.1) * float64(norm.weight)
    q, k = (
        rotated_by_hand(normed(projections.query_norm, q), 50.0),
        rotated_by_hand(normed(projections.key_norm, k), 50.0),
    )
    for ids in (None, token_loop.segment_ids(5, 10)):
        heads = token_loop.sliding_window_attention(q, k, v, window=15, segment_ids=ids)
        assert relative_rms(run(layer, x, ids), merged_by_hand(projections, heads)) < 1e-5


def test_only_the_residual_branch_reaches_beyond_the_window():
    x = inputs()
    changed = x.at[0].add(1.0)

    def differs(layer):
        return np.any(np.asarray(run(layer, x)) != np.asarray(run(layer, changed)), axis=-1)

    assert differs(make_attention()).all()
    np.testing.assert_array_equal(differs(make_attention(residual=False)), np.arange(15) < 4)


def test_rotary_by_complex_numbers():
    x = inputs(15, 24).reshape(15, 4, 6)
    np.testing.assert_allclose(rotary(x, jnp.arange(15), theta=50.0), rotated_by_hand(x, 50.0), atol=1e-5)


def test_scaled_frequencies_keep_the_fast_and_slow_down_the_slow():
    scaling = RopeScaling(factor=8, low_frequency_factor=1, high_frequency_factor=4, original_length=64)
    turns = np.array([32.0, 4.0, 2.5, 1.0, 0.25])  # in 64 tokens
    expected = turns * [1, 1, 0.5 + 0.5 / 8, 1 / 8, 1 / 8]
    np.testing.assert_allclose(scaling.scaled(turns * 2 * np.pi / 64) * 64 / (2 * np.pi), expected, rtol=1e-12)
    x, far = inputs(2, 24).reshape(2, 2, 12), jnp.asarray([3, 1_000_003])
    got = rotary(x, far, theta=50.0, scaling=scaling)
    frequency = scaling.scaled(50.0 ** (-np.arange(6) / 6))
    turned = (float64(x)[..., :6] + 1j * float64(x)[..., 6:]) * np.exp(1j * np.asarray(far)[:, None, None] * frequency)
    np.testing.assert_allclose(got, np.concatenate([turned.real, turned.imag], -1), atol=2e-3)


def test_rotary_products_depend_on_the_distance_alone():
    q, k = inputs(2, 8).reshape(2, 1, 1, 8)

    def product(at_query, at_key):
        return float(jnp.vdot(rotary(q, jnp.asarray([at_query])), rotary(k, jnp.asarray([at_key]))))

    assert product(7, 3) == pytest.approx(product(1007, 1003), abs=1e-3)
    assert product(0, 0) == pytest.approx(float(np.vdot(q, k)), abs=1e-5)
    assert abs(product(7, 3) - product(3, 7)) > 0.1


@pytest.mark.parametrize("position", [4_093, 100_000, 1_000_000, 100_000_000])
def test_rotary_products_are_exact_at_any_position(position):
    generator = np.random.default_rng(0)
    q, k = (jnp.asarray(generator.standard_normal((1, 1, 48)), jnp.float32) for _ in range(2))
    product = lambda at: float(jnp.vdot(rotary(q, jnp.asarray([at + 37])), rotary(k, jnp.asarray([at]))))
    with jax.enable_x64(True):
        wide = [rotary(jnp.asarray(np.asarray(x), jnp.float64), jnp.asarray([at])) for x, at in ((q, 37), (k, 0))]
        expected = float(jnp.vdot(*wide))
    assert abs(product(position) - expected) < 1e-5 * abs(expected) + 1e-4


def test_rotary_joins_nothing():
    """XLA of jax 0.11.2 may compute a norm and then a concatenate wrong on an H100: LOG.md, 2026-11-28."""
    assert "concatenate" not in str(jax.make_jaxpr(rotary)(jnp.ones((2, 3, 4)), jnp.arange(2)))


def test_rotary_needs_pairs_of_channels():
    with pytest.raises(ValueError, match="rotary: d must be even, since channels turn in pairs; got d=5"):
        rotary(jnp.zeros((2, 1, 5)), jnp.arange(2))


@pytest.mark.parametrize("paired", [False, True])
def test_a_learned_feature_map_is_trained_with_the_layer(paired):
    def build(key):
        feature_map = Hedgehog(4, 5, key=key)
        feature_map = (feature_map, Hedgehog(4, 5, key=jax.random.key(9))) if paired else feature_map
        return RAttention(8, **SIZES, window=4, feature_map=feature_map, num_meta_tokens=2, key=key)

    layer, x = make(build), inputs()
    gradients = run(eqx.filter_grad(lambda layer: jnp.sum(jnp.square(layer(x)))), layer)
    for leaf in jax.tree.leaves(eqx.filter(gradients, eqx.is_array)):
        assert np.any(leaf)
    weights = [leaf for name, leaf in shapes(gradients).items() if "feature_map" in name]
    assert weights == [(4, 5)] * (2 if paired else 1)


def test_a_block_takes_a_feature_map_that_has_no_name():
    block = make(lambda key: Block(CONFIG, "local", feature_map=Hedgehog(4, key=key), key=key))
    assert shapes(block)["attention.feature_map.weight"] == (4, 4)


def test_parameter_shapes():
    config = dataclasses.replace(CONFIG, tie_embeddings=False)
    found = shapes(eqx.filter_eval_shape(LanguageModel, config, key=jax.random.key(0)))
    projections = {"query_weight": (8, 4, 4), "out_weight": (4, 4, 8)}
    projections |= {f"{name}_weight": (8, 2, 4) for name in ("key", "value")}
    projections |= {f"{name}_norm.weight": (4,) for name in ("query", "key")}
    both = {f"attention.projections.{name}": shape for name, shape in projections.items()}
    both |= {"attention_norm.weight": (8,), "feed_forward_norm.weight": (8,)}
    both |= {f"feed_forward.{name}_weight": (8, 12) for name in ("gate", "up")} | {"feed_forward.down_weight": (12, 8)}
    local = {f"attention.{branch}_gain": (4, 4) for branch in ("swa", "rla")}
    local |= {"attention.feature_scale.query": (4, 4), "attention.feature_scale.key": (2, 4)}
    local |= {f"attention.meta_tokens.{name}": (3, 2, 4) for name in ("keys", "values")}
    expected = {"embedding": (13, 8), "final_norm.weight": (8,), "head": (8, 13)}
    expected |= {f"blocks[0].{name}": shape for name, shape in (both | local).items()}
    expected |= {f"blocks[1].{name}": shape for name, shape in both.items()}
    assert found == expected


def test_no_two_parameters_share_memory():
    """A training step that donates its parameters may not be given one buffer twice."""
    parameters = []

    def build(key):
        model = LanguageModel(CONFIG, key=key)
        parameters.extend(map(id, jax.tree.leaves(eqx.filter(model, eqx.is_array))))
        return model

    eqx.filter_eval_shape(build, jax.random.key(0))
    assert parameters
    assert len(set(parameters)) == len(parameters)


def test_a_position_reads_no_later_token():
    model = make_model(implementation=None)
    before = np.asarray(run(model, TOKENS))
    for changed in (1, 11, 20):
        other = jnp.where(jnp.arange(21) < changed, TOKENS, (TOKENS + 1) % 13)
        after = np.asarray(run(model, other))
        np.testing.assert_array_equal(after[:changed], before[:changed])
        assert np.all(np.any(after[changed:] != before[changed:], axis=-1))


def test_packed_documents_equal_the_same_documents_alone():
    model, lengths = make_model(), (6, 1, 14)
    packed = np.asarray(run(model, TOKENS, token_loop.segment_ids(*lengths, ids=(5, 2, 5))))
    ends = np.cumsum(lengths)
    for start, end in zip([0, *ends[:-1]], ends, strict=True):
        assert relative_rms(packed[start:end], run(model, TOKENS[start:end])) < 1e-5
    assert relative_rms(packed, run(model, TOKENS)) > 0.01


@pytest.mark.parametrize(
    ("pattern", "kinds"),
    [(("local",), "LLLLL"), (("global",), "GGGGG"), (("global", "local", "local"), "GLLGL")],
)
def test_patterns(pattern, kinds):
    config = dataclasses.replace(CONFIG, pattern=pattern, num_layers=5)
    model = eqx.filter_eval_shape(LanguageModel, config, key=jax.random.key(0))
    names = {RAttention: "L", GlobalAttention: "G"}
    assert "".join(names[type(block.attention)] for block in model.blocks) == kinds


def test_blocks_and_logits_are_put_together_as_written():
    model = make_model(dataclasses.replace(CONFIG, tie_embeddings=False))
    x = float64(model.embedding)[TOKENS] * np.sqrt(8)
    for block in model.blocks:
        x = x + float64(run(block.attention, normed_by_hand(block.attention_norm, x).astype(np.float32)))
        x = x + float64(run(block.feed_forward, normed_by_hand(block.feed_forward_norm, x).astype(np.float32)))
    logits = normed_by_hand(model.final_norm, x) @ float64(model.head)
    assert relative_rms(run(model, TOKENS), logits) < 1e-5

    tied = eqx.tree_at(lambda m: m.head, model, None, is_leaf=lambda x: x is None)
    untied = eqx.tree_at(lambda m: m.head, model, model.embedding.T)
    np.testing.assert_allclose(run(tied, TOKENS), run(untied, TOKENS), rtol=1e-6)


@pytest.mark.parametrize("gate", ["gelu", "silu"])
def test_feed_forward(gate):
    network, x = make(lambda key: FeedForward(8, 12, gate, key=key)), inputs()
    gates, up = float64(x) @ float64(network.gate_weight), float64(x) @ float64(network.up_weight)
    tanh_gelu = 0.5 * gates * (1 + np.tanh(np.sqrt(2 / np.pi) * (gates + 0.044715 * gates**3)))
    activated = {"gelu": tanh_gelu, "silu": gates / (1 + np.exp(-gates))}[gate]
    assert relative_rms(run(network, x), activated * up @ float64(network.down_weight)) < 1e-5


def test_bfloat16_computes_in_bfloat16_and_gives_float32_logits(monkeypatch):
    wide, narrow = make_model(), make_model(compute_dtype="bfloat16")
    logits = run(narrow, TOKENS)
    assert logits.dtype == jnp.float32
    assert 1e-3 < relative_rms(logits, run(wide, TOKENS)) < 0.05
    gradients = eqx.filter_eval_shape(eqx.filter_grad(lambda model: model(TOKENS).sum()), narrow)
    assert {leaf.dtype for leaf in jax.tree.leaves(gradients) if hasattr(leaf, "dtype")} == {jnp.dtype("float32")}

    in_blocks = []
    monkeypatch.setattr(Block, "__call__", lambda self, x, segment_ids: in_blocks.append(x.dtype) or x)
    eqx.filter_eval_shape(narrow, TOKENS)
    assert in_blocks == [jnp.bfloat16] * 2


def test_rematerialised_blocks_keep_less_and_give_the_same_gradients():
    def loss_of(static):
        return lambda parameters: jnp.square(eqx.combine(parameters, static)(TOKENS)).mean()

    one_layer = dataclasses.replace(CONFIG, num_layers=1)
    gradients, kept = {}, {}
    for rematerialise in (False, True):
        parameters, static = eqx.partition(make_model(one_layer, rematerialise=rematerialise), eqx.is_array)
        gradients[rematerialise] = run(jax.grad(loss_of(static)), parameters)
        _, pull_back = jax.eval_shape(lambda p, static=static: jax.vjp(loss_of(static), p), parameters)
        kept[rematerialise] = sum(leaf.size for leaf in jax.tree.leaves(pull_back))
    plain = jax.tree.leaves(gradients[False])
    errors = relative_rms_by_name(jax.tree.leaves(gradients[True]), plain)
    assert max(errors.values()) < 1e-5, errors
    assert all(np.any(leaf) for leaf in plain)
    assert kept[True] < 0.7 * kept[False]


@pytest.mark.parametrize(
    ("config", "width", "layers", "feed_forward", "heads", "kv_heads"),
    [(paper_3b, 2048, 56, 6656, 16, 4), (paper_12b, 5120, 40, 16384, 40, 8)],
    ids=["3b", "12b"],
)
def test_the_papers_table_1(config, width, layers, feed_forward, heads, kv_heads):
    model = eqx.filter_eval_shape(LanguageModel, config, key=jax.random.key(0))
    assert len(model.blocks) == layers
    for index, block in enumerate(model.blocks):
        assert isinstance(block.attention, GlobalAttention if index % 4 == 3 else RAttention)
        assert block.attention.projections.query_weight.shape == (width, heads, 128)
        assert block.attention.projections.key_weight.shape == (width, kv_heads, 128)
        assert block.attention.projections.value_weight.shape == (width, kv_heads, 128)
        assert block.attention.projections.query_norm is not None
        assert block.feed_forward.gate_weight.shape == (width, feed_forward)
    local = model.blocks[0].attention
    assert (local.window, local.rope_theta, local.feature_map.__name__) == (512, 5e5, "softmax")


def test_a_language_model_trains_maps_of_its_own():
    keys = []
    hedgehog = lambda key: keys.append(key) or Hedgehog(CONFIG.head_size, key=key)
    model = LanguageModel(CONFIG, feature_map=hedgehog, key=jax.random.key(0))
    block_keys = jax.random.split(jax.random.key(0), 2 + CONFIG.num_layers)[2:]
    for key in keys:
        drawn = [block_key for each in block_keys for block_key in (each, *jax.random.split(each))]
        assert all(key != each for each in drawn), "a key that the block's weights are drawn from"
    plain = LanguageModel(CONFIG, key=jax.random.key(0))
    local = [layer for layer, kind in enumerate(CONFIG.layer_kinds) if kind == "local"]
    maps = lambda model: [model.blocks[layer].attention.feature_map for layer in local]
    assert len({np.asarray(each.weight).tobytes() for each in maps(model)}) == len(local), "each layer draws its own"
    named_again = eqx.tree_at(maps, model, maps(plain))
    for x, y in zip(jax.tree.leaves(named_again), jax.tree.leaves(plain), strict=True):
        assert x is y or np.array_equal(x, y), "the other parameters are the same"
    tokens = jnp.arange(3 * CONFIG.window) % CONFIG.vocabulary_size
    gradients = eqx.filter_grad(lambda model: jnp.sum(jnp.square(model(tokens))))(model)
    assert all(jnp.any(each.weight != 0) for each in maps(gradients))
