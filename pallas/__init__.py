"""RATTENTION's ops: sliding-window attention, residual linear attention, and both as one.

Dimensions, everywhere: t queries, s keys, h query heads, kv key/value heads, d key size, dv value size, f feature size,
m model width, w feed-forward width, c chunk, n chunks; `tokens` (learned key/value pairs) and `vocabulary` are written
out. Ops take one sequence; `jax.vmap` batches. Arrays are `jax.Array`s: `jnp.asarray` makes one of NumPy's.
"""

from pallas import feature_map
from pallas.block_sizes import BlockSizes
from pallas.rattention import rattention
from pallas.residual_linear_attention import residual_linear_attention
from pallas.sliding_window_attention import sliding_window_attention

__all__ = ["BlockSizes", "feature_map", "rattention", "residual_linear_attention", "sliding_window_attention"]
