"""How well a model predicts a text of any length, read in pieces through its cache."""

import dataclasses
from pathlib import Path

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Integer
from tqdm import tqdm

from pallas.checked import checked
from rattn_eqx.data import files
from rattn_eqx.data.tokenizers import Tokenizer
from rattn_eqx.evaluation.text import position_edges
from rattn_eqx.inference.generate import in_compute_dtype
from rattn_eqx.model.cache import Cache
from rattn_eqx.model.language_model import LanguageModel, by_token
from rattn_eqx.model.loss import bits_per_byte, nats_of_tokens

PIECE = 512  # tokens that are read at once


@dataclasses.dataclass(frozen=True)
class Bin:
    """Targets at positions low <= i < high of the text, their loss in nats, and the bytes that they stand for."""

    low: int
    high: int
    nats: float
    num_bytes: int

    @property
    def perplexity(self) -> float:
        """Of a token."""
        return float(np.exp(min(self.nats / (self.high - self.low), 700.0)))

    @property
    def bits_per_byte(self) -> float:
        return bits_per_byte(self.nats, self.num_bytes) if self.num_bytes else float("nan")


@checked
def text_perplexity(
    model: LanguageModel,
    tokens: Integer[np.ndarray, "length"],
    tokenizer: Tokenizer,
    *,
    piece: int = PIECE,
    show_progress: bool = False,
) -> list[Bin]:
    """The loss of every token but the first, given all before it, by position.

    The text is one document, read once, `piece` tokens at a time: besides it, memory holds the cache, which grows with
    the text by the keys and values of global layers alone, and a piece's numbers.

    Args:
      tokens: ids, such as a document marker and then the text's.

    Raises:
      ValueError: for fewer than two tokens, ids outside the vocabulary, or a piece below 1. FloatingPointError: where
        the loss is not finite.
    """
    if len(tokens) < 2:
        raise ValueError(f"perplexity: the text must have at least 2 tokens; got {len(tokens)}; give a longer one")
    if piece < 1:
        raise ValueError(f"perplexity: piece must be at least 1; got {piece}")
    outside = tokens[(tokens < 0) | (tokens >= model.config.vocabulary_size)]
    if outside.size:
        raise ValueError(
            f"perplexity: tokens must be token ids below vocabulary_size={model.config.vocabulary_size}; got "
            f"{outside[0]}; encode the text with the tokenizer that the model was trained with"
        )
    num_targets = len(tokens) - 1
    piece = min(piece, num_targets)
    model = in_compute_dtype(model)
    cache = model.init_cache(model.config.room(num_targets))
    edges = position_edges(num_targets)
    nats, num_bytes = np.zeros(len(edges) - 1), np.zeros(len(edges) - 1, np.int64)
    with tqdm(total=num_targets, unit="token", unit_scale=True, disable=not show_progress, dynamic_ncols=True) as bar:
        for start in range(0, num_targets, piece):
            given = np.asarray(tokens[start : start + piece + 1], np.int32)
            count = min(piece, num_targets - start)
            inputs, targets = (np.pad(x[:count], (0, piece - count)) for x in (given, given[1:]))
            cache, losses = _read((model, jnp.asarray(inputs), jnp.asarray(targets), jnp.asarray(count)), cache)
            losses = np.asarray(losses)[:count].astype(np.float64)
            if not np.isfinite(losses).all():
                at = start + int(np.argmin(np.isfinite(losses)))
                raise FloatingPointError(
                    f"perplexity: the loss must be finite; got {losses[at - start]} for token {at + 1}; take an "
                    f"earlier checkpoint, or compute_dtype='float32'; the model's is {model.compute_dtype!r}"
                )
            bins = np.searchsorted(edges, np.arange(start, start + count), side="right") - 1
            np.add.at(nats, bins, losses)
            np.add.at(num_bytes, bins, tokenizer.byte_lengths[targets[:count]])
            bar.update(count)
    return [Bin(*row) for row in zip(edges, edges[1:], nats.tolist(), num_bytes.tolist(), strict=False)]


def file_perplexity(
    model: LanguageModel, path: Path, tokenizer: Tokenizer, *, show_progress: bool = False
) -> list[Bin]:
    """`text_perplexity` of a file's text, as one document.

    Raises:
      OSError: as `open`. ValueError: for a file that is empty, or no regular one.
    """
    text = files.read_bytes(path, 2**33)
    if not text:
        raise ValueError(f"perplexity: {path} must have text; it is empty")
    tokens = np.insert(tokenizer.encode(text), 0, tokenizer.document)
    return text_perplexity(model, tokens, tokenizer, show_progress=show_progress)


@eqx.filter_jit(donate="all-except-first")
def _read(
    given: tuple[LanguageModel, Int[Array, "t"], Int[Array, "t"], Int[Array, ""]], cache: Cache
) -> tuple[Cache, Float[Array, "t"]]:
    """The cache after a piece, and the loss of each of its targets, in nats."""
    model, tokens, targets, count = given
    stream, cache = model.extend(tokens, cache, count=count)
    return cache, by_token(nats_of_tokens, model, stream, targets)
