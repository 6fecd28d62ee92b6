"""What every op asks of its arguments, and which implementation serves a call."""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array

from pallas.feature_map import FeatureMap, as_pair, num_features

Implementation = Literal["reference", "chunked", "gpu", "tpu"]


def choose(op: str, implementation: str | None) -> str:
    """The implementation that runs. None means "chunked" on every device until the GPU and TPU kernels land.

    Raises:
      NotImplementedError: for an implementation that this build lacks. An explicit choice never falls back.
      ValueError: for a name that is no implementation.
    """
    if implementation is None:
        return "chunked"
    if implementation in ("reference", "chunked"):
        return implementation
    if implementation in ("gpu", "tpu"):
        raise NotImplementedError(
            f"{op}: implementation={implementation!r} has no kernel yet; "
            "use implementation='chunked' (any device, linear memory) or 'reference' (the definition)"
        )
    raise ValueError(
        f"{op}: implementation must be None, 'reference', 'chunked', 'gpu' or 'tpu'; got {implementation!r}"
    )


def check_attention(op: str, q: Array, k: Array, window: int, segment_ids: Array | None) -> None:
    """The rules that tie arguments together; rank and dtype are jaxtyping's to check."""
    (t, h, _), (s, kv, _) = q.shape, k.shape
    if t < 1:
        raise ValueError(f"{op}: t must be at least 1; got t={t}; skip empty sequences")
    if s < t:
        raise ValueError(
            f"{op}: keys must be at least as many as queries; got t={t}, s={s}; queries are the last t of s"
        )
    if kv < 1 or h % kv:
        raise ValueError(f"{op}: h must be a multiple of kv; got h={h}, kv={kv}")
    if window < 0:
        raise ValueError(
            f"{op}: window must be at least 0; got window={window}; it counts keys, the query's own included"
        )
    if segment_ids is not None and segment_ids.shape != (s,):
        raise ValueError(
            f"{op}: segment_ids must have one id for each of the s keys; got {segment_ids.shape}, s={s}; "
            "with more keys than queries, pass the ids of the keys"
        )


def check_states(op: str, feature_map: FeatureMap, k: Array, v: Array, **states: Array | None) -> None:
    """Feature maps must have the form (..., d) -> (..., f); initial states must fit them: [kv, f, dv]."""
    _check_feature_map(op, feature_map, k)
    expected = (k.shape[1], num_features(feature_map, k.shape[2], accumulation_dtype(k, v)), v.shape[2])
    for name, state in states.items():
        if state is not None and state.shape != expected:
            raise ValueError(
                f"{op}: {name} must have shape (kv, f, dv)={expected} for this feature map; got {state.shape}"
            )


def _check_feature_map(op: str, feature_map: FeatureMap, k: Array) -> None:
    """Both maps are tried on shapes alone, with axes in front as the implementations give them."""
    given = jax.ShapeDtypeStruct((1, 1, k.shape[2]), accumulation_dtype(k))
    try:
        found = [jax.eval_shape(lambda x, phi=phi: phi(x), given).shape for phi in as_pair(feature_map)]
    except Exception as error:
        raise ValueError(
            f"{op}: feature_map must map (..., d) to (..., f), with any axes in front; "
            f"it raised on {given.shape}: {error}; "
            "wrap a map of single vectors in jnp.vectorize(phi, signature='(d)->(f)')"
        ) from error
    if len(set(found)) > 1 or found[0][:-1] != (1, 1):
        raise ValueError(
            f"{op}: feature_map, and both maps of a pair, must map (..., d) to (..., f) with one f; "
            f"got {given.shape} -> {' and '.join(map(str, dict.fromkeys(found)))}"
        )


def accumulation_dtype(*arrays: Array):
    """float64 if any array is float64, else float32."""
    return jnp.float64 if any(x.dtype == jnp.float64 for x in arrays) else jnp.float32
