"""One token at a time is the whole sequence: values and state, at windows that are empty, turning, and never full."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conformance import BOTH, SWA, Case

import pallas
from pallas import StepCache
from pallas.tools.cases import compiled
from pallas.tools.check import hold

CASES = [
    Case(BOTH, 3, 0, s=9, sizes=(4, 2, 8, 5), steps=True, backward=False),
    Case(BOTH, 3, 1, s=3, sizes=(3, 1, 8, 8), steps=True, backward=False, map="relu", states=()),
    Case(BOTH, 4, 5, s=7, sizes=(6, 2, 8, 5), steps=True, backward=False, batch=2, shared=True),  # full on the way
    Case(BOTH, 2, 63, s=200, sizes=(2, 2, 8, 8), steps=True, backward=False, map="pair", static=(("scale", -0.2),)),
    Case(BOTH, 2, 300, s=20, sizes=(2, 1, 8, 8), steps=True, backward=False, map="taylor"),
    Case(SWA, 3, 7, s=30, sizes=(5, 1, 8, 4), steps=True, backward=False),
    Case(SWA, 3, 64, s=3, sizes=(4, 2, 8, 8), steps=True, backward=False, sinks=True),
    Case(BOTH, 2, 5, s=9, sizes=(6, 2, 8, 5), steps=True, backward=False, sinks=True, swa_norm=False),
]


@pytest.mark.parametrize(
    ("case", "dtype"),
    [*((case, "float32") for case in CASES), *((CASES[2], dtype) for dtype in ("bfloat16", "float64"))],
    ids=str,
)
def test_chunked(case, dtype):
    (held,) = hold([dataclasses.replace(case, dtype=dtype, states=case.states[:1])], "chunked")
    assert not held.wrong


@pytest.mark.parametrize("case", [CASES[0], CASES[2], CASES[5], CASES[7]], ids=str)
def test_the_definition_of_a_step_is_that_of_the_sequence(case, monkeypatch):
    case = dataclasses.replace(case, states=case.states[:1], dtype="float32")
    whole = compiled(case, "float64", "reference", on="cpu")(case)
    step = lambda name: lambda *given, **named: OPS[name](*given, **named | {"implementation": "reference"})
    for name in OPS:
        monkeypatch.setattr(pallas, name, step(name))
    by_steps = compiled(case, "float64", "chunked", on="cpu")(case)
    for name, expected in whole.items():
        np.testing.assert_allclose(by_steps[name], expected, rtol=1e-10, atol=1e-12, err_msg=name)


OPS = {name: getattr(pallas, name) for name in ("rattention_step", "sliding_window_attention_step")}


def cache(window: int = 3, keys_rla: bool = False, state: bool = True) -> StepCache:
    ring = jnp.zeros((window, 1, 4))
    return StepCache(ring, ring if keys_rla else None, ring, jnp.zeros((1, 8, 4)) if state else None, jnp.array(0))


@pytest.mark.parametrize(
    ("op", "of_cache", "changes", "message"),
    [
        ("rattention_step", cache(), {"q": jnp.ones((2, 4)), "k": jnp.ones((0, 4)), "v": jnp.ones((0, 4))}, "multiple"),
        ("rattention_step", cache(state=False), {}, r"the cache's state must have shape \(1, 8, 4\).* got none"),
        ("rattention_step", cache(), {"v": jnp.ones((1, 5))}, r"the cache's values must have shape \(3, 1, 5\)"),
        (
            "rattention_step",
            cache(),
            {"feature_map": pallas.feature_map.identity},
            r"state must have shape \(1, 4, 4\)",
        ),
        ("rattention_step", cache(keys_rla=True), {}, "k_rla and the cache's keys_rla must both be given, or neither"),
        ("rattention_step", cache(), {"k_rla": jnp.ones((1, 4))}, "got k_rla given, keys_rla None"),
        ("sliding_window_attention_step", cache(), {}, "must have slots and no state; got 3 slots and a state"),
        ("sliding_window_attention_step", cache(0, state=False), {}, "got 0 slots and no state"),
        ("rattention_step", cache(), {"implementation": "fast"}, "implementation must be None"),
    ],
)
def test_what_does_not_fit_is_told(op, of_cache, changes, message):
    given = dict(q=jnp.ones((2, 4)), k=jnp.ones((1, 4)), v=jnp.ones((1, 4)))
    if op == "rattention_step":
        given |= dict(swa_gain=jnp.ones((2, 4)), rla_gain=jnp.ones((2, 4)))
    if "v" in changes:
        given |= dict(swa_gain=jnp.ones((2, changes["v"].shape[1])), rla_gain=jnp.ones((2, changes["v"].shape[1])))
    with pytest.raises(ValueError, match=f"{op}: .*{message}"):
        getattr(pallas, op)(**given | changes, cache=of_cache)


def test_kernels_that_know_no_steps_say_so():
    ring = jnp.zeros((3, 1, 4))
    of_cache = StepCache(ring, None, ring, None, jnp.array(0))
    with pytest.raises(NotImplementedError, match=r"implementation='tpu' has no kernel for one token; use .*'chunked'"):
        pallas.sliding_window_attention_step(
            jnp.ones((2, 4)), jnp.ones((1, 4)), jnp.ones((1, 4)), of_cache, implementation="tpu"
        )


def test_gradients_of_a_step_are_those_of_the_sequence():
    generator = np.random.default_rng(0)
    shapes = ((4, 2, 4), (4, 1, 4), (4, 1, 4), (2, 4))
    q, k, v, gain = (jnp.asarray(generator.standard_normal(shape), jnp.float32) for shape in shapes)

    def by_steps(k):
        of_cache, total = cache(2), 0.0
        for i in range(4):
            out, of_cache = pallas.rattention_step(q[i], k[i], v[i], of_cache, swa_gain=gain, rla_gain=gain)
            total = total + jnp.square(out).sum()
        return total

    def whole(k):
        out: Any = pallas.rattention(q, k, v, window=2, swa_gain=gain, rla_gain=gain)
        return jnp.square(out).sum()

    np.testing.assert_allclose(jax.jit(jax.grad(by_steps))(k), jax.jit(jax.grad(whole))(k), rtol=1e-3, atol=1e-4)
