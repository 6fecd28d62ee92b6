"""A model's local layers, what is theirs alone, and the model with all of them changed alike."""

import copy
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
from jaxtyping import Array

from rattn_eqx.model.attention import RAttention
from rattn_eqx.model.language_model import LanguageModel


def local_layers(model: LanguageModel) -> list[RAttention]:
    """The local layers, from the first to the last; what `eqx.tree_at` takes to exchange them."""
    return [block.attention for block in model.blocks if isinstance(block.attention, RAttention)]


def own_parameters(model: LanguageModel) -> Any:
    """For each leaf, whether a local layer has that parameter and a global one has none like it: sinks, gains, matrices
    and scales before the map, meta tokens."""
    false = lambda tree: jax.tree.map(lambda _: False, tree)
    own = [
        eqx.tree_at(lambda x: x.projections, jax.tree.map(eqx.is_inexact_array, layer), false(layer.projections))
        for layer in local_layers(model)
    ]
    return eqx.tree_at(local_layers, false(model), own)


def with_sinks(model: LanguageModel, change: Callable[[int, Array], Array]) -> LanguageModel:
    """The model with `change(number, sink_logits)` of each local layer that has sinks, counted from 0."""
    where = lambda model: [layer.sink_logits for layer in local_layers(model) if layer.sink_logits is not None]
    changed = [change(number, sinks) for number, sinks in enumerate(where(model))]
    return eqx.tree_at(where, model, changed) if changed else model


def with_window(model: LanguageModel, window: int) -> LanguageModel:
    """The model with another window in every local layer."""

    def changed(layer):
        layer = copy.copy(layer)
        object.__setattr__(layer, "window", window)  # a static field, which `eqx.tree_at` does not reach
        return layer

    return eqx.tree_at(local_layers, model, [changed(layer) for layer in local_layers(model)])
