"""What the Hopper kernels share: tiles, products on the tensor cores, a ring of copies in flight, phi in registers.

A block runs two compute warpgroups and one that issues copies. Refs are not arrays, so shapes stand in comments.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas.feature_map import KernelMap, softmax

ROWS = 64  # query rows of one warpgroup: the M of a wgmma instruction
MULTIPROCESSORS = 132  # of an H100; blocks of a launch that are resident at once, one on each
LOG2E = math.log2(math.e)
LARGEST = 32000.0  # of the integers that hold what is normed
MAGIC = 1.5 * 2.0**23  # added to a float32 of less than 2^22, leaves it rounded to an integer in the low bits
MASKED = -1e30  # finite, so that a wholly masked row of scores gives no NaN
MATRIX = plgpu.Layout.WGMMA
PER_ROW = plgpu.Layout.WGMMA.reduce(1)
PER_COLUMN = plgpu.Layout.WGMMA.reduce(0)


def tile(*shape: int) -> plgpu.SMEM:
    """Shared memory for bfloat16 tiles [..., rows, columns], laid out as wgmma and the copy engine want it."""
    return plgpu.SMEM(shape, jnp.bfloat16, transforms=(plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128)))


def step_of_normed(r, value_size: int, eps: float):
    """[rows]: what 1 stands for where x r, r = 1 / sqrt(mean(x^2) + eps), is saved in integers of 16 bits.

    No entry is larger than sqrt(d) times its row's rms, which is sqrt(1 - eps r^2), to which 1e-6 are added for its
    rounding: where eps dwarfs x, the error is 3e-8 sqrt(d) at most. NaN where r is 0: x, or its square, is infinite.
    """
    largest = value_size * (jnp.maximum(1.0 - eps * r * r, 0.0) + 1e-6) * (r / r)
    return largest * lax.rsqrt(largest) * (1.0 / LARGEST)


def pack_normed(y, step):
    """float32 in steps [rows] of 16-bit integers, as bfloat16's bits: half of float16's error where eps is small."""
    steps = y * across(1.0 / step, y.shape[1]) + MAGIC
    return lax.bitcast_convert_type(lax.bitcast_convert_type(steps, jnp.int32).astype(jnp.int16), jnp.bfloat16)


def unpack_normed(packed, step):
    """float32, from what `pack_normed` made."""
    steps = lax.bitcast_convert_type(packed, jnp.int16).astype(jnp.float32)
    return steps * across(step, packed.shape[1])


def load_normed(ref, step):
    """float32, from a tile that `pack_normed` made."""
    return unpack_normed(plgpu.load(ref, layout=MATRIX), step)


def zeros(rows: int, columns: int):
    return plgpu.layout_cast(jnp.zeros((rows, columns), jnp.float32), MATRIX)


def zero_rows(rows: int, value: float = 0.0):
    return plgpu.layout_cast(jnp.full((rows,), value, jnp.float32), PER_ROW)


def across(per_row, columns: int):
    """[rows] -> [rows, columns]"""
    return lax.broadcast_in_dim(per_row, (per_row.shape[0], columns), (0,))


def down(per_column, rows: int):
    """[columns] -> [rows, columns]"""
    return lax.broadcast_in_dim(per_column, (rows, per_column.shape[0]), (1,))


def iota(rows: int, columns: int, axis: int):
    return plgpu.broadcasted_iota(jnp.int32, (rows, columns), axis, layout=MATRIX)


def multiply_add(interpret: bool, *sums) -> Any:
    """For each (accumulator or its shape, [(a, b), ...]): accumulator + sum of a @ b, all in flight together.

    a: a ref or an array in registers; b: a ref. The interpreter knows no products of registers, so it gets jnp.dot.

    In a loop with an `a` that was made before the loop, no other `a` may be made before a wait and multiplied after it:
    ptxas 13.0 keeps both in the same registers, and from the second turn on the first is lost (LOG.md, 2026-11-27).
    `python -m pallas compile` looks for this in the machine code.
    """
    if interpret:
        results = []
        for start, products in sums:
            total = jnp.zeros(start, jnp.float32) if isinstance(start, tuple) else start
            for a, b in products:
                a = a if isinstance(a, jax.Array) else a[...]
                total += jnp.dot(a, b[...], preferred_element_type=jnp.float32)
            results.append(total)
        return results[0] if len(results) == 1 else tuple(results)

    def body(refs):
        for ref, (_, products) in zip(refs, sums, strict=True):
            for a, b in products:
                plgpu.wgmma(ref, a, b)

    starts = tuple(zeros(*start) if isinstance(start, tuple) else start for start, _ in sums)
    if len(sums) == 1 and isinstance(sums[0][0], tuple):

        def fresh(ref):
            body((ref,))
            return ref[...]

        return pl.run_scoped(fresh, plgpu.ACC(sums[0][0], jnp.float32))
    results = pl.run_state(body)(tuple(plgpu.ACC.init(start) for start in starts))
    return results[0] if len(results) == 1 else tuple(results)


@dataclasses.dataclass(frozen=True)
class Ring:
    """Tiles on their way from device memory, used in the order in which they were asked for.

    Use number i lives in slot i % size. `full` is awaited by every consumer; every consumer frees each use.
    """

    slots: Any  # [size, rows, columns] of bfloat16, or as the kernel laid it out
    full: Any  # [size] barriers, one arrival: the copy's
    free: Any  # [size] barriers, one arrival for each consumer
    interpret: bool

    @staticmethod
    def scratch(slots: plgpu.SMEM, consumers: int) -> tuple:
        size = slots.shape[0]
        return slots, plgpu.Barrier(num_barriers=size), plgpu.Barrier(num_barriers=size, num_arrivals=consumers)

    @property
    def size(self) -> int:
        return self.slots.shape[0]

    def load(self, use, source, rows: int | None = None) -> None:
        """Producer: copy `source` as soon as its slot is free; `rows`, if it has fewer than a slot."""
        slot = lax.rem(use, jnp.int32(self.size))

        @pl.when(use >= self.size)
        def _():
            plgpu.barrier_wait(self.free.at[slot])

        plgpu.copy_gmem_to_smem(source, self.tile_of(use, rows), self.full.at[slot])

    def wait(self, use, rows: int | None = None):
        """Consumer: the tile of this use, once it is there."""
        plgpu.barrier_wait(self.full.at[lax.rem(use, jnp.int32(self.size))])
        return self.tile_of(use, rows)

    def wait_all(self, use, count: int, rows: int | None = None) -> list:
        """Consumer: the tiles of `count` uses. Before the first product of a step: see `multiply_add`."""
        assert count <= self.size, f"{count} tiles cannot stand in {self.size} slots at once"
        return [self.wait(use + i, rows) for i in range(count)]

    def tile_of(self, use, rows: int | None = None):
        slot = self.slots.at[lax.rem(use, jnp.int32(self.size))]
        return slot if rows in (None, self.slots.shape[1]) else slot.at[pl.ds(0, rows)]

    def release(self, use) -> None:
        # The interpreter reads a product's operands as loads do, and must see them done before the next copy.
        if self.interpret:
            plgpu.commit_smem()
        plgpu.barrier_arrive(self.free.at[lax.rem(use, jnp.int32(self.size))])

    def drain(self, uses) -> None:
        """Producer, last: see every use freed."""

        def one(use, _):
            plgpu.barrier_wait(self.free.at[lax.rem(use, jnp.int32(self.size))])

        lax.fori_loop(jnp.maximum(uses - self.size, 0), uses, one, None)


def slice_of(row: KernelMap, x):
    """A slice of phi, [rows, d] in registers, of the signed x."""
    return _softmax(x) if row is softmax else row.value(x)


def pull_back(row: KernelMap, x, phi, g):
    """g through the slice's transposed Jacobian at the signed x, where phi is the slice."""
    return _softmax_pull_back(phi, g) if row is softmax else row.pull_back(x, phi, g)


