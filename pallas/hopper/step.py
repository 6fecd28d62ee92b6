"""One token of a whole layer and batch in one launch: both branches of `rattention_step`, their norms and their sum.

A block takes one sequence and one key/value head; the heads of its group are rows of a tile. Its first warpgroup reads
the ring (step_window.py); its second adds the key that leaves to the state, tile by tile, and multiplies phi(q) by the
sum. Ring and state are changed in place: of the ring one row is written. Where a batch does not fill the GPU, a cluster
of blocks shares the work of one, and the first of them sums up.
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
from pallas.hopper.step_window import Reader, of_group, put_group, vector
from pallas.hopper.warpgroup import (
    MULTIPROCESSORS,
    PER_ROW,
    ROWS,
    across,
    axis,
    axis_index,
    down,
    for_each_tile,
    iota,
    launch,
    multiply_add,
    resident_blocks,
    send,
    sign_of,
    slice_of,
    tile,
    to_registers,
    zeros,
)
from pallas.numerics import split

STATES = 2  # tiles of the state in flight
PARTS = (4, 2)  # of a cluster


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


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StepOutputs:
    """The output, and what the blocks of a cluster tell their first: each has a part of the ring and of the state."""

    out: Any  # [b, h, d]
    lse: Any = None  # [b, parts, kv, ROWS] float32
    o_rla: Any = None  # [b, parts, 2, h, d]: hi and lo
    o_swa: Any = None


def step(plan: StepPlan, inputs: StepInputs, memory: Memory):
    """(out [b, h, d], the memory after the token)."""
    (batch, kv, d), h = inputs.v.shape, plan.num_heads
    tiles = plan.num_features // ROWS
    parts = next(n for n in (*PARTS, 1) if batch * kv * n <= MULTIPROCESSORS and tiles % n == 0 or n == 1)
    wide = (plgpu.TilingTransform((8, 32)), plgpu.SwizzleTransform(128))  # as `tile`, of float32
    scratch: dict[str, Any] = {
        "phi_tile": tile(ROWS, d),
        "sums": [tile(ROWS, d), tile(ROWS, d)],
        "states": plgpu.SMEM((STATES, ROWS, d), jnp.float32, transforms=wide),
        "states_landed": plgpu.Barrier(num_barriers=STATES),
        "stage": plgpu.SMEM((ROWS, d), jnp.bfloat16),
        "joined": plgpu.Barrier(),
        "taken": plgpu.Barrier(),
    }
    scratch |= Reader.scratch(d) if plan.window else {}
    grid, cluster = {"block": batch * kv if parts > 1 else resident_blocks(batch * kv, plan.interpret)}, {}
    shape = jax.ShapeDtypeStruct
    outputs = StepOutputs(shape((batch, h, d), jnp.bfloat16))
    if parts > 1:
        scratch["state_stage"] = plgpu.SMEM((ROWS, d), jnp.bfloat16)
        scratch["lse_stage"] = plgpu.SMEM((ROWS,), jnp.float32)
        scratch["met"] = plgpu.ClusterBarrier(collective_axes=(axis("part"),), num_barriers=2)
        cluster = {"part": parts}
        told = shape((batch, parts, 2, h, d), jnp.bfloat16)
        lse = shape((batch, parts, kv, ROWS), jnp.float32)
        swa = {"lse": lse, "o_swa": told} if plan.window else {}
        outputs = dataclasses.replace(outputs, o_rla=told, **swa)
    settings: Any = dict(grid=grid, cluster=cluster, warpgroups=2, interpret=plan.interpret, reduction_bytes=0)
    body = functools.partial(_step_block, plan=plan, parts=parts)
    outputs, memory = launch(body, inputs, outputs, scratch, in_place=memory, **settings)
    return outputs.out, memory


def _step_block(
    inputs: StepInputs,
    outputs: StepOutputs,
    memory: Memory,
    *,
    plan: StepPlan,
    parts: int,
    phi_tile,
    sums,
    states,
    states_landed,
    stage,
    joined,
    taken,
    state_stage=None,
    lse_stage=None,
    met=None,
    **of_reader,
) -> None:
    """A block stays on its multiprocessor and takes one item after the other, copies running ahead."""
    warpgroup, part = axis_index("warpgroup"), axis_index("part") if parts > 1 else 0
    items, blocks = inputs.v.shape[0] * plan.num_kv_heads, lax.axis_size(axis("block"))

    def place(item):
        return item // plan.num_kv_heads, lax.rem(item, jnp.int32(plan.num_kv_heads))

    def reader(item) -> Reader:
        return Reader(inputs, memory, plan, *place(item), **of_reader)

    def state(item) -> _State:
        return _State(inputs, memory, plan, *place(item), phi_tile, sums, states, states_landed)

    def start_next(item, is_last, of) -> None:
        pl.when(jnp.logical_not(is_last))(lambda: of(item + blocks).start(part, parts))

    def tell(x, stage, out, item) -> None:
        batch, kv_head = place(item)
        for i, half in enumerate(split(x, True)):
            put_group(plan, stage, half, out.at[batch, part, i], kv_head)

    def meet(branch: int) -> None:
        plgpu.barrier_arrive(met.at[branch])
        plgpu.barrier_wait(met.at[branch])

    def told(out, item, *those: int):
        batch, kv_head = place(item)
        return of_group(plan, kv_head, *(out.at[batch, i, half] for i in those for half in range(2)))

    def summed(item):
        """o_swa of all parts."""
        batch, kv_head = place(item)
        lses = [to_registers(outputs.lse.at[batch, i, kv_head], PER_ROW, optimized=False) for i in range(parts)]
        highest = functools.reduce(jnp.maximum, lses)
        weights = [jnp.exp2(lse - highest) for lse in lses]
        scale = 1.0 / sum(weights[1:], start=weights[0])
        total = zeros(ROWS, plan.head_size)
        for i, weight in enumerate(weights):
            total += across(weight * scale, plan.head_size) * told(outputs.o_swa, item, i)
        return total

    def normed(x, gain, item):
        """gain * x / rms(x)"""
        batch, kv_head = place(item)
        gain = of_group(plan, kv_head, gain.at[0 if gain.shape[0] == 1 else batch])
        r = lax.rsqrt((x * x).sum(axis=1) * (1.0 / plan.value_size) + plan.eps)
        return x * across(r, plan.head_size) * gain

    def first_warpgroup(item, is_last, carry):
        batch, kv_head = place(item)
        o_swa = zeros(ROWS, plan.head_size)
        if plan.window:
            o_swa, lse = reader(item).attend(part, parts)
            start_next(item, is_last, reader)
            if parts > 1:
                tell(o_swa, stage, outputs.o_swa, item)
                send(lse_stage, lse, outputs.lse.at[batch, part, kv_head])
                plgpu.wait_smem_to_gmem(0)
                meet(0)

        @pl.when(part == 0)
        def _():
            total = o_swa
            if plan.window:
                total = normed(summed(item) if parts > 1 else o_swa, inputs.swa_gain, item)
            plgpu.barrier_wait(joined)
            for half in sums:
                total += to_registers(half).astype(jnp.float32)
            plgpu.barrier_arrive(taken)
            put_group(plan, stage, total, outputs.out.at[batch], kv_head)

        return carry

    def second_warpgroup(item, is_last, carry):
        pl.when((item >= blocks) & (part == 0))(lambda: plgpu.barrier_wait(taken))
        o_rla = state(item).read(part, parts)
        start_next(item, is_last, state)
        if parts > 1:
            tell(o_rla, state_stage, outputs.o_rla, item)
            meet(1)

        @pl.when(part == 0)
        def _():
            total = normed(told(outputs.o_rla, item, *range(parts)) if parts > 1 else o_rla, inputs.rla_gain, item)
            for ref, half in zip(sums, split(total, True), strict=True):
                ref[...] = half
            plgpu.commit_smem()
            plgpu.barrier_arrive(joined)
            state(item).turn_ring()
            pl.when(is_last)(lambda: plgpu.barrier_wait(taken))

        return carry

    @pl.when(warpgroup == 0)
    def _():
        if plan.window:
            reader(axis_index("block")).start(part, parts)
        for_each_tile(items, first_warpgroup, jnp.int32(0))

    @pl.when(warpgroup == 1)
    def _():
        state(axis_index("block")).start(part, parts)
        for_each_tile(items, second_warpgroup, jnp.int32(0))


@dataclasses.dataclass(frozen=True)
class _State:
    """The warpgroup that reads and writes the state, and its memory."""

    inputs: StepInputs
    memory: Memory
    plan: StepPlan
    batch: Any
    kv_head: Any
    phi_tile: Any
    sums: Any  # a tile of the state, later the branch's result, as hi and lo
    states: Any
    states_landed: Any

    def start(self, part, parts: int) -> None:
        """The copies that `read` counts on."""
        count = self.plan.num_features // ROWS // parts
        for i in range(min(STATES, count)):
            self.copy_state(part * count, i)

    def read(self, part, parts: int):
        """o_rla [ROWS, d], of a part of the features. What leaves the ring enters the state."""
        plan, inputs, d = self.plan, self.inputs, self.plan.head_size
        count = plan.num_features // ROWS // parts
        first = part * count
        key, value = self.leaving()
        out = zeros(ROWS, d)
        if plan.map is None:

            def read(i, out):
                columns = pl.ds((first + i) * ROWS, ROWS)
                features = of_group(plan, self.kv_head, inputs.features_q.at[self.batch, :, columns])
                phi = self.phi_tile.at[:, pl.ds(0, ROWS)]
                phi[...] = features.astype(jnp.bfloat16)
                added = to_registers(inputs.features_k.at[self.batch, self.kv_head, columns], PER_ROW, optimized=False)
                return self.read_tile(first, i, count, phi, added, value, out)

            return lax.fori_loop(0, count, read, out)
        q = of_group(plan, self.kv_head, inputs.q_rla.at[self.batch]).astype(jnp.bfloat16)
        in_slice = d // ROWS  # tiles
        sign = lambda i: sign_of((first + i) // in_slice) if parts > 1 else 1 - 2 * (i // in_slice)
        added, features = [], None
        for i in range(count):
            if i % in_slice == 0:
                features = slice_of(plan.map, (zeros(ROWS, d) + down(key, ROWS)) * sign(i))
            diagonal = iota(ROWS, d, 1) - iota(ROWS, d, 0) == (first + i) % in_slice * ROWS
            added.append(jnp.where(diagonal, features, 0.0).sum(axis=1))
        for i in range(count):
            if i % in_slice == 0:
                self.phi_tile[...] = slice_of(plan.map, q.astype(jnp.float32) * sign(i)).astype(jnp.bfloat16)
            phi = self.phi_tile.at[:, pl.ds((first + i) % in_slice * ROWS, ROWS)]
            out = self.read_tile(first, i, count, phi, added[i], value, out)
        return out

    @property
    def place(self):
        """Of the new token in the rings."""
        return self.batch, lax.rem(self.inputs.length[self.batch], jnp.int32(self.plan.window)), self.kv_head

    def leaving(self):
        """The key and the value that enter the state, 0 if none does."""
        plan, inputs, memory = self.plan, self.inputs, self.memory
        if plan.window == 0:
            new = lambda x: vector(x.at[self.batch, self.kv_head])
            return (None if plan.map is None else new(inputs.k_rla)), new(inputs.v)
        leaves = jnp.broadcast_to(inputs.length[self.batch] >= plan.window, (plan.head_size,))
        old = lambda ring: jnp.where(leaves, vector(ring.at[self.place]), 0.0)
        keys = memory.keys if memory.keys_rla is None else memory.keys_rla
        return (None if plan.map is None else old(keys)), old(memory.values)

    def turn_ring(self) -> None:
        """The new token takes the slot of the one that leaves, which all blocks have read."""
        inputs, memory = self.inputs, self.memory
        if self.plan.window:
            for ring, rows in ((memory.keys, inputs.k), (memory.keys_rla, inputs.k_rla), (memory.values, inputs.v)):
                if ring is not None:
                    ring.at[self.place][...] = vector(rows.at[self.batch, self.kv_head]).astype(jnp.bfloat16)

    def copy_state(self, first, i) -> None:
        slot = i % STATES if isinstance(i, int) else lax.rem(i, jnp.int32(STATES))
        source = self.memory.state.at[self.batch, self.kv_head, pl.ds((first + i) * ROWS, ROWS)]
        plgpu.copy_gmem_to_smem(source, self.states.at[slot], self.states_landed.at[slot])

    def read_tile(self, first, i, count: int, phi, added, value, out):
        """out + phi [ROWS, ROWS] times tile first + i of the state, to which added [ROWS] times value [d] comes."""
        slot = i % STATES if isinstance(i, int) else lax.rem(i, jnp.int32(STATES))
        plgpu.barrier_wait(self.states_landed.at[slot])
        state = to_registers(self.states.at[slot]) + across(added, out.shape[1]) * down(value, ROWS)
        for ref, half in zip(self.sums, split(state, True), strict=True):
            ref[...] = half
        plgpu.commit_smem()
        if not isinstance(i, int):
            pl.when(i + STATES < count)(lambda: self.copy_state(first, i + STATES))
        elif i + STATES < count:
            self.copy_state(first, i + STATES)
        self.memory.state.at[self.batch, self.kv_head, pl.ds((first + i) * ROWS, ROWS)][...] = state
        return multiply_add(self.plan.interpret, (out, [(phi, half) for half in self.sums]))
