"""One token of a whole layer and batch in one launch: both branches of `rattention_step`, their norms and their sum.

A block takes one sequence and one key/value head; the heads of its group are rows of a tile. Its first warpgroup reads
the ring with an online softmax that begins at the new token's own key, which need not be in the ring for that; its
second adds the key that leaves to the state, tile by tile, and multiplies phi(q) by the sum. Ring and state are changed
in place: of the ring one row is written.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas.feature_map import IN_KERNELS, KernelMap
from pallas.hopper.plan import cdiv
from pallas.hopper.warpgroup import (
    LOG2E,
    MASKED,
    PER_COLUMN,
    PER_ROW,
    ROWS,
    across,
    axis_index,
    down,
    iota,
    launch,
    multiply_add,
    slice_of,
    tile,
    to_registers,
    zero_rows,
    zeros,
)
from pallas.numerics import split

PAIRS = 2  # tiles of keys and as many of values in flight
STATES = 2  # tiles of the state in flight


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
    """What the kernel changes in place. Without a ring, the state alone."""

    keys: Any = None  # [b, slots, kv, d]; slots: the window, at least ROWS
    keys_rla: Any = None
    state: Any = None  # [b, kv, f, d] float32
    values: Any = None


def step(plan: StepPlan, inputs: StepInputs, memory: Memory):
    """(out [b, h, d], the memory after the token)."""
    batch, d = inputs.v.shape[0], plan.head_size
    wide = (plgpu.TilingTransform((8, 32)), plgpu.SwizzleTransform(128))  # as `tile`, of float32
    scratch = {
        "q_tile": tile(ROWS, d),
        "ring": tile(2 * PAIRS, ROWS, d),
        "landed": plgpu.Barrier(num_barriers=2 * PAIRS),
        "phi_tile": tile(ROWS, d),
        "parts": [tile(ROWS, d), tile(ROWS, d)],
        "states": plgpu.SMEM((STATES, ROWS, d), jnp.float32, transforms=wide),
        "states_landed": plgpu.Barrier(num_barriers=STATES),
        "stage": plgpu.SMEM((ROWS, d), jnp.bfloat16),
        "joined": plgpu.Barrier(),
    }
    out = jax.ShapeDtypeStruct((batch, plan.num_heads, d), jnp.bfloat16)
    grid = {"kv_head": plan.num_kv_heads, "batch": batch}
    body = functools.partial(_step_block, plan=plan)
    return launch(body, inputs, out, scratch, grid=grid, warpgroups=2, interpret=plan.interpret, in_place=memory)


def _step_block(inputs: StepInputs, out, memory: Memory, *, plan: StepPlan, **scratch) -> None:
    block = _Block(inputs, out, memory, plan, axis_index("batch"), axis_index("kv_head"), **scratch)
    pl.when(axis_index("warpgroup") == 0)(block.read_ring)
    pl.when(axis_index("warpgroup") == 1)(block.turn_state)


@dataclasses.dataclass(frozen=True)
class _Block:
    inputs: StepInputs
    out: Any
    memory: Memory
    plan: StepPlan
    batch: Any
    kv_head: Any
    q_tile: Any
    ring: Any  # keys in even slots, values in odd ones
    landed: Any
    phi_tile: Any
    parts: Any  # a tile of the state, or the residual branch's result, as hi and lo
    states: Any
    states_landed: Any
    stage: Any
    joined: Any

    def vector(self, ref):
        """A row of device memory in float32, as long as a tile has columns."""
        return to_registers(ref, PER_COLUMN, optimized=False).astype(jnp.float32)

    def of_group(self, ref):
        """[ROWS, columns] of float32: of a ref [heads, columns] the group's heads, then zeros."""
        group, columns = self.plan.group, ref.shape[-1]
        rows, head = zeros(ROWS, columns), self.kv_head * group
        for i in range(group):
            rows = jnp.where(iota(ROWS, columns, 0) == i, down(self.vector(ref.at[head + i]), ROWS), rows)
        return rows

    def normed(self, x, gain):
        """gain * x / rms(x)"""
        gain = self.of_group(gain.at[0 if gain.shape[0] == 1 else self.batch])
        r = lax.rsqrt((x * x).sum(axis=1) * (1.0 / self.plan.value_size) + self.plan.eps)
        return x * across(r, self.plan.head_size) * gain

    def read_ring(self) -> None:
        """The first warpgroup: the window's branch, then the sum of both."""
        plan, heads = self.plan, pl.ds(self.kv_head * self.plan.group, self.plan.group)
        total = self.normed(self.attend(), self.inputs.swa_gain) if plan.window else zeros(ROWS, plan.head_size)
        plgpu.barrier_wait(self.joined)
        for part in self.parts:
            total += to_registers(part).astype(jnp.float32)
        self.stage[...] = total.astype(jnp.bfloat16)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(self.stage.at[pl.ds(0, plan.group)], self.out.at[self.batch, heads])
        plgpu.wait_smem_to_gmem(0)

    def attend(self):
        """Softmax attention to the new token and to the slots that are held, but for that whose token leaves."""
        plan, inputs, memory, batch, kv_head = self.plan, self.inputs, self.memory, self.batch, self.kv_head
        slots, d, scale = memory.keys.shape[1], plan.head_size, plan.scale * LOG2E
        length = inputs.length[batch]
        held, leaving = jnp.minimum(length, plan.window), lax.rem(length, jnp.int32(plan.window))
        count = cdiv(held, ROWS)

        def first_of(j):
            return j * ROWS if slots % ROWS == 0 else jnp.minimum(j * ROWS, slots - ROWS)

        def copy(j, which: int):
            source = (memory.keys, memory.values)[which].at[batch, pl.ds(first_of(j), ROWS), kv_head]
            slot = lax.rem(2 * j, jnp.int32(2 * PAIRS)) + which
            plgpu.copy_gmem_to_smem(source, self.ring.at[slot], self.landed.at[slot])

        def copy_next(j, which: int):
            """Over the tile of j, which all threads have read."""
            plgpu.commit_smem()
            pl.when(j + PAIRS < count)(lambda: copy(j + PAIRS, which))

        for i in range(PAIRS):
            pl.when(i < count)(lambda i=i: (copy(jnp.int32(i), 0), copy(jnp.int32(i), 1)) and None)
        q = self.of_group(inputs.q.at[batch])
        self.q_tile[...] = q.astype(jnp.bfloat16)
        plgpu.commit_smem()
        highest = (q * down(self.vector(inputs.k.at[batch, kv_head]), ROWS)).sum(axis=1) * scale
        value = self.vector(inputs.v.at[batch, kv_head])

        def block(j, carry):
            out, highest, total = carry
            slot, first = lax.rem(2 * j, jnp.int32(2 * PAIRS)), first_of(j)
            keys, values = self.ring.at[slot], self.ring.at[slot + 1]
            plgpu.barrier_wait(self.landed.at[slot])
            logits = multiply_add(plan.interpret, ((ROWS, ROWS), [(self.q_tile, keys.transpose((1, 0)))]))
            copy_next(j, 0)
            place = iota(ROWS, ROWS, 1) + first
            seen = (place >= j * ROWS) & (place < held) & (place != leaving)
            logits = jnp.where(seen, logits * scale, MASKED)
            higher = jnp.maximum(highest, logits.max(axis=1))
            shrink = jnp.exp2(highest - higher)
            weights = jnp.exp2(logits - across(higher, ROWS))
            total = total * shrink + weights.sum(axis=1)
            out *= across(shrink, d)
            plgpu.barrier_wait(self.landed.at[slot + 1])

            @pl.when(first + ROWS > held)
            def _():  # what no document holds may be NaN
                rows = to_registers(values).astype(jnp.float32)
                values[...] = jnp.where(iota(ROWS, d, 0) + first < held, rows, 0.0).astype(jnp.bfloat16)
                plgpu.commit_smem()

            out = multiply_add(plan.interpret, (out, [(weights.astype(jnp.bfloat16), values)]))
            copy_next(j, 1)
            return out, higher, total

        carry = zeros(ROWS, d) + down(value, ROWS), highest, zero_rows(ROWS, 1.0)
        out, _, total = lax.fori_loop(0, count, block, carry)
        return out * across(1.0 / total, d)

    def turn_state(self) -> None:
        """The second warpgroup: what leaves the ring enters the state, what is new the ring; phi(q) reads the state."""
        plan, inputs, d = self.plan, self.inputs, self.plan.head_size
        for i in range(min(STATES, plan.num_features // ROWS)):
            self.copy_state(i)
        key, value = self.turn_ring()
        out = zeros(ROWS, d)
        if plan.map is None:

            def read(i, out):
                columns = pl.ds(i * ROWS, ROWS)
                features = self.of_group(inputs.features_q.at[self.batch, :, columns])
                self.phi_tile.at[:, pl.ds(0, ROWS)][...] = features.astype(jnp.bfloat16)
                added = to_registers(inputs.features_k.at[self.batch, self.kv_head, columns], PER_ROW, optimized=False)
                return self.read_state(i, self.phi_tile.at[:, pl.ds(0, ROWS)], added, value, out)

            out = lax.fori_loop(0, plan.num_features // ROWS, read, out)
        else:
            q = self.of_group(inputs.q_rla.at[self.batch])
            key = zeros(ROWS, d) + down(key, ROWS)
            for slice_ in range(plan.num_features // d):
                self.phi_tile[...] = slice_of(plan.map, -q if slice_ else q).astype(jnp.bfloat16)
                features = slice_of(plan.map, -key if slice_ else key)
                for i in range(d // ROWS):
                    diagonal = iota(ROWS, d, 1) - iota(ROWS, d, 0) == i * ROWS
                    added = jnp.where(diagonal, features, 0.0).sum(axis=1)
                    phi = self.phi_tile.at[:, pl.ds(i * ROWS, ROWS)]
                    out = self.read_state(slice_ * (d // ROWS) + i, phi, added, value, out)
        parts = split(self.normed(out, inputs.rla_gain), True)
        for ref, part in zip(self.parts, parts, strict=True):
            ref[...] = part
        plgpu.commit_smem()
        plgpu.barrier_arrive(self.joined)

    def turn_ring(self):
        """The key and the value that leave the ring, 0 if none does; the new token takes their slot."""
        plan, inputs, memory, d = self.plan, self.inputs, self.memory, self.plan.head_size
        new = lambda x: self.vector(x.at[self.batch, self.kv_head])
        key_ring = memory.keys if memory.keys_rla is None else memory.keys_rla
        if plan.window == 0:
            return (None if plan.map is None else new(inputs.k_rla)), new(inputs.v)
        length = inputs.length[self.batch]
        place = self.batch, lax.rem(length, jnp.int32(plan.window)), self.kv_head
        leaves = length >= plan.window
        old = lambda ring: jnp.where(jnp.broadcast_to(leaves, (d,)), self.vector(ring.at[place]), 0.0)
        leaving = (None if plan.map is None else old(key_ring)), old(memory.values)
        for ring, row in ((memory.keys, inputs.k), (memory.keys_rla, inputs.k_rla), (memory.values, inputs.v)):
            if ring is not None:
                ring.at[place][...] = new(row).astype(jnp.bfloat16)
        return leaving

    def copy_state(self, i) -> None:
        slot = i % STATES if isinstance(i, int) else lax.rem(i, jnp.int32(STATES))
        source = self.memory.state.at[self.batch, self.kv_head, pl.ds(i * ROWS, ROWS)]
        plgpu.copy_gmem_to_smem(source, self.states.at[slot], self.states_landed.at[slot])

    def read_state(self, i, phi, added, value, out):
        """out + phi [ROWS, ROWS] times the i-th tile of the state, to which added [ROWS] times value [d] comes."""
        slot = i % STATES if isinstance(i, int) else lax.rem(i, jnp.int32(STATES))
        plgpu.barrier_wait(self.states_landed.at[slot])
        state = to_registers(self.states.at[slot]) + across(added, out.shape[1]) * down(value, ROWS)
        for ref, part in zip(self.parts, split(state, True), strict=True):
            ref[...] = part
        plgpu.commit_smem()
        pl.when(i + STATES < self.plan.num_features // ROWS)(lambda: self.copy_state(i + STATES))
        self.memory.state.at[self.batch, self.kv_head, pl.ds(i * ROWS, ROWS)][...] = state
        return multiply_add(self.plan.interpret, (out, [(phi, part) for part in self.parts]))
