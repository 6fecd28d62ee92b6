"""Gradients of the residual branch for keys and values: the second of its two backward kernels. No atomics.

The gradients of the states come from the reverse sweep (state_sweep.py).
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas.hopper.plan import Plan, int32
from pallas.hopper.warpgroup import (
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
    to_registers,
    zeros,
)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KeyInputs:
    d_rla: Any
    d_rla_lo: Any  # with `plan.precise`
    queries: Any  # q_rla or, where features are operands, features_q
    k_rla: Any  # None where features are operands
    features_k: Any
    v: Any
    row_keep: Any = None  # [b, s]: arrays.py's key_keep
    segment_start: Any = None
    d_states: Any = None  # the reverse sweep's, as the next two
    d_states_lo: Any = None
    d_means: Any = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KeyOutputs:
    dk: Any  # [b, s, kv, d] bfloat16 or, where features are operands, their gradient [b, s, kv, f] float32
    dv: Any  # [b, s, kv, d] bfloat16; of the kernel, where features are operands, [b, slices, s, kv, d] float32


def key_gradients(arrays: KeyInputs, plan: Plan) -> KeyOutputs:
    """Gradients for keys and values, summed over the group in float32. Each consumer warpgroup takes a slice of phi."""
    d, count = plan.head_size, plan.slices_at_once
    batch = arrays.v.shape[0]
    stages = 2 * (count + 1) if plan.map is None else 4 + plan.precise  # shared memory has no room for more
    scratch = {
        "ring": Ring.scratch(tile(stages, ROWS, d), count, plan.interpret),
        "v_tile": tile(ROWS, d),
        "features_tile": tile(count, ROWS, d),
        "state_tile": tile(count, d, d),
        "loaded": plgpu.Barrier(num_arrivals=1 + count),  # v and features are there
        "state_full": plgpu.Barrier(num_arrivals=count),  # the state's gradient is there: hi, then lo
        "final": plgpu.Barrier(num_barriers=count),  # k_rla is there, in the place of features
    }
    if plan.map is None:
        scratch["state_free"] = plgpu.Barrier(num_arrivals=count)  # hi has been read
    else:
        scratch["phi_tile"] = tile(count, ROWS, d)
        scratch["exchanged"] = plgpu.Barrier(num_arrivals=count)  # terms for the other warpgroup are there
    parts = plan.slices // count
    kv = plan.num_kv_heads
    grid = {"kv_head": kv, "block": plan.num_keys // ROWS, "part": parts, "batch": batch}
    width, dtype = (plan.num_features, jnp.float32) if plan.map is None else (d, jnp.bfloat16)
    dv_shape, dv_dtype = (batch, plan.num_keys, kv, d), jnp.bfloat16
    if plan.map is None:
        dv_shape, dv_dtype = (batch, plan.slices, plan.num_keys, kv, d), jnp.float32
    outputs = KeyOutputs(
        dk=jax.ShapeDtypeStruct((batch, plan.num_keys, kv, width), dtype),
        dv=jax.ShapeDtypeStruct(dv_shape, dv_dtype),
    )
    body = functools.partial(_residual_key_gradients, plan=plan)
    results = launch(body, arrays, outputs, scratch, grid=grid, warpgroups=count + 1, interpret=plan.interpret)
    if plan.map is None:
        return dataclasses.replace(results, dv=results.dv.sum(axis=1).astype(jnp.bfloat16))
    return results


def _residual_key_gradients(inputs: KeyInputs, outputs: KeyOutputs, ring: Ring, plan: Plan, **scratch) -> None:
    warpgroup, batch, kv_head = (axis_index(name) for name in ("warpgroup", "batch", "kv_head"))
    count, group = plan.slices_at_once, plan.group
    first_slice = axis_index("part") * count
    key = axis_index("block") * ROWS
    begin, end = (x * group for x in plan.residual_queries(key))
    state = key // plan.spacing + 1  # the first saved one whose sum includes these keys
    read = int32(state < plan.num_states) if plan.num_states > 1 else None
    place = lambda step: (pl.ds(step // group * ROWS, ROWS), kv_head * group + step % group)
    where = batch, kv_head, first_slice, key, begin, end, state, read, place

    @pl.when(warpgroup == count)
    def _():
        plgpu.set_max_registers(24, action="decrease")
        _copy_for_keys(inputs, ring, where, plan, **scratch)

    @pl.when(warpgroup < count)
    def _():
        plgpu.set_max_registers(240, action="increase")
        _compute_for_keys(inputs, outputs, ring, where, plan, warpgroup, **scratch)


def _copy_for_keys(
    inputs: KeyInputs,
    ring: Ring,
    where,
    plan: Plan,
    v_tile,
    features_tile,
    state_tile,
    loaded,
    state_full,
    state_free: Any = None,
    **_,
) -> None:
    """Producer: values, features and the state's gradient once, then queries and cotangents through the ring."""
    batch, kv_head, first_slice, key, begin, end, state, read, place = where
    d, count = plan.head_size, plan.slices_at_once
    keys = pl.ds(key, ROWS)
    columns = [pl.ds((first_slice + i) * d, d) for i in range(count)]
    plgpu.copy_gmem_to_smem(inputs.v.at[batch, keys, kv_head], v_tile, loaded)
    for i in range(count):
        plgpu.copy_gmem_to_smem(inputs.features_k.at[batch, keys, kv_head, columns[i]], features_tile.at[i], loaded)

    if read is not None:

        @pl.when(read > 0)
        def _():
            for part, d_states in enumerate((inputs.d_states, inputs.d_states_lo)[: plan.state_parts]):
                if part > 0:
                    plgpu.barrier_wait(state_free)
                for i in range(count):
                    source = d_states.at[batch, state, kv_head, :, columns[i]]
                    plgpu.copy_gmem_to_smem(source, state_tile.at[i], state_full)

    def step(i, use):
        rows, head = place(i)
        if plan.map is None:
            for column in columns:
                ring.load(use, inputs.queries.at[batch, rows, head, column])
                use += 1
        else:
            ring.load(use, inputs.queries.at[batch, rows, head])
            use += 1
        for d_out in (inputs.d_rla, inputs.d_rla_lo)[: 1 + plan.precise]:
            ring.load(use, d_out.at[batch, rows, head])
            use += 1
        return use

    ring.drain(lax.fori_loop(begin, end, step, jnp.int32(0)))


