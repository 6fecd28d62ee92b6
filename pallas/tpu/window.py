"""Sliding-window attention on a TPU, forward: online softmax over blocks of keys.

The grid is (batch, kv head, block of queries, block of keys); its last axis is sequential, and each query's maximum,
sum of exponentials and accumulator stay in VMEM scratch. Scores are transposed, [keys, queries]: a reduction over
sublanes is mostly additions of whole registers, where one over lanes needs shuffles, and its result lies along lanes,
as the backward pass reads lse. All query heads of a group are computed from one block of keys.
"""

import functools

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas.tpu.plan import MASK_VALUE, NT, TN, UNROLLED, Plan, each_head, lanes, rows_of, struct, sublanes

AT_ONCE = 4  # heads whose results are computed before the first is stored


def forward(arrays: dict, plan: Plan, *, out_dtype) -> dict:
    """out [b, kv, group, t, dv], rstd if the kernel norms it, and lse; rstd, lse: [b, kv, group, 1, t] float32.

    q: [b, kv, group, t, d]   k: [b, kv, back + t, d]   v: [b, kv, back + t, dv]
    sink [b, kv, group, 1, chunk]: a logit without a value, as often as there are lanes
    segment_start [b, 1, t]: the position of the first key of a query's segment
    """
    batch, kv, group, length, _ = arrays["q"].shape
    dv, chunk = plan.value_width, plan.chunk
    shapes = plan.out_shapes(batch, kv, group, out_dtype)
    shapes["lse"] = struct((batch, kv, group, 1, length), jnp.float32)
    names = [name for name in ("q", "k", "v", "sink", "segment_start") if name in arrays]
    specs = input_specs(plan, arrays, lambda n, j: n, lambda n, j: n + j)
    results = pl.pallas_call(
        functools.partial(_kernel, plan, [*names, *shapes]),
        out_shape=list(shapes.values()),
        grid=(batch, kv, plan.blocks, plan.key_blocks),
        in_specs=[specs[name] for name in names],
        out_specs=[specs["d_out" if name == "out" else "lse"] for name in shapes],
        scratch_shapes=[
            pltpu.VMEM((group, plan.chunks, dv, chunk), jnp.float32),
            pltpu.VMEM((group, plan.chunks, 1, chunk), jnp.float32),
            pltpu.VMEM((group, plan.chunks, 1, chunk), jnp.float32),
        ],
        compiler_params=plan.compiler_params("parallel", "arbitrary"),
        interpret=plan.interpreted(),
        cost_estimate=window_cost(plan, arrays, products=2, outputs=[*shapes.values()]),
        name="window_forward",
    )(*(arrays[name] for name in names))
    return dict(zip(shapes, results, strict=True))


def input_specs(plan: Plan, arrays: dict, queries, keys) -> dict:
    """BlockSpecs of the kernels' inputs: step (n, j) reads block queries(n, j) of queries and keys(n, j) of keys."""
    group, block = arrays["q"].shape[2], plan.block
    of_query = lambda width: pl.BlockSpec(
        (None, None, group, block, width), lambda b, h, n, j: (b, h, 0, queries(n, j), 0)
    )
    of_key = lambda width: pl.BlockSpec((None, None, block, width), lambda b, h, n, j: (b, h, keys(n, j), 0))
    row = pl.BlockSpec((None, None, group, 1, block), lambda b, h, n, j: (b, h, 0, 0, queries(n, j)))
    return {
        "q": of_query(plan.width),
        "d_out": of_query(plan.value_width),
        "k": of_key(plan.width),
        "v": of_key(plan.value_width),
        "lse": row,
        "delta": row,
        "sink": pl.BlockSpec((None, None, group, 1, plan.chunk), lambda b, h, n, j: (b, h, 0, 0, 0)),
        "segment_start": pl.BlockSpec((None, 1, block), lambda b, h, n, j: (b, 0, queries(n, j))),
    }


def window_cost(plan: Plan, arrays: dict, *, products: int, outputs) -> pl.CostEstimate:
    batch, kv, group, length, _ = arrays["q"].shape
    pairs = batch * kv * group * length * min(plan.window + plan.chunk, plan.back + length)
    size = lambda x: x.size * jnp.dtype(x.dtype).itemsize
    return pl.CostEstimate(
        flops=products * pairs * (plan.width + plan.value_width),
        transcendentals=pairs,
        bytes_accessed=sum(map(size, arrays.values())) + sum(map(size, outputs)),
    )


