"""The forward kernel: both branches, both norms and one store, for 64 queries of two heads (or 128 of one).

Two warpgroups compute, one copies. Each compute warpgroup walks over the blocks of keys in its window with an online
softmax, reads the state that the sweep (state_sweep.py) saved behind the window, and the blocks between that state and
the window's edge through a masked product. Notebook 03 walks through this file.
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
    LARGEST,
    LOG2E,
    MASKED,
    MATRIX,
    PER_COLUMN,
    PER_ROW,
    ROWS,
    Ring,
    across,
    axis_index,
    down,
    for_each_tile,
    iota,
    launch,
    load_next,
    load_normed,
    multiply_add,
    pack_normed,
    parts_of,
    resident_blocks,
    send,
    slice_of,
    step_of_normed,
    tile,
    unpack_normed,
    where_rows,
    zero_rows,
    zeros,
)


def forward(arrays: dict, plan: Plan, *, save: bool) -> dict:
    """out [b, t, h, dv] and, with `save`, what the backward pass reads.

    arrays: q, k, v; q_rla or features_q; features_k, states, state_rests with two `plan.state_parts`, state_means;
    start_states, start_means; segment_start; swa_gain, rla_gain. Those that the plan does without are None.
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
            outputs |= {f"y_{branch}": by_head, f"r_{branch}": per_query}  # y packed
        if plan.precise:
            outputs["y_rla_rest"] = by_head  # what packing took from y_rla, packed
    elif save and plan.local:
        outputs["rest"] = by_head  # what rounding took from out
    gains = [name for name in ("swa_gain", "rla_gain") if arrays.get(name) is not None]
    scratch = {
        "ring": Ring.scratch(tile(plan.stages, plan.chunk, d), consumers=2),
        "q_tile": tile(2, ROWS, d),
        "q_rla_tile": tile(2, ROWS, d),
        "stage": tile(2, ROWS, d),
        "loaded": plgpu.Barrier(num_barriers=2),
        "rla_loaded": plgpu.Barrier(num_barriers=2),
        "turn": plgpu.Barrier(num_arrivals=2),
    }
    if gains:
        scratch["gain_rows"] = plgpu.SMEM((2, 2, d), jnp.float32)
        scratch["gains_loaded"] = plgpu.Barrier(num_barriers=2, num_arrivals=len(gains))
    num_tiles = plan.num_tiles(batch)
    grid = {"block": resident_blocks(num_tiles, plan.interpret)}
    body = functools.partial(_forward_block, plan=plan, save=save, num_tiles=num_tiles)
    return launch(body, arrays, outputs, scratch, grid=grid, warpgroups=3, interpret=plan.interpret, reduction_bytes=0)


def _forward_block(refs, ring, plan: Plan, save: bool, num_tiles: int, **scratch):
    """A block stays on its multiprocessor and takes one tile of queries after the other, copies running ahead."""
    warpgroup = axis_index("warpgroup")
    ring = Ring(*ring, plan.interpret)

    @pl.when(warpgroup < 2)
    def _():
        plgpu.set_max_registers(240, action="increase")
        compute = _Compute(refs, ring, plan, save, warpgroup, **scratch)
        compute.load_queries(plan.place(axis_index("block"), warpgroup))
        for_each_tile(num_tiles, compute.tile, jnp.int32(0))
        plgpu.wait_smem_to_gmem(0)

    @pl.when(warpgroup == 2)
    def _():
        plgpu.set_max_registers(24, action="decrease")
        copy = lambda index, _, use: _copy(refs, ring, plan.place(index, 0), plan, use)
        ring.drain(for_each_tile(num_tiles, copy, jnp.int32(0)))


def _rounds(plan: Plan):
    """Which slices of phi are held at once: [(first, count)]."""
    return [(i, min(2, plan.slices - i)) for i in range(0, plan.slices, 2)]


def _copy(refs, ring: Ring, place: Place, plan: Plan, use):
    """The third warpgroup: ask for every tile in the order of its use."""
    batch, kv_head, lowest = place.batch, place.kv_head, place.lowest
    rows = lambda j: pl.ds(j * plan.chunk, plan.chunk)
    if plan.local:
        begin, _, _, end = plan.window_range(lowest, lowest + plan.span - 1)

        def key_block(j, use):
            ring.load(use, refs["k"].at[batch, rows(j), kv_head])
            ring.load(use + 1, refs["v"].at[batch, rows(j), kv_head])
            return use + 2

        use = lax.fori_loop(begin, end, key_block, use)
    if not plan.residual:
        return use
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

            def load_saved(_, use, load_state=load_state):
                for name in ("states", "state_rests")[: plan.state_parts]:
                    use = load_state(refs[name].at[batch, state, kv_head], use)
                return use

            use = lax.fori_loop(0, int32(state > 0), load_saved, use)
        for i in range(plan.num_start_tiles):
            use = load_state(refs["start_states"].at[batch, i, kv_head], use)
        if plan.reaches_back:
            use = lax.fori_loop(begin, end, edge_block, use)
    return use


