"""The local branch on a TPU, forward: softmax over the window, key block by key block.

The grid is (batch, kv head, block of queries, block of keys); its last axis is sequential, and each query's maximum,
total and sum stay in scratch. Scores are kept transposed, [keys, queries]: maxima and totals are then taken over
sublanes, which costs additions and few moves, and lie along lanes, as the backward pass reads the log of the total.
"""

import functools

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas.tpu.plan import LEFT, LOWEST, RIGHT, UNROLLED, Plan, each_head, lanes, rows_of, struct, sublanes

AT_ONCE = 4


def forward(arrays: dict, plan: Plan, *, out_dtype) -> dict:
    """out [b, kv, group, t, dv], its factor if it is normed, and lse, the log of each query's total.

    factor, lse: [b, kv, group, 1, t] float32

    q: [b, kv, group, t, d]   k: [b, kv, back + t, d]   v: [b, kv, back + t, dv]
    segment_start [b, 1, t]: the position of the first key in a query's segment
    """
    batch, kv, group, length, _ = arrays["q"].shape
    dv, chunk = plan.value_width, plan.chunk
    shapes = plan.out_shapes(batch, kv, group, out_dtype)
    shapes["lse"] = struct((batch, kv, group, 1, length), jnp.float32)
    names = [name for name in ("q", "k", "v", "segment_start") if name in arrays]
    given = input_specs(plan, arrays, lambda n, j: n, lambda n, j: n + j)
    results = pl.pallas_call(
        functools.partial(_kernel, plan, [*names, *shapes]),
        out_shape=list(shapes.values()),
        grid=(batch, kv, plan.blocks, plan.key_blocks),
        in_specs=[given[name] for name in names],
        out_specs=[given["d_out" if name == "out" else "lse"] for name in shapes],
        scratch_shapes=[
            pltpu.VMEM((group, plan.chunks, dv, chunk), jnp.float32),
            pltpu.VMEM((group, plan.chunks, 1, chunk), jnp.float32),
            pltpu.VMEM((group, plan.chunks, 1, chunk), jnp.float32),
        ],
        compiler_params=plan.compiler_params("parallel", "arbitrary"),
        interpret=plan.interpreted(),
        cost_estimate=window_cost(plan, arrays, products=2, more=[*shapes.values()]),
        name="window_forward",
    )(*(arrays[name] for name in names))
    return dict(zip(shapes, results, strict=True))


def input_specs(plan: Plan, arrays: dict, queries, keys) -> dict:
    """Blocks of what the kernels read at step (n, j): `queries(n, j)` and `keys(n, j)` say which."""
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
        "segment_start": pl.BlockSpec((None, 1, block), lambda b, h, n, j: (b, 0, queries(n, j))),
    }


def window_cost(plan: Plan, arrays: dict, *, products: int, more) -> pl.CostEstimate:
    batch, kv, group, length, _ = arrays["q"].shape
    seen = batch * kv * group * length * min(plan.window + plan.chunk, plan.back + length)
    size = lambda x: x.size * jnp.dtype(x.dtype).itemsize
    return pl.CostEstimate(
        flops=products * seen * (plan.width + plan.value_width),
        transcendentals=seen,
        bytes_accessed=sum(map(size, arrays.values())) + sum(map(size, more)),
    )


