"""Where a converted model's sinks begin: at the logits that make each head's window give most of what it gave before.

A pretrained head leans on the first tokens. With a sink of logit s a window's output o_w, whose softmax has the
denominator exp(lse), becomes o_w sigmoid(lse - s): one number for each head, found on a grid by least squares.
"""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from pallas.checked import checked
from rattn_eqx.conversion.student import replaced
from rattn_eqx.model.attention import RAttention
from rattn_eqx.model.block import Block
from rattn_eqx.model.language_model import LanguageModel
from rattn_eqx.model.local_layers import with_sinks

GRID = np.arange(-10.0, 20.25, 0.25).astype(np.float32)  # logits; the lowest is no sink
LONGEST = 2048  # tokens of a sequence that are read: the logits of a head are [t, t]


@checked
def fit_sinks(model: LanguageModel, tokens: Int[Array, "batch t"], segment_ids: Int[Array, "batch t"]) -> LanguageModel:
    """The model with the sinks of every local layer fitted to what the old layer gives, on the old model's stream.

    Args:
      model: a converted one whose projections are still the old model's.
      tokens, segment_ids: packed documents, as in training.
    """
    if not any(map(_has_sinks, model.blocks)):
        return model
    tokens, segment_ids = tokens[:, :LONGEST], segment_ids[:, :LONGEST]
    streams, found = jax.vmap(model.embed)(tokens), []
    for block in model.blocks:
        if _has_sinks(block):
            errors = sum(_errors(block, x, ids) for x, ids in zip(streams, segment_ids, strict=True))
            found.append(jnp.asarray(GRID)[jnp.argmin(errors, axis=1)])
        streams = _after(block, streams, segment_ids)
    return with_sinks(model, lambda number, _: found[number])


def _has_sinks(block: Block) -> bool:
    return isinstance(block.attention, RAttention) and block.attention.sink_logits is not None


@eqx.filter_jit
def _errors(block: Block, x: Float[Array, "t m"], ids: Int[Array, "t"]) -> Float[Array, "h grid"]:
    """For each head and logit of the grid, the sum over tokens of |with that sink - as it was|^2."""
    layer: Any = block.attention
    q, k, _, _, v = layer.inputs(block.attention_norm(x))
    group = q.shape[1] // k.shape[1]
    heads = lambda x, times: jnp.repeat(jnp.swapaxes(x, 0, 1).astype(jnp.float32), times, axis=0)
    place = jnp.arange(len(x))
    distance = place[:, None] - place[None]
    causal = (distance >= 0) & (ids[:, None] == ids[None])
    grid = jnp.asarray(GRID)[None]

    def of_head(head):
        q, k, v = head
        logits = q @ k.T * q.shape[-1] ** -0.5
        whole, _ = _attended(logits, v, causal)
        window, lse = _attended(logits, v, causal & (distance < layer.window))
        kept = jax.nn.sigmoid(lse[:, None] - grid)
        product = lambda x, y: jnp.sum(x * y, axis=-1)[:, None]
        return jnp.sum(kept**2 * product(window, window) - 2 * kept * product(window, whole), axis=0)

    return jax.lax.map(of_head, (heads(q, 1), heads(k, group), heads(v, group)))


def _attended(
    logits: Float[Array, "t t"], v: Float[Array, "t d"], mask: Bool[Array, "t t"]
) -> tuple[Float[Array, "t d"], Float[Array, "t"]]:
    masked = jnp.where(mask, logits, -jnp.inf)
    return jax.nn.softmax(masked, axis=-1) @ v, jax.nn.logsumexp(masked, axis=-1)


@eqx.filter_jit
def _after(block: Block, streams: Float[Array, "batch t m"], ids: Int[Array, "batch t"]) -> Float[Array, "batch t m"]:
    """The old model's stream after a block."""
    layer = block.attention
    old = eqx.tree_at(lambda x: x.attention, block, replaced(layer) if isinstance(layer, RAttention) else layer)
    return jax.vmap(old)(streams, ids)
