"""States that the kernels never need, in float32 and in plain XLA."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas import segments
from pallas.feature_map import as_pair


def final_state(
    k: Float[Array, "s kv d"],
    v: Float[Array, "s kv dv"],
    *,
    window,
    feature_map,
    segment_ids,
    initial_state,
    segment_state,
) -> Float[Array, "kv f dv"]:
    """The state that the last query reads."""
    last = max(k.shape[0] - window, 0)
    runs = None if segment_ids is None else segments.runs(segment_ids)
    phi = as_pair(feature_map)[1](k[:last].astype(jnp.float32)).astype(jnp.float32)
    if runs is not None:
        phi = jnp.where((runs[:last] == runs[-1])[:, None, None], phi, 0)
    state = jnp.einsum("skf,skv->kfv", phi, v[:last].astype(jnp.float32), precision="highest")
    for start, reads in (
        (initial_state, True if runs is None else runs[-1] == 0),
        (segment_state, False if runs is None else runs[-1] > 0),
    ):
        if start is not None:
            state = state + jnp.where(reads, start.astype(jnp.float32), 0)
    return state


def state_after(k, v, count: int, *, segment_ids, initial_state, segment_state, feature_map):
    """What the key number `count` finds: the state of the keys before it, of its segment."""
    shared = dict(feature_map=feature_map, initial_state=initial_state, segment_state=segment_state)
    ids = None if segment_ids is None else segment_ids[:count]
    state = final_state(k[:count], v[:count], window=0, segment_ids=ids, **shared)
    if segment_ids is None or count == segment_ids.shape[0]:
        return state
    fresh = jnp.zeros_like(state) if segment_state is None else segment_state.astype(state.dtype)
    return jnp.where(segment_ids[count] == segment_ids[count - 1], state, fresh)
