"""The ops on a Hopper GPU: from a call's arrays to padded ones and a plan. gradients.py runs the kernels.

Everything here takes one sequence; `jax.vmap` batches.
"""

import dataclasses
import functools
import os
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas.batching import batched
from pallas.block_sizes import CARD, BlockSizes, gpu_blocks, round_up
from pallas.feature_map import FeatureMap, KernelMap, as_pair, in_kernels
from pallas.final_state import final_state
from pallas.hopper import gradients
from pallas.hopper.arrays import Inputs, Segments
from pallas.hopper.plan import Plan, cdiv
from pallas.hopper.step import Memory, StepInputs, StepPlan, step
from pallas.hopper.warpgroup import ROWS
from pallas.segments import starts
from pallas.step_cache import StepCache

WIDEST = 2048  # windows up to here are faster in our kernels; full attention is cuDNN's: LOG.md, 2026-11-25


def interpreted() -> bool:
    """Run kernels in the interpreter, unless there is a GPU or the program is being compiled for one.

    The interpreter holds a thread of XLA's pool for each warpgroup and one for the program around them: it would hang
    for want of them on a machine of few cores, whose pool the environment variable PJRT_NPROC (or NPROC) widens.
    """
    target = jax.sharding.get_abstract_mesh().abstract_device
    if jax.default_backend() == "gpu" or (target is not None and target.platform == "gpu"):
        return False
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    threads = int(os.environ.get("PJRT_NPROC") or os.environ.get("NPROC") or cores or 1)
    if threads < 4:
        raise RuntimeError(
            f"implementation='gpu' is interpreted on a CPU by 4 threads of XLA's pool, which has {threads}: "
            "set the environment variable PJRT_NPROC=8 before JAX makes its first array"
        )
    return True


def sliding_window_attention(q, k, v, *, window, scale, sink_logits, segment_ids, block_sizes):
    """o_swa [t, h, dv]: by cuDNN where it is the faster and knows the problem, else by our kernels."""
    if window == 0:
        return jnp.zeros((*q.shape[:2], v.shape[2]), v.dtype)
    (t, _, d), (s, _, dv) = q.shape, v.shape
    plain = segment_ids is None and sink_logits is None and t == s and d == dv
    cudnn_knows = jax.default_backend() == "gpu" and plain and d % 8 == 0
    if cudnn_knows and window > WIDEST:
        reach = None if window >= t else (window - 1, 0)
        attend = functools.partial(jax.nn.dot_product_attention, is_causal=True, implementation="cudnn")
        return attend(q, k, v, scale=scale, local_window_size=reach)
    inputs = Inputs(q=q, k=k, sink_logits=sink_logits, v=v)
    return _attend(inputs, window=window, scale=scale, segment_ids=segment_ids, block_sizes=block_sizes)


def residual_linear_attention(
    q, k, v, *, window, feature_map, initial_state, segment_state, segment_ids, block_sizes, return_final_state
):
    """o_rla [t, h, dv] and, if asked for, the state that the last query read."""
    states = {"initial_state": initial_state, "segment_state": segment_state}
    shared = dict(window=window, feature_map=feature_map, segment_ids=segment_ids, **states)
    out = _attend(Inputs(q_rla=q, k_rla=k, v=v), **shared, block_sizes=block_sizes)
    return out, final_state(k, v, **shared) if return_final_state else None


def rattention(
    q,
    k,
    v,
    *,
    q_rla,
    k_rla,
    swa_gain,
    rla_gain,
    eps,
    window,
    scale,
    sink_logits,
    feature_map,
    initial_state,
    segment_state,
    segment_ids,
    block_sizes,
    return_final_state,
):
    """Both branches, normed and added, and the final state if asked for."""
    states = {"initial_state": initial_state, "segment_state": segment_state}
    shared = dict(window=window, feature_map=feature_map, segment_ids=segment_ids, **states)
    inputs = Inputs(v=v)
    if window > 0:
        inputs = dataclasses.replace(inputs, q=q, k=k, sink_logits=sink_logits, swa_gain=swa_gain)
    if window < k.shape[0] or initial_state is not None or (segment_ids is not None and segment_state is not None):
        inputs = dataclasses.replace(inputs, q_rla=q_rla, k_rla=k_rla, rla_gain=rla_gain)
    out = _attend(inputs, **shared, scale=scale, eps=eps, block_sizes=block_sizes)
    return out, final_state(k_rla, v, **shared) if return_final_state else None


