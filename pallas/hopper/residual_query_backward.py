"""Gradients of residual linear attention for queries: the first of its two backward kernels. No atomics.

Slices of phi are independent of one another but for the last step, the map's Jacobian. Where a norm follows, its
backward pass runs here too, and residual_key_backward.py reads the result.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas.hopper.plan import Place, Plan, int32
from pallas.hopper.warpgroup import (
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
    parts_of,
    pull_back,
    resident_blocks,
    send,
    slice_of,
    tile,
    where_rows,
    zeros,
)


def query_gradients(arrays: dict, plan: Plan) -> dict:
    """dq [b, t, h, d] bfloat16 (where features are given, their gradient [b, t, h, f] float32), and d_rla.

    With `plan.precise` also d_rest, what rounding took from d_rla.

    arrays: d_rla, the cotangent of o_rla, or, where a norm follows, d_out, y_rla (and y_rla_rest with `plan.precise`),
    r_rla and rla_gain, with whose help it is computed here, and `d_gain` [b, tiles, h, d], to be summed over tiles;
    q_rla unless features are given; features_k, v, states, state_rests with two `plan.state_parts`, state_means;
    start_states, start_means; segment_start.
    """
    d, heads, batch, t = plan.head_size, plan.num_heads, arrays["v"].shape[0], plan.num_queries
    scratch = {
        "ring": Ring.scratch(tile(plan.stages - 2 * plan.precise, plan.chunk, d), consumers=2),
        "d_tile": tile(2, ROWS, d),
        "q_tile": tile(2, ROWS, d),
        "stage": tile(2, ROWS, d),
        "loaded": plgpu.Barrier(num_barriers=2, num_arrivals=1 + plan.normed + plan.precise),
        "q_loaded": plgpu.Barrier(num_barriers=2),
    }
    width, dtype = (plan.num_features, jnp.float32) if plan.map is None else (d, jnp.bfloat16)
    outputs = {"dq": jax.ShapeDtypeStruct((batch, t, heads, width), dtype)}
    if plan.normed:
        scratch["y_tile"] = tile(2, ROWS, d)
        scratch["gates"] = plgpu.Barrier(num_barriers=2)
        outputs["d_rla"] = jax.ShapeDtypeStruct((batch, t, heads, d), jnp.bfloat16)
        outputs["d_gain"] = jax.ShapeDtypeStruct((batch, t // ROWS, heads, d), jnp.float32)
        if plan.precise:
            scratch["y_rest_tile"] = tile(2, ROWS, d)
            outputs["d_rest"] = outputs["d_rla"]
    num_tiles = plan.num_tiles(batch)
    grid = {"block": resident_blocks(num_tiles, plan.interpret)}
    body = functools.partial(_residual_query_gradients, plan=plan, num_tiles=num_tiles)
    results = launch(body, arrays, outputs, scratch, grid=grid, warpgroups=3, interpret=plan.interpret)
    return {"d_rla": arrays.get("d_rla")} | results


def _residual_query_gradients(refs, ring, plan: Plan, num_tiles: int, **scratch):
    warpgroup = axis_index("warpgroup")
    ring = Ring(*ring, plan.interpret)

    @pl.when(warpgroup == 2)
    def _():
        plgpu.set_max_registers(24, action="decrease")
        copy = lambda index, _, use: _copy_for_queries(refs, ring, plan.place(index, 0), plan, use)
        ring.drain(for_each_tile(num_tiles, copy, jnp.int32(0)))

    @pl.when(warpgroup < 2)
    def _():
        plgpu.set_max_registers(240, action="increase")
        _compute_for_queries(refs, ring, plan, num_tiles, warpgroup, **scratch)
        plgpu.wait_smem_to_gmem(0)


def _slices_at_once(plan: Plan) -> int:
    """Where features are given, states are in two parts, too: registers hold operands for one slice of phi only."""
    return 1 if plan.map is None else plan.slices_at_once


def _state_parts(plan: Plan) -> list:
    """A state's tile [dv, d] is longer than a slot of the ring: the rows of dv that each of its parts holds."""
    return [pl.ds(row, plan.chunk) for row in range(0, plan.head_size, plan.chunk)]


