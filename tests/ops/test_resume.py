"""A sequence cut anywhere and continued by the contract's rule equals the whole, in values and gradients."""

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import token_loop
from hypothesis import given, settings
from hypothesis import strategies as st

import pallas
from pallas.numerics import relative_rms

BOUND = 1e-5  # float32
LENGTH = 150
points = st.sets(st.integers(1, LENGTH - 1), min_size=1, max_size=3)
boundaries = st.just(set()) | points
windows = st.sampled_from([0, 1, 5, 100, LENGTH])


def whole(arrays, ids, window, implementation):
    ids = None if ids is None else jnp.asarray(ids)
    return pallas.rattention(
        **arrays, window=window, segment_ids=ids, return_final_state=True, implementation=implementation
    )


def in_pieces(arrays, ids, cuts, window, implementation):
    """Each call is given the state, keys, values and ids that the call before it left, and its own tokens."""
    parameters = {name: arrays[name] for name in ("swa_gain", "rla_gain", "segment_state")}
    of_keys = {name: arrays[name] for name in ("k", "v", "k_rla")}
    if ids is not None:
        of_keys["segment_ids"] = jnp.asarray(ids)
    state = arrays["initial_state"]
    kept = {name: x[:0] for name, x in of_keys.items()}
    outputs = []
    for start, end in itertools.pairwise([0, *sorted(cuts), LENGTH]):
        if window == 0 and start > 0 and ids is not None and ids[start] != ids[start - 1]:
            state = arrays["segment_state"]  # no key tells the op that the segment has changed
        given_keys = {name: jnp.concatenate([kept[name], x[start:end]]) for name, x in of_keys.items()}
        output, state = pallas.rattention(
            arrays["q"][start:end],
            q_rla=arrays["q_rla"][start:end],
            **given_keys,
            **parameters,
            initial_state=state,
            window=window,
            return_final_state=True,
            implementation=implementation,
        )
        outputs.append(output)
        kept = {name: x[len(x) - min(window, len(x)) :] for name, x in given_keys.items()}
    return jnp.concatenate(outputs), state


def values_and_gradients(op, arrays):
    @functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})  # compiling is most of the time
    def pulled_back(arrays):
        (output, final_state), pull_back = jax.vjp(op, arrays)
        generator = np.random.default_rng(1)
        cotangents = tuple(
            jnp.asarray(generator.standard_normal(x.shape).astype(np.float32)) for x in (output, final_state)
        )
        (gradients,) = pull_back(cotangents)
        return {"output": output, "final_state": final_state} | {f"d {name}": x for name, x in gradients.items()}

    with jax.default_matmul_precision("highest"):
        return pulled_back(arrays)


def assert_resumes(implementation, cuts, boundaries, window):
    arrays = {name: array.astype(np.float32) for name, array in token_loop.draw(LENGTH).items()}
    ids = None
    if boundaries:
        ids = token_loop.segment_ids(*np.diff([0, *sorted(boundaries), LENGTH]).tolist()) % 2
    expected = values_and_gradients(lambda arrays: whole(arrays, ids, window, implementation), arrays)
    got = values_and_gradients(lambda arrays: in_pieces(arrays, ids, cuts, window, implementation), arrays)
    for name in expected:
        error = relative_rms(got[name], expected[name])
        if window == 1 and name in ("d q", "d k"):  # constant softmax: 0 but for rounding
            error = float(np.max(np.abs(got[name])))
        assert error <= BOUND, f"{name}: {error:.1e}"


@pytest.mark.parametrize(
    ("cuts", "boundaries", "window"),
    [
        ({1, 3, 4}, set(), 5),  # pieces shorter than the window
        ({60, 100}, {30, 60}, 0),  # a cut at a boundary, without a key to tell
        ({1, 60, 149}, {59, 61}, 1),
        ({60, 100}, {58, 99}, 100),
        ({50}, {50}, LENGTH),
    ],
)
def test_pieces_equal_the_whole(implementation, cuts, boundaries, window):
    assert_resumes(implementation, cuts, boundaries, window)


@pytest.mark.parametrize(
    ("cuts", "boundaries", "window"),
    [
        ({60, 100}, {60, 100}, 5),
        ({60}, {55, 56}, 5),  # the keys kept begin with the last token of another segment
    ],
)
def test_pieces_of_the_reference_equal_the_whole(cuts, boundaries, window):
    assert_resumes("reference", cuts, boundaries, window)


@pytest.mark.long
@settings(max_examples=20)
@given(cuts=points, boundaries=boundaries, window=windows)
def test_any_pieces_equal_the_whole(implementation_or_reference, cuts, boundaries, window):
    assert_resumes(implementation_or_reference, cuts, boundaries, window)


def test_a_segment_that_begins_where_no_key_is_kept_begins_from_segment_state():
    arrays = {name: jnp.asarray(x, jnp.float32) for name, x in token_loop.draw(LENGTH).items()}
    q, k, v = (arrays[name][:8] for name in ("q_rla", "k_rla", "v"))
    ids = jnp.asarray([0] * 4 + [1] * 4)
    fresh = arrays["segment_state"]

    @jax.jit
    def run():
        rla: Any = functools.partial(pallas.residual_linear_attention, window=0, segment_state=fresh)
        expected = rla(q, k, v, segment_ids=ids)
        begun, state = rla(q[:4], k[:4], v[:4], segment_ids=ids[:4], return_final_state=True)
        continued = [rla(q[4:], k[4:], v[4:], segment_ids=ids[4:], initial_state=start) for start in (fresh, state)]
        return expected, *(jnp.concatenate([begun, rest]) for rest in continued)

    expected, as_said, as_if_nothing_had_begun = run()
    assert relative_rms(as_said, expected) <= BOUND
    assert relative_rms(as_if_nothing_had_begun, expected) > 0.1
    assert "pass it `segment_state`" in (pallas.residual_linear_attention.__doc__ or "")


def test_one_token_at_a_time():
    """Decoding: each token is its own call."""
    window = 5
    arrays = {name: jnp.asarray(x, jnp.float32) for name, x in token_loop.draw(LENGTH).items()}
    arrays |= {name: arrays[name][:12] for name in ("q", "k", "v", "q_rla", "k_rla")}
    with jax.default_matmul_precision("highest"):
        expected, expected_state = whole(arrays, None, window, "reference")
        state = arrays["initial_state"]
        for token in range(12):
            first_key = max(0, token - window)
            of_keys: dict = {name: arrays[name][first_key : token + 1] for name in ("k", "v", "k_rla")}
            output, state = pallas.rattention(
                arrays["q"][token : token + 1],
                q_rla=arrays["q_rla"][token : token + 1],
                **of_keys,
                swa_gain=arrays["swa_gain"],
                rla_gain=arrays["rla_gain"],
                initial_state=state,
                window=window,
                return_final_state=True,
            )
            assert relative_rms(output[0], expected[token]) <= BOUND, token
    assert relative_rms(state, expected_state) <= BOUND
