"""The window in the forward kernel: which tiles its producer copies, and the online softmax of a consumer warpgroup."""

import functools

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas.hopper.plan import Place, Plan
from pallas.hopper.warpgroup import (
    ACC,
    LOG2E,
    MASKED,
    ROWS,
    Ring,
    across,
    iota,
    multiply_add,
    zero_rows,
    zeros,
)


def copy(inputs, ring: Ring, place: Place, plan: Plan, use):
    """Producer: a tile of keys and one of values for each block, in the order in which `attend` reads them."""
    begin, _, _, end = plan.window_range(place.lowest, place.lowest + plan.span - 1)

    def block(j, use):
        keys = pl.ds(j * plan.chunk, plan.chunk)
        ring.load(use, inputs.k.at[place.batch, keys, place.kv_head])
        ring.load(use + 1, inputs.v.at[place.batch, keys, place.kv_head])
        return use + 2

    return lax.fori_loop(begin, end, block, use)


def attend(ring: Ring, place: Place, plan: Plan, q_tile, sink, start, use, warpgroup, turn):
    """Softmax attention over the window: (o_swa [ROWS, d], log2 of the sum of exp2 of the logits [ROWS], uses).

    q_tile: the warpgroup's queries in shared memory. sink: the logit without a value, or None. start [ROWS]: the first
    key of each query's segment, or None.
    turn: a barrier of two arrivals, by which the two consumer warpgroups alternate (ping-pong scheduling, as in
    FlashAttention-3): one's softmax overlaps the other's products.
    """
    lowest, position, d, chunk = place.lowest, place.position, plan.head_size, plan.chunk
    scale = LOG2E * (plan.scale if plan.scale > 0 else 1.0)  # positive, so it may follow the maximum, in one FMA
    begin, unmasked, masked_again, end = plan.window_range(lowest, lowest + plan.span - 1)

    def take_turns():
        if not plan.interpret:
            plgpu.barrier_arrive(turn)
            plgpu.barrier_wait(turn)

    def block(j, carry, masked: bool, half: int | None = None):
        out, highest, total, use = carry
        key, columns = j * chunk, chunk
        keys, values = ring.tile_of(use), ring.tile_of(use + 1)
        if half is not None:
            key, columns = key + half * ROWS, ROWS
            keys, values = (x.at[pl.ds(half * ROWS, ROWS)] for x in (keys, values))
        ring.wait(use)
        if plan.interpret:
            logits = multiply_add(True, ((ROWS, columns), [(q_tile, keys.transpose((1, 0)))]))
        else:

            def product(ref):
                plgpu.wgmma(ref, q_tile, keys.transpose((1, 0)))
                take_turns()
                return ref[...]

            logits = pl.run_scoped(product, ACC((ROWS, columns), jnp.float32))
        ring.release(use)
        if not plan.scale > 0:
            logits *= plan.scale
        if masked:
            distance = position - key + iota(ROWS, columns, 0) - iota(ROWS, columns, 1)
            seen = (distance >= 0) & (distance < plan.window)
            if plan.segmented:
                seen &= iota(ROWS, columns, 1) + key >= across(start, columns)
            logits = jnp.where(seen, logits, MASKED)
        higher = jnp.maximum(highest, logits.max(axis=1) * scale)
        shrink = jnp.exp2(highest - higher)
        weights = jnp.exp2(logits * scale - across(higher, columns))
        if masked:
            weights = jnp.where(seen, weights, 0.0)  # while a row has seen no key, its maximum is MASKED, too
        out *= across(shrink, d)
        total = total * shrink + weights.sum(axis=1)
        weights = weights.astype(jnp.bfloat16)
        if not plan.interpret:
            out, total, higher, weights = lax.optimization_barrier((out, total, higher, weights))
            plgpu.barrier_arrive(turn)
        ring.wait(use + 1)
        if not plan.interpret:
            plgpu.barrier_wait(turn)
        out = multiply_add(plan.interpret, (out, [(weights, values)]))
        ring.release(use + 1)
        return out, higher, total, use + 2

    if not plan.interpret:
        pl.when(warpgroup == 1)(take_turns)
    highest, total = zero_rows(ROWS, MASKED), zero_rows(ROWS)
    if sink is not None:
        highest, total = zero_rows(ROWS) + sink * LOG2E, zero_rows(ROWS, 1.0)
    carry = zeros(ROWS, d), highest, total, use
    masked, plain = functools.partial(block, masked=True), functools.partial(block, masked=False)
    last_half = jnp.int32(0)
    if chunk > ROWS:  # of a block at either end of the window, half may lie outside: it is not multiplied
        oldest = jnp.maximum(lowest - plan.window + 1, 0)
        first_half, last_half = plan.half_blocks(oldest, lowest + plan.span - 1, begin, end)
        carry = lax.fori_loop(begin, begin + first_half, functools.partial(masked, half=1), carry)
        begin, end = begin + first_half, end - last_half
        unmasked, masked_again = jnp.clip(unmasked, begin, end), jnp.clip(masked_again, begin, end)
    carry = lax.fori_loop(begin, unmasked, masked, carry)
    if not plan.segmented:
        carry = lax.fori_loop(unmasked, masked_again, plain, carry)
        carry = lax.fori_loop(masked_again, end, masked, carry)
    if chunk > ROWS:
        carry = lax.fori_loop(end, end + last_half, functools.partial(masked, half=0), carry)
    out, highest, total, use = carry
    if not plan.interpret:
        pl.when(warpgroup == 0)(take_turns)
    return out * across(1.0 / total, d), highest + jnp.log2(total), use
