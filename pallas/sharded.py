"""The ops over a sequence that is cut over devices, each of which holds one piece: for use in `jax.shard_map`.

A device needs two things from those to its left: the window's keys and values, a halo of W of them, from several
devices where a piece is shorter than the window; and the state before the first key of the halo, an exclusive prefix
sum over devices of what each one's keys add, cut where a segment begins. Both are exchanged before the op runs, and the
op knows nothing of them: keys in front of the queries, and an initial state, are what it takes anyway.

A device receives min(W, (n - 1) t) keys, values and ids, and a state of kv f dv float32 numbers 1 + ceil(log2(n - 1))
times over n devices (once for 2), where gathering all of them would take n - 1.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas import ops
from pallas.block_sizes import BlockSizes
from pallas.checked import checked
from pallas.checks import check_attention, check_states
from pallas.feature_map import FeatureMap, as_pair, softmax
from pallas.numerics import accumulation_dtype

BLOCK = 2048  # keys whose features are in memory at once


@checked
def sliding_window_attention(
    q: Float[Array, "t h d"],
    k: Float[Array, "t kv d"],
    v: Float[Array, "t kv dv"],
    *,
    axis_name: str,
    window: int,
    scale: float | int | None = None,
    sink_logits: Float[Array, "h"] | None = None,
    segment_ids: Int[Array, "t"] | None = None,
    implementation: str | None = None,
    block_sizes: BlockSizes | None = None,
) -> Float[Array, "t h dv"]:
    """`pallas.sliding_window_attention` of a sequence whose pieces lie along a mesh axis, in order.

    Args:
      q, k, v, segment_ids: this device's piece; all pieces have t tokens.
      axis_name: the axis of the enclosing `jax.shard_map`.
      others: as there.

    Returns:
      The outputs of this device's queries.
    """
    check_attention("sliding_window_attention", q, k, window, segment_ids)
    piece = _extended({"k": k, "v": v}, segment_ids, window, axis_name)
    options: dict[str, Any] = dict(scale=scale, sink_logits=sink_logits, implementation=implementation)
    return ops.sliding_window_attention(
        q, **piece.keys, window=window, segment_ids=piece.runs, block_sizes=block_sizes, **options
    )


@checked
def residual_linear_attention(
    q: Float[Array, "t h d"],
    k: Float[Array, "t kv d"],
    v: Float[Array, "t kv dv"],
    *,
    axis_name: str,
    window: int,
    feature_map: FeatureMap = softmax,
    initial_state: Float[Array, "kv _f dv"] | None = None,
    segment_state: Float[Array, "kv _f dv"] | None = None,
    segment_ids: Int[Array, "t"] | None = None,
    implementation: str | None = None,
    block_sizes: BlockSizes | None = None,
) -> Float[Array, "t h dv"]:
    """`pallas.residual_linear_attention` of a sequence whose pieces lie along a mesh axis, in order.

    Args:
      q, k, v, segment_ids: this device's piece; all pieces have t tokens.
      axis_name: the axis of the enclosing `jax.shard_map`.
      initial_state, segment_state: the same on every device.
      others: as there.

    Returns:
      The outputs of this device's queries.
    """
    op = "residual_linear_attention"
    check_attention(op, q, k, window, segment_ids)
    check_states(op, feature_map, k, v, initial_state=initial_state, segment_state=segment_state)
    piece = _extended({"k": k, "v": v}, segment_ids, window, axis_name)
    before = _state_before(piece, "k", feature_map, initial_state, segment_state, axis_name)
    options: dict[str, Any] = dict(implementation=implementation, block_sizes=block_sizes, feature_map=feature_map)
    return _from_states(
        lambda **states: ops.residual_linear_attention(
            q, **piece.keys, window=window, segment_ids=piece.runs, **states, **options
        ),
        piece, before, initial_state, segment_state, segment_ids is not None,
    )  # fmt: skip


@checked
def rattention(
    q: Float[Array, "t h d"],
    k: Float[Array, "t kv d"],
    v: Float[Array, "t kv dv"],
    *,
    axis_name: str,
    window: int,
    swa_gain: Float[Array, "h dv"] | None,
    rla_gain: Float[Array, "h dv"],
    feature_map: FeatureMap = softmax,
    q_rla: Float[Array, "t h d"] | None = None,
    k_rla: Float[Array, "t kv d"] | None = None,
    scale: float | int | None = None,
    sink_logits: Float[Array, "h"] | None = None,
    eps: float | int = 1e-6,
    initial_state: Float[Array, "kv _f dv"] | None = None,
    segment_state: Float[Array, "kv _f dv"] | None = None,
    segment_ids: Int[Array, "t"] | None = None,
    implementation: str | None = None,
    block_sizes: BlockSizes | None = None,
) -> Float[Array, "t h dv"]:
    """`pallas.rattention` of a sequence whose pieces lie along a mesh axis, in order; exact, gradients too.

    Args:
      q, k, v, q_rla, k_rla, segment_ids: this device's piece; all pieces have t tokens. A sequence that does not divide
        is padded at its end: with a segment of its own if there are segments, else as it is, for no query sees it.
      axis_name: the axis of the enclosing `jax.shard_map`, which needs `check_vma=False`.
      swa_gain, rla_gain, sink_logits, initial_state, segment_state: the same on every device.
      others: as there.

    Returns:
      The outputs of this device's queries.

    Raises, Numerics: as `pallas.rattention`. Cost: its, for W more keys and each key's features once more.
    """
    op = "rattention"
    check_attention(op, q, k, window, segment_ids)
    check_states(
        op, feature_map, k if k_rla is None else k_rla, v, initial_state=initial_state, segment_state=segment_state
    )
    keys = {"k": k, "v": v} | ({} if k_rla is None else {"k_rla": k_rla})
    piece = _extended(keys, segment_ids, window, axis_name)
    before = _state_before(
        piece, "k" if k_rla is None else "k_rla", feature_map, initial_state, segment_state, axis_name
    )
    options: dict[str, Any] = dict(swa_gain=swa_gain, rla_gain=rla_gain, feature_map=feature_map, q_rla=q_rla,
        scale=scale, sink_logits=sink_logits, eps=eps, implementation=implementation,
        block_sizes=block_sizes)  # fmt: skip
    return _from_states(
        lambda **states: ops.rattention(q, **piece.keys, window=window, segment_ids=piece.runs, **states, **options),
        piece, before, initial_state, segment_state, segment_ids is not None,
    )  # fmt: skip


class Piece(NamedTuple):
    """A device's keys with its halo in front: s = halo + t of them.

    runs: an id for each key; those before the sequence's first token, which are not there, have one of their own.
    present: is the key there? cut: does a segment begin at it? The sequence's first does not count.
    """

    keys: dict[str, Float[Array, "s kv d"]]
    runs: Int[Array, "s"]
    present: Bool[Array, "s"]
    cut: Bool[Array, "s"]
    length: int


def halo_length(window: int, length: int, num_devices: int) -> int:
    """Keys that a device takes from its left: W, or all there are."""
    return min(window, (num_devices - 1) * length)


def _from_left(x: Any, axis_name: str, hops: int = 1) -> Any:
    """What the device so many places to the left gives; zeros where there is none."""
    n = jax.lax.axis_size(axis_name)
    return jax.lax.ppermute(x, axis_name, [(i, i + hops) for i in range(n - hops)])


def _with_halo(x: Array, halo: int, axis_name: str) -> Array:
    t = x.shape[0]
    far_first = [(hops, min(t, halo - (hops - 1) * t)) for hops in range(math.ceil(halo / t), 0, -1)]
    return jnp.concatenate([*(_from_left(x[t - count :], axis_name, hops) for hops, count in far_first), x])


def _extended(keys: dict[str, Array], segment_ids: Array | None, window: int, axis_name: str) -> Piece:
    t, n, place = keys["k"].shape[0], jax.lax.axis_size(axis_name), jax.lax.axis_index(axis_name)
    halo = halo_length(window, t, n)
    position = jnp.arange(halo + t) - halo + place * t  # in the whole sequence
    ids = _with_halo(jnp.zeros((t,), jnp.int32) if segment_ids is None else segment_ids, halo, axis_name)
    present = position >= 0
    before = jnp.concatenate([_from_left(ids[t - 1 : t], axis_name), ids[:-1]])
    runs = jnp.where(present, ids, ids[jnp.argmax(present)] ^ 1)
    extended = {name: _with_halo(x, halo, axis_name) for name, x in keys.items()}
    return Piece(extended, runs, present, (position >= 1) & (ids != before), t)


def _state_before(
    piece: Piece, name: str, feature_map: FeatureMap, initial: Array | None, fresh: Array | None, axis_name: str
) -> Float[Array, "kv f dv"]:
    """The state that the first of a device's keys finds, halo included, of its segment."""
    t, n = piece.length, jax.lax.axis_size(axis_name)
    cut = piece.cut[:t]  # of the keys that this device adds: up to where its right neighbour's begin
    number = jnp.cumsum(cut)
    added = _summed(piece.keys[name][:t], piece.keys["v"][:t], piece.present[:t] & (number == number[-1]), feature_map)
    zero = jnp.zeros_like(added)
    start = zero if initial is None else initial.astype(added.dtype)
    fresh = zero if fresh is None else fresh.astype(added.dtype)
    any_cut = cut.any()
    found = _from_left((any_cut, added + jnp.where(any_cut, fresh, 0)), axis_name)
    for stride in (2**i for i in range(math.ceil(math.log2(max(n - 1, 1))))):
        (later_cut, later), (earlier_cut, earlier) = found, _from_left(found, axis_name, stride)
        found = earlier_cut | later_cut, later + jnp.where(later_cut, 0, earlier)
    was_cut, state = found
    return jnp.where(piece.cut[0], fresh, state + jnp.where(was_cut, 0, start))


