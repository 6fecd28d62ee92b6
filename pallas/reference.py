"""The definition: every pair of query and key, masked. Quadratic in t; any dtype; differentiated by JAX.

Every other implementation is held to these functions, values and gradients. They return the accumulation dtype
(float32, or float64 for float64 inputs); the public ops round to v's dtype. Nothing is cut: `block_sizes` is ignored.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas import segments
from pallas.block_sizes import BlockSizes
from pallas.feature_map import FeatureMap, as_pair
from pallas.numerics import accumulation_dtype
from pallas.step_cache import StepCache, in_order, turned


def positions(t: int, s: int) -> tuple[Int[Array, "t"], Int[Array, "s"]]:
    """Where queries and keys stand: keys at 0 ... s-1, queries at the last t of them."""
    return s - t + jnp.arange(t), jnp.arange(s)


def same_segment(t: int, segment_ids: Int[Array, "s"] | None) -> Array:
    """[t, s], or something that broadcasts to it: may query and key see each other?"""
    if segment_ids is None:
        return jnp.ones((1, 1), bool)
    runs = segments.runs(segment_ids)
    return runs[-t:, None] == runs[None, :]


def sliding_window_attention(
    q: Float[Array, "t h d"],
    k: Float[Array, "s kv d"],
    v: Float[Array, "s kv dv"],
    *,
    window: int,
    scale: float,
    segment_ids: Int[Array, "s"] | None,
    sink_logits: Float[Array, "h"] | None = None,
    block_sizes: BlockSizes | None = None,
) -> Float[Array, "t h dv"]:
    """o_swa[t] = sum over t - W < s <= t of softmax_s(scale q_t . k_s) v_s, the sink's logit among those of s."""
    dtype = accumulation_dtype(q, k, v)
    (t, h, d), (s, kv, dv) = q.shape, v.shape
    if window == 0:
        return jnp.zeros((t, h, dv), dtype)
    at_query, at_key = positions(t, s)
    distance = at_query[:, None] - at_key[None, :]
    in_window = (distance >= 0) & (distance < window) & same_segment(t, segment_ids)
    q = q.astype(dtype).reshape(t, kv, h // kv, d)
    logits = scale * jnp.einsum("tkgd,skd->kgts", q, k.astype(dtype))
    logits = jnp.where(in_window, logits, -jnp.inf)
    if sink_logits is not None:
        sinks = sink_logits.astype(dtype).reshape(kv, h // kv, 1, 1)
        logits = jnp.concatenate([logits, jnp.broadcast_to(sinks, (*logits.shape[:-1], 1))], axis=-1)
    weights = jax.nn.softmax(logits, axis=-1)[..., :s]
    return jnp.einsum("kgts,skv->tkgv", weights, v.astype(dtype)).reshape(t, h, dv)


def residual_linear_attention(
    q: Float[Array, "t h d"],
    k: Float[Array, "s kv d"],
    v: Float[Array, "s kv dv"],
    *,
    window: int,
    feature_map: FeatureMap,
    initial_state: Float[Array, "kv f dv"] | None,
    segment_state: Float[Array, "kv f dv"] | None,
    segment_ids: Int[Array, "s"] | None,
    block_sizes: BlockSizes | None = None,
    return_final_state: bool = True,
) -> tuple[Float[Array, "t h dv"], Float[Array, "kv f dv"] | None]:
    """o_rla[t] = phi(q_t) (S_init + sum over s <= t - W of phi(k_s)^T v_s), and the state that the last query read."""
    dtype = accumulation_dtype(q, k, v)
    (t, h, d), (s, kv, dv) = q.shape, v.shape
    phi_q, phi_k = as_pair(feature_map)
    features_q = phi_q(q.astype(dtype).reshape(t, kv, h // kv, d)).astype(dtype)
    features_k = phi_k(k.astype(dtype)).astype(dtype)
    v = v.astype(dtype)

    at_query, at_key = positions(t, s)
    residual = ((at_query[:, None] - at_key[None, :]) >= window) & same_segment(t, segment_ids)
    scores = jnp.where(residual, jnp.einsum("tkgf,skf->kgts", features_q, features_k), 0)
    out = jnp.einsum("kgts,skv->tkgv", scores, v)
    state = jnp.einsum("s,skf,skv->kfv", residual[-1].astype(dtype), features_k, v)

    first = jnp.ones((t,), bool) if segment_ids is None else segments.runs(segment_ids)[-t:] == 0
    for start, reads in ((initial_state, first), (segment_state, ~first)):
        if start is not None:
            start = start.astype(dtype)
            read = jnp.einsum("tkgf,kfv->tkgv", features_q, start)
            out = out + jnp.where(reads[:, None, None, None], read, 0)
            state = state + jnp.where(reads[-1], start, 0)
    return out.reshape(t, h, dv), state if return_final_state else None


def normed_sum(
    o_swa: Float[Array, "t h dv"],
    o_rla: Float[Array, "t h dv"],
    swa_gain: Float[Array, "h dv"] | None,
    rla_gain: Float[Array, "h dv"],
    eps: float,
) -> Float[Array, "t h dv"]:
    """o = g_swa rms(o_swa) + g_rla rms(o_rla), or without g_swa o_swa + g_rla rms(o_rla)."""
    if swa_gain is not None:
        o_swa = swa_gain.astype(o_swa.dtype)[None] * rms(o_swa, eps)
    return o_swa + rla_gain.astype(o_swa.dtype)[None] * rms(o_rla, eps)


def rms(x: Float[Array, "t h dv"], eps: float) -> Float[Array, "t h dv"]:
    """x / sqrt(mean(x^2) + eps) over dv."""
    return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + eps)


def rattention(
    q: Float[Array, "t h d"],
    k: Float[Array, "s kv d"],
    v: Float[Array, "s kv dv"],
    *,
    q_rla: Float[Array, "t h d"],
    k_rla: Float[Array, "s kv d"],
    swa_gain: Float[Array, "h dv"] | None,
    rla_gain: Float[Array, "h dv"],
    eps: float,
    window: int,
    scale: float,
    segment_ids: Int[Array, "s"] | None,
    sink_logits: Float[Array, "h"] | None = None,
    block_sizes: BlockSizes | None = None,
    **of_rla,
) -> tuple[Float[Array, "t h dv"], Float[Array, "kv f dv"] | None]:
    """Both branches, normed and added, and the state that the last query read."""
    shared: dict[str, Any] = dict(window=window, segment_ids=segment_ids)
    o_swa = sliding_window_attention(q, k, v, scale=scale, sink_logits=sink_logits, **shared)
    o_rla, state = residual_linear_attention(q_rla, k_rla, v, **shared, **of_rla)
    dtype = accumulation_dtype(o_swa, o_rla)
    return normed_sum(o_swa.astype(dtype), o_rla.astype(dtype), swa_gain, rla_gain, eps), state


def sliding_window_attention_step(
    q: Float[Array, "h d"], k: Float[Array, "kv d"], v: Float[Array, "kv dv"], cache: StepCache, **options: Any
) -> tuple[Float[Array, "h dv"], StepCache]:
    """The whole-sequence op on the tokens of the ring, in their order, and the new one."""
    after, *_ = turned(cache, k, None, v)
    keys, values, ids = _ordered(cache, k=(cache.keys, k), v=(cache.values, v))
    out = sliding_window_attention(q[None], keys, values, window=cache.window, segment_ids=ids, **options)
    return out[0], after


def rattention_step(
    q: Float[Array, "h d"],
    k: Float[Array, "kv d"],
    v: Float[Array, "kv dv"],
    cache: StepCache,
    *,
    q_rla: Float[Array, "h d"],
    k_rla: Float[Array, "kv d"],
    **options: Any,
) -> tuple[Float[Array, "h dv"], StepCache]:
    """The whole-sequence op on the tokens of the ring, in their order, and the new one; its final state is kept."""
    after, *_ = turned(cache, k, k_rla, v)
    rows = dict(k=(cache.keys, k), v=(cache.values, v), k_rla=(cache.ring_rla, k_rla))
    keys, values, keys_rla, ids = _ordered(cache, **rows)
    states = dict(initial_state=cache.state, segment_state=cache.state)  # of a short document: still what it began with
    out, state = rattention(
        q[None], keys, values, q_rla=q_rla[None], k_rla=keys_rla, window=cache.window, segment_ids=ids, **states,
        **options,
    )  # fmt: skip
    return out[0], dataclasses.replace(after, state=state)


def _ordered(cache: StepCache, **rings_and_rows: tuple[Array, Array]) -> tuple[Array, ...]:
    """Each ring from its oldest token to its newest and the new row, 0 where a slot holds none; then ids that tell."""
    held = in_order(cache.holds[:, None, None], cache.length)
    joined = [
        jnp.concatenate([jnp.where(held, in_order(ring, cache.length), 0), row.astype(ring.dtype)[None]])
        for ring, row in rings_and_rows.values()
    ]
    return *joined, jnp.concatenate([held[:, 0, 0], jnp.ones((1,), bool)]).astype(jnp.int32)
