"""Every implementation computes what the float64 reference computes: outputs, final states and all gradients."""

import functools
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from conformance import (
    ARRAYS,
    BOTH,
    BOUND,
    RLA,
    SWA,
    Case,
    assert_conforms,
    errors,
    reference,
    values_and_gradients,
    with_kernels,
)
from conftest import KERNELS

import pallas
from pallas.block_sizes import gpu_blocks
from pallas.tools.random_cases import dtypes_of

CASES = [
    Case(SWA, 63, 1, sizes=(3, 3, 8, 8)),
    Case(SWA, 63, 64, sizes=(4, 2, 8, 5)),
    Case(SWA, 500, 100, s=563, sizes=(4, 2, 8, 5), segments=(70, 1, 130, 300, 62)),
    Case(SWA, 500, 500),
    Case(SWA, 1000, 64, sizes=(2, 1, 4, 4), static=(("scale", 0.7),)),
    Case(SWA, 1500, 1200, s=2000, sizes=(1, 1, 4, 4), segments=(300, 1700)),
    Case(SWA, 99, 0),
    Case(RLA, 1, 0),
    Case(RLA, 500, 0, sizes=(4, 2, 8, 5), segments=(128, 1, 200, 171)),
    Case(RLA, 63, 1, s=64, sizes=(3, 3, 4, 6)),
    Case(RLA, 500, 100, s=563, sizes=(4, 2, 8, 5), segments=(70, 1, 130, 300, 62)),
    Case(RLA, 1000, 64, sizes=(2, 1, 4, 4)),
    Case(RLA, 101, 100, states=()),
    Case(RLA, 64, 64),
    Case(BOTH, 1, 64),
    Case(BOTH, 63, 64, s=200, sizes=(4, 2, 8, 5)),
    Case(BOTH, 65, 64),
    Case(BOTH, 99, 100, states=()),
    Case(BOTH, 500, 0, sizes=(4, 1, 8, 5)),
    Case(BOTH, 500, 500, s=501, sizes=(3, 3, 4, 6), segments=(100, 401)),
    Case(BOTH, 500, 100, sizes=(4, 2, 8, 5), segments=(70, 1, 130, 299), static=(("scale", 0.7), ("eps", 0.1))),
    Case(BOTH, 1000, 1, sizes=(2, 1, 4, 4)),
    Case(BOTH, 2300, 100, sizes=(1, 1, 4, 4), segments=(1000, 1300)),
    Case(SWA, 500, 100, s=563, sizes=(4, 2, 8, 5), segments=(70, 1, 130, 300, 62), sinks=True),
    Case(BOTH, 150, 30, sizes=(3, 1, 8, 8), segments=(100, 50), sinks=True, swa_norm=False),
    Case(BOTH, 150, 30, s=200, sizes=(4, 2, 8, 5), sinks=True, size=0.1, static=(("eps", 0.01),)),
]
FEW = [
    Case(SWA, 63, 64, sizes=(4, 2, 8, 5)),
    Case(SWA, 500, 100, s=563, sizes=(4, 2, 8, 5), segments=(70, 1, 130, 300, 62)),
    Case(RLA, 500, 0, sizes=(4, 2, 8, 5), segments=(128, 1, 200, 171)),
    Case(RLA, 500, 64, s=563, sizes=(2, 1, 8, 8)),
    Case(BOTH, 101, 100, sizes=(3, 3, 4, 6)),
    Case(BOTH, 500, 100, sizes=(4, 2, 8, 5), segments=(70, 1, 130, 299)),
]


