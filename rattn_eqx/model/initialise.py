"""How weights begin."""

import jax
import jax.numpy as jnp
from beartype import beartype
from jaxtyping import Array, Float, PRNGKeyArray, jaxtyped

TRUNCATED_STD = 0.87962566  # standard deviation of a normal cut at two standard deviations


@jaxtyped(typechecker=beartype)
def truncated_normal(key: PRNGKeyArray, shape: tuple[int, ...], fan_in: int) -> Float[Array, "..."]:
    """Float32 normal of standard deviation 1 / sqrt(fan_in), cut at two standard deviations."""
    return jax.random.truncated_normal(key, -2.0, 2.0, shape, jnp.float32) * (fan_in**-0.5 / TRUNCATED_STD)
