"""How far a result is from the definition: relative root-mean-square error, named by tensor."""

import jax
import numpy as np


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
