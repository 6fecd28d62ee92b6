"""Random draws for the recall tasks: from a seed, in whole arrays, with the same bytes on every machine.

Only the raw bits of NumPy's Philox are used, which are fixed for good. The distributions of `np.random.Generator` are
not: they may change with NumPy's version.
"""

import math

import numpy as np
from jaxtyping import Int64, Integer

from pallas.checked import checked


def bits(op: str, seed: int, block: int = 0) -> np.random.Philox:
    """The source of random bits of a seed; each block has bits of its own.

    Raises:
      ValueError: a seed outside 0 to 2**64 - 1.
    """
    if not 0 <= seed < 2**64:
        raise ValueError(f"{op}: seed must be at least 0 and below 2**64; got {seed}")
    return np.random.Philox(key=np.array([seed, block], np.uint64))


@checked
def below(source: np.random.Philox, shape: tuple[int, ...], bound: int) -> Int64[np.ndarray, "..."]:
    """Whole numbers from 0 to `bound - 1`, each equally likely to one part in 2**32 / bound; bound <= 2**32."""
    return _below(source, shape, bound)


def _below(source: np.random.Philox, shape: tuple[int, ...], bound: int) -> np.ndarray:  # unchecked, for loops
    size = math.prod(shape)
    words = source.random_raw((size + 1) // 2).astype("<u8").view("<u4")[:size]
    return ((words.astype(np.uint64) * np.uint64(bound)) >> np.uint64(32)).astype(np.int64).reshape(shape)


@checked
def shuffled(source: np.random.Philox, n: int, count: int) -> Int64[np.ndarray, "n count"]:
    """A random order of 0 ... count - 1 in each of n rows."""
    return np.argsort(below(source, (n, count), 2**32), axis=1, kind="stable")


@checked
def distinct(source: np.random.Philox, n: int, count: int, space: int) -> Int64[np.ndarray, "n count"]:
    """`count` different numbers of 0 ... space - 1 in each of n rows, in random order; count <= space.

    Up to 4,096 every choice is equally likely. In a larger space each number comes from a stretch of its own, of
    `space // count` numbers, and the order of the stretches is random: any number alone is uniform, up to the
    remainder.
    """
    rows = np.arange(n)
    if space <= 4096:
        pool = np.tile(np.arange(space, dtype=np.int16), (n, 1))
        for place in range(count):  # Fisher and Yates, all rows at once
            chosen = place + _below(source, (n,), space - place)
            first = pool[:, place].copy()
            pool[:, place] = pool[rows, chosen]
            pool[rows, chosen] = first
        return pool[:, :count].astype(np.int64)
    stretch = space // count
    numbers = below(source, (n, count), stretch) + stretch * np.arange(count)
    return np.take_along_axis(numbers, shuffled(source, n, count), axis=1)


@checked
def spell(
    numbers: Int64[np.ndarray, "*shape"], pieces: Integer[np.ndarray, "base size"], count: int
) -> Int64[np.ndarray, "*shape width"]:
    """Each number written with `count` digits in base `base`, where digit i is written as `pieces[i]`."""
    base = len(pieces)
    digits = numbers[..., None] // base ** np.arange(count - 1, -1, -1) % base
    return pieces[digits].reshape(*numbers.shape, count * pieces.shape[1]).astype(np.int64)


def join(shape: tuple[int, ...], *parts: bytes | list[int] | np.ndarray) -> np.ndarray:
    """Parts side by side along the last axis: arrays [*shape, width], and texts or lists repeated over `shape`."""
    arrays = [np.frombuffer(p, np.uint8) if isinstance(p, bytes) else np.asarray(p, np.int64) for p in parts]
    return np.concatenate([np.broadcast_to(a, (*shape, a.shape[-1])) for a in arrays], axis=-1, dtype=np.int64)
