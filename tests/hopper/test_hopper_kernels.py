"""The Hopper kernels: what tests/ops/test_ops.py cannot ask of them. Interpreted where there is no GPU."""

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
from hopper_cases import ODD, PAIR, WIDE, blocks

import pallas
from pallas import hopper
from pallas.hopper import gradients, ops, warpgroup
from pallas.numerics import relative_rms
from pallas.ops import choose
from pallas.tools import cases

pytest.importorskip("jax", "0.11", reason="the kernels need jax 0.11 (Python 3.12)")


pytestmark = pytest.mark.kernel


CASES = [  # head sizes 64 and 128 form phi in the kernel, others outside it
    Case(SWA, 1, 64, s=9, sizes=PAIR),
    Case(SWA, 65, 64, sizes=(3, 1, 64, 40), mean=1.0),
    Case(SWA, 200, 100, s=263, sizes=WIDE, segments=(90, 1, 172)),
    Case(SWA, 400, 350, sizes=PAIR, static=(("scale", -0.2), blocks(64, 1))),
    Case(RLA, 63, 1, sizes=PAIR),
    Case(RLA, 200, 0, sizes=(1, 1, 64, 64), segments=(70, 130)),
    Case(RLA, 300, 64, sizes=(2, 1, 64, 48), mean=1.0, static=(blocks(64, 2),)),
    Case(RLA, 101, 100, sizes=WIDE, states=("initial_state",)),
    Case(
        RLA, 255, 0, s=318, sizes=(1, 1, 64, 64), states=(), static=(blocks(64, 3),)
    ),  # 192 keys a state, 128 queries a tile
    Case(RLA, 300, 10, sizes=PAIR, states=("segment_state",), segments=(150, 30, 120), static=(blocks(64, 3),)),
    Case(BOTH, 63, 64, sizes=WIDE, mean=1.0),
    Case(BOTH, 64, 64, s=130, sizes=ODD),
    Case(BOTH, 130, 1, sizes=(2, 1, 40, 72)),
    Case(BOTH, 200, 64, sizes=ODD, mean=1.0, static=(blocks(128, 2),)),
    Case(BOTH, 200, 30, s=263, sizes=PAIR, segments=(70, 1, 130, 62), static=(blocks(64, 3),)),
]
LONG = [CASES[i] for i in (4, 7, 10, 11, 13)]  # by hand; LOG.md has the planted bugs that the others see


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=pytest.mark.long) if case in LONG else case for case in CASES], ids=str
)
def test_conforms(case):
    assert_conforms(case, "bfloat16", "gpu")


@pytest.mark.parametrize("name", quick(*UNLIKE_SOFTMAX))
def test_maps_formed_in_the_kernel(name):
    feature_map = ("feature_map", getattr(pallas.feature_map, name))
    assert_conforms(Case(RLA, 140, 20, sizes=PAIR, static=(feature_map, blocks(64, 1))), "bfloat16", "gpu")


def test_features_in_several_slices():
    feature_map = ("feature_map", pallas.feature_map.taylor)  # f = 153: three slices of 64, and one of zeros
    assert_conforms(Case(RLA, 140, 20, sizes=(2, 1, 16, 16), static=(feature_map, blocks(64, 1))), "bfloat16", "gpu")


@pytest.mark.parametrize("op", quick(BOTH, SWA, RLA))
def test_vmap(op):
    case = Case(op, 70, 16, sizes=PAIR)
    several = [case.arrays("bfloat16", seed) for seed in range(3)]
    arrays = {name: np.stack([one[name] for one in several]) for name in several[0]}
    assert_conforms(case, "bfloat16", "gpu", arrays, wrap=lambda op, arrays: jax.vmap(op)(arrays))


