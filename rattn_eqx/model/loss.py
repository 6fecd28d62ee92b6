"""Next-token loss."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas.checked import checked
from pallas.numerics import accumulation_dtype


@checked
def cross_entropy(
    logits: Float[Array, "*batch vocabulary"], targets: Int[Array, "*batch"], scored: Bool[Array, "*batch"]
) -> Float[Array, ""]:
    """Sum over scored positions of -log softmax(logits)[target], in nats and float32."""
    log_probabilities = jax.nn.log_softmax(logits.astype(accumulation_dtype(logits)), axis=-1)
    chosen = jnp.take_along_axis(log_probabilities, targets[..., None], axis=-1)[..., 0]
    return -jnp.sum(jnp.where(scored, chosen, 0.0))


def bits_per_byte(nats: float, num_bytes: int) -> float:
    """A summed loss in nats over text of `num_bytes` bytes, in bits per byte."""
    return nats / math.log(2) / num_bytes
