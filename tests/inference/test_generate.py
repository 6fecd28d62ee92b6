"""Sampling: which tokens stay, how often each is drawn, and that generation is the plain loop over prefixes."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

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
    np.testing.assert_allclose(filtered[kept], logits[kept] / temperature, rtol=1e-6)


def test_top_p_of_1_keeps_even_the_least_likely():
    logits = jnp.asarray([0.0, -30.0, -60.0])
    np.testing.assert_array_equal(filter_logits(logits, temperature=1.0, top_p=1.0), logits)


def test_an_excluded_token_stays_excluded_under_jit():
    logits = jnp.asarray([1.0, -jnp.inf, 0.5, -jnp.inf])
    filtered = jax.jit(lambda x: filter_logits(x, temperature=0.5, top_k=3, top_p=0.99))(logits)
    np.testing.assert_array_equal(filtered, [2.0, -np.inf, 1.0, -np.inf])


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
