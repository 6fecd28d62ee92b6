"""Rotary position embedding (RoFormer, arXiv 2104.09864)."""

import dataclasses

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from pallas.checked import checked
from pallas.numerics import accumulation_dtype
from rattn_eqx.model.fields import settle

NEAR = 4096  # positions whose angles float32 holds well enough


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Rotary frequencies of a model whose context was extended, as Llama 3.1 has it.

    A frequency with fewer than `low_frequency_factor` turns in `original_length` tokens is divided by `factor`, one
    with more than `high_frequency_factor` stays, and one between is a blend, linear in the turns.
    """

    factor: float | int
    low_frequency_factor: float | int
    high_frequency_factor: float | int
    original_length: int

    def __post_init__(self):
        settle(self)
        if (
            self.factor < 1
            or not 0 < self.low_frequency_factor < self.high_frequency_factor
            or self.original_length < 1
        ):
            raise ValueError(
                "RopeScaling: factor and original_length must be at least 1, and low_frequency_factor above 0 and "
                f"below high_frequency_factor; got {self}"
            )

    def scaled(self, frequency: np.ndarray) -> np.ndarray:
        """The frequencies, in radians for each token, that this makes of a model's own."""
        turns = self.original_length * frequency / (2 * np.pi)
        low, high = self.low_frequency_factor, self.high_frequency_factor
        kept = np.clip((turns - low) / (high - low), 0.0, 1.0)
        return frequency * (kept + (1 - kept) / self.factor)


@checked
def rotary(
    x: Float[Array, "t h d"],
    positions: Int[Array, "t"],
    *,
    theta: float | int = 5e5,
    scaling: RopeScaling | None = None,
) -> Float[Array, "t h d"]:
    """Turn channel pair (i, i + d / 2) of every head by the angle position / theta^(2 i / d), or `scaling` of that.

    A product of two turned vectors depends on the difference of their positions only, at any position: whole turns are
    taken off exactly. Angles are in radians, computed in float32 (float64 for float64 x); the result has x's dtype.

    Raises:
      ValueError: if d is odd.
    """
    d = x.shape[-1]
    if d % 2:
        raise ValueError(f"rotary: d must be even, since channels turn in pairs; got d={d}")
    dtype = accumulation_dtype(x)
    exact = theta ** (-np.arange(0, d, 2) / d)
    if scaling is None:
        frequency = theta ** (-jnp.arange(0, d, 2, dtype=dtype) / d)
    else:
        exact = scaling.scaled(exact)
        frequency = jnp.asarray(exact, dtype)
    near, far = positions, None
    if dtype == jnp.float32:
        near = positions % NEAR
        far = _turned(positions - near, exact)[:, None, None, :]
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
