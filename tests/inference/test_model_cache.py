"""A cache continued in any pieces is the whole sequence, at every position and document; and bugs planted in it."""

import dataclasses
import functools
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas import StepCache, chunked, feature_map, step_cache
from pallas.numerics import relative_rms
from rattn_eqx.model import cache as cache_module
from rattn_eqx.model import few_rows
from rattn_eqx.model.cache import Piece
from rattn_eqx.model.config import ModelConfig
from rattn_eqx.model.language_model import LanguageModel
from rattn_eqx.model.rotary import RopeScaling

CONFIG = ModelConfig(
    vocabulary_size=31,
    model_width=16,
    num_layers=2,
    num_heads=6,
    num_kv_heads=2,
    head_size=8,
    feed_forward_width=16,
    window=7,
    pattern=("local", "global"),
)
KEY = jax.random.key(0)
LENGTH, PADDED = 90, 16  # tokens; what every padded piece has
PIECES = (PADDED, 5, 1, 0, 12, PADDED, 3)  # real tokens of padded pieces; the rest is decoded
DOCUMENTS = (3,) * 13 + (4,) * 3 + (3,) * 22 + (9,) * 12 + (2,) * 30 + (5,) * 10  # edges of pieces, and inside


def tokens_of(length: int = LENGTH) -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).integers(0, CONFIG.vocabulary_size, length), jnp.int32)


def random_model(config: ModelConfig, dtype: str, **options: Any) -> LanguageModel:
    """One whose gains, scales and meta tokens are not what they begin with."""
    model = LanguageModel(config, compute_dtype=dtype, key=KEY, **options)
    generator = np.random.default_rng(1)
    moved = lambda x: x + 0.3 * jnp.asarray(generator.standard_normal(x.shape), x.dtype)
    return jax.tree.map(lambda x: moved(x) if eqx.is_array(x) and x.ndim < 3 else x, model)


def by_pieces(model: LanguageModel, tokens, ids, pieces=PIECES, room=LENGTH, cache=None):
    """Logits of every position, read in padded pieces and then token by token; and the last cache."""
    # Functions of their own, which no program that was compiled before serves: a bug may have been planted since.
    extend = eqx.filter_jit(lambda tokens, cache, ids, count: model.extend(tokens, cache, ids, count=count))
    step = eqx.filter_jit(lambda token, cache, number: model.decode_step(token, cache, number))
    cache = model.init_cache(room) if cache is None else cache
    at, found = 0, []
    for count in pieces:
        part = jnp.pad(tokens[at : at + count], (0, PADDED - count))
        of_part = (
            None
            if ids is None
            else jnp.pad(ids[at : at + count], (0, PADDED - count), mode="edge" if count else "constant")
        )
        if ids is not None and count == 0:
            of_part = jnp.full((PADDED,), ids[max(at - 1, 0)])
        stream, cache = extend(part, cache, of_part, count=jnp.asarray(count))
        found.append(model.logits(stream)[:count])
        at += count
    for token, number in zip(tokens[at:], [None] * len(tokens[at:]) if ids is None else ids[at:], strict=True):
        logits, cache = step(token, cache, number)
        found.append(logits[None])
    return jnp.concatenate(found), cache


SCALING = RopeScaling(factor=8, low_frequency_factor=1, high_frequency_factor=4, original_length=32)
CASES = {
    "window 0": {"window": 0},
    "window 1, local alone": {"window": 1, "pattern": ("local",)},
    "window 7, learned start": {"num_meta_tokens": 3, "learned_feature_scale": True},
    "window 63": {"window": 63, "num_meta_tokens": 2, "num_heads": 3, "num_kv_heads": 1},
    "window beyond the length": {"window": 512, "num_meta_tokens": 2},
    "no residual branch": {"residual": False},
    "learned map": {"feature_map": "learned"},
    "sinks and a window without a norm": {"sinks": True, "swa_gain": None, "feature_projection": True},
    "sinks of a window alone": {"sinks": True, "residual": False},
    "rotary global layers": {"pattern": ("global_rope", "global"), "qkv_bias": True, "rope_scaling": SCALING},
}
BOUND = {"float32": 1e-4, "float64": 1e-10}


