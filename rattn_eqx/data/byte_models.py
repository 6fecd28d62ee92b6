"""What a model must beat: an interpolated byte n-gram model and gzip, in bits per byte."""

import dataclasses
import zlib

import numpy as np
from jaxtyping import Float64, Int64, Integer

from pallas.checked import checked
from rattn_eqx.data.tokenizers import DOCUMENT

_ALPHABET = DOCUMENT + 1  # the bytes and the document marker
_SYMBOL_BITS = 9
_MAX_ORDER = 63 // _SYMBOL_BITS - 1
_BLOCK = 2**22  # tokens


@dataclasses.dataclass(frozen=True)
class _Level:
    """Counts for one context length; codes are sorted, the newest symbol in their lowest bits."""

    ngrams: Int64[np.ndarray, "ngrams"]
    counts: Int64[np.ndarray, "ngrams"]
    contexts: Int64[np.ndarray, "contexts"]
    totals: Int64[np.ndarray, "contexts"]
    types: Int64[np.ndarray, "contexts"]


@checked
def interpolated_bits_per_byte(
    train: Integer[np.ndarray, "train_tokens"], validation: Integer[np.ndarray, "validation_tokens"], *, order: int = 3
) -> float:
    """Return the bits per byte that an n-gram model of `order` symbols of context needs for the validation stream.

    Witten-Bell interpolation at every length down to the uniform distribution: with `N` occurrences of a context in
    the training stream and `T` different symbols seen after it,
    `p(x | context) = (count(context x) + T p(x | context less its oldest symbol)) / (N + T)`.

    Document markers are symbols like any other: their bits count, but the sum is divided by the number of bytes.
    Contexts run across documents, and each stream is taken to be preceded by document markers. Time is
    that of sorting the training stream's n-grams by blocks, memory that of the different ones.

    Args:
      train: byte tokens, 0 to `DOCUMENT`.
      validation: byte tokens, with at least one byte.
      order: symbols of context, 0 to 6.

    Raises:
      ValueError: an order out of range, other tokens than bytes and document markers, or a stream without bytes.

    Source: Witten and Bell, 1991, method C; the recursion is that of Chen and Goodman, 1998, section 2.5.
    """
    if not 0 <= order <= _MAX_ORDER:
        raise ValueError(f"interpolated_bits_per_byte: order must lie between 0 and {_MAX_ORDER}; got {order}")
    for name, tokens in (("train", train), ("validation", validation)):
        if tokens.size == 0 or tokens.min() < 0 or tokens.max() >= _ALPHABET:
            raise ValueError(
                f"interpolated_bits_per_byte: {name} must hold tokens from 0 to {DOCUMENT}, and at least one;"
                " give a file written with ByteTokenizer"
            )
    num_bytes = int(np.count_nonzero(validation != DOCUMENT))
    if num_bytes == 0:
        raise ValueError("interpolated_bits_per_byte: validation holds no bytes; give more text")
    levels = _count(train, order)
    codes, counts = np.unique(_ngram_codes(validation, order), return_counts=True)
    return float(-(counts * np.log2(_probabilities(levels, codes))).sum() / num_bytes)


@checked
def gzip_bits_per_byte(text: bytes | Integer[np.ndarray, "tokens"]) -> float:
    """Return the bits per byte of the text in gzip format at level 9; of byte tokens, the document markers dropped.

    Raises:
      ValueError: a text without bytes.
    """
    data = text if isinstance(text, bytes) else text[text < DOCUMENT].astype(np.uint8).tobytes()
    if not data:
        raise ValueError("gzip_bits_per_byte: the text holds no bytes; give more text")
    return 8 * len(zlib.compress(data, level=9, wbits=31)) / len(data)  # 31: the gzip header with the largest window


def _ngram_codes(tokens: Integer[np.ndarray, "tokens"], order: int) -> Int64[np.ndarray, "tokens"]:
    """Pack every symbol with the `order` symbols before it into one integer."""
    codes = tokens.astype(np.int64)
    for lag in range(1, order + 1):
        codes[lag:] |= tokens[: max(len(tokens) - lag, 0)].astype(np.int64) << (_SYMBOL_BITS * lag)
        codes[:lag] |= DOCUMENT << (_SYMBOL_BITS * lag)
    return codes


def _count(tokens: Integer[np.ndarray, "tokens"], order: int) -> list[_Level]:
    """Count n-grams for contexts of `order` symbols down to none, longest first."""
    ngrams = counts = np.zeros(0, np.int64)
    for start in range(0, len(tokens), _BLOCK):
        before = min(start, order)
        codes = _ngram_codes(tokens[start - before : start + _BLOCK], order)[before:]
        new, of_new = np.unique(codes, return_counts=True)
        ngrams, at = np.unique(np.concatenate([ngrams, new]), return_inverse=True)
        counts = np.bincount(at, weights=np.concatenate([counts, of_new])).astype(np.int64)  # exact below 2**53
    levels = []
    for length in range(order, -1, -1):
        if length < order:  # a shorter n-gram is the sum of the longer ones that end in it
            ngrams, longer = np.unique(ngrams & ((1 << _SYMBOL_BITS * (length + 1)) - 1), return_inverse=True)
            counts = np.bincount(longer, weights=counts).astype(np.int64)
        contexts, first, types = np.unique(ngrams >> _SYMBOL_BITS, return_index=True, return_counts=True)
        levels.append(_Level(ngrams, counts, contexts, np.add.reduceat(counts, first), types))
    return levels


def _probabilities(levels: list[_Level], codes: Int64[np.ndarray, "codes"]) -> Float64[np.ndarray, "codes"]:
    """Return the probability of each code's newest symbol after the older ones."""
    probabilities = np.full(codes.shape, 1.0 / _ALPHABET)
    for length, level in enumerate(reversed(levels)):
        ngrams = codes & ((1 << _SYMBOL_BITS * (length + 1)) - 1)
        counts = _look_up(level.ngrams, level.counts, ngrams)
        totals = _look_up(level.contexts, level.totals, ngrams >> _SYMBOL_BITS)
        types = _look_up(level.contexts, level.types, ngrams >> _SYMBOL_BITS)
        seen = totals > 0
        probabilities[seen] = ((counts + types * probabilities)[seen]) / (totals + types)[seen]
    return probabilities


def _look_up(
    keys: Int64[np.ndarray, "keys"], values: Int64[np.ndarray, "keys"], wanted: Int64[np.ndarray, "wanted"]
) -> Int64[np.ndarray, "wanted"]:
    """Return the values at the wanted keys, 0 where a key is missing."""
    at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[at] == wanted, values[at], 0)
