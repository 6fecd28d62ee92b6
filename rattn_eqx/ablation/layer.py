"""A local layer with parts exchanged: what an ablation compares with the paper's. Unbatched, like `RAttention`.

A new departure is a field of `Departures` and what `AblatedAttention` makes of it; `ablate` puts the layer into a built
model, which knows nothing of it. The op stays the fused one wherever it can compute the departure; else the branches
are computed one by one.
"""

import dataclasses
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

import pallas
from pallas import segments
from pallas.checked import checked
from pallas.feature_map import FeatureMap, as_pair
from pallas.numerics import accumulation_dtype
from pallas.reference import normed_sum, rms
from rattn_eqx.model.attention import RAttention
from rattn_eqx.model.fields import settle
from rattn_eqx.model.language_model import LanguageModel
from rattn_eqx.model.local_layers import local_layers

EPS = 1e-6
SHORTEST, LONGEST = 128.0, 4096.0  # tokens over which a gate forgets a factor e when training begins


@dataclasses.dataclass(frozen=True)
class Departures:
    """Where a local layer departs from arXiv 2506.15545, section 3; with the defaults, nowhere.

    branch_norm: "group", the paper's, norms each head of each branch: g_swa rms(o_swa) + g_rla rms(o_rla). "sum" norms
      once: rms(g_swa o_swa + g_rla o_rla). "none" norms nothing: g_swa o_swa + g_rla o_rla.
    feature_input: "raw" feeds q and k to the feature map as they are projected; "normed" after qk-norm, and with the
      learned scale, if there is one, after that.
    head_split: the first half of the heads, of queries and of keys, is the window's branch and the second half linear
      attention over all tokens so far, side by side (as Hymba, arXiv 2411.13676), in place of a sum in every head.
    decay_gate: o_rla[t] = phi(q_t) . sum over s <= t - W of a_(s+1) ... a_(t-W) phi(k_s)^T v_s, a gate per token and
      key/value head (`DecayGate`).
    num_valued_sinks: `ValuedSinks` of the window's branch.
    conv_width: a causal convolution over so many tokens of each channel, added to what the layer reads; it begins at 0.
      Packed documents are kept apart in it too.

    Raises:
      ValueError: an unknown branch_norm or feature_input; a negative number.
    """

    branch_norm: Literal["group", "sum", "none"] = "group"
    feature_input: Literal["raw", "normed"] = "raw"
    head_split: bool = False
    decay_gate: bool = False
    num_valued_sinks: int = 0
    conv_width: int = 0

    def __post_init__(self):
        settle(self)
        for name in ("num_valued_sinks", "conv_width"):
            if getattr(self, name) < 0:
                raise ValueError(f"Departures: {name} must be at least 0; got {getattr(self, name)}")


NO_DEPARTURES = Departures()


def ablate(model: LanguageModel, departures: Departures) -> LanguageModel:
    """The model with `AblatedAttention` in place of each `RAttention`; the model itself for no departure.

    Every parameter that a departure adds begins at a constant, so no key is needed.

    Raises:
      ValueError: departures for a model without a local layer, or that do not fit its local layers.
    """
    if departures == NO_DEPARTURES:
        return model
    if not (layers := local_layers(model)):
        raise ValueError(f"ablate: {departures} belong to local layers; got the pattern {model.config.pattern}")
    return eqx.tree_at(local_layers, model, [AblatedAttention(layer, departures) for layer in layers])


@checked
class DecayGate(eqx.Module):
    """log a = log_sigmoid(x . weight + bias): how much of its state a key/value head keeps at each token.

    The scalar gate of Mamba2 and simple GLA. A gate begins near 1 - 1/n, with n from 128 to 4,096
    tokens over the heads.
    """

    weight: Float[Array, "m kv"]
    bias: Float[Array, "kv"]

    def __init__(self, model_width: int, num_kv_heads: int):
        self.weight = jnp.zeros((model_width, num_kv_heads), jnp.float32)
        self.bias = jnp.log(jnp.geomspace(SHORTEST, LONGEST, num_kv_heads, dtype=jnp.float32))

    @checked
    def __call__(self, x: Float[Array, "t m"]) -> Float[Array, "t kv"]:
        """log a for each token and head, in float32."""
        return jax.nn.log_sigmoid(x.astype(jnp.float32) @ self.weight + self.bias[None])


@checked
class ValuedSinks(eqx.Module):
    """Places outside its window that every query of the window's branch may attend to, wherever it stands.

    A place has a learned logit for each query head and a learned value; both begin at 0. No key: it would be compared
    with queries turned by their position.
    """

    logits: Float[Array, "sinks h"]
    values: Float[Array, "sinks kv dv"]

    def __init__(self, num_sinks: int, num_heads: int, num_kv_heads: int, head_size: int):
        self.logits = jnp.zeros((num_sinks, num_heads), jnp.float32)
        self.values = jnp.zeros((num_sinks, num_kv_heads, head_size), jnp.float32)


