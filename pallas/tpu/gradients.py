"""Differentiation around the TPU kernels: of one branch, and of the sum of both after their norms, if they have any.

For the backward pass the sum saves of each branch rstd and the normed output, quantised to int16 where the plan allows.
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

    branch: str  # "rla", "swa", or "copy": a window of one key, whose output is arrays["out"], copies of v
    plan: Plan | None
    arrays: dict
    segments: dict

    def run(self, out_dtype, *, save: bool) -> dict:
        """out and, with `save`, what `pull_back` reads."""
        if self.branch == "copy":
            return {"out": self.arrays["out"].astype(out_dtype)}
        forward = functools.partial(_rla_forward if self.branch == "rla" else _swa_forward, self.plan)
        return batched(functools.partial(forward, jnp.dtype(out_dtype), save=save), self.arrays, self.segments)

    def pull_back(self, saved: dict, out, d_out) -> "Call":
        """Gradients of the arrays. out, d_out: [kv, group, t, dv padded], float32; saved: by `run`."""
        plan: Any = self.plan
        if self.branch == "copy":
            gradients = {"out": d_out.astype(self.arrays["out"].dtype)}
        elif self.branch == "rla":
            d_out = d_out if plan.split_states else d_out.astype(plan.dtype)  # XLA fuses the cast: HBM gets bfloat16
            inputs = self.arrays, self.segments, saved["states"], _padded(d_out, plan)
            gradients = batched(functools.partial(_rla_backward, plan), *inputs)
        else:
            of_sink = _of_sink(self.arrays, saved["lse"], (d_out * out).sum(axis=-1)) if "sink" in self.arrays else {}
            # delta is that of d_out as the kernels read it: without the barrier XLA would use d_out before rounding.
            d_out = jax.lax.optimization_barrier(d_out.astype(plan.dtype))
            delta = (d_out.astype(jnp.float32) * out).sum(axis=-1, keepdims=True)
            delta = jnp.swapaxes(_padded(delta, plan), -1, -2)
            inputs = self.arrays, self.segments, saved["lse"], delta, _padded(d_out, plan)
            gradients = batched(functools.partial(_swa_backward, plan), *inputs) | of_sink
        return dataclasses.replace(self, arrays=gradients, segments=dict.fromkeys(self.segments))


def _of_sink(arrays: dict, lse, delta) -> dict:
    """The sink's gradient, shared out to its lanes: it has a weight and no value. delta: [kv, group, t], exact."""
    sink = arrays["sink"]
    weights = jnp.exp(sink[..., :1] - lse[..., : delta.shape[-1]])
    total = -(weights * delta[..., None, :]).sum(axis=-1, keepdims=True)
    return {"sink": jnp.broadcast_to(total / sink.shape[-1], sink.shape)}


