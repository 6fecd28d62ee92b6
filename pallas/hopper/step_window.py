"""The window of one token: softmax attention of a group's heads to a ring, cut into parts, each a block's.

Everything is transposed: heads are columns, of which a product may have as few as 8; slots or channels are rows. The
online softmax begins at the new token's own key, which need not be in the ring for that; the slot that it takes is left
out.
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
    PER_ROW,
    ROWS,
    across,
    down,
    iota,
    multiply_add,
    tile,
    to_registers,
    zeros,
)

BLOCKS = 256  # with fewer, rings are cut into parts: two for each multiprocessor, beside a state more and shorter ones
MOST_PARTS = 32  # of a ring: the second launch reads them one after the other
UNROLLED = 8  # terms of a sum: their loads do not wait for one another


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Parts:
    """Of each part of the ring; columns beyond a group's heads hold anything."""

    lse: Any = None  # [b, parts, kv, columns] float32: log2 of the sum of exp2 of the logits
    out: Any = None  # [b, parts, kv, d, columns] float32

    @staticmethod
    def shapes(plan, batch: int, parts: int) -> "Parts":
        lse = batch, parts, plan.num_kv_heads, plan.columns
        out = *lse[:-1], plan.head_size, plan.columns
        return Parts(*(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in (lse, out)))