def _copy_for_queries(refs, ring: Ring, place: Place, plan: Plan, use):
    d, count = plan.head_size, _slices_at_once(plan)
    batch, kv_head = place.batch, place.kv_head
    state, begin, end = plan.residual_range(place.lowest, place.lowest + plan.span - 1)
    columns = lambda i: pl.ds(i * d, d)

    def load_state(source, first, use):
        for i in range(count):
            for part in _state_parts(plan):
                ring.load(use, source.at[part, columns(first + i)])
                use += 1
        return use

    for first in range(0, plan.slices, count):
        if plan.reaches_back:

            def load_saved(_, use, first=first):
                for name in ("states", "state_rests")[: plan.state_parts]:
                    use = load_state(refs[name].at[batch, state, kv_head], first, use)
                return use

            use = lax.fori_loop(0, int32(state > 0), load_saved, use)
        for i in range(plan.num_start_tiles):
            use = load_state(refs["start_states"].at[batch, i, kv_head], first, use)
        if plan.reaches_back:

            def edge(j, use, first=first):
                keys = pl.ds(j * plan.chunk, plan.chunk)
                ring.load(use, refs["v"].at[batch, keys, kv_head])
                for i in range(count):
                    ring.load(use + 1 + i, refs["features_k"].at[batch, keys, kv_head, columns(first + i)])
                return use + 1 + count

            use = lax.fori_loop(begin, end, edge, use)
    return use


