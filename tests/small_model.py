"""A model of a few hundred parameters, all of them drawn, so that nothing in it is what it begins with."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from rattn_eqx.model.config import ModelConfig
from rattn_eqx.model.language_model import LanguageModel

CONFIG = ModelConfig(
    vocabulary_size=11,
    model_width=8,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_size=4,
    feed_forward_width=8,
    window=3,
    pattern=("local", "global"),
)


def drawn(config: ModelConfig, *, size: float, seed: int = 0, implementation: str | None = None) -> LanguageModel:
    """Every parameter size * a standard normal."""
    generator = np.random.default_rng(seed)
    key = jax.eval_shape(jax.random.key, 0)
    shapes = eqx.filter_eval_shape(LanguageModel, config, implementation=implementation, key=key)

    def draw(leaf):
        is_parameter = isinstance(leaf, jax.ShapeDtypeStruct)
        return jnp.asarray(size * generator.standard_normal(leaf.shape), leaf.dtype) if is_parameter else leaf

    return jax.tree.map(draw, shapes)
