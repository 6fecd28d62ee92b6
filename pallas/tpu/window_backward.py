"""Sliding-window attention on a TPU, backward: one kernel for dq, one for dk and dv, both in the layout of window.py.

Weights are recomputed from lse. dk and dv are summed over the query heads of the group in float32, in a fixed order:
two runs are equal to the bit.
"""

import functools

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas.tpu.plan import NN, NT, TN, Plan, rows_of, struct
from pallas.tpu.window import input_specs, key_chunks, masked, window_cost, with_mask_or_without

NAMES = ("q", "k", "v", "d_out", "lse", "delta", "segment_start")


def query_gradients(arrays: dict, plan: Plan):
    """dq, shaped as q.

    arrays: those of the forward kernel; d_out [b, kv, group, t, dv]; lse, delta [b, kv, group, 1, t].
    """
    batch, kv, group, _, d = arrays["q"].shape
    specs = input_specs(plan, arrays, lambda n, j: n, lambda n, j: n + j)
    names = [name for name in NAMES if name in arrays]
    return pl.pallas_call(
        functools.partial(_query_kernel, plan, [*names, "dq"]),
        out_shape=struct(arrays["q"].shape, arrays["q"].dtype),
        grid=(batch, kv, plan.blocks, plan.key_blocks),
        in_specs=[specs[name] for name in names],
        out_specs=specs["q"],
        scratch_shapes=[pltpu.VMEM((group, plan.block, d), jnp.float32)],
        compiler_params=plan.compiler_params("parallel", "arbitrary"),
        interpret=plan.interpreted(),
        cost_estimate=window_cost(plan, arrays, products=3, outputs=[arrays["q"]]),
        name="window_backward_queries",
    )(*(arrays[name] for name in names))


def key_gradients(arrays: dict, plan: Plan):
    """dk and dv, shaped as k and v; arrays: as for `query_gradients`."""
    batch, kv, _, _, d = arrays["q"].shape
    back = plan.key_blocks - 1  # blocks of keys before the first query
    query_block = lambda n, j: jnp.clip(n - back + j, 0, plan.blocks - 1)
    specs = input_specs(plan, arrays, query_block, lambda n, j: n)
    names = [name for name in NAMES if name in arrays]
    return pl.pallas_call(
        functools.partial(_key_kernel, plan, [*names, "dk", "dv"]),
        out_shape=[struct(arrays[name].shape, arrays[name].dtype) for name in "kv"],
        grid=(batch, kv, plan.blocks + back, plan.key_blocks),
        in_specs=[specs[name] for name in names],
        out_specs=[specs["k"], specs["v"]],
        scratch_shapes=[
            pltpu.VMEM((plan.block, d), jnp.float32),
            pltpu.VMEM((plan.block, plan.value_width), jnp.float32),
        ],
        compiler_params=plan.compiler_params("parallel", "arbitrary"),
        interpret=plan.interpreted(),
        cost_estimate=window_cost(plan, arrays, products=4, outputs=[arrays["k"], arrays["v"]]),
        name="window_backward_keys",
    )(*(arrays[name] for name in names))


def _tile(plan: Plan, refs: dict, head, c, k, v, offset, key_position, mask: bool):
    """Of chunk c of a head's queries: weights and gradients of scaled scores, [keys, queries], and q and d_out."""
    rows = rows_of(c, plan.chunk)
    q, d_out = refs["q"][head, rows, :], refs["d_out"][head, rows, :].astype(plan.dtype)
    weights = jnp.exp(plan.dot(k, q, NT) * plan.scale - refs["lse"][head, :, rows])
    if mask:
        segment_start = refs["segment_start"][:, rows] if plan.segmented else None
        weights = masked(plan, weights, offset, key_position, segment_start, 0.0)
    d_scores = weights * (plan.dot(v, d_out, NT) - refs["delta"][head, :, rows])
    return weights.astype(plan.dtype), d_scores.astype(plan.dtype), q, d_out


def _query_kernel(plan: Plan, names, *refs_and_scratch):
    refs, d_q = dict(zip(names, refs_and_scratch, strict=False)), refs_and_scratch[-1]  # [group, block, d]
    n, j = pl.program_id(2), pl.program_id(3)
    group, chunk = refs["q"].shape[0], plan.chunk

    @pl.when(j == 0)
    def _():
        d_q[...] = jnp.zeros_like(d_q)

    def one_chunk(c, _):
        block_offset = plan.back - j * plan.block

        def one_key_chunk(i, _):
            keys = rows_of(i, chunk)
            k, v = refs["k"][keys, :], refs["v"][keys, :]
            offset, key_position = (c - i) * chunk + block_offset, (n + j) * plan.block + i * chunk

            def one_head(head, mask):
                _, d_scores, _, _ = _tile(plan, refs, head, c, k, v, offset, key_position, mask)
                return d_q[head, rows_of(c, chunk), :] + plan.dot(d_scores, k, TN)

            def store(head, new_d_q):
                d_q[head, rows_of(c, chunk), :] = new_d_q

            with_mask_or_without(plan, group, offset, key_position, one_head, store)
            return 0

        lax.fori_loop(*key_chunks(plan, c, block_offset, (n + j) * plan.block), one_key_chunk, 0)
        return 0

    lax.fori_loop(0, plan.chunks, one_chunk, 0)

    @pl.when(j == plan.key_blocks - 1)
    def _():
        refs["dq"][...] = (d_q[...] * plan.scale).astype(refs["dq"].dtype)


def _key_kernel(plan: Plan, names, *refs_and_scratch):
    refs = dict(zip(names, refs_and_scratch, strict=False))
    d_k, d_v = refs_and_scratch[-2:]  # [block, d], [block, dv]
    n, j = pl.program_id(2), pl.program_id(3)
    group, chunk, back = refs["q"].shape[0], plan.chunk, plan.key_blocks - 1

    @pl.when(j == 0)
    def _():
        d_k[...], d_v[...] = jnp.zeros_like(d_k), jnp.zeros_like(d_v)

    query_block = n - back + j

    @pl.when((query_block >= 0) & (query_block < plan.blocks))
    def _():
        block_offset = plan.back - (back - j) * plan.block

        def one_chunk(c, _):
            def one_key_chunk(i, _):
                keys = rows_of(i, chunk)
                k, v = refs["k"][keys, :], refs["v"][keys, :]
                offset, key_position = (c - i) * chunk + block_offset, n * plan.block + i * chunk

                def one_head(head, mask):
                    weights, d_scores, q, d_out = _tile(plan, refs, head, c, k, v, offset, key_position, mask)
                    return plan.dot(d_scores, q, NN), plan.dot(weights, d_out, NN)

                def store(head, results):
                    d_k[keys, :] += results[0]
                    d_v[keys, :] += results[1]

                with_mask_or_without(plan, group, offset, key_position, one_head, store)
                return 0

            lax.fori_loop(*key_chunks(plan, c, block_offset, n * plan.block), one_key_chunk, 0)
            return 0

        lax.fori_loop(0, plan.chunks, one_chunk, 0)

    @pl.when(j == plan.key_blocks - 1)
    def _():
        refs["dk"][...] = (d_k[...] * plan.scale).astype(refs["dk"].dtype)
        refs["dv"][...] = d_v[...].astype(refs["dv"].dtype)