def planned(monkeypatch, case: Case):
    """The plan of a call, and its padded inputs with a batch axis."""
    found = []

    def output(plan, inputs, segments):
        found.append((plan, jax.tree.map(lambda x: x[None], inputs)))
        return jnp.zeros((plan.num_queries, plan.num_heads, plan.head_size), jnp.bfloat16)

    with monkeypatch.context() as patch:
        patch.setattr(gradients, "output", output)
        arrays = {name: jnp.asarray(x) for name, x in case.arrays("bfloat16").items()}
        ids = None if not case.segments else jnp.asarray(case.ids())
        keywords = dict(window=case.window, segment_ids=ids, implementation="gpu", **dict(case.static))
        getattr(pallas, case.op)(**arrays, **keywords)
    return found[0]


@pytest.mark.parametrize(("segments", "reads"), [((), None), ((30, 40), [(1, 0), (0, 1), (1, 0), (0, 1)])])
def test_start_states_are_kept_in_two_parts_where_features_are_operands(monkeypatch, segments, reads):
    plan, inputs = planned(monkeypatch, Case(RLA, 70, 16, sizes=(2, 1, 40, 40), segments=segments))
    read, means = jax.jit(gradients._as_kernels_read, static_argnums=0)(plan, inputs)
    n, states = plan.num_start_states, inputs.start_states
    tiles, means = (np.asarray(x, np.float32) for x in (read.start_states, means))
    assert (tiles.shape[1], means.shape[1]) == (2 * n, n)
    assert np.any(tiles[:, n:])
    whole = tiles[:, :n] + tiles[:, n:] + np.repeat(means.swapaxes(-1, -2), plan.head_size, axis=-1)
    np.testing.assert_allclose(whole, states, atol=1e-4)
    starts = jnp.array([0, 30])  # the first segment's queries, and later ones
    found = [plan.reads_start(tile, starts) for tile in range(2 * n)]
    assert found == [None] * 2 if reads is None else [tuple(x.astype(int).tolist()) for x in found] == reads


def test_a_slice_is_centred_over_the_features_that_are_not_padding(monkeypatch):
    plan, _ = planned(monkeypatch, Case(RLA, 70, 16, sizes=(2, 1, 40, 40)))
    plan = dataclasses.replace(plan, feature_size=153, slices=4)
    assert plan.features_of(jnp.arange(4)).tolist() == [64, 64, 25, 1]


@pytest.mark.parametrize(
    ("value_size", "eps", "size"), [(128, 1e-6, 1.0), (33, 1e-6, 1e-4), (1, 0.01, 1.0), (64, 0.0, 1e9)]
)
def test_what_is_normed_survives_integers(value_size, eps, size):
    x = size * np.random.default_rng(0).standard_normal((64, value_size)).astype(np.float32)
    x[0] = size * (np.arange(value_size) == 0)  # the largest entry there can be
    x[1] = 0
    r = (jnp.mean(x * x, axis=1) + eps) ** -0.5
    r = jnp.where(jnp.isinf(r), 1.0, r).at[2].set(0.0)  # of an infinite row
    y = (x * r[:, None]).at[2].set(jnp.nan)
    step = warpgroup.step_of_normed(r, value_size, eps)
    found = warpgroup.unpack_normed(warpgroup.pack_normed(y, step), step)
    assert relative_rms(found[3:], y[3:]) < 1.2e-4
    np.testing.assert_allclose(found[:2], y[:2], rtol=1e-4)
    assert jnp.all(jnp.isnan(found[2]))


def test_the_second_part_of_a_cotangent_reaches_keys():
    """Where few keys are large, values lie along the output, to which d_rla is orthogonal: without it 5.4e-3."""
    case = Case(BOTH, 200, 64, sizes=PAIR, states=(), map="exp", dtype="bfloat16", final=False, seed=2)
    case = dataclasses.replace(case, mean=-1.0, size_rla=3.0, size=0.01)
    forms = (("bfloat16", "gpu", None), ("float64", "reference", "cpu"))
    found, expected = (cases.compiled(case, *form)(case) for form in forms)
    assert errors(case, found, expected)["d k_rla"] < 4e-3


def test_blocks_are_the_measured_ones_unless_the_caller_says(monkeypatch):
    monkeypatch.setattr(ops, "_device_kind", lambda: "NVIDIA H100 80GB HBM3")
    case = Case(SWA, 70, 16, sizes=PAIR)
    assert planned(monkeypatch, case)[0].chunk == 64
    assert planned(monkeypatch, dataclasses.replace(case, static=(blocks(128, 1),)))[0].chunk == 128


