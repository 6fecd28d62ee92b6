"""Gradients of the residual branch for queries: the first of its two backward kernels. No atomics.

Slices of phi are independent of one another until the last step, the map's Jacobian. Where a norm follows the branch,
its backward pass is computed here, too, and residual_key_backward.py reads the result.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas.hopper.plan import Place, Plan, int32
from pallas.hopper.warpgroup import (
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
    pull_back,
    resident_blocks,
    send,
    slice_of,
    tile,
    to_registers,
    where_rows,
    zeros,
)
from pallas.numerics import split


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QueryInputs:
    """Either the last, or, where a norm follows, the five before it, of which the kernel computes it."""

    q_rla: Any  # None where features are operands
    v: Any
    features_k: Any
    states: Any = None  # the sweep's, as the next two
    states_lo: Any = None
    state_means: Any = None
    segment_start: Any = None
    start_states: Any = None  # as the forward kernel reads them
    start_means: Any = None
    d_out: Any = None
    y_rla: Any = None  # as forward.py saves it, and the next two
    y_rla_lo: Any = None
    r_rla: Any = None
    rla_gain: Any = None
    d_rla: Any = None  # [b, t, h, dv], the cotangent of o_rla


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QueryOutputs:
    dq: Any  # [b, t, h, d] bfloat16 or, where features are operands, their gradient [b, t, h, f] float32
    d_rla: Any = None
    d_gain: Any = None  # [b, tiles, h, d], to be summed over tiles
    d_rla_lo: Any = None  # with `plan.precise`: the second part of d_rla


def query_gradients(arrays: QueryInputs, plan: Plan) -> QueryOutputs:
    """The gradient for queries, and d_rla, which the kernel for keys and the reverse sweep read."""
    d, heads, batch, t = plan.head_size, plan.num_heads, arrays.v.shape[0], plan.num_queries
    scratch = {
        "ring": Ring.scratch(tile(plan.stages - 2 * plan.precise, plan.chunk, d), 2, plan.interpret),
        "d_tile": tile(2, ROWS, d),
        "q_tile": tile(2, ROWS, d),
        "stage": tile(2, ROWS, d),
        "loaded": plgpu.Barrier(num_barriers=2, num_arrivals=1 + plan.rla_normed + plan.precise),
        "q_loaded": plgpu.Barrier(num_barriers=2),
    }
    width, dtype = (plan.num_features, jnp.float32) if plan.map is None else (d, jnp.bfloat16)
    outputs = QueryOutputs(dq=jax.ShapeDtypeStruct((batch, t, heads, width), dtype))
    if plan.rla_normed:
        scratch["y_tile"] = tile(2, ROWS, d)
        scratch["gates"] = plgpu.Barrier(num_barriers=2)
        d_rla = jax.ShapeDtypeStruct((batch, t, heads, d), jnp.bfloat16)
        d_gain = jax.ShapeDtypeStruct((batch, t // ROWS, heads, d), jnp.float32)
        d_rla_lo = d_rla if plan.precise else None
        outputs = dataclasses.replace(outputs, d_rla=d_rla, d_gain=d_gain, d_rla_lo=d_rla_lo)
        if plan.precise:
            scratch["y_lo_tile"] = tile(2, ROWS, d)
    num_tiles = plan.num_tiles(batch)
    grid = {"block": resident_blocks(num_tiles, plan.interpret)}
    body = functools.partial(_residual_query_gradients, plan=plan, num_tiles=num_tiles)
    results = launch(body, arrays, outputs, scratch, grid=grid, warpgroups=3, interpret=plan.interpret)
    return results if plan.rla_normed else dataclasses.replace(results, d_rla=arrays.d_rla)


def _residual_query_gradients(
    inputs: QueryInputs, outputs: QueryOutputs, ring: Ring, plan: Plan, num_tiles: int, **scratch
) -> None:
    warpgroup = axis_index("warpgroup")

    @pl.when(warpgroup == 2)
    def _():
        plgpu.set_max_registers(24, action="decrease")
        copy = lambda index, _, use: _copy_for_queries(inputs, ring, plan.place(index, 0), plan, use)
        ring.drain(for_each_tile(num_tiles, copy, jnp.int32(0)))

    @pl.when(warpgroup < 2)
    def _():
        plgpu.set_max_registers(240, action="increase")
        _compute_for_queries(inputs, outputs, ring, plan, num_tiles, warpgroup, **scratch)
        plgpu.wait_smem_to_gmem(0)


def _slices_at_once(plan: Plan) -> int:
    """Where features are operands, states are hi + lo: registers suffice for the products of one slice of phi only."""
    return 1 if plan.map is None else plan.slices_at_once


def _row_blocks(plan: Plan) -> list:
    """A slice of a state, [dv, d], may be longer than a slot of the ring: which rows of dv go into one slot each."""
    return [pl.ds(row, plan.chunk) for row in range(0, plan.head_size, plan.chunk)]


def _copy_for_queries(inputs: QueryInputs, ring: Ring, place: Place, plan: Plan, use):
    """Producer: for each slice of phi (or two) the states, then the edge's values and features."""
    d, count = plan.head_size, _slices_at_once(plan)
    batch, kv_head = place.batch, place.kv_head
    state, begin, end = plan.residual_range(place.lowest, place.lowest + plan.span - 1)
    columns = lambda i: pl.ds(i * d, d)

    def load_state(source, first, use):
        for i in range(count):
            for rows in _row_blocks(plan):
                ring.load(use, source.at[rows, columns(first + i)])
                use += 1
        return use

    for first in range(0, plan.slices, count):
        if plan.reaches_back:

            def load_saved(_, use, first=first):
                for states in (inputs.states, inputs.states_lo)[: plan.state_parts]:
                    use = load_state(states.at[batch, state, kv_head], first, use)
                return use

            use = lax.fori_loop(0, int32(state > 0), load_saved, use)
        for i in range(plan.num_start_tiles):
            use = load_state(inputs.start_states.at[batch, i, kv_head], first, use)
        if plan.reaches_back:

            def edge(j, use, first=first):
                keys = pl.ds(j * plan.chunk, plan.chunk)
                ring.load(use, inputs.v.at[batch, keys, kv_head])
                for i in range(count):
                    ring.load(use + 1 + i, inputs.features_k.at[batch, keys, kv_head, columns(first + i)])
                return use + 1 + count

            use = lax.fori_loop(begin, end, edge, use)
    return use