@pytest.mark.parametrize(("name", "documents"), [(name, i % 3 > 0) for i, name in enumerate(CASES)])
@pytest.mark.parametrize("dtype", ["float64"])
def test_pieces_and_steps_are_the_whole_sequence(name, documents, dtype):
    with jax.enable_x64(dtype == "float64"):
        model = random_model(dataclasses.replace(CONFIG, **CASES[name]), dtype)
        tokens, ids = tokens_of(), jnp.asarray(DOCUMENTS) if documents else None
        whole = eqx.filter_jit(model)(tokens, ids)
        got, cache = by_pieces(model, tokens, ids)
        assert got.dtype == whole.dtype == dtype
        errors = [relative_rms(x, y) for x, y in zip(got, whole, strict=True)]
        assert max(errors) < BOUND[dtype], int(np.argmax(errors))
        assert int(cache.length) == (10 if documents else LENGTH)


def test_float32_and_unpadded_pieces_of_every_size():
    model = random_model(CONFIG, "float32")
    tokens, ids, cache, found = tokens_of(), jnp.asarray(DOCUMENTS), model.init_cache(LENGTH), []
    whole = eqx.filter_jit(model)(tokens, ids)
    extend = eqx.filter_jit(model.extend)
    for start, end in ((0, 1), (1, 13), (13, 38), (38, 39), (39, LENGTH)):
        stream, cache = extend(tokens[start:end], cache, ids[start:end])
        found.append(model.logits(stream))
    errors = [relative_rms(x, y) for x, y in zip(jnp.concatenate(found), whole, strict=True)]
    assert max(errors) < BOUND["float32"]


def test_every_map():
    maps = [feature_map.named[name] for name in feature_map.named] + [(jax.nn.silu, jnp.tanh)]
    config = dataclasses.replace(CONFIG, num_layers=len(maps), pattern=("local",), head_size=4)
    model = random_model(config, "float32")
    where = lambda model: [block.attention.feature_map for block in model.blocks]
    model = eqx.tree_at(where, model, maps, is_leaf=lambda x: x is feature_map.softmax)
    tokens = tokens_of(40)
    whole = eqx.filter_jit(model)(tokens)
    got, _ = by_pieces(model, tokens, None, pieces=(12, 5))
    assert relative_rms(got, whole) < BOUND["float32"]


@functools.cache
def whole_and_model():
    model = random_model(dataclasses.replace(CONFIG, num_meta_tokens=2), "float32", implementation="chunked")
    ids = jnp.asarray(DOCUMENTS)
    return model, eqx.filter_jit(model)(tokens_of(), ids), ids


def late(cache, k, k_rla, v):
    """A key enters the state one step after it left the ring."""
    after, key, value, leaves = step_cache.turned(cache, k, k_rla, v)
    return after, key, value, leaves & (cache.length > cache.window)


def early(cache, k, k_rla, v):
    """The key that enters the state is the one that leaves with the next token."""
    after, key, value, leaves = step_cache.turned(cache, k, k_rla, v)
    if cache.keys_rla is None:
        return after, key, value, leaves
    slot = (cache.length + 1) % cache.window
    return after, cache.keys_rla[slot], cache.values[slot], leaves | (cache.length + 1 >= cache.window)


def off_by_one(cache, k, k_rla, v):
    """A token takes the slot after its own."""
    moved = dataclasses.replace(cache, length=cache.length + 1)
    after, key, value, leaves = step_cache.turned(moved, k, k_rla, v)
    return dataclasses.replace(after, length=cache.length + 1), key, value, leaves & (cache.length >= cache.window)


def shifted(piece: Piece, length):
    """Positions of a piece that continues are one too far."""
    return POSITIONS(piece, length) + jnp.where((piece.runs == 0) & (length > 0), 1, 0)


def not_begun(cache: StepCache, state):
    """A document begins with the state of the one before."""
    return dataclasses.replace(cache, length=jnp.zeros_like(cache.length))


