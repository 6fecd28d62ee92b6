"""Segments: maximal runs of equal ids. Where each starts, and how what is not finite is kept inside its own.

Masked products multiply by 0, and 0 times NaN or infinity is NaN: one bad number would reach every document that shares
a block with its own, in values and in gradients. So packed sequences are computed from finite numbers alone, and the
outputs that a bad one may reach within its document are made NaN afterwards. A loss then hands that document cotangents
that are not finite, also where its outputs are: it gets none, and its gradients are 0. Whole sequences are left as they
are: within a document nothing is promised.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def opens(segment_ids: Int[Array, "s"]) -> Bool[Array, "s"]:
    """Is this key the first of its segment? An id that comes back opens a new one."""
    return jnp.concatenate([jnp.ones((1,), bool), segment_ids[1:] != segment_ids[:-1]])


def runs(segment_ids: Int[Array, "s"]) -> Int[Array, "s"]:
    """The number of each key's segment: 0, 1, 2, ..."""
    return jnp.cumsum(opens(segment_ids).astype(jnp.int32)) - 1


def starts(segment_ids: Int[Array, "s"]) -> Int[Array, "s"]:
    """The position of the first key of each key's segment."""
    position = jnp.arange(segment_ids.shape[0], dtype=jnp.int32)
    return jax.lax.cummax(jnp.where(opens(segment_ids), position, 0))


def _so_far(bad: Bool[Array, "s n"], segment_ids: Int[Array, "s"]) -> Bool[Array, "s n"]:
    """Is it so at a place, or at one before it in its segment?"""
    latest = jax.lax.cummax(jnp.where(bad, jnp.arange(bad.shape[0], dtype=jnp.int32)[:, None], -1))
    return latest >= starts(segment_ids)[:, None]


class Spoilt(NamedTuple):
    """What numbers that are not finite may reach within their documents, and those documents."""

    out: Bool[Array, "t h"]
    state: Bool[Array, "kv"]
    of_query: Bool[Array, "t"]  # is something in its document not finite?
    of_last: Bool[Array, ""]


def contained(
    segment_ids: Int[Array, "s"],
    queries: dict[str, Float[Array, "t h d"]],
    keys: dict[str, Float[Array, "s kv d"]],
    states: dict[str, Float[Array, "kv f dv"] | None],
) -> tuple[dict, Spoilt]:
    """The arrays with 0 for what is not finite, and what that spoils. states: initial_state and segment_state."""
    arrays = queries | keys | {name: x for name, x in states.items() if x is not None}
    finite = {name: jnp.where(jnp.isfinite(x), x, jnp.zeros_like(x)) for name, x in arrays.items()}

    def bad(names, axes):
        found = [~jnp.isfinite(arrays[name]).all(axis=axes) for name in names]
        return functools.reduce(jnp.logical_or, found)

    s, kv = next(iter(keys.values())).shape[:2]
    t, h = next(iter(queries.values())).shape[:2]
    start = starts(segment_ids)
    spoilt = _so_far(bad(keys, -1), segment_ids)  # [s, kv]
    for name, reads in (("initial_state", start == 0), ("segment_state", start > 0)):
        if name in arrays:
            spoilt |= reads[:, None] & bad((name,), (-2, -1))[None]
    state = spoilt[-1]
    out = jnp.repeat(spoilt[s - t :], h // kv, axis=1) | bad(queries, -1)
    anything = spoilt.any(axis=1) | jnp.concatenate([jnp.zeros((s - t,), bool), out.any(axis=1)])
    later = jnp.flip(_so_far(jnp.flip(anything)[:, None], jnp.flip(segment_ids)))
    document = (_so_far(anything[:, None], segment_ids) | later)[:, 0]
    return finite | {name: None for name, x in states.items() if x is None}, Spoilt(
        out, state, document[s - t :], document[-1]
    )


def spoil(x: Array, where: Bool[Array, "..."], document: Bool[Array, "..."]) -> Array:
    """x with NaN where it is spoilt, and no cotangent where its document is; both have leading axes of x."""
    fitted = lambda mask: mask.reshape(*mask.shape, *(1,) * (x.ndim - mask.ndim))
    return jnp.where(fitted(where), jnp.full_like(x, jnp.nan), jnp.where(fitted(document), jax.lax.stop_gradient(x), x))
