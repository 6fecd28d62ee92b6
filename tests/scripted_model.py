"""A language model that says what it is told: tests of generation choose the tokens that it draws."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from rattn_eqx.data.tokenizers import BYTE_VOCABULARY
from rattn_eqx.model.config import ModelConfig
from rattn_eqx.model.language_model import LanguageModel

SLOT = 128  # tokens of each text at most
CONFIG = ModelConfig(
    vocabulary_size=BYTE_VOCABULARY,
    model_width=2,
    num_layers=1,
    num_heads=1,
    num_kv_heads=1,
    head_size=2,
    feed_forward_width=2,
    window=1,
    pattern=("local",),
)
NOT_FINITE = -1  # in the place of a token: its logits are NaN


class Scripted(LanguageModel):
    """Text n, to which `prompts` gives the n-th prompt, is the n-th of the texts, then zeros; greedily, or nearly."""

    script: Int[Array, "tokens"]

    def __init__(self, *texts: bytes | list[int], vocabulary_size: int = BYTE_VOCABULARY):
        config = dataclasses.replace(CONFIG, vocabulary_size=vocabulary_size)
        super().__init__(config, implementation="reference", key=jax.random.key(0))
        self.script = jnp.concatenate([jnp.asarray([*x, *[0] * (SLOT - len(x))], jnp.int32) for x in texts])

    def prompts(self) -> list[str]:
        """Of different lengths, by which the model knows them."""
        return ["x" * start for start in range(0, len(self.script), SLOT)]

    def ids(self) -> list[np.ndarray]:
        """The same, as `generate_batch` takes them."""
        return [np.array([256, *prompt.encode()]) for prompt in self.prompts()]

    def prefill(self, *args, **options):
        return self._said(super().prefill(*args, **options)[1])

    def decode_step(self, *args):
        return self._said(super().decode_step(*args)[1])

    def _said(self, cache):
        token = self.script[cache.length - 1]
        logits = jnp.where(jnp.arange(self.config.vocabulary_size) == token, 100.0, 0.0).astype(jnp.float32)
        return jnp.where(token == NOT_FINITE, jnp.nan, logits), cache
