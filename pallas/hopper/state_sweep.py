"""The sweep: running sums of phi(x)^T y over the sequence, saved at regular places.

Forward it sums keys and values from left to right into the states that queries read; backward it sums queries and
cotangents from right to left into the gradients of those states. So that a single long sequence fills the chip, the
sequence is cut into pieces: a first launch sums each, a second sweeps every piece from the sum of those before it.

States are kept transposed, [dv, f], and centred: the mean over each slice of f (over those that are not padding) is
taken out before rounding to bfloat16 and kept in float32. Rounding would otherwise fall on a large constant part,
which the softmax map's Jacobian removes.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas.hopper.plan import Plan, cdiv
from pallas.hopper.warpgroup import (
    MATRIX,
    MULTIPROCESSORS,
    PER_ROW,
    ROWS,
    Ring,
    across,
    axis_index,
    launch,
    multiply_add,
    parts_of,
    send,
    sign_of,
    slice_of,
    tile,
    zeros,
)


@dataclasses.dataclass(frozen=True)
class Sweep:
    """Interval i covers rows [base + i * spacing, base + (i + 1) * spacing) of x and y, as far as there are rows.

    Either end is rounded up to a multiple of `tile`.

    Intervals are taken in the order 0, 1, ... (forward: the state after interval i is number i + 1) or last, ..., 1
    (reverse: the state after interval i is number i).
    """

    plan: Plan
    reverse: bool
    num_rows: int
    group: int  # heads of x and y for each key/value head
    base: int
    tile: int
    num_intervals: int  # that are swept
    num_states: int

    @property
    def warpgroups(self) -> int:
        return self.plan.slices_at_once

    def interval(self, n):
        """The n-th to be swept."""
        return self.num_states - 1 - n if self.reverse else n

    def rows_of(self, n):
        begin = self.base + self.interval(n) * self.plan.spacing
        whole = lambda row: jnp.minimum(cdiv(jnp.maximum(row, 0), self.tile) * self.tile, self.num_rows)
        return whole(begin), whole(begin + self.plan.spacing)


def key_sweep(plan: Plan) -> Sweep:
    intervals = cdiv(plan.first + plan.num_queries - plan.window, plan.spacing)  # all keys of any residual set
    return Sweep(plan, False, plan.num_keys, 1, 0, ROWS, intervals, plan.num_states)


def query_sweep(plan: Plan) -> Sweep:
    base = plan.window - 1 - plan.first  # a tile's queries all read the state that its lowest one needs
    return Sweep(plan, True, plan.num_queries, plan.group, base, plan.span, plan.num_states - 1, plan.num_states)


def sweep(sweep: Sweep, x, y, *, y_rest=None, row_keep=None, carry_keep=None, save_features: bool = False) -> dict:
    """states [b, num_states, kv, dv, f] (number 0 is not written), means [b, num_states, kv, slices, dv], features.

    With two `plan.state_parts` also state_rests, what rounding took from the states.

    x: [b, rows, heads, d], or features [b, rows, heads, f]; y: [b, rows, heads, d], y_rest what rounding took from it;
    row_keep [b, rows] and carry_keep [b, intervals]: 0 where a segment ends, else 1.
    """
    plan, batch = sweep.plan, x.shape[0]
    d, f, kv = plan.head_size, plan.num_features, plan.num_kv_heads
    arrays = {"x": x, "y": y, "y_rest": y_rest, "row_keep": row_keep, "carry_keep": carry_keep}
    blocks = batch * kv * (plan.slices // sweep.warpgroups)
    length = cdiv(
        sweep.num_intervals, max(1, min(sweep.num_intervals, MULTIPROCESSORS // blocks))
    )  # intervals of a piece
    pieces = cdiv(sweep.num_intervals, length)
    before = None
    if pieces > 1:
        totals = jax.ShapeDtypeStruct((batch, pieces, kv, d, f), jnp.float32)
        totals = _launch(sweep, arrays, {"totals": totals}, length, pieces)["totals"]
        kept = None if carry_keep is None else _kept(sweep, carry_keep, length, pieces)
        before = _sums_before(totals, kept)
    outputs = {
        "states": jax.ShapeDtypeStruct((batch, sweep.num_states, kv, d, f), jnp.bfloat16),
        "means": jax.ShapeDtypeStruct((batch, sweep.num_states, kv, plan.slices, d), jnp.float32),
    }
    if plan.state_parts > 1:
        outputs["state_rests"] = outputs["states"]
    if save_features:
        outputs["features"] = jax.ShapeDtypeStruct((batch, sweep.num_rows, kv, f), jnp.bfloat16)
    return _launch(sweep, arrays | {"before": before}, outputs, length, pieces)


def total(plan: Plan, x, y, *, y_rest=None, row_keep=None):
    """The sum of phi(x)^T y over all rows, transposed: [b, kv, dv, f] float32."""
    intervals = cdiv(plan.num_queries, plan.spacing)
    whole = Sweep(plan, False, plan.num_queries, plan.group, 0, ROWS, intervals, intervals)
    batch = x.shape[0]
    length = cdiv(intervals, max(1, min(intervals, MULTIPROCESSORS // (batch * plan.num_kv_heads))))
    pieces = cdiv(intervals, length)
    ones = None if row_keep is None else jnp.ones((batch, intervals), jnp.float32)
    arrays = {"x": x, "y": y, "y_rest": y_rest, "row_keep": row_keep, "carry_keep": ones}
    shape = (batch, pieces, plan.num_kv_heads, plan.head_size, plan.num_features)
    outputs = {"totals": jax.ShapeDtypeStruct(shape, jnp.float32)}
    return _launch(whole, arrays, outputs, length, pieces)["totals"].sum(axis=1)


def _kept(sweep: Sweep, carry_keep, length: int, pieces: int):
    """[b, pieces]: 1 where what comes into a piece also comes out of it, 0 where a segment ends inside."""
    order = carry_keep[:, jnp.array([sweep.interval(n) for n in range(sweep.num_intervals)])]
    padding = length * pieces - sweep.num_intervals
    order = jnp.pad(order, ((0, 0), (0, padding)), constant_values=1.0)
    return order.reshape(order.shape[0], pieces, length).prod(axis=2)


def _sums_before(totals, kept):
    """[b, pieces, ...]: the sum that each piece starts from. A short chain of additions, or one small product."""
    pieces = totals.shape[1]
    if pieces <= 8:
        before = [jnp.zeros_like(totals[:, 0])]
        for piece in range(pieces - 1):
            carried = before[-1] if kept is None else before[-1] * kept[:, piece, None, None, None]
            before.append(carried + totals[:, piece])
        return jnp.stack(before, axis=1)
    earlier = jnp.broadcast_to(jnp.tril(jnp.ones((pieces, pieces), jnp.float32), -1), (totals.shape[0], pieces, pieces))
    if kept is not None:
        p, q, n = jnp.meshgrid(*(jnp.arange(pieces),) * 3, indexing="ij")
        earlier = earlier * jnp.where((q < n) & (n < p), kept[:, None, None, :], 1.0).prod(axis=3)
    return jnp.einsum("bpq,bqkvf->bpkvf", earlier, totals, precision="highest")


def _launch(sweep: Sweep, arrays: dict, outputs: dict, length: int, pieces: int) -> dict:
    plan, d = sweep.plan, sweep.plan.head_size
    count = sweep.warpgroups
    scratch = {
        "ring": Ring.scratch(tile(6, ROWS, d), consumers=count),
        "phi_tile": tile(count, ROWS, d),
        "state_tile": tile(count, d, d),
    }
    grid = {
        "kv_head": plan.num_kv_heads,
        "piece": pieces,
        "slices": plan.slices // count,
        "batch": arrays["x"].shape[0],
    }
    body = functools.partial(_sweep_piece, sweep=sweep, length=length, outputs=tuple(outputs))
    return launch(body, arrays, outputs, scratch, grid=grid, warpgroups=count + 1, interpret=plan.interpret)


def _sweep_piece(refs, ring, phi_tile, state_tile, sweep: Sweep, length: int, outputs: tuple):
    plan, count, d = sweep.plan, sweep.warpgroups, sweep.plan.head_size
    warpgroup, batch, kv_head = (axis_index(name) for name in ("warpgroup", "batch", "kv_head"))
    piece, first_slice = axis_index("piece"), axis_index("slices") * count
    ring = Ring(*ring, plan.interpret)
    begin = piece * length
    end = jnp.minimum(begin + length, sweep.num_intervals)
    given = plan.map is None
    of_y = [name for name in ("y", "y_rest") if name in refs]
    uses = (count if given else 1) + len(of_y)  # tiles of one step: x (or its slices), then y

    def steps(n):
        low, high = sweep.rows_of(n)
        return low, (high - low) // ROWS * sweep.group

    @pl.when(warpgroup == count)
    def _():
        plgpu.set_max_registers(24, action="decrease")

        def interval(n, use):
            low, num_steps = steps(n)

            def step(i, use):
                rows, head = pl.ds(low + i // sweep.group * ROWS, ROWS), kv_head * sweep.group + i % sweep.group
                if given:
                    for slice_ in range(count):
                        columns = pl.ds((first_slice + slice_) * d, d)
                        ring.load(use + slice_, refs["x"].at[batch, rows, head, columns])
                else:
                    ring.load(use, refs["x"].at[batch, rows, head])
                for i, name in enumerate(of_y):
                    ring.load(use + uses - len(of_y) + i, refs[name].at[batch, rows, head])
                return use + uses

            return lax.fori_loop(0, num_steps, step, use)

        ring.drain(lax.fori_loop(begin, end, interval, jnp.int32(0)))

    @pl.when(warpgroup < count)
    def _():
        plgpu.set_max_registers(240, action="increase")
        slice_ = first_slice + warpgroup
        columns = pl.ds(slice_ * d, d)
        phi, state = phi_tile.at[warpgroup], state_tile.at[warpgroup]

        def interval(n, carry):
            total, use = carry
            low, num_steps = steps(n)
            index = sweep.interval(n)
            if plan.segmented:
                total = total * refs["carry_keep"][batch, index]

            def step(i, carry):
                total, use = carry
                rows = pl.ds(low + i // sweep.group * ROWS, ROWS)
                tiles = [ring.wait(use + j) for j in range(uses)]
                if given:
                    right = ring.slots.at[lax.rem(use + warpgroup, jnp.int32(ring.size))]
                    features = plgpu.load(right, layout=MATRIX) if plan.segmented else None
                else:
                    x = plgpu.load(tiles[0], layout=MATRIX).astype(jnp.float32)
                    features = slice_of(plan.map, x * sign_of(slice_)).astype(jnp.bfloat16)
                    right = phi
                if features is not None:
                    right = phi
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                    if "features" in outputs:
                        phi[...] = features
                        plgpu.commit_smem()
                        plgpu.copy_smem_to_gmem(phi, refs["features"].at[batch, rows, kv_head, columns])
                    if plan.segmented:
                        keep = plgpu.load(refs["row_keep"].at[batch, rows], layout=PER_ROW, optimized=False)
                        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                        features = (features.astype(jnp.float32) * across(keep, d)).astype(jnp.bfloat16)
                    if plan.segmented or "features" not in outputs:
                        phi[...] = features
                        plgpu.commit_smem()
                ys = [y.transpose((1, 0)) for y in tiles[uses - len(of_y) :]]
                total = multiply_add(plan.interpret, (total, [(y, right) for y in ys]))
                for j in range(uses):
                    ring.release(use + j)
                return total, use + uses

            total, use = lax.fori_loop(0, num_steps, step, (total, use))
            if "states" in outputs:
                slot = index if sweep.reverse else index + 1

                @pl.when(slot < sweep.num_states)
                def _():
                    mean = total.sum(axis=1) / plan.features_of(slice_)
                    centred = total - across(mean, d)
                    tiles = parts_of(centred, "state_rests" in outputs)
                    for name, part in zip(("states", "state_rests"), tiles, strict=False):
                        send(state, part, refs[name].at[batch, slot, kv_head, :, columns])
                    refs["means"].at[batch, slot, kv_head, slice_][...] = mean

            return total, use

        start = zeros(d, d)
        if "before" in refs:
            before = refs["before"].at[batch, piece, kv_head, :, columns]
            start = plgpu.load(before, layout=MATRIX, optimized=False)
        total, _ = lax.fori_loop(begin, end, interval, (start, jnp.int32(0)))
        if "totals" in outputs:
            refs["totals"].at[batch, piece, kv_head, :, columns][...] = total
        plgpu.wait_smem_to_gmem(0)
