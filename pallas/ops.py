"""The public ops: their documentation, their checks, and one dispatch to the implementation that serves a call.

Each implementation is a module with functions of these names and of one signature each: `reference`, `chunked`, and
`pallas.FAMILY.ops` for each family of kernels. A family's package says by `present()` whether its device is here, and
by `obstacle(op, *arrays)` why it cannot serve a call, or None.
"""

import dataclasses
import importlib
import types
from typing import Any

import jax.numpy as jnp  # noqa: F401 (the doctests read it)
from jaxtyping import Array, Float, Int

from pallas import chunked, reference
from pallas.block_sizes import BlockSizes, default_block_sizes
from pallas.checked import checked
from pallas.checks import check_attention, check_states, check_step
from pallas.feature_map import FeatureMap, softmax
from pallas.segments import contained, spoil
from pallas.step_cache import StepCache

PORTABLE = {"reference": reference, "chunked": chunked}
KERNELS = {"gpu": "hopper", "tpu": "tpu"}  # what a user asks for: the family's folder


@checked
def sliding_window_attention(
    q: Float[Array, "t h d"],
    k: Float[Array, "s kv d"],
    v: Float[Array, "s kv dv"],
    *,
    window: int,
    scale: float | int | None = None,
    sink_logits: Float[Array, "h"] | None = None,
    segment_ids: Int[Array, "_"] | None = None,
    implementation: str | None = None,
    block_sizes: BlockSizes | None = None,
) -> Float[Array, "t h dv"]:
    """Causal softmax attention over the last `window` keys.

    o[t] = sum over t - W < s <= t of softmax_s(scale q_t . k_s) v_s: local attention of the paper (arXiv 2506.15545,
    section 3), whose w is our W - 1, since `window` counts the query's own key too. `window >= s` is full attention.
    With `sink_logits` a head's weights sum to less than 1: o[t] = sum_s e^l_s v_s / (e^sink + sum_s e^l_s), with the
    logits l_s = scale q_t . k_s.

    Args:
      q, k, v: queries, keys and values of one sequence, in any floating dtypes; `jax.vmap` batches. With more keys than
        queries, queries stand at the last t of the s positions. Query head i reads key/value head i // (h / kv).
        Lengths are static: under `jax.export` t and s are numbers, and each length is exported by itself; a batch axis
        of `jax.vmap` may be symbolic.
      window: keys that a query sees, itself included; 0 gives exactly 0.
      scale: multiplies the logits; 1 / sqrt(d) by default.
      sink_logits: of each query head, one more logit of its softmax, which has no value: where nothing in the window is
        worth attending to, a head can attend to nothing. Not multiplied by `scale`. None: no such logit; nor is -inf.
      segment_ids: one id for each key; a query sees its own segment only. A segment is a maximal run of equal ids. What
        is not finite in one never reaches another, nor its gradients; within a segment nothing is promised of it, and
        its outputs pass no gradient on.
      implementation: None, "reference", "chunked", "gpu" or "tpu". None picks "gpu" on a Hopper GPU whose kernels serve
        the call (bfloat16, sizes up to 128), "tpu" on a TPU, else "chunked". "gpu" and "tpu" elsewhere are interpreted,
        slowly. No time was ever measured on a TPU: its kernels are interpreted for their values, and compiled for their
        costs.
      block_sizes: how the sequence is cut; changes no result beyond rounding.

    Returns:
      One output for each query and head, in v's dtype: a mean of values (and of 0, with a sink), finite in float16 too.

    Raises:
      ValueError: where arguments do not fit together. NotImplementedError: for an implementation that cannot do it.

    Numerics: products and softmax in float32 (float64 for float64 inputs). `chunked` is within 1e-5 (float32 at highest
      matmul precision), 5e-3 (bfloat16) and 1e-12 (float64) of `reference`, relative RMS: tests/ops. "gpu"
      multiplies bfloat16 and adds in float32: within twice the error of `chunked` plus 3e-3, there and in
      tests/hopper. So does "tpu" where q, k and v are bfloat16; all else but float64, which it refuses, it
      multiplies in float32, within twice the error of `chunked` plus 1e-5: tests/tpu.
    Cost: about 2 t h (d + dv) (min(W, t) + chunk) FLOPs for `chunked`, memory linear in t; `reference` is quadratic.

    >>> x = jnp.ones((5, 2, 4))
    >>> sliding_window_attention(x, x, x, window=3).shape
    (5, 2, 4)
    """
    op = "sliding_window_attention"
    check_attention(op, q, k, window, segment_ids)
    return _call(
        op,
        choose(op, implementation, q, k, v),
        {"q": q},
        {"k": k, "v": v},
        window=window,
        scale=q.shape[-1] ** -0.5 if scale is None else scale,
        sink_logits=sink_logits,
        segment_ids=segment_ids,
        block_sizes=block_sizes,
    )