def key_chunks(plan: Plan, query_chunk, between, position):
    """Key chunks [begin, end) of a block that queries of a chunk may see.

    query_chunk: which of its block; between: positions from the key block to the query block's own place; position: of
    the key block.
    """
    chunk = plan.chunk
    ahead = query_chunk * chunk + between  # of the first query, from the block's first key
    first = jnp.maximum((ahead - plan.window + 1) // chunk, (plan.first_key - position) // chunk)
    begin = jnp.clip(first, 0, plan.chunks)
    return begin, jnp.clip((ahead + chunk - 1) // chunk + 1, begin, plan.chunks)


def masked(plan: Plan, scores, ahead, key, start, otherwise):
    """Scores [keys, queries], or `otherwise` where the query does not see the key.

    ahead: from the first key to the first query; key: position of the first key; start [1, queries]: of segments.
    """
    distance = lanes(scores.shape) - sublanes(scores.shape) + ahead
    seen = (distance >= 0) & (distance < plan.window)
    if start is not None:
        seen = seen & (sublanes(scores.shape) + key >= start)
    elif plan.first_key > 0:
        seen = seen & (sublanes(scores.shape) + key >= plan.first_key)
    return jnp.where(seen, scores, otherwise)


def needs_mask(plan: Plan, ahead, key):
    """Is there a pair in the square that does not see each other?"""
    if plan.segmented:
        return ahead == ahead
    return (ahead < plan.chunk - 1) | (ahead + plan.chunk - 1 >= plan.window) | (key < plan.first_key)


def with_mask_or_without(plan: Plan, group: int, ahead, key, one_head, store):
    """`store(head, one_head(head, mask))` for each head, with a mask where one is needed.

    Several heads are computed before the first is stored: a store holds up the loads after it, and with them the next.
    """
    edge = needs_mask(plan, ahead, key)

    def heads(mask):
        if group > UNROLLED:
            each_head(group, lambda head, _: store(head, one_head(head, mask)) or 0, 0)
            return
        for first in range(0, group, AT_ONCE):
            several = range(first, min(first + AT_ONCE, group))
            for head, found in zip(several, [one_head(head, mask) for head in several], strict=True):
                store(head, found)

    pl.when(edge)(lambda: heads(True))
    pl.when(jnp.logical_not(edge))(lambda: heads(False))


def _kernel(plan: Plan, names, *refs):
    given = dict(zip(names, refs, strict=False))
    total, maximum, weight = refs[-3:]  # [group, chunks, dv, chunk], [group, chunks, 1, chunk] twice
    n, j = pl.program_id(2), pl.program_id(3)
    group, chunk = given["q"].shape[0], plan.chunk

    @pl.when(j == 0)
    def _():
        total[...], weight[...] = jnp.zeros_like(total), jnp.zeros_like(weight)
        maximum[...] = jnp.full_like(maximum, LOWEST)

    def one_chunk(c, _):
        rows = rows_of(c, chunk)
        start = given["segment_start"][:, rows] if plan.segmented else None
        between = plan.back - j * plan.block

        def one_key_chunk(i, _):
            keys = rows_of(i, chunk)
            k, v = given["k"][keys, :], given["v"][keys, :]
            ahead, key = (c - i) * chunk + between, (n + j) * plan.block + i * chunk

            def one_head(head, mask):
                scores = plan.dot(k, given["q"][head, rows, :], RIGHT) * plan.scale
                if mask:
                    scores = masked(plan, scores, ahead, key, start, LOWEST)
                before = maximum[head, c]
                higher = jnp.maximum(before, scores.max(axis=0, keepdims=True))
                weights, shrink = jnp.exp(scores - higher), jnp.exp(before - higher)
                more = weight[head, c] * shrink + weights.sum(axis=0, keepdims=True)
                return higher, more, total[head, c] * shrink + plan.dot(v, weights.astype(plan.dtype), LEFT)

            def store(head, found):
                maximum[head, c], weight[head, c], total[head, c] = found

            with_mask_or_without(plan, group, ahead, key, one_head, store)
            return 0

        lax.fori_loop(*key_chunks(plan, c, between, (n + j) * plan.block), one_key_chunk, 0)

        @pl.when(j == plan.key_blocks - 1)
        def _():
            def one_head(head, _):
                sums = weight[head, c]
                out, factor = total[head, c] * (1.0 / sums), None
                if plan.eps is not None:
                    out, factor = plan.normed(out, axis=0)
                plan.store_out(given, head, rows, jnp.transpose(out), factor)
                given["lse"][head, :, rows] = maximum[head, c] + jnp.log(sums)
                return 0

            each_head(group, one_head, 0)

        return 0

    lax.fori_loop(0, plan.chunks, one_chunk, 0)
