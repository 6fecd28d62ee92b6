"""One token of a whole layer and batch in two launches: both branches of `rattention_step`, their norms and their sum.

The first has many small blocks of two kinds. One kind adds the key that leaves the ring to a tile of the state and
multiplies phi(q) by the sum; the other reads a part of the ring (step_window.py). The second launch adds up what they
found, and puts the new token into the ring, which no block reads any more.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas.feature_map import IN_KERNELS, KernelMap
from pallas.hopper.step_window import (
    Cut,
    Parts,
    accumulate,
    attend,
    beside,
    column_of,
    columns_for,
    put_transposed,
    row,
    turn_ring,
    window_scratch,
)
from pallas.hopper.warpgroup import (
    MASKED,
    PER_COLUMN,
    ROWS,
    across,
    axis_index,
    down,
    iota,
    launch,
    multiply_add,
    sign_of,
    slice_of,
    tile,
    to_registers,
    zeros,
)
from pallas.numerics import split


@dataclasses.dataclass(frozen=True)
class StepPlan:
    """Static facts of a call."""

    window: int
    num_heads: int
    num_kv_heads: int
    head_size: int  # of q, k and v after padding: 64 or 128
    value_size: int  # of v before padding, over which the norms average
    num_features: int  # a multiple of ROWS
    map_name: str | None  # a key of feature_map.IN_KERNELS, or None: XLA computes phi, and features are operands
    scale: float
    eps: float
    interpret: bool

    @property
    def group(self) -> int:
        return self.num_heads // self.num_kv_heads

    @property
    def columns(self) -> int:
        return columns_for(self.group)

    @property
    def tiles(self) -> int:
        """Of a key/value head's state."""
        return self.num_features // ROWS

    @property
    def map(self) -> KernelMap | None:
        return None if self.map_name is None else IN_KERNELS[self.map_name]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StepInputs:
    """Of the token; gains may have a batch axis of 1. Fields are in the order of the kernel's operands."""

    features_k: Any = None  # [b, kv, f] float32: phi of the key that leaves, of a feature map that XLA computes
    features_q: Any = None  # [b, h, f] float32: phi(q_rla), likewise
    k: Any = None  # [b, kv, d], without a ring None
    k_rla: Any = None  # [b, kv, d], where it is not k
    length: Any = None  # [b] int32
    q: Any = None  # [b, h, d]
    q_rla: Any = None  # [b, h, d], of a feature map that the kernel computes
    rla_gain: Any = None  # [b or 1, h, d] float32
    swa_gain: Any = None
    v: Any = None  # [b, kv, d]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Memory:
    """What the kernels change in place. Without a ring, the state alone."""

    keys: Any = None  # [b, slots, kv, d]; slots: the window, at least ROWS
    keys_rla: Any = None
    state: Any = None  # [b, kv, f, d] float32
    values: Any = None

    @property
    def ring_rla(self):
        return self.keys if self.keys_rla is None else self.keys_rla


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Found:
    """By the blocks of the first launch."""

    rla: Any  # [b, tiles, kv, d, columns] float32: phi(q) times a tile of the state
    swa: Any = None  # Parts


def step(plan: StepPlan, inputs: StepInputs, memory: Memory):
    """(out [b, h, d], the memory after the token)."""
    (batch, kv, d), h, n = inputs.v.shape, plan.num_heads, plan.columns
    ring, state = dataclasses.replace(memory, state=None), memory.state
    cut = Cut.of(memory.keys.shape[1], batch * kv) if plan.window else None
    of_state = {
        "state": tile(ROWS, d, dtype=jnp.float32),
        "halves": [tile(ROWS, d), tile(ROWS, d)],
        "phi_tile": tile(n, ROWS),
    }
    kinds = [of_state] if cut is None else [of_state, window_scratch(plan, cut)]
    scratch = {"kinds": plgpu.RefUnion(*kinds), "landed": plgpu.Barrier(num_barriers=2)}
    found = Found(jax.ShapeDtypeStruct((batch, plan.tiles, kv, d, n), jnp.float32))
    if cut is not None:
        found = dataclasses.replace(found, swa=Parts.shapes(plan, batch, cut.parts))
    settings: Any = dict(warpgroups=1, interpret=plan.interpret)
    body = functools.partial(_step_block, plan=plan, cut=cut)
    grid = {"kv_head": kv, "item": plan.tiles + (0 if cut is None else cut.parts), "batch": batch}
    found, state = launch(body, (inputs, ring), found, scratch, in_place=state, grid=grid, **settings)
    body, grid = functools.partial(_step_sum, plan=plan), {"kv_head": kv, "batch": batch}
    out = jax.ShapeDtypeStruct((batch, h, d), jnp.bfloat16)
    results = launch(body, (inputs, found), out, {}, in_place=ring if plan.window else None, grid=grid, **settings)
    out, ring = results if plan.window else (results, ring)
    return out, dataclasses.replace(ring, state=state)


