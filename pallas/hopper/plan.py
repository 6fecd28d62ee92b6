"""What is fixed when a Hopper kernel is compiled, and which blocks of keys a tile of queries meets."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas.feature_map import IN_KERNELS, KernelMap
from pallas.hopper.warpgroup import ROWS


def cdiv(x, y: int):
    return (x + y - 1) // y


@dataclasses.dataclass(frozen=True)
class Plan:
    """Static facts of one call. Lengths are padded; positions count keys, and query 0 has position `first`."""

    window: int
    scale: float
    eps: float
    first: int  # s - t
    num_queries: int  # a multiple of ROWS
    num_keys: int  # a multiple of the chunk
    num_heads: int
    num_kv_heads: int
    head_size: int  # of q, k and v after padding: 64 or 128
    value_size: int  # of v before padding, over which the norms average
    slices: int  # f / head_size: phi is computed and multiplied in slices of head_size
    feature_size: int  # f before padding
    map_name: str | None  # a key of feature_map.IN_KERNELS, or None: XLA computes phi, and features are operands
    segmented: bool
    num_start_states: int  # 0; 1: every query reads the same one; 2: initial_state and segment_state
    swa: bool  # is there a window?
    rla: bool  # is there a residual branch?
    swa_normed: bool  # divide the window's output by its RMS and multiply by its gain
    rla_normed: bool  # likewise, the residual branch's
    chunk: int  # keys of a block, that is of a tile of the ring
    spacing: int  # keys between two saved states, a multiple of the chunk
    stages: int  # slots of the ring
    interpret: bool

    @property
    def group(self) -> int:
        return self.num_heads // self.num_kv_heads

    @property
    def pair(self) -> bool:
        """Do the two consumer warpgroups take two heads of a group at the same 64 queries, or one head at 128?"""
        return self.group % 2 == 0

    @property
    def span(self) -> int:
        """Queries that a thread block takes at a time."""
        return ROWS if self.pair else 2 * ROWS

    def first_row(self, tile, warpgroup):
        """The first query row of a warpgroup; written so that the compiler sees a multiple of ROWS."""
        return tile * self.span if self.pair else tile * self.span + warpgroup * ROWS

    def num_tiles(self, batch: int) -> int:
        heads = self.num_heads // 2 if self.pair else self.num_heads
        return heads * (self.num_queries // self.span) * batch

    def place(self, index, warpgroup) -> "Place":
        """What a warpgroup computes in tile `index`: heads vary fastest, so that blocks running together share keys."""
        heads = self.num_heads // 2 if self.pair else self.num_heads
        tiles = self.num_queries // self.span
        head, index = lax.rem(index, jnp.int32(heads)), index // heads
        tile, batch = lax.rem(index, jnp.int32(tiles)), index // tiles
        row = self.first_row(tile, warpgroup)
        return Place(
            batch=batch,
            kv_head=head * (2 if self.pair else 1) // self.group,
            head=head * 2 + warpgroup if self.pair else head,
            row=row,
            lowest=self.first + tile * self.span,
            position=self.first + row,
        )

    @property
    def map(self) -> KernelMap | None:
        return None if self.map_name is None else IN_KERNELS[self.map_name]

    @property
    def sums_to_one(self) -> bool:
        return self.map is not None and self.map.sums_to_one

    @property
    def swa_alone(self) -> bool:
        """Is the output that of the window, as it is?"""
        return self.swa and not self.rla and not self.swa_normed

    @property
    def swa_eps(self) -> float:
        """Inside the norm in which the window's output is kept; without a norm of its own as good as 0."""
        return self.eps if self.swa_normed else 1e-30

    @property
    def slices_at_once(self) -> int:
        return min(self.slices, 2)

    @property
    def num_features(self) -> int:
        return self.slices * self.head_size

    @property
    def precise(self) -> bool:
        """Are d_rla and the normed output kept as hi + lo, two bfloat16 numbers (two packed ones) each?

        d_rla is orthogonal to the output, and values and states are nearly parallel to it: their products with d_rla
        cancel, and would be little but rounding error. Softmax's Jacobian removes that error, other maps' do not.
        """
        return self.rla_normed and not self.sums_to_one

    @property
    def state_parts(self) -> int:
        """bfloat16 parts of a saved state and of its gradient: hi, and lo for a map of which nothing is known."""
        return 2 if self.map is None else 1

    @property
    def precise_starts(self) -> bool:
        """Are start states read as hi + lo, and their gradients so summed? For a map of which nothing is known."""
        return self.num_start_states > 0 and self.map is None

    @property
    def num_start_tiles(self) -> int:
        """Start states as the kernels read them: all of hi and then, if `precise_starts`, all of lo."""
        return self.num_start_states * (2 if self.precise_starts else 1)

    def reads_start(self, tile: int, segment_start):
        """Which queries read a start state, from the starts of their segments; None: all."""
        if self.num_start_states == 1:
            return None
        return segment_start > 0 if tile % 2 else segment_start <= 0

    def features_of(self, slice_index):
        """float32: how many features of a slice are not padding, at least 1."""
        count = jnp.clip(self.feature_size - slice_index * self.head_size, 1, self.head_size)
        return lax.convert_element_type(count, jnp.float32)

    @property
    def num_states(self) -> int:
        """Saved states: number i sums the keys before i * spacing."""
        newest = self.first + self.num_queries - self.span - self.window + 1
        return max(newest, 0) // self.spacing + 1

    @property
    def reaches_back(self) -> bool:
        """Does any query have a residual set?"""
        return self.rla and self.first + self.num_queries > self.window

    def narrow(self) -> "Plan":
        """For the backward kernels, which need more registers: blocks of 64 keys."""
        return dataclasses.replace(self, chunk=ROWS, stages=6)

    def window_range(self, lowest, highest):
        """For queries at positions lowest ... highest: key blocks [begin, end), of which [from, to) need no mask.

        Returned are begin, from, to, end.
        """
        begin = jnp.maximum(lowest - self.window + 1, 0) // self.chunk
        end = highest // self.chunk + 1
        if self.segmented:
            return begin, end, end, end
        unmasked = jnp.clip(cdiv(jnp.maximum(highest - self.window + 1, 0), self.chunk), begin, end)
        return begin, unmasked, jnp.clip((lowest + 1) // self.chunk, unmasked, end), end

    def half_blocks(self, oldest, newest, begin, end):
        """Two counts, 0 or 1: do keys oldest ... newest meet only the second half of block `begin`, and only the first
        half of block `end` - 1?"""
        some = end > begin
        first = some & (oldest >= begin * self.chunk + ROWS)
        last = some & (newest < (end - 1) * self.chunk + ROWS)
        return int32(first), int32(last)

    def residual_range(self, lowest, highest):
        """For queries at positions lowest ... highest: the number of the saved state that they read, and the key blocks
        [begin, end) between that state and the end of the residual set."""
        state = jnp.minimum(jnp.maximum(lowest - self.window + 1, 0) // self.spacing, self.num_states - 1)
        begin = state * (self.spacing // self.chunk)
        end = jnp.where(highest >= self.window, jnp.maximum(highest - self.window, 0) // self.chunk + 1, begin)
        return state, begin, jnp.maximum(end, begin)

    def window_queries(self, key, count: int):
        """For keys key ... key + count - 1: tiles of ROWS queries [begin, end), of which some see some of the keys.

        Of these, [from, to) see all of them and need no mask. Returned are begin, from, to, end.
        """
        tiles = self.num_queries // ROWS
        last = key + count - 1
        begin = jnp.minimum(jnp.maximum(key - self.first, 0) // ROWS, tiles)
        end = jnp.clip(floor_tile(last + self.window - 1 - self.first) + 1, begin, tiles)
        if self.segmented:
            return begin, end, end, end
        unmasked = jnp.clip(cdiv(jnp.maximum(last - self.first, 0), ROWS), begin, end)
        return begin, unmasked, jnp.clip(floor_tile(key + self.window - ROWS - self.first) + 1, unmasked, end), end

    def residual_queries(self, key):
        """Tiles of ROWS queries [begin, end) that read the keys key ... key + ROWS - 1 by a product, not in a state."""
        tiles = self.num_queries // ROWS
        begin = jnp.minimum(jnp.maximum(key + self.window - self.first, 0) // ROWS, tiles)
        newest = (key // self.spacing + 1) * self.spacing + self.window - 2 - self.first
        spans = jnp.where(newest >= 0, jnp.maximum(newest, 0) // self.span + 1, 0)
        return begin, jnp.clip(spans * (self.span // ROWS), begin, tiles)


@dataclasses.dataclass(frozen=True)
class Place:
    """Which queries a warpgroup computes. All are int32 scalars."""

    batch: Any
    kv_head: Any
    head: Any
    row: Any  # of its first query among the queries
    lowest: Any  # position of the first query of the thread block
    position: Any  # of its own first query

    @property
    def rows(self):
        return pl.ds(self.row, ROWS)


def floor_tile(row):
    """Which tile of ROWS holds a row; -1 for a negative one."""
    return jnp.where(row >= 0, jnp.maximum(row, 0) // ROWS, -1)


def int32(x):
    return lax.convert_element_type(x, jnp.int32)
