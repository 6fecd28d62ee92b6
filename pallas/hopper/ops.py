"""The three ops on a Hopper GPU: padding, batching and differentiation around the kernels.

forward.py and state_sweep.py compute; window_backward.py and residual_*_backward.py differentiate. Everything
here takes one sequence; `jax.vmap` of it becomes one launch for the whole batch.
"""

import functools
import os
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas.batching import batched
from pallas.block_sizes import CARD, BlockSizes, gpu_blocks
from pallas.feature_map import FeatureMap, as_pair, in_kernels
from pallas.final_state import final_state
from pallas.hopper import forward, residual_key_backward, residual_query_backward, state_sweep, window_backward
from pallas.hopper.plan import Plan, cdiv, round_up
from pallas.hopper.warpgroup import ROWS
from pallas.segments import starts

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


def sliding_window_attention(q, k, v, *, window, scale, segment_ids, block_sizes):
    """o_swa [t, h, dv]: by cuDNN where it is the faster and knows the problem, else by our kernels."""
    if window == 0:
        return jnp.zeros((*q.shape[:2], v.shape[2]), v.dtype)
    (t, _, d), (s, _, dv) = q.shape, v.shape
    cudnn_knows = jax.default_backend() == "gpu" and segment_ids is None and t == s and d == dv and d % 8 == 0
    if cudnn_knows and window > WIDEST:
        local = None if window >= t else (window - 1, 0)
        attend = functools.partial(jax.nn.dot_product_attention, is_causal=True, implementation="cudnn")
        return attend(q, k, v, scale=scale, local_window_size=local)
    arrays = {"q": q, "k": k, "v": v}
    return _attend(arrays, window=window, scale=scale, segment_ids=segment_ids, block_sizes=block_sizes)


def residual_linear_attention(
    q, k, v, *, window, feature_map, initial_state, segment_state, segment_ids, block_sizes, return_final_state
):
    """o_rla [t, h, dv] and, if asked for, the state that the last query read."""
    states = {"initial_state": initial_state, "segment_state": segment_state}
    shared = dict(window=window, feature_map=feature_map, segment_ids=segment_ids, **states)
    out = _attend({"q_rla": q, "k_rla": k, "v": v}, **shared, block_sizes=block_sizes)
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
    arrays = {"v": v}
    if window > 0:
        arrays |= {"q": q, "k": k, "swa_gain": swa_gain}
    if window < k.shape[0] or initial_state is not None or (segment_ids is not None and segment_state is not None):
        arrays |= {"q_rla": q_rla, "k_rla": k_rla, "rla_gain": rla_gain}
    out = _attend(arrays, **shared, scale=scale, eps=eps, block_sizes=block_sizes)
    return out, final_state(k_rla, v, **shared) if return_final_state else None


