"""A local-global language model over tokens."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, PyTree, Shaped

from pallas import segments
from pallas.checked import checked
from pallas.feature_map import FeatureMap
from pallas.numerics import accumulation_dtype
from rattn_eqx.model.block import Block
from rattn_eqx.model.cache import Cache, Piece
from rattn_eqx.model.config import ModelConfig
from rattn_eqx.model.initialise import truncated_normal
from rattn_eqx.model.norm import RMSNorm

MAX_LOGITS = 2**26  # formed at once where they are reduced: 256 MiB in float32, and a few times that beside them


@checked
class LanguageModel(eqx.Module):
    """Embedding, blocks in the repeated `config.pattern`, a final norm, and logits over the vocabulary.

    Unbatched, causal. Parameters are float32; blocks compute in `compute_dtype`, where float16 makes what exceeds
    65,504 infinite, as bfloat16 does not; logits are float32. `rematerialise` recomputes each block in the backward
    pass instead of keeping what is inside it. `feature_map`, where given, makes each local layer's own map from a
    key, in place of the one that `config` names: a learned one, such as `lambda key:
    pallas.feature_map.Hedgehog(config.head_size, key=key)`, is trained with the rest. A ValueError refuses it where
    `config` has no residual branch.

    >>> from rattn_eqx.model.presets import tiny
    >>> model = LanguageModel(tiny, key=jax.random.key(0))
    >>> model(jnp.zeros(10, jnp.int32)).shape
    (10, 258)
    """

    embedding: Float[Array, "vocabulary m"]
    blocks: tuple[Block, ...]
    final_norm: RMSNorm
    head: Float[Array, "m vocabulary"] | None
    config: ModelConfig = eqx.field(static=True)
    compute_dtype: str = eqx.field(static=True)
    rematerialise: bool = eqx.field(static=True)

    def __init__(
        self,
        config: ModelConfig,
        *,
        compute_dtype: str = "float32",
        rematerialise: bool = False,
        feature_map: Callable[[PRNGKeyArray], FeatureMap] | None = None,
        implementation: str | None = None,
        key: PRNGKeyArray,
    ):
        if feature_map is not None and not config.residual:
            raise ValueError(
                "LanguageModel: feature_map belongs to the residual branch; got residual=False; leave feature_map out"
            )
        embedding_key, head_key, *block_keys = jax.random.split(key, 2 + config.num_layers)
        self.embedding = truncated_normal(
            embedding_key, (config.vocabulary_size, config.model_width), config.model_width
        )
        map_key = lambda block_key: jax.random.fold_in(block_key, 2)  # 0 and 1 give the two keys that Block splits off
        self.blocks = tuple(
            Block(
                config,
                kind,
                feature_map=feature_map(map_key(block_key)) if feature_map and kind == "local" else None,
                implementation=implementation,
                key=block_key,
            )
            for kind, block_key in zip(config.layer_kinds, block_keys, strict=True)
        )
        self.final_norm = RMSNorm(config.model_width, config.norm_eps)
        shape = (config.model_width, config.vocabulary_size)
        self.head = None if config.tie_embeddings else truncated_normal(head_key, shape, config.model_width)
        self.config = config
        self.compute_dtype = compute_dtype
        self.rematerialise = rematerialise

    @checked
    def __call__(
        self, tokens: Int[Array, "t"], segment_ids: Int[Array, "t"] | None = None
    ) -> Float[Array, "t vocabulary"]:
        """Logits of the token after each position. A position reads the tokens up to its own, of its own segment."""
        return self.logits(self.final_stream(tokens, segment_ids))

    @checked
    def final_stream(
        self, tokens: Int[Array, "t"], segment_ids: Int[Array, "t"] | None = None
    ) -> Float[Array, "t {self.config.model_width}"]:
        """The normed stream that the head reads, in `compute_dtype`: `logits` of it is what a call gives."""
        x = self.embed(tokens)
        for block in self.blocks:
            apply = eqx.filter_checkpoint(block) if self.rematerialise else block
            x = apply(x, segment_ids)
        return self.final_norm(x)

    @checked
    def logits(self, x: Float[Array, "*batch {self.config.model_width}"]) -> Float[Array, "*batch vocabulary"]:
        """What the head makes of the final stream, in float32 (float64 of a float64 stream)."""
        head = self.embedding.T if self.head is None else self.head
        return jnp.dot(x, head.astype(x.dtype), preferred_element_type=accumulation_dtype(x))

    @checked
    def embed(self, tokens: Int[Array, "t"]) -> Float[Array, "t {self.config.model_width}"]:
        """The stream that the first block reads, in `compute_dtype`."""
        scale = self.config.model_width**0.5 if self.config.embedding_scale is None else self.config.embedding_scale
        return self.embedding[tokens].astype(jnp.dtype(self.compute_dtype)) * scale

    @checked
    def init_cache(self, max_length: int | None = None, dtype: Any = None) -> Cache:
        """The cache of one sequence before its first token. `jax.vmap` of what continues it batches.

        Local layers keep their window and a state, whatever the length; a global layer has room for max_length tokens.
        `eqx.filter_eval_shape(model.init_cache, max_length)` takes no memory.

        Args:
          max_length: tokens of the longest document; None, for local layers alone: without a limit.
          dtype: of keys and values, `compute_dtype` by default; states are float32 (float64 with it).

        Raises:
          ValueError: for a max_length below 1, and for none where there are global layers. NotImplementedError: for a
            layer that has no cache.
        """
        if max_length is not None and max_length < 1:
            raise ValueError(f"init_cache: max_length must be at least 1; got {max_length}")
        dtype = jnp.dtype(self.compute_dtype if dtype is None else dtype)
        if dtype not in (jnp.float16, jnp.bfloat16, jnp.float32, jnp.float64):
            raise ValueError(f"init_cache: dtype must be a float of 16, 32 or 64 bits; got {dtype}")
        for block in self.blocks:
            if not hasattr(block.attention, "init_cache"):
                raise NotImplementedError(
                    f"init_cache: {type(block.attention).__name__} has no cache; call the model on whole sequences"
                )
        layers = tuple(block.attention.init_cache(max_length, dtype) for block in self.blocks)
        return Cache(layers, jnp.array(0, jnp.int32), max_length)

    @checked
    def prefill(
        self,
        tokens: Int[Array, "t"],
        cache: Cache,
        segment_ids: Int[Array, "t"] | None = None,
        *,
        count: Int[Array, ""] | int | None = None,
    ) -> tuple[Float[Array, "vocabulary"], Cache]:
        """Read a piece of a sequence at once: the logits after its last token, and the cache after it.

        Pieces of any size, one after another and after `decode_step`, give what the whole sequence gives. Under
        `eqx.filter_jit` each t is compiled once. A prompt of many pieces of one size: pad the last, and say its count.

        Args:
          tokens: the next t of the sequence.
          cache: after those before them; it stays as it was.
          segment_ids: as of a call: a token whose id is not that of the token before begins a document. None: no token
            begins one.
          count: how many of the tokens are real, if not all: those after are padding, which changes nothing. Of none
            the logits are NaN, and the cache stays what it was.

        Raises:
          ValueError: for an empty piece, ids outside the vocabulary, a count that is not of the piece, a cache of
            another model, and a document longer than the cache has room for. Of traced numbers, whose values are not
            known, the logits are then NaN.
        """
        stream, cache = self.extend(tokens, cache, segment_ids, count=count)
        if count is None:
            return self.logits(stream[-1]), cache
        return jnp.where(jnp.asarray(count) > 0, self.logits(stream[jnp.asarray(count) - 1]), jnp.nan), cache

    @checked
    def extend(
        self,
        tokens: Int[Array, "t"],
        cache: Cache,
        segment_ids: Int[Array, "t"] | None = None,
        *,
        count: Int[Array, ""] | int | None = None,
    ) -> tuple[Float[Array, "t {self.config.model_width}"], Cache]:
        """`prefill`, but for the head: the final stream of every token, as of `final_stream`."""
        (t,) = tokens.shape
        if t == 0:
            raise ValueError("prefill: tokens must be at least one; got none; a document marker begins an empty text")
        length = t if count is None else count
        count = None if count is None else jnp.asarray(count, jnp.int32)
        check_cache("prefill", self, cache)
        runs, segment_id = jnp.zeros((t,), jnp.int32), cache.segment_id
        if segment_ids is not None:
            segment_ids = segment_ids.astype(segment_id.dtype)
            some = jnp.asarray(length) > 0
            cache = self._begun(cache, (segment_ids[0] != segment_id) & some)
            runs = segments.runs(segment_ids)
            segment_id = jnp.where(some, segment_ids[jnp.maximum(length - 1, 0)], segment_id)
        piece = Piece(runs, count, segment_ids is None)
        valid = check_tokens("prefill", self, tokens, cache, piece)
        x, layers = self.embed(tokens), []
        for block, layer in zip(self.blocks, cache.layers, strict=True):
            x, layer = block.extend(x, layer, piece)
            layers.append(layer)
        stream = self.final_norm(x)
        stream = stream if valid is None else jnp.where(valid, stream, jnp.nan)
        return stream, Cache(tuple(layers), segment_id, cache.room)

    @checked
    def decode_step(
        self, token: Int[Array, ""], cache: Cache, segment_id: Int[Array, ""] | None = None
    ) -> tuple[Float[Array, "vocabulary"], Cache]:
        """The logits after one more token, and the cache after it. The cache given stays as it was.

        Args, Raises: as of `prefill`.
        """
        check_cache("decode_step", self, cache)
        segment_id = cache.segment_id if segment_id is None else segment_id.astype(cache.segment_id.dtype)
        if segment_id is not cache.segment_id:
            cache = self._begun(cache, segment_id != cache.segment_id)
        valid = check_tokens("decode_step", self, token[None], cache, Piece(jnp.zeros((1,), jnp.int32), None, True))
        x, layers = self.embed(token[None])[0], []
        for block, layer in zip(self.blocks, cache.layers, strict=True):
            x, layer = block.step(x, layer)
            layers.append(layer)
        logits = self.logits(self.final_norm(x))
        logits = logits if valid is None else jnp.where(valid, logits, jnp.nan)
        return logits, Cache(tuple(layers), segment_id, cache.room)

    def _begun(self, cache: Cache, begins: Bool[Array, ""]) -> Cache:
        """The cache at the head of a document, if one begins: each layer's length is 0, its state the learned one."""
        fresh = tuple(block.attention.begun(x) for block, x in zip(self.blocks, cache.layers, strict=True))
        chosen = jax.tree.map(lambda new, old: jnp.where(begins, new, old), fresh, cache.layers)
        return Cache(chosen, cache.segment_id, cache.room)


