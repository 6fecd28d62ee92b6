"""What the Hopper kernels share: tiles, wgmma products, a ring of TMA copies in flight, phi in registers.

A thread block has one or two consumer warpgroups, which compute, and a producer warpgroup, which issues the TMA copies
from device memory. Refs are not arrays, so shapes stand in comments.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas.feature_map import KernelMap, softmax
from pallas.numerics import split

ROWS = 64  # query rows of one warpgroup: the M of a wgmma instruction
MULTIPROCESSORS = 132  # of an H100: a kernel that loops over tiles launches that many blocks, one on each
LOG2E = math.log2(math.e)
LARGEST = 32000.0  # of the 16-bit integers that normed outputs are saved in
MAGIC = 1.5 * 2.0**23  # added to a float32 below 2^22 in size, it leaves the nearest integer in the low bits
MASKED = -1e30  # finite, so that a row of scores that is all masked gives no NaN
MATRIX = plgpu.Layout.WGMMA  # of a wgmma accumulator; below, of what is reduced over its columns and over its rows
PER_ROW = plgpu.Layout.WGMMA.reduce(1)
PER_COLUMN = plgpu.Layout.WGMMA.reduce(0)
ACC = plgpu.ACC  # pyright: ignore[reportPrivateImportUsage]  # jax 0.10 does not export it


def tile(*shape: int, dtype: Any = jnp.bfloat16) -> Any:
    """Shared memory for tiles [..., rows, columns], tiled and swizzled as wgmma and TMA want it."""
    columns = 128 // jnp.dtype(dtype).itemsize
    return plgpu.SMEM(shape, dtype, transforms=(plgpu.TilingTransform((8, columns)), plgpu.SwizzleTransform(128)))


def to_registers(ref, layout: Any = MATRIX, *, optimized: bool = True) -> Any:
    """A ref's array in registers. From device memory, optimized=False: no vectorized load is insisted on."""
    return plgpu.load(ref, layout=layout, optimized=optimized)  # pyright: ignore[reportCallIssue]  # jax 0.10: an index


def step_of_normed(r, value_size: int, eps: float):
    """[rows]: the quantization step of y = x r, r = 1 / sqrt(mean(x^2) + eps), saved in integers of 16 bits.

    No entry of y is larger than sqrt(value_size) times the rms of its row. That rms is sqrt(1 - eps r^2); 1e-6 is added
    to its square because the difference is rounded, which costs an error of 3e-8 sqrt(value_size) at most, where eps is
    much larger than mean(x^2). NaN where r is 0, that is where x or its square is infinite.
    """
    largest = value_size * (jnp.maximum(1.0 - eps * r * r, 0.0) + 1e-6) * (r / r)
    return largest * lax.rsqrt(largest) * (1.0 / LARGEST)


def lo_step(step):
    """The step of a second packed part, which holds the rounding error of the first."""
    return step * (1.0 / LARGEST)


def pack_normed(y, step):
    """float32 as 16-bit integers, multiples of step [rows], in arrays of bfloat16: half of float16's error."""
    steps = y * across(1.0 / step, y.shape[1]) + MAGIC
    return lax.bitcast_convert_type(lax.bitcast_convert_type(steps, jnp.int32).astype(jnp.int16), jnp.bfloat16)


def unpack_normed(packed, step):
    """The inverse of `pack_normed`, in float32."""
    steps = lax.bitcast_convert_type(packed, jnp.int16).astype(jnp.float32)
    return steps * across(step, packed.shape[1])


