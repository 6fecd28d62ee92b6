"""The residual branch in the forward kernel: which tiles its producer copies, and a consumer warpgroup's products.

A query reads the last state that was saved before the end of its residual set, by one product with phi(q). The keys
between that state and the end of the set (the edge) it reads by a masked product, block by block.
"""

import functools

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas.hopper.plan import Place, Plan, int32
from pallas.hopper.warpgroup import (
    PER_COLUMN,
    ROWS,
    Ring,
    across,
    down,
    iota,
    multiply_add,
    slice_of,
    to_registers,
    where_rows,
    zero_rows,
    zeros,
)
from pallas.numerics import split


def _rounds(plan: Plan) -> list:
    """Which slices of phi are in registers at once: [(first, count)]."""
    return [(i, min(2, plan.slices - i)) for i in range(0, plan.slices, 2)]


def copy(inputs, ring: Ring, place: Place, plan: Plan, use):
    """Producer: for each round the states, then the edge's features and values, in the order in which `read` reads."""
    batch, kv_head, d = place.batch, place.kv_head, plan.head_size
    state, begin, end = plan.residual_range(place.lowest, place.lowest + plan.span - 1)
    columns = lambda i: pl.ds(i * d, d)
    for first, count in _rounds(plan):

        def load_state(source, use, first=first, count=count):
            for i in range(count):
                ring.load(use + i, source.at[:, columns(first + i)], d)
            return use + count

        def edge_block(j, use, first=first, count=count):
            keys = pl.ds(j * plan.chunk, plan.chunk)
            for i in range(count):
                ring.load(use + i, inputs.features.at[batch, keys, kv_head, columns(first + i)])
            ring.load(use + count, inputs.v.at[batch, keys, kv_head])
            return use + count + 1

        if plan.reaches_back:

            def load_saved(_, use, load_state=load_state):
                for states in (inputs.states, inputs.states_lo)[: plan.state_parts]:
                    use = load_state(states.at[batch, state, kv_head], use)
                return use

            use = lax.fori_loop(0, int32(state > 0), load_saved, use)
        for i in range(plan.num_start_tiles):
            use = load_state(inputs.start_states.at[batch, i, kv_head], use)
        if plan.reaches_back:
            use = lax.fori_loop(begin, end, edge_block, use)
    return use


def read(inputs, ring: Ring, place: Place, plan: Plan, q_tile, loaded, start, use, q_is_read):
    """phi(q) times the states and times the edge: (o_rla [ROWS, d], uses).

    q_tile: the warpgroup's q_rla in shared memory, there once `loaded` completes; `q_is_read()` allows to overwrite it.
    If features are operands, their slices pass through q_tile instead. start: as in window_forward.py.
    """
    batch, kv_head, position = place.batch, place.kv_head, place.position
    d, chunk = plan.head_size, plan.chunk
    state, begin, end = plan.residual_range(place.lowest, place.lowest + plan.span - 1)
    out = zeros(ROWS, d)

    def features(i):
        """Slice i of phi(q): bfloat16 in registers, and the sums of its rows."""
        if plan.map is None:
            source = inputs.features_q.at[batch, place.rows, place.head, pl.ds(i * d, d)]
            plgpu.commit_smem()
            plgpu.copy_gmem_to_smem(source, q_tile, loaded)
            plgpu.barrier_wait(loaded)
            phi = to_registers(q_tile)
        else:
            x = to_registers(q_tile).astype(jnp.float32)
            phi = slice_of(plan.map, -x if i else x).astype(jnp.bfloat16)
        if plan.sums_to_one:
            return phi, zero_rows(ROWS, 1.0)
        return phi, phi.astype(jnp.float32).sum(axis=1)

    def read_state(phis, means, reads, out, use, parts: int = 1):
        """out + phi(q) (centred state + its mean), for the rows where `reads` is 1. parts: tiles of each slice."""
        states, products, constants = ring.wait_all(use, parts * len(phis), d), [], []
        for i, (phi, total) in enumerate(phis):
            if reads is not None:
                phi, total = (phi.astype(jnp.float32) * across(reads, d)).astype(jnp.bfloat16), total * reads
            products += [(phi, state.transpose((1, 0))) for state in states[i :: len(phis)]]
            constants.append(total)
        out = multiply_add(plan.interpret, (out, products))
        for i in range(len(states)):
            ring.release(use + i)
        if plan.sums_to_one:
            out += across(constants[0], d) * down(means[0], ROWS)
        else:
            for total, mean in zip(constants, means, strict=bool(means)):
                out += across(total, d) * down(mean, ROWS)
        return out, use + len(states)

    def load_means(ref, first, count):  # well before their use: they come from device memory
        means = [to_registers(ref.at[first + i], PER_COLUMN, optimized=False) for i in range(count)]
        return [means[0] + means[1]] if plan.sums_to_one and count == 2 else means

    def edge(j, carry, phis, half: int | None = None):
        out, use = carry
        key, columns, count = j * chunk, chunk, len(phis)
        tiles = ring.wait_all(use, count + 1)
        if half is not None:
            key, columns = key + half * ROWS, ROWS
            tiles = [x.at[pl.ds(half * ROWS, ROWS)] for x in tiles]
        products = [(phi, x.transpose((1, 0))) for (phi, _), x in zip(phis, tiles[:-1], strict=True)]
        scores = multiply_add(plan.interpret, ((ROWS, columns), products))
        for i in range(count):
            ring.release(use + i)
        seen = position - key + iota(ROWS, columns, 0) - iota(ROWS, columns, 1) >= plan.window
        if plan.segmented:
            seen &= iota(ROWS, columns, 1) + key >= across(start, columns)
        scores = split(jnp.where(seen, scores, 0.0), plan.map is None)
        out = multiply_add(plan.interpret, (out, [(part, tiles[-1]) for part in scores]))
        ring.release(use + count)
        return out, use + count + 1

    last_half = jnp.int32(0)
    if chunk > ROWS and plan.reaches_back:  # half of the last block may lie outside: it is not multiplied
        _, last_half = plan.half_blocks(begin * chunk, place.lowest + plan.span - 1 - plan.window, begin, end)
    if plan.map is not None:
        plgpu.barrier_wait(loaded)
    for first, count in _rounds(plan):
        means = []
        if plan.reaches_back:
            means = load_means(inputs.state_means.at[batch, state, kv_head], first, count)
        phis = [features(first + i) for i in range(count)]
        if plan.map is not None:
            q_is_read()
        if plan.reaches_back:
            reads = where_rows(start < state * plan.spacing if start is not None else None)
            saved = functools.partial(read_state, phis, means, reads, parts=plan.state_parts)
            out, use = lax.fori_loop(0, int32(state > 0), lambda _, carry, saved=saved: saved(*carry), (out, use))
        for i in range(plan.num_start_tiles):
            reads = where_rows(plan.reads_start(i, start))
            is_hi = i < plan.num_start_states  # lo has no mean of its own
            means = load_means(inputs.start_means.at[batch, i, kv_head], first, count) if is_hi else []
            out, use = read_state(phis, means, reads, out, use)
        if plan.reaches_back:
            carry = lax.fori_loop(begin, end - last_half, functools.partial(edge, phis=phis), (out, use))
            if chunk > ROWS:
                carry = lax.fori_loop(end - last_half, end, functools.partial(edge, phis=phis, half=0), carry)
            out, use = carry
    return out, use
