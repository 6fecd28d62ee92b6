"""What every op asks of its arguments."""

import jax
import jax.numpy as jnp
from jaxtyping import Array

from pallas.dependence import mixing
from pallas.feature_map import FeatureMap, acts_on_the_last_axis, as_pair, described
from pallas.numerics import accumulation_dtype
from pallas.step_cache import StepCache


def check_attention(op: str, q: Array, k: Array, window: int, segment_ids: Array | None) -> None:
    """The rules that tie arguments together; rank and dtype are jaxtyping's to check."""
    (t, h, _), (s, kv, _) = q.shape, k.shape
    if not (isinstance(t, int) and isinstance(s, int)):
        raise ValueError(f"{op}: lengths must be static; got t={t}, s={s}; export once for each length")
    if t < 1:
        raise ValueError(f"{op}: t must be at least 1; got t={t}; skip empty sequences")
    if s < t:
        raise ValueError(
            f"{op}: keys must be at least as many as queries; got t={t}, s={s}; queries are the last t of s"
        )
    check_heads(op, h, kv)
    if window < 0:
        raise ValueError(
            f"{op}: window must be at least 0; got window={window}; it counts keys, the query's own included"
        )
    if segment_ids is not None and segment_ids.shape != (s,):
        raise ValueError(
            f"{op}: segment_ids must have one id for each of the s keys; got {segment_ids.shape}, s={s}; "
            "with more keys than queries, pass the ids of the keys"
        )


def check_heads(op: str, h: int, kv: int) -> None:
    """Each key/value head serves an equal group of query heads."""
    if kv < 1 or h % kv:
        raise ValueError(f"{op}: h must be a multiple of kv; got h={h}, kv={kv}")


def check_states(op: str, feature_map: FeatureMap, k: Array, v: Array, **states: Array | None) -> None:
    """Feature maps must have the form (..., d) -> (..., f); initial states must fit them: [kv, f, dv]."""
    f = check_feature_map(op, feature_map, k.shape[2], accumulation_dtype(k, v))
    expected = (k.shape[1], f, v.shape[2])
    for name, state in states.items():
        if state is not None and state.shape != expected:
            raise ValueError(
                f"{op}: {name} must have shape (kv, f, dv)={expected} for this feature map; got {state.shape}"
            )


def check_step(
    op: str, q: Array, k: Array, v: Array, cache: StepCache, feature_map: FeatureMap | None = None, k_rla=None
) -> None:
    """One token and the cache before it. feature_map: None for an op without the residual branch."""
    (h, d), (kv, dv) = q.shape, v.shape
    check_heads(op, h, kv)
    expected = {"keys": (cache.window, kv, d), "values": (cache.window, kv, dv)}
    if feature_map is not None:
        expected["state"] = (kv, check_feature_map(op, feature_map, d, accumulation_dtype(k, v)), dv)
    for name, shape in expected.items():
        held = getattr(cache, name)
        if held is None or held.shape != shape:
            raise ValueError(
                f"{op}: the cache's {name} must have shape {shape} for such a token; got "
                f"{'none' if held is None else held.shape}; was it made for another layer, feature map or batch?"
            )
    if feature_map is None and (cache.state is not None or cache.window < 1):
        state = "no state" if cache.state is None else "a state"
        raise ValueError(
            f"{op}: the cache must have slots and no state; got {cache.window} slots and {state}; "
            "rattention_step takes such a cache"
        )
    if feature_map is not None and (cache.keys_rla is None) is not (k_rla is None):
        raise ValueError(
            f"{op}: k_rla and the cache's keys_rla must both be given, or neither; got k_rla "
            f"{'None' if k_rla is None else 'given'}, keys_rla {'None' if cache.keys_rla is None else 'given'}"
        )


def check_feature_map(op: str, feature_map: FeatureMap, head_size: int, dtype=jnp.float32) -> int:
    """f, once phi_q and phi_k have been traced on the axes in front that queries and keys have.

    Raises:
      ValueError: for a map of another form than (..., d) -> (..., f), and for one that mixes tokens or heads.
    """
    phi_q, phi_k = as_pair(feature_map)
    rule = f"{op}: phi_q and phi_k must map (..., d) to (..., f)"
    found = []
    other = head_size + 1  # the axis before the last, of another size, so that neither passes for the other
    for name, phi, axes in (("phi_q", phi_q, (2, 3, other)), ("phi_k", phi_k, (2, other))):
        probe = jax.ShapeDtypeStruct((*axes, head_size), dtype)
        try:
            result = jax.eval_shape(lambda x, phi=phi: phi(x), probe).shape
        except Exception as error:
            raise ValueError(
                f"{rule}; {name} raised {type(error).__name__} on {probe.shape}: {error}; "
                "wrap a map of single vectors in jnp.vectorize(phi, signature='(d)->(f)')"
            ) from error
        found.append((probe.shape, result))
    (probe_q, result_q), (probe_k, result_k) = found
    if (result_q[:-1], result_k) != (probe_q[:-1], (*probe_k[:-1], *result_q[-1:])):
        raise ValueError(
            f"{rule}; got {probe_q} -> {result_q} and {probe_k} -> {result_k}; "
            "keep every axis but the last, and give both maps the same f"
        )
    for name, phi, axes in (("phi_q", phi_q, (2, 2, 2)), ("phi_k", phi_k, (2, 4))):
        probe = jax.ShapeDtypeStruct((*axes, head_size), dtype)
        obstacle = None if acts_on_the_last_axis(phi) else mixing(phi, probe)
        if obstacle is not None:
            raise ValueError(f"{op}: {name} must act on the last axis alone; {described(phi)} {obstacle}")
    return result_k[-1]
