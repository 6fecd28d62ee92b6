"""How weights begin."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from pallas.checked import checked

TRUNCATED_STD = 0.87962566  # standard deviation of a normal cut at two standard deviations


@checked
def truncated_normal(key: PRNGKeyArray, shape: tuple[int, ...], fan_in: int) -> Float[Array, "..."]:
    """Float32 normal of standard deviation 1 / sqrt(fan_in), cut at two standard deviations."""
    return jax.random.truncated_normal(key, -2.0, 2.0, shape, jnp.float32) * (fan_in**-0.5 / TRUNCATED_STD)