def _attend(
    arrays: dict,
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
    """Pad, plan and call. `arrays` holds q and k, or q_rla and k_rla, or both; gains only for the fused op."""
    local, residual, normed = "q" in arrays, "q_rla" in arrays, {"swa_gain", "rla_gain"} & arrays.keys() != set()
    v = arrays["v"]
    (t, h, d), (s, kv, dv) = (arrays["q"] if local else arrays["q_rla"]).shape, v.shape
    head_size = 64 if max(d, dv) <= 64 else 128
    window = min(window, s)
    map_name, slices, feature_size = None, 0, 0
    if residual:
        assert feature_map is not None
        row = in_kernels(feature_map, d) if d == head_size else None
        if row is not None:
            map_name, slices = row.name, row.slices
            feature_size = slices * head_size
        else:
            phi_q, phi_k = as_pair(feature_map)
            arrays["features_q"] = phi_q(arrays.pop("q_rla").astype(jnp.float32)).astype(jnp.float32)
            arrays["features_k"] = phi_k(arrays.pop("k_rla").astype(jnp.float32)).astype(jnp.float32)
            feature_size = arrays["features_q"].shape[-1]
            slices = cdiv(feature_size, head_size)
            slices = slices if slices == 1 else round_up(slices, 2)
    pair = (h // kv) % 2 == 0
    span = ROWS if pair else 2 * ROWS
    num_queries = round_up(t, span)
    measured_chunk, measured_spacing = gpu_blocks(_device_kind(), head_size, str(v.dtype), window)
    chunk = max(block_sizes.kernel_chunk or measured_chunk, head_size)  # a state's tile fits where keys do
    if segment_ids is None:
        segment_state = None
    starts = [initial_state, segment_state]
    num_starts = 0 if all(x is None for x in starts) else 1 if segment_ids is None else 2
    plan = Plan(
        window=window,
        scale=float(scale),
        eps=float(eps),
        first=s - t,
        num_queries=num_queries,
        num_keys=round_up(max(s, s - t + num_queries), 2 * ROWS),
        num_heads=h,
        num_kv_heads=kv,
        head_size=head_size,
        value_size=dv,
        slices=slices,
        feature_size=feature_size,
        map_name=map_name,
        segmented=segment_ids is not None,
        num_start_states=num_starts if residual else 0,
        local=local,
        residual=residual,
        normed=normed,
        chunk=chunk,
        spacing=max(chunk * (block_sizes.chunks_per_state or measured_spacing), span),
        stages=8 if chunk * head_size <= 64 * 128 else 4,
        interpret=interpreted(),
    )

    def pad(x, *sizes):
        return jnp.pad(x, [(0, size - old) for old, size in zip(x.shape, sizes, strict=True)])

    lengths = {"q": num_queries, "q_rla": num_queries, "features_q": num_queries}
    padded = {}
    for name, x in arrays.items():
        if name.endswith("gain"):
            padded[name] = pad(x.astype(jnp.float32), h, head_size)
        else:
            width = plan.num_features if name.startswith("features") else head_size
            padded[name] = pad(x, lengths.get(name, plan.num_keys), x.shape[1], width)
    if plan.num_start_states:
        f = plan.num_features
        empty = jnp.zeros((kv, f, head_size), jnp.float32)
        wide = [empty if x is None else pad(x.astype(jnp.float32), kv, f, head_size) for x in starts]
        padded["start_states"] = jnp.stack(wide[: plan.num_start_states]).swapaxes(-1, -2)  # [n, kv, dv, f]
    segments = {} if segment_ids is None else _segments(segment_ids, plan)
    out: Any = _differentiable(plan, padded, segments)
    return out[:t, :, :dv]


def _device_kind() -> str:
    """Of this machine's GPU, or of the one that the program is being compiled or interpreted for."""
    target = jax.sharding.get_abstract_mesh().abstract_device
    if target is not None and target.platform == "gpu":
        return target.device_kind
    return jax.devices()[0].device_kind if jax.default_backend() == "gpu" else CARD


def _segments(segment_ids: Int[Array, "s"], plan: Plan) -> dict:
    """Where each query's and key's segment starts, and what the sweeps must forget where one ends."""
    s = segment_ids.shape[0]
    start = jnp.pad(starts(segment_ids), (0, plan.num_keys - s), mode="edge")
    at_query = start[plan.first : plan.first + plan.num_queries]
    arrays = {"segment_start": at_query}
    if not plan.reaches_back:
        return arrays
    intervals = cdiv(plan.num_keys, plan.spacing)
    boundary = jnp.arange(intervals, dtype=jnp.int32) * plan.spacing
    start_of_last = start[jnp.minimum(boundary + plan.spacing, plan.num_keys) - 1]
    arrays["carry_keep"] = (start_of_last < boundary).astype(jnp.float32)
    key = jnp.arange(plan.num_keys, dtype=jnp.int32)
    arrays["key_keep"] = (key >= start_of_last[key // plan.spacing]).astype(jnp.float32)
    lowest = plan.first + jnp.arange(plan.num_queries, dtype=jnp.int32) // plan.span * plan.span
    read = jnp.maximum(lowest - plan.window + 1, 0) // plan.spacing * plan.spacing
    arrays["query_keep"] = (at_query < read).astype(jnp.float32)
    return arrays


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _differentiable(plan: Plan, arrays: dict, segments: dict):
    return batched(functools.partial(_forward, plan, save=False), arrays, segments)["out"]


def _save(plan: Plan, arrays: dict, segments: dict):
    results = batched(functools.partial(_forward, plan, save=True), arrays, segments)
    out = results["out"] if plan.local and not plan.normed else results.pop("out")  # the backward pass reads it
    return out, (arrays, segments, results)


def _pull_back(plan: Plan, residuals, cotangent):
    arrays, segments, saved = residuals
    gradients = batched(functools.partial(_backward, plan), arrays, segments, saved, cotangent)
    return {name: gradients[name].astype(arrays[name].dtype) for name in arrays}, dict.fromkeys(segments)


_differentiable.defvjp(_save, _pull_back)


def _parts(x):
    """float32 as the sum of two bfloat16 arrays. A round trip through bfloat16 is no change at all to XLA on a GPU."""
    first = jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)
    return first.astype(jnp.bfloat16), (x - first).astype(jnp.bfloat16)


def _as_kernels_read(plan: Plan, arrays: dict) -> dict:
    """Features rounded; start states centred over each slice of f and rounded, their means beside them."""
    arrays = dict(arrays)
    for name in ("features_q", "features_k"):
        if name in arrays:
            arrays[name] = arrays[name].astype(jnp.bfloat16)
    if plan.num_start_states:
        states = arrays["start_states"]  # [b, n, kv, dv, f]
        sliced = states.reshape(*states.shape[:-1], plan.slices, plan.head_size)
        counts = plan.features_of(jnp.arange(plan.slices, dtype=jnp.int32))
        means = sliced.sum(axis=-1) / jnp.expand_dims(counts, (0, 1, 2, 3))
        tiles = _parts((sliced - means[..., None]).reshape(states.shape))[: 1 + plan.precise_starts]
        arrays["start_states"], arrays["start_means"] = jnp.concatenate(tiles, axis=1), means.swapaxes(-1, -2)
    return arrays


@functools.partial(jax.jit, static_argnums=0, static_argnames="save")  # layers alike are traced and lowered once
def _forward(plan: Plan, arrays: dict, segments: dict, *, save: bool) -> dict:
    """Batched. What is saved: the kernel's outputs and, of the residual branch, states and features of the keys."""
    arrays = _as_kernels_read(plan, arrays)
    swept = {}
    if plan.reaches_back:
        given = plan.map is None
        keeps = {"row_keep": segments.get("key_keep"), "carry_keep": segments.get("carry_keep")}
        x = arrays["features_k" if given else "k_rla"]
        found = state_sweep.sweep(state_sweep.key_sweep(plan), x, arrays["v"], save_features=not given, **keeps)
        swept = {"states": found["states"], "state_means": found["means"]}
        if "state_rests" in found:
            swept["state_rests"] = found["state_rests"]
        swept["features_k"] = arrays["features_k"] if given else found["features"]
    results = forward.forward(arrays | swept | _start_of(segments), plan, save=save)
    return results | swept if save else results


def _start_of(segments: dict) -> dict:
    return {"segment_start": segments["segment_start"]} if segments else {}


@functools.partial(jax.jit, static_argnums=0)
def _backward(plan: Plan, arrays: dict, segments: dict, saved: dict, d_out) -> dict:
    """Batched. The gradient of every array, by name."""
    original, arrays = arrays, _as_kernels_read(plan, arrays) | _start_of(segments)
    arrays |= saved | {"d_out": d_out}
    gradients = {}
    if plan.residual:
        gradients |= _residual_backward(plan, original, arrays, segments)
    if plan.local:
        gradients |= _window_backward(plan, arrays, gradients.get("v"))
    return gradients


def _window_backward(plan: Plan, arrays: dict, dv) -> dict:
    gradients = {}
    of_queries = ("q", "k", "v", "lse", "segment_start")
    if plan.normed:
        of_queries += ("d_out", "y_swa", "r_swa", "swa_gain")
    else:
        d_swa, out, rest = (arrays[name].astype(jnp.float32) for name in ("d_out", "out", "rest"))
        o_swa = out + rest  # its rounding would leave the d_logits of a query with a sum other than 0
        arrays |= {"d_swa": arrays["d_out"], "delta": (d_swa * o_swa).sum(axis=-1).swapaxes(1, 2)}
        of_queries += ("d_swa", "delta")
    narrow = plan.narrow()
    found = window_backward.query_gradients(_pick(arrays, *of_queries), narrow)
    gradients["q"] = found.pop("dq")
    if plan.normed:
        gradients["swa_gain"] = found.pop("d_gain").sum(axis=1)
    of_keys = _pick(arrays | found | {"dv": dv}, "q", "k", "v", "lse", "d_swa", "delta", "segment_start", "dv")
    gradients["k"], gradients["v"] = window_backward.key_gradients(of_keys, narrow)
    if plan.window == 1:  # a softmax over one key is constant: what the kernels find is rounding
        gradients |= {name: jnp.zeros_like(gradients[name]) for name in ("q", "k")}
    return gradients


def _pick(arrays: dict, *names: str) -> dict:
    return {name: arrays.get(name) for name in names}


def _residual_backward(plan: Plan, original: dict, arrays: dict, segments: dict) -> dict:
    given = plan.map is None
    query_name, key_name = ("features_q", "features_k") if given else ("q_rla", "k_rla")
    gradients = {}
    of_queries = ("q_rla", "v", "features_k", "states", "state_rests", "state_means", "segment_start")
    of_queries += ("start_states", "start_means")
    if plan.normed:
        of_queries += ("d_out", "y_rla", "y_rla_rest", "r_rla", "rla_gain")
    else:
        arrays = arrays | {"d_rla": arrays["d_out"]}
        of_queries += ("d_rla",)
    narrow = plan.narrow()
    found = residual_query_backward.query_gradients(_pick(arrays, *of_queries), narrow)
    gradients[query_name] = found.pop("dq")
    if plan.normed:
        gradients["rla_gain"] = found.pop("d_gain").sum(axis=1)
    arrays = arrays | found
    x, d_rla = arrays[query_name], arrays["d_rla"]
    if plan.num_start_states:
        first = (segments["segment_start"] == 0).astype(jnp.float32) if plan.num_start_states == 2 else None
        keeps = (None,) if first is None else (first, 1 - first)
        factors = [(x, d_rla, arrays.get("d_rest"))]
        if plan.precise_starts:
            factors.append((_parts(original[query_name])[1], d_rla, None))
        one = lambda x, y, rest, keep: state_sweep.total(plan, x, y, y_rest=rest, row_keep=keep)
        totals = [sum(one(*factor, keep) for factor in factors) for keep in keeps]
        gradients["start_states"] = jnp.stack(totals, axis=1)
    if not plan.reaches_back:
        gradients[key_name] = jnp.zeros_like(original[key_name])
        gradients["v"] = jnp.zeros_like(original["v"])
        return gradients
    if plan.num_states > 1:
        kept: dict[str, Any] = {"row_keep": segments.get("query_keep"), "carry_keep": segments.get("carry_keep")}
        swept = state_sweep.sweep(state_sweep.query_sweep(plan), x, d_rla, y_rest=arrays.get("d_rest"), **kept)
        arrays |= {"d_states": swept["states"], "d_rests": swept.get("state_rests"), "d_means": swept["means"]}
    arrays |= {"row_keep": segments.get("key_keep")}
    of_keys = ("d_rla", "d_rest", query_name, "k_rla", "features_k", "v", "row_keep", "segment_start")
    of_keys += ("d_states", "d_rests", "d_means")
    gradients[key_name], gradients["v"] = residual_key_backward.key_gradients(_pick(arrays, *of_keys), narrow)
    return gradients
