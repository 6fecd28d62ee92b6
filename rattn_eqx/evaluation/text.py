"""How well a model predicts held-out text."""

import functools
import itertools
from collections.abc import Callable, Iterable
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, Int32

from pallas.checked import checked
from rattn_eqx.data.batches import Batch
from rattn_eqx.data.tokenizers import Tokenizer
from rattn_eqx.model.language_model import LanguageModel, map_logits
from rattn_eqx.model.loss import bits_per_byte, nats_of_tokens, summed_nats
from rattn_eqx.model.sharding import BATCH, batch_mesh, over_batch, replicate

GAINS = {"window": "swa_gain", "residual": "rla_gain"}  # what scales a branch in a local layer, if it has two
Branch = Literal["window", "residual"]


@checked
def evaluate(model: LanguageModel, batches: Iterable[Batch], tokenizer: Tokenizer) -> float:
    """Bits per byte over batches of windows, such as `batches.validation_batches` gives; batches are cut over devices.

    The bits of every target that is not padding, document markers included, over the bytes that the targets stand for.
    A window starts with no memory of the one before it.
    """
    parameters, static = eqx.partition(model, eqx.is_array)
    sum_nats, nats, num_bytes = None, 0.0, 0
    for batch in batches:
        if sum_nats is None:
            mesh = batch_mesh(len(batch["tokens"]))
            parameters = replicate(parameters, mesh)
            leaves, structure = jax.tree.flatten(static)  # hashable, also where a module holds a list
            sum_nats = _compile(tuple(leaves), structure, mesh, tokenizer.padding)
        nats += float(sum_nats(parameters, batch))
        num_bytes += int(tokenizer.byte_lengths[batch["targets"]].sum())
    return bits_per_byte(nats, num_bytes)


@functools.lru_cache(maxsize=8)  # `train` evaluates again and again: compile once
def _compile(leaves: tuple, structure: Any, mesh: Mesh, padding: int) -> Callable:
    static = jax.tree.unflatten(structure, leaves)

    def local(parameters, batch):
        [nats] = summed_nats(eqx.combine(parameters, static), batch, [batch["targets"] != padding])
        return jax.lax.psum(nats, BATCH)

    return jax.jit(over_batch(local, mesh, 1))


@checked
def loss_by_position(
    model: LanguageModel, documents: Int32[np.ndarray, "n length"], tokenizer: Tokenizer
) -> list[tuple[int, int, float]]:
    """Rows (low, high, bits per byte) over the targets at positions low <= i < high, of documents that begin at 0.

    What a position predicts depends on nothing after it: one reading of a long document has the loss at each shorter
    length too. The first bin ends at 128, and each is as long as all before it.

    Args:
      documents: the first tokens of each, such as `batches.long_documents` gives; all but the last are read. None at
        all give no rows.
    """
    if not len(documents):
        return []
    nats = np.sum([np.asarray(nats_by_position(model, jnp.asarray(x)), np.float64) for x in documents], axis=0)
    num_bytes = tokenizer.byte_lengths[documents[:, 1:]].sum(axis=0)
    bits = lambda low, high: bits_per_byte(float(nats[low:high].sum()), int(num_bytes[low:high].sum()))
    return [(low, high, bits(low, high)) for low, high in itertools.pairwise(position_edges(len(num_bytes)))]


def position_edges(count: int) -> list[int]:
    """Where bins of `count` positions begin, and where the last ends: the first has 128, each as many as all before."""
    edges = [0]
    while edges[-1] < count:
        edges.append(min(max(128, 2 * edges[-1]), count))
    return edges


@eqx.filter_jit
def nats_by_position(model: LanguageModel, document: Int[Array, "length"]) -> Float[Array, "length-1"]:
    """-log p of each token of a document but the first, from those before it."""
    return map_logits(nats_of_tokens, model, document[None, :-1], None, document[None, 1:])[0]


def switch_off(model: LanguageModel, branch: Branch) -> LanguageModel:
    """The same model with one branch of every local layer silent: its gain is 0, all else is as it was.

    Raises:
      ValueError: for another branch, and for the window of a model without a residual branch, which has no gains.
    """
    if branch not in GAINS:
        raise ValueError(f"switch_off: branch must be 'window' or 'residual'; got {branch!r}")

    def layers(model):
        return [x.attention for x in model.blocks if getattr(x.attention, "rla_gain", None) is not None]

    if layers(model):
        return eqx.tree_at(layers, model, [silenced(layer, branch) for layer in layers(model)])
    if branch == "window":
        raise ValueError(
            "switch_off: the window can be switched off beside a residual branch only; got a model without one; "
            "train one with residual=True and a local layer"
        )
    return model


def silenced(layer: Any, branch: Branch) -> Any:
    """A layer of two branches with the gain of one at 0; also where that branch has no gain of its own."""
    where = lambda layer: getattr(layer, GAINS[branch])
    if where(layer) is not None:
        return eqx.tree_at(where, layer, replace_fn=jnp.zeros_like)
    return eqx.tree_at(where, layer, jnp.zeros_like(layer.rla_gain), is_leaf=lambda x: x is None)


def without_residual(model: LanguageModel) -> LanguageModel:
    """`switch_off(model, "residual")`."""
    return switch_off(model, "residual")