@checked
class AblatedAttention(eqx.Module):
    """An `RAttention` with one or more `Departures`.

    Raises:
      ValueError: departures of the residual branch where there is none; a head_split with the decay gate or with an odd
        number of key/value heads; sinks without a window; a decay gate with meta tokens.
    """

    layer: RAttention
    decay_gate: DecayGate | None
    valued_sinks: ValuedSinks | None
    conv_taps: Float[Array, "taps m"] | None
    departures: Departures = eqx.field(static=True)

    def __init__(self, layer: RAttention, departures: Departures):
        model_width, num_heads, head_size = layer.projections.query_weight.shape
        num_kv_heads = layer.projections.key_weight.shape[1]
        of_residual = departures.branch_norm != "group" or departures.feature_input != "raw"
        if layer.rla_gain is None and (of_residual or departures.head_split or departures.decay_gate):
            raise ValueError(
                "AblatedAttention: branch_norm, feature_input, head_split and decay_gate need the residual branch; got "
                "residual=False; leave them at their defaults"
            )
        if departures.head_split and (num_kv_heads % 2 or departures.decay_gate):
            raise ValueError(
                "AblatedAttention: head_split needs an even num_kv_heads and no decay_gate; got "
                f"num_kv_heads={num_kv_heads}, decay_gate={departures.decay_gate}"
            )
        if departures.num_valued_sinks and layer.window == 0:
            raise ValueError("AblatedAttention: num_valued_sinks needs a window of at least 1; got window=0")
        if departures.num_valued_sinks and layer.sink_logits is not None:
            raise ValueError(
                f"AblatedAttention: num_valued_sinks={departures.num_valued_sinks} takes the place of the layer's "
                "sink_logits; got both; use sinks=False"
            )
        if layer.swa_gain is None and layer.rla_gain is not None and departures.branch_norm != "group":
            raise ValueError(
                f"AblatedAttention: branch_norm={departures.branch_norm!r} needs a gain of the window; "
                "got swa_gain=None; give the model one"
            )
        if departures.decay_gate and layer.meta_tokens is not None:
            raise ValueError(
                "AblatedAttention: a decay gate starts from zero; got "
                f"num_meta_tokens={len(layer.meta_tokens.keys)}; use 0"
            )
        self.layer = layer
        self.decay_gate = DecayGate(model_width, num_kv_heads) if departures.decay_gate else None
        self.valued_sinks = None
        if departures.num_valued_sinks:
            self.valued_sinks = ValuedSinks(departures.num_valued_sinks, num_heads, num_kv_heads, head_size)
        self.conv_taps = None
        if departures.conv_width:
            self.conv_taps = jnp.zeros((departures.conv_width, model_width), jnp.float32)
        self.departures = departures

    @property
    def swa_gain(self) -> Float[Array, "h dv"] | None:
        return self.layer.swa_gain

    @property
    def rla_gain(self) -> Float[Array, "h dv"] | None:
        return self.layer.rla_gain

    @property
    def window(self) -> int:
        return self.layer.window

    @checked
    def __call__(
        self, x: Float[Array, "t {self.layer.projections.model_width}"], segment_ids: Int[Array, "t"] | None = None
    ) -> Float[Array, "t {self.layer.projections.model_width}"]:
        """What each token gathers, in x's dtype; the arguments are those of `RAttention`."""
        if self.conv_taps is not None:
            x = x + causal_convolution(x, self.conv_taps, segment_ids)
        layer, departures = self.layer, self.departures
        q_swa, k_swa, q_rla, k_rla, v = self.inputs(x)
        if not (departures.head_split or self.decay_gate or self.valued_sinks) and departures.branch_norm == "group":
            return layer.projections.merge(layer.attend(q_swa, k_swa, q_rla, k_rla, v, segment_ids))
        options: dict[str, Any] = dict(segment_ids=segment_ids, implementation=layer.implementation)
        if departures.head_split:
            h, kv = q_swa.shape[1] // 2, k_swa.shape[1] // 2
            o_swa = self._swa(q_swa[:, :h], k_swa[:, :kv], v[:, :kv], **options)
            o_rla = self._rla(q_rla[:, h:], k_rla[:, kv:], v[:, kv:], x, 0, **options)
            empty = jnp.zeros_like(o_swa)
            o_swa, o_rla = (jnp.concatenate(pair, axis=1) for pair in ((o_swa, empty), (empty, o_rla)))
        else:
            o_swa = self._swa(q_swa, k_swa, v, **options)
            if layer.rla_gain is None:
                return layer.projections.merge(o_swa)
            o_rla = self._rla(q_rla, k_rla, v, x, layer.window, **options)
        return layer.projections.merge(self._sum(o_swa, o_rla).astype(v.dtype))

    def inputs(self, x: Array) -> tuple[Array, Array, Array, Array, Array]:
        """What `RAttention.inputs` gives, with the residual branch's q and k as `feature_input` says."""
        if self.departures.feature_input == "raw":
            return self.layer.inputs(x)
        q, k, v = self.layer.projections.project(x)
        q, k = self.layer.projections.norm(q, k)
        return *self.layer.rotate(q, k), *self.layer.scale(q, k), v

    def _swa(self, q, k, v, *, segment_ids, implementation):
        if self.valued_sinks is None:
            options: dict[str, Any] = dict(segment_ids=segment_ids, implementation=implementation)
            if self.layer.sink_logits is not None:
                options["sink_logits"] = self.layer.sink_logits[: q.shape[1]]
            return pallas.sliding_window_attention(q, k, v, window=self.layer.window, **options)
        h, kv = q.shape[1], k.shape[1]  # half of them, where heads are split
        sinks = (self.valued_sinks.logits[:, :h], self.valued_sinks.values[:, :kv])
        return window_with_valued_sinks(q, k, v, *sinks, window=self.layer.window, segment_ids=segment_ids)

    def _rla(self, q, k, v, x, window, *, segment_ids, implementation) -> Any:
        layer = self.layer
        if self.decay_gate is not None:
            return gated_residual(
                q, k, v, self.decay_gate(x), window=window, feature_map=layer.feature_map, segment_ids=segment_ids
            )
        state = layer.initial_state()
        if state is not None:
            state = state[-k.shape[1] :]  # of the later half of the heads, where they are split
        return pallas.residual_linear_attention(
            q,
            k,
            v,
            window=window,
            feature_map=layer.feature_map,
            initial_state=state,
            segment_state=state,
            segment_ids=segment_ids,
            implementation=implementation,
        )

    def _sum(self, o_swa, o_rla):
        o_swa, o_rla = (x.astype(accumulation_dtype(x)) for x in (o_swa, o_rla))
        swa_gain: Any = self.layer.swa_gain
        rla_gain: Any = self.layer.rla_gain
        if self.departures.branch_norm == "group":
            return normed_sum(o_swa, o_rla, swa_gain, rla_gain, EPS)
        total = swa_gain[None] * o_swa + rla_gain[None] * o_rla
        return rms(total, EPS) if self.departures.branch_norm == "sum" else total


