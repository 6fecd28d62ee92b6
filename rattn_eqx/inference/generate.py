"""Tokens from a model: prompts are read in pieces, then each token costs one step, however long the text is.

One program reads a piece and one draws tokens, for a model, a number of prompts and a `max_length`: neither depends on
how long the prompts are, nor on how many tokens follow. Notebook 08 steps through both.
"""

import dataclasses
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, Key, PRNGKeyArray

from pallas.checked import checked
from pallas.numerics import accumulation_dtype
from rattn_eqx.inference.cost import require_memory
from rattn_eqx.inference.sampling import check_sampling, sample_token
from rattn_eqx.model.cache import Cache
from rattn_eqx.model.language_model import LanguageModel, check_cache

PIECE = {"cpu": 256}  # tokens of a prompt that are read at once
PIECE_ELSEWHERE = 2048
STEPS = 64  # tokens that are drawn before the host looks at them, unless they are streamed
SHORTEST = 1024  # room that global layers get at least, so that most texts share a program
Ids = Sequence[Any] | np.ndarray | Array
Ended = Literal["end", "stop", "count"]


@dataclasses.dataclass(frozen=True)
class Drawn:
    """A token of one of the texts.

    row: of its prompt. index: 0 for the first after the prompt. log_probability: in nats, of the model before
    temperature, top-k, top-p and forbidden tokens; None unless asked for. ended: why none follows: an "end" token
    (which this one is), what `stop` said, or the "count"; None: more follow.
    """

    row: int
    index: int
    token: int
    log_probability: float | None
    ended: Ended | None


@checked
def generate(model: LanguageModel, prompt: Ids, *, key: PRNGKeyArray, **options: Any) -> Iterator[int]:
    """The tokens that follow one prompt, each as soon as it is drawn: `generate_batch` of one prompt.

    Args:
      key: fixes the result. Asking for more tokens with the same key continues the same text.
      options: of `generate_batch`.

    Raises: as `generate_batch`.

    >>> from rattn_eqx.model.presets import tiny
    >>> model = LanguageModel(tiny, key=jax.random.key(0))
    >>> len(list(generate(model, [256, 100], num_tokens=3, key=jax.random.key(1))))
    3
    """
    drawn = generate_batch(model, [prompt], key=typed_key(key)[None], **options)
    return (one.token for step in drawn for one in step)


@checked
def generate_batch(
    model: LanguageModel,
    prompts: Sequence[Ids],
    *,
    num_tokens: int | Sequence[int],
    key: PRNGKeyArray | Key[Array, "batch"],
    max_length: int | None = None,
    temperature: float | int = 0.8,
    top_k: int | None = None,
    top_p: float | int | None = None,
    forbid: Ids | Collection[Any] = (),
    end: Ids | Collection[Any] = (),
    stop: Callable[[int, list[int]], bool] | None = None,
    log_probabilities: bool = False,
    cache: Cache | None = None,
    stream: bool = True,
) -> Iterator[list[Drawn]]:
    """Sample what follows each of several prompts, which may differ in length; each text ends on its own.

    A text does not depend on those beside it. Every prompt begins a document, or continues `cache`.

    Args:
      prompts: token ids of each, at least one; a document marker alone begins a new document.
      num_tokens: most tokens to sample, of each text or of all; 0 gives none.
      key: fixes the result: one for each prompt, or one, of which each prompt gets its own (`jax.random.fold_in` of it
        and the prompt's number).
      max_length: tokens that a text may have with its prompt, where the model has global layers, whose cache has room
        for so many; each max_length is compiled once. None: the power of two from 1,024 on that is enough.
      temperature, top_k, top_p: as in `sample_token`; temperature 0 is greedy.
      forbid: ids that are never sampled, such as padding's.
      end: ids that end a text, such as the document marker's. They are drawn, and are its last token.
      stop: called with a prompt's number and all tokens of its text after each; true ends it.
      log_probabilities: also of each token.
      cache: of a text that every prompt continues, made once by `model.prefill`; it stays as it was.
      stream: yield every token as soon as it is drawn; False: up to 64 at a time, which is faster.

    Returns:
      An iterator over lists: what was drawn of the texts that had not ended, in the order of prompts, then of tokens.

    Raises:
      FloatingPointError: at the token whose logits are not all finite, which ends the texts beside it too.
      ValueError: at the call, before anything is computed: an empty prompt, token ids outside the vocabulary, nothing
        left to sample, no room, or a size or sampling option out of range.
    """
    check_sampling("generate", temperature, top_k, top_p)
    vocabulary_size, batch = model.config.vocabulary_size, len(prompts)
    if not batch:
        raise ValueError("generate: prompts must be at least one; got none")
    counts = np.broadcast_to(np.asarray(num_tokens), (batch,)) if np.ndim(num_tokens) == 0 else np.asarray(num_tokens)
    if counts.shape != (batch,) or (counts < 0).any() or (counts >= 2**31).any():
        raise ValueError(
            f"generate: num_tokens must be at least 0, one or one for each prompt, and below 2**31; got {num_tokens}"
        )
    ids = [_ids("prompt", prompt, vocabulary_size) for prompt in prompts]
    if any(len(row) == 0 for row in ids):
        raise ValueError("generate: the prompt is empty; give at least one token, such as the document marker")
    chosen = lambda name, given: np.isin(np.arange(vocabulary_size), _ids(name, given, vocabulary_size))
    allowed, ends = ~chosen("forbid", forbid), chosen("end", end)
    if not allowed.any():
        raise ValueError(f"generate: forbid must leave a token to sample; got all {vocabulary_size}")
    key = typed_key(key)
    if key.shape not in ((), (batch,)):
        raise ValueError(f"generate: key must be one, or one for each of {batch} prompts; got {key.shape}")
    if cache is not None:
        check_cache("generate", model, cache)
    before = 0 if cache is None else int(cache.length)
    needed = before + max(len(row) + int(count) for row, count in zip(ids, counts, strict=True))
    if cache is None:
        size = room(model, needed, max_length)
        each = eqx.filter_eval_shape(model.init_cache, size).num_bytes
        require_memory(f"generate: caches of {batch} texts", batch * each, "give fewer tokens or fewer prompts")
        cache = model.init_cache(size)
    elif max_length is not None:
        raise ValueError(f"generate: max_length belongs to a new cache; got {max_length} and a cache; leave it out")
    elif cache.room is not None and needed > cache.room:
        raise ValueError(
            f"generate: the cache must have room for {needed} tokens, {before} of them read; it has {cache.room}; "
            "give init_cache a larger max_length"
        )
    keys = key if key.shape else jax.vmap(lambda row: jax.random.fold_in(key, row))(jnp.arange(batch))
    sampling = Sampling(jnp.asarray(allowed), float(temperature), top_k, top_p, log_probabilities)
    return _texts(in_compute_dtype(model), ids, counts, ends, keys, sampling, cache, stop, 1 if stream else STEPS)


