"""Differentiation around the Hopper kernels: the order in which they run, and what the forward pass saves.

`output` takes one sequence; `_forward` and `_backward` take a batch, since `jax.vmap` of it becomes one launch of each
kernel for the whole batch.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax

from pallas.batching import batched
from pallas.hopper import forward, residual_key_backward, residual_query_backward, state_sweep, window_backward
from pallas.hopper.arrays import Inputs, Segments
from pallas.hopper.forward import ForwardOutputs
from pallas.hopper.plan import Plan
from pallas.hopper.residual_query_backward import QueryOutputs
from pallas.hopper.state_sweep import SweepInputs, Swept
from pallas.hopper.warpgroup import LOG2E, step_of_normed


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Saved:
    """What the backward pass reads besides the inputs: results of the forward kernel and of the sweep over keys."""

    of_queries: ForwardOutputs
    of_keys: Swept


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def output(plan: Plan, inputs: Inputs, segments: Segments):
    """[t, h, d] of one sequence, as padded as the inputs."""
    return batched(functools.partial(_forward, plan, save=False), inputs, segments)[0]


def _save(plan: Plan, inputs: Inputs, segments: Segments):
    out, saved = batched(functools.partial(_forward, plan, save=True), inputs, segments)
    return out, (inputs, segments, saved)


def _pull_back(plan: Plan, residuals, d_out):
    inputs, segments, saved = residuals
    gradients = batched(functools.partial(_backward, plan), inputs, segments, saved, d_out)
    return jax.tree.map(lambda gradient, x: gradient.astype(x.dtype), gradients, inputs), None


output.defvjp(_save, _pull_back)


@functools.partial(jax.jit, static_argnums=0, static_argnames="save")  # layers alike are traced and lowered once
def _forward(plan: Plan, inputs: Inputs, segments: Segments, *, save: bool):
    """out and what is saved."""
    inputs, start_means = _as_kernels_read(plan, inputs)
    swept = Swept()
    if plan.reaches_back:
        computed = plan.map is not None
        x = inputs.k_rla if computed else inputs.features_k
        arrays = SweepInputs(x, inputs.v, row_keep=segments.key_keep, carry_keep=segments.carry_keep)
        swept = state_sweep.sweep(state_sweep.key_sweep(plan), arrays, save_features=computed)
    results = forward.forward(inputs, start_means, swept, segments.start, plan, save=save)
    if not save:
        return results.out, None
    return results.out, Saved(results if plan.swa_alone else dataclasses.replace(results, out=None), swept)


def _as_kernels_read(plan: Plan, inputs: Inputs):
    """Features rounded to bfloat16, start states centred over each slice of f and split; and the states' means."""
    if inputs.features_q is not None:
        features_q, features_k = (x.astype(jnp.bfloat16) for x in (inputs.features_q, inputs.features_k))
        inputs = dataclasses.replace(inputs, features_q=features_q, features_k=features_k)
    if not plan.num_start_states:
        return inputs, None
    states = inputs.start_states  # [b, n, kv, dv, f]
    sliced = states.reshape(*states.shape[:-1], plan.slices, plan.head_size)
    counts = plan.features_of(jnp.arange(plan.slices, dtype=jnp.int32))
    means = sliced.sum(axis=-1) / jnp.expand_dims(counts, (0, 1, 2, 3))
    tiles = _split((sliced - means[..., None]).reshape(states.shape))[: 1 + plan.precise_starts]
    return dataclasses.replace(inputs, start_states=jnp.concatenate(tiles, axis=1)), means.swapaxes(-1, -2)


def _split(x):
    """float32 as (hi, lo) of bfloat16. XLA on a GPU drops a cast to bfloat16 and back: hi is rounded in float32."""
    hi = jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)
    return hi.astype(jnp.bfloat16), (x - hi).astype(jnp.bfloat16)


@functools.partial(jax.jit, static_argnums=0)
def _backward(plan: Plan, inputs: Inputs, segments: Segments, saved: Saved, d_out) -> Inputs:
    """The gradient of every input."""
    gradients = Inputs()
    if plan.rla:
        gradients = _residual_backward(plan, inputs, segments, saved, d_out)
    if plan.swa:
        gradients = _window_backward(plan, inputs, segments, saved, d_out, gradients)
    return gradients


def _window_backward(plan: Plan, inputs: Inputs, segments: Segments, saved: Saved, d_out, so_far: Inputs) -> Inputs:
    """The gradients so far, and the window's."""
    narrow, of_queries = plan.narrow(), saved.of_queries
    q, k, v, lse = inputs.q, inputs.k, inputs.v, of_queries.lse
    arrays = window_backward.QueryInputs(q, k, v, lse, segments.start)
    if plan.swa_normed:
        y_swa, r_swa, swa_gain = of_queries.y_swa, of_queries.r_swa, inputs.swa_gain
        arrays = dataclasses.replace(arrays, d_out=d_out, y_swa=y_swa, r_swa=r_swa, swa_gain=swa_gain)
    else:
        arrays = dataclasses.replace(arrays, d_swa=d_out, delta=_delta(plan, inputs, of_queries, d_out))
    found = window_backward.query_gradients(arrays, narrow)
    keys = window_backward.KeyInputs(q, k, v, lse, found.d_swa, found.delta, segments.start, dv_rla=so_far.v)
    of_keys = window_backward.key_gradients(keys, narrow)
    dq, dk = found.dq, of_keys.dk
    d_sink = None
    if inputs.sink_logits is not None:  # it has a weight and no value
        weights = jnp.exp2(inputs.sink_logits[..., None] * LOG2E - lse)
        d_sink = -(weights * _delta(plan, inputs, of_queries, d_out)).sum(axis=-1)
    elif plan.window == 1:  # a softmax over one key is constant: what the kernels find is rounding error
        dq, dk = jnp.zeros_like(dq), jnp.zeros_like(dk)
    swa_gain = found.d_gain.sum(axis=1) if plan.swa_normed else None
    return dataclasses.replace(so_far, q=dq, k=dk, v=of_keys.dv, swa_gain=swa_gain, sink_logits=d_sink)