def _runs(t: int, segment_ids: Int[Array, "t"] | None) -> Int[Array, "t"]:
    """The number of each token's segment."""
    return jnp.zeros(t, jnp.int32) if segment_ids is None else segments.runs(segment_ids)


@checked
def causal_convolution(
    x: Float[Array, "t m"], taps: Float[Array, "taps m"], segment_ids: Int[Array, "t"] | None
) -> Float[Array, "t m"]:
    """y[t] = sum over i of taps[i] x[t - i], for tokens t - i of t's own segment."""
    t = x.shape[0]
    runs = _runs(t, segment_ids)
    total = jnp.zeros_like(x)
    for back, tap in enumerate(taps.astype(x.dtype)):
        before = jnp.pad(x, ((back, 0), (0, 0)))[:t]
        same = jnp.pad(runs, (back, 0), constant_values=-1)[:t] == runs
        total = total + jnp.where(same[:, None], before * tap[None], 0)
    return total


@checked
def window_with_valued_sinks(
    q: Float[Array, "t h d"],
    k: Float[Array, "t kv d"],
    v: Float[Array, "t kv dv"],
    sink_logits: Float[Array, "sinks h"],
    sink_values: Float[Array, "sinks kv dv"],
    *,
    window: int,
    segment_ids: Int[Array, "t"] | None,
) -> Float[Array, "t h dv"]:
    """Softmax attention over each query's window and the sinks: blocks of `window` queries with two blocks of keys.

    Plain XLA, memory of t * window.
    """
    t, num_sinks = q.shape[0], sink_logits.shape[0]
    window = block = min(window, t)
    n = -(-t // block)
    runs = _runs(t, segment_ids)

    def blocks(x, fill=0):  # [n, block, ...]
        widths = ((0, n * block - t), *[(0, 0)] * (x.ndim - 1))
        return jnp.pad(x, widths, constant_values=fill).reshape(n, block, *x.shape[1:])

    def two_blocks(x, fill=0):  # [n, 2 * block, ...]: each block after the one in front of it
        own = blocks(x, fill)
        before = jnp.pad(own, ((1, 0), *[(0, 0)] * x.ndim), constant_values=fill)[:n]
        return jnp.concatenate([before, own], axis=1)

    def with_sinks(sinks, x):
        sinks = jnp.broadcast_to(sinks.astype(x.dtype)[None], (n, num_sinks, *x.shape[1:]))
        return jnp.concatenate([sinks, two_blocks(x)], axis=1)

    bias = jnp.pad(sink_logits.T.astype(q.dtype), ((0, 0), (0, 2 * block)))[None, :, None]  # [1, h, 1, sinks + keys]
    sink_keys = jnp.zeros((num_sinks, *k.shape[1:]), k.dtype)
    distance = block + jnp.arange(block)[:, None] - jnp.arange(2 * block)[None]
    in_window = (distance >= 0) & (distance < window)
    same = blocks(runs)[:, :, None] == two_blocks(runs, -1)[:, None, :]
    seen = jnp.pad(in_window[None] & same, ((0, 0), (0, 0), (num_sinks, 0)), constant_values=True)
    out = jax.nn.dot_product_attention(
        blocks(q), with_sinks(sink_keys, k), with_sinks(sink_values, v), bias=bias, mask=seen[:, None]
    )
    return out.reshape(n * block, *out.shape[2:])[:t]


@checked
def gated_residual(
    q: Float[Array, "t h d"],
    k: Float[Array, "t kv d"],
    v: Float[Array, "t kv dv"],
    log_gate: Float[Array, "t kv"],
    *,
    window: int,
    feature_map: FeatureMap,
    segment_ids: Int[Array, "t"] | None,
    chunk: int = 128,
) -> Float[Array, "t h dv"]:
    """Residual linear attention whose state decays.

    o[t] = sum over s <= t - W of exp(L[t - W] - L[s]) phi(q_t).phi(k_s) v_s, over t's own segment, where L
    is the running sum of `log_gate`. Plain XLA, a scan over chunks; products in v's dtype, sums in float32.
    """
    t, kv, dv = v.shape
    phi_q, phi_k = as_pair(feature_map)
    runs = _runs(t, segment_ids)
    after = -t % chunk

    def chunks(x, back, fill=0):  # [n, chunk, ...]: what stands `back` tokens before each query
        widths = ((back, after), *[(0, 0)] * (x.ndim - 1))
        return jnp.pad(x, widths, constant_values=fill)[: t + after].reshape(-1, chunk, *x.shape[1:])

    q, k = phi_q(q).astype(v.dtype), phi_k(k).astype(v.dtype)
    q = q.reshape(t, kv, -1, q.shape[-1])
    back = min(window, t)
    queries = (chunks(q, 0), chunks(runs, 0))
    keys = (chunks(k, back), chunks(v, back), chunks(log_gate.astype(jnp.float32), back), chunks(runs, back, -1))
    dot = lambda form, *xs: jnp.einsum(form, *xs, preferred_element_type=jnp.float32)
    causal = jnp.tril(jnp.ones((chunk, chunk), bool))

    def advance(carry, chunk_of):
        state, run_before = carry
        (q, query_runs), (k, v, log_gate, key_runs) = chunk_of
        total = jnp.cumsum(log_gate, axis=0)  # [c, kv]
        seen = causal & (query_runs[:, None] == key_runs[None, :])
        decay = jnp.where(causal[..., None], total[:, None] - total[None, :], 0)
        weights = jnp.where(seen[..., None], jnp.exp(decay), 0)  # [c queries, c keys, kv]
        inner = dot("ckgf,skf->cskg", q, k) * weights[..., None]
        out = dot("cskg,skv->ckgv", inner.astype(v.dtype), v)
        old = jnp.where((query_runs == run_before)[:, None], jnp.exp(total), 0)
        out = out + dot("ckgf,kfv->ckgv", q, state.astype(v.dtype)) * old[..., None, None]
        kept = jnp.where((key_runs == key_runs[-1])[:, None], jnp.exp(total[-1:] - total), 0)
        state = jnp.where(key_runs[-1] == run_before, jnp.exp(total[-1]), 0)[:, None, None] * state
        state = state + dot("skf,skv->kfv", k * kept[..., None].astype(k.dtype), v)
        return (state, key_runs[-1]), out

    first = (jnp.zeros((kv, k.shape[-1], dv), jnp.float32), jnp.int32(-2))
    _, out = jax.lax.scan(advance, first, (queries, keys))
    return out.reshape(t + after, -1, dv)[:t].astype(v.dtype)
