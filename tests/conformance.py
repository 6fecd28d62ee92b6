"""How an implementation is held to the float64 reference: one call, what it gives, and the error of each tensor."""

import contextlib
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import token_loop

import pallas
from pallas.error import relative_rms

BOUND = {"float64": 1e-12, "float32": 1e-5, "bfloat16": 5e-3}
ARRAYS = {
    "sliding_window_attention": ("q", "k", "v"),
    "residual_linear_attention": ("q", "k", "v", "initial_state", "segment_state"),
    "rattention": ("q", "k", "v", "swa_gain", "rla_gain", "q_rla", "k_rla", "initial_state", "segment_state"),
}
SWA, RLA, BOTH = ARRAYS
PARAMETERS = ("initial_state", "segment_state", "swa_gain", "rla_gain")  # float32 beside bfloat16 activations


@dataclasses.dataclass(frozen=True)
class Case:
    """One call of one op; sizes are (num_heads, num_kv_heads, head_size, value_size)."""

    op: str
    t: int
    window: int
    s: int | None = None
    sizes: tuple[int, int, int, int] = (2, 1, 8, 8)
    segments: tuple[int, ...] = ()
    states: bool = True
    static: tuple = ()

    def __str__(self):
        return f"{self.op}-t{self.t}-w{self.window}-s{self.s or self.t}-{len(self.segments)}seg"

    def arrays(self, dtype: str) -> dict[str, np.ndarray]:
        """Rounded to `dtype`, so that every precision is asked about the same numbers."""
        h, kv, d, dv = self.sizes
        every = token_loop.draw(self.t, s=self.s, num_heads=h, num_kv_heads=kv, head_size=d, value_size=dv)
        names = [name for name in ARRAYS[self.op] if self.states or not name.endswith("state")]
        return {name: every[name].astype(jnp.float32 if name in PARAMETERS else dtype) for name in names}

    def ids(self):
        return jnp.asarray(token_loop.segment_ids(*self.segments)) if self.segments else None


def precision(dtype: str):
    """float64 switched on where it is asked for, and float32 products in float32 everywhere."""
    stack = contextlib.ExitStack()
    stack.enter_context(jax.default_matmul_precision("highest"))
    if dtype == "float64":
        stack.enter_context(jax.enable_x64(True))
    return stack


def values_and_gradients(
    case: Case, arrays, dtype, *, implementation, window=None, wrap=lambda op, arrays: op(arrays), **static
):
    """Everything the op returns and every gradient under a random cotangent, in NumPy, by name.

    `wrap` turns (op, arrays) into the call, for parameters that the op does not see.
    """
    static = dict(case.static) | static | {"window": case.window if window is None else window}
    if case.op != SWA:
        static["return_final_state"] = True

    def op(arrays):
        call = getattr(pallas, case.op)
        result = call(**arrays, segment_ids=case.ids(), implementation=implementation, **static)
        return {"output": result} if case.op == SWA else {"output": result[0], "final_state": result[1]}

    @functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})  # compiling is most of the time
    def pulled_back(arrays):
        result, pull_back = jax.vjp(functools.partial(wrap, op), arrays)
        generator = np.random.default_rng(1)
        cotangents = {
            name: jnp.asarray(generator.standard_normal(x.shape).astype(jnp.bfloat16)).astype(x.dtype)
            for name, x in result.items()
        }
        (gradients,) = pull_back(cotangents)
        return result | {f"d {name}": gradient for name, gradient in gradients.items()}

    with precision(dtype):
        named = pulled_back({name: jnp.asarray(array) for name, array in arrays.items()})
        return {name: np.asarray(array) for name, array in named.items()}


def reference(case: Case, arrays, **keywords):
    wide = {name: array.astype(np.float64) for name, array in arrays.items()}
    return values_and_gradients(case, wide, "float64", implementation="reference", **keywords)


def errors(case: Case, got, expected) -> dict[str, float]:
    """Relative RMS error by tensor; infinite where the reference is exactly 0 and the result is not."""
    assert got.keys() == expected.keys()
    found = {name: relative_rms(got[name], expected[name]) for name in expected}
    if case.op != RLA and (case.window == 1 or case.s == 1 or case.t == 1):
        # A softmax over one key is constant: its gradient is 0 but for rounding, so measure that against 1.
        for name in ("d q", "d k"):
            found[name] = float(np.sqrt(np.mean(got[name].astype(np.float64) ** 2)))
    for name in ("output", "final_state"):
        if name in expected and np.any(got[name][expected[name] == 0]):
            found[f"{name}, exact zeros"] = np.inf
    return found


def assert_conforms(case, dtype, implementation, arrays=None, **keywords):
    arrays = case.arrays(dtype) if arrays is None else arrays
    got = values_and_gradients(case, arrays, dtype, implementation=implementation, **keywords)
    assert got["output"].dtype == arrays["v"].dtype
    for name, array in arrays.items():
        assert got[f"d {name}"].dtype == array.dtype, name
    if case.op != SWA:
        assert got["final_state"].dtype == ("float64" if dtype == "float64" else "float32")
    found = errors(case, got, reference(case, arrays, **keywords))
    too_large = {name: error for name, error in found.items() if not error <= BOUND[dtype]}
    assert not too_large, f"bound {BOUND[dtype]:.0e} ({dtype}): {too_large}"