def typed_key(key: Array) -> Array:
    """A key of `jax.random.key`, also where it is of `jax.random.PRNGKey`."""
    return key if jnp.issubdtype(key.dtype, jax.dtypes.prng_key) else jax.random.wrap_key_data(key)


class Sampling(eqx.Module):
    """How tokens are drawn."""

    allowed: Bool[Array, "vocabulary"]
    temperature: float = eqx.field(static=True)
    top_k: int | None = eqx.field(static=True)
    top_p: float | int | None = eqx.field(static=True)
    log_probabilities: bool = eqx.field(static=True)


def _texts(
    model: LanguageModel,
    ids: list[np.ndarray],
    counts: np.ndarray,
    ends: np.ndarray,
    keys: Array,
    sampling: Sampling,
    cache: Cache,
    stop: Callable[[int, list[int]], bool] | None,
    steps: int,
) -> Iterator[list[Drawn]]:
    texts: list[list[int]] = [[] for _ in ids]
    active = counts > 0
    if not active.any():
        return
    logits, cache = read_prompts(model, ids, cache)
    given = (model, keys, sampling, jnp.asarray(ends), jnp.asarray(counts, jnp.int32))
    while active.any():
        index = max(len(text) for text, alive in zip(texts, active, strict=True) if alive)
        wanted = min(steps, int((counts[active] - index).max()))
        numbers = jnp.asarray([index, wanted], jnp.int32)  # Python's numbers would be compiled in
        (logits, cache), tokens, scores = _draw(given, (logits, cache), jnp.asarray(active), numbers)
        tokens, drawn = np.asarray(tokens), []
        scores = np.asarray(scores) if sampling.log_probabilities else scores
        for row in np.flatnonzero(active):
            for i in range(wanted):
                token = int(tokens[row, i])
                if token < 0:
                    if drawn:
                        yield drawn
                    raise FloatingPointError(
                        f"generate: logits must be finite; got NaN or infinity for token {len(texts[row])} after the "
                        "prompt; take an earlier checkpoint, or compute_dtype='float32'; the model's is "
                        f"{model.compute_dtype!r}"
                    )
                texts[row].append(token)
                ended: Ended | None = "count" if len(texts[row]) == counts[row] else None
                ended = "stop" if stop is not None and stop(int(row), texts[row]) else ended
                ended = "end" if ends[token] else ended
                score = float(scores[row, i]) if sampling.log_probabilities else None
                drawn.append(Drawn(int(row), len(texts[row]) - 1, token, score, ended))
                if ended is not None:
                    active[row] = False
                    break
        yield drawn


