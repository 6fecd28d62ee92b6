"""Residual linear attention on a TPU, backward: one pass from the last block to the first.

A block loads the state that the forward pass saved before it and recomputes the states before each of its chunks. Then
its chunks are processed from the last to the first: each computes dq from the state before it, and dk and dv from the
gradient of the state after it, summed over the query heads of the group in float32, in a fixed order: two runs are
equal to the bit.

The state's gradient stays in VMEM scratch, transposed, [dv, f]: in the product d_out^T phi(q) that is added to it, the
narrower operand is then the one that the matrix unit gets transposed.
"""

import functools
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas.tpu.plan import NT, TN, Plan, along_lanes, each_head, lanes, rows_of, struct, sublanes, zeros
from pallas.tpu.residual import advance, centre, fresh_state, input_specs, split_features


def backward(arrays: dict, plan: Plan) -> dict:
    """dq, dk, dv, shaped as q, k, v, and of start states d_start_states [b, kv, n, dv, f] float32.

    arrays: those of the forward kernel, the states that it saved, and d_out [b, kv, group, t, dv].
    """
    batch, kv = arrays["q"].shape[:2]
    f, dv, blocks = plan.num_features, plan.value_width, plan.blocks
    names = ("q", "k", "v", "d_out", "states", "start_states", "segment_start", "carry_start")
    names = [name for name in names if name in arrays]
    inputs = input_specs(plan, arrays, lambda n: blocks - 1 - n)
    shapes = {
        "dq": struct(arrays["q"].shape, arrays["q"].dtype),
        "dk": struct(arrays["k"].shape, arrays["k"].dtype),
        "dv": struct(arrays["v"].shape, arrays["v"].dtype),
    }
    specs = {"dq": inputs["q"], "dk": inputs["k"], "dv": inputs["v"]}
    scratch = [
        pltpu.VMEM((dv, f), jnp.float32),
        pltpu.VMEM((1, dv), jnp.float32),
        pltpu.VMEM((plan.chunks, 1 + plan.split_states, f, dv), plan.dtype),
    ]
    n = plan.num_start_states
    if n:
        shapes["d_start_states"] = struct((batch, kv, n, dv, f), jnp.float32)
        specs["d_start_states"] = pl.BlockSpec((None, None, n, dv, f), lambda b, h, n: (b, h, 0, 0, 0))
    results = pl.pallas_call(
        functools.partial(_kernel, plan, names, list(shapes)),
        out_shape=list(shapes.values()),
        grid=(batch, kv, blocks),
        in_specs=[inputs[name] for name in names],
        out_specs=[specs[name] for name in shapes],
        scratch_shapes=scratch,
        compiler_params=plan.compiler_params(),
        interpret=plan.interpreted(),
        cost_estimate=backward_cost(plan, arrays),
        name="residual_backward",
    )(*(arrays[name] for name in names))
    return dict(zip(shapes, results, strict=True))


def backward_cost(plan: Plan, arrays: dict) -> pl.CostEstimate:
    batch, kv, group, length, _ = arrays["q"].shape
    f, dv, c = plan.num_features, plan.value_width, plan.chunk
    rows = batch * kv * length
    size = lambda name: arrays[name].size * arrays[name].dtype.itemsize
    return pl.CostEstimate(
        flops=2 * rows * (group * (2 * f * dv + c * (3 * f + 3 * dv)) + 3 * f * dv),
        transcendentals=rows * (group + 2) * f,
        bytes_accessed=sum(map(size, arrays)) + sum(map(size, "qkv")),
    )