def sliding_window_attention_step(q, k, v, cache, *, scale, sink_logits):
    """Softmax attention to the ring."""
    return _step(StepInputs(k=k, q=q, sink_logits=sink_logits, v=v), cache, scale=scale)


def rattention_step(q, k, v, cache, *, q_rla, k_rla, swa_gain, rla_gain, eps, scale, sink_logits, feature_map):
    """Both branches, normed and added, and the memory of the next token."""
    d, dv, window = q.shape[1], v.shape[1], cache.window
    row = in_kernels(feature_map, d) if d == _head_size(d, dv) else None
    features_q = features_k = None
    if row is None:
        phi_q, phi_k = as_pair(feature_map)
        leaving = cache.ring_rla[cache.length % window] if window else k_rla
        features_q, features_k = (
            phi(x.astype(jnp.float32)).astype(jnp.float32) for phi, x in ((phi_q, q_rla), (phi_k, leaving))
        )
        if window:  # a slot that holds no token may be NaN
            features_k = jnp.where(cache.length >= window, features_k, 0.0)
    own_key = cache.keys_rla is not None or window == 0
    inputs = StepInputs(
        features_k=features_k,
        features_q=features_q,
        k=k if window else None,
        k_rla=k_rla if own_key and (window or row is not None) else None,
        q=q if window else None,
        q_rla=q_rla if row is not None else None,
        rla_gain=rla_gain.astype(jnp.float32),
        sink_logits=sink_logits if window else None,
        swa_gain=None if swa_gain is None or window == 0 else swa_gain.astype(jnp.float32),
        v=v,
    )
    return _step(inputs, cache, row, scale=scale, eps=eps)


