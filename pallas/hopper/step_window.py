"""The window of one token: softmax attention of a group's heads to a ring, and the kernel of that alone.

The online softmax begins at the new token's own key, which need not be in the ring for that; the slot that it takes is
left out. Long rings are cut into parts, each a block's, so that a small batch fills the GPU; XLA merges them.
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

from pallas.hopper.plan import cdiv
from pallas.hopper.warpgroup import (
    LOG2E,
    MASKED,
    PER_COLUMN,
    ROWS,
    across,
    axis_index,
    down,
    iota,
    launch,
    multiply_add,
    tile,
    to_registers,
    zero_rows,
    zeros,
)
from pallas.numerics import split

PAIRS = 2  # tiles of keys and as many of values in flight
BLOCKS = 256  # with fewer, a ring is cut into parts: two for each multiprocessor
LEAST_PART = 2  # tiles
MOST_STAGED = 8  # heads of a group


@dataclasses.dataclass(frozen=True)
class WindowPlan:
    """Static facts of a call."""

    window: int
    num_heads: int
    num_kv_heads: int
    head_size: int  # of q, k and v after padding: 64 or 128
    scale: float
    interpret: bool

    @property
    def group(self) -> int:
        return self.num_heads // self.num_kv_heads

    @property
    def staged(self) -> bool:
        """Do rows of a group come by TMA, all at once? There is no room for many."""
        return self.group <= MOST_STAGED


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Token:
    """Fields are in the order of the kernel's operands."""

    k: Any = None  # [b, kv, d]
    length: Any = None  # [b] int32: tokens before this one
    q: Any = None  # [b, h, d]
    v: Any = None  # [b, kv, d]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Ring:
    """Changed in place. Slots: the window, or more, at least ROWS and a multiple of 8."""

    keys: Any = None  # [b, slots, kv, d]
    values: Any = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Parts:
    """Of each part of the ring, if there is more than one."""

    out: Any  # [b, parts, 2, h, d] bfloat16: hi and lo
    lse: Any  # [b, parts, kv, ROWS] float32: log2 of the sum of exp2 of the logits, of a group's heads and more


@dataclasses.dataclass(frozen=True)
class Reader:
    """A warpgroup that reads a ring, and its memory."""

    token: Any  # refs of the names of Token
    memory: Any  # of Ring
    plan: Any  # with the fields of WindowPlan
    batch: Any
    kv_head: Any
    q_tile: Any
    ring: Any  # keys in even slots, values in odd ones
    landed: Any
    new_rows: Any  # [2, d]: k and v
    q_rows: Any  # [group, d], if they are staged
    token_landed: Any

    @staticmethod
    def scratch(plan) -> dict:
        d = plan.head_size
        return {
            "q_tile": tile(ROWS, d),
            "ring": tile(2 * PAIRS, ROWS, d),
            "landed": plgpu.Barrier(num_barriers=2 * PAIRS),
            "new_rows": plgpu.SMEM((2, d), jnp.bfloat16),
            "q_rows": plgpu.SMEM((plan.group if plan.staged else 1, d), jnp.bfloat16),
            "token_landed": plgpu.Barrier(num_arrivals=2 + plan.staged),
        }

    @property
    def tiles(self) -> int:
        return cdiv(self.memory.keys.shape[1], ROWS)

    def first_of(self, j):
        """The first slot of a tile: the last one may overlap that before it."""
        slots = self.memory.keys.shape[1]
        return j * ROWS if slots % ROWS == 0 else jnp.minimum(j * ROWS, slots - ROWS)

    def copy(self, j, which: int) -> None:
        rows = pl.ds(self.first_of(j), ROWS)
        source = (self.memory.keys, self.memory.values)[which].at[self.batch, rows, self.kv_head]
        slot = lax.rem(2 * j, jnp.int32(2 * PAIRS)) + which
        plgpu.copy_gmem_to_smem(source, self.ring.at[slot], self.landed.at[slot])

    def ahead(self, part, parts: int, action: Callable) -> None:
        """action(tile, 0 for keys or 1 for values) for the tiles that are copied before it is known what they hold."""
        most = cdiv(self.tiles, parts)
        for i in range(min(PAIRS, most)):
            tile = jnp.int32(part * most + i)

            @pl.when(tile < self.tiles)
            def _(tile=tile):
                action(tile, 0)
                action(tile, 1)

    def start(self, part, parts: int) -> None:
        """The copies that `attend` counts on; all threads have read what was there."""
        plgpu.commit_smem()
        self.ahead(part, parts, self.copy)
        token, place = self.token, (self.batch, self.kv_head)
        if self.plan.staged:
            plgpu.copy_gmem_to_smem(
                heads_of(self.plan, token.q.at[self.batch], self.kv_head), self.q_rows, self.token_landed
            )
        for i, x in enumerate((token.k, token.v)):
            plgpu.copy_gmem_to_smem(x.at[place], self.new_rows.at[i], self.token_landed)

    def attend(self, part, parts: int, length):
        """(out [ROWS, d], log2 of the sum of exp2 of the logits [ROWS]) of a part; part 0 has the new token."""
        plan, token, batch, kv_head = self.plan, self.token, self.batch, self.kv_head
        d, scale = plan.head_size, plan.scale * LOG2E
        most = cdiv(self.tiles, parts)
        begin = jnp.int32(part * most)
        held, leaving = jnp.minimum(length, plan.window), lax.rem(length, jnp.int32(plan.window))
        end = jnp.minimum(cdiv(held, ROWS), begin + most)

        def await_unread(j, which: int) -> None:
            slot = lax.rem(2 * j, jnp.int32(2 * PAIRS)) + which
            pl.when(j >= end)(lambda: plgpu.barrier_wait(self.landed.at[slot]))

        def copy_next(j, which: int):
            """Over the tile of j, which all threads have read."""
            plgpu.commit_smem()
            pl.when(j + PAIRS < end)(lambda: self.copy(j + PAIRS, which))

        plgpu.barrier_wait(self.token_landed)
        q = rows_of(plan, self.q_rows) if plan.staged else of_group(plan, kv_head, token.q.at[batch])
        self.q_tile[...] = q.astype(jnp.bfloat16)
        plgpu.commit_smem()
        highest = (q * down(vector(self.new_rows.at[0]), ROWS)).sum(axis=1) * scale
        out, total = zeros(ROWS, d) + down(vector(self.new_rows.at[1]), ROWS), zero_rows(ROWS, 1.0)
        if parts > 1:
            has_token = lax.convert_element_type(part == 0, jnp.float32)
            highest, total, out = highest * has_token + MASKED * (1.0 - has_token), total * has_token, out * has_token

        def block(j, carry):
            out, highest, total = carry
            slot, first = lax.rem(2 * j, jnp.int32(2 * PAIRS)), self.first_of(j)
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
            if parts > 1:
                weights = jnp.where(seen, weights, 0.0)  # no key may have been seen yet
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

        out, highest, total = lax.fori_loop(begin, end, block, (out, highest, total))
        self.ahead(part, parts, await_unread)
        if parts > 1:
            total = jnp.maximum(total, 1e-30)
        return out * across(1.0 / total, d), highest + jnp.log2(total)


