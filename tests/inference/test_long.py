"""Long runs, by hand (`pytest -m long -s tests/inference/test_long.py`): memory stays flat, numbers do not drift."""

import dataclasses
import time

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas.numerics import relative_rms
from rattn_eqx.data.tokenizers import ByteTokenizer
from rattn_eqx.evaluation.perplexity import text_perplexity
from rattn_eqx.inference.generate import generate_batch
from rattn_eqx.model.language_model import LanguageModel
from rattn_eqx.model.presets import tiny

pytestmark = pytest.mark.long
KEY = jax.random.key(0)


def resident() -> int:
    """Bytes that this process holds in memory now."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


def test_a_hundred_thousand_steps():
    count, piece = 100_000, 512
    model = LanguageModel(tiny, key=KEY)
    compiled, before, drawn = [], 0, []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, seconds, **_: compiled.append(event) if event.endswith("backend_compile_duration") else None
    )
    started = time.monotonic()
    options = dict(num_tokens=count, key=KEY, stream=False, max_length=count + 1)
    for number, step in enumerate(generate_batch(model, [[256]], **options)):
        drawn += [one.token for one in step]
        if number == 20:
            before, programs = resident(), len(compiled)
    grown = resident() - before
    print(
        f"\n{count:,} tokens in {time.monotonic() - started:.0f} s, {grown / 2**20:.1f} MiB more after the first 1,344"
    )
    assert len(drawn) == count
    assert len(compiled) == programs
    assert grown < 16 * 2**20

    def read(model):  # the same tokens again, in pieces, with their states
        cache = model.init_cache(count)
        extend = eqx.filter_jit(lambda tokens, cache: model.prefill(tokens, cache))
        tokens = jnp.asarray([256, *drawn[: count // piece * piece - 1]], jnp.int32)
        for start in range(0, len(tokens), piece):
            logits, cache = extend(tokens[start : start + piece], cache)
        return logits, cache

    step = eqx.filter_jit(lambda token, cache: model.decode_step(token, cache), donate="all")
    cache = model.init_cache(count)
    for token in [256, *drawn[: count // piece * piece - 1]]:
        logits, cache = step(jnp.asarray(token, jnp.int32), cache)
    with jax.enable_x64(True):
        exact, wide = read(LanguageModel(tiny, compute_dtype="float64", key=KEY))
        drift = relative_rms(logits, exact)
        states = [
            relative_rms(x.state, y.state)
            for x, y in zip(cache.layers, wide.layers, strict=True)
            if x.state is not None
        ]
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(cache))
    print(f"against float64: logits {drift:.1e}, states {', '.join(f'{x:.1e}' for x in states)}")
    assert drift < 1e-3


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