# What .ci/run asks of interpreted kernels; all other cases are long. Their own suites ask more.
INTERPRETED = {
    "gpu": [
        Case(SWA, 500, 100, s=563, sizes=(4, 2, 8, 5), segments=(70, 1, 130, 300, 62)),
        Case(RLA, 500, 100, s=563, sizes=(4, 2, 8, 5), segments=(70, 1, 130, 300, 62)),
        Case(BOTH, 1, 64),
        Case(BOTH, 63, 64, s=200, sizes=(4, 2, 8, 5)),
        Case(BOTH, 150, 30, sizes=(3, 1, 8, 8), segments=(100, 50), sinks=True, swa_norm=False),
    ],
    "tpu": [
        Case(SWA, 63, 64, sizes=(4, 2, 8, 5)),
        Case(RLA, 63, 1, s=64, sizes=(3, 3, 4, 6)),
        Case(BOTH, 1, 64),
        Case(BOTH, 500, 100, sizes=(4, 2, 8, 5), segments=(70, 1, 130, 299), static=(("scale", 0.7), ("eps", 0.1))),
        Case(BOTH, 150, 30, sizes=(3, 1, 8, 8), segments=(100, 50), sinks=True, swa_norm=False),
    ],
}


def mark_of(kernel: str, case: Case) -> pytest.MarkDecorator:
    return pytest.mark.kernel if case in INTERPRETED.get(kernel, []) else pytest.mark.long


def own_dtypes(implementation: str) -> list[str]:
    """Those that it multiplies in, the widest first; of `chunked` float32 alone: test_other_dtypes has the others."""
    return ["float32"] if implementation == "chunked" else sorted(dtypes_of(implementation), reverse=True)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_conforms(implementation, case):
    assert_conforms(case, "float32", implementation)


@pytest.mark.parametrize(
    ("kernel", "case"),
    [
        pytest.param(
            kernel, case, marks=pytest.mark.kernel if case in INTERPRETED.get(kernel, ()) else pytest.mark.long
        )
        for kernel in KERNELS
        for case in CASES
    ],
    ids=str,
)
def test_kernels_conform(kernel, case):
    for dtype in own_dtypes(kernel):
        assert_conforms(case, dtype, kernel)


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_kernel_runs_here(kernel):
    assert_conforms(Case(BOTH, 70, 16, sizes=(2, 1, 8, 8), segments=(30, 40)), "bfloat16", kernel)


@pytest.mark.parametrize("case", FEW, ids=str)
@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_other_dtypes(implementation, dtype, case):
    if dtype == "float64":
        with jax.enable_x64(True):  # gains and states in float64 too
            arrays = {name: array.astype(np.float64) for name, array in case.arrays("float64").items()}
            assert_conforms(case, dtype, implementation, arrays)
    else:
        assert_conforms(case, dtype, implementation)


@pytest.mark.parametrize(("implementation", "op"), with_kernels(SWA, RLA, BOTH))
def test_a_window_off_by_one_is_far_outside_the_bounds(implementation, op):
    case, wrong_by = Case(op, 150, 64), 1 if op == RLA else -1
    dtype = own_dtypes(implementation)[-1]
    arrays = case.arrays(dtype)
    got = values_and_gradients(case, arrays, dtype, implementation=implementation)
    found = errors(case, got, reference(case, arrays, window=case.window + wrong_by))
    for name in ("output", "final_state", "d q", "d k", "d v"):  # gains and states see sums over all tokens
        assert found.get(name, np.inf) > 2 * BOUND["bfloat16"], f"{name}: {found[name]:.1e}"


@pytest.mark.parametrize("name", [name for name in pallas.feature_map.named if name != "softmax"])
def test_feature_maps(implementation, name):
    feature_map = getattr(pallas.feature_map, name)
    case = Case(RLA, 200, 50, sizes=(2, 1, 4, 4), segments=(120, 80), static=(("feature_map", feature_map),))
    assert_conforms(case, "float32", implementation)


@pytest.mark.parametrize(("implementation", "op"), with_kernels(RLA, BOTH))
def test_a_callers_own_maps_get_gradients_for_their_parameters(implementation, op):
    case = Case(op, 200, 50, sizes=(4, 2, 8, 5), segments=(120, 80), states=())
    generator = np.random.default_rng(2)
    dtype = own_dtypes(implementation)[-1]
    arrays = case.arrays(dtype) | {
        name: generator.standard_normal((8, 6)).astype(np.float32) for name in ("weight_q", "weight_k")
    }

    def with_learned_maps(op, arrays):
        weights = arrays["weight_q"], arrays["weight_k"]
        maps = tuple(lambda x, weight=weight: jax.nn.softplus(x @ weight) for weight in weights)
        return op({name: arrays[name] for name in ARRAYS[case.op] if name in arrays} | {"feature_map": maps})

    assert_conforms(case, dtype, implementation, arrays, wrap=with_learned_maps)


