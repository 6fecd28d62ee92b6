"""The TPU kernels: what the shared suite (tests/ops/test_ops.py) cannot ask of them, in the TPU interpreter.

It fills memory that nothing has written with NaN, and raises on a read out of bounds.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conformance import (
    BOTH,
    RLA,
    SWA,
    UNLIKE_SOFTMAX,
    Case,
    assert_conforms,
    bounds,
    compiled,
    errors,
    quick,
    reference,
    values_and_gradients,
)
from jax.experimental.pallas import tpu as pltpu

import pallas
from pallas.block_sizes import BlockSizes
from pallas.ops import choose
from pallas.tpu import plan, residual, residual_backward, window, window_backward


def blocks(chunks: int, chunk: int = 128) -> tuple[str, BlockSizes]:
    return "block_sizes", BlockSizes(tpu_chunk=chunk, tpu_window_chunk=chunk, tpu_block=chunks * chunk)


pytestmark = pytest.mark.kernel

SMALL, WIDE = (2, 1, 8, 8), (2, 1, 128, 128)
CASES = [
    Case(RLA, 300, 130, sizes=WIDE, mean=1.0, states=(), static=(blocks(1),)),
    Case(RLA, 390, 64, sizes=(1, 1, 64, 48), segments=(150, 30, 210), static=(blocks(2),)),
    Case(SWA, 300, 130, sizes=(2, 1, 128, 72), mean=1.0, static=(blocks(1), ("scale", -0.2))),
]
LONG = [
    Case(RLA, 1100, 512, sizes=(4, 1, 128, 128), mean=1.0, states=()),
    Case(RLA, 600, 256, sizes=(2, 1, 256, 192), states=("segment_state",), segments=(300, 300)),
    Case(RLA, 600, 64, sizes=(10, 1, 8, 8), static=(blocks(2, chunk=256),)),
    Case(SWA, 1100, 512, sizes=(4, 1, 128, 128), mean=1.0),
    Case(SWA, 300, 300, s=700, sizes=(10, 1, 8, 8), segments=(350, 350), static=(blocks(2),)),
    Case(BOTH, 600, 256, sizes=(2, 1, 256, 128)),
    Case(BOTH, 200, 30, s=463, sizes=(3, 1, 8, 8), segments=(70, 1, 392)),
]


@pytest.fixture(autouse=True)
def _no_state_of_the_interpreter():
    yield
    pltpu.reset_tpu_interpret_mode_state()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_conforms(case):
    assert_conforms(case, "bfloat16", "tpu")


@pytest.mark.long
@pytest.mark.parametrize("case", LONG, ids=str)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_longer_calls_conform(case, dtype):
    assert_conforms(case, dtype, "tpu")


@pytest.mark.parametrize("name", quick(*UNLIKE_SOFTMAX))
def test_maps_formed_in_the_kernel(name):
    feature_map = ("feature_map", getattr(pallas.feature_map, name))
    assert_conforms(Case(RLA, 140, 20, sizes=SMALL, states=(), static=(feature_map,)), "bfloat16", "tpu")


def test_nan_is_not_lost_in_integers():
    """The branches of rattention leave their kernels as int16, which has no NaN."""
    gain, x = jnp.ones((2, 8)), jnp.ones((40, 1, 8), jnp.bfloat16)
    q = jnp.ones((40, 2, 8), jnp.bfloat16).at[20, 1].set(jnp.nan)
    out = pallas.rattention(q, x, x, window=4, swa_gain=gain, rla_gain=gain, implementation="tpu")
    rows, heads = np.nonzero(np.isnan(np.asarray(out, np.float32)).all(axis=2))
    assert (rows.tolist(), heads.tolist()) == ([20], [1])
    assert np.isnan(np.asarray(out, np.float32)).sum() == 8


def test_values_in_another_dtype_than_keys():
    case = Case(RLA, 70, 16)
    arrays = case.arrays("bfloat16")
    arrays["v"] = arrays["v"].astype(np.float32)
    assert_conforms(case, "bfloat16", "tpu", arrays)


def test_vmap_is_one_launch():
    case = Case(RLA, 70, 16, states=())
    several = [case.arrays("bfloat16", seed) for seed in range(3)]
    arrays = {name: np.stack([one[name] for one in several]) for name in several[0]}
    assert_conforms(case, "bfloat16", "tpu", arrays, wrap=lambda op, arrays: jax.vmap(op)(arrays))

    def op(arrays):
        return jax.vmap(lambda x: pallas.residual_linear_attention(**x, window=16, implementation="tpu"))(arrays)

    with jax.default_matmul_precision("highest"):
        text = str(jax.make_jaxpr(op)({name: jnp.asarray(x) for name, x in arrays.items()}))
    assert text.count("pallas_call[") == 1


def test_every_kernel_tells_its_cost():
    x, gain = jax.ShapeDtypeStruct((300, 2, 64), jnp.bfloat16), jax.ShapeDtypeStruct((2, 64), jnp.float32)

    def both(x, gain):
        op = lambda x: pallas.rattention(x, x, x, window=100, swa_gain=gain, rla_gain=gain, implementation="tpu")
        out, pull = jax.vjp(op, x)
        return pull(out)

    text = str(jax.make_jaxpr(both)(x, gain))
    assert text.count("pallas_call[") == text.count("cost_estimate=CostEstimate(") == 5


def test_nothing_of_a_document_depends_on_another():
    case, inside = Case(BOTH, 300, 40, sizes=SMALL, segments=(70, 90, 140), static=(blocks(1),)), slice(70, 160)
    before = case.arrays("bfloat16")
    after = dict(before)
    for name in ("q", "k", "v", "q_rla", "k_rla"):
        after[name] = before[name][::-1] * np.asarray(3, before[name].dtype)
        after[name][inside] = before[name][inside]
    run = compiled(case, "bfloat16", implementation="tpu")
    first, second = run(before), run(after)
    for name in ("output", "d q", "d k", "d v", "d q_rla", "d k_rla"):
        np.testing.assert_array_equal(first[name][inside], second[name][inside], err_msg=name)
    assert not np.array_equal(first["output"], second["output"])


@pytest.mark.parametrize("op", [RLA, SWA])
def test_packed_equals_separate_to_the_bit(op):
    """Documents that begin where chunks do are computed by the same products in the same order."""
    lengths = (128, 256)
    case = Case(op, 384, 40, sizes=SMALL, segments=lengths, states=(), static=(blocks(1),))
    arrays = {name: jnp.asarray(x) for name, x in case.arrays("bfloat16").items()}
    settings: dict[str, Any] = dict(window=40, implementation="tpu") | dict(case.static)
    together = getattr(pallas, op)(**arrays, segment_ids=jnp.asarray(case.ids()), **settings)
    second = {name: x[128:] for name, x in arrays.items()}
    alone = getattr(pallas, op)(**second, segment_ids=jnp.zeros(256, jnp.int32), **settings)
    np.testing.assert_array_equal(np.asarray(together[128:], np.float32), np.asarray(alone, np.float32))


@pytest.mark.slow
def test_two_runs_are_equal_to_the_bit():
    case = Case(BOTH, 150, 40, sizes=SMALL)
    arrays, run = case.arrays("bfloat16"), compiled(case, "bfloat16", implementation="tpu")
    first, second = run(arrays), run(arrays)
    for name in first:
        np.testing.assert_array_equal(first[name], second[name], err_msg=name)


def test_which_implementation_serves(monkeypatch):
    q = jnp.ones((3, 2, 8), jnp.bfloat16)
    assert choose(RLA, "tpu", q, q, q) == "tpu"
    assert choose(RLA, None, q, q, q) == "chunked"  # never an interpreted kernel
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    assert choose(RLA, None, q, q, q) == "tpu"
    with jax.enable_x64(True):
        wide = jnp.ones((3, 2, 8), jnp.float64)
        assert choose(RLA, None, wide, wide, wide) == "chunked"


@pytest.fixture
def fresh():
    """Nothing traced before or with what a test plants is used."""
    jax.clear_caches()
    yield
    jax.clear_caches()


def look_for_races(monkeypatch, case: Case):
    params = pltpu.InterpretParams(detect_races=True, num_cores_or_threads=2)
    monkeypatch.setattr(plan.Plan, "interpreted", lambda plan: params)
    values_and_gradients(case, case.arrays("bfloat16"), "bfloat16", implementation="tpu")


def test_no_races(fresh, monkeypatch, capsys):
    look_for_races(monkeypatch, Case(BOTH, 300, 100, sizes=SMALL, segments=(130, 170), static=(blocks(1),)))
    assert "RACE DETECTED" not in capsys.readouterr().out


@pytest.mark.parametrize("op", quick(RLA, SWA))
def test_a_planted_race_is_found(fresh, monkeypatch, capsys, op):
    def parallel(plan, *order):
        return pltpu.CompilerParams(dimension_semantics=("parallel",) * (2 + len(order or ("time",))))

    monkeypatch.setattr(plan.Plan, "compiler_params", parallel)
    look_for_races(monkeypatch, Case(op, 300, 100, sizes=SMALL, static=(blocks(1),)))
    assert "RACE DETECTED" in capsys.readouterr().out


def replaced(function, **changes):
    """A function that sees its plan changed."""

    def wrong(plan, *others):
        return function(dataclasses.replace(plan, **{name: change(plan) for name, change in changes.items()}), *others)

    return wrong


def uncentred_mean(plan, state, mean):
    return residual_centre(plan, state, mean)[0], 0.0


def without_segments(plan, refs, chunk_index, state, mean, phi_k, v):
    return residual_advance(dataclasses.replace(plan, segmented=False), refs, chunk_index, state, mean, phi_k, v)


def without_values(plan, refs, chunk_index, state, mean, phi_k, v):
    rolled = [jnp.roll(x, 1, axis=0) for x in phi_k]
    return residual_advance(plan, refs, chunk_index, state, mean, rolled, v)


residual_centre, residual_advance = residual.centre, residual.advance
longer = replaced(window.masked, window=lambda plan: plan.window + 1)
shorter = replaced(window.masked, window=lambda plan: plan.window - 1)
RESIDUAL, WINDOW = Case(RLA, 300, 40, sizes=SMALL, states=(), static=(blocks(1),)), Case(SWA, 300, 40, sizes=SMALL)
SHORT = Case(RLA, 100, 40, sizes=SMALL, states=())  # few keys, of which each matters
PACKED = dataclasses.replace(RESIDUAL, segments=(70, 1, 229))
BUGS: dict[str, tuple[Case, list[tuple[Any, str, Any]]]] = {
    "window one too long, forward": (WINDOW, [(window, "masked", longer)]),
    "window one too short, backward": (WINDOW, [(window_backward, "masked", shorter)]),
    "edge of the residual set strict": (SHORT, [(residual, "lanes", lambda shape: plan.lanes(shape) + 1)]),
    "edge of the residual set strict, backward": (
        RESIDUAL,
        [(residual_backward, "lanes", lambda shape: plan.lanes(shape) + 1)],
    ),
    "mean of a centred state left out": (RESIDUAL, [(residual, "centre", uncentred_mean)]),
    "keys and values of the state apart": (RESIDUAL, [(residual, "advance", without_values)]),
    "state saved late": (
        RESIDUAL,
        [(residual_backward, "centre", lambda plan, state, mean: residual_centre(plan, state * 0, mean))],
    ),
    "state carried into the next segment": (PACKED, [(residual, "advance", without_segments)]),
}


@pytest.mark.parametrize("bug", quick(*BUGS))
def test_a_planted_bug_is_caught(fresh, monkeypatch, bug):
    case, changes = BUGS[bug]
    arrays = case.arrays("bfloat16")
    expected = reference(case, arrays)
    allowed = bounds(case, "bfloat16", "tpu", arrays, expected)
    for module, name, wrong in changes:
        monkeypatch.setattr(module, name, wrong)
    got = values_and_gradients(case, arrays, "bfloat16", implementation="tpu")
    excess = {name: error / (allowed[name] or 1) for name, error in errors(case, got, expected).items()}
    assert not all(ratio <= 3 for ratio in excess.values()), excess  # NaN is caught too