def key_chunks(plan: Plan, query_chunk, block_offset, block_position):
    """The chunks [begin, end) of a block of keys that some query of a chunk may see.

    query_chunk: its index in its block. block_offset: positions from the block of keys to the block of queries.
    block_position: of the block of keys.
    """
    chunk = plan.chunk
    offset = query_chunk * chunk + block_offset  # from the block's first key to the chunk's first query
    first = jnp.maximum((offset - plan.window + 1) // chunk, (plan.first_key - block_position) // chunk)
    begin = jnp.clip(first, 0, plan.chunks)
    return begin, jnp.clip((offset + chunk - 1) // chunk + 1, begin, plan.chunks)


def masked(plan: Plan, scores, offset, key_position, segment_start, otherwise):
    """Scores [keys, queries], or `otherwise` where the query does not see the key.

    offset: from the first key to the first query. key_position: of the first key. segment_start: [1, queries].
    """
    distance = lanes(scores.shape) - sublanes(scores.shape) + offset
    seen = (distance >= 0) & (distance < plan.window)
    if segment_start is not None:
        seen = seen & (sublanes(scores.shape) + key_position >= segment_start)
    elif plan.first_key > 0:
        seen = seen & (sublanes(scores.shape) + key_position >= plan.first_key)
    return jnp.where(seen, scores, otherwise)


def needs_mask(plan: Plan, offset, key_position):
    """Is there a pair in the tile of a chunk of keys and one of queries that is masked?"""
    if plan.segmented:
        return offset == offset  # always, as a traced value
    return (offset < plan.chunk - 1) | (offset + plan.chunk - 1 >= plan.window) | (key_position < plan.first_key)


def with_mask_or_without(plan: Plan, group: int, offset, key_position, one_head, store):
    """`store(head, one_head(head, mask))` for each head, with a mask where one is needed.

    AT_ONCE heads are computed before the first is stored: loads do not move ahead of a store, so that a store after
    each head would serialise them.
    """
    edge = needs_mask(plan, offset, key_position)

    def heads(mask):
        if group > UNROLLED:
            each_head(group, lambda head, _: store(head, one_head(head, mask)) or 0, 0)
            return
        for first in range(0, group, AT_ONCE):
            several = range(first, min(first + AT_ONCE, group))
            for head, results in zip(several, [one_head(head, mask) for head in several], strict=True):
                store(head, results)

    pl.when(edge)(lambda: heads(True))
    pl.when(jnp.logical_not(edge))(lambda: heads(False))


def _kernel(plan: Plan, names, *refs_and_scratch):
    refs = dict(zip(names, refs_and_scratch, strict=False))
    acc, row_max, row_sum = refs_and_scratch[-3:]  # [group, chunks, dv, chunk], [group, chunks, 1, chunk] twice
    n, j = pl.program_id(2), pl.program_id(3)
    group, chunk = refs["q"].shape[0], plan.chunk

    @pl.when(j == 0)
    def _():
        acc[...] = jnp.zeros_like(acc)
        if "sink" in refs:  # the first of the logits
            row_max[...] = jnp.broadcast_to(refs["sink"][...][:, None], row_max.shape)
            row_sum[...] = jnp.ones_like(row_sum)
        else:
            row_max[...], row_sum[...] = jnp.full_like(row_max, MASK_VALUE), jnp.zeros_like(row_sum)

    def one_chunk(c, _):
        rows = rows_of(c, chunk)
        segment_start = refs["segment_start"][:, rows] if plan.segmented else None
        block_offset = plan.back - j * plan.block

        def one_key_chunk(i, _):
            keys = rows_of(i, chunk)
            k, v = refs["k"][keys, :], refs["v"][keys, :]
            offset, key_position = (c - i) * chunk + block_offset, (n + j) * plan.block + i * chunk

            def one_head(head, mask):
                scores = plan.dot(k, refs["q"][head, rows, :], NT) * plan.scale
                if mask:
                    scores = masked(plan, scores, offset, key_position, segment_start, MASK_VALUE)
                old_max = row_max[head, c]
                new_max = jnp.maximum(old_max, scores.max(axis=0, keepdims=True))
                weights, correction = jnp.exp(scores - new_max), jnp.exp(old_max - new_max)
                new_sum = row_sum[head, c] * correction + weights.sum(axis=0, keepdims=True)
                return new_max, new_sum, acc[head, c] * correction + plan.dot(v, weights.astype(plan.dtype), TN)

            def store(head, results):
                row_max[head, c], row_sum[head, c], acc[head, c] = results

            with_mask_or_without(plan, group, offset, key_position, one_head, store)
            return 0

        lax.fori_loop(*key_chunks(plan, c, block_offset, (n + j) * plan.block), one_key_chunk, 0)

        @pl.when(j == plan.key_blocks - 1)
        def _():
            def one_head(head, _):
                sums = row_sum[head, c]
                out, rstd = acc[head, c] * (1.0 / sums), None
                if plan.eps is not None:
                    out, rstd = plan.normed(out, axis=0)
                plan.store_out(refs, head, rows, jnp.transpose(out), rstd)
                refs["lse"][head, :, rows] = row_max[head, c] + jnp.log(sums)
                return 0

            each_head(group, one_head, 0)

        return 0

    lax.fori_loop(0, plan.chunks, one_chunk, 0)
