"""Cases that are written down, held to the float64 reference; `pallas.tools.cases` says what a case is."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import IMPLEMENTATIONS
from conftest import KERNELS as KERNELS_HERE

from pallas.feature_map import IN_KERNELS
from pallas.ops import KERNELS, family
from pallas.tools import case_errors, cases
from pallas.tools.case_errors import BOUND, FLOOR, errors
from pallas.tools.cases import ARRAYS, BOTH, RLA, STATES, SWA, Case, options_of_compiler, precision

__all__ = ["ARRAYS", "BOTH", "BOUND", "FLOOR", "RLA", "STATES", "SWA", "Case", "errors"]

UNLIKE_SOFTMAX = [name for name in reversed(IN_KERNELS) if name != "softmax"]  # the newest first


def quick(first, *others):
    """Parameters of which the first alone is for .ci/run: the interpreter takes many seconds for each."""
    return [first, *(pytest.param(value, marks=pytest.mark.long) for value in others)]


def with_kernels(*ops, portable=IMPLEMENTATIONS):
    """(implementation, op): all of the portable ones, and of kernels the fused op, the others by hand."""
    mark = lambda op: pytest.mark.kernel if op == BOTH else pytest.mark.long
    kernels = [pytest.param(name, op, marks=mark(op)) for name in KERNELS_HERE for op in ops]
    return [*((name, op) for name in portable for op in ops), *kernels]


def values_and_gradients(case: Case, arrays, dtype, **keywords):
    """Everything the op returns and every gradient under a random cotangent, in NumPy, by name."""
    return compiled(case, dtype, **keywords)(arrays)


def compiled(case: Case, dtype, *, implementation, window=None, wrap=lambda op, arrays: op(arrays), **static):
    """`values_and_gradients` of any such arrays.

    `wrap` turns (op, arrays) into the call, for parameters that the op does not see.
    """
    ids = None if not case.segments else jnp.asarray(case.ids())
    static |= {} if window is None else {"window": window}

    def op(arrays):
        return cases.call(case, arrays, ids, implementation, **static)

    on = None if implementation in KERNELS and family(implementation).present() else "cpu"

    @functools.partial(jax.jit, compiler_options=options_of_compiler(on))
    def pulled_back(arrays):
        result, pull_back = jax.vjp(functools.partial(wrap, op), arrays)
        generator = np.random.default_rng(1)
        cotangents = {
            name: jnp.asarray(generator.standard_normal(x.shape).astype(jnp.bfloat16)).astype(x.dtype)
            for name, x in result.items()
        }
        (gradients,) = pull_back(cotangents)
        return result | {f"d {name}": gradient for name, gradient in gradients.items()}

    def run(arrays):
        with precision(dtype, on):
            named = pulled_back({name: jnp.asarray(array) for name, array in arrays.items()})
            return {name: np.asarray(array) for name, array in named.items()}

    return run


def reference(case: Case, arrays, **keywords):
    wide = {name: array.astype(np.float64) for name, array in arrays.items()}
    return values_and_gradients(case, wide, "float64", implementation="reference", **keywords)


def assert_conforms(case, dtype, implementation, arrays=None, **keywords):
    arrays = case.arrays(dtype) if arrays is None else arrays
    got = values_and_gradients(case, arrays, dtype, implementation=implementation, **keywords)
    assert got["output"].dtype == arrays["v"].dtype
    for name, array in arrays.items():
        assert got[f"d {name}"].dtype == array.dtype, name
    if case.op != SWA:
        assert got["final_state"].dtype == ("float64" if dtype == "float64" else "float32")
    expected = reference(case, arrays, **keywords)
    found = errors(case, got, expected)
    allowed = bounds(case, dtype, implementation, arrays, expected, **keywords)
    too_large = {
        name: f"{error:.1e} > {allowed[name]:.1e}" for name, error in found.items() if not error <= allowed[name]
    }
    assert not too_large, f"outside the bounds ({dtype}): {too_large}"


def bounds(case, dtype, implementation, arrays, expected, **keywords):
    """The largest error of each tensor: fixed for `chunked`, relative to `chunked`'s own for a kernel."""
    of_chunked = {}
    if implementation not in (None, "chunked"):
        chunked = values_and_gradients(case, arrays, dtype, implementation="chunked", **keywords)
        of_chunked = errors(case, chunked, expected)
    return case_errors.bounds(dtype, implementation, of_chunked)
