"""What a model keeps of the tokens that it has read, and how a piece of new ones continues it.

A layer's part is a `pallas.StepCache`: of a local layer a ring of its window and a state, of a global layer a ring as
long as the longest document. `LanguageModel.init_cache` makes one, `prefill` and `decode_step` continue it.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas import StepCache, segments
from pallas.checked import checked
from pallas.step_cache import in_order, in_slots


@checked
class Cache(eqx.Module):
    """The memory of a model and one sequence: a pytree of arrays, of one size whatever the length. `jax.vmap` batches.

    Nothing changes it: what continues it returns another, and one that is kept can be continued again (a fork).

    layers: each layer's part.
    segment_id: of the document that the last token belongs to.
    room: tokens that a document may have, None where nothing limits it; as `init_cache` was asked.
    """

    layers: tuple[StepCache, ...]
    segment_id: Int[Array, ""]
    room: int | None = eqx.field(static=True)

    @property
    def length(self) -> Int[Array, ""]:
        """Tokens of the document so far."""
        return self.layers[0].length

    @property
    def dtype(self):
        """Of keys and values."""
        return self.layers[0].keys.dtype

    @property
    def num_bytes(self) -> int:
        """Of all arrays."""
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(self))


@checked
class Piece(eqx.Module):
    """New tokens, as every layer is told of them: `count` of t are real, those after are padding; None: all are.

    runs: the number of each token's document: 0 for the one that the cache is in, then 1, 2, ...
    one_document: is it known that all are of that one?
    """

    runs: Int[Array, "t"]
    count: Int[Array, ""] | None
    one_document: bool = eqx.field(static=True)

    def to_end(self, x: Array) -> Array:
        """Rows of tokens with the padding in front: ops let queries stand at the end of the keys."""
        return x if self.count is None else jnp.roll(x, self.runs.shape[0] - self.count, axis=0)

    def from_end(self, x: Array) -> Array:
        """What `to_end` undid."""
        return x if self.count is None else jnp.roll(x, self.count - self.runs.shape[0], axis=0)

    def is_real(self) -> Array:
        t = self.runs.shape[0]
        return jnp.arange(t, dtype=jnp.int32) < (t if self.count is None else self.count)

    def positions(self, length: Array) -> Array:
        """Of each token in its document; length: tokens of the first one so far."""
        position = jnp.arange(self.runs.shape[0], dtype=jnp.int32) - segments.starts(self.runs)
        return position + jnp.where(self.runs == 0, length, 0)

    def length_after(self, length: Array) -> Array:
        """Tokens of the last document."""
        count = self.runs.shape[0] if self.count is None else self.count
        return jnp.where(count == 0, length, self.positions(length)[count - 1] + 1).astype(length.dtype)


class Joined(eqx.Module):
    """Padding, then what a ring holds in the order of time, then new tokens: the keys of the whole-sequence ops."""

    keys: Float[Array, "s kv d"]
    keys_rla: Float[Array, "s kv d"] | None
    values: Float[Array, "s kv dv"]
    segment_ids: Int[Array, "s"]


def join(cache: StepCache, piece: Piece, k: Array, k_rla: Array | None, v: Array) -> Joined:
    """A layer's cache and the rows of new tokens behind it, these rounded as the cache will hold them.

    Padding stands in the ring's oldest document, more than a window before the first new query, with values of 0: it
    adds nothing to a state, and no window reaches it.
    """

    def rows(ring: Array, new: Array) -> Array:
        new = new.astype(ring.dtype).astype(new.dtype)
        return piece.to_end(jnp.concatenate([in_order(ring, cache.length).astype(new.dtype), new]))

    real = piece.is_real()
    ids_of_ring = in_order(cache.holds, cache.length).astype(jnp.int32) - 1
    first = ids_of_ring[0] if cache.window else jnp.zeros((), jnp.int32)
    ids = jnp.concatenate([ids_of_ring, jnp.where(real, piece.runs, first)])
    values = jnp.where(real[:, None, None], v, 0)
    return Joined(
        rows(cache.keys, k),
        None if cache.keys_rla is None or k_rla is None else rows(cache.keys_rla, k_rla),
        rows(cache.values, values),
        piece.to_end(ids).astype(jnp.int32),
    )


def keep(cache: StepCache, piece: Piece, joined: Joined, state: Array | None) -> StepCache:
    """The cache after the new tokens: the newest rows, each in its slot, and the state that the last query read."""
    length = piece.length_after(cache.length)

    def ring(rows: Array) -> Array:
        return in_slots(rows[rows.shape[0] - cache.window :].astype(cache.keys.dtype), length)

    state = None if cache.state is None or state is None else state.astype(cache.state.dtype)
    keys_rla = None if joined.keys_rla is None else ring(joined.keys_rla)
    return StepCache(ring(joined.keys), keys_rla, ring(joined.values), state, length)
