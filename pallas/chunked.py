"""Portable XLA: linear memory in t for every window, forward and backward. Differentiated by JAX, forward mode too.

Products and sums are in the accumulation dtype (float32, or float64 for float64 inputs), so bfloat16 inputs lose
nothing but the final rounding; on GPU and TPU the default matmul precision applies. Bodies are rematerialised: the
backward pass keeps the inputs and the chunk states, never the scores. Notebook 02 derives both loops.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas import segments
from pallas.block_sizes import BlockSizes, round_up
from pallas.feature_map import FeatureMap, as_pair, num_features
from pallas.numerics import accumulation_dtype
from pallas.reference import normed_sum
from pallas.step_cache import StepCache, turned


def pad(x: Array, before: int, after: int, mode: str) -> Array:
    """Lengthen the leading axis, with zeros ("zero") or with copies of the outermost entry ("edge").

    The copies take no gradient: whatever reads them is multiplied by 0 or thrown away.
    """

    def copies(x, count):
        shape = (count, *x.shape[1:])
        return jnp.zeros(shape, x.dtype) if mode == "zero" else jax.lax.stop_gradient(jnp.broadcast_to(x, shape))

    parts = [copies(x[:1], before)] * (before > 0) + [x] + [copies(x[-1:], after)] * (after > 0)
    return x if len(parts) == 1 else jnp.concatenate(parts)


def map_chunks(body, chunks, group: int):
    """`body` of every chunk, `group` of them at a time, its intermediates recomputed in the backward pass."""
    num_chunks = jax.tree.leaves(chunks)[0].shape[0]
    body = jax.checkpoint(body)
    if num_chunks <= group:
        return jax.vmap(body)(chunks)
    return jax.lax.map(body, chunks, batch_size=group)


def sliding_window_attention(
    q: Float[Array, "t h d"],
    k: Float[Array, "s kv d"],
    v: Float[Array, "s kv dv"],
    *,
    window: int,
    scale: float,
    segment_ids: Int[Array, "s"] | None,
    block_sizes: BlockSizes,
    sink_logits: Float[Array, "h"] | None = None,
) -> Float[Array, "t h dv"]:
    """Three loops: spans of about `window` queries, chunks of queries in a span, blocks of the keys a chunk may see."""
    dtype = accumulation_dtype(q, k, v)
    (t, h, d), (s, kv, dv) = q.shape, v.shape
    if window == 0:
        return jnp.zeros((t, h, dv), dtype)
    window = min(window, s)
    if window == 1 and sink_logits is None:  # a weight is 1 whatever the logit: q and k get a gradient of exactly 0
        return jnp.repeat(v[s - t :].astype(dtype), h // kv, axis=1)
    chunk = min(block_sizes.chunk, t)

    # A chunk of queries sees its own positions and `back` before them, cut into `num_blocks` equal blocks of keys.
    width = round_up(window - 1, chunk) + chunk
    num_blocks = -(-width // max(block_sizes.key_block, chunk))
    width = round_up(width, num_blocks * chunk)
    back = width - chunk
    span = min(max(back, chunk), round_up(t, chunk))
    num_spans = -(-t // span)

    def key_windows(x, mode):  # [s, ...] -> [num_spans, back + span, ...]: the keys that each span may see
        first = s - t - back
        x = pad(x[max(first, 0) :], max(-first, 0), num_spans * span - t, mode)
        if num_spans == 1:
            return x[None]
        before = x[: num_spans * span].reshape(num_spans, span, *x.shape[1:])[:, :back]
        return jnp.concatenate([before, x[back:].reshape(num_spans, span, *x.shape[1:])], axis=1)

    def query_spans(x):  # [t, ...] -> [num_spans, chunks in a span, chunk, ...]
        return pad(x, 0, num_spans * span - t, "edge").reshape(num_spans, span // chunk, chunk, *x.shape[1:])

    runs = None if segment_ids is None else segments.runs(segment_ids)
    queries = (query_spans(q.reshape(t, kv, h // kv, d)), None if runs is None else query_spans(runs[s - t :]))
    keys = (key_windows(k, "zero"), key_windows(v, "zero"), None if runs is None else key_windows(runs, "edge"))

    # [chunk, width]; columns count from the chunk's first position
    row, column = jnp.arange(chunk)[:, None], jnp.arange(width)[None, :] - back
    in_window = (column <= row) & (column > row - window)

    def one_chunk(first, queries, keys):  # first: the position of the chunk's first query
        q, query_runs = queries
        k, v, key_runs = keys
        q = q.astype(dtype) * scale
        mask = in_window & (first + column >= 0)
        if runs is not None:
            mask = mask & (query_runs[:, None] == key_runs[None, :])
        blocks = (
            jnp.moveaxis(mask.reshape(chunk, num_blocks, -1), 1, 0),
            *(x.reshape(num_blocks, -1, *x.shape[1:]) for x in (k, v)),
        )

        def weights_of(maximum, mask, k, v):
            logits = jnp.einsum("ckgd,bkd->kcgb", q, k.astype(dtype))  # a group's heads are rows of one product
            logits = jnp.where(mask[:, None, :], logits, -jnp.inf)
            # The result does not depend on the subtracted maximum, so no derivative passes through it.
            new_max = jax.lax.stop_gradient(jnp.maximum(maximum, logits.max(axis=-1)))
            weights = jnp.exp(logits - new_max[..., None])
            return new_max, weights.sum(axis=-1), jnp.einsum("kcgb,bkv->kcgv", weights, v.astype(dtype))

        if num_blocks > 1:
            weights_of = jax.checkpoint(weights_of)

        def one_block(carry, block):
            maximum, total, out = carry
            new_max, added_total, added_out = weights_of(maximum, *block)
            correction = jnp.exp(maximum - new_max)
            return (new_max, total * correction + added_total, out * correction[..., None] + added_out), None

        rows = (kv, chunk, h // kv)
        if sink_logits is None:
            highest, total = jnp.full(rows, jnp.finfo(dtype).min / 2, dtype), jnp.zeros(rows, dtype)
        else:
            sinks = sink_logits.astype(dtype).reshape(kv, 1, h // kv)
            lowest = jnp.finfo(dtype).min / 2  # -inf is no sink
            highest, total = jnp.broadcast_to(jnp.maximum(sinks, lowest), rows), jnp.ones(rows, dtype)
        empty = (highest, total, jnp.zeros((*rows, dv), dtype))
        (_, total, out), _ = jax.lax.scan(one_block, empty, blocks)
        return jnp.moveaxis(out / total[..., None], 0, 1)  # [chunk, kv, h // kv, dv]

    def one_span(span_index, queries, keys):
        def at(chunk_index, queries):
            start = chunk_index * chunk
            seen = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, start, width), keys)
            return one_chunk(s - t + span_index * span + start, queries, seen)

        return jax.lax.map(lambda x: jax.checkpoint(at)(*x), (jnp.arange(span // chunk), queries))

    spans = (jnp.arange(num_spans), queries, keys)
    if num_spans <= block_sizes.group:
        out = jax.vmap(one_span)(*spans)
    else:
        out = jax.lax.map(lambda x: one_span(*x), spans, batch_size=block_sizes.group)
    return out.reshape(num_spans * span, h, dv)[:t]


def _rla(
    q: Float[Array, "t h d"],
    k: Float[Array, "s kv d"],
    v: Float[Array, "s kv dv"],
    *,
    window: int,
    feature_map: FeatureMap,
    initial_state: Float[Array, "kv f dv"] | None,
    segment_state: Float[Array, "kv f dv"] | None,
    segment_ids: Int[Array, "s"] | None,
    block_sizes: BlockSizes,
    o_swa: Float[Array, "t h dv"] | None = None,
    finish: Callable | None = None,
) -> tuple[Float[Array, "t h dv"], Float[Array, "kv f dv"]]:
    """Keys are cut into chunks that begin `window` positions before the chunks of queries.

    A chunk of queries reads everything older through the state before its key chunk, and that key chunk (the block on
    the window's edge) through a product whose mask is the lower triangle. Only the residual set takes part: the newest
    `window` keys are cut off before phi. `finish(o_rla, o_swa)`, if there is one, ends each chunk: what it computes is
    never kept for the whole sequence.
    """
    dtype = accumulation_dtype(q, k, v)
    (t, h, d), (s, kv, dv) = q.shape, v.shape
    phi_q, phi_k = as_pair(feature_map)
    chunk = min(block_sizes.chunk, t)

    # Aligned position a holds key a - before. Padding repeats a key, so that phi meets only what the user gave it, and
    # its v is 0, which removes it (there is no denominator).
    first = s - t - window  # the newest key that the first query's residual set holds
    num_older = -(-max(first, 0) // chunk)  # chunks of keys before any query's edge block
    num_chunks = -(-t // chunk)
    length = (num_older + num_chunks) * chunk
    num_residual = max(s - window, 0)
    before = min(num_older * chunk - first, length - num_residual)
    after = length - num_residual - before

    def key_chunks(x, mode):
        x = pad(x[: max(num_residual, 1)] if mode == "edge" else x[:num_residual], before, after, mode)
        return x[:length].reshape(-1, chunk, *x.shape[1:])

    def query_chunks(x):
        return pad(x, 0, num_chunks * chunk - t, "edge").reshape(num_chunks, chunk, *x.shape[1:])

    q, k, v = query_chunks(q.reshape(t, kv, h // kv, d)), key_chunks(k, "edge"), key_chunks(v, "zero")
    state = jnp.zeros((kv, num_features(feature_map, d, dtype), dv), dtype)
    fresh = state if segment_state is None else segment_state.astype(dtype)
    state = state if initial_state is None else initial_state.astype(dtype)
    runs = query_runs = key_runs = last_run = None
    if segment_ids is not None:
        runs = segments.runs(segment_ids)
        query_runs, key_runs = query_chunks(runs[s - t :]), key_chunks(runs, "edge")
        # The state after a chunk belongs to the run of its last key, the one before the first chunk to run 0.
        last_run = jnp.concatenate([jnp.zeros((1,), runs.dtype), key_runs[:, -1]])

    def added(k, v, key_runs, run_after):
        v = v.astype(dtype)
        if key_runs is not None:
            v = jnp.where((key_runs == run_after)[:, None, None], v, 0)
        return jnp.einsum("bkf,bkv->kfv", phi_k(k.astype(dtype)).astype(dtype), v)

    def advance(state, chunk):
        sums, run_before, run_after = chunk
        start = state if run_before is None else jnp.where(run_before == run_after, state, fresh)
        return start + sums, state

    run_before, run_after = (None, None) if last_run is None else (last_run[:-1], last_run[1:])
    sums = map_chunks(lambda x: added(*x), (k, v, key_runs, run_after), block_sizes.group)
    state, states = jax.lax.scan(advance, state, (sums, run_before, run_after))
    if runs is not None and last_run is not None:
        state = jnp.where(runs[-1] == last_run[-1], state, fresh)

    edge = jnp.tril(jnp.ones((chunk, chunk), bool))

    def one_chunk(q, query_runs, k, v, key_runs, state, run_before):
        phi_of_q, phi_of_k = phi_q(q.astype(dtype)).astype(dtype), phi_k(k.astype(dtype)).astype(dtype)
        mask = edge if key_runs is None else edge & (query_runs[:, None] == key_runs[None, :])
        scores = jnp.where(mask[:, None, :], jnp.einsum("ckgf,bkf->kcgb", phi_of_q, phi_of_k), 0)
        out = jnp.einsum("kcgb,bkv->ckgv", scores, v.astype(dtype))
        if query_runs is None:
            return out + jnp.einsum("ckgf,kfv->ckgv", phi_of_q, state)
        older = (query_runs == run_before)[:, None, None, None]
        out = out + jnp.einsum("ckgf,kfv->ckgv", jnp.where(older, phi_of_q, 0), state)
        if segment_state is None:
            return out
        return out + jnp.einsum("ckgf,kfv->ckgv", jnp.where(older, 0, phi_of_q), fresh)

    edges = jax.tree.map(lambda x: x[num_older:], (k, v, key_runs, states, run_before))

    def whole_chunk(chunk_of):
        inputs, window_out = chunk_of
        o_rla = one_chunk(*inputs).reshape(chunk, h, dv)
        return o_rla if finish is None else finish(o_rla, window_out)

    windows = None if o_swa is None else query_chunks(o_swa)
    out = map_chunks(whole_chunk, ((q, query_runs, *edges), windows), block_sizes.group)
    return out.reshape(num_chunks * chunk, h, dv)[:t], state


def residual_linear_attention(
    q, k, v, *, return_final_state: bool = True, **options
) -> tuple[Float[Array, "t h dv"], Float[Array, "kv f dv"] | None]:
    """The residual branch alone, and the state that the last query read."""
    out, state = _rla(q, k, v, **options)
    return out, state if return_final_state else None


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
    block_sizes: BlockSizes,
    sink_logits: Float[Array, "h"] | None = None,
    return_final_state: bool = True,
    **of_rla,
) -> tuple[Float[Array, "t h dv"], Float[Array, "kv f dv"] | None]:
    """The window first; then the residual branch, whose chunks norm and add both."""
    shared: dict[str, Any] = dict(window=window, segment_ids=segment_ids, block_sizes=block_sizes)
    o_swa = sliding_window_attention(q, k, v, scale=scale, sink_logits=sink_logits, **shared)

    def finish(o_rla, o_swa):
        dtype = accumulation_dtype(o_swa, o_rla)
        return normed_sum(o_swa.astype(dtype), o_rla.astype(dtype), swa_gain, rla_gain, eps)

    out, state = _rla(q_rla, k_rla, v, **shared, **of_rla, o_swa=o_swa, finish=finish)
    return out, state if return_final_state else None


def sliding_window_attention_step(
    q: Float[Array, "h d"],
    k: Float[Array, "kv d"],
    v: Float[Array, "kv dv"],
    cache: StepCache,
    *,
    scale: float,
    sink_logits: Float[Array, "h"] | None = None,
) -> tuple[Float[Array, "h dv"], StepCache]:
    """The slots in the order in which they stand: a softmax does not mind."""
    cache, *_ = turned(cache, k, None, v)
    return _read_ring(q, cache, scale, sink_logits, accumulation_dtype(q, k, v)), cache


def rattention_step(
    q: Float[Array, "h d"],
    k: Float[Array, "kv d"],
    v: Float[Array, "kv dv"],
    cache: StepCache,
    *,
    q_rla: Float[Array, "h d"],
    k_rla: Float[Array, "kv d"],
    swa_gain: Float[Array, "h dv"] | None,
    rla_gain: Float[Array, "h dv"],
    eps: float,
    scale: float,
    feature_map: FeatureMap,
    sink_logits: Float[Array, "h"] | None = None,
) -> tuple[Float[Array, "h dv"], StepCache]:
    """The key that leaves the ring enters the state; then both branches read."""
    dtype, (kv, _) = accumulation_dtype(q, k, v), k.shape
    phi_q, phi_k = as_pair(feature_map)
    cache, key, value, leaves = turned(cache, k, k_rla, v)
    o_swa = _read_ring(q, cache, scale, sink_logits, dtype)
    added = jnp.einsum("kf,kv->kfv", phi_k(key.astype(dtype)).astype(dtype), value.astype(dtype))
    state = cache.residual_state.astype(dtype) + jnp.where(leaves, added, 0)
    features = phi_q(q_rla.astype(dtype).reshape(kv, -1, q.shape[1])).astype(dtype)
    o_rla = jnp.einsum("kgf,kfv->kgv", features, state).reshape(o_swa.shape)
    out = normed_sum(o_swa[None], o_rla[None], swa_gain, rla_gain, eps)[0]
    return out, dataclasses.replace(cache, state=state)


def _read_ring(
    q: Float[Array, "h d"], cache: StepCache, scale: float, sink_logits: Float[Array, "h"] | None, dtype
) -> Float[Array, "h dv"]:
    """Softmax attention of one query to every token that the ring holds."""
    _, kv, dv = cache.values.shape
    if cache.window == 0:
        return jnp.zeros((q.shape[0], dv), dtype)
    held = cache.holds
    logits = jnp.einsum("kgd,skd->kgs", q.astype(dtype).reshape(kv, -1, q.shape[1]), cache.keys.astype(dtype))
    logits = jnp.where(held, scale * logits, -jnp.inf)
    if sink_logits is not None:
        logits = jnp.concatenate([logits, sink_logits.astype(dtype).reshape(kv, -1, 1)], axis=-1)
    weights = jax.nn.softmax(logits, axis=-1)[..., : cache.window]
    values = jnp.where(held[:, None, None], cache.values, 0).astype(dtype)  # what no document holds may be NaN
    return jnp.einsum("kgs,skv->kgv", weights, values).reshape(q.shape[0], dv)
