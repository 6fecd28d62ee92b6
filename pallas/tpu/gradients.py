"""Differentiation around the TPU kernels: of one branch, and of the sum of both behind their norms.

Between the passes the sum keeps each branch as 16 bits of its normed value and one float32 number a query.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas.batching import batched
from pallas.tpu import residual, residual_backward, window, window_backward
from pallas.tpu.plan import Plan


@functools.partial(jax.tree_util.register_dataclass, data_fields=["arrays", "segments"], meta_fields=["branch", "plan"])
@dataclasses.dataclass(frozen=True)
class Call:
    """One call of a branch's kernels, for one sequence. Outputs are [kv, group, t padded, dv padded]."""

    branch: str  # "residual", "window", or "given": arrays["out"] is the output
    plan: Plan | None
    arrays: dict
    segments: dict

    def run(self, out_dtype, *, save: bool) -> dict:
        """out and, with `save`, what `pull_back` needs beside it."""
        if self.branch == "given":
            return {"out": self.arrays["out"].astype(out_dtype)}
        forward = functools.partial(_residual_forward if self.branch == "residual" else _window_forward, self.plan)
        return batched(functools.partial(forward, jnp.dtype(out_dtype), save=save), self.arrays, self.segments)

    def pull_back(self, saved: dict, out, d_out) -> "Call":
        """Gradients of the arrays. out, d_out: [kv, group, t, dv padded], float32; saved: by `run`."""
        plan: Any = self.plan
        if self.branch == "given":
            gradients = {"out": d_out.astype(self.arrays["out"].dtype)}
        elif self.branch == "residual":
            d_out = d_out if plan.precise else d_out.astype(plan.dtype)  # where it is found, so it is written rounded
            given = self.arrays, self.segments, saved["states"], _padded(d_out, plan)
            gradients = batched(functools.partial(_residual_backward, plan), *given)
        else:
            d_out = jax.lax.optimization_barrier(d_out.astype(plan.dtype))  # delta is of what is rounded
            delta = (d_out.astype(jnp.float32) * out).sum(axis=-1, keepdims=True)
            delta = jnp.swapaxes(_padded(delta, plan), -1, -2)
            given = self.arrays, self.segments, saved["lse"], delta, _padded(d_out, plan)
            gradients = batched(functools.partial(_window_backward, plan), *given)
        return dataclasses.replace(self, arrays=gradients, segments=dict.fromkeys(self.segments))


def _padded(x, plan: Plan):
    return jnp.pad(x, ((0, 0), (0, 0), (0, plan.length - x.shape[2]), (0, 0)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def output(call: Call, out_dtype):
    """One branch's output."""
    return call.run(out_dtype, save=False)["out"]


def _save_output(call, out_dtype):
    """A window's output is saved in float32: rounded, it would leave gradients of a query's scores that have a sum."""
    results = call.run("float32" if call.branch == "window" else out_dtype, save=True)
    out = results.pop("out")
    return out.astype(out_dtype), (call, results, out if call.branch == "window" else None)


def _pull_back_output(_, saved, d_out):
    call, results, out = saved
    return (call.pull_back(results, out, d_out),)


output.defvjp(_save_output, _pull_back_output)


class Norms(NamedTuple):
    """Static facts of a sum of normed branches."""

    num_queries: int
    value_size: int  # before padding
    eps: float
    dtype: Any  # of the sum

    def run(self, call: Call, *, save: bool) -> dict:
        """The call's results, out (normed) and factor [kv, group, t, 1] without padded queries."""
        results = call.run("float32", save=save)
        out = results["out"]
        if call.plan is None:
            mean = jnp.square(out).sum(axis=-1, keepdims=True) / self.value_size
            factor = jax.lax.rsqrt(mean + self.eps)
            out = out * factor
        else:
            factor = jnp.swapaxes(results["factor"], -1, -2)
        return results | {"out": out[:, :, : self.num_queries], "factor": factor[:, :, : self.num_queries]}

    def value(self, call: Call, results: dict):
        """The normed output, float32."""
        if call.plan is None or call.plan.unit is None:
            return results["out"]
        unit = jnp.where(jnp.isfinite(results["factor"]), call.plan.unit, jnp.nan)  # integers know no NaN
        return results["out"].astype(jnp.float32) * unit

    def gain(self, gain, like):
        """[h, dv] -> [kv, group, 1, dv padded] float32"""
        kv, group, _, width = like.shape
        gain = gain.astype(jnp.float32).reshape(kv, group, 1, self.value_size)
        return jnp.pad(gain, ((0, 0),) * 3 + ((0, width - self.value_size),))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def sum_of_norms(calls: list[Call], gains: list, norms: Norms):
    """The sum over branches of gain * rms(output), [kv, group, t, dv padded]; gains [h, dv]."""
    return _sum(calls, gains, [norms.run(call, save=False) for call in calls], norms)


def _sum(calls, gains, results, norms):
    values = [norms.value(*given) for given in zip(calls, results, strict=True)]
    terms = [norms.gain(gain, x) * x for gain, x in zip(gains, values, strict=True)]
    return sum(terms[1:], terms[0]).astype(norms.dtype)


def _save_sum(calls, gains, norms):
    results = [norms.run(call, save=True) for call in calls]
    return _sum(calls, gains, results, norms), (calls, gains, results)


def _pull_back_sum(norms, everything, cotangent):
    cotangent = jax.lax.optimization_barrier(cotangent)  # its layout changes in its own dtype
    d_calls, d_gains = [], []
    for call, gain, results in zip(*everything, strict=True):
        value, factor = norms.value(call, results), results["factor"]
        d_out = cotangent.astype(jnp.float32)
        d_gain = (d_out * value).sum(axis=2)[..., : norms.value_size]
        d_gains.append(d_gain.reshape(gain.shape).astype(gain.dtype))
        d_value = norms.gain(gain, value) * d_out
        along = (d_value * value).sum(axis=-1, keepdims=True) / norms.value_size
        d_calls.append(call.pull_back(results, value / factor, factor * (d_value - value * along)))
    return d_calls, d_gains


sum_of_norms.defvjp(_save_sum, _pull_back_sum)


@functools.partial(jax.jit, static_argnums=(0, 1), static_argnames="save")  # layers alike are traced and lowered once
def _residual_forward(plan: Plan, out_dtype, arrays: dict, segments: dict, *, save: bool) -> dict:
    return residual.forward(arrays | segments, plan, out_dtype=out_dtype, save=save)


@functools.partial(jax.jit, static_argnums=0)
def _residual_backward(plan: Plan, arrays: dict, segments: dict, states, d_out) -> dict:
    found = residual_backward.backward(arrays | segments | {"states": states, "d_out": d_out}, plan)
    gradients = {name: found[f"d{name}"] for name in "qkv"}
    if plan.num_start_states:
        gradients["start_states"] = jnp.transpose(found["d_starts"], (0, 2, 1, 4, 3))
    return gradients


@functools.partial(jax.jit, static_argnums=(0, 1), static_argnames="save")
def _window_forward(plan: Plan, out_dtype, arrays: dict, segments: dict, *, save: bool) -> dict:
    del save
    return window.forward(arrays | segments, plan, out_dtype=out_dtype)


@functools.partial(jax.jit, static_argnums=0)
def _window_backward(plan: Plan, arrays: dict, segments: dict, lse, delta, d_out) -> dict:
    arrays = arrays | segments | {"d_out": d_out, "lse": lse, "delta": delta}
    d_k, d_v = window_backward.key_gradients(arrays, plan)
    return {"q": window_backward.query_gradients(arrays, plan), "k": d_k, "v": d_v}