def test_split_and_resumed_equals_whole():
    case, first = Case(BOTH, 100, 30, sizes=PAIR, states=("initial_state",)), 40
    arrays = case.arrays("bfloat16")

    def resumed(_, arrays):
        static: dict[str, Any] = dict(window=case.window, return_final_state=True, implementation="gpu")
        per_token = [name for name in arrays if name in ("q", "k", "v", "q_rla", "k_rla")]
        begin = {name: arrays[name][:first] for name in per_token}
        end = {name: arrays[name][first - (0 if name.startswith("q") else case.window) :] for name in per_token}
        before, state = pallas.rattention(**(arrays | begin), **static)
        after, state = pallas.rattention(**(arrays | end | {"initial_state": state}), **static)
        return {"output": jnp.concatenate([before, after]), "final_state": state}

    expected = reference(case, arrays)
    found = errors(case, values_and_gradients(case, arrays, "bfloat16", implementation="gpu", wrap=resumed), expected)
    allowed = bounds(case, "bfloat16", "gpu", arrays, expected)
    assert {name: error for name, error in found.items() if error > allowed[name]} == {}


def test_nothing_of_a_document_depends_on_another():
    lengths = (70, 30, 100)
    inside = slice(70, 100)
    case = Case(BOTH, 200, 40, sizes=PAIR, segments=lengths, static=(blocks(64, 1),))
    before = case.arrays("bfloat16")
    after = dict(before)
    for name in ("q", "k", "v", "q_rla", "k_rla"):
        after[name] = before[name][::-1] * np.asarray(3, before[name].dtype)
        after[name][inside] = before[name][inside]
    run = compiled(case, "bfloat16", implementation="gpu")
    first, second = run(before), run(after)
    for name in ("output", "d q", "d k", "d v", "d q_rla", "d k_rla"):
        np.testing.assert_array_equal(first[name][inside], second[name][inside], err_msg=name)
    assert not np.array_equal(first["output"], second["output"])


@pytest.mark.parametrize("op", [SWA, RLA, BOTH])
@pytest.mark.parametrize(
    ("dtype", "head_size", "reason"),
    [("float32", 64, "bfloat16"), ("float16", 64, "float16"), ("bfloat16", 192, "head sizes up to 128; got 192")],
)
def test_what_the_kernels_do_not_serve(op, dtype, head_size, reason, monkeypatch):
    case = Case(op, 9, 3, sizes=(2, 1, head_size, head_size))
    with pytest.raises(NotImplementedError, match=f"^{op}: implementation='gpu'.*{reason}.*implementation='chunked'"):
        values_and_gradients(case, case.arrays(dtype), dtype, implementation="gpu")
    monkeypatch.setattr(hopper, "present", lambda: True)
    q = jnp.ones((3, 2, head_size), dtype)
    assert choose(op, None, q, q, q) == "chunked"
    q = jnp.ones((3, 2, 64), jnp.bfloat16)
    assert choose(op, None, q, q, q) == "gpu"
    monkeypatch.setattr(hopper, "present", lambda: False)
    assert choose(op, None, q, q, q) == "chunked"  # never an interpreted kernel


def test_a_gpu_of_another_kind_is_refused_by_name(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(hopper, "present", lambda: False)
    q = jnp.ones((3, 2, 64), jnp.bfloat16)
    with pytest.raises(NotImplementedError, match=r"needs a Hopper GPU; this is .*implementation='chunked'"):
        choose(SWA, "gpu", q, q, q)


def test_too_few_threads_for_the_interpreter_are_an_error_not_a_hang(monkeypatch):
    monkeypatch.setenv("PJRT_NPROC", "2")
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    with pytest.raises(RuntimeError, match="PJRT_NPROC=8"):
        pallas.sliding_window_attention(*(jnp.ones((3, 2, 8), jnp.bfloat16),) * 3, window=2, implementation="gpu")
