"""Next-token loss."""

import math
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas.checked import checked
from pallas.numerics import accumulation_dtype
from rattn_eqx.model.language_model import LanguageModel, map_logits


@checked
def cross_entropy(
    logits: Float[Array, "*batch vocabulary"], targets: Int[Array, "*batch"], scored: Bool[Array, "*batch"]
) -> Float[Array, ""]:
    """Sum over scored positions of -log softmax(logits)[target], in nats and float32."""
    return -jnp.sum(log_likelihood(logits, targets, scored))


@checked
def log_likelihood(
    logits: Float[Array, "*batch vocabulary"], targets: Int[Array, "*batch"], scored: Bool[Array, "*batch"]
) -> Float[Array, "*batch"]:
    """log softmax(logits)[target] at scored positions and 0 at others, in nats and float32."""
    log_probabilities = jax.nn.log_softmax(logits.astype(accumulation_dtype(logits)), axis=-1)
    chosen = jnp.take_along_axis(log_probabilities, targets[..., None], axis=-1)[..., 0]
    return jnp.where(scored, chosen, 0.0)


def nats_of_tokens(logits: Float[Array, "*batch vocabulary"], targets: Int[Array, "*batch"]) -> Float[Array, "*batch"]:
    """-log softmax(logits)[target] at every position, in nats."""
    return -log_likelihood(logits, targets, jnp.ones_like(targets, bool))


def summed_nats(model: LanguageModel, batch: Mapping[str, Array], masks: Sequence[Array]) -> list[Array]:
    """`cross_entropy` of a batch of `tokens`, `targets` and, for packed documents, `segment_ids`, for each mask."""
    each = lambda logits, targets, *masks: [log_likelihood(logits, targets, mask) for mask in masks]
    found = map_logits(each, model, batch["tokens"], batch.get("segment_ids"), batch["targets"], *masks)
    return [-jnp.sum(x) for x in found]


def bits_per_byte(nats: float, num_bytes: int) -> float:
    """A summed loss in nats over text of `num_bytes` bytes, in bits per byte."""
    return nats / math.log(2) / num_bytes
