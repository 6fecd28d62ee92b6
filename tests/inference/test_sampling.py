"""Sampling: which tokens stay, and how often each is drawn."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from rattn_eqx.inference.sampling import filter_logits, sample_token

KEY = jax.random.key(1)


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


def test_numbers_of_numpy():
    logits = jnp.asarray([0.3, -1.0, 1.2])
    of_numpy: dict[str, Any] = dict(temperature=np.float16(0.5), top_k=np.uint8(2), top_p=np.float32(0.5))
    np.testing.assert_array_equal(
        filter_logits(logits, **of_numpy),
        filter_logits(logits, temperature=0.5, top_k=2, top_p=0.5),
    )


def test_filter_logits_does_not_divide_by_0():
    with pytest.raises(ValueError, match="filter_logits: temperature must be above 0; got 0; sample_token takes 0"):
        filter_logits(jnp.zeros(3), temperature=0.0)
