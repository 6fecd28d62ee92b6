"""One token of a whole layer and batch in one launch: both branches of `rattention_step`, their norms and their sum.

A block takes one sequence and one key/value head; the heads of its group are rows of a tile. Its first warpgroup reads
the ring with an online softmax that begins at the new token's own key, which need not be in the ring for that; its
second adds the key that leaves to the state, tile by tile, and multiplies phi(q) by the sum. Ring and state are changed
in place: of the ring one row is written.
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
from pallas.hopper.step_window import Reader, of_group, put_group, vector
from pallas.hopper.warpgroup import (
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
    zeros,
)
from pallas.numerics import split

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
        "phi_tile": tile(ROWS, d),
        "parts": [tile(ROWS, d), tile(ROWS, d)],
        "states": plgpu.SMEM((STATES, ROWS, d), jnp.float32, transforms=wide),
        "states_landed": plgpu.Barrier(num_barriers=STATES),
        "stage": plgpu.SMEM((ROWS, d), jnp.bfloat16),
        "joined": plgpu.Barrier(),
    }
    scratch |= Reader.scratch(d) if plan.window else {}
    out = jax.ShapeDtypeStruct((batch, plan.num_heads, d), jnp.bfloat16)
    grid = {"kv_head": plan.num_kv_heads, "batch": batch}
    body = functools.partial(_step_block, plan=plan)
    return launch(body, inputs, out, scratch, grid=grid, warpgroups=2, interpret=plan.interpret, in_place=memory)


def _step_block(
    inputs: StepInputs, out, memory: Memory, *, plan: StepPlan, phi_tile, parts, states, states_landed, stage, joined,
    **of_reader
) -> None:  # fmt: skip
    batch, kv_head, warpgroup = (axis_index(name) for name in ("batch", "kv_head", "warpgroup"))
    block = _Block(inputs, memory, plan, batch, kv_head, phi_tile, parts, states, states_landed)

    @pl.when(warpgroup == 0)
    def _():
        total = zeros(ROWS, plan.head_size)
        if plan.window:
            o_swa, _ = Reader(inputs, memory, plan, batch, kv_head, **of_reader).attend(0, 1)
            total = block.normed(o_swa, inputs.swa_gain)
        plgpu.barrier_wait(joined)
        for part in parts:
            total += to_registers(part).astype(jnp.float32)
        put_group(plan, stage, total, out.at[batch], kv_head)

    @pl.when(warpgroup == 1)
    def _():
        o_rla = block.normed(block.turn_state(), inputs.rla_gain)
        for ref, part in zip(parts, split(o_rla, True), strict=True):
            ref[...] = part
        plgpu.commit_smem()
        plgpu.barrier_arrive(joined)


@dataclasses.dataclass(frozen=True)
class _Block:
    inputs: StepInputs
    memory: Memory
    plan: StepPlan
    batch: Any
    kv_head: Any
    phi_tile: Any
    parts: Any  # a tile of the state, or the residual branch's result, as hi and lo
    states: Any
    states_landed: Any

    def normed(self, x, gain):
        """gain * x / rms(x)"""
        gain = of_group(self.plan, gain.at[0 if gain.shape[0] == 1 else self.batch], self.kv_head)
        r = lax.rsqrt((x * x).sum(axis=1) * (1.0 / self.plan.value_size) + self.plan.eps)
        return x * across(r, self.plan.head_size) * gain

    def turn_state(self) -> None:
        """o_rla [ROWS, d]. What leaves the ring enters the state, and what is new the ring."""
        plan, inputs, d = self.plan, self.inputs, self.plan.head_size
        for i in range(min(STATES, plan.num_features // ROWS)):
            self.copy_state(i)
        key, value = self.turn_ring()
        out = zeros(ROWS, d)
        if plan.map is None:

            def read(i, out):
                columns = pl.ds(i * ROWS, ROWS)
                features = of_group(plan, inputs.features_q.at[self.batch, :, columns], self.kv_head)
                self.phi_tile.at[:, pl.ds(0, ROWS)][...] = features.astype(jnp.bfloat16)
                added = to_registers(inputs.features_k.at[self.batch, self.kv_head, columns], PER_ROW, optimized=False)
                return self.read_state(i, self.phi_tile.at[:, pl.ds(0, ROWS)], added, value, out)

            out = lax.fori_loop(0, plan.num_features // ROWS, read, out)
        else:
            q = of_group(plan, inputs.q_rla.at[self.batch], self.kv_head)
            key = zeros(ROWS, d) + down(key, ROWS)
            for slice_ in range(plan.num_features // d):
                self.phi_tile[...] = slice_of(plan.map, -q if slice_ else q).astype(jnp.bfloat16)
                features = slice_of(plan.map, -key if slice_ else key)
                for i in range(d // ROWS):
                    diagonal = iota(ROWS, d, 1) - iota(ROWS, d, 0) == i * ROWS
                    added = jnp.where(diagonal, features, 0.0).sum(axis=1)
                    phi = self.phi_tile.at[:, pl.ds(i * ROWS, ROWS)]
                    out = self.read_state(slice_ * (d // ROWS) + i, phi, added, value, out)
        return out

    def turn_ring(self):
        """The key and the value that leave the ring, 0 if none does; the new token takes their slot."""
        plan, inputs, memory, d = self.plan, self.inputs, self.memory, self.plan.head_size
        new = lambda x: vector(x.at[self.batch, self.kv_head])
        key_ring = memory.keys if memory.keys_rla is None else memory.keys_rla
        if plan.window == 0:
            return (None if plan.map is None else new(inputs.k_rla)), new(inputs.v)
        length = inputs.length[self.batch]
        place = self.batch, lax.rem(length, jnp.int32(plan.window)), self.kv_head
        leaves = length >= plan.window
        old = lambda ring: jnp.where(jnp.broadcast_to(leaves, (d,)), vector(ring.at[place]), 0.0)
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