def load_normed(ref, step):
    """Likewise, of a tile in shared memory."""
    return unpack_normed(to_registers(ref), step)


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
    """For each (accumulator or its shape, [(a, b), ...]): accumulator + sum of a @ b, by wgmmas all in flight together.

    A shape stands for an accumulator of zeros. a: a ref, or an array in registers; b: a ref. The interpreter has no
    wgmma with an operand in registers: it gets jnp.dot.

    Where a loop reads an `a` made before the loop, no other `a` may be made before a barrier wait and multiplied after
    it: ptxas 13.0 puts both in the same registers, and the first is lost from the second iteration on. The least such
    kernel is tests/tools/register_operands.py, and `python -m pallas compile` looks for this in the machine code.
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

        return pl.run_scoped(fresh, ACC(sums[0][0], jnp.float32))
    results = pl.run_state(body)(tuple(ACC.init(start) for start in starts))
    return results[0] if len(results) == 1 else tuple(results)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Ring:
    """A circular buffer of tiles in shared memory, filled by TMA, each with a pair of mbarriers.

    Producer and consumers count uses alike: use number i is the i-th tile asked for, in slot i % size. Every consumer
    waits for `full` and, done with a use, arrives at `free`, on which the producer waits before it reuses the slot.
    """

    slots: Any  # [size, rows, columns] of bfloat16, or as the kernel laid it out
    full: Any  # [size] barriers, one arrival: the copy's
    free: Any  # [size] barriers, one arrival for each consumer
    interpret: bool = dataclasses.field(metadata={"static": True})

    @staticmethod
    def scratch(slots: Any, consumers: int, interpret: bool) -> "Ring":
        """What a kernel asks for, to be handed the ring itself."""
        size = slots.shape[0]
        full, free = plgpu.Barrier(num_barriers=size), plgpu.Barrier(num_barriers=size, num_arrivals=consumers)
        return Ring(slots, full, free, interpret)

    @property
    def size(self) -> int:
        return self.slots.shape[0]

    def load(self, use, source, rows: int | None = None) -> None:
        """Producer: copy `source` as soon as the slot is free. rows: of `source`, where it has fewer than a slot."""
        slot = lax.rem(use, jnp.int32(self.size))

        @pl.when(use >= self.size)
        def _():
            plgpu.barrier_wait(self.free.at[slot])

        plgpu.copy_gmem_to_smem(source, self.tile_of(use, rows), self.full.at[slot])

    def wait(self, use, rows: int | None = None):
        """Consumer: the tile of this use, once its copy has landed."""
        plgpu.barrier_wait(self.full.at[lax.rem(use, jnp.int32(self.size))])
        return self.tile_of(use, rows)

    def wait_all(self, use, count: int, rows: int | None = None) -> list:
        """Consumer: the tiles of `count` uses, awaited before a step's first product: see `multiply_add`."""
        assert count <= self.size, f"{count} tiles do not fit in {self.size} slots at once"
        return [self.wait(use + i, rows) for i in range(count)]

    def tile_of(self, use, rows: int | None = None):
        slot = self.slots.at[lax.rem(use, jnp.int32(self.size))]
        return slot if rows in (None, self.slots.shape[1]) else slot.at[pl.ds(0, rows)]

    def release(self, use) -> None:
        """Consumer: its reads of this use are done."""
        # The interpreter reads wgmma's operands by loads, and must see them finished before the next copy.
        if self.interpret:
            plgpu.commit_smem()
        plgpu.barrier_arrive(self.free.at[lax.rem(use, jnp.int32(self.size))])

    def drain(self, uses) -> None:
        """Producer, at the end: wait until every use is freed."""

        def one(use, _):
            plgpu.barrier_wait(self.free.at[lax.rem(use, jnp.int32(self.size))])

        lax.fori_loop(jnp.maximum(uses - self.size, 0), uses, one, None)


def slice_of(row: KernelMap, x, axis: int = 1):
    """A slice of phi(x) in registers, channels along this axis. x: already multiplied by `sign_of` the slice."""
    return _softmax(x, axis) if row is softmax else row.value(x)


def pull_back(row: KernelMap, x, phi, g):
    """The transposed Jacobian of `slice_of` at x, times g. phi: the slice itself."""
    return _softmax_pull_back(phi, g) if row is softmax else row.pull_back(x, phi, g)