@dataclasses.dataclass(frozen=True)
class _Compute:
    """One of the two warpgroups that compute, and the memory it uses."""

    refs: dict
    ring: Ring
    plan: Plan
    save: bool
    warpgroup: Any
    q_tile: Any
    q_rla_tile: Any
    stage: Any
    loaded: Any
    rla_loaded: Any
    turn: Any
    gain_rows: Any = None
    gains_loaded: Any = None

    def mine(self, ref):
        return ref.at[self.warpgroup]

    def load_queries(self, place: Place) -> None:
        self.load_q(place)
        self.load_q_rla(place)
        self.load_gains(place)

    def load_q(self, place: Place) -> None:
        if self.plan.local:
            source = self.refs["q"].at[place.batch, place.rows, place.head]
            plgpu.copy_gmem_to_smem(source, self.mine(self.q_tile), self.mine(self.loaded))

    def load_q_rla(self, place: Place) -> None:
        if self.plan.residual and self.plan.map is not None:
            source = self.refs["q_rla"].at[place.batch, place.rows, place.head]
            plgpu.copy_gmem_to_smem(source, self.mine(self.q_rla_tile), self.mine(self.rla_loaded))

    def load_gains(self, place: Place) -> None:
        for i, name in enumerate(("swa_gain", "rla_gain")):
            if name in self.refs:
                source = self.refs[name].at[place.batch, place.head]
                plgpu.copy_gmem_to_smem(source, self.gain_rows.at[self.warpgroup, i], self.mine(self.gains_loaded))

    def gained(self, x, branch: int):
        gain = plgpu.load(self.gain_rows.at[self.warpgroup, branch], layout=PER_COLUMN)
        return x * down(gain, ROWS)

    def norm(self, x):
        """(x / rms(x), 1 / rms(x)) of [ROWS, d]."""
        r = lax.rsqrt((x * x).sum(axis=1) * (1.0 / self.plan.value_size) + self.plan.eps)
        return x * across(r, x.shape[1]), r

    def put(self, value, name: str | None, place: Place) -> None:
        """Into the stage, and from there to `name`."""
        target = None if name is None else self.refs[name].at[place.batch, place.rows, place.head]
        send(self.mine(self.stage), value, target)

    def put_rows(self, value, name: str, place: Place) -> None:
        if self.save:
            self.refs[name].at[place.batch, place.head, place.rows][...] = value

    def tile(self, index, is_last, use):
        """All of one tile of queries. The next one's queries are asked for as soon as their place is free."""
        plan = self.plan
        place = plan.place(index, self.warpgroup)
        start = None  # the first key of each query's segment
        if plan.segmented:
            source = self.refs["segment_start"].at[place.batch, place.rows]
            start = plgpu.load(source, layout=PER_ROW, optimized=False)

        ahead = lambda load: load_next(load, plan, index, is_last, self.warpgroup)
        out = step = None
        if plan.local:
            plgpu.barrier_wait(self.mine(self.loaded))
            out, lse, use = _window(
                self.ring, place, plan, self.mine(self.q_tile), start, use, self.warpgroup, self.turn
            )
            ahead(self.load_q)
            self.put_rows(lse, "lse", place)
            if plan.normed:
                out, r = self.norm(out)
                self.put_rows(r, "r_swa", place)
                if plan.residual or self.save:  # out of the registers until the end
                    step = step_of_normed(r, plan.value_size, plan.eps)
                    self.put(pack_normed(out, step), "y_swa" if self.save else None, place)
        if plan.residual:
            o_rla, use = _residual(self, place, start, use, ahead)
            if plan.normed:
                o_rla, r = self.norm(o_rla)
                self.put_rows(r, "r_rla", place)
            if plan.local:
                out = load_normed(self.mine(self.stage), step)
            if plan.normed and self.save:
                step = step_of_normed(r, plan.value_size, plan.eps)
                packed = pack_normed(o_rla, step)
                self.put(packed, "y_rla", place)
                if plan.precise:
                    rest = pack_normed(o_rla - unpack_normed(packed, step), step * (1.0 / LARGEST))
                    self.put(rest, "y_rla_rest", place)
        if plan.normed:
            plgpu.barrier_wait(self.mine(self.gains_loaded))
            terms = [self.gained(out, 0)] if plan.local else []
            terms += [self.gained(o_rla, 1)] if plan.residual else []
            out = terms[0] if len(terms) == 1 else terms[0] + terms[1]
            ahead(self.load_gains)
        elif plan.residual:
            out = o_rla
        self.put(out, "out", place)
        if self.save and plan.local and not plan.normed:
            self.put(parts_of(out, True)[1], "rest", place)
        return use


