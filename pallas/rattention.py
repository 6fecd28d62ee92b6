"""RATTENTION: both branches, a norm and a gain for each, and their sum, in one op."""

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
def rattention(
    q: Float[Array, "t h d"],
    k: Float[Array, "s kv d"],
    v: Float[Array, "s kv dv"],
    *,
    window: int,
    swa_gain: Float[Array, "h dv"],
    rla_gain: Float[Array, "h dv"],
    feature_map: FeatureMap = softmax,
    q_rla: Float[Array, "t h d"] | None = None,
    k_rla: Float[Array, "s kv d"] | None = None,
    scale: float | int | None = None,
    eps: float | int = 1e-6,
    initial_state: Float[Array, "kv _f dv"] | None = None,
    segment_state: Float[Array, "kv _f dv"] | None = None,
    segment_ids: Int[Array, "_"] | None = None,
    return_final_state: bool = False,
    implementation: str | None = None,
    block_sizes: BlockSizes | None = None,
) -> Float[Array, "t h dv"] | tuple[Float[Array, "t h dv"], Float[Array, "kv f dv"]]:
    """Sliding-window attention plus residual linear attention, each with its own RMS norm and gain.

    o[t] = g_swa rms(o_swa[t]) + g_rla rms(o_rla[t]) with rms(x) = x / sqrt(mean(x^2) + eps) over dv (arXiv 2506.15545,
    section 3). Every causal pair of query and key is counted by exactly one branch.

    Args:
      q, k: what the local branch reads, usually after qk-norm and rotary embedding.
      v, window, scale, feature_map, initial_state, segment_state, segment_ids, return_final_state, implementation,
        block_sizes: as in `sliding_window_attention` and `residual_linear_attention`. `window >= s` leaves the local
        branch alone, `window = 0` the residual one; the other term is then exactly 0.
      swa_gain, rla_gain: g_swa and g_rla.
      q_rla, k_rla: what the residual branch reads. They default to q and k, which is wrong if those already carry
        rotary embeddings or qk-norm.
      eps: inside both norms. It bounds the gradient where o_rla is exactly 0, by 1 / sqrt(eps).

    Returns:
      As `residual_linear_attention`. Raises, Numerics: likewise. Cost: the sum of both branches.

    >>> x, gain = jnp.ones((5, 2, 4)), jnp.ones((2, 4))
    >>> rattention(x, x, x, window=3, swa_gain=gain, rla_gain=gain).shape
    (5, 2, 4)
    """
    op = "rattention"
    q_rla = q if q_rla is None else q_rla
    k_rla = k if k_rla is None else k_rla
    check_attention(op, q, k, window, segment_ids)
    check_states(op, feature_map, k_rla, v, initial_state=initial_state, segment_state=segment_state)
    chosen = choose(op, implementation, q, k, v, q_rla, k_rla)
    spoilt = None
    if segment_ids is not None:
        states = {"initial_state": initial_state, "segment_state": segment_state}
        of_queries, of_keys = {"q": q, "q_rla": q_rla}, {"k": k, "v": v, "k_rla": k_rla}
        finite, spoilt = contained(segment_ids, of_queries, of_keys, states)
        q, k, v = (finite[name] for name in ("q", "k", "v"))
        q_rla, k_rla = finite["q_rla"], finite["k_rla"]
        initial_state, segment_state = finite["initial_state"], finite["segment_state"]
    arguments: dict[str, Any] = dict(
        q_rla=q_rla,
        k_rla=k_rla,
        swa_gain=swa_gain,
        rla_gain=rla_gain,
        eps=eps,
        window=window,
        scale=q.shape[-1] ** -0.5 if scale is None else scale,
        feature_map=feature_map,
        initial_state=initial_state,
        segment_state=segment_state,
        segment_ids=segment_ids,
    )
    out: Any
    state: Any
    blocks = block_sizes or default_block_sizes(window, q.shape[0])
    if chosen == "gpu":
        from pallas import rattention_gpu  # needs jax 0.11

        arguments |= {"block_sizes": blocks, "return_final_state": return_final_state}
        out, state = rattention_gpu.rattention(q, k, v, **arguments)
    elif chosen == "tpu":
        from pallas import rattention_tpu

        arguments |= {"block_sizes": blocks, "return_final_state": return_final_state}
        out, state = rattention_tpu.rattention(q, k, v, **arguments)
    elif chosen == "reference":
        out, state = reference.rattention(q, k, v, **arguments)
    else:
        out, state = chunked.rattention(q, k, v, **arguments, block_sizes=blocks)
    out = out.astype(v.dtype)
    if spoilt is not None:
        out = spoil(out, spoilt.out, spoilt.of_query)
        state = spoil(state, spoilt.state, spoilt.of_last) if return_final_state else None
    return (out, state) if return_final_state else out
