"""The three ops on a TPU: layouts and padding for the kernels.

Everything here takes one sequence; `jax.vmap` of it becomes one launch for the whole batch. Axes are padded: heads to
lanes, tokens to blocks.

No time was ever measured on a TPU: values come from the interpreter, costs from the compiler's schedules.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas.block_sizes import BlockSizes, round_up
from pallas.feature_map import FeatureMap, as_pair, identity, in_kernels
from pallas.final_state import final_state, state_after
from pallas.segments import starts
from pallas.tpu import residual
from pallas.tpu.gradients import Call, Norms, output, sum_of_norms
from pallas.tpu.plan import LANES, Plan

LARGEST = 2**20  # bytes of queries that one step of the grid reads, at most
WIDE = ("v6", "tpu7", "v7")  # kinds of TPU whose MXU is 256 x 256, not 128 x 128


def interpreted() -> bool:
    """Run kernels in the interpreter, unless there is a TPU or the program is being compiled for one."""
    return target() is None


def target() -> str | None:
    """The kind of TPU that the program is for; None: there is none."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is not None:
        return device.device_kind if device.platform == "tpu" else None
    return jax.devices()[0].device_kind if jax.default_backend() == "tpu" else None


def sliding_window_attention(q, k, v, **options):
    """o_swa [t, h, dv]."""
    call = _swa(q, k, v, **options)
    return _by_time(None if call is None else output(call, v.dtype), q, v)


def residual_linear_attention(q, k, v, *, return_final_state, block_sizes, **options):
    """o_rla [t, h, dv] and, if asked for, the state that the last query read."""
    call = _rla(q, k, v, block_sizes=block_sizes, **options)
    state = final_state(k, v, **options) if return_final_state else None
    return _by_time(None if call is None else output(call, v.dtype), q, v), state


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
    segment_ids,
    block_sizes,
    return_final_state,
    **of_rla,
):
    """Both branches, their norms and the sum, and the final state if asked for."""
    shared: dict[str, Any] = dict(window=window, segment_ids=segment_ids)
    of_swa: dict[str, Any] = dict(scale=scale, sink_logits=sink_logits, eps=None if swa_gain is None else float(eps))
    swa = _swa(q, k, v, **shared, **of_swa, block_sizes=block_sizes)
    rla = _rla(q_rla, k_rla, v, **shared, **of_rla, eps=float(eps), block_sizes=block_sizes)
    terms = [(call, gain) for call, gain in ((rla, rla_gain), (swa, swa_gain)) if call is not None]
    out = None
    if terms:
        norms = Norms(q.shape[0], v.shape[2], float(eps), v.dtype)
        out = sum_of_norms([call for call, _ in terms], [gain for _, gain in terms], norms)
    state = final_state(k_rla, v, **shared, **of_rla) if return_final_state else None
    return _by_time(out, q, v), state