def _softmax(x, axis: int):  # Mosaic's reductions drop the axis: no keepdims
    spread, size = (down if axis == 0 else across), x.shape[axis]
    x = x * LOG2E
    weights = jnp.exp2(x - spread(x.max(axis=axis), size))
    return weights * spread(1.0 / weights.sum(axis=axis), size)


def _softmax_pull_back(phi, g):
    return phi * (g - across((phi * g).sum(axis=1), phi.shape[1]))


def sign_of(slice_index):
    """1.0 for slice 0, -1.0 for slice 1."""
    return 1.0 - 2.0 * lax.convert_element_type(slice_index, jnp.float32)


def one_after_the_other(gates, warpgroup, is_first, compute: Callable):
    """`compute()` by warpgroup 0, then by warpgroup 1: Mosaic gives both one scratch for reductions across warps.

    gates: two barriers of one arrival. is_first: is this the first call in this block? `close_gates` follows the last.
    """
    pl.when((warpgroup == 0) & jnp.logical_not(is_first))(lambda: plgpu.barrier_wait(gates.at[1]))
    pl.when(warpgroup == 1)(lambda: plgpu.barrier_wait(gates.at[0]))
    result = compute()
    pl.when(warpgroup == 0)(lambda: plgpu.barrier_arrive(gates.at[0]))
    pl.when(warpgroup == 1)(lambda: plgpu.barrier_arrive(gates.at[1]))
    return result


def close_gates(gates, warpgroup) -> None:
    """Wait for the last arrival, so that no barrier is left with one that nobody awaits."""
    pl.when(warpgroup == 0)(lambda: plgpu.barrier_wait(gates.at[1]))


def norm_backward(d_tile, y_tiles, r, gain, value_size: int, eps: float, sum_rows: Callable):
    """Backward of gain * y, y = x r, r = 1 / sqrt(mean(x^2) + eps): (d_x as [hi, lo], d_gain, the row sums of d_x y).

    d_tile, the cotangent, and y_tiles: refs [rows, columns]; y is packed, in a second tile its second part. r [rows],
    gain [columns]: in registers. sum_rows: how a tile is summed over its rows, for d_gain.
    """
    rows, columns = d_tile.shape
    step = step_of_normed(r, value_size, eps)
    d_out, y = to_registers(d_tile).astype(jnp.float32), load_normed(y_tiles[0], step)
    for y_lo in y_tiles[1:]:
        y += load_normed(y_lo, lo_step(step))
    d_gain = sum_rows(d_out * y)
    d_out = d_out * down(gain, rows)
    projection = (d_out * y).sum(axis=1) * (1.0 / value_size)
    exact = (d_out - y * across(projection, columns)) * across(r, columns)
    hi, lo = split(exact, True)
    return (hi, lo), d_gain, (hi.astype(jnp.float32) * y).sum(axis=1)


def where_rows(condition):
    """[ROWS]: 1.0 where the condition on each row holds, else 0.0; None for no condition."""
    return None if condition is None else jnp.where(condition, zero_rows(ROWS, 1.0), zero_rows(ROWS))


def send(stage, value, target=None) -> None:
    """Write to `stage`, in shared memory, once the last copy out of it is done; copy it to `target` by TMA, if any."""
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    stage[...] = value.astype(stage.dtype)
    plgpu.commit_smem()
    if target is not None:
        plgpu.copy_smem_to_gmem(stage, target)


def load_next(load: Callable, plan, index, is_last, warpgroup) -> None:
    """Prefetch what `load(place)` copies for this block's next tile. All threads have read what is there now."""
    plgpu.commit_smem()
    pl.when(jnp.logical_not(is_last))(lambda: load(plan.place(index + lax.axis_size(axis("block")), warpgroup)))


def axis(name: str) -> str:
    """A kernel's own name of an axis: inside shard_map a plain "batch" could name an axis of the mesh of devices."""
    return f"rattention {name}"


