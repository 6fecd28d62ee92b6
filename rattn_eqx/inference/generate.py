"""Sampling text from a model, one token at a time."""

import sys
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from pallas.checked import checked
from pallas.numerics import accumulation_dtype
from rattn_eqx.data.tokenizers import Tokenizer
from rattn_eqx.model.language_model import LanguageModel


@checked
def filter_logits(
    logits: Float[Array, "vocabulary"],
    *,
    temperature: float | int,
    top_k: int | None = None,
    top_p: float | int | None = None,
) -> Float[Array, "vocabulary"]:
    """(logits - their maximum) / temperature, with -inf for every token that top-k or top-p excludes.

    In float32 (float64 for float64 logits), whatever their dtype. Tied tokens are equally likely; where top-k or top-p
    cuts between them, those of lower id stay.

    Args:
      logits: -inf for tokens that are forbidden, which stay so; of the others at least one, and all finite.
      temperature: above 0; below 1 sharpens the distribution, above 1 flattens it. Below 1.2e-38, float32's smallest
        normal number, it counts as that.
      top_k: keep the k likeliest tokens; of equal ones, those of lower id. None keeps all.
      top_p: then keep the fewest likeliest tokens whose probabilities, renormalised after top_k, sum to at least p
        (nucleus sampling, Holtzman et al., arXiv 1904.09751). The likeliest token always stays. None keeps all.

    Raises:
      ValueError: if temperature is not finite or not above 0, top_k below 1, or top_p outside (0, 1].
    """
    _check_sampling("filter_logits", temperature, top_k, top_p)
    if temperature == 0:
        raise ValueError("filter_logits: temperature must be above 0; got 0; sample_token takes 0, the likeliest token")
    dtype = accumulation_dtype(logits)
    logits = logits.astype(dtype)
    smallest = float(jnp.finfo(dtype).tiny)
    divisor = min(max(temperature, smallest), 1 / smallest)
    logits = jnp.where(logits == -jnp.inf, -jnp.inf, (logits - logits.max()) / divisor)
    order = jnp.argsort(logits, descending=True)  # stable: equal logits stay in order of id
    ranked = logits[order]
    kept = jnp.ones(ranked.shape, bool)
    if top_k is not None:
        kept = jnp.arange(ranked.size) < min(top_k, ranked.size)
    if top_p is not None and top_p < 1:  # a rounded sum may reach 1 before the last token does
        probabilities = jax.nn.softmax(jnp.where(kept, ranked, -jnp.inf))
        kept = kept & (jnp.cumsum(probabilities) - probabilities < top_p).at[0].set(True)
    return jnp.where(jnp.zeros_like(kept).at[order].set(kept), logits, -jnp.inf)


@checked
def sample_token(
    logits: Float[Array, "vocabulary"],
    *,
    temperature: float | int,
    top_k: int | None = None,
    top_p: float | int | None = None,
    key: PRNGKeyArray,
) -> Int[Array, ""]:
    """Draw one token from the distribution that `filter_logits` leaves; at temperature 0 take the likeliest.

    Of tokens that tie for the likeliest, temperature 0 takes the lowest id; above 0 each is drawn as often as another.

    Returns:
      The token's id; -1, which is no token, where a logit is NaN or +inf, or all are -inf.

    Raises:
      ValueError: if temperature is below 0 or not finite, top_k below 1, or top_p outside (0, 1].
    """
    _check_sampling("sample_token", temperature, top_k, top_p)
    if temperature == 0:
        token = jnp.argmax(logits)
    else:
        token = jax.random.categorical(key, filter_logits(logits, temperature=temperature, top_k=top_k, top_p=top_p))
    return jnp.where(jnp.isfinite(logits.max()), token, -1)