def _step(inputs: StepInputs, cache: StepCache, row: KernelMap | None = None, *, scale: float, eps: float = 0.0):
    """(output, memory of the next token); the inputs are not padded yet.

    Sizes that are no multiple of the kernel's are padded, which copies what the cache holds.
    """
    (kv, dv), window = inputs.v.shape, cache.window
    queries = next(x for x in (inputs.q, inputs.q_rla, inputs.features_q) if x is not None)
    h, size = queries.shape[0], _head_size(cache.keys.shape[2], dv)
    f = 0 if cache.state is None else round_up(cache.state.shape[1], ROWS)
    sizes = {name: (h, size) for name in ("q", "q_rla", "rla_gain", "swa_gain")}
    sizes |= {name: (kv, size) for name in ("k", "k_rla", "v")} | dict(features_k=(kv, f), features_q=(h, f))
    padded = {name: _widened(getattr(inputs, name), *shape) for name, shape in sizes.items()}
    sinks = inputs.sink_logits
    if sinks is not None:
        sinks = _widened(sinks.astype(jnp.float32).reshape(kv, h // kv), kv, round_up(h // kv, 8))
    inputs = StepInputs(**padded, sink_logits=sinks)
    slots = max(round_up(window, 8), ROWS)
    memory = {name: _widened(getattr(cache, name), slots, kv, size) for name in ("keys", "keys_rla", "values")}
    state = None if cache.state is None else _widened(cache.state.astype(jnp.float32), kv, f, size)
    plan = StepPlan(
        window=window,
        num_heads=h,
        num_kv_heads=kv,
        head_size=size,
        value_size=dv,
        num_features=f,
        map_name=None if row is None else row.name,
        scale=float(scale),
        eps=float(eps),
        interpret=interpreted(),
    )
    of_layer = lambda path: str(path[-1]).endswith(("_gain", "sink_logits"))
    memory = Memory(**memory if window else {}, length=cache.length.astype(jnp.int32), state=state)
    out, memory = batched(functools.partial(step, plan), inputs, memory, one_of=of_layer)
    after = {name: _narrowed(getattr(memory, name), getattr(cache, name)) for name in vars(memory)}
    after["length"] = after["length"].astype(cache.length.dtype)
    return out[:, :dv], StepCache(**after)


def _widened(x, *sizes: int) -> Any:
    """With zeros at the ends of axes; None stays."""
    if x is None or x.shape == sizes:
        return x
    return jnp.pad(x, [(0, new - old) for old, new in zip(x.shape, sizes, strict=True)])


def _narrowed(x, like) -> Any:
    """What `_widened` made of an array like this one, cut to its size; `like` itself for None."""
    return like if x is None else x[tuple(map(slice, like.shape))]


def _attend(
    inputs: Inputs,
    *,
    window: int,
    block_sizes: BlockSizes,
    segment_ids: Int[Array, "s"] | None,
    scale: float = 1.0,
    eps: float = 0.0,
    feature_map: FeatureMap | None = None,
    initial_state: Float[Array, "kv f dv"] | None = None,
    segment_state: Float[Array, "kv f dv"] | None = None,
) -> Float[Array, "t h dv"]:
    """Pad, plan and call. Of the inputs (not padded yet) those of a branch are None if it adds nothing, gains if there
    is no norm."""
    (t, _, d), dv = (inputs.q_rla if inputs.q is None else inputs.q).shape, inputs.v.shape[2]
    row = None
    if feature_map is not None and inputs.q_rla is not None:
        row = in_kernels(feature_map, d) if d == _head_size(d, dv) else None
        if row is None:
            phi_q, phi_k = as_pair(feature_map)
            features_q = phi_q(inputs.q_rla.astype(jnp.float32)).astype(jnp.float32)
            features_k = phi_k(inputs.k_rla.astype(jnp.float32)).astype(jnp.float32)
            inputs = dataclasses.replace(inputs, q_rla=None, k_rla=None, features_q=features_q, features_k=features_k)
    if segment_ids is None:
        segment_state = None
    states = [initial_state, segment_state]
    num_starts = 0 if all(x is None for x in states) else 1 if segment_ids is None else 2
    segmented = segment_ids is not None
    settings = {"window": window, "scale": float(scale), "eps": float(eps), "segmented": segmented}
    plan = _plan(inputs, row, block_sizes, num_starts=num_starts, head_size=_head_size(d, dv), **settings)
    segments = Segments() if segment_ids is None else _segments(segment_ids, plan)
    out: Any = gradients.output(plan, _padded(inputs, states[: plan.num_start_states], plan), segments)
    return out[:t, :, :dv]


def _head_size(*sizes: int) -> int:
    return 64 if max(sizes) <= 64 else 128


def _plan(
    inputs: Inputs,
    row: KernelMap | None,
    block_sizes: BlockSizes,
    *,
    window: int,
    scale: float,
    eps: float,
    segmented: bool,
    num_starts: int,
    head_size: int,
) -> Plan:
    """row: of the feature map, if the kernels compute it."""
    queries = next(x for x in (inputs.q, inputs.q_rla, inputs.features_q) if x is not None)
    (t, h), (s, kv, dv) = queries.shape[:2], inputs.v.shape
    window = min(window, s)
    slices, feature_size = 0, 0
    if row is not None:
        slices, feature_size = row.slices, row.slices * head_size
    elif inputs.features_q is not None:
        feature_size = inputs.features_q.shape[-1]
        slices = cdiv(feature_size, head_size)
        slices = slices if slices == 1 else round_up(slices, 2)
    rla = slices > 0
    span = ROWS if (h // kv) % 2 == 0 else 2 * ROWS
    num_queries = round_up(t, span)
    measured_chunk, measured_spacing = gpu_blocks(_device_kind(), head_size, str(inputs.v.dtype), window)
    chunk = max(block_sizes.kernel_chunk or measured_chunk, head_size)  # a slot of the ring must hold a state's slice
    return Plan(
        window=window,
        scale=scale,
        eps=eps,
        first=s - t,
        num_queries=num_queries,
        num_keys=round_up(max(s, s - t + num_queries), 2 * ROWS),
        num_heads=h,
        num_kv_heads=kv,
        head_size=head_size,
        value_size=dv,
        slices=slices,
        feature_size=feature_size,
        map_name=None if row is None else row.name,
        segmented=segmented,
        num_start_states=num_starts if rla else 0,
        swa=inputs.q is not None,
        rla=rla,
        swa_normed=inputs.swa_gain is not None,
        rla_normed=inputs.rla_gain is not None,
        chunk=chunk,
        spacing=max(chunk * (block_sizes.chunks_per_state or measured_spacing), span),
        stages=8 if chunk * head_size <= 64 * 128 else 4,
        interpret=interpreted(),
    )


def _padded(inputs: Inputs, states: list, plan: Plan) -> Inputs:
    """The inputs as long and as wide as the plan says, and the start states that it reads."""
    t, s, d, f = plan.num_queries, plan.num_keys, plan.head_size, plan.num_features
    h, kv = plan.num_heads, plan.num_kv_heads

    def pad(x, *sizes: int) -> Any:
        return None if x is None else jnp.pad(x, [(0, size - old) for old, size in zip(x.shape, sizes, strict=True)])

    def pad_wide(x, *sizes: int) -> Any:
        return None if x is None else pad(x.astype(jnp.float32), *sizes)

    empty = jnp.zeros((kv, f, d), jnp.float32)
    padded = [empty if x is None else pad_wide(x, kv, f, d) for x in states]
    return Inputs(
        features_k=pad(inputs.features_k, s, kv, f),
        features_q=pad(inputs.features_q, t, h, f),
        k=pad(inputs.k, s, kv, d),
        k_rla=pad(inputs.k_rla, s, kv, d),
        q=pad(inputs.q, t, h, d),
        q_rla=pad(inputs.q_rla, t, h, d),
        rla_gain=pad_wide(inputs.rla_gain, h, d),
        sink_logits=None if inputs.sink_logits is None else inputs.sink_logits.astype(jnp.float32),
        start_states=jnp.stack(padded).swapaxes(-1, -2) if padded else None,
        swa_gain=pad_wide(inputs.swa_gain, h, d),
        v=pad(inputs.v, s, kv, d),
    )


def _device_kind() -> str:
    """Of this machine's GPU, or of the one that the program is being compiled or interpreted for."""
    target = jax.sharding.get_abstract_mesh().abstract_device
    if target is not None and target.platform == "gpu":
        return target.device_kind
    return jax.devices()[0].device_kind if jax.default_backend() == "gpu" else CARD


def _segments(segment_ids: Int[Array, "s"], plan: Plan) -> Segments:
    """Where each query's segment starts, and what the sweeps must forget where one ends."""
    s = segment_ids.shape[0]
    start = jnp.pad(starts(segment_ids), (0, plan.num_keys - s), mode="edge")
    at_query = start[plan.first : plan.first + plan.num_queries]
    if not plan.reaches_back:
        return Segments(start=at_query)
    intervals = cdiv(plan.num_keys, plan.spacing)
    boundary = jnp.arange(intervals, dtype=jnp.int32) * plan.spacing
    start_of_last = start[jnp.minimum(boundary + plan.spacing, plan.num_keys) - 1]
    key = jnp.arange(plan.num_keys, dtype=jnp.int32)
    lowest = plan.first + jnp.arange(plan.num_queries, dtype=jnp.int32) // plan.span * plan.span
    read = jnp.maximum(lowest - plan.window + 1, 0) // plan.spacing * plan.spacing
    return Segments(
        start=at_query,
        key_keep=(key >= start_of_last[key // plan.spacing]).astype(jnp.float32),
        query_keep=(at_query < read).astype(jnp.float32),
        carry_keep=(start_of_last < boundary).astype(jnp.float32),
    )