def _compute_for_queries(
    refs,
    ring: Ring,
    plan: Plan,
    num_tiles: int,
    warpgroup,
    d_tile,
    q_tile,
    stage,
    loaded,
    q_loaded,
    y_tile=None,
    y_rest_tile=None,
    gates=None,
):
    d_tile, q_tile, stage, loaded, q_loaded = (ref.at[warpgroup] for ref in (d_tile, q_tile, stage, loaded, q_loaded))
    y_tiles = [x.at[warpgroup] for x in (y_tile, y_rest_tile) if x is not None]
    d, count, chunk = plan.head_size, _slices_at_once(plan), plan.chunk
    precise_scores = plan.precise or plan.map is None

    def load(place):
        where = place.batch, place.rows, place.head
        plgpu.copy_gmem_to_smem(refs["d_out" if plan.normed else "d_rla"].at[where], d_tile, loaded)
        for y_tile, name in zip(y_tiles, ("y_rla", "y_rla_rest"), strict=False):
            plgpu.copy_gmem_to_smem(refs[name].at[where], y_tile, loaded)

    def load_q(place):
        if plan.map is not None:
            plgpu.copy_gmem_to_smem(refs["q_rla"].at[place.batch, place.rows, place.head], q_tile, q_loaded)

    def columns_of(x, part):
        """Those columns of a part of d_rla that a tile of a state's rows meets."""
        if isinstance(x, jax.Array):
            return lax.slice(x, (0, part.start), (ROWS, part.start + chunk))
        return x.at[:, pl.ds(part.start, chunk)]

    def read_state(d_parts, load_means, reads, grads, use, state_parts: int = 1):
        """grads + d_rla times the transposed (centred) states, for the rows where `reads` is 1."""
        rows = _state_parts(plan)
        states = ring.wait_all(use, len(grads) * len(rows) * state_parts)
        mask_sums = reads is not None and precise_scores  # for masked copies of two parts there are no registers
        if reads is not None and not mask_sums:
            d_parts = [(x.astype(jnp.float32) * across(reads, d)).astype(jnp.bfloat16) for x in d_parts]
        sums = []
        for i, grad in enumerate(grads):
            products = []
            for j in range(state_parts):
                first = (j * len(grads) + i) * len(rows)
                for part, state in zip(rows, states[first : first + len(rows)], strict=True):
                    products += [(columns_of(x, part), state) for x in (d_parts if j == 0 else d_parts[:1])]
            sums.append((grad.shape if mask_sums else grad, products))
        found = (
            [multiply_add(plan.interpret, one) for one in sums] if mask_sums else multiply_add(plan.interpret, *sums)
        )
        found = [found] if len(grads) == 1 and not mask_sums else list(found)
        for i in range(len(states)):
            ring.release(use + i)
        if not plan.sums_to_one:  # the map's Jacobian would remove it
            whole = [x if isinstance(x, jax.Array) else plgpu.load(x, layout=MATRIX) for x in d_parts]
            for i, mean in enumerate(load_means()):
                for x in whole:
                    found[i] += across((x.astype(jnp.float32) * down(mean, ROWS)).sum(axis=1), d)
        if mask_sums:
            found = [grad + x * across(reads, d) for grad, x in zip(grads, found, strict=True)]
        return found, use + len(states)

    def means_of(ref, first):
        return lambda: [plgpu.load(ref.at[first + i], layout=PER_COLUMN, optimized=False) for i in range(count)]

    def one_tile(index, is_last, use):
        place = plan.place(index, warpgroup)
        batch, kv_head, rows, head = place.batch, place.kv_head, place.rows, place.head
        target = lambda name: refs[name].at[batch, rows, head]
        state, begin, end = plan.residual_range(place.lowest, place.lowest + plan.span - 1)
        per_row = lambda ref: plgpu.load(ref, layout=PER_ROW, optimized=False)
        start = per_row(refs["segment_start"].at[batch, rows]) if plan.segmented else None

        if plan.normed:
            r = per_row(refs["r_rla"].at[batch, head, rows])
            is_first = index == axis_index("block")
            sum_rows = lambda x: one_after_the_other(gates, warpgroup, is_first, lambda: x.sum(axis=0))
            gain = plgpu.load(refs["rla_gain"].at[batch, head], layout=PER_COLUMN, optimized=False)
            plgpu.barrier_wait(loaded)
            (d_rla, rest), d_gain, _ = norm_backward(d_tile, y_tiles, r, gain, plan.value_size, plan.eps, sum_rows)
            refs["d_gain"].at[batch, place.row // ROWS, head][...] = d_gain
            send(stage, d_rla, target("d_rla"))
            d_parts = [d_rla]
            if plan.precise:  # multiplied from where it lies
                send(stage, rest, target("d_rest"))
                d_parts.append(stage)
        else:
            plgpu.barrier_wait(loaded)
            d_parts = [plgpu.load(d_tile, layout=MATRIX)]
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
            scores = parts_of(scores, precise_scores)
            sums = [(grad, [(part, x) for part in scores]) for grad, x in zip(grads, features, strict=True)]
            grads = multiply_add(plan.interpret, *sums)
            for i in range(count):
                ring.release(use + 1 + i)
            return [grads] if count == 1 else list(grads), use + 1 + count

        for first in range(0, plan.slices, count):
            grads = [zeros(ROWS, d) for _ in range(count)]
            if plan.reaches_back:
                reads = where_rows(start < state * plan.spacing if plan.segmented else None)
                means = means_of(refs["state_means"].at[batch, state, kv_head], first)
                saved = functools.partial(read_state, d_parts, means, reads, state_parts=plan.state_parts)
                read = lambda _, carry, saved=saved: saved(*carry)
                grads, use = lax.fori_loop(0, int32(state > 0), read, (grads, use))
            for i in range(plan.num_start_tiles):
                reads = where_rows(plan.reads_start(i, start))
                centred = i < plan.num_start_states  # what rounding took has no mean of its own
                means = means_of(refs["start_means"].at[batch, i, kv_head], first) if centred else list
                grads, use = read_state(d_parts if centred else d_parts[:1], means, reads, grads, use)
            if plan.reaches_back:
                grads, use = lax.fori_loop(begin, end, edge, (grads, use))
            if plan.map is None:
                for i, grad in enumerate(grads):
                    refs["dq"].at[batch, rows, head, pl.ds((first + i) * d, d)][...] = grad
        if plan.map is None:
            return use
        plgpu.barrier_wait(q_loaded)
        dq = zeros(ROWS, d)
        for i, grad in enumerate(grads):
            x = plgpu.load(q_tile, layout=MATRIX).astype(jnp.float32)
            x = -x if i else x
            dx = pull_back(plan.map, x, slice_of(plan.map, x), grad)
            dq = dq - dx if i else dq + dx
        load_next(load_q, plan, index, is_last, warpgroup)
        send(stage, dq, target("dq"))
        return use

    first_place = plan.place(axis_index("block"), warpgroup)
    load(first_place)
    load_q(first_place)
    for_each_tile(num_tiles, one_tile, jnp.int32(0))
    if plan.normed:
        close_gates(gates, warpgroup)
