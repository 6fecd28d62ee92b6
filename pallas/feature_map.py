"""Feature maps phi of the residual branch: callables from `(..., d)` to `(..., f)`.

Each computes in float32 (float64 when its input is float64) and returns that dtype. A user's own map is any callable
of the same form that acts on the last axis alone, or a pair `(phi_q, phi_k)`; its parameters are differentiated.

The maps of `IN_KERNELS` are formed by the kernels themselves, from the same rows: to add one, add a row here, and its
formula to tests/ops/test_feature_map.py.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from pallas.checked import checked
from pallas.dependence import program_text

FeatureMap = Callable | tuple[Callable, Callable]

EXP_LIMIT = 10.0  # exp(10)^2 summed over a million tokens is still far from float32's largest number


def _widen(x: Array) -> Array:
    return x.astype(jnp.float64 if x.dtype == jnp.float64 else jnp.float32)


@dataclasses.dataclass(frozen=True)
class KernelMap:
    """A map that `reference`, `chunked` and every kernel read from one row: phi(x) = [value(x), value(-x)], f = 2 d.

    Without `signed`, phi(x) = value(x), f = d.

    value: over the last axis, elementwise but for softmax, for which each family of kernels has a form of its own.
    pull_back: (x, value(x), cotangent) to x's gradient. All these Jacobians are symmetric, so it pushes tangents
      forward too.
    sums_to_one: does value(x) sum to 1 over the last axis?
    """

    name: str
    formula: str
    value: Callable[[Array], Array]
    pull_back: Callable[[Array, Array, Array], Array]
    signed: bool
    sums_to_one: bool = False

    @checked
    def __call__(self, x: Float[Array, "*batch d"]) -> Float[Array, "*batch f"]:
        x = _widen(x)
        if not self.signed:
            return _value(self, x)
        # Both halves at once, not joined: XLA on a GPU may get softmax and concatenate wrong (LOG.md, 2026-11-28).
        both = jnp.broadcast_to(x[..., None, :], (*x.shape[:-1], 2, x.shape[-1]))
        sign = jax.lax.broadcasted_iota(jnp.int32, both.shape, both.ndim - 2)
        return _value(self, jnp.where(sign == 0, both, -both)).reshape(*x.shape[:-1], 2 * x.shape[-1])

    @property
    def __name__(self) -> str:
        return self.name

    @property
    def slices(self) -> int:
        """f / d."""
        return 2 if self.signed else 1

    def __repr__(self) -> str:
        return f"pallas.feature_map.{self.name}: {self.formula}"

    def __reduce__(self) -> str:  # pickled by name
        return self.name


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _value(row: KernelMap, x: Array) -> Array:
    return row.value(x)


@_value.defjvp
def _value_and_tangent(row: KernelMap, primals, tangents):
    (x,), (tangent,) = primals, tangents
    phi = row.value(x)
    return phi, row.pull_back(x, phi, tangent)


softmax = KernelMap(
    name="softmax",
    formula="phi(x) = [softmax(x), softmax(-x)], the paper's; each half sums to 1",
    value=lambda x: jax.nn.softmax(x, axis=-1),
    pull_back=lambda x, phi, g: phi * (g - (phi * g).sum(axis=-1, keepdims=True)),
    signed=True,
    sums_to_one=True,
)
relu = KernelMap(
    name="relu",
    formula="phi(x) = [relu(x), relu(-x)]",
    value=lambda x: jnp.maximum(x, 0.0),
    pull_back=lambda x, phi, g: jnp.where(x > 0, g, 0.0),
    signed=True,
)
squared_relu = KernelMap(
    name="squared_relu",
    formula="phi(x) = [relu(x)^2, relu(-x)^2]",
    value=lambda x: jnp.maximum(x, 0.0) * jnp.maximum(x, 0.0),
    pull_back=lambda x, phi, g: jnp.where(x > 0, 2.0 * x * g, 0.0),
    signed=True,
)
identity = KernelMap(
    name="identity",
    formula="phi(x) = x: plain linear attention, whose scores may be negative",
    value=lambda x: x,
    pull_back=lambda x, phi, g: g,
    signed=False,
)
elu_plus_one = KernelMap(
    name="elu_plus_one",
    formula="phi(x) = elu(x) + 1 (Katharopoulos et al., arXiv 2006.16236)",
    value=lambda x: jnp.where(x > 0, x + 1.0, jnp.exp(jnp.minimum(x, 0.0))),
    pull_back=lambda x, phi, g: jnp.where(x > 0, g, g * phi),
    signed=False,
)
exp = KernelMap(
    name="exp",
    formula="phi(x) = exp(clip(x, -10, 10)), clipped because a maximum over the sequence would leak the future",
    value=lambda x: jnp.exp(jnp.minimum(jnp.maximum(x, -EXP_LIMIT), EXP_LIMIT)),
    pull_back=lambda x, phi, g: jnp.where((x >= -EXP_LIMIT) & (x <= EXP_LIMIT), g * phi, 0.0),
    signed=False,
)

IN_KERNELS = {row.name: row for row in (softmax, relu, identity, elu_plus_one, exp, squared_relu)}


@checked
def taylor(x: Float[Array, "*batch d"]) -> Float[Array, "*batch f"]:
    """Second-order Taylor map: phi(q) . phi(k) = 1 + a + a^2 / 2 with a = q . k / sqrt(d) (Based, arXiv 2402.18668).

    f = 1 + d + d (d + 1) / 2, since x_i x_j is kept once: for small d.
    """
    x = _widen(x)
    d = x.shape[-1]
    first = x / d**0.25
    # Slices, not an index: the gradient of an index adds in no fixed order on a GPU.
    second = [first[..., i : i + 1] * jnp.concatenate([0.5**0.5 * first[..., i : i + 1], first[..., i + 1 :]], axis=-1)
              for i in range(d)]  # fmt: skip
    return jnp.concatenate([jnp.ones_like(x[..., :1]), first, *second], axis=-1)


@checked
class Hedgehog(eqx.Module):
    """A learned map: phi(x) = [softmax(x W), softmax(-x W)], f = 2 e (after Hedgehog, arXiv 2402.04347).

    W starts as the identity where d = e, so that training begins at the paper's map plus a little noise.
    """

    weight: Float[Array, "d e"]

    def __init__(self, head_size: int, num_features: int | None = None, *, key: PRNGKeyArray):
        num_features = head_size if num_features is None else num_features
        noise = jax.random.normal(key, (head_size, num_features), jnp.float32) * (0.1 / head_size**0.5)
        self.weight = jnp.eye(head_size, num_features, dtype=jnp.float32) + noise

    @checked
    def __call__(self, x: Float[Array, "*batch {self.weight.shape[0]}"]) -> Float[Array, "*batch f"]:
        x = _widen(x)
        return softmax(x @ self.weight.astype(x.dtype))


named = IN_KERNELS | {"taylor": taylor}


def as_pair(feature_map: FeatureMap) -> tuple[Callable, Callable]:
    """(phi_q, phi_k) of a map or of a pair of maps."""
    return feature_map if isinstance(feature_map, tuple) else (feature_map, feature_map)


def acts_on_the_last_axis(phi: Callable) -> bool:
    """Is it a map of this file, of which that is known?"""
    return type(phi) is Hedgehog or phi is taylor or phi in IN_KERNELS.values()


def in_kernels(feature_map: FeatureMap, head_size: int) -> KernelMap | None:
    """The row that a map is, also where it comes jitted or wrapped in a function that does no more; else None."""
    phi_q, phi_k = as_pair(feature_map)
    row = _row_of(phi_q, head_size)
    return row if row is _row_of(phi_k, head_size) else None


def _row_of(phi: Callable, head_size: int) -> KernelMap | None:
    if isinstance(phi, KernelMap) and phi in IN_KERNELS.values():
        return phi
    if acts_on_the_last_axis(phi):
        return None
    x = jax.ShapeDtypeStruct((1, 1, 1, head_size), jnp.float32)
    try:
        text = program_text(phi, x)
    except TypeError:
        return None
    return next((row for row in IN_KERNELS.values() if program_text(row, x) == text), None)


def described(phi: Callable) -> str:
    """A map's name, and where it was written, if it is a function."""
    inner = inspect.unwrap(phi)
    name = getattr(inner, "__name__", type(phi).__name__)
    code = getattr(inner, "__code__", None)
    return name if code is None else f"{name} ({code.co_filename.rpartition('/')[2]}:{code.co_firstlineno})"


def num_features(feature_map: FeatureMap, head_size: int, dtype=jnp.float32) -> int:
    """f, the size of phi's result for a head of size d, found without computing anything."""
    x = jax.ShapeDtypeStruct((1, 1, head_size), dtype)  # axes in front, as keys have
    return jax.eval_shape(lambda x: as_pair(feature_map)[1](x), x).shape[-1]