@checked
def generate(
    model: LanguageModel,
    prompt: Sequence[Any] | np.ndarray | Array,
    *,
    num_tokens: int,
    context: int,
    temperature: float | int = 0.8,
    top_k: int | None = None,
    top_p: float | int | None = None,
    key: PRNGKeyArray,
    forbid: Collection[Any] | np.ndarray | Array = (),
) -> Iterator[int]:
    """Sample the tokens that follow a prompt, yielding each as soon as it is drawn.

    Every token costs one pass over `context` positions, whatever the text's length: the whole prefix is computed again,
    in a buffer of one size, so that the model is compiled once. Text longer than `context` is seen by its last
    `context` tokens. The text counts as one document.

    Args:
      prompt: token ids, an array or a list, at least one; a document marker alone begins a new document.
      num_tokens: how many to sample; 0 gives none.
      temperature, top_k, top_p: as in `sample_token`; temperature 0 is greedy.
      key: fixes the result. Asking for more tokens with the same key continues the same text.
      forbid: ids that are never sampled, such as padding's.

    Raises:
      FloatingPointError: at the token whose logits are not all finite.
      ValueError: at the call, before anything is computed: an empty prompt, token ids outside the vocabulary, nothing
        left to sample, or a size or sampling option out of range.
    """
    vocabulary_size = model.config.vocabulary_size
    _check_sampling("generate", temperature, top_k, top_p)
    if num_tokens < 0:
        raise ValueError(f"generate: num_tokens must be at least 0; got {num_tokens}")
    if context < 1:
        raise ValueError(f"generate: context must be at least 1; got {context}")
    if len(prompt) == 0:
        raise ValueError("generate: the prompt is empty; give at least one token, such as the document marker")
    ids = _ids("prompt", prompt, vocabulary_size)
    allowed = ~np.isin(np.arange(vocabulary_size), _ids("forbid", forbid, vocabulary_size))
    if not allowed.any():
        raise ValueError(f"generate: forbid must leave a token to sample; got all {vocabulary_size}")
    allowed = jnp.asarray(allowed)

    def sampled() -> Iterator[int]:
        text = ids[-context:]
        for index in range(num_tokens):
            # What stands after the last token cannot matter: the model is causal.
            buffer = jnp.asarray(np.pad(text, (0, context - len(text))))
            last, step_key = jnp.asarray(len(text) - 1), jax.random.fold_in(key, index)
            drawn = int(_next_token(model, buffer, last, allowed, step_key, float(temperature), top_k, top_p))
            if drawn < 0:
                raise FloatingPointError(
                    f"generate: logits must be finite; got NaN or infinity for token {index} after the prompt; take an "
                    f"earlier checkpoint, or compute_dtype='float32'; the model's is {model.compute_dtype!r}"
                )
            yield drawn
            text = np.append(text, np.int32(drawn))[-context:]

    return sampled()


def generate_text(model: LanguageModel, tokenizer: Tokenizer, prompt: str, **options: Any) -> Iterator[bytes]:
    """What follows a prompt at the head of a document, as bytes, a token at a time; no token that stands for no text.

    Args:
      options: of `generate`: num_tokens, context, key, temperature, top_k, top_p.

    Raises:
      ValueError: as `generate`.
    """
    begun = np.concatenate([[tokenizer.document], tokenizer.encode(prompt.encode())]).astype(np.int32)
    drawn = generate(model, begun, forbid=(tokenizer.document, tokenizer.padding), **options)
    return (tokenizer.decode(np.array([token])) for token in drawn)


@eqx.filter_jit
def _next_token(
    model: LanguageModel,
    buffer: Int[Array, "context"],
    last: Int[Array, ""],
    allowed: Bool[Array, "vocabulary"],
    key: PRNGKeyArray,
    temperature: float | int,
    top_k: int | None,
    top_p: float | int | None,
) -> Int[Array, ""]:
    """The token drawn after position `last`, or -1 where a logit is not finite; the three options are static."""
    logits = model(buffer)[last]
    logits = jnp.where(jnp.isfinite(logits).all(), logits, jnp.nan)
    logits = jnp.where(allowed, logits, -jnp.inf)
    return sample_token(logits, temperature=temperature, top_k=top_k, top_p=top_p, key=key)


def _ids(name: str, given: Any, vocabulary_size: int) -> np.ndarray:
    """Token ids in int32, whatever holds them.

    Raises:
      ValueError: for what is no row of integers, and for ids outside the vocabulary.
    """
    ids = np.asarray(given if hasattr(given, "__array__") else list(given))
    if ids.ndim != 1 or not (np.issubdtype(ids.dtype, np.integer) or ids.size == 0):
        raise ValueError(
            f"generate: {name} must be a row of token ids; got {ids.dtype} of shape {ids.shape}; "
            "the tokenizer's encode gives one"
        )
    outside = ids[(ids < 0) | (ids >= vocabulary_size)]
    if outside.size:
        raise ValueError(
            f"generate: {name} must hold token ids below vocabulary_size={vocabulary_size}; got {outside[0]}; "
            "encode the text with the tokenizer that the model was trained with"
        )
    return ids.astype(np.int32)


def _check_sampling(function: str, temperature: float | int, top_k: int | None, top_p: float | int | None) -> None:
    if not temperature >= 0:
        raise ValueError(f"{function}: temperature must be at least 0; got {temperature}; 0 takes the likeliest token")
    if temperature > sys.float_info.max:
        raise ValueError(f"{function}: temperature must be finite; got more than 1.79e308; 1e4 draws evenly")
    if top_k is not None and top_k < 1:
        raise ValueError(f"{function}: top_k must be at least 1; got {top_k}; None keeps every token")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"{function}: top_p must lie in (0, 1]; got {top_p}; None keeps every token")
