"""Packed documents equal the same documents run alone, and no document reads another."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import token_loop
from conformance import BOTH, RLA, SWA, with_kernels
from conftest import IMPLEMENTATIONS
from hypothesis import given, settings
from hypothesis import strategies as st

import pallas
from pallas.numerics import relative_rms

BOUND = 1e-5  # float32
TOTAL = 500  # several chunks; the last document fills up to it, so that the packed call is compiled once per window
PER_TOKEN = ("q", "k", "v", "q_rla", "k_rla")

lengths = st.lists(st.sampled_from([1, 9, 70, 150]), min_size=1, max_size=3)
windows = pytest.mark.parametrize("window", [0, 1, 100])


def draw(seed=0):
    arrays = token_loop.draw(TOTAL, head_size=8, seed=seed)
    arrays["learned_state"] = arrays.pop("initial_state")
    del arrays["segment_state"]
    return {name: array.astype(np.float32) for name, array in arrays.items()}


@functools.partial(
    jax.jit,
    static_argnames=("window", "implementation"),
    compiler_options={"xla_backend_optimization_level": 0},  # compiling is most of the time
)
def values_and_gradients(arrays, ids, cotangent, window, implementation):
    """A learned initial state is passed as both states: every document starts from it."""

    def op(arrays):
        arrays = dict(arrays)
        learned_state = arrays.pop("learned_state")
        states = {"initial_state": learned_state, "segment_state": learned_state}
        return pallas.rattention(**arrays, **states, window=window, segment_ids=ids, implementation=implementation)

    with jax.default_matmul_precision("highest"):
        output, pull_back = jax.vjp(op, arrays)
        return {"output": output} | {f"d {name}": x for name, x in pull_back(cotangent)[0].items()}


@windows
@settings(max_examples=8)
@given(lengths=lengths, repeat_ids=st.booleans())
def test_packed_equals_alone(implementation, window, lengths, repeat_ids):
    arrays = draw()
    lengths = [*lengths, TOTAL - sum(lengths)]
    ids = token_loop.segment_ids(*lengths, ids=tuple(i % 2 if repeat_ids else 3 * i for i in range(len(lengths))))
    ends = np.cumsum(lengths)
    cotangent = np.random.default_rng(1).standard_normal((TOTAL, *arrays["swa_gain"].shape)).astype(np.float32)
    cotangent[ends[-2] :] = 0  # the filler's outputs are not compared
    packed = values_and_gradients(arrays, jnp.asarray(ids), cotangent, window, implementation)

    shared = {name: 0.0 for name in arrays if name not in PER_TOKEN}
    for start, end in zip([0, *ends[:-2]], ends[:-1], strict=True):
        own = {name: array[start:end] if name in PER_TOKEN else array for name, array in arrays.items()}
        alone = values_and_gradients(own, None, cotangent[start:end], window, implementation)
        for name in ("output", *(f"d {name}" for name in PER_TOKEN)):
            assert_close(f"{name} of tokens {start}:{end}", packed[name][start:end], alone[name], window)
        shared = {name: total + alone[f"d {name}"] for name, total in shared.items()}
    for name, total in shared.items():
        assert_close(f"d {name}", packed[f"d {name}"], total, window)
    for name in PER_TOKEN:
        assert not np.any(packed[f"d {name}"][ends[-2] :]), f"d {name} of a document without cotangent"


def assert_close(name, got, expected, window):
    got, expected = np.asarray(got, np.float64), np.asarray(expected, np.float64)
    # A softmax over one key has no gradient but for rounding: measure that against 1.
    single = (window == 1 or len(expected) == 1) and name.startswith(("d q of", "d k of"))
    error = np.sqrt(np.mean((got - expected) ** 2)) if single else relative_rms(got, expected)
    assert error <= BOUND, f"{name}: {error:.1e}"


@windows
@settings(max_examples=8)
@given(lengths=lengths, kept=st.integers(0, 3), size=st.sampled_from([1.0, 100.0]))
def test_nothing_of_a_document_depends_on_another(implementation, window, lengths, kept, size):
    lengths = [*lengths, TOTAL - sum(lengths)]
    kept = kept % len(lengths)
    end = sum(lengths[: kept + 1])
    inside = slice(end - lengths[kept], end)
    ids = jnp.asarray(token_loop.segment_ids(*lengths, ids=tuple(i % 2 for i in range(len(lengths)))))
    cotangent = np.random.default_rng(1).standard_normal((TOTAL, 4, 6)).astype(np.float32)

    arrays, other = draw(), draw(seed=1)
    changed, changed_cotangent = dict(arrays), size * cotangent[::-1]
    for name in PER_TOKEN:
        changed[name] = size * other[name]
        changed[name][inside] = arrays[name][inside]
    changed_cotangent[inside] = cotangent[inside]

    before = values_and_gradients(arrays, ids, cotangent, window, implementation)
    after = values_and_gradients(changed, ids, changed_cotangent, window, implementation)
    for name in ("output", *(f"d {name}" for name in PER_TOKEN)):
        np.testing.assert_array_equal(after[name][inside], before[name][inside], err_msg=name)
    if len(lengths) > 1:
        assert not np.array_equal(after["output"], before["output"])


SPOILT = slice(150, 200)  # the second document; the others are compared
BAD = {
    "q": (170, 0),
    "k": (160, 1),
    "v": (155, 0),
    "q_rla": (199, 1),
    "k_rla": (158, 0),
}


@pytest.mark.parametrize(
    ("implementation", "op"), with_kernels(SWA, RLA, BOTH, portable=("reference", *IMPLEMENTATIONS))
)
def test_what_is_not_finite_stays_in_its_document(implementation, op):
    """Values and gradients of other documents are those without it, to the bit; its own outputs show it.

    As of a loss that reads all outputs of a document: where one is not finite, none of their cotangents is.
    """
    window = 20
    drawn = token_loop.draw(260, head_size=8)
    per_token = {"rattention": PER_TOKEN}.get(op, ("q", "k", "v"))
    arrays = {name: jnp.asarray(drawn[name], jnp.bfloat16) for name in per_token}
    if op == "rattention":
        arrays |= {name: jnp.asarray(drawn[name], jnp.float32) for name in ("swa_gain", "rla_gain")}
    if op != "sliding_window_attention":
        arrays["segment_state"] = jnp.asarray(drawn["segment_state"], jnp.float32)
    ids = jnp.asarray(token_loop.segment_ids(150, 50, 60))
    call = functools.partial(getattr(pallas, op), window=window, segment_ids=ids, implementation=implementation)

    @functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
    def run(arrays):
        output, pull_back = jax.vjp(lambda arrays: call(**arrays), arrays)
        of_document = jnp.where(jnp.isfinite(output).all(), 1.0, jnp.nan).astype(output.dtype)
        return {"output": output} | pull_back(jnp.ones_like(output).at[SPOILT].set(of_document))[0]

    def with_bad(value):
        bad = arrays | {name: arrays[name].at[BAD[name]].set(value) for name in per_token}
        return {name: np.asarray(x, np.float32) for name, x in run(bad).items()}

    expected, outside = with_bad(0), np.r_[0 : SPOILT.start, SPOILT.stop : 260]
    for value in (np.nan, np.inf):
        got = with_bad(value)
        for name in ("output", *per_token):
            np.testing.assert_array_equal(got[name][outside], expected[name][outside], err_msg=f"{name}, {value}")
            assert np.isfinite(got[name][outside]).all()
        spoilt = np.isnan(got["output"][SPOILT]).min(axis=-1)  # [t, h], two query heads to a key/value head
        assert not spoilt[:5].any()
        assert spoilt[5:, :2].all()  # from the bad value on, of its key/value head


def test_a_start_state_that_is_not_finite_stays_in_the_documents_that_read_it(implementation):
    drawn = token_loop.draw(60, head_size=8)
    q, k, v = (jnp.asarray(drawn[name], jnp.float32) for name in ("q", "k", "v"))
    state = jnp.asarray(drawn["initial_state"], jnp.float32).at[0, 0, 0].set(jnp.nan)
    ids, options = jnp.asarray(token_loop.segment_ids(20, 40)), dict(window=5, implementation=implementation)
    call = functools.partial(pallas.residual_linear_attention, q, k, v, segment_ids=ids, **options)
    first, own_heads = np.arange(60)[:, None] < 20, np.arange(4) < 2  # the state of key/value head 0 is bad
    for name, reads in (("initial_state", first), ("segment_state", ~first)):
        out, final = call(**{name: state}, return_final_state=True)
        np.testing.assert_array_equal(np.isnan(out).all(axis=-1), reads & own_heads, err_msg=name)
        np.testing.assert_array_equal(np.isnan(final).all(axis=(1, 2)), [name == "segment_state", False])
        assert np.isfinite(out[~(reads & own_heads)]).all()
