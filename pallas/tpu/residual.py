"""Residual linear attention on a TPU, forward: one pass along the sequence, the state in VMEM.

The grid is (batch, kv head, block of queries); its last axis is sequential, and the state [f, dv] of a key/value head
stays in VMEM scratch from block to block. Keys are shifted right by the window, so that this is chunkwise causal linear
attention: a chunk of queries reads the state before it, and its own chunk of keys through a masked tile of scores. All
query heads of a group are computed from one chunk of keys. For the backward pass the state before each block is saved
in float32.
"""

import functools
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas.tpu.plan import NT, TN, Plan, each_head, lanes, rows_of, struct, sublanes, zeros

FIRST_SEGMENT = -(2**30)  # where the first segment starts: before every key, so that it reads the initial state


def forward(arrays: dict, plan: Plan, *, out_dtype, save: bool) -> dict:
    """out [b, kv, group, t, dv], rstd [b, kv, group, 1, t] float32 if the kernel norms it, and with `save` the states.

    states: [b, kv, blocks, f, dv] float32, that before each block.

    q: [b, kv, group, t, d]   k: [b, kv, t, d]   v: [b, kv, t, dv]
    start_states: [b, n, kv, f, dv] float32: initial_state, and with n = 2 segment_state
    segment_start [b, t, 1]: the position of the first key of a query's segment
    carry_start [b, chunks]: likewise of each chunk's last key, to whose segment the state after the chunk belongs
    """
    batch, kv, group = arrays["q"].shape[:3]
    f, dv, block = plan.num_features, plan.value_width, plan.block
    shapes = plan.out_shapes(batch, kv, group, out_dtype)
    specs = {
        "out": pl.BlockSpec((None, None, group, block, dv), lambda b, h, n: (b, h, 0, n, 0)),
        "rstd": pl.BlockSpec((None, None, group, 1, block), lambda b, h, n: (b, h, 0, 0, n)),
    }
    if save:
        shapes["states"] = struct((batch, kv, plan.blocks, f, dv), jnp.float32)
        specs["states"] = pl.BlockSpec((None, None, None, f, dv), lambda b, h, n: (b, h, n, 0, 0))
    names = [name for name in ("q", "k", "v", "start_states", "segment_start", "carry_start") if name in arrays]
    inputs = input_specs(plan, arrays, lambda n: n)
    results = pl.pallas_call(
        functools.partial(_kernel, plan, names, list(shapes)),
        out_shape=list(shapes.values()),
        grid=(batch, kv, plan.blocks),
        in_specs=[inputs[name] for name in names],
        out_specs=[specs[name] for name in shapes],
        scratch_shapes=[pltpu.VMEM((f, dv), jnp.float32), pltpu.VMEM((1, dv), jnp.float32)],
        compiler_params=plan.compiler_params(),
        interpret=plan.interpreted(),
        cost_estimate=forward_cost(plan, arrays, shapes.values()),
        name="residual_forward",
    )(*(arrays[name] for name in names))
    return dict(zip(shapes, results, strict=True))


def input_specs(plan: Plan, arrays: dict, block_of) -> dict:
    """BlockSpecs of the kernels' inputs: step n of the sequential axis reads block `block_of(n)`."""
    group, block = arrays["q"].shape[2], plan.block
    f, dv = plan.num_features, plan.value_width
    by_head = lambda width: pl.BlockSpec((None, None, block, width), lambda b, h, n: (b, h, block_of(n), 0))
    specs = {
        "q": pl.BlockSpec((None, None, group, block, plan.width), lambda b, h, n: (b, h, 0, block_of(n), 0)),
        "d_out": pl.BlockSpec((None, None, group, block, dv), lambda b, h, n: (b, h, 0, block_of(n), 0)),
        "k": by_head(plan.width),
        "v": by_head(dv),
        "states": pl.BlockSpec((None, None, None, f, dv), lambda b, h, n: (b, h, block_of(n), 0, 0)),
        "segment_start": pl.BlockSpec((None, block, 1), lambda b, h, n: (b, block_of(n), 0)),
        "carry_start": pl.BlockSpec(memory_space=pltpu.SMEM),
    }
    if plan.num_start_states:
        shape = (None, plan.num_start_states, None, f, dv)
        specs["start_states"] = pl.BlockSpec(shape, lambda b, h, n: (b, 0, h, 0, 0))
    return specs


def forward_cost(plan: Plan, arrays: dict, results) -> pl.CostEstimate:
    batch, kv, group, length, _ = arrays["q"].shape
    f, dv, c = plan.num_features, plan.value_width, plan.chunk
    rows = batch * kv * length
    size = lambda x: x.size * jnp.dtype(x.dtype).itemsize
    return pl.CostEstimate(
        flops=2 * rows * (group * (f * dv + c * (f + dv)) + f * dv),
        transcendentals=rows * (group + 1) * f,
        bytes_accessed=sum(map(size, arrays.values())) + sum(map(size, results)),
    )


