"""The residual branch: linear attention over exactly the tokens that the window has left behind."""

from typing import Any

import jax.numpy as jnp  # noqa: F401 (the doctest reads it)
from beartype import beartype
from jaxtyping import Array, Float, Int, jaxtyped

from pallas import chunked, reference
from pallas.arguments import check_attention, check_states, choose
from pallas.block_sizes import BlockSizes, default_block_sizes
from pallas.feature_map import FeatureMap, softmax
from pallas.segments import contained, spoil


@jaxtyped(typechecker=beartype)
def residual_linear_attention(
    q: Float[Array, "t h d"],
    k: Float[Array, "s kv d"],
    v: Float[Array, "s kv dv"],
    *,
    window: int,
    feature_map: FeatureMap = softmax,
    initial_state: Float[Array, "kv _f dv"] | None = None,
    segment_state: Float[Array, "kv _f dv"] | None = None,
    segment_ids: Int[Array, "_"] | None = None,
    return_final_state: bool = False,
    implementation: str | None = None,
    block_sizes: BlockSizes | None = None,
) -> Float[Array, "t h dv"] | tuple[Float[Array, "t h dv"], Float[Array, "kv f dv"]]:
    """Linear attention over the keys that lie at least `window` back.

    S_t = S_init + sum over s <= t of phi(k_s)^T v_s and o[t] = phi(q_t) S_{t-W}: the paper's residual linear attention
    (arXiv 2506.15545, section 3). No denominator and no scale: a norm follows. q and k come without rotary embedding.

    Args:
      q, k, v: as in `sliding_window_attention`. The state belongs to the key/value head; its query group shares it.
      window: how many of the newest keys, the query's own included, are left to the local branch; 0 is plain causal
        linear attention.
      feature_map: a callable (..., d) -> (..., f) that acts on the last axis alone, or a pair of them for q and k. It
        is given float32 (float64 for float64 inputs), and differentiated in its own parameters too.
      initial_state: [kv, f, dv], the state of the first segment before its first given key; zero by default.
      segment_state: [kv, f, dv], the state that every later segment starts from; zero by default.
      segment_ids: one id for each key; a query reads its own segment only. What is not finite in one never reaches
        another, nor its gradients; within a segment nothing is promised of it, and its outputs pass no gradient on.
      return_final_state: also return the state that the last query read, S_{s-1-W} of its segment. Pass it on as
        `initial_state`, with the last min(W, s) keys, values and ids in front, and the next call continues exactly.
      implementation, block_sizes: as in `sliding_window_attention`.

    Returns:
      One output for each query and head, in v's dtype; exactly 0 where the residual set is empty and there is no
      initial state. With `return_final_state`, also the state in float32 (float64 for float64 inputs).

    Raises:
      ValueError: where arguments do not fit together. NotImplementedError: for an implementation that cannot do it.

    Numerics: phi, states and sums in float32 (float64 for float64 inputs), within the bounds of
      `sliding_window_attention` for values, the state and all gradients: tests/test_ops.py. "tpu" multiplies in
      bfloat16 for named maps alone: what any other map gives stays float32.
    Cost: about 2 t h (f dv + chunk (f + dv)) + 2 s kv f dv FLOPs, and f dv numbers of state for each chunk and
      key/value head.

    >>> x = jnp.ones((5, 2, 4))
    >>> out, state = residual_linear_attention(x, x, x, window=3, return_final_state=True)
    >>> out.shape, state.shape
    ((5, 2, 4), (2, 8, 4))
    """
    op = "residual_linear_attention"
    check_attention(op, q, k, window, segment_ids)
    check_states(op, feature_map, k, v, initial_state=initial_state, segment_state=segment_state)
    spoilt = None
    if segment_ids is not None:
        states = {"initial_state": initial_state, "segment_state": segment_state}
        finite, spoilt = contained(segment_ids, {"q": q}, {"k": k, "v": v}, states)
        q, k, v = finite["q"], finite["k"], finite["v"]
        initial_state, segment_state = finite["initial_state"], finite["segment_state"]
    arguments: dict[str, Any] = dict(
        window=window,
        feature_map=feature_map,
        initial_state=initial_state,
        segment_state=segment_state,
        segment_ids=segment_ids,
    )
    out: Any
    state: Any
    chosen = choose(op, implementation, q, k, v)
    blocks = block_sizes or default_block_sizes(window, q.shape[0])
    if chosen == "gpu":
        from pallas import rattention_gpu  # needs jax 0.11

        arguments |= {"block_sizes": blocks, "return_final_state": return_final_state}
        out, state = rattention_gpu.residual_linear_attention(q, k, v, **arguments)
    elif chosen == "tpu":
        from pallas import rattention_tpu

        arguments |= {"block_sizes": blocks, "return_final_state": return_final_state}
        out, state = rattention_tpu.residual_linear_attention(q, k, v, **arguments)
    elif chosen == "reference":
        out, state = reference.residual_linear_attention(q, k, v, **arguments)
    else:
        out, state = chunked.residual_linear_attention(q, k, v, **arguments, block_sizes=blocks)
    out = out.astype(v.dtype)
    if spoilt is not None:
        out = spoil(out, spoilt.out, spoilt.of_query)
        state = spoil(state, spoilt.state, spoilt.of_last) if return_final_state else None
    return (out, state) if return_final_state else out