def vector(ref):
    """A row in float32, as long as a tile has columns."""
    return to_registers(ref, PER_COLUMN, optimized=False).astype(jnp.float32)


def heads_of(plan, ref, kv_head):
    """Of a ref [heads, columns] the group's."""
    return ref.at[pl.ds(kv_head * plan.group, plan.group)]


def of_group(plan, kv_head, ref):
    """`rows_of` the group's heads of a ref [heads, columns] in device memory, by loads that wait for one another."""
    return rows_of(plan, heads_of(plan, ref, kv_head))


def rows_of(plan, *refs):
    """[ROWS, columns] of float32: the sum of refs [group, columns], then zeros."""
    columns = refs[0].shape[-1]
    rows = zeros(ROWS, columns)
    for i in range(plan.group):
        row = sum((vector(ref.at[i]) for ref in refs[1:]), start=vector(refs[0].at[i]))
        rows = jnp.where(iota(ROWS, columns, 0) == i, down(row, ROWS), rows)
    return rows


def put_group(plan, stage, x, out, kv_head) -> None:
    """The group's heads of x [ROWS, columns] to a ref [heads, columns], by a copy that is not awaited."""
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    stage[...] = x.astype(stage.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(stage.at[pl.ds(0, plan.group)], heads_of(plan, out, kv_head))


def window_step(plan: WindowPlan, token: Token, ring: Ring):
    """(out [b, h, d], the ring after the token)."""
    (batch, h, d), tiles = token.q.shape, cdiv(ring.keys.shape[1], ROWS)
    parts = max(1, min(BLOCKS // (batch * plan.num_kv_heads), tiles // LEAST_PART))
    shape = lambda shape, dtype: jax.ShapeDtypeStruct(shape, dtype)
    out: Any = shape((batch, h, d), jnp.bfloat16)
    if parts > 1:
        lse = shape((batch, parts, plan.num_kv_heads, ROWS), jnp.float32)
        out = Parts(shape((batch, parts, 2, h, d), jnp.bfloat16), lse)
    scratch = Reader.scratch(plan) | {"stage": plgpu.SMEM((ROWS, d), jnp.bfloat16)}
    grid = {"kv_head": plan.num_kv_heads, "part": parts, "batch": batch}
    body = functools.partial(_window_step_part, plan=plan, parts=parts)
    settings: Any = dict(grid=grid, warpgroups=1, interpret=plan.interpret, reduction_bytes=0)
    out, ring = launch(body, token, out, scratch, in_place=ring, **settings)
    if parts > 1:
        lse = out.lse[..., : plan.group].reshape(batch, parts, h, 1)
        weights = jnp.exp2(lse - lse.max(axis=1, keepdims=True))
        out = out.out.astype(jnp.float32).sum(axis=2)
        out = ((weights * out).sum(axis=1) / weights.sum(axis=1)).astype(jnp.bfloat16)
    return out, ring


def _window_step_part(token: Token, out, memory: Ring, *, plan: WindowPlan, parts: int, stage, **scratch) -> None:
    batch, kv_head, part = (axis_index(name) for name in ("batch", "kv_head", "part"))
    reader = Reader(token, memory, plan, batch, kv_head, **scratch)
    reader.start(part, parts)
    result, lse = reader.attend(part, parts, token.length[batch])
    if parts > 1:
        out.lse.at[batch, part, kv_head][...] = lse
        for i, half in enumerate(split(result, True)):
            put_group(plan, stage, half, out.out.at[batch, part, i], kv_head)
    else:
        put_group(plan, stage, result, out.at[batch], kv_head)

    @pl.when(part == 0)
    def _():
        place = batch, lax.rem(token.length[batch], jnp.int32(plan.window)), kv_head
        plgpu.copy_smem_to_gmem(reader.new_rows.at[0], memory.keys.at[place])
        plgpu.copy_smem_to_gmem(reader.new_rows.at[1], memory.values.at[place])

    plgpu.wait_smem_to_gmem(0)
