"""The sweep: running sums of phi(x)^T y over the sequence, saved at regular intervals.

Forward it sums keys and values from left to right into the states that queries read; backward it sums queries and
cotangents from right to left into the gradients of those states. So that a single long sequence fills the GPU, the
sequence is cut into pieces: a first launch sums each, a second sweeps every piece from the sum of those before it.

States are kept transposed, [dv, f], and centred: the mean over each slice of f (over the features that are not padding)
is subtracted before rounding to bfloat16 and kept in float32. Otherwise the rounding error would be that of a large
constant part, which softmax's Jacobian removes.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas.hopper.plan import Plan, cdiv
from pallas.hopper.warpgroup import (
    MULTIPROCESSORS,
    PER_ROW,
    ROWS,
    Ring,
    across,
    axis_index,
    launch,
    multiply_add,
    send,
    sign_of,
    slice_of,
    tile,
    to_registers,
    zeros,
)
from pallas.numerics import split


@dataclasses.dataclass(frozen=True)
class Sweep:
    """Interval i covers rows [base + i * spacing, base + (i + 1) * spacing) of x and y, as far as there are rows.

    Either end is rounded up to a multiple of `tile`. Intervals are taken in the order 0, 1, ... (forward: the state
    after interval i is number i + 1) or last, ..., 1 (reverse: the state after interval i is number i).
    """

    plan: Plan
    reverse: bool
    num_rows: int
    group: int  # heads of x and y for each key/value head
    base: int
    tile: int
    num_intervals: int  # to be swept
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
    base = plan.window - 1 - plan.first  # all queries of a tile read the state that the first of them needs
    return Sweep(plan, True, plan.num_queries, plan.group, base, plan.span, plan.num_states - 1, plan.num_states)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SweepInputs:
    x: Any  # [b, rows, heads, d], or features [b, rows, heads, f]
    y: Any  # [b, rows, heads, d]
    y_lo: Any = None  # the second part of y, where that is hi + lo
    row_keep: Any = None  # [b, rows] and [b, intervals]: 0 where a segment ends, else 1 (arrays.py)
    carry_keep: Any = None
    before: Any = None  # [b, pieces, kv, d, f] float32: the sum that each piece starts from; None: 0


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Swept:
    """The results of a sweep: the totals of its pieces, or everything else."""

    totals: Any = None  # [b, pieces, kv, dv, f] float32
    states: Any = None  # [b, num_states, kv, dv, f] bfloat16, centred; number 0, always 0, is not written
    means: Any = None  # [b, num_states, kv, slices, dv] float32
    states_lo: Any = None  # the second part of states, with two `plan.state_parts`
    features: Any = None  # [b, rows, kv, f] bfloat16: phi(x)


def sweep(sweep: Sweep, arrays: SweepInputs, *, save_features: bool = False) -> Swept:
    """The states, and phi(x) with `save_features`; arrays.before is computed here."""
    plan, batch = sweep.plan, arrays.x.shape[0]
    d, f, kv = plan.head_size, plan.num_features, plan.num_kv_heads
    blocks = batch * kv * (plan.slices // sweep.warpgroups)
    length, pieces = _cut(sweep.num_intervals, blocks)
    if pieces > 1:
        totals = Swept(totals=jax.ShapeDtypeStruct((batch, pieces, kv, d, f), jnp.float32))
        totals = _launch(sweep, arrays, totals, length, pieces).totals
        kept = None if arrays.carry_keep is None else _kept(sweep, arrays.carry_keep, length, pieces)
        arrays = dataclasses.replace(arrays, before=_sums_before(totals, kept))
    states = jax.ShapeDtypeStruct((batch, sweep.num_states, kv, d, f), jnp.bfloat16)
    features = jax.ShapeDtypeStruct((batch, sweep.num_rows, kv, f), jnp.bfloat16)
    results = Swept(
        states=states,
        means=jax.ShapeDtypeStruct((batch, sweep.num_states, kv, plan.slices, d), jnp.float32),
        states_lo=states if plan.state_parts > 1 else None,
        features=features if save_features else None,
    )
    return _launch(sweep, arrays, results, length, pieces)


def total(plan: Plan, x, y, *, y_lo=None, row_keep=None):
    """The sum of phi(x)^T y over all rows, transposed: [b, kv, dv, f] float32."""
    intervals = cdiv(plan.num_queries, plan.spacing)
    whole = Sweep(plan, False, plan.num_queries, plan.group, 0, ROWS, intervals, intervals)
    batch = x.shape[0]
    length, pieces = _cut(intervals, batch * plan.num_kv_heads)
    ones = None if row_keep is None else jnp.ones((batch, intervals), jnp.float32)
    arrays = SweepInputs(x, y, y_lo, row_keep, carry_keep=ones)
    shape = (batch, pieces, plan.num_kv_heads, plan.head_size, plan.num_features)
    totals = Swept(totals=jax.ShapeDtypeStruct(shape, jnp.float32))
    return _launch(whole, arrays, totals, length, pieces).totals.sum(axis=1)


def _cut(intervals: int, blocks: int) -> tuple[int, int]:
    """(intervals of a piece, pieces) with which a launch of `blocks` blocks for each piece fills the GPU."""
    length = cdiv(intervals, max(1, min(intervals, MULTIPROCESSORS // blocks)))
    return length, cdiv(intervals, length)


def _kept(sweep: Sweep, carry_keep, length: int, pieces: int):
    """[b, pieces]: 0 where a segment ends inside a piece, so that nothing is carried through it, else 1."""
    order = carry_keep[:, jnp.array([sweep.interval(n) for n in range(sweep.num_intervals)])]
    padding = length * pieces - sweep.num_intervals
    order = jnp.pad(order, ((0, 0), (0, padding)), constant_values=1.0)
    return order.reshape(order.shape[0], pieces, length).prod(axis=2)


def _sums_before(totals, kept):
    """[b, pieces, ...]: the sum that each piece starts from, by additions if there are few, else by one product."""
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


def _launch(sweep: Sweep, arrays: SweepInputs, results: Swept, length: int, pieces: int) -> Swept:
    plan, d = sweep.plan, sweep.plan.head_size
    count = sweep.warpgroups
    scratch = {
        "ring": Ring.scratch(tile(6, ROWS, d), count, plan.interpret),
        "phi_tile": tile(count, ROWS, d),
        "state_tile": tile(count, d, d),
    }
    grid = {
        "kv_head": plan.num_kv_heads,
        "piece": pieces,
        "slices": plan.slices // count,
        "batch": arrays.x.shape[0],
    }
    body = functools.partial(_sweep_piece, sweep=sweep, length=length)
    return launch(body, arrays, results, scratch, grid=grid, warpgroups=count + 1, interpret=plan.interpret)


def _sweep_piece(
    inputs: SweepInputs, outputs: Swept, ring: Ring, phi_tile, state_tile, sweep: Sweep, length: int
) -> None:
    """One piece of the sequence, one or two slices of f: each consumer warpgroup sums one slice."""
    plan, count, d = sweep.plan, sweep.warpgroups, sweep.plan.head_size
    warpgroup, batch, kv_head = (axis_index(name) for name in ("warpgroup", "batch", "kv_head"))
    piece, first_slice = axis_index("piece"), axis_index("slices") * count
    begin = piece * length
    end = jnp.minimum(begin + length, sweep.num_intervals)
    of_y = [ref for ref in (inputs.y, inputs.y_lo) if ref is not None]
    uses = (count if plan.map is None else 1) + len(of_y)  # tiles of one step: x (or its slices), then y

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
                if plan.map is None:
                    for slice_ in range(count):
                        columns = pl.ds((first_slice + slice_) * d, d)
                        ring.load(use + slice_, inputs.x.at[batch, rows, head, columns])
                else:
                    ring.load(use, inputs.x.at[batch, rows, head])
                for i, ref in enumerate(of_y):
                    ring.load(use + uses - len(of_y) + i, ref.at[batch, rows, head])
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
                total = total * inputs.carry_keep[batch, index]

            def step(i, carry):
                total, use = carry
                rows = pl.ds(low + i // sweep.group * ROWS, ROWS)
                tiles = [ring.wait(use + j) for j in range(uses)]
                if plan.map is None:
                    right = ring.slots.at[lax.rem(use + warpgroup, jnp.int32(ring.size))]
                    features = to_registers(right) if plan.segmented else None
                else:
                    x = to_registers(tiles[0]).astype(jnp.float32)
                    features = slice_of(plan.map, x * sign_of(slice_)).astype(jnp.bfloat16)
                    right = phi
                if features is not None:
                    right = phi
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                    if outputs.features is not None:
                        phi[...] = features
                        plgpu.commit_smem()
                        plgpu.copy_smem_to_gmem(phi, outputs.features.at[batch, rows, kv_head, columns])
                    if plan.segmented:
                        keep = to_registers(inputs.row_keep.at[batch, rows], PER_ROW, optimized=False)
                        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                        features = (features.astype(jnp.float32) * across(keep, d)).astype(jnp.bfloat16)
                    if plan.segmented or outputs.features is None:
                        phi[...] = features
                        plgpu.commit_smem()
                ys = [y.transpose((1, 0)) for y in tiles[uses - len(of_y) :]]
                total = multiply_add(plan.interpret, (total, [(y, right) for y in ys]))
                for j in range(uses):
                    ring.release(use + j)
                return total, use + uses

            total, use = lax.fori_loop(0, num_steps, step, (total, use))
            if outputs.states is not None:
                slot = index if sweep.reverse else index + 1

                @pl.when(slot < sweep.num_states)
                def _():
                    mean = total.sum(axis=1) / plan.features_of(slice_)
                    centred = total - across(mean, d)
                    parts = split(centred, outputs.states_lo is not None)
                    for ref, part in zip((outputs.states, outputs.states_lo), parts, strict=False):
                        send(state, part, ref.at[batch, slot, kv_head, :, columns])
                    outputs.means.at[batch, slot, kv_head, slice_][...] = mean

            return total, use

        start = zeros(d, d)
        if inputs.before is not None:
            before = inputs.before.at[batch, piece, kv_head, :, columns]
            start = to_registers(before, optimized=False)
        total, _ = lax.fori_loop(begin, end, interval, (start, jnp.int32(0)))
        if outputs.totals is not None:
            outputs.totals.at[batch, piece, kv_head, :, columns][...] = total
        plgpu.wait_smem_to_gmem(0)
