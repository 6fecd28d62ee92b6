"""Root-mean-square norms."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas.checked import checked
from pallas.numerics import accumulation_dtype


@checked
class RMSNorm(eqx.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last axis, computed in float32, returned in x's dtype.

    Over `m` it is a block's pre-norm; over `d` it is a norm per head (qk-norm).
    """

    weight: Float[Array, "size"]
    eps: float | int = eqx.field(static=True)

    def __init__(self, size: int, eps: float | int = 1e-6):
        self.weight = jnp.ones((size,), jnp.float32)
        self.eps = eps

    @checked
    def __call__(
        self, x: Float[Array, "*batch {self.weight.shape[0]}"]
    ) -> Float[Array, "*batch {self.weight.shape[0]}"]:
        """Each vector of the last axis normed by itself, in x's dtype."""
        wide = x.astype(accumulation_dtype(x))
        mean_square = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
        weight = jnp.broadcast_to(self.weight, x.shape).astype(wide.dtype)
        return (wide * jax.lax.rsqrt(mean_square + self.eps) * weight).astype(x.dtype)