def _kernel(plan: Plan, names, outputs, *refs_and_scratch):
    refs = dict(zip([*names, *outputs], refs_and_scratch, strict=False))
    state, mean = refs_and_scratch[-2:]  # [f, dv], and the sum of its means over the slices of f [1, dv]
    block_index = pl.program_id(2)

    @pl.when(block_index == 0)
    def _():
        state[...], mean[...] = start(plan, refs)

    if "states" in refs:
        refs["states"][...] = state[...]
    fresh = fresh_state(plan, refs)

    def one_chunk(c, _):
        rows = rows_of(c, plan.chunk)
        k, v = refs["k"][rows, :], refs["v"][rows, :]
        features = plan.phi(k)
        phi_k = split_features(plan, features)
        centred, mean_row = centre(plan, state[...], mean[...])
        square = (plan.chunk, plan.chunk)  # of scores: [queries, keys]
        reads_state: Any = None  # [chunk, 1]: does the query's segment reach back before the chunk?
        in_segment: Any = None
        if plan.segmented:
            segment_start = refs["segment_start"][rows, :]  # [chunk, 1]
            position = (block_index * plan.chunks + c) * plan.chunk
            reads_state, in_segment = segment_start < position, lanes(square) + position >= segment_start
        mask = lanes(square) <= sublanes(square)
        diagonal = lanes(square) == sublanes(square)
        mask = mask if in_segment is None else mask & in_segment

        def one_head(head, _):
            phi_q = plan.phi(refs["q"][head, rows, :]).astype(plan.dtype)
            scores = jnp.where(mask, plan.dot(phi_q, phi_k[0], NT), 0.0).astype(plan.dtype)
            out = plan.dot_split([phi_q], centred) + mean_row
            if reads_state is not None:
                of_fresh = 0.0 if fresh is None else plan.dot_split([phi_q], fresh[0]) + fresh[1]
                out = jnp.where(reads_state, out, of_fresh)
            out, rstd = out + plan.dot(scores, v), None
            if plan.eps is not None:
                out, rstd = plan.normed(out, axis=1)
                rstd = jnp.where(diagonal, rstd, 0.0).sum(axis=0, keepdims=True)  # a column, transposed into a row
            plan.store_out(refs, head, rows, out, rstd)
            return 0

        each_head(refs["q"].shape[0], one_head, 0)
        state[...], mean[...] = advance(plan, refs, block_index * plan.chunks + c, state[...], mean[...], phi_k, v)
        return 0

    lax.fori_loop(0, plan.chunks, one_chunk, 0)


def start(plan: Plan, refs: dict, index: int = 0):
    """A start state, 0: initial_state, 1: segment_state, or zero, and the sum of its means over the slices of f."""
    if plan.num_start_states <= index:
        return zeros(plan.num_features, plan.value_width), zeros(1, plan.value_width)
    state = refs["start_states"][index]
    return state, sum_of_means(plan, state)


def sum_of_means(plan: Plan, state):
    if not plan.centred:
        return zeros(1, plan.value_width)
    return state.sum(axis=0, keepdims=True) / plan.head_size  # padded rows are 0


def fresh_state(plan: Plan, refs: dict):
    """segment_state, from which segments after the first start, as `centre` returns it; None: zero."""
    return centre(plan, *start(plan, refs, 1)) if plan.num_start_states == 2 else None


def centre(plan: Plan, state, mean):
    """The state without its mean over each slice of f, as an operand, and the row that outputs get for that mean."""
    if not plan.centred:
        return plan.split(state), 0.0
    slices = []
    for i in range(plan.map.slices):
        x = state[i * plan.width : (i + 1) * plan.width]
        x = x - x.sum(axis=0, keepdims=True) / plan.head_size
        if plan.width > plan.head_size:  # padded rows stay 0
            x = jnp.where(sublanes(x.shape) < plan.head_size, x, 0.0)
        slices.append(x)
    return plan.split(jnp.concatenate(slices, axis=0)), mean


def split_features(plan: Plan, x):
    """phi(k), or the gradient of scores, as an operand."""
    return plan.split(x, plan.split_scores)


def advance(plan: Plan, refs: dict, chunk_index, state, mean, phi_k, v):
    """The state after a chunk, and the sum of its means: that of v, since each slice of phi sums to 1."""
    if plan.segmented:  # keys of the segment of the chunk's last key are added, to a state of that segment
        segment_start = refs["carry_start"][pl.program_id(0), chunk_index]
        position = chunk_index * plan.chunk
        kept = sublanes((plan.chunk, 1)) + position >= segment_start
        v = jnp.where(kept, v, jnp.zeros_like(v))
        carried = segment_start < position
        fresh, fresh_mean = start(plan, refs, 1)
        state, mean = jnp.where(carried, state, fresh), jnp.where(carried, mean, fresh_mean)
    state = state + plan.dot_split(phi_k, [v], TN)
    if plan.centred:
        mean = mean + v.astype(jnp.float32).sum(axis=0, keepdims=True) * (plan.map.slices / plan.head_size)
    return state, mean
