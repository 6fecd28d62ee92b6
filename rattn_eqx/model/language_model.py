"""A local-global language model over tokens."""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree, Shaped

from pallas.checked import checked
from pallas.feature_map import FeatureMap
from rattn_eqx.model.block import Block
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
        self.final_norm = RMSNorm(config.model_width)
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
        """What the head makes of the final stream, in float32."""
        head = self.embedding.T if self.head is None else self.head
        return jnp.dot(x, head.astype(x.dtype), preferred_element_type=jnp.float32)

    @checked
    def embed(self, tokens: Int[Array, "t"]) -> Float[Array, "t {self.config.model_width}"]:
        """The stream that the first block reads, in `compute_dtype`."""
        return self.embedding[tokens].astype(jnp.dtype(self.compute_dtype)) * self.config.model_width**0.5


@checked
def batch_logits(
    model: LanguageModel, tokens: Int[Array, "batch t"], segment_ids: Int[Array, "batch t"] | None = None
) -> Float[Array, "batch t vocabulary"]:
    """The model's logits for each sequence of a batch; without segment ids each is one document."""
    return _each(model, tokens, segment_ids)


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
    block = max(1, MAX_LOGITS // model.config.vocabulary_size)
    if tokens.size <= block:
        return function(batch_logits(model, tokens, segment_ids), *others)
    block = 1 << block.bit_length() - 1  # a power of two: batches divide by it, and what is left is one more program
    stream = _each(model.final_stream, tokens, segment_ids)
    in_row = jax.tree.map(lambda x: x.reshape(tokens.size, *x.shape[2:]), (stream, *others))
    of_token = jax.checkpoint(lambda token: function(model.logits(token[0]), *token[1:]), prevent_cse=False)
    return jax.tree.map(lambda x: x.reshape(tokens.shape), jax.lax.map(of_token, in_row, batch_size=block))


def _each(apply: Callable, tokens: Array, segment_ids: Array | None) -> Array:
    if tokens.shape[0] == 1:  # without the batch axis, XLA's matrix products on CPU take a third less time
        return apply(tokens[0], None if segment_ids is None else segment_ids[0])[None]
    return jax.vmap(apply)(tokens, segment_ids)