def _compute_for_keys(
    inputs: KeyInputs,
    outputs: KeyOutputs,
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
    state_free: Any = None,
    phi_tile: Any = None,
    exchanged: Any = None,
) -> None:
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
        mean = to_registers(inputs.d_means.at[batch, state, kv_head, slice_], PER_COLUMN, optimized=False)
        if plan.sums_to_one:
            dv += down(mean, ROWS)
        else:
            dv += across(to_registers(features).astype(jnp.float32).sum(axis=1), d) * down(mean, ROWS)
            v = to_registers(v_tile).astype(jnp.float32)
            d_phi += across((v * down(mean, ROWS)).sum(axis=1), d)
        if plan.segmented:
            keep = to_registers(inputs.row_keep.at[batch, keys], PER_ROW, optimized=False)
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
            x = to_registers(tiles[0]).astype(jnp.float32) * sign_of(slice_)
            phi[...] = slice_of(plan.map, x).astype(jnp.bfloat16)
            plgpu.commit_smem()
        scores, d_scores = multiply_add(
            plan.interpret,
            (square, [(features, phi.transpose((1, 0)))]),
            (square, [(v_tile, x.transpose((1, 0))) for x in d_outs]),
        )
        queries, _ = place(i)
        distance = plan.first + queries.start - key + iota(*square, 1) - iota(*square, 0)
        seen = distance >= plan.window
        if plan.segmented:
            start = to_registers(inputs.segment_start.at[batch, queries], PER_COLUMN, optimized=False)
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
        outputs.dk.at[batch, keys, kv_head, pl.ds(slice_ * d, d)][...] = d_phi
        outputs.dv.at[batch, slice_, keys, kv_head][...] = dv
        return
    plgpu.copy_gmem_to_smem(inputs.k_rla.at[batch, keys, kv_head], features, final.at[warpgroup])
    plgpu.barrier_wait(final.at[warpgroup])
    sign = sign_of(slice_)
    x = to_registers(features).astype(jnp.float32) * sign
    dk = pull_back(plan.map, x, slice_of(plan.map, x), d_phi) * sign
    if count == 1:
        for value, output in ((dk, outputs.dk), (dv, outputs.dv)):
            send(phi_tile.at[warpgroup], value, output.at[batch, keys, kv_head])
    else:
        # Each warpgroup has a term of dv and one of dk, of its own slice of phi. Warpgroup 0 adds up dv and warpgroup 1
        # dk: each passes its term of the other's sum through shared memory.
        @pl.when(warpgroup == 0)
        def _():
            phi_tile.at[0][...] = dk.astype(jnp.bfloat16)

        @pl.when(warpgroup == 1)
        def _():
            phi_tile.at[1][...] = dv.astype(jnp.bfloat16)

        plgpu.barrier_arrive(exchanged)
        plgpu.barrier_wait(exchanged)
        for mine, value, output in ((0, dv, outputs.dv), (1, dk, outputs.dk)):

            @pl.when(warpgroup == mine)
            def _(mine=mine, value=value, output=output):
                other = to_registers(phi_tile.at[1 - mine]).astype(jnp.float32)
                send(features_tile.at[mine], value + other, output.at[batch, keys, kv_head])

    plgpu.wait_smem_to_gmem(0)
