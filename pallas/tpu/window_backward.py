"""The local branch on a TPU, backward: one kernel for queries, one for keys, both in the layout of window.py.

Weights are found anew from the log of each query's total. dk and dv are summed over the group in float32; every sum has
a fixed order.
"""

import functools

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas.tpu.plan import LEFT, PLAIN, RIGHT, Plan, rows_of, struct
from pallas.tpu.window import input_specs, key_chunks, masked, window_cost, with_mask_or_without

NAMES = ("q", "k", "v", "d_out", "lse", "delta", "segment_start")


def query_gradients(arrays: dict, plan: Plan):
    """dq as q. arrays: as for the forward kernel; d_out [b, kv, group, t, dv]; lse, delta [b, kv, group, 1, t]."""
    batch, kv, group, _, d = arrays["q"].shape
    given = input_specs(plan, arrays, lambda n, j: n, lambda n, j: n + j)
    names = [name for name in NAMES if name in arrays]
    return pl.pallas_call(
        functools.partial(_query_kernel, plan, [*names, "dq"]),
        out_shape=struct(arrays["q"].shape, arrays["q"].dtype),
        grid=(batch, kv, plan.blocks, plan.key_blocks),
        in_specs=[given[name] for name in names],
        out_specs=given["q"],
        scratch_shapes=[pltpu.VMEM((group, plan.block, d), jnp.float32)],
        compiler_params=plan.compiler_params("parallel", "arbitrary"),
        interpret=plan.interpreted(),
        cost_estimate=window_cost(plan, arrays, products=3, more=[arrays["q"]]),
        name="window_backward_queries",
    )(*(arrays[name] for name in names))


def key_gradients(arrays: dict, plan: Plan):
    """dk and dv as k and v; arrays: as for `query_gradients`."""
    batch, kv, _, _, d = arrays["q"].shape
    spare = plan.key_blocks - 1  # key blocks before the first query's
    query_block = lambda n, j: jnp.clip(n - spare + j, 0, plan.blocks - 1)
    given = input_specs(plan, arrays, query_block, lambda n, j: n)
    names = [name for name in NAMES if name in arrays]
    return pl.pallas_call(
        functools.partial(_key_kernel, plan, [*names, "dk", "dv"]),
        out_shape=[struct(arrays[name].shape, arrays[name].dtype) for name in "kv"],
        grid=(batch, kv, plan.blocks + spare, plan.key_blocks),
        in_specs=[given[name] for name in names],
        out_specs=[given["k"], given["v"]],
        scratch_shapes=[
            pltpu.VMEM((plan.block, d), jnp.float32),
            pltpu.VMEM((plan.block, plan.value_width), jnp.float32),
        ],
        compiler_params=plan.compiler_params("parallel", "arbitrary"),
        interpret=plan.interpreted(),
        cost_estimate=window_cost(plan, arrays, products=4, more=[arrays["k"], arrays["v"]]),
        name="window_backward_keys",
    )(*(arrays[name] for name in names))


def _square(plan: Plan, given: dict, head, c, k, v, ahead, key, mask: bool):
    """Of a head's queries in chunk c: weights and the gradient of scaled scores, [keys, queries], and q and d_out."""
    rows = rows_of(c, plan.chunk)
    q, d_out = given["q"][head, rows, :], given["d_out"][head, rows, :].astype(plan.dtype)
    weights = jnp.exp(plan.dot(k, q, RIGHT) * plan.scale - given["lse"][head, :, rows])
    if mask:
        start = given["segment_start"][:, rows] if plan.segmented else None
        weights = masked(plan, weights, ahead, key, start, 0.0)
    d_scores = weights * (plan.dot(v, d_out, RIGHT) - given["delta"][head, :, rows])
    return weights.astype(plan.dtype), d_scores.astype(plan.dtype), q, d_out


def _query_kernel(plan: Plan, names, *refs):
    given, total = dict(zip(names, refs, strict=False)), refs[-1]  # [group, block, d]
    n, j = pl.program_id(2), pl.program_id(3)
    group, chunk = given["q"].shape[0], plan.chunk

    @pl.when(j == 0)
    def _():
        total[...] = jnp.zeros_like(total)

    def one_chunk(c, _):
        between = plan.back - j * plan.block

        def one_key_chunk(i, _):
            keys = rows_of(i, chunk)
            k, v = given["k"][keys, :], given["v"][keys, :]
            ahead, key = (c - i) * chunk + between, (n + j) * plan.block + i * chunk

            def one_head(head, mask):
                _, d_scores, _, _ = _square(plan, given, head, c, k, v, ahead, key, mask)
                return total[head, rows_of(c, chunk), :] + plan.dot(d_scores, k, LEFT)

            def store(head, found):
                total[head, rows_of(c, chunk), :] = found

            with_mask_or_without(plan, group, ahead, key, one_head, store)
            return 0

        lax.fori_loop(*key_chunks(plan, c, between, (n + j) * plan.block), one_key_chunk, 0)
        return 0

    lax.fori_loop(0, plan.chunks, one_chunk, 0)

    @pl.when(j == plan.key_blocks - 1)
    def _():
        given["dq"][...] = (total[...] * plan.scale).astype(given["dq"].dtype)


def _key_kernel(plan: Plan, names, *refs):
    given = dict(zip(names, refs, strict=False))
    d_k, d_v = refs[-2:]  # [block, d], [block, dv]
    n, j = pl.program_id(2), pl.program_id(3)
    group, chunk, spare = given["q"].shape[0], plan.chunk, plan.key_blocks - 1

    @pl.when(j == 0)
    def _():
        d_k[...], d_v[...] = jnp.zeros_like(d_k), jnp.zeros_like(d_v)

    query_block = n - spare + j

    @pl.when((query_block >= 0) & (query_block < plan.blocks))
    def _():
        between = plan.back - (spare - j) * plan.block

        def one_chunk(c, _):
            def one_key_chunk(i, _):
                keys = rows_of(i, chunk)
                k, v = given["k"][keys, :], given["v"][keys, :]
                ahead, key = (c - i) * chunk + between, n * plan.block + i * chunk

                def one_head(head, mask):
                    weights, d_scores, q, d_out = _square(plan, given, head, c, k, v, ahead, key, mask)
                    return plan.dot(d_scores, q, PLAIN), plan.dot(weights, d_out, PLAIN)

                def store(head, found):
                    d_k[keys, :] += found[0]
                    d_v[keys, :] += found[1]

                with_mask_or_without(plan, group, ahead, key, one_head, store)
                return 0

            lax.fori_loop(*key_chunks(plan, c, between, n * plan.block), one_key_chunk, 0)
            return 0

        lax.fori_loop(0, plan.chunks, one_chunk, 0)

    @pl.when(j == plan.key_blocks - 1)
    def _():
        given["dk"][...] = (d_k[...] * plan.scale).astype(given["dk"].dtype)
        given["dv"][...] = d_v[...].astype(given["dv"].dtype)
