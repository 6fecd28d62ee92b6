"""One token of a whole layer and batch in one launch: both branches of `rattention_step`, their norms and their sum.

A block takes one sequence and one key/value head; the heads of its group are rows of a tile. Its first warpgroup reads
the ring (step_window.py); its second adds the key that leaves to the state, tile by tile, and multiplies phi(q) by the
sum. Ring and state are changed in place: of the ring one row is written. Where a batch does not fill the GPU, a cluster
of blocks shares the work of one, and the first of them sums up.
"""

import dataclasses
import functools
import types
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas.feature_map import IN_KERNELS, KernelMap
from pallas.hopper.step_window import MOST_STAGED, Reader, heads_of, of_group, put_group, rows_of, vector
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
    def staged(self) -> bool:
        return self.group <= MOST_STAGED

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

    @property
    def ring_rla(self):
        return self.keys if self.keys_rla is None else self.keys_rla


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
    parts, shape = _parts(plan, batch), jax.ShapeDtypeStruct
    in_flight = min(STATES, plan.num_features // ROWS // parts)
    staged = plan.group if plan.staged else 1
    scratch: dict[str, Any] = {
        "of_state": {
            "phi_tile": tile(ROWS, d),
            "sums": [tile(ROWS, d), tile(ROWS, d)],
            "states": tile(in_flight, ROWS, d, dtype=jnp.float32),
            "landed": plgpu.Barrier(num_barriers=in_flight),
            "rows": plgpu.SMEM((3, d), jnp.bfloat16),
            "old_rows": plgpu.SMEM((2, d), jnp.bfloat16),
            "q_rows": plgpu.SMEM((staged, d), jnp.bfloat16),
            "rows_landed": plgpu.Barrier(num_arrivals=_rows_copied(plan, inputs)),
        },
        "gains": [plgpu.SMEM((staged, d), jnp.float32) for _ in range(2)],
        "gains_landed": plgpu.Barrier(num_barriers=2),
        "stage": plgpu.SMEM((ROWS, d), jnp.bfloat16),
        "joined": plgpu.Barrier(),
        "taken": plgpu.Barrier(),
        "of_reader": Reader.scratch(plan) if plan.window else {},
    }
    grid, cluster = {"block": batch * kv if parts > 1 else resident_blocks(batch * kv, plan.interpret)}, {}
    outputs = StepOutputs(shape((batch, h, d), jnp.bfloat16))
    if parts > 1:
        scratch["of_cluster"] = {
            "state_stage": plgpu.SMEM((ROWS, d), jnp.bfloat16),
            "lse_stage": plgpu.SMEM((ROWS,), jnp.float32),
            "met": plgpu.ClusterBarrier(collective_axes=(axis("part"),), num_barriers=2),
            "told": [plgpu.SMEM((parts, 2, plan.group, d), jnp.bfloat16) for _ in range(2)],
            "told_lse": plgpu.SMEM((parts, ROWS), jnp.float32),
            "told_landed": [plgpu.Barrier(num_arrivals=2 * parts + parts), plgpu.Barrier(num_arrivals=2 * parts)],
        }
        cluster = {"part": parts}
        told = shape((batch, parts, 2, h, d), jnp.bfloat16)
        lse = shape((batch, parts, kv, ROWS), jnp.float32)
        swa = {"lse": lse, "o_swa": told} if plan.window else {}
        outputs = dataclasses.replace(outputs, o_rla=told, **swa)
    settings: Any = dict(grid=grid, cluster=cluster, warpgroups=2, interpret=plan.interpret, reduction_bytes=0)
    body = functools.partial(_step_block, plan=plan, parts=parts)
    outputs, memory = launch(body, inputs, outputs, scratch, in_place=memory, **settings)
    return outputs.out, memory


def _rows_copied(plan: StepPlan, inputs: StepInputs) -> int:
    """By `_State.start`."""
    new = sum(x is not None for x in (inputs.k, inputs.v, inputs.k_rla)) if plan.window else 0
    return new + 1 + (0 if plan.map is None else 1 + plan.staged)


def _parts(plan: StepPlan, batch: int) -> int:
    """Blocks of a cluster: more than one where the batch does not fill the GPU."""
    tiles, room = plan.num_features // ROWS, plan.staged and plan.group * plan.head_size <= 512
    fits = lambda n: room and batch * plan.num_kv_heads * n <= MULTIPROCESSORS and tiles % n == 0
    return next((n for n in PARTS if fits(n)), 1)


def _step_block(
    inputs: StepInputs,
    outputs: StepOutputs,
    memory: Memory,
    *,
    plan: StepPlan,
    parts: int,
    of_state: dict,
    of_reader: dict,
    of_cluster: dict | None = None,
    gains,
    gains_landed,
    stage,
    joined,
    taken,
) -> None:
    """A block stays on its multiprocessor and takes one item after the other, copies running ahead."""
    warpgroup, part = axis_index("warpgroup"), axis_index("part") if parts > 1 else 0
    items, blocks = inputs.v.shape[0] * plan.num_kv_heads, lax.axis_size(axis("block"))
    cluster = types.SimpleNamespace(**(of_cluster or {}))

    def place(item):
        return item // plan.num_kv_heads, lax.rem(item, jnp.int32(plan.num_kv_heads))

    def reader(item) -> Reader:
        return Reader(inputs, memory, plan, *place(item), **of_reader)

    def state(item, length) -> _State:
        return _State(inputs, memory, plan, *place(item), length, **of_state)

    def length_of(item):
        """Read long before it is needed. 0 without a ring."""
        return inputs.length[place(item)[0]] if plan.window else jnp.int32(0)

    def next_length(item):
        return length_of(jnp.minimum(item + blocks, items - 1))

    def tell(x, stage, out, item) -> None:
        batch, kv_head = place(item)
        for i, half in enumerate(split(x, True)):
            put_group(plan, stage, half, out.at[batch, part, i], kv_head)
        plgpu.wait_smem_to_gmem(0)

    def meet(branch: int) -> None:
        plgpu.barrier_arrive(cluster.met.at[branch])
        plgpu.barrier_wait(cluster.met.at[branch])

    def listen(branch: int, out, item) -> None:
        """What all parts have told, into shared memory."""
        batch, kv_head = place(item)
        landed, rows = cluster.told_landed[branch], cluster.told[branch]
        for i in range(parts):
            if branch == 0:
                plgpu.copy_gmem_to_smem(outputs.lse.at[batch, i, kv_head], cluster.told_lse.at[i], landed)
            for half in range(2):
                plgpu.copy_gmem_to_smem(heads_of(plan, out.at[batch, i, half], kv_head), rows.at[i, half], landed)
        plgpu.barrier_wait(landed)

    def halves(branch: int, *those: int):
        return rows_of(plan, *(cluster.told[branch].at[i, half] for i in those for half in range(2)))

    def summed():
        """o_swa of all parts."""
        lses = [to_registers(cluster.told_lse.at[i], PER_ROW, optimized=False) for i in range(parts)]
        highest = functools.reduce(jnp.maximum, lses)
        weights = [jnp.exp2(lse - highest) for lse in lses]
        scale = 1.0 / sum(weights[1:], start=weights[0])
        total = zeros(ROWS, plan.head_size)
        for i, weight in enumerate(weights):
            total += across(weight * scale, plan.head_size) * halves(0, i)
        return total

    def gain_of(branch: int, item):
        batch, _ = place(item)
        gain = (inputs.swa_gain, inputs.rla_gain)[branch]
        return gain.at[0 if gain.shape[0] == 1 else batch]

    def load_gain(branch: int, item) -> None:
        plgpu.commit_smem()
        if plan.staged:
            source = heads_of(plan, gain_of(branch, item), place(item)[1])
            plgpu.copy_gmem_to_smem(source, gains[branch], gains_landed.at[branch])

    def normed(x, branch: int, item):
        """gain * x / rms(x)"""
        r = lax.rsqrt((x * x).sum(axis=1) * (1.0 / plan.value_size) + plan.eps)
        x = x * across(r, plan.head_size)
        if not plan.staged:
            return x * of_group(plan, place(item)[1], gain_of(branch, item))
        plgpu.barrier_wait(gains_landed.at[branch])
        return x * rows_of(plan, gains[branch])

    def first_warpgroup(item, is_last, length):
        (batch, kv_head), after = place(item), next_length(item)
        o_swa = zeros(ROWS, plan.head_size)
        if plan.window:
            pl.when(part == 0)(functools.partial(load_gain, 0, item))
            o_swa, lse = reader(item).attend(part, parts, length)
            pl.when(jnp.logical_not(is_last))(lambda: reader(item + blocks).start(part, parts))
            if parts > 1:
                tell(o_swa, stage, outputs.o_swa, item)
                send(cluster.lse_stage, lse, outputs.lse.at[batch, part, kv_head])
                plgpu.wait_smem_to_gmem(0)
                meet(0)

        @pl.when(part == 0)
        def _():
            total = o_swa
            if plan.window:
                if parts > 1:
                    listen(0, outputs.o_swa, item)
                total = normed(summed() if parts > 1 else o_swa, 0, item)
            plgpu.barrier_wait(joined)
            for half in of_state["sums"]:
                total += to_registers(half).astype(jnp.float32)
            plgpu.barrier_arrive(taken)
            put_group(plan, stage, total, outputs.out.at[batch], kv_head)

        return after

    def second_warpgroup(item, is_last, length):
        after = next_length(item)
        pl.when((item >= blocks) & (part == 0))(lambda: plgpu.barrier_wait(taken))
        pl.when(part == 0)(functools.partial(load_gain, 1, item))
        o_rla = state(item, length).read(part, parts)
        pl.when(jnp.logical_not(is_last))(lambda: state(item + blocks, after).start(part, parts))
        if parts > 1:
            tell(o_rla, cluster.state_stage, outputs.o_rla, item)
            meet(1)

        @pl.when(part == 0)
        def _():
            if parts > 1:
                state(item, length).turn_ring()  # all blocks have read what leaves it
                listen(1, outputs.o_rla, item)
            total = normed(halves(1, *range(parts)) if parts > 1 else o_rla, 1, item)
            for ref, half in zip(of_state["sums"], split(total, True), strict=True):
                ref[...] = half
            plgpu.commit_smem()
            plgpu.barrier_arrive(joined)
            pl.when(is_last)(lambda: plgpu.barrier_wait(taken))

        return after

    @pl.when(warpgroup == 0)
    def _():
        item = axis_index("block")
        if plan.window:
            reader(item).start(part, parts)
        for_each_tile(items, first_warpgroup, length_of(item))
        plgpu.wait_smem_to_gmem(0)

    @pl.when(warpgroup == 1)
    def _():
        item = axis_index("block")
        length = length_of(item)
        state(item, length).start(part, parts)
        for_each_tile(items, second_warpgroup, length)
        plgpu.wait_smem_to_gmem(0)


@dataclasses.dataclass(frozen=True)
class _State:
    """The warpgroup that reads and writes the state, and its memory."""

    inputs: StepInputs
    memory: Memory
    plan: StepPlan
    batch: Any
    kv_head: Any
    length: Any
    phi_tile: Any
    sums: Any  # a tile of the state, later the branch's result, as hi and lo
    states: Any
    landed: Any
    rows: Any  # [3, d]: what is new in keys, values and keys_rla
    old_rows: Any  # [2, d]: what enters the state: value, key
    q_rows: Any  # [group, d] of q_rla, if they are staged
    rows_landed: Any

    def start(self, part, parts: int) -> None:
        """The copies that `read` counts on; all threads have read what was there."""
        plan, inputs, memory, place = self.plan, self.inputs, self.memory, (self.batch, self.kv_head)
        count = plan.num_features // ROWS // parts
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        plgpu.commit_smem()
        for i in range(min(STATES, count)):
            self.copy_state(part * count, i)
        copies = []
        if plan.map is not None and plan.staged:
            copies.append((heads_of(plan, inputs.q_rla.at[self.batch], self.kv_head), self.q_rows))
        if plan.window:
            new = (inputs.k, inputs.v, inputs.k_rla)
            copies += [(x.at[place], self.rows.at[i]) for i, x in enumerate(new) if x is not None]
            old = [ring.at[self.place] for ring in (memory.values, memory.ring_rla)]
        else:
            old = [x.at[place] for x in (inputs.v, inputs.k_rla) if x is not None]
        copies += [(x, self.old_rows.at[i]) for i, x in enumerate(old[: 1 + (plan.map is not None)])]
        for source, target in copies:
            plgpu.copy_gmem_to_smem(source, target, self.rows_landed)

    def read(self, part, parts: int):
        """o_rla [ROWS, d], of a part of the features. What leaves the ring enters the state."""
        plan, inputs, d = self.plan, self.inputs, self.plan.head_size
        count = plan.num_features // ROWS // parts
        first = part * count
        plgpu.barrier_wait(self.rows_landed)
        value, key = (self.leaving(i) for i in range(2))
        if parts == 1:
            self.turn_ring()
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
        q = rows_of(plan, self.q_rows) if plan.staged else of_group(plan, self.kv_head, inputs.q_rla.at[self.batch])
        q = q.astype(jnp.bfloat16)
        in_slice = d // ROWS  # tiles
        sign = lambda i: sign_of((first + i) // in_slice) if parts > 1 else 1 - 2 * (i // in_slice)
        added: list = []
        features: Any = None
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
        return self.batch, lax.rem(self.length, jnp.int32(self.plan.window)), self.kv_head

    def leaving(self, which: int):
        """The value (0) or the key (1) that enters the state, 0 if none does."""
        if which == 1 and self.plan.map is None:
            return None
        row = vector(self.old_rows.at[which])
        if self.plan.window == 0:
            return row
        leaves = self.length >= self.plan.window
        return jnp.where(jnp.broadcast_to(leaves, (self.plan.head_size,)), row, 0.0)

    def turn_ring(self) -> None:
        """The new token takes the slot of the one that leaves, which has been read."""
        if self.plan.window:
            for i, ring in enumerate((self.memory.keys, self.memory.values, self.memory.keys_rla)):
                if ring is not None:
                    plgpu.copy_smem_to_gmem(self.rows.at[i], ring.at[self.place])

    def copy_state(self, first, i) -> None:
        slot = i % STATES if isinstance(i, int) else lax.rem(i, jnp.int32(STATES))
        source = self.memory.state.at[self.batch, self.kv_head, pl.ds((first + i) * ROWS, ROWS)]
        plgpu.copy_gmem_to_smem(source, self.states.at[slot], self.landed.at[slot])

    def read_tile(self, first, i, count: int, phi, added, value, out):
        """out + phi [ROWS, ROWS] times tile first + i of the state, to which added [ROWS] times value [d] comes."""
        slot = i % STATES if isinstance(i, int) else lax.rem(i, jnp.int32(STATES))
        tile = self.states.at[slot]
        plgpu.barrier_wait(self.landed.at[slot])
        state = to_registers(tile) + across(added, out.shape[1]) * down(value, ROWS)
        for ref, part in zip((tile, *self.sums), (state, *split(state, True)), strict=True):
            ref[...] = part
        plgpu.commit_smem()
        rows = pl.ds((first + i) * ROWS, ROWS)
        plgpu.copy_smem_to_gmem(tile, self.memory.state.at[self.batch, self.kv_head, rows])
        out = multiply_add(self.plan.interpret, (out, [(phi, half) for half in self.sums]))

        def copy_next():
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            self.copy_state(first, i + STATES)

        if not isinstance(i, int):
            pl.when(i + STATES < count)(copy_next)
        elif i + STATES < count:
            copy_next()
        return out