def _softmax(x):  # sums over a row leave its layout, and have no axis of size 1
    columns = x.shape[1]
    x = x * LOG2E
    weights = jnp.exp2(x - across(x.max(axis=1), columns))
    return weights * across(1.0 / weights.sum(axis=1), columns)


def _softmax_pull_back(phi, g):
    return phi * (g - across((phi * g).sum(axis=1), phi.shape[1]))


def sign_of(slice_index):
    """1.0 for slice 0, -1.0 for slice 1."""
    return 1.0 - 2.0 * lax.convert_element_type(slice_index, jnp.float32)


def one_after_the_other(gates, warpgroup, is_first, compute: Callable):
    """`compute()` by warpgroup 0, then by warpgroup 1: the compiler gives sums across warps one scratch for both.

    gates: two barriers of one arrival. `is_first`: the first time in this block. `close_gates` comes last.
    """
    pl.when((warpgroup == 0) & jnp.logical_not(is_first))(lambda: plgpu.barrier_wait(gates.at[1]))
    pl.when(warpgroup == 1)(lambda: plgpu.barrier_wait(gates.at[0]))
    result = compute()
    pl.when(warpgroup == 0)(lambda: plgpu.barrier_arrive(gates.at[0]))
    pl.when(warpgroup == 1)(lambda: plgpu.barrier_arrive(gates.at[1]))
    return result


def close_gates(gates, warpgroup) -> None:
    pl.when(warpgroup == 0)(lambda: plgpu.barrier_wait(gates.at[1]))


