"""How an implementation is held to the float64 reference: one call, what it gives, and the error of each tensor."""

import collections
import contextlib
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import token_loop

import pallas
from pallas.error import relative_rms
from pallas.feature_map import num_features, softmax

BOUND = {"float64": 1e-12, "float32": 1e-5, "bfloat16": 5e-3}  # of `chunked`
FLOOR = {"float32": 1e-5, "bfloat16": 3e-3}  # a kernel may be off by this and by twice what `chunked` is off by
ARRAYS = {
    "sliding_window_attention": ("q", "k", "v"),
    "residual_linear_attention": ("q", "k", "v", "initial_state", "segment_state"),
    "rattention": ("q", "k", "v", "swa_gain", "rla_gain", "q_rla", "k_rla", "initial_state", "segment_state"),
}
SWA, RLA, BOTH = ARRAYS
STATES = ("initial_state", "segment_state")
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
    states: tuple[str, ...] = STATES
    static: tuple = ()
    mean: float = 0.5

    def __str__(self):
        heads = "h{}kv{}d{}dv{}".format(*self.sizes)
        return f"{self.op}-t{self.t}-w{self.window}-s{self.s or self.t}-{len(self.segments)}seg-{heads}"

    def arrays(self, dtype: str, seed: int = 0) -> dict[str, np.ndarray]:
        """Rounded to `dtype`, so that every precision is asked about the same numbers."""
        h, kv, d, dv = self.sizes
        sizes = dict(num_heads=h, num_kv_heads=kv, head_size=d, value_size=dv)
        f = num_features(dict(self.static).get("feature_map", softmax), d)
        every = token_loop.draw(self.t, s=self.s, **sizes, feature_size=f, seed=seed)
        names = [name for name in ARRAYS[self.op] if name not in STATES or name in self.states]
        every = {name: every[name] + (self.mean - 0.5) for name in names}
        return {name: x.astype(jnp.float32 if name in PARAMETERS else dtype) for name, x in every.items()}

    def ids(self):
        return jnp.asarray(token_loop.segment_ids(*self.segments)) if self.segments else None


def precision(dtype: str, implementation: str | None):
    """float64 switched on where it is asked for, and float32 products in float32 everywhere; kernels alone on a GPU."""
    stack = contextlib.ExitStack()
    stack.enter_context(jax.default_matmul_precision("highest"))
    if implementation != "gpu":
        stack.enter_context(jax.default_device(jax.local_devices(backend="cpu")[0]))
    if dtype == "float64":
        stack.enter_context(jax.enable_x64(True))
    return stack


def on_gpu(implementation: str | None) -> bool:
    return implementation == "gpu" and jax.default_backend() == "gpu"


def values_and_gradients(case: Case, arrays, dtype, **keywords):
    """Everything the op returns and every gradient under a random cotangent, in NumPy, by name."""
    return compiled(case, dtype, **keywords)(arrays)


def compiled(case: Case, dtype, *, implementation, window=None, wrap=lambda op, arrays: op(arrays), **static):
    """`values_and_gradients` of any such arrays.

    `wrap` turns (op, arrays) into the call, for parameters that the op does not see.
    """
    static = dict(case.static) | static | {"window": case.window if window is None else window}
    if case.op != SWA:
        static["return_final_state"] = True

    def op(arrays):
        call = getattr(pallas, case.op)
        result = call(**arrays, segment_ids=case.ids(), implementation=implementation, **static)
        return {"output": result} if case.op == SWA else {"output": result[0], "final_state": result[1]}

    unoptimised = {"xla_backend_optimization_level": 0}  # compiling is most of the time

    @functools.partial(jax.jit, compiler_options=None if on_gpu(implementation) else unoptimised)
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
        with precision(dtype, implementation):
            named = pulled_back({name: jnp.asarray(array) for name, array in arrays.items()})
            return {name: np.asarray(array) for name, array in named.items()}

    return run


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
    expected = reference(case, arrays, **keywords)
    found = errors(case, got, expected)
    allowed = bounds(case, dtype, implementation, arrays, expected, **keywords)
    too_large = {
        name: f"{error:.1e} > {allowed[name]:.1e}" for name, error in found.items() if not error <= allowed[name]
    }
    assert not too_large, f"outside the bounds ({dtype}): {too_large}"


def bounds(case, dtype, implementation, arrays, expected, **keywords):
    """The largest error of each tensor: fixed for `chunked`, relative to `chunked`'s own for a kernel."""
    if implementation in (None, "chunked"):
        return collections.defaultdict(lambda: BOUND[dtype])
    chunked = values_and_gradients(case, arrays, dtype, implementation="chunked", **keywords)
    allowed = {name: 2 * error + FLOOR[dtype] for name, error in errors(case, chunked, expected).items()}
    return collections.defaultdict(float, allowed)  # exact zeros are exact