def test_values_in_another_dtype_than_keys(implementation):
    case = Case(BOTH, 70, 16)
    arrays = case.arrays("bfloat16")
    arrays["v"] = arrays["v"].astype(np.float32)
    assert_conforms(case, "bfloat16", implementation, arrays)


def test_float32_stays_float32_where_float64_is_enabled(implementation):
    case = Case(BOTH, 70, 16)
    with jax.enable_x64(True):
        assert_conforms(case, "float32", implementation)


def test_no_implementation_named_runs_one_that_agrees():
    assert_conforms(Case(RLA, 70, 16), "float32", None)


def call(op: str, **changes):
    """The op on small valid float32 arguments, but for `changes`."""
    case = Case(op, 7, 3)
    arguments = {name: jnp.asarray(array) for name, array in case.arrays("float32").items()} | {"window": case.window}
    return getattr(pallas, op)(**(arguments | changes))


def ones(*shape, dtype=jnp.float32):
    return jnp.ones(shape, dtype)


@pytest.mark.parametrize("op", ARRAYS)
@pytest.mark.parametrize(
    ("argument", "wrong"),
    [
        ("q", ones(7, 2)),
        ("q", ones(1, 7, 2, 8)),
        ("q", ones(7, 2, 8, dtype=jnp.int32)),
        ("v", ones(7, 1, 8, dtype=jnp.int32)),
        ("k", ones(7, 1, 9)),
        ("v", ones(7, 2, 8)),
        ("v", ones(6, 1, 8)),
        ("segment_ids", ones(7)),
        ("window", 3.0),
        ("window", jnp.asarray(3)),
    ],
    ids=lambda value: (
        value if isinstance(value, str) else f"{value.dtype}{value.shape}" if hasattr(value, "shape") else ""
    ),
)
def test_a_wrong_rank_dtype_or_size_is_named_by_its_argument(op, argument, wrong):
    with pytest.raises(jaxtyping.TypeCheckError, match=f"parameter '{argument}'"):
        call(op, **{argument: wrong})


@pytest.mark.parametrize(
    ("op", "argument", "wrong"),
    [
        (RLA, "initial_state", ones(2, 16, 8)),
        (BOTH, "segment_state", ones(1, 16, 7)),
        (BOTH, "swa_gain", ones(1, 8)),
        (BOTH, "sink_logits", ones(3)),
        (SWA, "sink_logits", ones(1)),
        (BOTH, "rla_gain", ones(2, 7)),
        (BOTH, "q_rla", ones(6, 2, 8)),
        (BOTH, "k_rla", ones(7, 2, 8)),
    ],
)
def test_a_wrong_size_of_a_state_gain_or_residual_input_is_named(op, argument, wrong):
    with pytest.raises((jaxtyping.TypeCheckError, ValueError), match=argument):
        call(op, **{argument: wrong})


@pytest.mark.parametrize("op", [SWA, BOTH])
def test_a_sink_of_minus_infinity_is_none(op):
    window = 1200  # several blocks of keys, of which the first are before the sequence
    q, k, v = (jnp.asarray(x) for x in np.random.default_rng(0).standard_normal((3, 1500, 2, 4)).astype(np.float32))
    gains = {} if op == SWA else {"swa_gain": None, "rla_gain": jnp.ones((2, 4))}
    sinks = jnp.asarray([-jnp.inf, 0.0])

    @jax.jit
    def both(sinks):
        call = lambda sinks: getattr(pallas, op)(q, k, v, window=window, sink_logits=sinks, **gains)
        return call(sinks), call(None), jax.grad(lambda sinks: call(sinks).sum())(sinks)

    with_sinks, without, gradient = map(np.asarray, both(sinks))
    np.testing.assert_allclose(with_sinks[:, 0], without[:, 0], rtol=1e-5, atol=1e-6)
    assert np.abs(with_sinks[:, 1] - without[:, 1]).max() > 1e-4
    assert gradient[0] == 0
    assert np.isfinite(gradient[1])