def parts_of(x, precise: bool) -> list:
    """float32 as the sum of bfloat16 arrays: of one, or of two, the second being what rounding took from the first.

    For kernels: outside them, `hopper.ops._parts`.
    """
    first = x.astype(jnp.bfloat16)
    return [first, (x - first.astype(jnp.float32)).astype(jnp.bfloat16)] if precise else [first]


def norm_backward(d_tile, y_tiles, r, gain, value_size: int, eps: float, sum_rows: Callable):
    """Through gain * y, y = x r, r = 1 / sqrt(mean(x^2) + eps): the gradients of x and of the gain, and x's times y.

    d_tile, y_tiles (packed, y is their sum): refs [rows, columns]; r [rows], gain [columns] in registers. The gradient
    of x is in two `parts_of`; its product with y is summed over columns; `sum_rows` sums the gain's gradient over rows.
    """
    rows, columns = d_tile.shape
    step = step_of_normed(r, value_size, eps)
    d_out, y = plgpu.load(d_tile, layout=MATRIX).astype(jnp.float32), load_normed(y_tiles[0], step)
    for rest in y_tiles[1:]:
        y += load_normed(rest, step * (1.0 / LARGEST))
    d_gain = sum_rows(d_out * y)
    d_out = d_out * down(gain, rows)
    projection = (d_out * y).sum(axis=1) * (1.0 / value_size)
    exact = (d_out - y * across(projection, columns)) * across(r, columns)
    d_x, rest = parts_of(exact, True)
    return (d_x, rest), d_gain, (d_x.astype(jnp.float32) * y).sum(axis=1)


def where_rows(condition):
    """[ROWS]: 1.0 where the condition on each row holds, else 0.0; None for no condition."""
    return None if condition is None else jnp.where(condition, zero_rows(ROWS, 1.0), zero_rows(ROWS))


def send(stage, value, target=None) -> None:
    """Into shared memory, once the copy before has left it, and from there to device memory, if there is a target."""
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    stage[...] = value.astype(stage.dtype)
    plgpu.commit_smem()
    if target is not None:
        plgpu.copy_smem_to_gmem(stage, target)


def load_next(load: Callable, plan, index, is_last, warpgroup) -> None:
    """Ask for what `load(place)` brings for this block's next tile: all threads are done with what lies there."""
    plgpu.commit_smem()
    pl.when(jnp.logical_not(is_last))(lambda: load(plan.place(index + lax.axis_size(axis("block")), warpgroup)))


def axis(name: str) -> str:
    """A kernel's own name of an axis: one such as "batch" may name an axis of the device mesh around it, and would then
    be read as the device's place there."""
    return f"rattention {name}"


def axis_index(name: str):
    """This block's place along an axis of the grid, or this warpgroup's in its block."""
    return lax.axis_index(axis(name))


def named_refs(body: Callable, inputs: dict, outputs: dict):
    """`body(refs by name, **scratch)` as plgpu.kernel calls it: arrays that are None take no part."""
    names = [name for name, value in inputs.items() if value is not None] + list(outputs)

    def kernel(*refs, **scratch):
        body(dict(zip(names, refs, strict=True)), **scratch)

    return kernel


def for_each_tile(num_tiles: int, body: Callable, carry):
    """`body(index, is_last, carry)` for every tile of this block: resident blocks deal the tiles out among them."""
    block, blocks = axis_index("block"), lax.axis_size(axis("block"))
    count = (num_tiles - 1 - block) // blocks + 1
    return lax.fori_loop(0, count, lambda i, carry: body(block + i * blocks, i == count - 1, carry), carry)


def resident_blocks(num_tiles: int, interpret: bool) -> int:
    return min(num_tiles, 3 if interpret else MULTIPROCESSORS)


def launch(
    body,
    inputs: dict,
    outputs: dict,
    scratch: dict,
    *,
    grid: dict[str, int],
    warpgroups: int,
    interpret: bool,
    reduction_bytes: int = 2048,
) -> dict:
    """Run a kernel on the arrays of `inputs` that are not None; the results, by name.

    reduction_bytes: shared memory for sums over the rows of a tile, which cross warps.
    """
    # XLA would hand over a place inside another array, or take one for the result, where a caller cuts along the first
    # axis or writes into it; the kernels' copies need arrays of their own, which begin at multiples of 256 bytes.
    whole = (lambda x: x) if interpret else lax.optimization_barrier
    kernel = named_refs(body, inputs, outputs)
    kernel.__name__ = body.func.__name__.removeprefix("_")
    results = plgpu.kernel(
        kernel,
        out_type=tuple(outputs.values()),
        scratch_types=scratch,
        grid=tuple(grid.values()),
        grid_names=tuple(map(axis, grid)),
        num_threads=warpgroups,
        thread_name=axis("warpgroup"),
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=reduction_bytes),
        interpret=plgpu.InterpretGPUParams() if interpret else None,
    )(*whole([value for value in inputs.values() if value is not None]))
    return dict(zip(outputs, whole(results), strict=True))
