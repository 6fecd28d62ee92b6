"""One token of a whole layer and batch in two launches: both branches of `rattention_step`, or the window alone.

The first has many small blocks of two kinds, several of which share a multiprocessor and wait for memory in turn. One
kind adds the key that leaves the ring to a tile of the state and multiplies phi(q) by the sum; the other reads a part
of the ring (step_window.py). The second launch adds up what they found, and puts the new token into the ring, which no
block reads any more.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas.block_sizes import round_up
from pallas.feature_map import IN_KERNELS, KernelMap
from pallas.hopper.step_window import (
    BLOCKS,
    Cut,
    Parts,
    accumulate,
    attend,
    beside,
    column_of,
    merged,
    put_transposed,
    row,
    window_scratch,
)
from pallas.hopper.warpgroup import (
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
    num_features: int  # a multiple of ROWS; 0: the window alone, without a norm
    map_name: str | None  # a key of feature_map.IN_KERNELS, or None: XLA computes phi, and features are operands
    scale: float
    eps: float
    interpret: bool

    @property
    def group(self) -> int:
        return self.num_heads // self.num_kv_heads

    @property
    def columns(self) -> int:
        return round_up(self.group, 8)

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
    """Of the token; gains and sinks may have a batch axis of 1. Fields are in the order of the kernel's operands."""

    features_k: Any = None  # [b, kv, f] float32: phi of the key that leaves, of a feature map that XLA computes
    features_q: Any = None  # [b, h, f] float32: phi(q_rla), likewise
    k: Any = None  # [b, kv, d], without a ring None
    k_rla: Any = None  # [b, kv, d], where it is not k
    q: Any = None  # [b, h, d]
    q_rla: Any = None  # [b, h, d], of a feature map that the kernel computes
    rla_gain: Any = None  # [b or 1, h, d] float32
    sink_logits: Any = None  # [b or 1, kv, columns] float32
    swa_gain: Any = None  # [b or 1, h, d] float32
    v: Any = None  # [b, kv, d]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Memory:
    """What the kernels change in place: the length and a ring, a state or both."""

    keys: Any = None  # [b, slots, kv, d]; slots: the window, at least ROWS
    keys_rla: Any = None
    length: Any = None  # [b] int32: tokens before this one
    state: Any = None  # [b, kv, f, d] float32
    values: Any = None

    @property
    def ring_rla(self):
        return self.keys if self.keys_rla is None else self.keys_rla


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Found:
    """By the blocks of the first launch."""

    length: Any  # [b] int32: what it was, since the second launch changes it
    rla: Any = None  # [b, tiles, kv, d, columns] float32: phi(q) times a tile of the state
    swa: Any = None  # Parts


@functools.partial(jax.jit, static_argnums=0)  # alike layers share one program, whose kernels are made once
def step(plan: StepPlan, inputs: StepInputs, memory: Memory):
    """(out [b, h, d], the memory after the token)."""
    (batch, kv, d), h, n = inputs.v.shape, plan.num_heads, plan.columns
    rest, state, shape = dataclasses.replace(memory, state=None), memory.state, jax.ShapeDtypeStruct
    cut, kinds = None, {}
    found: Any = {"length": shape((batch,), jnp.int32)}
    if plan.tiles:
        halves = [tile(ROWS, d), tile(ROWS, d)]
        kinds["of_state"] = dict(state=tile(ROWS, d, dtype=jnp.float32), halves=halves, phi_tile=tile(n, ROWS))
        found["rla"] = shape((batch, plan.tiles, kv, d, n), jnp.float32)
    if plan.window:
        cut = Cut.of(memory.keys.shape[1], batch * kv, BLOCKS * (4 if plan.tiles else 1))
        kinds["of_window"] = window_scratch(plan, cut)
        found["swa"] = Parts.shapes(plan, batch, cut.parts)
    settings: Any = dict(warpgroups=1, interpret=plan.interpret)
    grid = {"kv_head": kv, "item": plan.tiles + (cut.parts if cut else 0), "batch": batch}
    body = functools.partial(_step_block, plan=plan, cut=cut, names=tuple(kinds))
    scratch = {"kinds": plgpu.RefUnion(*kinds.values()), "landed": plgpu.Barrier(num_barriers=2)}
    found = launch(body, (inputs, rest), Found(**found), scratch, in_place=state, grid=grid, **settings)
    found, state = found if plan.tiles else (found, None)
    grid = {"kv_head": kv, "batch": batch}
    unread = dict.fromkeys(("features_k", "features_q", "q", "q_rla"))
    body, read = functools.partial(_step_sum, plan=plan), (dataclasses.replace(inputs, **unread), found)
    out, rest = launch(body, read, shape((batch, h, d), jnp.bfloat16), {}, in_place=rest, grid=grid, **settings)
    return out, dataclasses.replace(rest, state=state)


