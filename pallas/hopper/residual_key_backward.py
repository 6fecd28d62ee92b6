"""Gradients of residual linear attention for keys and values: the second of its two backward kernels. No atomics.

The gradients of the states come from the reverse sweep (state_sweep.py).
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas.hopper.plan import Plan, int32
from pallas.hopper.warpgroup import (
    MATRIX,
    PER_COLUMN,
    PER_ROW,
    ROWS,
    Ring,
    across,
    axis_index,
    down,
    iota,
    launch,
    multiply_add,
    pull_back,
    send,
    sign_of,
    slice_of,
    tile,
    zeros,
)


def key_gradients(arrays: dict, plan: Plan):
    """(dk_rla [b, s, kv, d] bfloat16 or the gradient of given features [b, s, kv, f] float32, dv [b, s, kv, d]).

    Each warpgroup takes a slice of phi. arrays: d_rla, with `plan.precise` d_rest; q_rla and k_rla, or features_q;
    features_k, v; d_states, d_rests, d_means: the reverse sweep's; row_keep [b, s], segment_start.
    """
    d, count = plan.head_size, plan.slices_at_once
    batch = arrays["v"].shape[0]
    stages = 2 * (count + 1) if plan.map is None else 4 + plan.precise  # more do not fit beside two slices of phi
    scratch = {
        "ring": Ring.scratch(tile(stages, ROWS, d), consumers=count),
        "v_tile": tile(ROWS, d),
        "features_tile": tile(count, ROWS, d),
        "state_tile": tile(count, d, d),
        "loaded": plgpu.Barrier(num_arrivals=1 + count),
        "state_full": plgpu.Barrier(num_arrivals=count),
        "final": plgpu.Barrier(num_barriers=count),
    }
    if plan.map is None:
        scratch["state_free"] = plgpu.Barrier(num_arrivals=count)
    else:
        scratch["phi_tile"] = tile(count, ROWS, d)
        scratch["exchanged"] = plgpu.Barrier(num_arrivals=count)
    parts = plan.slices // count
    kv = plan.num_kv_heads
    grid = {"kv_head": kv, "block": plan.num_keys // ROWS, "part": parts, "batch": batch}
    width, dtype = (plan.num_features, jnp.float32) if plan.map is None else (d, jnp.bfloat16)
    outputs = {"dk": jax.ShapeDtypeStruct((batch, plan.num_keys, kv, width), dtype)}
    if plan.map is None:
        outputs["dv"] = jax.ShapeDtypeStruct((batch, plan.slices, plan.num_keys, kv, d), jnp.float32)
    else:
        outputs["dv"] = jax.ShapeDtypeStruct((batch, plan.num_keys, kv, d), jnp.bfloat16)
    body = functools.partial(_residual_key_gradients, plan=plan)
    results = launch(body, arrays, outputs, scratch, grid=grid, warpgroups=count + 1, interpret=plan.interpret)
    dk, dv = results["dk"], results["dv"]
    return dk, dv.sum(axis=1).astype(jnp.bfloat16) if plan.map is None else dv


def _residual_key_gradients(refs, plan: Plan, ring, **scratch):
    warpgroup, batch, kv_head = (axis_index(name) for name in ("warpgroup", "batch", "kv_head"))
    ring = Ring(*ring, plan.interpret)
    count, group = plan.slices_at_once, plan.group
    first_slice = axis_index("part") * count
    key = axis_index("block") * ROWS
    begin, end = (x * group for x in plan.residual_queries(key))
    state = key // plan.spacing + 1  # the first that holds these keys
    read = int32(state < plan.num_states) if plan.num_states > 1 else None
    place = lambda step: (pl.ds(step // group * ROWS, ROWS), kv_head * group + step % group)
    where = batch, kv_head, first_slice, key, begin, end, state, read, place

    @pl.when(warpgroup == count)
    def _():
        plgpu.set_max_registers(24, action="decrease")
        _copy_for_keys(refs, ring, where, plan, **scratch)

    @pl.when(warpgroup < count)
    def _():
        plgpu.set_max_registers(240, action="increase")
        _compute_for_keys(refs, ring, where, plan, warpgroup, **scratch)


def _copy_for_keys(
    refs, ring: Ring, where, plan: Plan, v_tile, features_tile, state_tile, loaded, state_full, state_free=None, **_
):
    batch, kv_head, first_slice, key, begin, end, state, read, place = where
    d, count = plan.head_size, plan.slices_at_once
    keys = pl.ds(key, ROWS)
    columns = [pl.ds((first_slice + i) * d, d) for i in range(count)]
    plgpu.copy_gmem_to_smem(refs["v"].at[batch, keys, kv_head], v_tile, loaded)
    for i in range(count):
        plgpu.copy_gmem_to_smem(refs["features_k"].at[batch, keys, kv_head, columns[i]], features_tile.at[i], loaded)

    if read is not None:

        @pl.when(read > 0)
        def _():
            for part, name in enumerate(("d_states", "d_rests")[: plan.state_parts]):
                if part > 0:
                    plgpu.barrier_wait(state_free)
                for i in range(count):
                    source = refs[name].at[batch, state, kv_head, :, columns[i]]
                    plgpu.copy_gmem_to_smem(source, state_tile.at[i], state_full)

    def step(i, use):
        rows, head = place(i)
        if plan.map is None:
            for column in columns:
                ring.load(use, refs["features_q"].at[batch, rows, head, column])
                use += 1
        else:
            ring.load(use, refs["q_rla"].at[batch, rows, head])
            use += 1
        for name in ("d_rla", "d_rest")[: 1 + plan.precise]:
            ring.load(use, refs[name].at[batch, rows, head])
            use += 1
        return use

    ring.drain(lax.fori_loop(begin, end, step, jnp.int32(0)))


def _compute_for_keys(
    refs,
    ring: Ring,
    where,
    plan: Plan,
    warpgroup,
    v_tile,
    features_tile,
    state_tile,
    loaded,
    state_full,
    final,
    state_free=None,
    phi_tile=None,
    exchanged=None,
):
    batch, kv_head, first_slice, key, begin, end, state, read, place = where
    d, count = plan.head_size, plan.slices_at_once
    of_x = 1 if plan.map is not None else count
    uses = of_x + 1 + plan.precise
    keys, square = pl.ds(key, ROWS), (ROWS, ROWS)
    slice_ = first_slice + warpgroup
    features, state_slice = features_tile.at[warpgroup], state_tile.at[warpgroup]
    plgpu.barrier_wait(loaded)

    def read_state(_, carry):
        d_phi, dv = carry
        for part in range(plan.state_parts):
            if part > 0:
                plgpu.commit_smem()
                plgpu.barrier_arrive(state_free)
            plgpu.barrier_wait(state_full)
            d_phi, dv = multiply_add(
                plan.interpret, (d_phi, [(v_tile, state_slice)]), (dv, [(features, state_slice.transpose((1, 0)))])
            )
        mean = plgpu.load(refs["d_means"].at[batch, state, kv_head, slice_], layout=PER_COLUMN, optimized=False)
        if plan.sums_to_one:
            dv += down(mean, ROWS)
        else:
            dv += across(plgpu.load(features, layout=MATRIX).astype(jnp.float32).sum(axis=1), d) * down(mean, ROWS)
            v = plgpu.load(v_tile, layout=MATRIX).astype(jnp.float32)
            d_phi += across((v * down(mean, ROWS)).sum(axis=1), d)
        if plan.segmented:
            keep = plgpu.load(refs["row_keep"].at[batch, keys], layout=PER_ROW, optimized=False)
            d_phi, dv = d_phi * across(keep, d), dv * across(keep, d)
        return d_phi, dv

    def step(i, carry):  # everything transposed: rows are keys, columns queries
        d_phi, dv, use = carry
        tiles = [ring.wait(use + j) for j in range(uses)]
        d_outs = tiles[of_x:]
        if plan.map is None:
            phi = ring.slots.at[lax.rem(use + warpgroup, jnp.int32(ring.size))]
        else:
            phi = phi_tile.at[warpgroup]
            x = plgpu.load(tiles[0], layout=MATRIX).astype(jnp.float32) * sign_of(slice_)
            phi[...] = slice_of(plan.map, x).astype(jnp.bfloat16)
            plgpu.commit_smem()
        scores, d_scores = multiply_add(
            plan.interpret,
            (square, [(features, phi.transpose((1, 0)))]),
            (square, [(v_tile, x.transpose((1, 0))) for x in d_outs]),
        )
        queries, _ = place(i)
        ahead = plan.first + queries.start - key + iota(*square, 1) - iota(*square, 0)
        seen = ahead >= plan.window
        if plan.segmented:
            start = plgpu.load(refs["segment_start"].at[batch, queries], layout=PER_COLUMN, optimized=False)
            seen &= iota(*square, 0) + key >= down(start, ROWS)
        scores, d_scores = (jnp.where(seen, x, 0.0).astype(jnp.bfloat16) for x in (scores, d_scores))
        dv, d_phi = multiply_add(plan.interpret, (dv, [(scores, d_outs[0])]), (d_phi, [(d_scores, phi)]))
        for j in range(uses):
            ring.release(use + j)
        return d_phi, dv, use + uses

    carry = zeros(ROWS, d), zeros(ROWS, d)
    if read is not None:
        carry = lax.fori_loop(0, read, read_state, carry)
    d_phi, dv, _ = lax.fori_loop(begin, end, step, (*carry, jnp.int32(0)))
    if plan.map is None:
        refs["dk"].at[batch, keys, kv_head, pl.ds(slice_ * d, d)][...] = d_phi
        refs["dv"].at[batch, slice_, keys, kv_head][...] = dv
        return
    plgpu.copy_gmem_to_smem(refs["k_rla"].at[batch, keys, kv_head], features, final.at[warpgroup])
    plgpu.barrier_wait(final.at[warpgroup])
    sign = sign_of(slice_)
    x = plgpu.load(features, layout=MATRIX).astype(jnp.float32) * sign
    dk = pull_back(plan.map, x, slice_of(plan.map, x), d_phi) * sign
    if count == 1:
        for value, name in ((dk, "dk"), (dv, "dv")):
            send(phi_tile.at[warpgroup], value, refs[name].at[batch, keys, kv_head])
    else:
        # Warpgroup 0 adds up dv, warpgroup 1 dk: each hands its part of the other's sum over.
        @pl.when(warpgroup == 0)
        def _():
            phi_tile.at[0][...] = dk.astype(jnp.bfloat16)

        @pl.when(warpgroup == 1)
        def _():
            phi_tile.at[1][...] = dv.astype(jnp.bfloat16)

        plgpu.barrier_arrive(exchanged)
        plgpu.barrier_wait(exchanged)
        for mine, value, name in ((0, dv, "dv"), (1, dk, "dk")):

            @pl.when(warpgroup == mine)
            def _(mine=mine, value=value, name=name):
                other = plgpu.load(phi_tile.at[1 - mine], layout=MATRIX).astype(jnp.float32)
                send(features_tile.at[mine], value + other, refs[name].at[batch, keys, kv_head])

    plgpu.wait_smem_to_gmem(0)