def axis_index(name: str):
    """This block's index along an axis of the grid, or this warpgroup's in its block."""
    return lax.axis_index(axis(name))


def for_each_tile(num_tiles: int, body: Callable, carry):
    """`body(index, is_last, carry)` for this block's tiles, block, block + blocks, ...: the kernel is persistent."""
    block, blocks = axis_index("block"), lax.axis_size(axis("block"))
    count = (num_tiles - 1 - block) // blocks + 1
    return lax.fori_loop(0, count, lambda i, carry: body(block + i * blocks, i == count - 1, carry), carry)


def resident_blocks(num_tiles: int, interpret: bool) -> int:
    """The grid of a persistent kernel."""
    return min(num_tiles, 3 if interpret else MULTIPROCESSORS)


def launch(
    body: functools.partial,
    inputs,
    outputs,
    scratch: dict,
    *,
    grid: dict[str, int],
    warpgroups: int,
    interpret: bool,
    reduction_bytes: int = 2048,
    in_place: Any = None,
) -> Any:
    """Run a kernel: `body(inputs, outputs, **scratch)` with refs for arrays. The results, in the place of their shapes.

    inputs: a pytree of arrays, those that are None being no operands; outputs: of shapes, likewise.
    reduction_bytes: shared memory for sums over the rows of a tile, which cross warps.
    in_place: a pytree of arrays that the kernel reads and writes; the call is then `body(inputs, outputs, in_place,
    **scratch)`, and returns (results, in_place as it is then). The arrays given stay as they were: XLA copies one that
    is read later, and no other.
    """
    # XLA would hand over a view of another array, or take one for the result, where a caller cuts along the first
    # axis or writes into it; TMA needs arrays of their own, which begin at multiples of 256 bytes.
    whole = (lambda x: x) if interpret else lax.optimization_barrier
    arrays, inputs_tree = jax.tree.flatten(inputs)
    changed, changed_tree = jax.tree.flatten(in_place)
    shapes, outputs_tree = jax.tree.flatten(outputs)

    def kernel(*refs, **scratch):
        in_refs, changed_refs = refs[: len(arrays)], refs[len(arrays) : len(arrays) + len(changed)]
        trees = [jax.tree.unflatten(inputs_tree, in_refs)]
        trees.append(jax.tree.unflatten(outputs_tree, refs[len(arrays) + len(changed) :]))
        if changed:
            trees.append(jax.tree.unflatten(changed_tree, changed_refs))
        body(*trees, **scratch)

    kernel.__name__ = body.func.__name__.removeprefix("_")
    # jax 0.10's stubs lack the interpreter's parameters
    interpreter = plgpu.InterpretGPUParams() if interpret else None  # pyright: ignore[reportAttributeAccessIssue]
    mesh: dict[str, Any] = dict(
        grid=tuple(grid.values()),
        grid_names=tuple(map(axis, grid)),
        num_threads=warpgroups,
        thread_name=axis("warpgroup"),
    )
    settings: dict[str, Any] = dict(
        out_type=tuple(shapes),
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=reduction_bytes),
        interpret=interpreter,
    )
    if not changed:
        results = plgpu.kernel(kernel, scratch_types=scratch, **mesh, **settings)(*whole(arrays))
        return jax.tree.unflatten(outputs_tree, whole(results))

    def scoped(*refs):  # what `plgpu.kernel` does, which takes no `jax.Ref`
        pl.run_scoped(functools.partial(kernel, *refs), collective_axes=axis("warpgroup"), **scratch)

    run = pl.kernel(scoped, mesh=plgpu.Mesh(**mesh), name=kernel.__name__, **settings)
    refs = [jax.new_ref(x) for x in whole(changed)]
    results = jax.tree.unflatten(outputs_tree, whole(run(*whole(arrays), *refs)))
    return results, jax.tree.unflatten(changed_tree, whole([jax.freeze(ref) for ref in refs]))