def _swa(
    q: Float[Array, "t h d"],
    k: Float[Array, "s kv d"],
    v: Float[Array, "s kv dv"],
    *,
    window: int,
    scale: float,
    sink_logits: Float[Array, "h"] | None,
    segment_ids: Int[Array, "s"] | None,
    block_sizes: BlockSizes,
    eps: float | None = None,
) -> Call | None:
    """The call that computes o_swa, or None where it is 0."""
    (t, h, d), (s, kv, dv) = q.shape, v.shape
    if window == 0:
        return None
    window = min(window, s)
    if window == 1 and sink_logits is None:  # a weight is 1 whatever the logit: q and k get a gradient of exactly 0
        out = _keys_by_head(v[s - t :], 0, t, round_up(dv, LANES))
        return Call("copy", None, {"out": jnp.broadcast_to(out[:, None], (kv, h // kv, *out.shape[1:]))}, {})
    float32 = any(x.dtype != jnp.bfloat16 for x in (q, k, v))
    bytes_of_group = h // kv * round_up(max(d, dv), LANES) * (4 if float32 else 2)
    chunk, block = window_blocks(block_sizes, t, window, bytes_of_group)
    length, back = round_up(t, block), round_up(window - 1, block)
    first_key = max(back - (s - t), 0)
    plan = Plan(
        window=window,
        scale=float(scale),
        length=length,
        head_size=d,
        value_size=dv,
        map_name="identity",
        segmented=segment_ids is not None,
        num_start_states=0,
        chunk=chunk,
        block=block,
        back=back,
        first_key=first_key,
        float32=float32,
        eps=eps,
        interpret=interpreted(),
    )
    q, k, v = (x.astype(plan.dtype) for x in (q, k, v))
    skipped = max(s - t - back, 0)  # keys that no query sees
    arrays = {
        "q": _queries_by_head(q, kv, length, plan.width),
        "k": _keys_by_head(k[skipped:], first_key, back + length, plan.width),
        "v": _keys_by_head(v[skipped:], first_key, back + length, plan.value_width),
    }
    if sink_logits is not None:
        sinks = sink_logits.astype(jnp.float32).reshape(kv, h // kv, 1, 1)
        arrays["sink"] = jnp.broadcast_to(sinks, (*sinks.shape[:-1], chunk))
    segments = {}
    if segment_ids is not None:
        start = starts(segment_ids)[s - t :] + (back - (s - t))
        segments["segment_start"] = jnp.pad(start, (0, length - t), mode="edge")[None]
    return Call("swa", plan, arrays, segments)


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
    eps: float | None = None,
) -> Call | None:
    """The call that computes o_rla, or None where it is 0."""
    (t, h, d), (s, kv, dv) = q.shape, v.shape
    if segment_ids is None:
        segment_state = None
    older = s - t - window  # keys in the residual set of every query: XLA computes their state, outside the kernels
    if older > 0:
        states = {"initial_state": initial_state, "segment_state": segment_state}
        initial_state = state_after(k, v, older, segment_ids=segment_ids, feature_map=feature_map, **states)
        k, v = k[older:], v[older:]
        segment_ids = None if segment_ids is None else segment_ids[older:]
        s -= older
    shift = min(window + t - s, t)  # where the first key stands once keys are shifted right by the window
    start_states = [initial_state, segment_state]
    num_start_states = 0 if all(x is None for x in start_states) else 1 if segment_state is None else 2
    if shift == t and not num_start_states:
        return None
    row, float32 = in_kernels(feature_map, d), any(x.dtype != jnp.bfloat16 for x in (q, k, v))
    if row is None:  # XLA computes phi. Its range is unknown, so that it is not rounded to bfloat16.
        phi_q, phi_k = as_pair(feature_map)
        q, k = phi_q(q.astype(jnp.float32)), phi_k(k.astype(jnp.float32))
        row, float32, d = identity, True, q.shape[-1]
    bytes_of_group = h // kv * round_up(max(d, dv), LANES) * (4 if float32 else 2)
    chunk, block = residual_blocks(block_sizes, t, bytes_of_group, target())
    length = round_up(t, block)
    plan = Plan(
        window=window,
        scale=1.0,
        length=length,
        head_size=d,
        value_size=dv,
        map_name=row.name,
        segmented=segment_ids is not None,
        num_start_states=num_start_states,
        chunk=chunk,
        block=block,
        back=0,
        first_key=0,
        float32=float32,
        eps=eps,
        interpret=interpreted(),
        split_scores=eps is not None and not float32 and not row.sums_to_one,
    )
    q, k, v = (x.astype(plan.dtype) for x in (q, k, v))
    arrays = {
        "q": _queries_by_head(q, kv, length, plan.width),
        "k": _keys_by_head(k[: t - shift], shift, length, plan.width),
        "v": _keys_by_head(v[: t - shift], shift, length, plan.value_width),
    }
    if num_start_states:
        empty = jnp.zeros((kv, plan.num_features, plan.value_width), jnp.float32)
        padded = [empty if x is None else _pad_state(x, plan) for x in start_states[:num_start_states]]
        arrays["start_states"] = jnp.stack(padded)
    segments = {} if segment_ids is None else _segments(segment_ids, t, window, plan)
    return Call("rla", plan, arrays, segments)


def residual_blocks(sizes: BlockSizes, t: int, bytes_of_group: int, kind: str | None) -> tuple[int, int]:
    """Tokens of a chunk and of a block in residual.py. bytes_of_group: of one token's queries of one group."""
    wide = kind is not None and any(name in kind.lower() for name in WIDE)
    return _fitting(sizes.tpu_chunk or (256 if wide and t > 128 else 128), sizes.tpu_block, t, bytes_of_group)


def window_blocks(sizes: BlockSizes, t: int, window: int, bytes_of_group: int) -> tuple[int, int]:
    """Likewise, in window.py."""
    short = min(window, t) < sizes.tpu_window_chunk
    chunk = sizes.tpu_chunk or 128 if short else sizes.tpu_window_chunk
    return _fitting(chunk, sizes.tpu_block, t, bytes_of_group)


def _fitting(chunk: int, block: int, t: int, bytes_of_group: int) -> tuple[int, int]:
    most = max(LARGEST // (bytes_of_group * chunk), 1)
    return chunk, chunk * min(max(block // chunk, 1), most, -(-t // chunk))


def _queries_by_head(x, kv: int, length: int, width: int):
    """[t, h, d] -> [kv, group, length, width]"""
    t, h, d = x.shape
    x = x.reshape(t, kv, h // kv, d).transpose(1, 2, 0, 3)
    return jnp.pad(x, ((0, 0), (0, 0), (0, length - t), (0, width - d)))


def _keys_by_head(x, before: int, length: int, width: int):
    """[s, kv, d] -> [kv, length, width], the first key at row `before`."""
    s, _, d = x.shape
    return jnp.pad(x.transpose(1, 0, 2), ((0, 0), (before, length - before - s), (0, width - d)))


def _by_time(x, q, v):
    """[kv, group, length, width] -> [t, h, dv]; None is 0."""
    (t, h, _), dv = q.shape, v.shape[2]
    return jnp.zeros((t, h, dv), v.dtype) if x is None else x[:, :, :t, :dv].transpose(2, 0, 1, 3).reshape(t, h, dv)


def _pad_state(state, plan: Plan):
    """[kv, f, dv] -> float32, with each slice of f and dv padded to lanes."""
    kv, f, dv = state.shape
    slices = state.astype(jnp.float32).reshape(kv, plan.map.slices, f // plan.map.slices, dv)
    padding = ((0, 0), (0, 0), (0, plan.width - slices.shape[2]), (0, plan.value_width - dv))
    return jnp.pad(slices, padding).reshape(kv, plan.num_features, plan.value_width)


def _segments(segment_ids: Int[Array, "s"], t: int, window: int, plan: Plan) -> dict:
    """segment_start and carry_start of residual.py, in positions of the shifted keys."""
    s = segment_ids.shape[0]
    shift = window - (s - t)  # of each key
    start = starts(segment_ids)
    start = jnp.where(start == 0, residual.FIRST_SEGMENT, start + shift).astype(jnp.int32)
    at_query = jnp.pad(start[s - t :], (0, plan.length - t), mode="edge")
    last_key = jnp.arange(1, plan.length // plan.chunk + 1, dtype=jnp.int32) * plan.chunk - 1 - shift
    at_chunk = start[jnp.clip(last_key, 0, s - 1)]
    return {"segment_start": at_query[:, None], "carry_start": at_chunk}
