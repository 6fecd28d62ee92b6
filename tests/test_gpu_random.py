"""Random calls of the Hopper kernels: `pytest tests/test_gpu_random.py --random-shapes 200`, `-m gpu` on a device."""

import jax
import numpy as np
import pytest
from conformance import BOTH, RLA, STATES, SWA, Case, assert_conforms

import pallas
from pallas.block_sizes import BlockSizes

pytest.importorskip("jax", "0.11", reason="the kernels need jax 0.11 (Python 3.12)")

BUCKET = 4  # calls that share their compiled kernels on a device


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    metafunc.parametrize("seed", range(int(metafunc.config.getoption("--random-shapes") or 0)))


def draw(kernels: int, seed: int) -> Case:
    """A call. `kernels` seeds what kernels are compiled for, `seed` the rest: the length up to its padding."""
    compiled, free = np.random.default_rng(kernels), np.random.default_rng([1, seed])
    pick = lambda *options: options[compiled.integers(len(options))]
    tiles, more_keys = pick(1, 1, 2, 3), pick(0, 0, 1, 63, 130)
    t = 128 * tiles - int(free.choice(np.array([0, 1, 63, 64, free.integers(127)])))
    window = pick(0, 1, 64, 100, 128, 1000, compiled.integers(1, 128 * tiles + more_keys))
    kv, group, d = pick(1, 2), pick(1, 2, 3, 4), pick(8, 40, 64, 64, 128)
    op, segmented = pick(SWA, RLA, BOTH, BOTH), pick(False, True)
    static = [("block_sizes", BlockSizes(kernel_chunk=pick(64, 128), chunks_per_state=pick(1, 2, 3)))]
    if op == RLA:
        names = ("softmax", "softmax", "relu", "identity", "elu_plus_one", "exp", "squared_relu")
        static.append(("feature_map", getattr(pallas.feature_map, pick(*names))))
    s, segments = t + more_keys, ()
    if segmented:
        cuts = np.unique(free.integers(0, s, free.integers(0, 5)))
        segments = tuple(int(x) for x in np.diff([0, *cuts[cuts > 0], s]))
    sizes = (kv * group, kv, d, pick(d, d, max(d // 2, 5)))
    states = pick(STATES, STATES, ("initial_state",), ("segment_state",), ())
    mean = pick(0.0, 0.5, 1.0)
    return Case(op, t, int(window), s, sizes, segments, states, tuple(static), mean)


def test_a_random_call_conforms(seed):
    case = draw(seed, seed)
    print(case)
    assert_conforms(case, "bfloat16", "gpu")
    if seed % 20 == 19:
        jax.clear_caches()  # a process can hold only so many compiled programs


@pytest.mark.gpu
def test_a_random_call_conforms_on_the_device(seed):
    if jax.default_backend() != "gpu":
        pytest.skip("needs a Hopper GPU")
    case = draw(seed // BUCKET, seed)
    print(case)
    assert_conforms(case, "bfloat16", "gpu")
