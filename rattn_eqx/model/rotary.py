"""Rotary position embedding (RoFormer, arXiv 2104.09864)."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from pallas.checked import checked
from pallas.numerics import accumulation_dtype

NEAR = 4096  # positions whose angles float32 holds well enough


@checked
def rotary(x: Float[Array, "t h d"], positions: Int[Array, "t"], *, theta: float | int = 5e5) -> Float[Array, "t h d"]:
    """Turn channel pair (i, i + d / 2) of every head by the angle position / theta^(2 i / d).

    A product of two turned vectors depends on the difference of their positions only, at any position: whole turns are
    taken off exactly. Angles are in radians, computed in float32 (float64 for float64 x); the result has x's dtype.

    Raises:
      ValueError: if d is odd.
    """
    d = x.shape[-1]
    if d % 2:
        raise ValueError(f"rotary: d must be even, since channels turn in pairs; got d={d}")
    dtype = accumulation_dtype(x)
    frequency = theta ** (-jnp.arange(0, d, 2, dtype=dtype) / d)
    near, far = positions, None
    if dtype == jnp.float32:
        near = positions % NEAR
        far = _turned(positions - near, theta ** (-np.arange(0, d, 2) / d))[:, None, None, :]
    angle = near.astype(dtype)[:, None, None, None] * frequency[None, None, None, :]
    angle = angle if far is None else angle + far
    cos, sin = jnp.cos(angle), jnp.sin(angle) * jnp.array([-1.0, 1.0], dtype)[None, None, :, None]
    # Not joined of two halves: XLA on a GPU may get a norm and a concatenate wrong (LOG.md, 2026-11-28).
    pairs = x.astype(dtype).reshape(*x.shape[:-1], 2, d // 2)
    return (pairs * cos + pairs[..., ::-1, :] * sin).reshape(x.shape).astype(x.dtype)


def _turned(positions: Int[Array, "t"], frequency: np.ndarray) -> Float[Array, "t d/2"]:
    """position * frequency without whole turns, in float32: in fractions of a turn of 32 bits, products are exact."""
    fractions = jnp.asarray(np.round(frequency / (2 * np.pi) * 2.0**32).astype(np.uint64).astype(np.uint32))
    turned = positions.astype(jnp.uint32)[:, None] * fractions[None]
    return turned.astype(jnp.int32).astype(jnp.float32) * np.float32(2 * np.pi / 2.0**32)