@checked
def residual_linear_attention(
    q: Float[Array, "t h d"],
    k: Float[Array, "s kv d"],
    v: Float[Array, "s kv dv"],
    *,
    window: int,
    feature_map: FeatureMap = softmax,
    initial_state: Float[Array, "kv _f dv"] | None = None,
    segment_state: Float[Array, "kv _f dv"] | None = None,
    segment_ids: Int[Array, "_"] | None = None,
    return_final_state: bool = False,
    implementation: str | None = None,
    block_sizes: BlockSizes | None = None,
) -> Float[Array, "t h dv"] | tuple[Float[Array, "t h dv"], Float[Array, "kv f dv"]]:
    """Linear attention over the keys that lie at least `window` back.

    S_t = S_init + sum over s <= t of phi(k_s)^T v_s and o[t] = phi(q_t) S_{t-W}: the paper's residual linear attention
    (arXiv 2506.15545, section 3). No denominator and no scale: a norm follows. q and k come without rotary embedding.

    Args:
      q, k, v: as in `sliding_window_attention`. The state belongs to the key/value head; its query group shares it.
      window: how many of the newest keys, the query's own included, are left to the window; 0 is plain causal linear
        attention.
      feature_map: a callable (..., d) -> (..., f) that acts on the last axis alone, or a pair of them for q and k. It
        is given float32 (float64 for float64 inputs), and differentiated in its own parameters too.
      initial_state: [kv, f, dv], the state of the first segment before its first key; zero by default.
      segment_state: [kv, f, dv], the state that every later segment starts from; zero by default.
      segment_ids: one id for each key; a query reads its own segment only. What is not finite in one never reaches
        another, nor its gradients; within a segment nothing is promised of it, and its outputs pass no gradient on.
      return_final_state: also return the state that the last query read, S_{s-1-W} of its segment. Pass it on as
        `initial_state`, with the last min(W, s) keys, values and ids in front, and the next call continues exactly.
        With window=0 no key is left to tell which segment the state is of: where the next call begins a new segment,
        pass it `segment_state` (or None, if that is zero) as `initial_state` instead.
      implementation, block_sizes: as in `sliding_window_attention`.

    Returns:
      One output for each query and head, in v's dtype; exactly 0 where the residual set is empty and there is no
      initial state. With `return_final_state`, also the state in float32 (float64 for float64 inputs). An output is a
      sum over the residual set: beyond 65,504 it is infinite in float16, unless v is float32 or bfloat16. `rattention`
      norms it in float32, and stays finite.

    Raises:
      ValueError: where arguments do not fit together. NotImplementedError: for an implementation that cannot do it.

    Numerics: phi, states and sums in float32 (float64 for float64 inputs), within the bounds of
      `sliding_window_attention` for values, the state and all gradients: tests/ops. "tpu" multiplies in
      bfloat16 for named maps alone: what any other map gives stays float32.
    Cost: about 2 t h (f dv + chunk (f + dv)) + 2 s kv f dv FLOPs, and f dv numbers of state for each chunk and
      key/value head.

    >>> x = jnp.ones((5, 2, 4))
    >>> out, state = residual_linear_attention(x, x, x, window=3, return_final_state=True)
    >>> out.shape, state.shape
    ((5, 2, 4), (2, 8, 4))
    """
    op = "residual_linear_attention"
    check_attention(op, q, k, window, segment_ids)
    states = {"initial_state": initial_state, "segment_state": segment_state}
    check_states(op, feature_map, k, v, **states)
    return _call(
        op,
        choose(op, implementation, q, k, v),
        {"q": q},
        {"k": k, "v": v},
        states,
        window=window,
        feature_map=feature_map,
        segment_ids=segment_ids,
        block_sizes=block_sizes,
        return_final_state=return_final_state,
    )


