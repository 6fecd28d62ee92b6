"""The Hopper kernels on a Hopper GPU. `python -m pallas check` asks more of them."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conformance import BOTH, RLA, SWA, Case, assert_conforms
from hopper_cases import PAIR, WIDE, blocks

import pallas
from pallas import feature_map
from pallas.numerics import relative_rms
from rattn_eqx import RAttention

pytest.importorskip("jax", "0.11", reason="the kernels need jax 0.11 (Python 3.12)")


@pytest.fixture
def device():
    if jax.default_backend() != "gpu":
        pytest.skip("needs a Hopper GPU")


@pytest.mark.gpu
@pytest.mark.parametrize(
    "case",
    [
        Case(SWA, 500, 100, s=563, sizes=(4, 2, 128, 128), segments=(70, 1, 130, 300, 62), mean=1.0),
        Case(RLA, 500, 0, sizes=(3, 1, 64, 40), segments=(128, 1, 200, 171)),
        Case(BOTH, 1, 64, sizes=PAIR),
        Case(BOTH, 500, 100, sizes=(4, 2, 128, 128), mean=1.0, static=(blocks(64, 2),)),
        Case(BOTH, 500, 100, s=563, sizes=(4, 2, 64, 64), segments=(70, 1, 130, 362)),
        Case(BOTH, 300, 64, sizes=(3, 1, 8, 8), segments=(70, 230)),
        Case(BOTH, 4096, 512, sizes=WIDE, mean=1.0),
        Case(BOTH, 500, 1, sizes=(6, 2, 64, 64), segments=(238, 41, 150, 71), map="relu", mean=1.0),
        Case(SWA, 65, 9, s=128, sizes=(1, 1, 64, 64), segments=(60, 68)),
    ],
    ids=str,
)
def test_on_the_device(device, case):
    assert_conforms(case, "bfloat16", "gpu")


@pytest.mark.gpu
@pytest.mark.parametrize("segments", [(), (100, 412, 1, 511)], ids=["whole", "packed"])
def test_two_runs_on_the_device_are_bitwise_equal(device, segments):
    case = Case(BOTH, 1024, 512, sizes=(16, 4, 128, 128), segments=segments)
    several = [case.arrays("bfloat16", seed) for seed in range(2)]
    arrays = {name: jnp.stack([one[name] for one in several]) for name in several[0]}
    ids = None if not segments else jnp.asarray(case.ids())

    @jax.jit
    def run(arrays):
        def op(arrays):
            return pallas.rattention(**arrays, window=case.window, segment_ids=ids, implementation="gpu")

        out, pull_back = jax.vjp(jax.vmap(op), arrays)
        return out, pull_back(arrays["q"])[0]

    first, second = run(arrays), run(arrays)
    for x, y in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))
    assert all(np.all(np.isfinite(np.asarray(x, np.float32))) for x in jax.tree.leaves(first))


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["softmax", "hedgehog"])
@pytest.mark.parametrize(("num_heads", "head_size"), [(3, 64), (12, 64), (12, 128)])
def test_a_layer_on_the_device_is_the_layer_on_a_cpu(device, num_heads, head_size, kind):
    """What XLA makes of projections, norms, rotary embedding and feature maps, in float32."""
    keys = jax.random.split(jax.random.key(0), 3)
    found = []
    for backend in ("gpu", "cpu"):
        with jax.default_device(jax.local_devices(backend=backend)[0]), jax.default_matmul_precision("highest"):
            phi = feature_map.Hedgehog(head_size, key=keys[0]) if kind == "hedgehog" else feature_map.softmax
            sizes = dict(num_heads=num_heads, num_kv_heads=num_heads // 3, head_size=head_size)
            layer = RAttention(96, **sizes, window=32, feature_map=phi, implementation="chunked", key=keys[1])
            x = jax.random.normal(keys[2], (128, 96))
            arrays, static = eqx.partition(layer, eqx.is_array)
            apply = jax.jit(lambda arrays, x, static=static: eqx.combine(arrays, static)(x))
            out, pull_back = jax.vjp(apply, arrays, x)
            found.append([np.asarray(leaf) for leaf in jax.tree.leaves((out, pull_back(jnp.cos(out))))])
    for got, expected in zip(*found, strict=True):
        assert relative_rms(got, expected) < 1e-5