def _kernel(plan: Plan, names, outputs, *refs_and_scratch):
    refs = dict(zip([*names, *outputs], refs_and_scratch, strict=False))
    # The gradient of the state after a chunk [dv, f], the sum of its means over the slices of f [1, dv], and the states
    # before the block's chunks, as operands [chunks, 1 or 2, f, dv].
    d_state, d_mean, states = refs_and_scratch[-3:]
    step = pl.program_id(2)
    first_chunk = (plan.blocks - 1 - step) * plan.chunks
    square = (plan.chunk, plan.chunk)

    @pl.when(step == 0)
    def _():
        d_state[...], d_mean[...] = jnp.zeros_like(d_state), jnp.zeros_like(d_mean)
        if plan.num_start_states:
            refs["d_start_states"][...] = jnp.zeros_like(refs["d_start_states"])

    def recompute_state(c, carry):
        state, mean = carry
        rows = rows_of(c, plan.chunk)
        for i, operand in enumerate(centre(plan, state, mean)[0]):
            states[c, i] = operand
        phi_k = split_features(plan, plan.phi(refs["k"][rows, :]))
        return advance(plan, refs, first_chunk + c, state, mean, phi_k, refs["v"][rows, :])

    saved_state = refs["states"][...]
    lax.fori_loop(0, plan.chunks, recompute_state, (saved_state, zeros(1, plan.value_width)))
    fresh = fresh_state(plan, refs)

    def one_chunk(i, _):
        c = plan.chunks - 1 - i
        rows, position = rows_of(c, plan.chunk), (first_chunk + c) * plan.chunk
        k, v = refs["k"][rows, :], refs["v"][rows, :]
        features_k = plan.phi(k)
        phi_k, state = split_features(plan, features_k), [states[c, i] for i in range(states.shape[1])]
        mask, mask_t = lanes(square) <= sublanes(square), sublanes(square) <= lanes(square)
        kept: Any = None  # [chunk, 1]: is the key in the segment of the chunk's last key, so that the state gets it?
        reads_state: Any = None  # [chunk, 1]: does the query's segment reach back before the chunk?
        carried: Any = None  # does the segment of the chunk's last key?
        if plan.segmented:
            segment_start = refs["segment_start"][rows, :]  # [chunk, 1]
            reads_state = segment_start < position
            mask = mask & (lanes(square) + position >= segment_start)
            mask_t = jnp.transpose(mask.astype(jnp.float32)) > 0.0
            carry_start = refs["carry_start"][pl.program_id(0), first_chunk + c]
            kept, carried = sublanes((plan.chunk, 1)) + position >= carry_start, carry_start < position

        d_centred, mean_row = centre_transposed(plan, d_state[...]), d_mean[...] if plan.centred else 0.0
        d_v: Any = plan.dot(phi_k[0], d_centred, NT) + mean_row
        d_phi_k: Any = plan.dot(v, d_centred)
        if kept is not None:
            d_v, d_phi_k = jnp.where(kept, d_v, 0.0), jnp.where(kept, d_phi_k, 0.0)

        def one_head(head, carry):
            d_v, d_phi_k, (d_before, d_before_mean), d_fresh = carry
            q, d_out_read = refs["q"][head, rows, :], refs["d_out"][head, rows, :]
            features_q, d_outs = plan.phi(q), plan.split(d_out_read)  # d_outs: [hi] or [hi, lo]
            phi_q, d_out = features_q.astype(plan.dtype), d_outs[0]

            def d_state_of(queries):
                """d_out^T phi(q), of the queries where `queries` is true; None: all."""
                a = [d if queries is None else jnp.where(queries, d, jnp.zeros_like(d)) for d in d_outs]
                return plan.dot_split(a, plan.split(features_q), TN)

            scores = jnp.where(mask_t, plan.dot(phi_k[0], phi_q, NT), 0.0).astype(plan.dtype)  # [keys, queries]
            d_out_of_scores = d_outs if plan.split_scores else d_outs[:1]
            d_scores = split_features(plan, jnp.where(mask, plan.dot_split(d_out_of_scores, [v], NT), 0.0))
            d_v = d_v + plan.dot(scores, d_out)
            d_phi_k = d_phi_k + plan.dot(d_scores[0], phi_q, TN)
            d_phi_q = plan.dot_split(d_outs, state, NT)
            if reads_state is not None:
                of_fresh = 0.0 if fresh is None else plan.dot_split(d_outs, fresh[0], NT)
                d_phi_q = jnp.where(reads_state, d_phi_q, of_fresh)
            if fresh is not None and reads_state is not None:
                d_fresh = d_fresh + d_state_of(jnp.logical_not(reads_state))
            d_before = d_before + d_state_of(reads_state)
            if plan.centred:
                read = d_out if reads_state is None else jnp.where(reads_state, d_out, jnp.zeros_like(d_out))
                d_before_mean = d_before_mean + read.astype(jnp.float32).sum(axis=0, keepdims=True)
            d_phi_q = d_phi_q + plan.dot_split(d_scores, phi_k)
            refs["dq"][head, rows, :] = plan.pull_back(features_q, q, d_phi_q).astype(refs["dq"].dtype)
            return d_v, d_phi_k, (d_before, d_before_mean), d_fresh

        zero = zeros(plan.value_width, plan.num_features)
        carry = (d_v, d_phi_k, (zero, zeros(1, plan.value_width)), zero if fresh is not None else 0)
        d_v, d_phi_k, (d_before, d_before_mean), d_fresh = each_head(refs["q"].shape[0], one_head, carry)
        refs["dv"][rows, :] = d_v.astype(refs["dv"].dtype)
        refs["dk"][rows, :] = plan.pull_back(features_k, k, d_phi_k).astype(refs["dk"].dtype)
        if fresh is not None:
            d_fresh = d_fresh + jnp.where(carried, 0.0, d_state[...])
            refs["d_start_states"][1] += d_fresh
        d_after, d_after_mean = d_state[...], d_mean[...]
        if carried is not None:
            d_after, d_after_mean = jnp.where(carried, d_after, 0.0), jnp.where(carried, d_after_mean, 0.0)
        d_state[...] = d_after + d_before
        d_mean[...] = d_after_mean + d_before_mean * (plan.map.slices / plan.head_size)
        return 0

    lax.fori_loop(0, plan.chunks, one_chunk, 0)

    if plan.num_start_states:

        @pl.when(step == plan.blocks - 1)
        def _():
            refs["d_start_states"][0] = d_state[...]


def centre_transposed(plan: Plan, d_state):
    """As `centre`, of the gradient [dv, f], rounded."""
    if not plan.centred:
        return d_state.astype(plan.dtype)
    slices = []
    for i in range(plan.map.slices):
        x = d_state[:, i * plan.width : (i + 1) * plan.width]
        x = x - x.sum(axis=1, keepdims=True) / plan.head_size
        if plan.width > plan.head_size:
            x = jnp.where(lanes(x.shape) < plan.head_size, x, 0.0)
        slices.append(x)
    return along_lanes(slices).astype(plan.dtype)