@checked
def rattention(
    q: Float[Array, "t h d"],
    k: Float[Array, "s kv d"],
    v: Float[Array, "s kv dv"],
    *,
    window: int,
    swa_gain: Float[Array, "h dv"] | None,
    rla_gain: Float[Array, "h dv"],
    feature_map: FeatureMap = softmax,
    q_rla: Float[Array, "t h d"] | None = None,
    k_rla: Float[Array, "s kv d"] | None = None,
    scale: float | int | None = None,
    sink_logits: Float[Array, "h"] | None = None,
    eps: float | int = 1e-6,
    initial_state: Float[Array, "kv _f dv"] | None = None,
    segment_state: Float[Array, "kv _f dv"] | None = None,
    segment_ids: Int[Array, "_"] | None = None,
    return_final_state: bool = False,
    implementation: str | None = None,
    block_sizes: BlockSizes | None = None,
) -> Float[Array, "t h dv"] | tuple[Float[Array, "t h dv"], Float[Array, "kv f dv"]]:
    """Sliding-window attention plus residual linear attention, each with an RMS norm and gain, or the window as it is.

    o[t] = g_swa rms(o_swa[t]) + g_rla rms(o_rla[t]) with rms(x) = x / sqrt(mean(x^2) + eps) over dv (arXiv 2506.15545,
    section 3). Every causal pair of query and key is counted by exactly one branch.

    Args:
      q, k: what the window reads, usually after qk-norm and rotary embedding.
      v, window, scale, sink_logits, feature_map, initial_state, segment_state, segment_ids, return_final_state,
        implementation, block_sizes: as in `sliding_window_attention` and `residual_linear_attention`. `window >= s`
        leaves the window alone, `window = 0` the residual branch; the other term is then exactly 0.
      swa_gain, rla_gain: g_swa and g_rla. `swa_gain=None` leaves the window's branch without norm and gain:
        o[t] = o_swa[t] + g_rla rms(o_rla[t]), which begins as the attention it replaces where g_rla begins at 0. Sinks
        want that: they scale a head's output, which a norm undoes, but for eps.
      q_rla, k_rla: what the residual branch reads. They default to q and k, which is wrong if those already carry
        rotary embeddings or qk-norm.
      eps: inside both norms. It bounds the gradient where o_rla is exactly 0, by 1 / sqrt(eps).

    Returns:
      As `residual_linear_attention`. Raises, Numerics: likewise. Cost: the sum of both branches.

    >>> x, gain = jnp.ones((5, 2, 4)), jnp.ones((2, 4))
    >>> rattention(x, x, x, window=3, swa_gain=gain, rla_gain=gain).shape
    (5, 2, 4)
    """
    op = "rattention"
    q_rla = q if q_rla is None else q_rla
    k_rla = k if k_rla is None else k_rla
    check_attention(op, q, k, window, segment_ids)
    states = {"initial_state": initial_state, "segment_state": segment_state}
    check_states(op, feature_map, k_rla, v, **states)
    return _call(
        op,
        choose(op, implementation, q, k, v, q_rla, k_rla),
        {"q": q, "q_rla": q_rla},
        {"k": k, "v": v, "k_rla": k_rla},
        states,
        swa_gain=swa_gain,
        rla_gain=rla_gain,
        eps=eps,
        window=window,
        scale=q.shape[-1] ** -0.5 if scale is None else scale,
        sink_logits=sink_logits,
        feature_map=feature_map,
        segment_ids=segment_ids,
        block_sizes=block_sizes,
        return_final_state=return_final_state,
    )


