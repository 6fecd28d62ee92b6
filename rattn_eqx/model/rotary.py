"""Rotary position embedding (RoFormer, arXiv 2104.09864)."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas.checked import checked
from pallas.numerics import accumulation_dtype


@checked
def rotary(x: Float[Array, "t h d"], positions: Int[Array, "t"], *, theta: float | int = 5e5) -> Float[Array, "t h d"]:
    """Turn channel pair (i, i + d / 2) of every head by the angle position / theta^(2 i / d).

    A product of two turned vectors depends on the difference of their positions only. Angles are in radians, computed
    in float32; the result has x's dtype.

    Raises:
      ValueError: if d is odd.
    """
    d = x.shape[-1]
    if d % 2:
        raise ValueError(f"rotary: d must be even, since channels turn in pairs; got d={d}")
    dtype = accumulation_dtype(x)
    frequency = theta ** (-jnp.arange(0, d, 2, dtype=dtype) / d)
    angle = positions.astype(dtype)[:, None, None, None] * frequency[None, None, None, :]
    cos, sin = jnp.cos(angle), jnp.sin(angle) * jnp.array([-1.0, 1.0], dtype)[None, None, :, None]
    # Not joined of two halves: XLA on a GPU may get a norm and a concatenate wrong (LOG.md, 2026-11-28).
    pairs = x.astype(dtype).reshape(*x.shape[:-1], 2, d // 2)
    return (pairs * cos + pairs[..., ::-1, :] * sin).reshape(x.shape).astype(x.dtype)