def _delta(plan: Plan, inputs: Inputs, of_queries: ForwardOutputs, d_out):
    """[b, h, t], the sum of d_swa o_swa: of more than o_swa's bfloat16, or the d_logits of a query would not add up to
    0."""
    d_out = d_out.astype(jnp.float32)
    if plan.swa_alone:
        out, lo = (x.astype(jnp.float32) for x in (of_queries.out, of_queries.out_lo))
        return (d_out * (out + lo)).sum(axis=-1).swapaxes(1, 2)
    r = of_queries.r_swa
    d_y = d_out if inputs.swa_gain is None else d_out * inputs.swa_gain[:, None]
    steps = lax.bitcast_convert_type(of_queries.y_swa, jnp.int16).astype(jnp.float32)
    along = (d_y * steps).sum(axis=-1).swapaxes(1, 2) * step_of_normed(r, plan.value_size, plan.swa_eps)
    return along / r if inputs.swa_gain is None else along * r * r * plan.eps  # of o_swa's size a norm leaves eps


def _residual_backward(plan: Plan, inputs: Inputs, segments: Segments, saved: Saved, d_out) -> Inputs:
    read, start_means = _as_kernels_read(plan, inputs)
    computed = plan.map is not None
    swept, of_queries, narrow = saved.of_keys, saved.of_queries, plan.narrow()
    queries, features_k = (read.q_rla, swept.features) if computed else (read.features_q, read.features_k)
    arrays = residual_query_backward.QueryInputs(
        q_rla=read.q_rla,
        v=read.v,
        features_k=features_k,
        states=swept.states,
        states_lo=swept.states_lo,
        state_means=swept.means,
        segment_start=segments.start,
        start_states=read.start_states,
        start_means=start_means,
    )
    if plan.rla_normed:
        arrays = dataclasses.replace(
            arrays,
            d_out=d_out,
            y_rla=of_queries.y_rla,
            y_rla_lo=of_queries.y_rla_lo,
            r_rla=of_queries.r_rla,
            rla_gain=read.rla_gain,
        )
    else:
        arrays = dataclasses.replace(arrays, d_rla=d_out)
    found = residual_query_backward.query_gradients(arrays, narrow)
    gradients = Inputs(
        rla_gain=found.d_gain.sum(axis=1) if plan.rla_normed else None,
        start_states=_start_gradients(plan, inputs, queries, segments, found) if plan.num_start_states else None,
    )
    if plan.reaches_back:
        reverse = Swept()
        if plan.num_states > 1:
            keeps = {"row_keep": segments.query_keep, "carry_keep": segments.carry_keep}
            arrays = SweepInputs(queries, found.d_rla, found.d_rla_lo, **keeps)
            reverse = state_sweep.sweep(state_sweep.query_sweep(plan), arrays)
        keys = residual_key_backward.KeyInputs(
            d_rla=found.d_rla,
            d_rla_lo=found.d_rla_lo,
            queries=queries,
            k_rla=read.k_rla,
            features_k=features_k,
            v=read.v,
            row_keep=segments.key_keep,
            segment_start=segments.start,
            d_states=reverse.states,
            d_states_lo=reverse.states_lo,
            d_means=reverse.means,
        )
        of_keys = residual_key_backward.key_gradients(keys, narrow)
        dk, dv = of_keys.dk, of_keys.dv
    else:
        dk, dv = jnp.zeros_like(inputs.k_rla if computed else inputs.features_k), jnp.zeros_like(inputs.v)
    if computed:
        return dataclasses.replace(gradients, q_rla=found.dq, k_rla=dk, v=dv)
    return dataclasses.replace(gradients, features_q=found.dq, features_k=dk, v=dv)


def _start_gradients(plan: Plan, inputs: Inputs, queries, segments: Segments, found: QueryOutputs):
    """[b, n, kv, dv, f]: of each start state the sum over the queries that read it. queries: as kernels read them."""
    factors = [(queries, found.d_rla, found.d_rla_lo)]
    if plan.precise_starts:
        factors.append((_split(inputs.features_q)[1], found.d_rla, None))
    keeps = [None]
    if plan.num_start_states == 2:
        first = (segments.start == 0).astype(jnp.float32)
        keeps = [first, 1 - first]
    one = lambda keep: sum(state_sweep.total(plan, x, y, y_lo=y_lo, row_keep=keep) for x, y, y_lo in factors)
    return jnp.stack([one(keep) for keep in keeps], axis=1)
