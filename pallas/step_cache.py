"""What one sequence leaves behind for its next token: a ring of the window's keys and values, and a state."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas.checked import checked


@checked
class StepCache(eqx.Module):
    """The memory of one layer and one sequence between two tokens: arrays alone, of one size whatever the length.

    Token number n (the first is 0) of the document stands in slot n % W of the ring, until token n + W takes its place
    and it enters the state: after `length` tokens the state is S_{length - 1 - W}. Slots that hold no token yet, or one
    of an earlier document, are never read: a document begins by `length` 0 and the state that it starts from.

    keys: as the window reads them, after qk-norm and rotary embedding. values: v.
    keys_rla: as the residual branch reads them; None where that is the same, or where there is no such branch. Of these
      only the row that leaves is read: they cost room, no time.
    state: sum of phi(k)^T v over the tokens that have left the ring; None without a residual branch.
    length: tokens of the document so far.
    """

    keys: Float[Array, "window kv d"]
    keys_rla: Float[Array, "window kv d"] | None
    values: Float[Array, "window kv dv"]
    state: Float[Array, "kv f dv"] | None
    length: Int[Array, ""]

    @property
    def ring_rla(self) -> Float[Array, "window kv d"]:
        """The keys as the residual branch reads them."""
        return self.keys if self.keys_rla is None else self.keys_rla

    @property
    def residual_state(self) -> Float[Array, "kv f dv"]:
        """state, of a cache that has one."""
        if self.state is None:
            raise ValueError("StepCache: a cache of the residual branch must have a state; got none")
        return self.state

    @property
    def window(self) -> int:
        """W, the slots of the ring."""
        return self.keys.shape[0]

    @property
    def holds(self) -> Bool[Array, "window"]:
        """Does this slot hold a token of the document?"""
        return jnp.arange(self.window, dtype=jnp.int32) < self.length

    def begun(self, state: Float[Array, "kv f dv"] | None) -> "StepCache":
        """As at the head of a document that starts from this state; None is zero."""
        if self.state is not None:
            state = jnp.zeros_like(self.state) if state is None else state.astype(self.state.dtype)
        return StepCache(self.keys, self.keys_rla, self.values, state, jnp.zeros_like(self.length))


def turned(
    cache: StepCache, k: Float[Array, "kv d"], k_rla: Float[Array, "kv d"] | None, v: Float[Array, "kv dv"]
) -> tuple[StepCache, Array, Array, Array]:
    """The ring after one more token, with the old state, and what leaves it: (key as the residual branch reads it,
    value, does a token leave?)."""
    new = k if k_rla is None else k_rla
    length = cache.length + 1
    if cache.window == 0:
        return StepCache(cache.keys, cache.keys_rla, cache.values, cache.state, length), new, v, jnp.array(True)
    slot, leaves = cache.length % cache.window, cache.length >= cache.window

    put = lambda ring, row: jax.lax.dynamic_update_index_in_dim(ring, row.astype(ring.dtype), slot, 0)
    keys_rla = None if cache.keys_rla is None else put(cache.keys_rla, new)
    after = StepCache(put(cache.keys, k), keys_rla, put(cache.values, v), cache.state, length)
    return after, cache.ring_rla[slot], cache.values[slot], leaves


def in_order(ring: Float[Array, "window kv d"], length: Int[Array, ""]) -> Float[Array, "window kv d"]:
    """The slots from the oldest token to the newest, which is the last."""
    return ring if ring.shape[0] == 0 else jnp.roll(ring, -(length % ring.shape[0]), axis=0)


def in_slots(rows: Float[Array, "window kv d"], length: Int[Array, ""]) -> Float[Array, "window kv d"]:
    """The ring whose `in_order` is `rows`."""
    return rows if rows.shape[0] == 0 else jnp.roll(rows, length % rows.shape[0], axis=0)