POSITIONS = Piece.positions
BUGS: dict[str, Any] = {
    "slot off by one": (chunked, "turned", off_by_one),
    "key enters the state late": (chunked, "turned", late),
    "key enters the state early": (chunked, "turned", early),
    "position off by one after a second prefill": (Piece, "positions", shifted),
    "state not reset at a document": (StepCache, "begun", not_begun),
    "ring not turned back after a prefill": (cache_module, "in_slots", lambda rows, length: rows),
}


@pytest.mark.parametrize("bug", [None, *BUGS])
def test_a_planted_bug_is_caught(monkeypatch, bug):
    model, whole, ids = whole_and_model()
    fresh = model.init_cache(LENGTH)
    if bug is not None:
        owner, name, wrong = BUGS[bug]
        monkeypatch.setattr(owner, name, wrong)
    got, _ = by_pieces(model, tokens_of(), ids, pieces=(PADDED, 5, 12), cache=fresh)
    error = max(relative_rms(x, y) for x, y in zip(got, whole, strict=True))
    assert (error > 1e-2) if bug else (error < 1e-5)


def scanned(model: LanguageModel, tokens: jax.Array) -> jax.Array:
    """Logits of every position, token by token."""

    def step(cache, token):
        logits, cache = model.decode_step(token, cache)
        return cache, logits

    return eqx.filter_jit(lambda cache, tokens: jax.lax.scan(step, cache, tokens)[1])(model.init_cache(), tokens)


@pytest.mark.slow
def test_five_thousand_steps_past_the_window():
    config = dataclasses.replace(CONFIG, window=512, num_meta_tokens=2, pattern=("local",))
    tokens = tokens_of(512 + 5000)
    with jax.enable_x64(True):
        model = random_model(config, "float64")
        whole = eqx.filter_jit(model)(tokens)
        assert relative_rms(scanned(model, tokens), whole) < 1e-10
    got = scanned(random_model(config, "float32"), tokens)
    assert max(relative_rms(x, y) for x, y in zip(got[::97], whole[::97], strict=True)) < 1e-4


def test_a_cache_that_is_kept_can_be_continued_again():
    model = random_model(CONFIG, "float32")
    prompt, ends = tokens_of(20), jax.random.randint(KEY, (20, 4), 0, CONFIG.vocabulary_size)
    _, kept = eqx.filter_jit(model.prefill)(prompt, model.init_cache(32))
    before = [np.array(x) for x in jax.tree.leaves(kept)]
    many = eqx.filter_jit(jax.vmap(lambda tokens: model.prefill(tokens, kept)))  # twenty continuations, one prefill
    logits, _ = many(ends)
    whole = eqx.filter_jit(jax.vmap(lambda end: model(jnp.concatenate([prompt, end]))[-1]))(ends)
    assert relative_rms(logits, whole) < 1e-5
    for x, y in zip(before, jax.tree.leaves(kept), strict=True):
        np.testing.assert_array_equal(x, y)


