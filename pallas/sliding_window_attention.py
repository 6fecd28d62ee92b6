"""The local branch: each query sees the last `window` keys, itself included."""

from typing import Any

import jax.numpy as jnp  # noqa: F401 (the doctest reads it)
from beartype import beartype
from jaxtyping import Array, Float, Int, jaxtyped

from pallas import chunked, reference
from pallas.arguments import check_attention, choose
from pallas.block_sizes import BlockSizes, default_block_sizes
from pallas.segments import contained, spoil


@jaxtyped(typechecker=beartype)
def sliding_window_attention(
    q: Float[Array, "t h d"],
    k: Float[Array, "s kv d"],
    v: Float[Array, "s kv dv"],
    *,
    window: int,
    scale: float | int | None = None,
    segment_ids: Int[Array, "_"] | None = None,
    implementation: str | None = None,
    block_sizes: BlockSizes | None = None,
) -> Float[Array, "t h dv"]:
    """Causal softmax attention over the last `window` keys.

    o[t] = sum over t - W < s <= t of softmax_s(scale q_t . k_s) v_s: the paper's local attention (arXiv 2506.15545,
    section 3), whose w is our W - 1, since `window` counts the query's own key too. `window >= s` is full attention.

    Args:
      q, k, v: queries, keys and values of one sequence, in any floating dtypes; `jax.vmap` batches. With more keys than
        queries, queries stand at the last t of the s positions. Query head i reads key/value head i // (h / kv).
      window: keys that a query sees, itself included; 0 gives exactly 0.
      scale: multiplies the logits; 1 / sqrt(d) by default.
      segment_ids: one id for each key; a query sees its own segment only. A segment is a maximal run of equal ids. What
        is not finite in one never reaches another, nor its gradients; within a segment nothing is promised of it, and
        its outputs pass no gradient on.
      implementation: None, "reference", "chunked", "gpu" or "tpu". None picks "gpu" on a Hopper GPU whose kernels serve
        the call (bfloat16, sizes up to 128), "tpu" on a TPU, else "chunked". "gpu" and "tpu" elsewhere are interpreted,
        slowly. No time was ever measured on a TPU: its kernels are interpreted for their values, and compiled for their
        costs.
      block_sizes: how the sequence is cut; changes no result beyond rounding.

    Returns:
      One output for each query and head, in v's dtype.

    Raises:
      ValueError: where arguments do not fit together. NotImplementedError: for an implementation that cannot do it.

    Numerics: products and softmax in float32 (float64 for float64 inputs). `chunked` is within 1e-5 (float32 at highest
      matmul precision), 5e-3 (bfloat16) and 1e-12 (float64) of `reference`, relative RMS: tests/test_ops.py. "gpu"
      multiplies bfloat16 and adds in float32: within twice the error of `chunked` plus 3e-3, there and in
      tests/test_gpu_kernels.py. So does "tpu" where q, k and v are bfloat16; all else but float64, which it refuses, it
      multiplies in float32, within twice the error of `chunked` plus 1e-5: tests/test_tpu_kernels.py.
    Cost: about 2 t h (d + dv) (min(W, t) + chunk) FLOPs for `chunked`, memory linear in t; `reference` is quadratic.

    >>> x = jnp.ones((5, 2, 4))
    >>> sliding_window_attention(x, x, x, window=3).shape
    (5, 2, 4)
    """
    op = "sliding_window_attention"
    check_attention(op, q, k, window, segment_ids)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    spoilt = None
    if segment_ids is not None:
        finite, spoilt = contained(segment_ids, {"q": q}, {"k": k, "v": v}, {})
        q, k, v = finite["q"], finite["k"], finite["v"]
    arguments: dict[str, Any] = dict(window=window, scale=scale, segment_ids=segment_ids)
    chosen = choose(op, implementation, q, k, v)
    blocks = block_sizes or default_block_sizes(window, q.shape[0])
    if chosen == "gpu":
        from pallas import rattention_gpu  # needs jax 0.11

        out = rattention_gpu.sliding_window_attention(q, k, v, **arguments, block_sizes=blocks)
    elif chosen == "tpu":
        from pallas import rattention_tpu

        out = rattention_tpu.sliding_window_attention(q, k, v, **arguments, block_sizes=blocks)
    elif chosen == "reference":
        out = reference.sliding_window_attention(q, k, v, **arguments)
    else:
        out = chunked.sliding_window_attention(q, k, v, **arguments, block_sizes=blocks)
    out = out.astype(v.dtype)
    return out if spoilt is None else spoil(out, spoilt.out, spoilt.of_query)