@dataclasses.dataclass(frozen=True)
class Cut:
    """Of a ring: parts of up to `most` chunks of `chunk` slots, the last of which may overlap that before it."""

    slots: int
    chunk: int
    most: int
    parts: int

    @staticmethod
    def of(slots: int, rings: int, blocks: int) -> "Cut":
        chunk = min(slots // ROWS, 2) * ROWS
        chunks = cdiv(slots, chunk)
        most = cdiv(chunks, min(MOST_PARTS, max(1, blocks // rings)))
        return Cut(slots, chunk, most, cdiv(chunks, most))

    def first_of(self, j):
        return j * self.chunk if self.slots % self.chunk == 0 else jnp.minimum(j * self.chunk, self.slots - self.chunk)


def window_scratch(plan, cut: Cut) -> dict:
    d = plan.head_size
    return {
        "keys": tile(cut.chunk, d),
        "values": tile(cut.chunk, d),
        "q_tile": tile(plan.columns, d),
        "weights": tile(plan.columns, cut.chunk),
    }


def attend(plan, inputs, ring, cut: Cut, batch, kv_head, part, landed, *, keys, values, q_tile, weights):
    """(out [d, columns], log2 of the sum of exp2 of the logits [columns]) of a part; part 0 has the new token.

    landed: two barriers; what follows is `window_scratch`.
    """
    d, n, chunk, scale = plan.head_size, plan.columns, cut.chunk, plan.scale * LOG2E

    def copy(j, which: int) -> None:
        source = (ring.keys, ring.values)[which].at[batch, pl.ds(cut.first_of(j), chunk), kv_head]
        plgpu.copy_gmem_to_smem(source, (keys, values)[which], landed.at[which])

    begin = part * cut.most
    copy(begin, 0)
    copy(begin, 1)
    length = ring.length[batch]
    held, leaving = jnp.minimum(length, plan.window), lax.rem(length, jnp.int32(plan.window))
    end = jnp.maximum(jnp.minimum(cdiv(held, chunk), begin + cut.most), begin + 1)

    def copy_next(j, which: int) -> None:
        """Over the chunk j, which all threads have read."""
        if cut.most > 1:
            plgpu.commit_smem()
            pl.when(j + 1 < end)(lambda: copy(j + 1, which))

    q = beside(d, n, plan.group, lambda i: row(inputs.q.at[batch, kv_head * plan.group + i]))
    k, v = (across(row(x.at[batch, kv_head]), n) for x in (inputs.k, inputs.v))
    put_transposed(q, q_tile)
    plgpu.commit_smem()
    has_token = lax.convert_element_type(part == 0, jnp.float32)
    own = (q * k).sum(axis=0) * scale
    highest = own * has_token + MASKED * (1.0 - has_token)
    total = per_column(n, 0.0) + has_token
    out = v * has_token

    def block(j, carry):
        out, highest, total = carry
        first = cut.first_of(j)
        plgpu.barrier_wait(landed.at[0])
        logits = multiply_add(plan.interpret, ((chunk, n), [(keys, q_tile.transpose((1, 0)))]))
        copy_next(j, 0)
        place = iota(chunk, n, 0) + first
        seen = (place >= j * chunk) & (place < held) & (place != leaving)
        logits = jnp.where(seen, logits * scale, MASKED)
        higher = jnp.maximum(highest, logits.max(axis=0))
        shrink, shares = jnp.exp2(highest - higher), jnp.exp2(logits - down(higher, chunk))
        total = total * shrink + shares.sum(axis=0)
        put_transposed(shares, weights)
        plgpu.barrier_wait(landed.at[1])

        @pl.when(first + chunk > held)
        def _():  # what no document holds may be NaN
            for i in range(0, chunk, ROWS):
                some = values.at[pl.ds(i, ROWS)]
                rows = to_registers(some).astype(jnp.float32)
                some[...] = jnp.where(iota(ROWS, d, 0) + (first + i) < held, rows, 0.0).astype(jnp.bfloat16)

        plgpu.commit_smem()
        products = [(values.transpose((1, 0)), weights.transpose((1, 0)))]
        out = multiply_add(plan.interpret, (out * down(shrink, d), products))
        copy_next(j, 1)
        return out, higher, total

    carry = out, highest, total
    out, highest, total = block(begin, carry) if cut.most == 1 else lax.fori_loop(begin, end, block, carry)
    return out * down(1.0 / total, d), highest + jnp.log2(total)


def row(ref, layout: Any = PER_ROW):
    """A row in float32, from device memory."""
    return to_registers(ref, layout, optimized=False).astype(jnp.float32)


def accumulate(count: int, some: Callable, x, columns: int = 8):
    """some(indices, x) for 0 to count: as many at a time as registers hold of as many columns."""
    at_once = max(1, UNROLLED * 8 // columns)
    rounds = count // at_once
    if rounds > 1:
        x = lax.fori_loop(0, rounds, lambda i, x: some([i * at_once + j for j in range(at_once)], x), x)
    rest = list(range(rounds * at_once if rounds > 1 else 0, count))
    return some(rest, x) if rest else x


def beside(rows: int, columns: int, count: int, column: Callable):
    """[rows, columns] of float32: column(i) [rows] for i < count, then zeros."""

    def some(indices, x):
        for i, one in [(i, column(i)) for i in indices]:
            x = jnp.where(iota(rows, columns, 1) == i, across(one, columns), x)
        return x

    return accumulate(count, some, zeros(rows, columns))


def column_of(x, i):
    """[rows] of [rows, columns]"""
    return jnp.where(iota(x.shape[0], x.shape[1], 1) == i, x, 0.0).sum(axis=1)


def put_transposed(x, ref) -> None:
    """x [rows, columns] in bfloat16 to a tile [columns, rows]."""
    ref.transpose((1, 0))[...] = plgpu.layout_cast(x.astype(jnp.bfloat16), plgpu.Layout.WGMMA_TRANSPOSED)


def merged(plan, parts: Parts, sink_logits, batch, kv_head):
    """out [d, columns] of all parts, and of a logit without a value, if there is one."""
    d, n = plan.head_size, plan.columns

    def some(indices, carry):
        out, highest, total = carry
        at = [(batch, i, kv_head) for i in indices]
        lses = [row(parts.lse.at[i], PER_COLUMN) for i in at]
        outs = [to_registers(parts.out.at[i], optimized=False) for i in at]
        higher = functools.reduce(jnp.maximum, lses, highest)
        shrink = jnp.exp2(highest - higher)
        out, total = out * down(shrink, d), total * shrink
        for lse, x in zip(lses, outs, strict=True):
            share = jnp.exp2(lse - higher)
            out, total = out + x * down(share, d), total + share
        return out, higher, total

    highest, total = per_column(n, MASKED), per_column(n, 0.0)
    if sink_logits is not None:
        sinks = sink_logits.at[0 if sink_logits.shape[0] == 1 else batch, kv_head]
        highest, total = row(sinks, PER_COLUMN) * LOG2E, per_column(n, 1.0)
    out, _, total = accumulate(parts.lse.shape[1], some, (zeros(d, n), highest, total), n)
    return out * down(1.0 / total, d)


def per_column(columns: int, value: float):
    return plgpu.layout_cast(jnp.full((columns,), value, jnp.float32), PER_COLUMN)