def test_shapes_without_memory():
    paper = dataclasses.replace(CONFIG, model_width=4096, num_heads=64, num_kv_heads=8, head_size=128)
    model = eqx.filter_eval_shape(LanguageModel, paper, compute_dtype="bfloat16", key=jax.eval_shape(jax.random.key, 0))
    cache = eqx.filter_eval_shape(model.init_cache, 2**20)
    assert cache.layers[1].keys.shape == (2**20, 8, 128)
    assert cache.layers[0].keys.dtype == cache.dtype == jnp.bfloat16
    assert cache.layers[0].state.dtype == jnp.float32


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": jnp.zeros((0,), jnp.int32)}, "tokens must be at least one"),
        ({"tokens": jnp.array([1, 31])}, "tokens must be ids below vocabulary_size=31; got 31"),
        ({"tokens": jnp.array([-1])}, "got -1"),
        ({"tokens": jnp.zeros((13,), jnp.int32)}, "must fit in the cache's room=12; got 13 tokens, 0 of them read"),
        ({"tokens": jnp.zeros((2,), jnp.int32), "count": 3}, "count must be 0 to the 2 tokens of the piece; got 3"),
        ({"tokens": jnp.zeros((2,), jnp.int32), "count": -1}, "count must be 0 to the 2 tokens of the piece; got -1"),
        ({"config": {"num_layers": 3}}, "of this model, of 3 layers; got one of 2"),
        ({"config": {"window": 3}}, r"\.layers\[0\]\.keys must be float32\[3, 2, 8\]; got float32\[7, 2, 8\]"),
        ({"config": {"residual": False}}, r"\.layers\[0\]\.keys_rla must be None; got float32"),
        ({"batch": 2}, "unbatched.*must be float32.7, 2, 8.; got float32.2, 7, 2, 8.; .* jax.vmap batches"),
    ],
)
def test_what_does_not_fit_is_told_and_the_cache_is_unharmed(changes, message):
    model = random_model(CONFIG, "float32")
    cache = model.init_cache(12)
    if "batch" in changes:
        cache = jax.tree.map(lambda x: jnp.repeat(x[None], changes["batch"], axis=0), cache, is_leaf=eqx.is_array)
    if "config" in changes:
        model = random_model(dataclasses.replace(CONFIG, **changes["config"]), "float32")
    with pytest.raises(ValueError, match=message):
        model.prefill(changes.get("tokens", tokens_of(2)), cache, count=changes.get("count"))
    if "tokens" in changes:  # what cannot be raised where numbers are traced is NaN, not a wrong number
        if changes["tokens"].size:
            count = jnp.asarray(changes["count"]) if "count" in changes else None
            logits, _ = eqx.filter_jit(model.prefill)(changes["tokens"], cache, count=count)
            assert jnp.isnan(logits).all()
        logits, _ = model.prefill(tokens_of(12), cache)
        assert jnp.isfinite(logits).all()


def test_a_piece_of_padding_changes_nothing():
    model = random_model(CONFIG, "float32")
    _, cache = model.prefill(tokens_of(9), model.init_cache(32))
    for ids in (None, jnp.full(4, 5)):
        logits, after = eqx.filter_jit(model.prefill)(tokens_of(4), cache, ids, count=jnp.asarray(0))
        assert jnp.isnan(logits).all()
        for x, y in zip(jax.tree.leaves(cache), jax.tree.leaves(after), strict=True):
            np.testing.assert_array_equal(x, y)


def test_a_layer_without_a_cache_and_no_room():
    class Other(eqx.Module):
        def __call__(self, x, segment_ids=None):
            return x

    model = random_model(CONFIG, "float32")
    with pytest.raises(NotImplementedError, match="init_cache: Other has no cache"):
        eqx.tree_at(lambda m: m.blocks[0].attention, model, Other()).init_cache(8)
    with pytest.raises(ValueError, match="max_length must be given for a model with global layers"):
        model.init_cache()
    with pytest.raises(ValueError, match="max_length must be at least 1; got 0"):
        model.init_cache(0)


def test_the_rows_of_a_batch_meet_a_matrix_at_once_and_are_never_few(monkeypatch):
    model, tokens = random_model(CONFIG, "float32"), jnp.array([1, 2, 3])
    cache = jax.tree.map(lambda x: jnp.repeat(x[None], 3, axis=0), model.init_cache(8))
    step = lambda: eqx.filter_jit(lambda t, c: jax.vmap(model.decode_step)(t, c)[0])(tokens, cache)
    plain = step()
    monkeypatch.setitem(few_rows.FEWEST, "cpu", 8)
    assert relative_rms(step(), plain) < 1e-6
    assert relative_rms(model.decode_step(tokens[1], model.init_cache(8))[0], plain[1]) < 1e-6
    text = str(jax.make_jaxpr(lambda x: few_rows.apply(lambda w, x: x @ w, jnp.ones((16, 5)), x))(jnp.ones(16)))
    assert "8,16" in text
    many = jax.tree.map(lambda x: jnp.repeat(x[None], 3, axis=0) if eqx.is_array(x) else x, model)
    apart = eqx.filter_vmap(lambda model, t, c: model.decode_step(t, c)[0])(many, tokens, cache)
    assert relative_rms(apart, plain) < 1e-6