def read_prompts(model: LanguageModel, ids: list[np.ndarray], cache: Cache) -> tuple[Array, Cache]:
    """Logits after each prompt [batch, vocabulary], and the caches, with a batch axis: what each continues is one."""
    piece = PIECE.get(jax.default_backend(), PIECE_ELSEWHERE)
    batch, longest = len(ids), max(len(row) for row in ids)
    cache = jax.tree.map(lambda x: jnp.repeat(x[None], batch, axis=0), cache)
    shape = (batch, model.config.vocabulary_size)
    logits = jnp.zeros(shape, accumulation_dtype(jnp.zeros((), model.compute_dtype)))
    for start in range(0, longest, piece):
        cut = [row[start : start + piece] for row in ids]
        tokens = np.stack([np.pad(row, (0, piece - len(row))) for row in cut])
        counts = np.array([len(row) for row in cut], np.int32)
        logits, cache = _read(model, (logits, cache), jnp.asarray(tokens), jnp.asarray(counts))
    return logits, cache


@eqx.filter_jit(donate="all-except-first")
def _read(
    model: LanguageModel, state: tuple[Array, Cache], tokens: Int[Array, "batch t"], counts: Int[Array, "batch"]
) -> tuple[Array, Cache]:
    """The next piece of each prompt; where it has none, the state as it was."""
    before, cache = state
    logits, cache = _each(lambda t, cache, n: model.prefill(t, cache, count=n), tokens, cache, counts)
    return jnp.where(counts[:, None] > 0, logits, before), cache


@eqx.filter_jit(donate="all-except-first")
def _draw(
    given: tuple,
    state: tuple[Array, Cache],
    active: Bool[Array, "batch"],
    numbers: Int[Array, "2"],
):
    """Up to STEPS tokens of each text, until all have ended: the state, tokens and log-probabilities.

    numbers: tokens drawn before, and how many to draw at most.

    The model's own copy of the cache is written in place.
    """
    model, keys, sampling, ends, counts = given
    batch, (index, wanted) = active.shape[0], numbers

    def one(logits, key, number):
        finite = jnp.isfinite(logits).all()
        masked = jnp.where(sampling.allowed & finite, logits, jnp.where(finite, -jnp.inf, jnp.nan))
        options: dict[str, Any] = dict(temperature=sampling.temperature, top_k=sampling.top_k, top_p=sampling.top_p)
        token = sample_token(masked, key=jax.random.fold_in(key, number), **options)
        return token, jax.nn.log_softmax(logits)[token] if sampling.log_probabilities else jnp.zeros((), logits.dtype)

    def step(carry):
        i, (logits, cache), active, tokens, scores = carry
        token, score = jax.vmap(lambda x, key: one(x, key, index + i))(logits, keys)
        tokens, scores = tokens.at[:, i].set(token), scores.at[:, i].set(score)
        active = active & (token >= 0) & ~ends[token] & (index + i + 1 < counts)
        logits, cache = _each(model.decode_step, jnp.maximum(token, 0), cache)
        return i + 1, (logits, cache), active, tokens, scores

    tokens, scores = jnp.zeros((batch, STEPS), jnp.int32), jnp.zeros((batch, STEPS), state[0].dtype)
    going = lambda carry: (carry[0] < wanted) & carry[2].any()
    _, state, _, tokens, scores = jax.lax.while_loop(going, step, (0, state, active, tokens, scores))
    return state, tokens, scores


def _each(function: Callable, *batched: Any) -> Any:
    """Of every row of a batch; of a single one without the batch axis, which is faster on a CPU."""
    if jax.tree.leaves(batched)[0].shape[0] > 1:
        return jax.vmap(function)(*batched)
    one = function(*jax.tree.map(lambda x: x[0], batched))
    return jax.tree.map(lambda x: x[None], one)


def in_compute_dtype(model: LanguageModel) -> LanguageModel:
    """The model with its matrices in the dtype that it computes in, to which each call would cast them: half the bytes
    of float32 for bfloat16, and the same numbers."""

    def matrices(model):
        found = [model.embedding, model.head]
        for block in model.blocks:
            projections, feed_forward = block.attention.projections, block.feed_forward
            found += [getattr(projections, f"{name}_weight") for name in ("query", "key", "value", "out")]
            found += [getattr(feed_forward, f"{name}_weight") for name in ("gate", "up", "down")]
        return [x for x in found if x is not None]

    return eqx.tree_at(matrices, model, replace_fn=lambda x: x.astype(model.compute_dtype))


def room(model: LanguageModel, needed: int, max_length: int | None) -> int | None:
    """The room of a new cache for texts of up to `needed` tokens: nothing but global layers needs any."""
    if max_length is not None and not 1 <= max_length < 2**31:
        raise ValueError(f"generate: max_length must be at least 1; got {max_length}; below 2**31")
    if model.config.room(needed) is None:
        return None
    if max_length is None:
        return max(SHORTEST, 1 << (needed - 1).bit_length())
    if needed > max_length:
        raise ValueError(
            f"generate: max_length must have room for a prompt and what follows it; got {max_length} for {needed} "
            "tokens; give a larger one, or fewer tokens"
        )
    return max_length


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