def check_cache(function: str, model: LanguageModel, cache: Cache) -> None:
    """A cache must be one that the model would make.

    Raises:
      ValueError: names the function that was given it, and the first array that is another.
    """
    if cache.room is None and model.config.room(1) is not None:
        raise ValueError(
            f"{function}: the cache must be of this model, whose global layers need room; got one without; "
            "model.init_cache makes one"
        )
    expected = eqx.filter_eval_shape(model.init_cache, cache.room, cache.dtype)
    if len(expected.layers) != len(cache.layers):
        raise ValueError(f"{function}: the cache must be of this model, of {len(expected.layers)} layers; got one of "
                         f"{len(cache.layers)}; model.init_cache makes one")  # fmt: skip
    pairs = zip(
        jax.tree_util.tree_leaves_with_path(expected, is_leaf=lambda x: x is None),
        jax.tree.leaves(cache, is_leaf=lambda x: x is None),
        strict=True,
    )
    for (path, shape), array in pairs:
        described = [None if x is None else f"{x.dtype}{list(x.shape)}" for x in (shape, array)]
        if described[0] != described[1]:
            raise ValueError(
                f"{function}: the cache must be of this model and unbatched; {jax.tree_util.keystr(path)} must be "
                f"{described[0]}; got {described[1]}; model.init_cache makes one, and jax.vmap batches"
            )


