"""The residual branch on a TPU, forward: one sweep along the sequence, the state in VMEM.

The grid is (batch, kv head, block of queries); its last axis is sequential, and the state [f, dv] of a key/value head
stays in scratch from block to block. Keys are moved by the window, so a chunk of queries reads the state before it and
one masked square of scores; a group's query heads are served together. For the backward pass the state before each
block is saved in float32.
"""

import functools

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas.tpu.plan import LEFT, RIGHT, Plan, each_head, lanes, rows_of, struct, sublanes, zeros

NO_SEGMENT = -(2**30)  # where the first segment starts


def forward(arrays: dict, plan: Plan, *, out_dtype, save: bool) -> dict:
    """out [b, kv, group, t, dv], its factor [b, kv, group, 1, t] float32 if it is normed, and with `save` the states.

    states: [b, kv, blocks, f, dv] float32

    q: [b, kv, group, t, d]   k: [b, kv, t, d]   v: [b, kv, t, dv]   start_states: [b, n, kv, f, dv] float32
    segment_start [b, t, 1]: the position of the first key in a query's segment
    carry_start [b, chunks]: likewise, of the segment whose keys a chunk hands on
    """
    batch, kv, group = arrays["q"].shape[:3]
    f, dv, block = plan.num_features, plan.value_width, plan.block
    shapes = plan.out_shapes(batch, kv, group, out_dtype)
    specs = {
        "out": pl.BlockSpec((None, None, group, block, dv), lambda b, h, n: (b, h, 0, n, 0)),
        "factor": pl.BlockSpec((None, None, group, 1, block), lambda b, h, n: (b, h, 0, 0, n)),
    }
    if save:
        shapes["states"] = struct((batch, kv, plan.blocks, f, dv), jnp.float32)
        specs["states"] = pl.BlockSpec((None, None, None, f, dv), lambda b, h, n: (b, h, n, 0, 0))
    names = [name for name in ("q", "k", "v", "start_states", "segment_start", "carry_start") if name in arrays]
    given = input_specs(plan, arrays, lambda n: n)
    results = pl.pallas_call(
        functools.partial(_kernel, plan, names, list(shapes)),
        out_shape=list(shapes.values()),
        grid=(batch, kv, plan.blocks),
        in_specs=[given[name] for name in names],
        out_specs=[specs[name] for name in shapes],
        scratch_shapes=[pltpu.VMEM((f, dv), jnp.float32), pltpu.VMEM((1, dv), jnp.float32)],
        compiler_params=plan.compiler_params(),
        interpret=plan.interpreted(),
        cost_estimate=forward_cost(plan, arrays, shapes.values()),
        name="residual_forward",
    )(*(arrays[name] for name in names))
    return dict(zip(shapes, results, strict=True))


def input_specs(plan: Plan, arrays: dict, block_of) -> dict:
    """Blocks of what the kernels read, the n-th step of the sequential axis taking block `block_of(n)`."""
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


def _kernel(plan: Plan, names, outputs, *refs):
    given = dict(zip([*names, *outputs], refs, strict=False))
    state, mean = refs[-2:]  # [f, dv], and the sum of its means over the slices of f [1, dv]
    block_index = pl.program_id(2)

    @pl.when(block_index == 0)
    def _():
        state[...], mean[...] = start(plan, given)

    if "states" in given:
        given["states"][...] = state[...]
    fresh = fresh_state(plan, given)

    def one_chunk(c, _):
        rows = rows_of(c, plan.chunk)
        k, v = given["k"][rows, :], given["v"][rows, :]
        features = plan.phi(k)
        k_parts = delicate_parts(plan, features)
        phi_k = k_parts[0]
        before, shift = centre(plan, state[...], mean[...])
        reads = seen = None
        if plan.segmented:
            first = given["segment_start"][rows, :]  # [chunk, 1]
            position = (block_index * plan.chunks + c) * plan.chunk
            reads, seen = first < position, lanes((plan.chunk, plan.chunk)) + position >= first
        mask = lanes((plan.chunk, plan.chunk)) <= sublanes((plan.chunk, plan.chunk))
        diagonal = lanes((plan.chunk, plan.chunk)) == sublanes((plan.chunk, plan.chunk))
        mask = mask if seen is None else mask & seen

        def one_head(head, _):
            phi_q = plan.phi(given["q"][head, rows, :]).astype(plan.dtype)
            scores = jnp.where(mask, plan.dot(phi_q, phi_k, RIGHT), 0.0).astype(plan.dtype)
            out = plan.product([phi_q], before) + shift
            if reads is not None:
                out = jnp.where(reads, out, 0.0 if fresh is None else plan.product([phi_q], fresh[0]) + fresh[1])
            out, factor = out + plan.dot(scores, v), None
            if plan.eps is not None:
                out, factor = plan.normed(out, axis=1)
                factor = jnp.where(diagonal, factor, 0.0).sum(axis=0, keepdims=True)  # a row
            plan.store_out(given, head, rows, out, factor)
            return 0

        each_head(given["q"].shape[0], one_head, 0)
        state[...], mean[...] = advance(plan, given, block_index * plan.chunks + c, state[...], mean[...], k_parts, v)
        return 0

    lax.fori_loop(0, plan.chunks, one_chunk, 0)


def start(plan: Plan, given: dict, index: int = 0):
    """A start state, by default the one before the first key, and the sum of its means over the slices of f."""
    if plan.num_start_states <= index:
        return zeros(plan.num_features, plan.value_width), zeros(1, plan.value_width)
    state = given["start_states"][index]
    return state, sum_of_means(plan, state)


def sum_of_means(plan: Plan, state):
    if not plan.centred:
        return zeros(1, plan.value_width)
    return state.sum(axis=0, keepdims=True) / plan.head_size  # padding is 0


def fresh_state(plan: Plan, given: dict):
    """The state that later segments start from, as `centre` gives it; None: zero."""
    return centre(plan, *start(plan, given, 1)) if plan.num_start_states == 2 else None


def centre(plan: Plan, state, mean):
    """The state's parts for products, without its mean over each slice of f, and what outputs get for that mean."""
    if not plan.centred:
        return plan.parts(state), 0.0
    halves = []
    for i in range(plan.map.slices):
        part = state[i * plan.width : (i + 1) * plan.width]
        part = part - part.sum(axis=0, keepdims=True) / plan.head_size
        if plan.width > plan.head_size:  # padding stays 0
            part = jnp.where(sublanes(part.shape) < plan.head_size, part, 0.0)
        halves.append(part)
    return plan.parts(jnp.concatenate(halves, axis=0)), mean


def delicate_parts(plan: Plan, x):
    """float32 as operands: rounded, and where `delicate` what rounding took from it too."""
    return plan.parts(x) if plan.delicate else [x.astype(plan.dtype)]


def advance(plan: Plan, given: dict, chunk_index, state, mean, k_parts, v):
    """The state after a chunk, and its means, which the values alone tell since each slice of phi sums to 1."""
    if plan.segmented:
        first = given["carry_start"][pl.program_id(0), chunk_index]
        position = chunk_index * plan.chunk
        kept = sublanes((plan.chunk, 1)) + position >= first
        v = jnp.where(kept, v, jnp.zeros_like(v))
        carried = first < position
        fresh, fresh_mean = start(plan, given, 1)
        state, mean = jnp.where(carried, state, fresh), jnp.where(carried, mean, fresh_mean)
    state = state + plan.product(k_parts, [v], LEFT)
    if plan.centred:
        mean = mean + v.astype(jnp.float32).sum(axis=0, keepdims=True) * (plan.map.slices / plan.head_size)
    return state, mean
