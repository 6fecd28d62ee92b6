"""Gradients of the window's softmax attention: one kernel for queries, one for keys and values. No atomics.

Both recompute the weights from the saved log-sum-exp: weight = exp2(scale log2(e) q k - lse), and d_logit = weight
(d_out v - delta). Blocks outside the window are skipped.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas.hopper.plan import Plan
from pallas.hopper.warpgroup import (
    LOG2E,
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
    to_registers,
    zeros,
)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QueryInputs:
    """Either the last two, or, where a norm follows, the four before them, of which the kernel computes these two."""

    q: Any
    k: Any
    v: Any
    lse: Any
    segment_start: Any = None
    d_out: Any = None
    y_swa: Any = None  # as forward.py saves it, and r_swa
    r_swa: Any = None
    swa_gain: Any = None
    d_swa: Any = None  # [b, t, h, dv], the cotangent of o_swa
    delta: Any = None  # [b, h, t], the sum of d_swa o_swa


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QueryOutputs:
    dq: Any
    d_swa: Any = None
    delta: Any = None
    d_gain: Any = None  # [b, tiles, h, d], to be summed over tiles


def query_gradients(arrays: QueryInputs, plan: Plan) -> QueryOutputs:
    """dq [b, t, h, d], and d_swa and delta, which `key_gradients` reads."""
    (batch, t, heads, d), by_head = arrays.q.shape, jax.ShapeDtypeStruct(arrays.q.shape, jnp.bfloat16)
    outputs = QueryOutputs(dq=by_head)
    scratch = {
        "ring": Ring.scratch(tile(plan.stages, plan.chunk, d), 2, plan.interpret),
        "q_tile": tile(2, ROWS, d),
        "d_tile": tile(2, ROWS, d),
        "stage": tile(2, ROWS, d),
        "loaded": plgpu.Barrier(num_barriers=2, num_arrivals=3 if plan.swa_normed else 2),
    }
    if plan.swa_normed:
        scratch["y_tile"] = tile(2, ROWS, d)
        scratch["gates"] = plgpu.Barrier(num_barriers=2)
        delta = jax.ShapeDtypeStruct((batch, heads, t), jnp.float32)
        d_gain = jax.ShapeDtypeStruct((batch, t // ROWS, heads, d), jnp.float32)
        outputs = QueryOutputs(dq=by_head, d_swa=by_head, delta=delta, d_gain=d_gain)
    num_tiles = plan.num_tiles(batch)
    grid = {"block": resident_blocks(num_tiles, plan.interpret)}
    body = functools.partial(_window_query_gradients, plan=plan, num_tiles=num_tiles)
    results = launch(body, arrays, outputs, scratch, grid=grid, warpgroups=3, interpret=plan.interpret)
    return results if plan.swa_normed else dataclasses.replace(results, d_swa=arrays.d_swa, delta=arrays.delta)


def _window_query_gradients(
    inputs: QueryInputs, outputs: QueryOutputs, ring: Ring, plan: Plan, num_tiles: int, **scratch
) -> None:
    warpgroup = axis_index("warpgroup")

    @pl.when(warpgroup == 2)
    def _():
        plgpu.set_max_registers(24, action="decrease")

        def copy(index, _, use):
            place = plan.place(index, 0)
            begin, _, _, end = plan.window_range(place.lowest, place.lowest + plan.span - 1)

            def block(j, use):
                keys = pl.ds(j * plan.chunk, plan.chunk)
                ring.load(use, inputs.k.at[place.batch, keys, place.kv_head])
                ring.load(use + 1, inputs.v.at[place.batch, keys, place.kv_head])
                return use + 2

            return lax.fori_loop(begin, end, block, use)

        ring.drain(for_each_tile(num_tiles, copy, jnp.int32(0)))

    @pl.when(warpgroup < 2)
    def _():
        plgpu.set_max_registers(240, action="increase")
        _compute_for_queries(inputs, outputs, ring, plan, num_tiles, warpgroup, **scratch)
        plgpu.wait_smem_to_gmem(0)


def _compute_for_queries(
    inputs: QueryInputs,
    outputs: QueryOutputs,
    ring: Ring,
    plan: Plan,
    num_tiles: int,
    warpgroup,
    q_tile,
    d_tile,
    stage,
    loaded,
    y_tile: Any = None,
    gates: Any = None,
) -> None:
    q_tile, d_tile, stage, loaded = (ref.at[warpgroup] for ref in (q_tile, d_tile, stage, loaded))
    y_tile = None if y_tile is None else y_tile.at[warpgroup]
    shape = ROWS, plan.chunk

    def load(place):
        where = place.batch, place.rows, place.head
        plgpu.copy_gmem_to_smem(inputs.q.at[where], q_tile, loaded)
        plgpu.copy_gmem_to_smem((inputs.d_out if plan.swa_normed else inputs.d_swa).at[where], d_tile, loaded)
        if plan.swa_normed:
            plgpu.copy_gmem_to_smem(inputs.y_swa.at[where], y_tile, loaded)

    def one_tile(index, is_last, use):
        place = plan.place(index, warpgroup)
        batch, rows, head = place.batch, place.rows, place.head
        begin, unmasked, masked_again, end = plan.window_range(place.lowest, place.lowest + plan.span - 1)
        per_row = lambda ref: to_registers(ref, PER_ROW, optimized=False)
        lse = per_row(inputs.lse.at[batch, head, rows])
        start = per_row(inputs.segment_start.at[batch, rows]) if plan.segmented else None
        if plan.swa_normed:
            r = per_row(inputs.r_swa.at[batch, head, rows])
            is_first = index == axis_index("block")
            sum_rows = lambda x: one_after_the_other(gates, warpgroup, is_first, lambda: x.sum(axis=0))
            gain = to_registers(inputs.swa_gain.at[batch, head], PER_COLUMN, optimized=False)
            plgpu.barrier_wait(loaded)
            (d_swa, _), d_gain, along = norm_backward(d_tile, [y_tile], r, gain, plan.value_size, plan.eps, sum_rows)
            delta = along / r
            outputs.delta.at[batch, head, rows][...] = delta
            outputs.d_gain.at[batch, place.row // ROWS, head][...] = d_gain
            send(stage, d_swa, outputs.d_swa.at[batch, rows, head])
        else:
            delta = per_row(inputs.delta.at[batch, head, rows])
            plgpu.barrier_wait(loaded)
            d_swa = to_registers(d_tile)
        q = to_registers(q_tile)
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
                distance = place.position - j * plan.chunk + iota(*shape, 0) - iota(*shape, 1)
                seen = (distance >= 0) & (distance < plan.window)
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
        send(stage, dq * plan.scale, outputs.dq.at[batch, rows, head])
        return use

    load(plan.place(axis_index("block"), warpgroup))
    for_each_tile(num_tiles, one_tile, jnp.int32(0))
    if plan.swa_normed:
        close_gates(gates, warpgroup)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KeyInputs:
    q: Any
    k: Any
    v: Any
    lse: Any
    d_swa: Any
    delta: Any
    segment_start: Any = None
    dv_rla: Any = None  # [b, s, kv, d], the residual branch's part of dv


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KeyOutputs:
    dk: Any  # [b, s, kv, d]
    dv: Any


def key_gradients(arrays: KeyInputs, plan: Plan) -> KeyOutputs:
    """Gradients for keys and values, summed over the group in float32."""
    d = plan.head_size
    shape = arrays.k.shape
    scratch = {
        "ring": Ring.scratch(tile(6, ROWS, d), 2, plan.interpret),
        "lse_ring": Ring.scratch(plgpu.SMEM((3, ROWS), jnp.float32), 2, plan.interpret),
        "delta_ring": Ring.scratch(plgpu.SMEM((3, ROWS), jnp.float32), 2, plan.interpret),
        "k_tile": tile(2, ROWS, d),
        "v_tile": tile(2, ROWS, d),
        "loaded": plgpu.Barrier(num_barriers=2, num_arrivals=2),
    }
    grid = {"kv_head": plan.num_kv_heads, "block": plan.num_keys // (2 * ROWS), "batch": shape[0]}
    outputs = KeyOutputs(*(jax.ShapeDtypeStruct(shape, jnp.bfloat16),) * 2)
    body = functools.partial(_window_key_gradients, plan=plan)
    return launch(body, arrays, outputs, scratch, grid=grid, warpgroups=3, interpret=plan.interpret)


def _window_key_gradients(
    inputs: KeyInputs,
    outputs: KeyOutputs,
    ring: Ring,
    lse_ring: Ring,
    delta_ring: Ring,
    k_tile,
    v_tile,
    loaded,
    plan: Plan,
) -> None:
    """A block takes 128 keys, each consumer warpgroup 64, and all queries of the group that see some of them."""
    warpgroup, batch, kv_head = (axis_index(name) for name in ("warpgroup", "batch", "kv_head"))
    lowest, group, d = axis_index("block") * 2 * ROWS, plan.group, plan.head_size
    begin, unmasked, masked_again, end = (x * group for x in plan.window_queries(lowest, 2 * ROWS))
    place = lambda step: (pl.ds(step // group * ROWS, ROWS), kv_head * group + step % group)

    @pl.when(warpgroup == 2)
    def _():
        plgpu.set_max_registers(24, action="decrease")

        def load(step, use):
            rows, head = place(step)
            ring.load(use, inputs.q.at[batch, rows, head])
            lse_ring.load(use // 2, inputs.lse.at[batch, head, rows])
            ring.load(use + 1, inputs.d_swa.at[batch, rows, head])
            delta_ring.load(use // 2, inputs.delta.at[batch, head, rows])
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
        plgpu.copy_gmem_to_smem(inputs.k.at[batch, rows, kv_head], keys, loaded.at[warpgroup])
        plgpu.copy_gmem_to_smem(inputs.v.at[batch, rows, kv_head], values, loaded.at[warpgroup])
        plgpu.barrier_wait(loaded.at[warpgroup])
        square = ROWS, ROWS

        def block(step, carry, masked: bool):  # everything transposed: rows are keys, columns queries
            dk, dv, use = carry
            q, d_out = ring.wait(use), ring.wait(use + 1)
            lse = to_registers(lse_ring.wait(use // 2), PER_COLUMN)
            delta = to_registers(delta_ring.wait(use // 2), PER_COLUMN)
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
                distance = plan.first + queries.start - key + iota(*square, 1) - iota(*square, 0)
                seen = (distance >= 0) & (distance < plan.window)
                if plan.segmented:
                    start = to_registers(inputs.segment_start.at[batch, queries], PER_COLUMN, optimized=False)
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
        if inputs.dv_rla is not None:
            dv += to_registers(inputs.dv_rla.at[batch, rows, kv_head], optimized=False).astype(jnp.float32)
        carry = zeros(ROWS, d), dv, jnp.int32(0)
        carry = lax.fori_loop(begin, unmasked, functools.partial(block, masked=True), carry)
        if not plan.segmented:
            carry = lax.fori_loop(unmasked, masked_again, functools.partial(block, masked=False), carry)
            carry = lax.fori_loop(masked_again, end, functools.partial(block, masked=True), carry)
        dk, dv, _ = carry
        for stage, value, output in ((keys, dk * plan.scale, outputs.dk), (values, dv, outputs.dv)):
            send(stage, value, output.at[batch, rows, kv_head])
        plgpu.wait_smem_to_gmem(0)