def check_tokens(function: str, model: LanguageModel, tokens: Array, cache: Cache, piece: Piece) -> Array | None:
    """Whether the tokens are of the vocabulary and find room, where that is only known when the program runs.

    Raises:
      ValueError: where it is known, and is not so.
    """
    vocabulary = model.config.vocabulary_size
    t, count = tokens.shape[0], piece.count
    counted = jnp.array(True) if count is None else (count >= 0) & (count <= t)
    inside = ((tokens >= 0) & (tokens < vocabulary)) | ~piece.is_real()
    # The longest document that the piece makes: of the one that it continues, and of each that begins in it.
    longest = jnp.where(piece.is_real(), piece.positions(cache.length) + 1, 0).max()
    fits = jnp.array(True) if cache.room is None else longest <= cache.room
    try:
        known = bool(counted), bool(inside.all()), bool(fits)
    except jax.errors.ConcretizationTypeError:  # they are traced
        return counted & inside.all() & fits
    if not known[0]:
        raise ValueError(f"{function}: count must be 0 to the {t} tokens of the piece; got {count}")
    if not known[1]:
        raise ValueError(
            f"{function}: tokens must be ids below vocabulary_size={vocabulary}; got {tokens[jnp.argmin(inside)]}"
        )
    if not known[2]:
        raise ValueError(
            f"{function}: a document must fit in the cache's room={cache.room}; got {longest} tokens, "
            f"{cache.length} of them read before; give init_cache a larger max_length"
        )
    return None


