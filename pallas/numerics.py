"""The dtype that sums are kept in, float32 as two bfloat16 numbers, and how far a result is from the definition."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array


def accumulation_dtype(*arrays: Array):
    """float64 if any array is float64, else float32."""
    return jnp.float64 if any(x.dtype == jnp.float64 for x in arrays) else jnp.float32


def split(x, precise: bool) -> list:
    """float32 as [hi] or, if precise, as [hi, lo] of bfloat16: lo is the rounding error of hi.

    For use inside kernels: XLA on a GPU removes a round trip through bfloat16, and lo would be 0.
    """
    hi = x.astype(jnp.bfloat16)
    return [hi, (x - hi.astype(jnp.float32)).astype(jnp.bfloat16)] if precise else [hi]


def relative_rms(got, expected) -> float:
    """rms(got - expected) / rms(expected), in float64; where `expected` is all 0, 0 if `got` is too, else infinity."""
    got, expected = np.asarray(got, np.float64), np.asarray(expected, np.float64)
    if got.shape != expected.shape:
        raise ValueError(f"relative_rms: shapes must agree; got {got.shape} and {expected.shape}")
    difference, size = (float(np.sqrt(np.mean(x**2))) if x.size else 0.0 for x in (got - expected, expected))
    if size == 0.0:
        return 0.0 if difference == 0.0 else np.inf
    return difference / size


def relative_rms_by_name(got, expected) -> dict[str, float]:
    """`relative_rms` of each leaf of two like trees, by the leaf's path."""
    pairs = zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(expected), strict=True)
    return {jax.tree_util.keystr(path, simple=True): relative_rms(x, y) for (path, x), y in pairs}
