"""The forward kernel: both branches, both norms and one store, for 64 queries of two heads (or 128 of one).

Two warpgroups compute, one copies. Each compute warpgroup walks over the blocks of keys in its window with an online
softmax, reads the state that the sweep (sweep_gpu.py) saved behind the window, and the blocks between that state and the
window's edge through a masked product. Notebook 03 walks through this file.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas.plan_gpu import Plan, int32
from pallas.warpgroup_gpu import (
    LOG2E,
    MASKED,
    MATRIX,
    PER_COLUMN,
    PER_ROW,
    ROWS,
    Ring,
    across,
    down,
    iota,
    launch,
    multiply_add,
    sign_of,
    tile,
    zero_rows,
    zeros,
)


def forward(arrays: dict, plan: Plan, *, save: bool) -> dict:
    """out [b, t, h, dv] and, with `save`, what the backward pass reads.

    arrays: q, k, v; q_rla or features_q; features_k, states, state_means; start_states, start_means; segment_start;
    swa_gain, rla_gain. Those that the plan does without are None.
    """
    batch = arrays["v"].shape[0]
    heads, d = plan.num_heads, plan.head_size
    by_head = jax.ShapeDtypeStruct((batch, plan.num_queries, heads, d), jnp.bfloat16)
    per_query = jax.ShapeDtypeStruct((batch, heads, plan.num_queries), jnp.float32)
    outputs = {"out": by_head}
    if save and plan.local:
        outputs["lse"] = per_query
    if save and plan.normed:
        for branch in ["swa"] * plan.local + ["rla"] * plan.residual:
            outputs |= {f"y_{branch}": by_head, f"r_{branch}": per_query}
    scratch = {
        "ring": Ring.scratch(tile(plan.stages, plan.chunk, d), consumers=2),
        "loaded": plgpu.Barrier(num_barriers=4),  # q of both warpgroups, q_rla of both
        "q_tile": tile(2, ROWS, d),
        "q_rla_tile": tile(2, ROWS, d),
        "turn": plgpu.Barrier(num_arrivals=2),
    }
    grid = {"head": heads // 2 if plan.pair else heads, "tile": plan.num_queries // plan.span, "batch": batch}
    body = functools.partial(_forward_block, plan=plan, save=save)
    return launch(body, arrays, outputs, scratch, grid=grid, warpgroups=3, interpret=plan.interpret)


def _forward_block(refs, ring, plan: Plan, save: bool, **scratch):
    warpgroup, batch = lax.axis_index("warpgroup"), lax.axis_index("batch")
    ring = Ring(*ring)
    lowest = plan.first + lax.axis_index("tile") * plan.span
    kv_head = lax.axis_index("head") * (2 if plan.pair else 1) // plan.group
    where = batch, kv_head, lowest

    @pl.when(warpgroup < 2)
    def _():
        plgpu.set_max_registers(240, action="increase")
        _compute(refs, ring, where, plan, save, warpgroup, **scratch)

    @pl.when(warpgroup == 2)
    def _():
        plgpu.set_max_registers(24, action="decrease")
        _copy(refs, ring, where, plan)


def _rounds(plan: Plan):
    """Which slices of phi are held at once: [(first, count)]."""
    return [(i, min(2, plan.slices - i)) for i in range(0, plan.slices, 2)]


def _copy(refs, ring: Ring, where, plan: Plan):
    """The third warpgroup: ask for every tile in the order of its use."""
    batch, kv_head, lowest = where
    rows = lambda j: pl.ds(j * plan.chunk, plan.chunk)
    use = jnp.int32(0)
    if plan.local:
        begin, _, _, end = plan.window_range(lowest, lowest + plan.span - 1)

        def key_block(j, use):
            ring.load(use, refs["k"].at[batch, rows(j), kv_head])
            ring.load(use + 1, refs["v"].at[batch, rows(j), kv_head])
            return use + 2

        use = lax.fori_loop(begin, end, key_block, use)
    if not plan.residual:
        return ring.drain(use)
    state, begin, end = plan.residual_range(lowest, lowest + plan.span - 1)
    d = plan.head_size
    columns = lambda i: pl.ds(i * d, d)
    for first, count in _rounds(plan):

        def load_state(source, use, first=first, count=count):
            for i in range(count):
                ring.load(use + i, source.at[:, columns(first + i)], d)
            return use + count

        def edge_block(j, use, first=first, count=count):
            for i in range(count):
                ring.load(use + i, refs["features_k"].at[batch, rows(j), kv_head, columns(first + i)])
            ring.load(use + count, refs["v"].at[batch, rows(j), kv_head])
            return use + count + 1

        if plan.reaches_back:
            saved = refs["states"].at[batch, state, kv_head]
            use = lax.fori_loop(0, int32(state > 0), lambda _, use, saved=saved: load_state(saved, use), use)
        for i in range(plan.num_start_states):
            use = load_state(refs["start_states"].at[batch, i, kv_head], use)
        if plan.reaches_back:
            use = lax.fori_loop(begin, end, edge_block, use)
    ring.drain(use)


def _compute(refs, ring: Ring, where, plan: Plan, save: bool, warpgroup, **scratch):
    batch, kv_head, lowest = where
    d = plan.head_size
    head = lax.axis_index("head") * 2 + warpgroup if plan.pair else lax.axis_index("head")
    row = plan.first_row(lax.axis_index("tile"), warpgroup)
    rows, position = pl.ds(row, ROWS), plan.first + row  # of this warpgroup's queries
    q_tile, q_rla_tile = scratch["q_tile"].at[warpgroup], scratch["q_rla_tile"].at[warpgroup]
    loaded = scratch["loaded"]
    if plan.local:
        plgpu.copy_gmem_to_smem(refs["q"].at[batch, rows, head], q_tile, loaded.at[warpgroup])
    if plan.residual and plan.map is not None:
        plgpu.copy_gmem_to_smem(refs["q_rla"].at[batch, rows, head], q_rla_tile, loaded.at[2 + warpgroup])
    start = None  # the first key of each query's segment
    if plan.segmented:
        start = plgpu.load(refs["segment_start"].at[batch, rows], layout=PER_ROW, optimized=False)
    where = batch, kv_head, head, rows, lowest, position
    use = jnp.int32(0)

    def norm(x):  # [ROWS, d] -> (x / rms(x), 1 / rms(x))
        r = lax.rsqrt((x * x).sum(axis=1) * (1.0 / plan.value_size) + plan.eps)
        return x * across(r, d), r

    def gained(x, name):
        gain = plgpu.load(refs[name].at[batch, head], layout=PER_COLUMN, optimized=False)
        return x * down(gain, ROWS)

    def store(value, name, through):
        through[...] = value.astype(jnp.bfloat16)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(through, refs[name].at[batch, rows, head])

    def store_rows(value, name):
        refs[name].at[batch, head, rows][...] = value

    out = None
    if plan.local:
        plgpu.barrier_wait(loaded.at[warpgroup])
        out, lse, use = _window(ring, where, plan, q_tile, start, use, warpgroup, scratch["turn"])
        if save:
            store_rows(lse, "lse")
        if plan.normed:
            out, r = norm(out)
            q_tile[...] = out.astype(jnp.bfloat16)  # out of the registers until the end
            plgpu.commit_smem()
            if save:
                plgpu.copy_smem_to_gmem(q_tile, refs["y_swa"].at[batch, rows, head])
                store_rows(r, "r_swa")
            if not plan.residual:
                out = gained(out, "swa_gain")
    if plan.residual:
        if plan.map is not None:
            plgpu.barrier_wait(loaded.at[2 + warpgroup])
        tiles = q_rla_tile, loaded.at[2 + warpgroup]
        out = _residual(refs, ring, where, plan, tiles, start, use)
        if plan.normed:
            out, r = norm(out)
            if save:
                store(out, "y_rla", q_rla_tile)
                store_rows(r, "r_rla")
            out = gained(out, "rla_gain")
            if plan.local:
                y_swa = plgpu.load(q_tile, layout=MATRIX).astype(jnp.float32)
                out += gained(y_swa, "swa_gain")
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    store(out, "out", q_tile)
    plgpu.wait_smem_to_gmem(0)


def _window(ring: Ring, where, plan: Plan, q_tile, start, use, warpgroup, turn):
    """Softmax attention over the window: (o_swa [ROWS, d], log2 of the sum of exp2 of the logits [ROWS], uses)."""
    *_, lowest, position = where
    d, chunk = plan.head_size, plan.chunk
    scale = LOG2E * (plan.scale if plan.scale > 0 else 1.0)  # after the maximum, where it costs nothing
    begin, unmasked, masked_again, end = plan.window_range(lowest, lowest + plan.span - 1)

    def take_turns():  # one warpgroup's softmax runs beside the other's products
        if not plan.interpret:
            plgpu.barrier_arrive(turn)
            plgpu.barrier_wait(turn)

    def block(j, carry, masked: bool):
        out, highest, total, use = carry
        keys = ring.wait(use)
        if plan.interpret:
            logits = multiply_add(True, ((ROWS, chunk), [(q_tile, keys.transpose((1, 0)))]))
        else:

            def product(ref):
                plgpu.wgmma(ref, q_tile, keys.transpose((1, 0)))
                take_turns()
                return ref[...]

            logits = pl.run_scoped(product, plgpu.ACC((ROWS, chunk), jnp.float32))
        ring.release(use)
        if not plan.scale > 0:
            logits *= plan.scale
        if masked:
            ahead = position - j * chunk + iota(ROWS, chunk, 0) - iota(ROWS, chunk, 1)
            seen = (ahead >= 0) & (ahead < plan.window)
            if plan.segmented:
                seen &= iota(ROWS, chunk, 1) + j * chunk >= across(start, chunk)
            logits = jnp.where(seen, logits, MASKED)
        higher = jnp.maximum(highest, logits.max(axis=1) * scale)
        shrink = jnp.exp2(highest - higher)
        weights = jnp.exp2(logits * scale - across(higher, chunk))
        if masked:
            weights = jnp.where(seen, weights, 0.0)  # a row may have met no key yet
        out *= across(shrink, d)
        total = total * shrink + weights.sum(axis=1)
        weights = weights.astype(jnp.bfloat16)
        if not plan.interpret:
            out, total, higher, weights = lax.optimization_barrier((out, total, higher, weights))
            plgpu.barrier_arrive(turn)
        values = ring.wait(use + 1)
        if not plan.interpret:
            plgpu.barrier_wait(turn)
        out = multiply_add(plan.interpret, (out, [(weights, values)]))
        ring.release(use + 1)
        return out, higher, total, use + 2

    if not plan.interpret:
        pl.when(warpgroup == 1)(take_turns)
    carry = zeros(ROWS, d), zero_rows(ROWS, MASKED), zero_rows(ROWS), use
    carry = lax.fori_loop(begin, unmasked, functools.partial(block, masked=True), carry)
    if not plan.segmented:
        carry = lax.fori_loop(unmasked, masked_again, functools.partial(block, masked=False), carry)
        carry = lax.fori_loop(masked_again, end, functools.partial(block, masked=True), carry)
    out, highest, total, use = carry
    if not plan.interpret:
        pl.when(warpgroup == 0)(take_turns)
    return out * across(1.0 / total, d), highest + jnp.log2(total), use


def _residual(refs, ring: Ring, where, plan: Plan, tiles, start, use):
    """phi(q) times the saved state, plus the masked product with the blocks on the window's edge: [ROWS, d]."""
    batch, kv_head, head, rows, lowest, position = where
    q_rla_tile, loaded = tiles
    d, chunk = plan.head_size, plan.chunk
    state, begin, end = plan.residual_range(lowest, lowest + plan.span - 1)
    out = zeros(ROWS, d)

    def features(i):  # slice i of phi(q): bfloat16 in registers, and the sums of its rows
        if plan.map is None:
            plgpu.copy_gmem_to_smem(refs["features_q"].at[batch, rows, head, pl.ds(i * d, d)], q_rla_tile, loaded)
            plgpu.barrier_wait(loaded)
            phi = plgpu.load(q_rla_tile, layout=MATRIX)
        else:
            x = plgpu.load(q_rla_tile, layout=MATRIX).astype(jnp.float32)
            phi = plan.map.function(-x if i else x).astype(jnp.bfloat16)
        if plan.sums_to_one:
            return phi, zero_rows(ROWS, 1.0)
        return phi, phi.astype(jnp.float32).sum(axis=1)

    def read_state(phis, means, first, reads, out, use):
        """out + phi(q) (centred state + its mean), for the rows where `reads` is 1."""
        products = []
        for i, (phi, total) in enumerate(phis):
            mean = plgpu.load(means.at[first + i], layout=PER_COLUMN, optimized=False)
            if reads is not None:
                phi, total = (phi.astype(jnp.float32) * across(reads, d)).astype(jnp.bfloat16), total * reads
            products.append((phi, ring.wait(use + i, d).transpose((1, 0))))
            out += across(total, d) * down(mean, ROWS)
        out = multiply_add(plan.interpret, (out, products))
        for i in range(len(phis)):
            ring.release(use + i)
        return out, use + len(phis)

    def flag(condition):
        return jnp.where(condition, zero_rows(ROWS, 1.0), zero_rows(ROWS))

    for first, count in _rounds(plan):
        phis = [features(first + i) for i in range(count)]
        if plan.reaches_back:
            reads = flag(start < state * plan.spacing) if plan.segmented else None

            def saved(_, carry, phis=phis, first=first, reads=reads):
                return read_state(phis, refs["state_means"].at[batch, state, kv_head], first, reads, *carry)

            out, use = lax.fori_loop(0, int32(state > 0), saved, (out, use))
        for i in range(plan.num_start_states):
            reads = None
            if plan.num_start_states > 1:
                reads = flag(start > 0 if i else start <= 0)
            out, use = read_state(phis, refs["start_means"].at[batch, i, kv_head], first, reads, out, use)
        if plan.reaches_back:

            def edge(j, carry, phis=phis, count=count):
                out, use = carry
                products = [(phi, ring.wait(use + i).transpose((1, 0))) for i, (phi, _) in enumerate(phis)]
                scores = multiply_add(plan.interpret, ((ROWS, chunk), products))
                for i in range(count):
                    ring.release(use + i)
                ahead = position - j * chunk + iota(ROWS, chunk, 0) - iota(ROWS, chunk, 1)
                seen = ahead >= plan.window
                if plan.segmented:
                    seen &= iota(ROWS, chunk, 1) + j * chunk >= across(start, chunk)
                scores = jnp.where(seen, scores, 0.0).astype(jnp.bfloat16)
                out = multiply_add(plan.interpret, (out, [(scores, ring.wait(use + count))]))
                ring.release(use + count)
                return out, use + count + 1

            out, use = lax.fori_loop(begin, end, edge, (out, use))
    return out