@pytest.mark.parametrize("name", ["initial_state", "segment_state"])
@pytest.mark.parametrize("op", [RLA, BOTH])
def test_a_state_of_another_feature_size_is_named(op, name):
    with pytest.raises(
        ValueError, match=rf"^{op}: {name} must have shape \(kv, f, dv\)=\(1, 16, 8\).*got \(1, 15, 8\)"
    ):
        call(op, **{name: ones(1, 15, 8)})


@pytest.mark.parametrize(("op", "options"), [(SWA, {"scale": 1}), (BOTH, {"scale": 1, "eps": 1})])
def test_whole_numbers_are_numbers(op, options):
    expected = call(op, **{name: float(value) for name, value in options.items()})
    np.testing.assert_array_equal(call(op, **options), expected)


@pytest.mark.parametrize("op", ARRAYS)
def test_numpys_numbers_are_numbers(op):
    options: dict[str, Any] = (
        {"window": 2} | ({} if op == RLA else {"scale": 0.5}) | ({"eps": 0.25} if op == BOTH else {})
    )
    of_numpy = {name: np.int64(x) if name == "window" else np.float32(x) for name, x in options.items()}
    with jax.enable_x64(True):  # a float32 scale or eps beside float64
        wide = {name: jnp.asarray(x, jnp.float64) for name, x in Case(op, 7, 3).arrays("float64").items()}
        np.testing.assert_array_equal(call(op, **(wide | of_numpy)), call(op, **(wide | options)))


@pytest.mark.parametrize("op", ARRAYS)
def test_any_window_beyond_the_keys_is_all_of_them(implementation_or_reference, op):
    implementation, case = implementation_or_reference, Case(op, 7, 9, s=9, segments=(4, 5))
    arrays = case.arrays("float32")
    expected = values_and_gradients(case, arrays, "float32", implementation=implementation)
    for window in (2**31, 2**70):
        got = values_and_gradients(case, arrays, "float32", implementation=implementation, window=window)
        for name in expected:
            np.testing.assert_array_equal(got[name], expected[name], err_msg=name)


@pytest.mark.parametrize("op", ARRAYS)
def test_another_type_is_told_in_one_line(op):
    for wrong in ({"window": [3] * 5000}, {"q": [[1.0] * 5000]}, {"block_sizes": "x" * 5000}):
        with pytest.raises(jaxtyping.TypeCheckError, match=f"pallas.ops.{op}") as told:
            call(op, **wrong)
        assert "\n" not in str(told.value)
        assert len(str(told.value)) < 600


def test_float16_overflows_in_the_sum_alone_and_in_its_last_rounding(implementation_or_reference):
    arrays = Case(BOTH, 70, 20, sizes=(2, 1, 4, 4), states=()).arrays("float32")
    arrays = {name: x if "gain" in name else 600 * x for name, x in arrays.items()}

    @functools.partial(jax.jit, static_argnums=0)
    def outputs(dtype):
        given: dict[str, Any] = {name: jnp.asarray(x).astype(jnp.float16).astype(dtype) for name, x in arrays.items()}
        shared: dict[str, Any] = dict(window=20, implementation=implementation_or_reference)
        maps: dict[str, Any] = dict(feature_map=pallas.feature_map.relu)
        qkv = [given[name] for name in ("q", "k", "v")]
        swa = pallas.sliding_window_attention(*qkv, **shared)
        return (
            swa,
            pallas.residual_linear_attention(*qkv, **shared, **maps),
            pallas.rattention(**given, **shared, **maps),
        )

    swa, rla, both = outputs(jnp.float16)
    _, wide, _ = outputs(jnp.float32)
    assert swa.dtype == rla.dtype == both.dtype == jnp.float16
    assert jnp.isfinite(swa).all()
    assert jnp.isfinite(both).all()
    assert jnp.isfinite(wide).all()
    assert jnp.isinf(rla).any()
    np.testing.assert_array_equal(rla, wide.astype(jnp.float16))