def _padded(x, plan: Plan):
    return jnp.pad(x, ((0, 0), (0, 0), (0, plan.length - x.shape[2]), (0, 0)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def output(call: Call, out_dtype):
    """One branch's output."""
    return call.run(out_dtype, save=False)["out"]


def _save_output(call, out_dtype):
    """The window's output is saved in float32: with a rounded delta, a query's d_scores would not sum to 0."""
    results = call.run("float32" if call.branch == "swa" else out_dtype, save=True)
    out = results.pop("out")
    return out.astype(out_dtype), (call, results, out if call.branch == "swa" else None)


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

    def run(self, call: Call, gain, *, save: bool) -> dict:
        """The call's results, of which out (normed, where there is a gain) and rstd [kv, group, t, 1] without padded
        queries."""
        results = call.run("float32", save=save)
        out = results["out"]
        if gain is None:
            return results | {"out": out[:, :, : self.num_queries]}
        if call.plan is None:
            mean_square = jnp.square(out).sum(axis=-1, keepdims=True) / self.value_size
            rstd = jax.lax.rsqrt(mean_square + self.eps)
            out = out * rstd
        else:
            rstd = jnp.swapaxes(results["rstd"], -1, -2)
        return results | {"out": out[:, :, : self.num_queries], "rstd": rstd[:, :, : self.num_queries]}

    def value(self, call: Call, results: dict):
        """The output, normed where it is, float32."""
        if call.plan is None or call.plan.eps is None or call.plan.int16_step is None:
            return results["out"]
        step = jnp.where(jnp.isfinite(results["rstd"]), call.plan.int16_step, jnp.nan)  # int16 has no NaN
        return results["out"].astype(jnp.float32) * step

    def gain(self, gain, like):
        """[h, dv] -> [kv, group, 1, dv padded] float32"""
        kv, group, _, width = like.shape
        gain = gain.astype(jnp.float32).reshape(kv, group, 1, self.value_size)
        return jnp.pad(gain, ((0, 0),) * 3 + ((0, width - self.value_size),))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def sum_of_norms(calls: list[Call], gains: list, norms: Norms):
    """The sum over branches of gain * rms(output), or of outputs where the gain is None: [kv, group, t, dv padded].

    gains: [h, dv].
    """
    return _sum(calls, gains, [norms.run(*branch, save=False) for branch in zip(calls, gains, strict=True)], norms)


def _sum(calls, gains, results, norms):
    values = [norms.value(call, of_call) for call, of_call in zip(calls, results, strict=True)]
    terms = [x if gain is None else norms.gain(gain, x) * x for gain, x in zip(gains, values, strict=True)]
    return sum(terms[1:], terms[0]).astype(norms.dtype)


def _save_sum(calls, gains, norms):
    results = [norms.run(*branch, save=True) for branch in zip(calls, gains, strict=True)]
    return _sum(calls, gains, results, norms), (calls, gains, results)


def _pull_back_sum(norms, saved, cotangent):
    # The barrier makes XLA transpose the cotangent before the cast to float32, which doubles its bytes.
    cotangent = jax.lax.optimization_barrier(cotangent)
    d_calls, d_gains = [], []
    for call, gain, results in zip(*saved, strict=True):
        value, d_out = norms.value(call, results), cotangent.astype(jnp.float32)
        if gain is None:
            d_gains.append(None)
            d_calls.append(call.pull_back(results, value, d_out))
            continue
        rstd = results["rstd"]
        d_gain = (d_out * value).sum(axis=2)[..., : norms.value_size]
        d_gains.append(d_gain.reshape(gain.shape).astype(gain.dtype))
        d_value = norms.gain(gain, value) * d_out
        projection = (d_value * value).sum(axis=-1, keepdims=True) / norms.value_size
        d_calls.append(call.pull_back(results, value / rstd, rstd * (d_value - value * projection)))
    return d_calls, d_gains


sum_of_norms.defvjp(_save_sum, _pull_back_sum)


@functools.partial(jax.jit, static_argnums=(0, 1), static_argnames="save")  # layers of one shape share one trace
def _rla_forward(plan: Plan, out_dtype, arrays: dict, segments: dict, *, save: bool) -> dict:
    return residual.forward(arrays | segments, plan, out_dtype=out_dtype, save=save)


@functools.partial(jax.jit, static_argnums=0)
def _rla_backward(plan: Plan, arrays: dict, segments: dict, states, d_out) -> dict:
    results = residual_backward.backward(arrays | segments | {"states": states, "d_out": d_out}, plan)
    gradients = {name: results[f"d{name}"] for name in "qkv"}
    if plan.num_start_states:
        gradients["start_states"] = jnp.transpose(results["d_start_states"], (0, 2, 1, 4, 3))
    return gradients


@functools.partial(jax.jit, static_argnums=(0, 1), static_argnames="save")
def _swa_forward(plan: Plan, out_dtype, arrays: dict, segments: dict, *, save: bool) -> dict:
    del save
    return window.forward(arrays | segments, plan, out_dtype=out_dtype)


@functools.partial(jax.jit, static_argnums=0)
def _swa_backward(plan: Plan, arrays: dict, segments: dict, lse, delta, d_out) -> dict:
    arrays = arrays | segments | {"d_out": d_out, "lse": lse, "delta": delta}
    d_k, d_v = window_backward.key_gradients(arrays, plan)
    return {"q": window_backward.query_gradients(arrays, plan), "k": d_k, "v": d_v}