@checked
def batch_logits(
    model: LanguageModel, tokens: Int[Array, "batch t"], segment_ids: Int[Array, "batch t"] | None = None
) -> Float[Array, "batch t vocabulary"]:
    """The model's logits for each sequence of a batch; without segment ids each is one document."""
    return each_sequence(model, tokens, segment_ids)


@checked
def map_logits(
    function: Callable,
    model: LanguageModel,
    tokens: Int[Array, "batch t"],
    segment_ids: Int[Array, "batch t"] | None,
    *others: Shaped[Array, "batch t"],
) -> PyTree[Shaped[Array, "batch t"]]:
    """`function(logits, *others)`, which gives arrays of a number for each token, over the logits of a batch.

    Of up to MAX_LOGITS numbers the logits are formed at once: [batch, t, vocabulary]. Of more, by blocks of so many
    tokens that theirs are, and once more in the backward pass: [vocabulary], under `vmap`.
    """
    if tokens.size <= _block(model):
        return function(batch_logits(model, tokens, segment_ids), *others)
    stream = each_sequence(model.final_stream, tokens, segment_ids)
    in_row = jax.tree.map(lambda x: x.reshape(tokens.size, *x.shape[2:]), (stream, *others))
    return jax.tree.map(lambda x: x.reshape(tokens.shape), by_token(function, model, *in_row))


def by_token(
    function: Callable, model: LanguageModel, stream: Float[Array, "n m"], *others: Shaped[Array, "n"]
) -> PyTree[Shaped[Array, "n"]]:
    """`map_logits` of final streams in a row."""
    block = _block(model)
    if len(stream) <= block:
        return function(model.logits(stream), *others)
    block = 1 << block.bit_length() - 1  # a power of two: batches divide by it, and what is left is one more program
    of_token = jax.checkpoint(lambda token: function(model.logits(token[0]), *token[1:]), prevent_cse=False)
    return jax.lax.map(of_token, (stream, *others), batch_size=block)


def _block(model: LanguageModel) -> int:
    """Tokens whose logits are MAX_LOGITS numbers."""
    return max(1, MAX_LOGITS // model.config.vocabulary_size)


def each_sequence(apply: Callable, tokens: Array, segment_ids: Array | None) -> Array:
    """`apply(tokens, segment_ids)` of each sequence of a batch."""
    if tokens.shape[0] == 1:  # without the batch axis, XLA's matrix products on CPU take a third less time
        return apply(tokens[0], None if segment_ids is None else segment_ids[0])[None]
    return jax.vmap(apply)(tokens, segment_ids)
