"""The converted model as it begins: the old one's parameters, with local layers in place of some global ones.

A local layer begins as the layer that it replaces would be if it saw its window alone: the window has no norm, and the
residual branch a gain of 0. Each head has a sink, a logit without a value: a pretrained softmax leans on the first
tokens, which a window leaves behind.
"""

import dataclasses
from typing import Any

import equinox as eqx
import jax
from jaxtyping import PRNGKeyArray

from rattn_eqx.model.attention import GlobalAttention, RAttention
from rattn_eqx.model.block import Block
from rattn_eqx.model.config import LayerKind, ModelConfig
from rattn_eqx.model.language_model import LanguageModel


def student_config(
    config: ModelConfig,
    pattern: tuple[LayerKind, ...],
    window: int,
    *,
    residual: bool = True,
    sinks: bool = True,
) -> ModelConfig:
    """The config of the converted model.

    Args:
      pattern: repeated down the layers: where it says "local" the layer becomes local, elsewhere it stays as it is.
      residual: False leaves the window alone, to compare with.
      sinks: a learned logit without a value for each head of a local layer.

    Raises:
      ValueError: for an old model with local layers, a window below 1, a layer without positions that would become
        local, and a pattern that makes none local.
    """
    old = config.layer_kinds
    becomes_local = [pattern[number % len(pattern)] == "local" for number in range(len(old))]
    if "local" in old:
        raise ValueError(f"convert: the model must have global layers alone; got {old.count('local')} local ones")
    if window < 1:
        raise ValueError(f"convert: window must be at least 1; got window={window}")
    if not any(becomes_local):
        raise ValueError(f"convert: pattern must make a layer local; got {','.join(pattern)} over {len(old)} layers")
    for number, (kind, local) in enumerate(zip(old, becomes_local, strict=True)):
        if local and kind == "global":
            raise ValueError(
                f"convert: a layer without positions stays global; got pattern={','.join(pattern)}, which makes layer "
                f"{number} local; give a pattern that leaves it"
            )
    return dataclasses.replace(
        config,
        pattern=tuple("local" if local else kind for kind, local in zip(old, becomes_local, strict=True)),
        window=window,
        residual=residual,
        feature_map="softmax",
        learned_feature_scale=False,
        num_meta_tokens=0,
        feature_projection=residual,
        swa_gain=None,
        rla_gain=0.0,
        sinks=sinks,
    )


def student(teacher: LanguageModel, config: ModelConfig) -> LanguageModel:
    """The converted model, of a `student_config`: every parameter that the old one has too is the old one's."""
    key = jax.random.key(0)  # of what is replaced; the layers' own parameters begin at constants
    blocks = []
    for kind, block in zip(config.layer_kinds, teacher.blocks, strict=True):
        if kind == "local":
            layer: RAttention = _own_of_a_layer(config, key)
            layer = eqx.tree_at(
                lambda x: x.projections, layer, block.attention.projections, is_leaf=lambda x: x is None
            )
            block = eqx.tree_at(lambda x: x.attention, block, layer)
        blocks.append(block)
    options: dict[str, Any] = dict(compute_dtype=teacher.compute_dtype, rematerialise=teacher.rematerialise)
    shapes = eqx.filter_eval_shape(LanguageModel, config, **options, key=key)
    where = lambda model: (model.embedding, model.blocks, model.final_norm, model.head)
    parts = (teacher.embedding, tuple(blocks), teacher.final_norm, teacher.head)
    return eqx.tree_at(where, shapes, parts, is_leaf=lambda x: x is None)


@eqx.filter_jit
def _own_of_a_layer(config: ModelConfig, key: PRNGKeyArray) -> Any:
    """A local layer without projections."""
    return eqx.tree_at(lambda x: x.projections, Block(config, "local", key=key).attention, None)


def replaced(layer: RAttention) -> GlobalAttention:
    """The layer that a local one replaces, as long as its projections are what they were."""
    projections = layer.projections
    m, num_heads, head_size = projections.query_weight.shape
    options: dict[str, Any] = dict(num_heads=num_heads, num_kv_heads=projections.key_weight.shape[1],
        head_size=head_size, rope_theta=layer.rope_theta, rope_scaling=layer.rope_scaling,
        implementation=layer.implementation)  # fmt: skip
    shapes = eqx.filter_eval_shape(GlobalAttention, m, **options, key=jax.random.key(0))
    return eqx.tree_at(lambda x: x.projections, shapes, projections)