def _step_block(read, found: Found, memory=None, *, plan: StepPlan, cut: Cut | None, names, kinds, landed) -> None:
    inputs, ring = read
    batch, kv_head, item = (axis_index(name) for name in ("batch", "kv_head", "item"))
    scratch = dict(zip(names, kinds, strict=True))

    @pl.when((kv_head == 0) & (item == 0))
    def _():
        found.length[batch] = ring.length[batch]

    if plan.tiles:

        @pl.when(item < plan.tiles)
        def _():
            _state_tile(
                plan, inputs, ring, memory, batch, kv_head, item, found.rla, landed.at[0], **scratch["of_state"]
            )

    if cut is not None:

        @pl.when(item >= plan.tiles)
        def _():
            part = item - plan.tiles
            out, lse = attend(plan, inputs, ring, cut, batch, kv_head, part, landed, **scratch["of_window"])
            found.swa.out.at[batch, part, kv_head][...] = out
            found.swa.lse.at[batch, part, kv_head][...] = lse


def _state_tile(plan: StepPlan, inputs, ring, memory, batch, kv_head, i, out, landed, *, state, halves, phi_tile):
    """Tile i of the state: what leaves the ring enters, and phi(q) meets the sum."""
    d, n, group = plan.head_size, plan.columns, plan.group
    here = memory.at[batch, kv_head, pl.ds(i * ROWS, ROWS)]
    plgpu.copy_gmem_to_smem(here, state, landed)
    if plan.window:
        length = ring.length[batch]
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
        wide = round_up(group + 1, 8)  # the key that leaves is one more column
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
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def _step_sum(read, out, memory, *, plan: StepPlan) -> None:
    """The output of a group's heads from what was found. All loads come before the first store, for which they wait."""
    inputs, found = read
    batch, kv_head = here = axis_index("batch"), axis_index("kv_head")
    d, group = plan.head_size, plan.group
    length, branches, turned = found.length[batch], [], []
    if plan.tiles:

        def add(indices, x):
            return sum([to_registers(found.rla.at[batch, i, kv_head], optimized=False) for i in indices], start=x)

        gain = _gain_of(plan, inputs.rla_gain, batch, kv_head)
        branches.append((accumulate(plan.tiles, add, zeros(d, plan.columns), plan.columns), gain))
    if plan.window:
        slot = batch, lax.rem(length, jnp.int32(plan.window)), kv_head
        pairs = ((memory.keys, inputs.k), (memory.values, inputs.v), (memory.keys_rla, inputs.k_rla))
        turned = [(old.at[slot], row(new.at[here])) for old, new in pairs if old is not None]
        gain = None if inputs.swa_gain is None else _gain_of(plan, inputs.swa_gain, batch, kv_head)
        branches.append((merged(plan, found.swa, inputs.sink_logits, batch, kv_head), gain))
    total = functools.reduce(jnp.add, [x if gain is None else _normed(plan, x, gain) for x, gain in branches])

    def put(indices, _):
        for i in indices:
            out.at[batch, kv_head * group + i][...] = column_of(total, i).astype(jnp.bfloat16)

    accumulate(group, put, None)
    for old, new in turned:
        old[...] = new.astype(jnp.bfloat16)
    memory.length[batch] = length + 1


def _gain_of(plan: StepPlan, gain, batch, kv_head):
    of_batch = gain.at[0 if gain.shape[0] == 1 else batch]
    return beside(plan.head_size, plan.columns, plan.group, lambda i: row(of_batch.at[kv_head * plan.group + i]))


def _normed(plan: StepPlan, x, gain):
    """gain * x / rms(x)"""
    r = lax.rsqrt((x * x).sum(axis=0) * (1.0 / plan.value_size) + plan.eps)
    return gain * x * down(r, plan.head_size)
