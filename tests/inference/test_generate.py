"""Sampling: which tokens stay, how often each is drawn, and that generation is the plain loop over prefixes."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from jaxtyping import TypeCheckError

from rattn_eqx.inference.generate import filter_logits, generate, sample_token
from rattn_eqx.model.config import ModelConfig
from rattn_eqx.model.language_model import LanguageModel

CONFIG = ModelConfig(
    vocabulary_size=11,
    model_width=8,
    num_layers=1,
    num_heads=2,
    num_kv_heads=1,
    head_size=4,
    feed_forward_width=8,
    window=2,
    pattern=("local",),
)
KEY = jax.random.key(1)
PROMPT = np.array([3, 1, 4], np.uint16)


@pytest.fixture(scope="module")
def model():
    generator = np.random.default_rng(0)
    shapes = eqx.filter_eval_shape(LanguageModel, CONFIG, implementation="reference", key=KEY)

    def draw(leaf):
        is_parameter = isinstance(leaf, jax.ShapeDtypeStruct)
        return jnp.asarray(0.5 * generator.standard_normal(leaf.shape), leaf.dtype) if is_parameter else leaf

    return jax.tree.map(draw, shapes)


def kept_by_hand(logits, temperature, top_k, top_p):
    """The ids that stay, by walking down the ranking."""
    scaled = logits.astype(np.float64) / temperature
    ranking = sorted(range(len(scaled)), key=lambda token: (-scaled[token], token))[:top_k]
    weights = np.exp(scaled[ranking] - scaled[ranking].max())
    kept, total = [], 0.0
    for token, probability in zip(ranking, weights / weights.sum(), strict=True):
        if kept and top_p is not None and total >= top_p:
            break
        kept.append(token)
        total += probability
    return sorted(kept)


@example(logits=[0] * 6, temperature=1.0, top_k=3, top_p=0.413)  # two of the three left, not of the six
@given(
    logits=st.lists(st.integers(-3, 3), min_size=6, max_size=6),  # with ties
    temperature=st.sampled_from([0.5, 1.0, 2.0]),
    top_k=st.sampled_from([None, 1, 3, 9]),
    top_p=st.sampled_from([None, 0.013, 0.413, 0.913, 1.0]),
)
def test_filtered_logits(logits, temperature, top_k, top_p):
    logits = np.array(logits, np.float32) * 1.17
    filtered = np.asarray(filter_logits(jnp.asarray(logits), temperature=temperature, top_k=top_k, top_p=top_p))
    kept = kept_by_hand(logits, temperature, top_k, top_p)
    assert np.flatnonzero(filtered > -np.inf).tolist() == kept
    np.testing.assert_allclose(filtered[kept], (logits[kept] - logits.max()) / temperature, rtol=1e-6)


def test_top_p_of_1_keeps_even_the_least_likely():
    logits = jnp.asarray([0.0, -30.0, -60.0])
    np.testing.assert_array_equal(filter_logits(logits, temperature=1.0, top_p=1.0), logits)


def test_an_excluded_token_stays_excluded_under_jit():
    logits = jnp.asarray([1.0, -jnp.inf, 0.5, -jnp.inf])
    filtered = jax.jit(lambda x: filter_logits(x, temperature=0.5, top_k=3, top_p=0.99))(logits)
    np.testing.assert_array_equal(filtered, [0.0, -np.inf, -1.0, -np.inf])


@pytest.mark.parametrize("options", [{"top_p": 0.5}, {"top_k": 300}, {"top_k": 2**40, "top_p": 1}])
def test_the_dtype_of_logits_excludes_nothing(options):
    logits = jnp.round(2 * jax.random.normal(KEY, (1000,)), 1).astype(jnp.bfloat16).astype(jnp.float32)
    expected = filter_logits(logits, temperature=0.7, **options)
    for dtype in (jnp.float16, jnp.bfloat16):
        np.testing.assert_array_equal(filter_logits(logits.astype(dtype), temperature=0.7, **options), expected)
    with jax.enable_x64(True):
        wide = filter_logits(logits.astype(jnp.float64), temperature=0.7, **options)
    assert wide.dtype == jnp.float64
    np.testing.assert_array_equal(np.asarray(wide) > -np.inf, np.asarray(expected) > -np.inf)


@pytest.mark.parametrize("num_draws", [10_000, pytest.param(200_000, marks=pytest.mark.long)])
def test_equal_logits_of_any_dtype_are_drawn_evenly(num_draws):
    """Noise in bfloat16 ties, and ties go to low ids: it drew the first tenth 0.55 of the time."""
    num_ids = 1000

    def draw(dtype, num_draws):
        one = lambda key: sample_token(jnp.zeros(num_ids, dtype), temperature=1, key=key)
        keys = jax.random.split(KEY, num_draws)
        return np.asarray(jax.jit(lambda keys: jax.lax.map(one, keys, batch_size=500))(keys))

    drawn = draw(jnp.float32, num_draws)
    shares = np.bincount(drawn // (num_ids // 10), minlength=10) / num_draws
    assert np.all(np.abs(shares - 0.1) < 4 * np.sqrt(0.1 * 0.9 / num_draws)), shares
    few = draw(jnp.float32, 500)
    for dtype in (jnp.float16, jnp.bfloat16):
        np.testing.assert_array_equal(draw(dtype, 500), few)


def test_tokens_are_drawn_as_often_as_they_are_likely():
    logits, num_draws = jnp.asarray([0.3, -1.0, 1.2, 0.9, -0.5]), 4000
    keys = jax.random.split(KEY, num_draws)
    drawn = jax.vmap(lambda key: sample_token(logits, temperature=0.7, top_k=4, key=key))(keys)
    weights = np.exp(np.asarray(logits) / 0.7) * np.array([1, 0, 1, 1, 1])
    frequencies = np.bincount(np.asarray(drawn), minlength=5) / num_draws
    assert frequencies[1] == 0
    np.testing.assert_allclose(frequencies, weights / weights.sum(), atol=4 * 0.5 / num_draws**0.5)


def test_temperature_0_takes_the_likeliest():
    assert sample_token(jnp.asarray([0.0, 2.0, 1.0]), temperature=0, top_k=2, key=KEY) == 1


@pytest.mark.parametrize("temperature", [0, 1e-320, 1e-40, 1.0, 1e308])
def test_at_any_temperature_a_token_is_one_that_is_allowed_or_none(temperature):
    def draw(logits, **options):
        one = jax.jit(lambda key: sample_token(jnp.asarray(logits), temperature=temperature, key=key, **options))
        return set(np.asarray(jax.vmap(one)(jax.random.split(KEY, 40))).tolist())

    inf = np.inf
    assert draw([-inf, 3e38, -inf, -3e38, -inf, 3e38], top_k=2) <= {1, 5}
    assert draw([-inf, 80.0, -inf, 80.5, -inf], top_p=0.9) <= ({1, 3} if temperature >= 1 else {3})
    for logits in ([0.0, np.nan, 1.0], [0.0, inf, -inf], [-inf, -inf]):
        assert draw(logits) == {-1}


@eqx.filter_jit
def logits_of(model, tokens):
    return model(tokens)


@pytest.mark.parametrize("context", [8, 4], ids=["text fits", "text outgrows the buffer"])
def test_greedy_generation_is_the_loop_over_prefixes(model, context):
    text = PROMPT.tolist()
    for _ in range(3):
        logits = logits_of(model, jnp.asarray(text[-context:], jnp.int32))
        text.append(int(jnp.argmax(logits[-1])))
    got = generate(model, PROMPT, num_tokens=3, context=context, temperature=0, key=KEY)
    assert list(got) == text[len(PROMPT) :]


def test_a_prompt_longer_than_the_context_is_cut_from_the_left(model):
    long = np.arange(11, dtype=np.int32)

    def text(prompt):
        return list(generate(model, prompt, num_tokens=4, context=8, temperature=0, key=KEY))

    assert text(long) == text(long[-8:]) != text(long[:8])


@pytest.mark.parametrize("temperature", [1e-40, 1e-320, np.float32(1e-30)])
def test_a_tiny_temperature_is_greedy(model, temperature):
    options: dict[str, Any] = dict(num_tokens=9, context=8, forbid=(3, 7), key=KEY)
    greedy = list(generate(model, PROMPT, temperature=0, **options))
    assert list(generate(model, PROMPT, temperature=temperature, **options)) == greedy


@pytest.mark.parametrize("compute_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_logits_that_are_not_finite_are_no_text(bad, compute_dtype):
    damaged = LanguageModel(CONFIG, compute_dtype=compute_dtype, implementation="reference", key=KEY)
    damaged = eqx.tree_at(lambda m: m.final_norm.weight, damaged, jnp.full(8, bad))
    for temperature in (0, 0.8):
        begun = generate(damaged, PROMPT, num_tokens=2, context=8, temperature=temperature, forbid=(0,), key=KEY)
        with pytest.raises(FloatingPointError, match=r"^generate: logits must be finite; .* for token 0 after"):
            next(begun)


def test_numbers_and_ids_however_they_are_held(model):
    def text(prompt, forbid, **options):
        return list(generate(model, prompt, forbid=forbid, key=KEY, **options))

    expected = text(PROMPT, (2, 5), num_tokens=6, context=8, temperature=0.5, top_k=4, top_p=1.0)
    options: dict[str, Any] = dict(num_tokens=np.int64(6), context=np.uint8(8), temperature=np.float32(0.5))
    options |= {"top_k": np.int64(4), "top_p": 1}
    for prompt, forbid in ((PROMPT.tolist(), [2, 5]), (list(PROMPT), {2, 5}), (jnp.asarray(PROMPT), np.array([2, 5]))):
        assert text(prompt, forbid, **options) == expected
    logits = jnp.asarray([0.3, -1.0, 1.2])
    of_numpy: dict[str, Any] = dict(temperature=np.float16(0.5), top_k=np.uint8(2), top_p=np.float32(0.5))
    np.testing.assert_array_equal(
        filter_logits(logits, **of_numpy),
        filter_logits(logits, temperature=0.5, top_k=2, top_p=0.5),
    )


@pytest.mark.parametrize("changes", [{"top_k": 1.5}, {"key": 0}, {"context": "8"}, {"prompt": 3}, {"prompt": "model"}])
def test_another_type_is_told_without_the_model(model, changes):
    changes = {name: model if value == "model" else value for name, value in changes.items()}
    arguments: dict[str, Any] = {"prompt": PROMPT, "num_tokens": 2, "context": 8, "key": KEY} | changes
    with pytest.raises(TypeCheckError, match=f"typechecking parameter '{next(iter(changes))}'") as told:
        generate(model, **arguments)
    assert "\n" not in str(told.value)
    assert len(str(told.value)) < 700


def test_the_key_alone_decides(model):
    def text(seed, num_tokens=20):
        key = jax.random.key(seed)
        return list(generate(model, PROMPT, num_tokens=num_tokens, context=8, temperature=1e3, key=key))

    assert text(0) == text(0)
    assert text(0) != text(1)
    assert text(0, 7) == text(0)[:7]
    assert len(set(text(0))) > 3  # near uniform: each token has randomness of its own


def test_one_compilation_serves_every_length(model, monkeypatch):
    traces = []

    def counted(logits, **options):
        traces.append(logits.shape)
        return sample_token(logits, **options)

    monkeypatch.setattr("rattn_eqx.inference.generate.sample_token", counted)
    assert len(list(generate(model, PROMPT, num_tokens=9, context=7, key=KEY))) == 9
    assert len(list(generate(model, PROMPT[:1], num_tokens=2, context=7, key=KEY))) == 2
    assert traces == [(11,)]


def test_forbidden_tokens_are_never_sampled(model):
    allowed = {2, 5}
    forbid = tuple(set(range(11)) - allowed)
    for temperature, top_p in ((0, None), (5.0, None), (5.0, 0.9)):
        options: dict[str, Any] = dict(temperature=temperature, top_p=top_p, forbid=forbid)
        drawn = set(generate(model, PROMPT, num_tokens=15, context=8, key=KEY, **options))
        assert drawn <= allowed
    assert list(generate(model, PROMPT, num_tokens=0, context=8, key=KEY)) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": PROMPT[:0]}, "the prompt is empty; give at least one token"),
        ({"prompt": np.array([3, 11])}, "prompt must hold token ids below vocabulary_size=11; got 11"),
        ({"prompt": np.array([-1])}, "got -1"),
        ({"forbid": (2, 40)}, "forbid must hold token ids below vocabulary_size=11; got 40"),
        ({"forbid": tuple(range(11))}, "forbid must leave a token to sample"),
        ({"temperature": -0.1}, "temperature must be at least 0; got -0.1"),
        ({"temperature": float("nan")}, "temperature must be at least 0; got nan"),
        ({"temperature": float("inf")}, "temperature must be finite; got more than 1.79e308"),
        ({"temperature": 10**400}, "temperature must be finite"),
        (
            {"prompt": "text"},
            "prompt must be a row of token ids; got <U1 of shape .4,.; the tokenizer's encode",
        ),
        ({"prompt": [[3, 1]]}, "prompt must be a row of token ids; got int64 of shape .1, 2."),
        ({"forbid": [1.5]}, "forbid must be a row of token ids; got float64 of shape .1,."),
        ({"forbid": [2**70]}, "forbid must be a row of token ids; got object"),
        ({"top_k": 0}, "top_k must be at least 1; got 0"),
        ({"top_p": 0.0}, r"top_p must lie in \(0, 1\]; got 0.0"),
        ({"top_p": 1.5}, "got 1.5"),
        ({"num_tokens": -1}, "num_tokens must be at least 0; got -1"),
        ({"context": 0}, "context must be at least 1; got 0"),
    ],
)
def test_bad_input_is_named_at_the_call(model, changes, message):
    arguments: dict[str, Any] = {"prompt": PROMPT, "num_tokens": 2, "context": 8, "key": KEY} | changes
    with pytest.raises(ValueError, match=f"generate: .*{message}|generate: {message}"):
        generate(model, **arguments)  # not iterated


def test_filter_logits_does_not_divide_by_0():
    with pytest.raises(ValueError, match="filter_logits: temperature must be above 0; got 0; sample_token takes 0"):
        filter_logits(jnp.zeros(3), temperature=0.0)
