"""How well a model predicts held-out text."""

import functools
from collections.abc import Callable, Iterable
from typing import Literal

import equinox as eqx
import jax
import jax.numpy as jnp
from beartype import beartype
from jax.sharding import Mesh
from jaxtyping import jaxtyped

from rattn_eqx.language_model import LanguageModel, batch_logits
from rattn_eqx.loss import bits_per_byte, cross_entropy
from rattn_eqx.sharding import BATCH, batch_mesh, over_batch, replicate
from rattn_eqx.tokens import Batch, Tokenizer

GAINS = {"window": "swa_gain", "residual": "rla_gain"}  # what scales a branch in a local layer, if it has two


@jaxtyped(typechecker=beartype)
def evaluate(model: LanguageModel, batches: Iterable[Batch], tokenizer: Tokenizer) -> float:
    """Bits per byte over batches of windows, such as `tokens.validation_batches` gives; batches are cut over devices.

    The bits of every target that is not padding, document markers included, over the bytes that the targets stand for.
    A window starts with no memory of the one before it.
    """
    parameters, static = eqx.partition(model, eqx.is_array)
    sum_nats, nats, num_bytes = None, 0.0, 0
    for batch in batches:
        if sum_nats is None:
            mesh = batch_mesh(len(batch["tokens"]))
            parameters = replicate(parameters, mesh)
            sum_nats = _compile(static, mesh, tokenizer.padding)
        nats += float(sum_nats(parameters, batch))
        num_bytes += int(tokenizer.byte_lengths[batch["targets"]].sum())
    return bits_per_byte(nats, num_bytes)


@functools.lru_cache(maxsize=8)  # `train` evaluates again and again: compile once
def _compile(static: LanguageModel, mesh: Mesh, padding: int) -> Callable:
    def local(parameters, batch):
        logits = batch_logits(eqx.combine(parameters, static), batch["tokens"], batch["segment_ids"])
        nats = cross_entropy(logits, batch["targets"], batch["targets"] != padding)
        return jax.lax.psum(nats, BATCH)

    return jax.jit(over_batch(local, mesh, 1))


def switch_off(model: LanguageModel, branch: Literal["window", "residual"]) -> LanguageModel:
    """The same model with one branch of every local layer silent: its gain is 0, all else is as it was.

    Raises:
      ValueError: for another branch, and for the window of a model without a residual branch, which has no gains.
    """
    if branch not in GAINS:
        raise ValueError(f"switch_off: branch must be 'window' or 'residual'; got {branch!r}")

    def gains(model):
        found = (getattr(block.attention, GAINS[branch], None) for block in model.blocks)
        return [gain for gain in found if gain is not None]

    if gains(model):
        return eqx.tree_at(gains, model, replace_fn=jnp.zeros_like)
    if branch == "window":
        raise ValueError(
            "switch_off: the window can be switched off beside a residual branch only; got a model without one; "
            "train one with residual=True and a local layer"
        )
    return model


def without_residual(model: LanguageModel) -> LanguageModel:
    """`switch_off(model, "residual")`."""
    return switch_off(model, "residual")