def _summed(k: Array, v: Array, counts: Bool[Array, "t"], feature_map: FeatureMap) -> Float[Array, "kv f dv"]:
    """The sum of phi(k)^T v over the keys that count, block by block."""
    wide = accumulation_dtype(k, v)
    phi = as_pair(feature_map)[1]
    spare = -len(k) % BLOCK if len(k) > BLOCK else 0
    blocks = [jnp.pad(x, [(0, spare), *[(0, 0)] * (x.ndim - 1)]) for x in (k, v, counts)]
    blocks = [x.reshape(-1, min(BLOCK, len(k)), *x.shape[1:]) for x in blocks]

    @jax.checkpoint
    def add(block):
        k, v, counts = block
        kept = lambda x: jnp.where(counts[:, None, None], x, 0).astype(wide)  # 0 times what is not finite is not 0
        return jnp.einsum("skf,skv->kfv", kept(phi(kept(k))), kept(v), precision="highest")

    first = add([x[0] for x in blocks])
    return jax.lax.scan(lambda state, block: (state + add(block), None), first, [x[1:] for x in blocks])[0]


def _from_states(call: Any, piece: Piece, before: Array, initial: Any, fresh: Any, segmented: bool) -> Any:
    """The op's outputs. Where a halo reaches to before the sequence, its first segment is a later one to the op."""
    if not segmented or initial is fresh:
        return call(initial_state=before, segment_state=initial)
    first = (jnp.cumsum(piece.cut) == 0)[-piece.length :, None, None]
    of_first, of_later = (call(initial_state=before, segment_state=state) for state in (initial, fresh))
    return jnp.where(first, of_first, of_later)