@pytest.mark.parametrize("op", ARRAYS)
def test_lengths_are_static_under_export(op):
    (length,) = jax.export.symbolic_shape("length")
    case = {name: jnp.asarray(x) for name, x in Case(op, 7, 3).arrays("float32").items()}
    tokens = [name for name, x in case.items() if len(x) == 7]

    def run(x):
        return call(op, **{name: jnp.broadcast_to(x, (x.shape[0], *case[name].shape[1:])) for name in tokens})

    with pytest.raises(ValueError, match=f"^{op}: lengths must be static; got t=length, s=length; export once for"):
        jax.export.export(jax.jit(run))(jax.ShapeDtypeStruct((length, 1, 1), jnp.float32))
    jax.export.export(jax.jit(jax.vmap(run)))(jax.ShapeDtypeStruct((length, 7, 1, 1), jnp.float32))


@pytest.mark.parametrize("op", ARRAYS)
def test_rules_across_arguments(op):
    six_over_four = {"q": ones(7, 6, 8), "k": ones(7, 4, 8), "v": ones(7, 4, 8)}
    if op != SWA:
        six_over_four |= {"initial_state": ones(4, 16, 8), "segment_state": ones(4, 16, 8)}
    if op == BOTH:
        six_over_four |= {"q_rla": ones(7, 6, 8), "k_rla": ones(7, 4, 8)}
        six_over_four |= {"swa_gain": ones(6, 8), "rla_gain": ones(6, 8)}
    with pytest.raises(ValueError, match=f"^{op}: h must be a multiple of kv; got h=6, kv=4"):
        call(op, **six_over_four)
    with pytest.raises(ValueError, match=f"^{op}: .*t=7, s=6"):
        call(op, k=ones(6, 1, 8), v=ones(6, 1, 8), **({"k_rla": ones(6, 1, 8)} if op == BOTH else {}))
    with pytest.raises(ValueError, match=f"^{op}: window must be at least 0; got window=-1"):
        call(op, window=-1)


@pytest.mark.parametrize("op", ARRAYS)
def test_segment_ids_of_another_length(op):
    with pytest.raises((jaxtyping.TypeCheckError, ValueError), match="segment_ids"):
        call(op, segment_ids=jnp.zeros(6, jnp.int32))


@pytest.mark.parametrize("op", ARRAYS)
def test_implementations_that_do_not_exist(op):
    with pytest.raises(ValueError, match=f"^{op}: implementation must be .*'reference', 'chunked'.*got 'fast'"):
        call(op, implementation="fast")
    with pytest.raises(NotImplementedError, match=f"^{op}: implementation='gpu'.*implementation='chunked'"):
        call(op, implementation="gpu")  # takes no float32
    with jax.enable_x64(True):
        wide = {name: jnp.asarray(x, jnp.float64) for name, x in Case(op, 7, 3).arrays("float64").items()}
        with pytest.raises(NotImplementedError, match=f"^{op}: implementation='tpu' takes no float64.*'chunked'"):
            call(op, implementation="tpu", **wide)


@pytest.mark.parametrize(
    ("device", "head_size", "window", "expected"),
    [
        ("NVIDIA H100 80GB HBM3", 64, 100, (64, 1)),
        ("NVIDIA H100 80GB HBM3", 64, 512, (64, 1)),
        ("NVIDIA H100 80GB HBM3", 64, 513, (128, 1)),
        ("NVIDIA H100 80GB HBM3", 64, 9999, (128, 1)),
        ("NVIDIA H200", 64, 100, (64, 1)),
        ("another", 64, 100, (128, 1)),
    ],
)
def test_block_sizes_of_the_kernels_are_those_measured_for_the_next_larger_window(device, head_size, window, expected):
    assert gpu_blocks(device, head_size, "bfloat16", window) == expected