def _step_block(read, found: Found, state, *, plan: StepPlan, cut: Cut | None, kinds, landed) -> None:
    inputs, ring = read
    batch, kv_head, item = (axis_index(name) for name in ("batch", "kv_head", "item"))
    of_state, *of_window = kinds

    @pl.when(item < plan.tiles)
    def _():
        _state_tile(plan, inputs, ring, state, batch, kv_head, item, found.rla, landed.at[0], **of_state)

    if cut is not None:

        @pl.when(item >= plan.tiles)
        def _():
            part = item - plan.tiles
            out, lse = attend(plan, inputs, ring, cut, batch, kv_head, part, landed, **of_window[0])
            found.swa.out.at[batch, part, kv_head][...] = out
            found.swa.lse.at[batch, part, kv_head][...] = lse


def _state_tile(plan: StepPlan, inputs, ring, memory, batch, kv_head, i, out, landed, *, state, halves, phi_tile):
    """Tile i of the state: what leaves the ring enters, and phi(q) meets the sum."""
    d, n, group = plan.head_size, plan.columns, plan.group
    here = memory.at[batch, kv_head, pl.ds(i * ROWS, ROWS)]
    plgpu.copy_gmem_to_smem(here, state, landed)
    if plan.window:
        length = inputs.length[batch]
        slot = batch, lax.rem(length, jnp.int32(plan.window)), kv_head
        value, key = ring.values.at[slot], ring.ring_rla.at[slot]
        leaves = length >= plan.window
        if_it_leaves = lambda x: jnp.where(jnp.broadcast_to(leaves, x.shape), x, 0.0)  # else it may be NaN
    else:
        value, key = (None if x is None else x.at[batch, kv_head] for x in (inputs.v, inputs.k_rla))
        if_it_leaves = lambda x: x
    value = if_it_leaves(row(value, PER_COLUMN))
    if plan.map is None:
        rows = pl.ds(i * ROWS, ROWS)
        phi = beside(ROWS, n, group, lambda g: row(inputs.features_q.at[batch, kv_head * group + g, rows]))
        added = row(inputs.features_k.at[batch, kv_head, rows])
    else:
        wide = columns_for(group + 1)  # the key that leaves is one more column
        x = beside(d, wide, group, lambda g: row(inputs.q_rla.at[batch, kv_head * group + g]))
        x = jnp.where(iota(d, wide, 1) == group, across(row(key), wide), x)
        in_slice = d // ROWS  # tiles
        phi = slice_of(plan.map, x * sign_of(i // in_slice), axis=0)
        if in_slice == 2:
            is_first = jnp.broadcast_to(lax.rem(i, jnp.int32(2)) == 0, (ROWS, wide))
            phi = jnp.where(is_first, phi[:ROWS], phi[ROWS:])
        added, phi = column_of(phi, group), phi[:, :n]
    added = if_it_leaves(added)
    put_transposed(phi, phi_tile)
    plgpu.barrier_wait(landed)
    total = to_registers(state) + across(added, d) * down(value, ROWS)
    for ref, x in zip((state, *halves), (total, *split(total, True)), strict=True):
        ref[...] = x
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(state, here)
    products = [(half.transpose((1, 0)), phi_tile.transpose((1, 0))) for half in halves]
    out.at[batch, i, kv_head][...] = multiply_add(plan.interpret, ((d, n), products))
    plgpu.wait_smem_to_gmem(0)


def _step_sum(read, out, ring=None, *, plan: StepPlan) -> None:
    """Both branches of a group's heads from what was found, normed and added."""
    inputs, found = read
    batch, kv_head = axis_index("batch"), axis_index("kv_head")
    d, n, group = plan.head_size, plan.columns, plan.group
    load = lambda ref, i: to_registers(ref.at[batch, i, kv_head], optimized=False)

    def normed(x, gain):
        """gain * x / rms(x)"""
        r = lax.rsqrt((x * x).sum(axis=0) * (1.0 / plan.value_size) + plan.eps)
        of_batch = gain.at[0 if gain.shape[0] == 1 else batch]
        return x * down(r, d) * beside(d, n, group, lambda g: row(of_batch.at[kv_head * group + g]))

    total = accumulate(plan.tiles, lambda i, x: x + load(found.rla, i), zeros(d, n))
    total = normed(total, inputs.rla_gain)
    if plan.window:
        parts = found.swa.lse.shape[1]
        lse = lambda i: row(found.swa.lse.at[batch, i, kv_head], PER_COLUMN)
        none = plgpu.layout_cast(jnp.full((n,), MASKED, jnp.float32), PER_COLUMN)
        highest = accumulate(parts, lambda i, x: jnp.maximum(x, lse(i)), none)

        def add(i, sums):
            share = jnp.exp2(lse(i) - highest)
            return sums[0] + load(found.swa.out, i) * down(share, d), sums[1] + share

        o_swa, shares = accumulate(parts, add, (zeros(d, n), none * 0.0))
        total += normed(o_swa * down(1.0 / shares, d), inputs.swa_gain)
        turn_ring(plan, inputs, ring, batch, kv_head)

    def put(g, _):
        out.at[batch, kv_head * group + g][...] = column_of(total, g).astype(jnp.bfloat16)

    accumulate(group, put, None)