def _compute_for_queries(
    inputs: QueryInputs,
    outputs: QueryOutputs,
    ring: Ring,
    plan: Plan,
    num_tiles: int,
    warpgroup,
    d_tile,
    q_tile,
    stage,
    loaded,
    q_loaded,
    y_tile: Any = None,
    y_lo_tile: Any = None,
    gates: Any = None,
):
    d_tile, q_tile, stage, loaded, q_loaded = (ref.at[warpgroup] for ref in (d_tile, q_tile, stage, loaded, q_loaded))
    y_tiles = [x.at[warpgroup] for x in (y_tile, y_lo_tile) if x is not None]
    d, count, chunk = plan.head_size, _slices_at_once(plan), plan.chunk
    precise_scores = plan.precise or plan.map is None

    def load(place):
        where = place.batch, place.rows, place.head
        plgpu.copy_gmem_to_smem((inputs.d_out if plan.rla_normed else inputs.d_rla).at[where], d_tile, loaded)
        for y_tile, y in zip(y_tiles, (inputs.y_rla, inputs.y_rla_lo), strict=False):
            plgpu.copy_gmem_to_smem(y.at[where], y_tile, loaded)

    def load_q(place):
        if plan.map is not None:
            plgpu.copy_gmem_to_smem(inputs.q_rla.at[place.batch, place.rows, place.head], q_tile, q_loaded)

    def columns_of(x, block):
        """Those columns of d_rla, or of its second part, that are multiplied by the rows `block` of a state."""
        if isinstance(x, jax.Array):
            return lax.slice(x, (0, block.start), (ROWS, block.start + chunk))
        return x.at[:, pl.ds(block.start, chunk)]

    def read_state(d_parts, load_means, reads, grads, use, state_parts: int = 1):
        """grads + d_rla times the transposed states (centred ones, then their means), where `reads` [ROWS] is 1."""
        rows = _row_blocks(plan)
        states = ring.wait_all(use, len(grads) * len(rows) * state_parts)
        mask_sums = reads is not None and precise_scores  # registers do not suffice for masked copies of both parts
        if reads is not None and not mask_sums:
            d_parts = [(x.astype(jnp.float32) * across(reads, d)).astype(jnp.bfloat16) for x in d_parts]
        sums = []
        for i, grad in enumerate(grads):
            products = []
            for j in range(state_parts):
                first = (j * len(grads) + i) * len(rows)
                for block, state in zip(rows, states[first : first + len(rows)], strict=True):
                    products += [(columns_of(x, block), state) for x in (d_parts if j == 0 else d_parts[:1])]
            sums.append((grad.shape if mask_sums else grad, products))
        found = (
            [multiply_add(plan.interpret, one) for one in sums] if mask_sums else multiply_add(plan.interpret, *sums)
        )
        found = [found] if len(grads) == 1 and not mask_sums else list(found)
        for i in range(len(states)):
            ring.release(use + i)
        if not plan.sums_to_one:  # else the map's Jacobian removes the means' part
            whole = [x if isinstance(x, jax.Array) else to_registers(x) for x in d_parts]
            for i, mean in enumerate(load_means()):
                for x in whole:
                    found[i] += across((x.astype(jnp.float32) * down(mean, ROWS)).sum(axis=1), d)
        if mask_sums:
            found = [grad + x * across(reads, d) for grad, x in zip(grads, found, strict=True)]
        return found, use + len(states)

    def means_of(ref, first):
        return lambda: [to_registers(ref.at[first + i], PER_COLUMN, optimized=False) for i in range(count)]

    def one_tile(index, is_last, use):
        place = plan.place(index, warpgroup)
        batch, kv_head, rows, head = place.batch, place.kv_head, place.rows, place.head
        target = lambda output: output.at[batch, rows, head]
        state, begin, end = plan.residual_range(place.lowest, place.lowest + plan.span - 1)
        per_row = lambda ref: to_registers(ref, PER_ROW, optimized=False)
        start = per_row(inputs.segment_start.at[batch, rows]) if plan.segmented else None

        if plan.rla_normed:
            r = per_row(inputs.r_rla.at[batch, head, rows])
            is_first = index == axis_index("block")
            sum_rows = lambda x: one_after_the_other(gates, warpgroup, is_first, lambda: x.sum(axis=0))
            gain = to_registers(inputs.rla_gain.at[batch, head], PER_COLUMN, optimized=False)
            plgpu.barrier_wait(loaded)
            (d_rla, d_rla_lo), d_gain, _ = norm_backward(d_tile, y_tiles, r, gain, plan.value_size, plan.eps, sum_rows)
            outputs.d_gain.at[batch, place.row // ROWS, head][...] = d_gain
            send(stage, d_rla, target(outputs.d_rla))
            d_parts = [d_rla]
            if plan.precise:  # the second part is multiplied from shared memory
                send(stage, d_rla_lo, target(outputs.d_rla_lo))
                d_parts.append(stage)
        else:
            plgpu.barrier_wait(loaded)
            d_parts = [to_registers(d_tile)]
        load_next(load, plan, index, is_last, warpgroup)

        def edge(j, carry):
            grads, use = carry
            values, *features = ring.wait_all(use, 1 + count)
            scores = multiply_add(
                plan.interpret, ((ROWS, chunk), [(part, values.transpose((1, 0))) for part in d_parts])
            )
            ring.release(use)
            seen = place.position - j * chunk + iota(ROWS, chunk, 0) - iota(ROWS, chunk, 1) >= plan.window
            if plan.segmented:
                seen &= iota(ROWS, chunk, 1) + j * chunk >= across(start, chunk)
            scores = jnp.where(seen, scores, 0.0)
            scores = split(scores, precise_scores)
            sums = [(grad, [(part, x) for part in scores]) for grad, x in zip(grads, features, strict=True)]
            grads = multiply_add(plan.interpret, *sums)
            for i in range(count):
                ring.release(use + 1 + i)
            return [grads] if count == 1 else list(grads), use + 1 + count

        for first in range(0, plan.slices, count):
            grads = [zeros(ROWS, d) for _ in range(count)]
            if plan.reaches_back:
                reads = where_rows(start < state * plan.spacing if start is not None else None)
                means = means_of(inputs.state_means.at[batch, state, kv_head], first)
                saved = functools.partial(read_state, d_parts, means, reads, state_parts=plan.state_parts)
                read = lambda _, carry, saved=saved: saved(*carry)
                grads, use = lax.fori_loop(0, int32(state > 0), read, (grads, use))
            for i in range(plan.num_start_tiles):
                reads = where_rows(plan.reads_start(i, start))
                is_hi = i < plan.num_start_states  # lo has no mean of its own
                means = means_of(inputs.start_means.at[batch, i, kv_head], first) if is_hi else list
                grads, use = read_state(d_parts if is_hi else d_parts[:1], means, reads, grads, use)
            if plan.reaches_back:
                grads, use = lax.fori_loop(begin, end, edge, (grads, use))
            if plan.map is None:
                for i, grad in enumerate(grads):
                    outputs.dq.at[batch, rows, head, pl.ds((first + i) * d, d)][...] = grad
        if plan.map is None:
            return use
        plgpu.barrier_wait(q_loaded)
        dq = zeros(ROWS, d)
        for i, grad in enumerate(grads):
            x = to_registers(q_tile).astype(jnp.float32)
            x = -x if i else x
            dx = pull_back(plan.map, x, slice_of(plan.map, x), grad)
            dq = dq - dx if i else dq + dx
        load_next(load_q, plan, index, is_last, warpgroup)
        send(stage, dq, target(outputs.dq))
        return use

    first_place = plan.place(axis_index("block"), warpgroup)
    load(first_place)
    load_q(first_place)
    for_each_tile(num_tiles, one_tile, jnp.int32(0))
    if plan.rla_normed:
        close_gates(gates, warpgroup)
