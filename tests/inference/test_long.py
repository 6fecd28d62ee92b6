"""Long runs, by hand (`pytest -m long -s tests/inference/test_long.py`): memory stays flat, numbers do not drift."""

import dataclasses
import functools
import time

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas.numerics import relative_rms
from rattn_eqx.data.tokenizers import ByteTokenizer
from rattn_eqx.evaluation.perplexity import text_perplexity
from rattn_eqx.model.language_model import LanguageModel
from rattn_eqx.model.presets import tiny

pytestmark = pytest.mark.long
KEY = jax.random.key(0)


def resident() -> int:
    """Bytes that this process holds in memory now."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


def test_a_hundred_thousand_steps():
    count, together, piece = 100_000, 500, 500
    model = LanguageModel(tiny, key=KEY)
    compiled: list[str] = []

    def heard(event: str, duration_secs: float, **kwargs: str | int) -> None:
        compiled.extend([event] if event.endswith("backend_compile_duration") else [])

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def draw(cache, logits, number):
        def step(carry, index):
            cache, logits = carry
            token = jax.random.categorical(jax.random.fold_in(KEY, index), logits).astype(jnp.int32)
            logits, cache = model.decode_step(token, cache)
            return (cache, logits), token

        (cache, logits), tokens = jax.lax.scan(step, (cache, logits), number * together + jnp.arange(together))
        return cache, logits, tokens

    cache, logits, drawn, before = model.init_cache(count), jnp.zeros(tiny.vocabulary_size), [], 0
    started = time.monotonic()
    for number in range(count // together):
        cache, logits, tokens = draw(cache, logits, jnp.asarray(number, jnp.int32))
        drawn.append(np.asarray(tokens))
        if number == 0:
            jax.monitoring.register_event_duration_secs_listener(heard)
        if number == 9:
            before = resident()
    grown, seconds = resident() - before, time.monotonic() - started
    print(f"\n{count:,} steps in {seconds:.0f} s, {grown / 2**20:.1f} MiB more than after {10 * together:,}")
    assert not compiled
    assert grown < 16 * 2**20
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((cache, logits)))
    assert int(cache.length) == count

    with jax.enable_x64(True):  # the same tokens again, in pieces
        wide = LanguageModel(tiny, compute_dtype="float64", key=KEY)
        extend = eqx.filter_jit(lambda tokens, cache: wide.prefill(tokens, cache), donate="all")
        exact, of_exact = jnp.zeros(()), wide.init_cache(count)
        for tokens in np.concatenate(drawn).reshape(-1, piece):
            exact, of_exact = extend(jnp.asarray(tokens), of_exact)
        drift = relative_rms(logits, exact)
        pairs = zip(cache.layers, of_exact.layers, strict=True)
        states = [relative_rms(x.state, y.state) for x, y in pairs if x.state is not None]
    print(f"against float64: logits {drift:.1e}, states {', '.join(f'{x:.1e}' for x in states)}")
    assert drift < 1e-4


def test_a_text_of_a_million_tokens():
    model = LanguageModel(dataclasses.replace(tiny, pattern=("local",)), key=KEY)
    generator = np.random.default_rng(0)
    tokens = generator.integers(0, 256, 1_000_001).astype(np.uint16)
    text_perplexity(model, tokens[:100_000], ByteTokenizer())  # the allocator, too, has its fill by then
    before, started = resident(), time.monotonic()
    bins = text_perplexity(model, tokens, ByteTokenizer())
    grown = resident() - before
    print(f"\n1,000,000 tokens in {time.monotonic() - started:.0f} s, {grown / 2**20:.1f} MiB more than after 100,000")
    assert bins[-1].high == 1_000_000
    assert grown < 16 * 2**20
