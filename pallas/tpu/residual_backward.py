"""The residual branch on a TPU, backward: one sweep from the last block to the first, the state's gradient in VMEM.

A block begins from the state that the forward pass saved and finds the states of its chunks anew. Then its chunks are
taken from the last to the first: each gives dq from its state, and dk and dv from the gradient of the state after it,
summed over the group's heads in float32. No order depends on time: two runs are equal to the bit.

The state's gradient is kept transposed, [dv, f], so that of the two factors of its sum the narrow one is transposed.
"""

import functools
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas.tpu.plan import LEFT, RIGHT, Plan, along_lanes, each_head, lanes, rows_of, struct, sublanes, zeros
from pallas.tpu.residual import advance, centre, delicate_parts, fresh_state, input_specs


def backward(arrays: dict, plan: Plan) -> dict:
    """dq, dk, dv as q, k, v and, if there are start states, d_starts [b, kv, n, dv, f] float32.

    arrays: as for the forward kernel, and its states, and d_out [b, kv, group, t, dv].
    """
    batch, kv = arrays["q"].shape[:2]
    f, dv, blocks = plan.num_features, plan.value_width, plan.blocks
    names = ("q", "k", "v", "d_out", "states", "start_states", "segment_start", "carry_start")
    names = [name for name in names if name in arrays]
    given = input_specs(plan, arrays, lambda n: blocks - 1 - n)
    shapes = {
        "dq": struct(arrays["q"].shape, arrays["q"].dtype),
        "dk": struct(arrays["k"].shape, arrays["k"].dtype),
        "dv": struct(arrays["v"].shape, arrays["v"].dtype),
    }
    specs = {"dq": given["q"], "dk": given["k"], "dv": given["v"]}
    scratch = [
        pltpu.VMEM((dv, f), jnp.float32),
        pltpu.VMEM((1, dv), jnp.float32),
        pltpu.VMEM((plan.chunks, 1 + plan.precise, f, dv), plan.dtype),
    ]
    n = plan.num_start_states
    if n:
        shapes["d_starts"] = struct((batch, kv, n, dv, f), jnp.float32)
        specs["d_starts"] = pl.BlockSpec((None, None, n, dv, f), lambda b, h, n: (b, h, 0, 0, 0))
    results = pl.pallas_call(
        functools.partial(_kernel, plan, names, list(shapes)),
        out_shape=list(shapes.values()),
        grid=(batch, kv, blocks),
        in_specs=[given[name] for name in names],
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


def _kernel(plan: Plan, names, outputs, *refs):
    given = dict(zip([*names, *outputs], refs, strict=False))
    gradient, mean, states = refs[-3:]  # of the state after a chunk: [dv, f], sum of its means [1, dv]
    step = pl.program_id(2)
    first_chunk = (plan.blocks - 1 - step) * plan.chunks
    square = (plan.chunk, plan.chunk)

    @pl.when(step == 0)
    def _():
        gradient[...], mean[...] = jnp.zeros_like(gradient), jnp.zeros_like(mean)
        if plan.num_start_states:
            given["d_starts"][...] = jnp.zeros_like(given["d_starts"])

    def find_state(c, carry):
        state, shift = carry
        rows = rows_of(c, plan.chunk)
        for i, part in enumerate(centre(plan, state, shift)[0]):
            states[c, i] = part
        k_parts = delicate_parts(plan, plan.phi(given["k"][rows, :]))
        return advance(plan, given, first_chunk + c, state, shift, k_parts, given["v"][rows, :])

    before = given["states"][...]
    lax.fori_loop(0, plan.chunks, find_state, (before, zeros(1, plan.value_width)))
    fresh = fresh_state(plan, given)

    def one_chunk(i, _):
        c = plan.chunks - 1 - i
        rows, position = rows_of(c, plan.chunk), (first_chunk + c) * plan.chunk
        k, v = given["k"][rows, :], given["v"][rows, :]
        features = plan.phi(k)
        k_parts, before = delicate_parts(plan, features), [states[c, i] for i in range(states.shape[1])]
        phi_k = k_parts[0]
        mask, mask_t = lanes(square) <= sublanes(square), sublanes(square) <= lanes(square)
        kept: Any = None
        reads: Any = None
        carried: Any = None
        if plan.segmented:
            first = given["segment_start"][rows, :]  # [chunk, 1]
            reads = first < position
            mask = mask & (lanes(square) + position >= first)
            mask_t = jnp.transpose(mask.astype(jnp.float32)) > 0.0
            carry_first = given["carry_start"][pl.program_id(0), first_chunk + c]
            kept, carried = sublanes((plan.chunk, 1)) + position >= carry_first, carry_first < position

        after, shift = centre_transposed(plan, gradient[...]), mean[...] if plan.centred else 0.0
        d_v: Any = plan.dot(phi_k, after, RIGHT) + shift
        d_phi_k: Any = plan.dot(v, after)
        if kept is not None:
            d_v, d_phi_k = jnp.where(kept, d_v, 0.0), jnp.where(kept, d_phi_k, 0.0)

        def one_head(head, carry):
            d_v, d_phi_k, added, later = carry
            q, whole = given["q"][head, rows, :], given["d_out"][head, rows, :]
            features, d_parts = plan.phi(q), plan.parts(whole)
            phi_q, d_out = features.astype(plan.dtype), d_parts[0]

            def added_by(these):  # queries where `these` is true
                a = [d if these is None else jnp.where(these, d, jnp.zeros_like(d)) for d in d_parts]
                return plan.product(a, plan.parts(features), LEFT)

            scores = jnp.where(mask_t, plan.dot(phi_k, phi_q, RIGHT), 0.0).astype(plan.dtype)  # [keys, queries]
            some = d_parts if plan.delicate else d_parts[:1]
            d_score_parts = delicate_parts(plan, jnp.where(mask, plan.product(some, [v], RIGHT), 0.0))
            d_scores = d_score_parts[0]
            d_v = d_v + plan.dot(scores, d_out)
            d_phi_k = d_phi_k + plan.dot(d_scores, phi_q, LEFT)
            d_phi_q = plan.product(d_parts, before, RIGHT)
            if reads is not None:
                d_phi_q = jnp.where(reads, d_phi_q, 0.0 if fresh is None else plan.product(d_parts, fresh[0], RIGHT))
            if fresh is not None and reads is not None:
                later = later + added_by(jnp.logical_not(reads))
            total, total_mean = added[0] + added_by(reads), added[1]
            if plan.centred:
                read = d_out if reads is None else jnp.where(reads, d_out, jnp.zeros_like(d_out))
                total_mean = total_mean + read.astype(jnp.float32).sum(axis=0, keepdims=True)
            d_phi_q = d_phi_q + plan.product(d_score_parts, k_parts)
            given["dq"][head, rows, :] = plan.pull_back(features, q, d_phi_q).astype(given["dq"].dtype)
            return d_v, d_phi_k, (total, total_mean), later

        nothing = zeros(plan.value_width, plan.num_features)
        carry = (d_v, d_phi_k, (nothing, zeros(1, plan.value_width)), nothing if fresh is not None else 0)
        d_v, d_phi_k, (added, added_mean), later = each_head(given["q"].shape[0], one_head, carry)
        given["dv"][rows, :] = d_v.astype(given["dv"].dtype)
        given["dk"][rows, :] = plan.pull_back(features, k, d_phi_k).astype(given["dk"].dtype)
        if fresh is not None:
            later = later + jnp.where(carried, 0.0, gradient[...])
            given["d_starts"][1] += later
        old, old_mean = gradient[...], mean[...]
        if carried is not None:
            old, old_mean = jnp.where(carried, old, 0.0), jnp.where(carried, old_mean, 0.0)
        gradient[...] = old + added
        mean[...] = old_mean + added_mean * (plan.map.slices / plan.head_size)
        return 0

    lax.fori_loop(0, plan.chunks, one_chunk, 0)

    if plan.num_start_states:

        @pl.when(step == plan.blocks - 1)
        def _():
            given["d_starts"][0] = gradient[...]


def centre_transposed(plan: Plan, gradient):
    """As `centre`, of [dv, f]."""
    if not plan.centred:
        return gradient.astype(plan.dtype)
    parts = []
    for i in range(plan.map.slices):
        part = gradient[:, i * plan.width : (i + 1) * plan.width]
        part = part - part.sum(axis=1, keepdims=True) / plan.head_size
        if plan.width > plan.head_size:
            part = jnp.where(lanes(part.shape) < plan.head_size, part, 0.0)
        parts.append(part)
    return along_lanes(parts).astype(plan.dtype)