def _window(ring: Ring, place: Place, plan: Plan, q_tile, start, use, warpgroup, turn):
    """Softmax attention over the window: (o_swa [ROWS, d], log2 of the sum of exp2 of the logits [ROWS], uses)."""
    lowest, position, d, chunk = place.lowest, place.position, plan.head_size, plan.chunk
    scale = LOG2E * (plan.scale if plan.scale > 0 else 1.0)  # after the maximum, where it costs nothing
    begin, unmasked, masked_again, end = plan.window_range(lowest, lowest + plan.span - 1)

    def take_turns():  # one warpgroup's softmax runs beside the other's products
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

            logits = pl.run_scoped(product, plgpu.ACC((ROWS, columns), jnp.float32))
        ring.release(use)
        if not plan.scale > 0:
            logits *= plan.scale
        if masked:
            ahead = position - key + iota(ROWS, columns, 0) - iota(ROWS, columns, 1)
            seen = (ahead >= 0) & (ahead < plan.window)
            if plan.segmented:
                seen &= iota(ROWS, columns, 1) + key >= across(start, columns)
            logits = jnp.where(seen, logits, MASKED)
        higher = jnp.maximum(highest, logits.max(axis=1) * scale)
        shrink = jnp.exp2(highest - higher)
        weights = jnp.exp2(logits * scale - across(higher, columns))
        if masked:
            weights = jnp.where(seen, weights, 0.0)  # a row may have met no key yet
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
    carry = zeros(ROWS, d), zero_rows(ROWS, MASKED), zero_rows(ROWS), use
    masked, plain = functools.partial(block, masked=True), functools.partial(block, masked=False)
    last_half = jnp.int32(0)
    if chunk > ROWS:
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


def _residual(compute: _Compute, place: Place, start, use, ahead):
    """phi(q) times the saved state, plus the masked product with the blocks on the window's edge: [ROWS, d]."""
    refs, ring, plan = compute.refs, compute.ring, compute.plan
    batch, kv_head, position = place.batch, place.kv_head, place.position
    d, chunk = plan.head_size, plan.chunk
    q_rla_tile, loaded = compute.mine(compute.q_rla_tile), compute.mine(compute.rla_loaded)
    state, begin, end = plan.residual_range(place.lowest, place.lowest + plan.span - 1)
    out = zeros(ROWS, d)

    def features(i):  # slice i of phi(q): bfloat16 in registers, and the sums of its rows
        if plan.map is None:
            source = refs["features_q"].at[batch, place.rows, place.head, pl.ds(i * d, d)]
            plgpu.commit_smem()
            plgpu.copy_gmem_to_smem(source, q_rla_tile, loaded)
            plgpu.barrier_wait(loaded)
            phi = plgpu.load(q_rla_tile, layout=MATRIX)
        else:
            x = plgpu.load(q_rla_tile, layout=MATRIX).astype(jnp.float32)
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

    def load_means(ref, first, count):  # ahead of their use: they come from device memory
        means = [plgpu.load(ref.at[first + i], layout=PER_COLUMN, optimized=False) for i in range(count)]
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
        scores = parts_of(jnp.where(seen, scores, 0.0), plan.map is None)
        out = multiply_add(plan.interpret, (out, [(part, tiles[-1]) for part in scores]))
        ring.release(use + count)
        return out, use + count + 1

    last_half = jnp.int32(0)
    if chunk > ROWS and plan.reaches_back:
        _, last_half = plan.half_blocks(begin * chunk, place.lowest + plan.span - 1 - plan.window, begin, end)
    if plan.map is not None:
        plgpu.barrier_wait(loaded)
    for first, count in _rounds(plan):
        if plan.reaches_back:
            means = load_means(refs["state_means"].at[batch, state, kv_head], first, count)
        phis = [features(first + i) for i in range(count)]
        if plan.map is not None:
            ahead(compute.load_q_rla)
        if plan.reaches_back:
            reads = where_rows(start < state * plan.spacing if plan.segmented else None)
            saved = functools.partial(read_state, phis, means, reads, parts=plan.state_parts)
            out, use = lax.fori_loop(0, int32(state > 0), lambda _, carry, saved=saved: saved(*carry), (out, use))
        for i in range(plan.num_start_tiles):
            reads = where_rows(plan.reads_start(i, start))
            centred = i < plan.num_start_states  # what rounding took has no mean of its own
            means = load_means(refs["start_means"].at[batch, i, kv_head], first, count) if centred else []
            out, use = read_state(phis, means, reads, out, use)
        if plan.reaches_back:
            carry = lax.fori_loop(begin, end - last_half, functools.partial(edge, phis=phis), (out, use))
            if chunk > ROWS:
                carry = lax.fori_loop(end - last_half, end, functools.partial(edge, phis=phis, half=0), carry)
            out, use = carry
    return out, use
