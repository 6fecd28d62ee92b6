"""Gradients of the window's softmax attention: one kernel for queries, one for keys and values. No atomics.

Both form the weights anew from the saved log-sum: weight = exp2(scale log2(e) q k - lse), d_logit = weight (d_out v -
delta). Blocks outside the window are skipped.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas.hopper.plan import Plan
from pallas.hopper.warpgroup import (
    LOG2E,
    MATRIX,
    PER_COLUMN,
    PER_ROW,
    ROWS,
    Ring,
    across,
    axis_index,
    close_gates,
    down,
    for_each_tile,
    iota,
    launch,
    load_next,
    multiply_add,
    norm_backward,
    one_after_the_other,
    resident_blocks,
    send,
    tile,
    zeros,
)


def query_gradients(arrays: dict, plan: Plan) -> dict:
    """dq [b, t, h, d], and what the key gradients read: d_swa, the cotangent of o_swa, and delta [b, h, t].

    arrays: q, k, v, lse; segment_start; d_swa and delta, or, where a norm follows, d_out, y_swa,
    r_swa and swa_gain, with whose help they are computed here; then `d_gain` [b, tiles, h, d], to be summed over tiles.
    """
    (batch, t, heads, d), narrow = arrays["q"].shape, jnp.bfloat16
    outputs = {"dq": jax.ShapeDtypeStruct(arrays["q"].shape, narrow)}
    scratch = {
        "ring": Ring.scratch(tile(plan.stages, plan.chunk, d), consumers=2),
        "q_tile": tile(2, ROWS, d),
        "d_tile": tile(2, ROWS, d),
        "stage": tile(2, ROWS, d),
        "loaded": plgpu.Barrier(num_barriers=2, num_arrivals=3 if plan.normed else 2),
    }
    if plan.normed:
        scratch["y_tile"] = tile(2, ROWS, d)
        scratch["gates"] = plgpu.Barrier(num_barriers=2)
        outputs["d_swa"] = jax.ShapeDtypeStruct(arrays["q"].shape, narrow)
        outputs["delta"] = jax.ShapeDtypeStruct((batch, heads, t), jnp.float32)
        outputs["d_gain"] = jax.ShapeDtypeStruct((batch, t // ROWS, heads, d), jnp.float32)
    num_tiles = plan.num_tiles(batch)
    grid = {"block": resident_blocks(num_tiles, plan.interpret)}
    body = functools.partial(_window_query_gradients, plan=plan, num_tiles=num_tiles)
    results = launch(body, arrays, outputs, scratch, grid=grid, warpgroups=3, interpret=plan.interpret)
    return {name: arrays.get(name) for name in ("d_swa", "delta")} | results


def _window_query_gradients(refs, ring, plan: Plan, num_tiles: int, **scratch):
    warpgroup = axis_index("warpgroup")
    ring = Ring(*ring, plan.interpret)

    @pl.when(warpgroup == 2)
    def _():
        plgpu.set_max_registers(24, action="decrease")

        def copy(index, _, use):
            place = plan.place(index, 0)
            begin, _, _, end = plan.window_range(place.lowest, place.lowest + plan.span - 1)

            def block(j, use):
                keys = pl.ds(j * plan.chunk, plan.chunk)
                ring.load(use, refs["k"].at[place.batch, keys, place.kv_head])
                ring.load(use + 1, refs["v"].at[place.batch, keys, place.kv_head])
                return use + 2

            return lax.fori_loop(begin, end, block, use)

        ring.drain(for_each_tile(num_tiles, copy, jnp.int32(0)))

    @pl.when(warpgroup < 2)
    def _():
        plgpu.set_max_registers(240, action="increase")
        _compute_for_queries(refs, ring, plan, num_tiles, warpgroup, **scratch)
        plgpu.wait_smem_to_gmem(0)


def _compute_for_queries(
    refs, ring: Ring, plan: Plan, num_tiles: int, warpgroup, q_tile, d_tile, stage, loaded, y_tile=None, gates=None
):
    q_tile, d_tile, stage, loaded = (ref.at[warpgroup] for ref in (q_tile, d_tile, stage, loaded))
    y_tile = None if y_tile is None else y_tile.at[warpgroup]
    shape = ROWS, plan.chunk

    def load(place):
        where = place.batch, place.rows, place.head
        plgpu.copy_gmem_to_smem(refs["q"].at[where], q_tile, loaded)
        plgpu.copy_gmem_to_smem(refs["d_out" if plan.normed else "d_swa"].at[where], d_tile, loaded)
        if plan.normed:
            plgpu.copy_gmem_to_smem(refs["y_swa"].at[where], y_tile, loaded)

    def one_tile(index, is_last, use):
        place = plan.place(index, warpgroup)
        batch, rows, head = place.batch, place.rows, place.head
        target = lambda name: refs[name].at[batch, rows, head]
        begin, unmasked, masked_again, end = plan.window_range(place.lowest, place.lowest + plan.span - 1)
        per_row = lambda ref: plgpu.load(ref, layout=PER_ROW, optimized=False)
        lse = per_row(refs["lse"].at[batch, head, rows])
        start = per_row(refs["segment_start"].at[batch, rows]) if plan.segmented else None
        if plan.normed:
            r = per_row(refs["r_swa"].at[batch, head, rows])
            is_first = index == axis_index("block")
            sum_rows = lambda x: one_after_the_other(gates, warpgroup, is_first, lambda: x.sum(axis=0))
            gain = plgpu.load(refs["swa_gain"].at[batch, head], layout=PER_COLUMN, optimized=False)
            plgpu.barrier_wait(loaded)
            (d_swa, _), d_gain, along = norm_backward(d_tile, [y_tile], r, gain, plan.value_size, plan.eps, sum_rows)
            delta = along / r
            refs["delta"].at[batch, head, rows][...] = delta
            refs["d_gain"].at[batch, place.row // ROWS, head][...] = d_gain
            send(stage, d_swa, target("d_swa"))
        else:
            delta = per_row(refs["delta"].at[batch, head, rows])
            plgpu.barrier_wait(loaded)
            d_swa = plgpu.load(d_tile, layout=MATRIX)
        q = plgpu.load(q_tile, layout=MATRIX)
        load_next(load, plan, index, is_last, warpgroup)

        def block(j, carry, masked: bool):
            dq, use = carry
            keys, values = ring.wait(use), ring.wait(use + 1)
            logits, d_weights = multiply_add(
                plan.interpret,
                (shape, [(q, keys.transpose((1, 0)))]),
                (shape, [(d_swa, values.transpose((1, 0)))]),
            )
            ring.release(use + 1)
            weights = jnp.exp2(logits * (plan.scale * LOG2E) - across(lse, plan.chunk))
            if masked:
                ahead = place.position - j * plan.chunk + iota(*shape, 0) - iota(*shape, 1)
                seen = (ahead >= 0) & (ahead < plan.window)
                if plan.segmented:
                    seen &= iota(*shape, 1) + j * plan.chunk >= across(start, plan.chunk)
                weights = jnp.where(seen, weights, 0.0)
            d_logits = weights * (d_weights - across(delta, plan.chunk))
            dq = multiply_add(plan.interpret, (dq, [(d_logits.astype(jnp.bfloat16), keys)]))
            ring.release(use)
            return dq, use + 2

        carry = zeros(ROWS, plan.head_size), use
        carry = lax.fori_loop(begin, unmasked, functools.partial(block, masked=True), carry)
        if not plan.segmented:
            carry = lax.fori_loop(unmasked, masked_again, functools.partial(block, masked=False), carry)
            carry = lax.fori_loop(masked_again, end, functools.partial(block, masked=True), carry)
        dq, use = carry
        send(stage, dq * plan.scale, target("dq"))
        return use

    load(plan.place(axis_index("block"), warpgroup))
    for_each_tile(num_tiles, one_tile, jnp.int32(0))
    if plan.normed:
        close_gates(gates, warpgroup)


def key_gradients(arrays: dict, plan: Plan):
    """dk, dv [b, s, kv, d], summed over the group in float32.

    arrays: q, k, v, lse, d_swa, delta, segment_start; dv [b, s, kv, d], what the residual branch adds, or None.
    """
    d = plan.head_size
    shape = arrays["k"].shape
    scratch = {
        "ring": Ring.scratch(tile(6, ROWS, d), consumers=2),
        "lse_ring": Ring.scratch(plgpu.SMEM((3, ROWS), jnp.float32), consumers=2),
        "delta_ring": Ring.scratch(plgpu.SMEM((3, ROWS), jnp.float32), consumers=2),
        "k_tile": tile(2, ROWS, d),
        "v_tile": tile(2, ROWS, d),
        "loaded": plgpu.Barrier(num_barriers=2, num_arrivals=2),
    }
    grid = {"kv_head": plan.num_kv_heads, "block": plan.num_keys // (2 * ROWS), "batch": shape[0]}
    outputs = {name: jax.ShapeDtypeStruct(shape, jnp.bfloat16) for name in ("dk", "dv")}
    body = functools.partial(_window_key_gradients, plan=plan)
    arrays = {("dv_residual" if name == "dv" else name): array for name, array in arrays.items()}
    results = launch(body, arrays, outputs, scratch, grid=grid, warpgroups=3, interpret=plan.interpret)
    return results["dk"], results["dv"]


def _window_key_gradients(refs, ring, lse_ring, delta_ring, k_tile, v_tile, loaded, plan: Plan):
    warpgroup, batch, kv_head = (axis_index(name) for name in ("warpgroup", "batch", "kv_head"))
    ring, lse_ring, delta_ring = (Ring(*scratch, plan.interpret) for scratch in (ring, lse_ring, delta_ring))
    lowest, group, d = axis_index("block") * 2 * ROWS, plan.group, plan.head_size
    begin, unmasked, masked_again, end = (x * group for x in plan.window_queries(lowest, 2 * ROWS))
    place = lambda step: (pl.ds(step // group * ROWS, ROWS), kv_head * group + step % group)

    @pl.when(warpgroup == 2)
    def _():
        plgpu.set_max_registers(24, action="decrease")

        def load(step, use):
            rows, head = place(step)
            ring.load(use, refs["q"].at[batch, rows, head])
            lse_ring.load(use // 2, refs["lse"].at[batch, head, rows])
            ring.load(use + 1, refs["d_swa"].at[batch, rows, head])
            delta_ring.load(use // 2, refs["delta"].at[batch, head, rows])
            return use + 2

        uses = lax.fori_loop(begin, end, load, jnp.int32(0))
        ring.drain(uses)
        lse_ring.drain(uses // 2)
        delta_ring.drain(uses // 2)

    @pl.when(warpgroup < 2)
    def _():
        plgpu.set_max_registers(240, action="increase")
        keys, values = k_tile.at[warpgroup], v_tile.at[warpgroup]
        key = lowest + warpgroup * ROWS
        rows = pl.ds(key, ROWS)
        plgpu.copy_gmem_to_smem(refs["k"].at[batch, rows, kv_head], keys, loaded.at[warpgroup])
        plgpu.copy_gmem_to_smem(refs["v"].at[batch, rows, kv_head], values, loaded.at[warpgroup])
        plgpu.barrier_wait(loaded.at[warpgroup])
        square = ROWS, ROWS

        def block(step, carry, masked: bool):  # everything transposed: rows are keys, columns queries
            dk, dv, use = carry
            q, d_out = ring.wait(use), ring.wait(use + 1)
            lse = plgpu.load(lse_ring.wait(use // 2), layout=PER_COLUMN)
            delta = plgpu.load(delta_ring.wait(use // 2), layout=PER_COLUMN)
            lse_ring.release(use // 2)
            delta_ring.release(use // 2)
            logits, d_weights = multiply_add(
                plan.interpret,
                (square, [(keys, q.transpose((1, 0)))]),
                (square, [(values, d_out.transpose((1, 0)))]),
            )
            weights = jnp.exp2(logits * (plan.scale * LOG2E) - down(lse, ROWS))
            if masked:
                queries, _ = place(step)
                ahead = plan.first + queries.start - key + iota(*square, 1) - iota(*square, 0)
                seen = (ahead >= 0) & (ahead < plan.window)
                if plan.segmented:
                    start = plgpu.load(refs["segment_start"].at[batch, queries], layout=PER_COLUMN, optimized=False)
                    seen &= iota(*square, 0) + key >= down(start, ROWS)
                weights = jnp.where(seen, weights, 0.0)
            d_logits = weights * (d_weights - down(delta, ROWS))
            dv, dk = multiply_add(
                plan.interpret,
                (dv, [(weights.astype(jnp.bfloat16), d_out)]),
                (dk, [(d_logits.astype(jnp.bfloat16), q)]),
            )
            ring.release(use)
            ring.release(use + 1)
            return dk, dv, use + 2

        dv = zeros(ROWS, d)
        if "dv_residual" in refs:
            dv += plgpu.load(refs["dv_residual"].at[batch, rows, kv_head], optimized=False, layout=MATRIX).astype(
                jnp.float32
            )
        carry = zeros(ROWS, d), dv, jnp.int32(0)
        carry = lax.fori_loop(begin, unmasked, functools.partial(block, masked=True), carry)
        if not plan.segmented:
            carry = lax.fori_loop(unmasked, masked_again, functools.partial(block, masked=False), carry)
            carry = lax.fori_loop(masked_again, end, functools.partial(block, masked=True), carry)
        dk, dv, _ = carry
        for tile_, value, name in ((keys, dk * plan.scale, "dk"), (values, dv, "dv")):
            send(tile_, value, refs[name].at[batch, rows, kv_head])
        plgpu.wait_smem_to_gmem(0)