@checked
def sliding_window_attention_step(
    q: Float[Array, "h d"],
    k: Float[Array, "kv d"],
    v: Float[Array, "kv dv"],
    cache: StepCache,
    *,
    scale: float | int | None = None,
    sink_logits: Float[Array, "h"] | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "h dv"], StepCache]:
    """One more token of `sliding_window_attention`: what its query gathers, and the cache with its key and value.

    Args:
      q, k, v: of the token, as the window reads them; `jax.vmap` batches.
      cache: of the tokens before it; the window has as many keys as the cache has slots. A cache as long as the longest
        document is full attention.
      scale, sink_logits: as in `sliding_window_attention`.
      implementation: None, "reference", "chunked" or "gpu"; None picks as there. "gpu" has no gradients.

    Returns:
      The output, in v's dtype, and the cache, whose `length` is one more. The one given stays as it was.

    Raises, Numerics: as `sliding_window_attention`, for k and v as the cache's dtype holds them.
    Cost: 2 h (d + dv) W FLOPs; the ring is read once.

    >>> from pallas import StepCache
    >>> ring, x = jnp.zeros((3, 2, 4)), jnp.ones((2, 4))
    >>> out, cache = sliding_window_attention_step(x, x, x, StepCache(ring, None, ring, None, jnp.array(0)))
    >>> out.shape, int(cache.length)
    ((2, 4), 1)
    """
    op = "sliding_window_attention_step"
    check_step(op, q, k, v, cache)
    options: dict[str, Any] = dict(q=q, k=k, scale=scale, sink_logits=sink_logits)
    return _step(op, choose(op, implementation, q, k, v, *_rings(cache)), v, cache, **options)


@checked
def rattention_step(
    q: Float[Array, "h d"],
    k: Float[Array, "kv d"],
    v: Float[Array, "kv dv"],
    cache: StepCache,
    *,
    swa_gain: Float[Array, "h dv"] | None,
    rla_gain: Float[Array, "h dv"],
    feature_map: FeatureMap = softmax,
    q_rla: Float[Array, "h d"] | None = None,
    k_rla: Float[Array, "kv d"] | None = None,
    scale: float | int | None = None,
    sink_logits: Float[Array, "h"] | None = None,
    eps: float | int = 1e-6,
    implementation: str | None = None,
) -> tuple[Float[Array, "h dv"], StepCache]:
    """One more token of `rattention`, in time and memory that do not grow: the ring turns by one slot.

    The token's key takes the slot of the one that leaves the window, phi(k)^T v of which enters the state in the same
    step; then o = g_swa rms(o_swa) + g_rla rms(o_rla), as there.

    Args:
      q, k, v, q_rla, k_rla: of the token; `jax.vmap` batches. k_rla must be given where the cache has `keys_rla`.
      cache: of the tokens before it; the window has as many keys as the cache has slots.
      swa_gain, rla_gain, feature_map, scale, sink_logits, eps: as in `rattention`.
      implementation: None, "reference", "chunked" or "gpu"; None picks as in `sliding_window_attention`. "gpu" has no
        gradients.

    Returns:
      The output, in v's dtype, and the cache, whose `length` is one more. The one given stays as it was.

    Raises, Numerics: as `rattention`, for k and v as the cache's dtype holds them.
    Cost: 2 h (d + dv) W + 2 (h + kv) f dv FLOPs; ring and state are read once, and the state is written.
    """
    op = "rattention_step"
    q_rla = q if q_rla is None else q_rla
    check_step(op, q, k, v, cache, feature_map=feature_map, k_rla=k_rla)
    k_rla = k if k_rla is None else k_rla
    options: dict[str, Any] = dict(q=q, k=k, q_rla=q_rla, k_rla=k_rla, swa_gain=swa_gain, rla_gain=rla_gain, eps=eps)
    options |= dict(feature_map=feature_map, scale=scale, sink_logits=sink_logits)
    return _step(op, choose(op, implementation, q, k, v, q_rla, k_rla, *_rings(cache)), v, cache, **options)


