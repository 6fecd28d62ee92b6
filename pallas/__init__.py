"""RATTENTION's ops: sliding-window attention, residual linear attention, and both as one.

Names, everywhere:

* Dimensions: t queries, s keys, h query heads, kv key/value heads, d key size, dv value size, f feature size, m model
  width, w feed-forward width, c chunk, n chunks; `tokens` (learned key/value pairs) and `vocabulary` are written out.
* swa: sliding-window attention, the window. rla: residual linear attention, the residual branch. A query's residual
  set: the keys that have left its window, and that rla reads.
* group: the h / kv query heads that read one key/value head.
* phi: the feature map, of queries and of keys. slice: a part of phi of as many channels as a head has. features: phi's
  values.
* state: [f, dv], the sum of phi(k)^T v over a residual set. start states: initial_state, of the first segment, and
  segment_state, from which each later one starts.
* segment: a maximal run of equal segment_ids, a document of a packed sequence. runs: the number of each token's.
* ring: the last W keys and values of a sequence that is generated; a token takes the slot of the one that leaves.
* chunk: tokens that one product takes together, between two of which the state is passed on. block: what one step of a
  TPU kernel's grid takes, some chunks. tile: a matrix in a kernel's memory, of a chunk or a part of it.
* lse: log of the sum of exponentials of a query's logits, from which the backward pass recomputes its weights. delta:
  the sum over dv of output times its gradient, which the softmax's gradient subtracts. acc, row_max, row_sum: what the
  online softmax carries from block to block. correction: what it multiplies them by when the maximum grows.
* sink: a logit without a value in a head's softmax.
* rstd: 1 / sqrt(mean(x^2) + eps), by which an RMS norm multiplies x. gain: what multiplies the normed output.
* hi, lo: a float32 number as two bfloat16 ones: hi is the rounded number, lo the rounding error.
* d_x, or dx: the gradient of x. cotangent: the gradient of the output, from which a backward pass starts.

Ops take one sequence; `jax.vmap` batches. Arrays are `jax.Array`s: `jnp.asarray` makes one of NumPy's.

>>> import jax, jax.numpy as jnp, pallas
>>> shapes = ((1000, 8, 64), (1000, 2, 64), (1000, 2, 64))  # tokens, heads, head size: one sequence
>>> q, k, v = (jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate(shapes))
>>> gains = {"swa_gain": jnp.ones((8, 64)), "rla_gain": jnp.ones((8, 64))}
>>> pallas.rattention(q, k, v, window=128, **gains).shape  # both branches, normed and added
(1000, 8, 64)
>>> pallas.sliding_window_attention(q, k, v, window=128).shape  # softmax over the last 128 keys
(1000, 8, 64)
>>> relu = pallas.feature_map.relu  # or any function of your own
>>> out, state = pallas.residual_linear_attention(
...     q, k, v, window=128, feature_map=relu, return_final_state=True
... )
>>> out.shape, state.shape
((1000, 8, 64), (2, 128, 64))
>>> batch = jax.vmap(lambda q, k, v: pallas.rattention(q, k, v, window=128, **gains))
>>> batch(q[None], k[None], v[None]).shape
(1, 1000, 8, 64)

`window` counts the query's own token (the paper's w is one less). `window >= t` is full attention, `window = 0` linear
attention. In a real layer the residual branch reads q and k without rotary embedding: pass `q_rla` and `k_rla`, or use
`rattn_eqx.RAttention`, which does. The package shares its name with an unrelated project on the package registry: never
install both in one environment, since one overwrites the other. `pallas.__file__` shows where yours comes from.
"""

from pallas import feature_map
from pallas.block_sizes import BlockSizes
from pallas.ops import (
    rattention,
    rattention_step,
    residual_linear_attention,
    sliding_window_attention,
    sliding_window_attention_step,
)
from pallas.step_cache import StepCache

__all__ = [
    "BlockSizes",
    "StepCache",
    "feature_map",
    "rattention",
    "rattention_step",
    "residual_linear_attention",
    "sliding_window_attention",
    "sliding_window_attention_step",
]