def choose(op: str, implementation: str | None, *arrays: Array) -> str:
    """The implementation that runs for q, k and v and what else a kernel would read.

    None means the first family of kernels whose device is here and that serves these arrays, else "chunked"; never an
    interpreted kernel.

    Raises:
      NotImplementedError: for an implementation that cannot serve the call. An explicit choice never falls back.
      ValueError: for a name that is no implementation.
    """
    if implementation is None:
        serving = (name for name in KERNELS if family(name).present() and family(name).obstacle(op, *arrays) is None)
        return next(serving, "chunked")
    if implementation in PORTABLE:
        return implementation
    if implementation not in KERNELS:
        names = [repr(name) for name in (*PORTABLE, *KERNELS)]
        raise ValueError(
            f"{op}: implementation must be None, {', '.join(names[:-1])} or {names[-1]}; got {implementation!r}"
        )
    obstacle = family(implementation).obstacle(op, *arrays)
    if obstacle is not None:
        raise NotImplementedError(
            f"{op}: implementation={implementation!r} {obstacle}; "
            "use implementation='chunked' (any device, linear memory) or 'reference' (the definition)"
        )
    return implementation


def family(name: str) -> types.ModuleType:
    """The package of a family of kernels, without the kernels: `pallas.FAMILY.ops` is imported when one runs."""
    return importlib.import_module(f"pallas.{KERNELS[name]}")


def _rings(cache: StepCache) -> tuple[Array, ...]:
    return tuple(ring for ring in (cache.keys, cache.keys_rla, cache.values) if ring is not None)


def _step(op: str, chosen: str, v: Array, cache: StepCache, *, scale: float | int | None, **options: Any) -> Any:
    """What a step's public op returns. k and v are rounded as the ring holds them, so that it does not matter when."""
    rounded = lambda x, ring: x.astype(ring.dtype).astype(x.dtype)
    options |= {name: rounded(options[name], cache.keys) for name in ("k", "k_rla") if name in options}
    scale = options["q"].shape[-1] ** -0.5 if scale is None else scale
    out, after = getattr(_module(chosen), op)(v=rounded(v, cache.values), cache=cache, scale=scale, **options)
    if after.state is not None:
        after = dataclasses.replace(after, state=after.state.astype(cache.residual_state.dtype))
    return out.astype(v.dtype), after


def _module(chosen: str) -> Any:
    return PORTABLE[chosen] if chosen in PORTABLE else importlib.import_module(f"pallas.{KERNELS[chosen]}.ops")


def _call(
    op: str,
    chosen: str,
    queries: dict[str, Array],
    keys: dict[str, Array],
    states: dict[str, Array | None] | None = None,
    *,
    segment_ids: Array | None,
    block_sizes: BlockSizes | None,
    **options: Any,
) -> Any:
    """What the public op returns, by the chosen implementation, with what is not finite kept in its document."""
    arrays, spoilt = queries | keys | (states or {}), None
    if segment_ids is not None:
        arrays, spoilt = contained(segment_ids, queries, keys, states or {})
    options["window"] = min(options["window"], next(iter(keys.values())).shape[0])  # as many keys as there are: all
    blocks = block_sizes or default_block_sizes(options["window"], queries["q"].shape[0])
    result = getattr(_module(chosen), op)(**arrays, segment_ids=segment_ids, block_sizes=blocks, **options)
    out, state = result if isinstance(result, tuple) else (result, None)
    out = out.astype(keys["v"].dtype)
    if spoilt is not None:
        out = spoil(out, spoilt.out, spoilt.of_query)
        state = None if state is None else spoil(state, spoilt.state, spoilt.of_last)
    return (out, state) if options.get("return_final_state") else out
