"""What each branch of a trained model contributes: scores without it, its share of the output, how far back it reads.

A local layer adds its window and its residual branch, each times a gain, before a linear output projection. So a gain
of zero takes a branch out, and leaves what the other one contributes.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Int32, Int64, Integer

from pallas.checked import checked
from rattn_eqx.data.batches import Batch
from rattn_eqx.data.tokenizers import Tokenizer
from rattn_eqx.evaluation.recall import predict
from rattn_eqx.evaluation.text import evaluate, silenced, switch_off
from rattn_eqx.model.language_model import MAX_LOGITS, LanguageModel
from rattn_eqx.tasks.draw import below, bits, distinct
from rattn_eqx.tasks.recall import RecallBatch, RecallScore, score

NOT_LINEAR = 0.05  # of the output; bfloat16 rounds to a tenth of that


def switched(model: LanguageModel) -> dict[str, LanguageModel]:
    """The model whole, and with each branch switched off.

    Raises:
      ValueError: if no layer has a residual branch.
    """
    return {"whole": model} | {f"{branch} off": switch_off(model, branch) for branch in ("window", "residual")}


def loss_by_branch(model: LanguageModel, batches: Sequence[Batch], tokenizer: Tokenizer) -> dict[str, float]:
    """Bits per byte of `evaluate` for each of `switched`."""
    return {name: evaluate(variant, batches, tokenizer) for name, variant in switched(model).items()}


def accuracy_by_branch(model: LanguageModel, batch: RecallBatch) -> dict[str, RecallScore]:
    """The score on a recall task for each of `switched`."""
    return {name: score(batch, predict(variant, batch.tokens)) for name, variant in switched(model).items()}


@checked
@dataclasses.dataclass(frozen=True)
class BranchShares:
    """Means over samples for each layer with two branches, by position.

    With c_window and c_residual a layer's contributions at a position, of the model's width, `residual` is
    |c_residual| / (|c_window| + |c_residual|) and `window` the rest of 1. `layers` are their numbers in the model, from
    0. A share is of size, not of use: what is added may be the same for every token, or be ignored by what follows.
    """

    layers: tuple[int, ...]
    window: Float[np.ndarray, "l t"]
    residual: Float[np.ndarray, "l t"]


@checked
def contributions(
    layer: eqx.Module, x: Float[Array, "t m"], segment_ids: Int[Array, "t"] | None = None
) -> tuple[Float[Array, "t m"], Float[Array, "t m"]]:
    """What the window and the residual branch of a local layer add to the stream, in this order; the sum is its output.

    Args:
      layer: any with gains `swa_gain` and `rla_gain` that its output is linear in, called as `RAttention` is.
      x, segment_ids: as `RAttention` takes them.
    """
    return silenced(layer, "residual")(x, segment_ids), silenced(layer, "window")(x, segment_ids)


def branch_shares(model: LanguageModel, tokens: Int32[np.ndarray, "n t"]) -> BranchShares:
    """Each branch's share of the norm of its layer's output; every sample is one document.

    Raises:
      ValueError: if no layer has a residual branch, or one whose output is not the sum of its branches' contributions,
        such as a layer that norms their sum.
    """
    with_gains = [i for i, block in enumerate(model.blocks) if getattr(block.attention, "rla_gain", None) is not None]
    if not with_gains:
        raise ValueError("branch_shares: no layer of this model has a residual branch; train with residual=True")
    residual = np.zeros((len(with_gains), tokens.shape[1]))
    for sample in tokens:
        shares, gaps = map(np.asarray, _residual_shares(model, jnp.asarray(sample)))
        if gaps.max() > NOT_LINEAR:
            raise ValueError(
                "branch_shares: a layer's output must be the sum of its branches' contributions; got one that differs "
                f"by {gaps.max():.0%} in layer {with_gains[gaps.argmax()]}; use a model that norms its branches apart"
            )
        residual += shares / len(tokens)
    return BranchShares(tuple(with_gains), 1 - residual, residual)


@eqx.filter_jit
def _residual_shares(model: LanguageModel, tokens: Int[Array, "t"]) -> tuple[Array, Array]:
    x, shares, gaps = model.embed(tokens), [], []
    norm = lambda y: jnp.linalg.norm(y.astype(jnp.float32), axis=-1)
    for block in model.blocks:
        if getattr(block.attention, "rla_gain", None) is not None:
            normed = block.attention_norm(x)
            window, residual = contributions(block.attention, normed)
            output = block.attention(normed)
            shares.append(norm(residual) / (norm(window) + norm(residual) + 1e-30))
            gaps.append(jnp.max(norm(window + residual - output) / (norm(output) + 1e-30)))
        x = block(x)
    return jnp.stack(shares), jnp.stack(gaps)


@checked
@dataclasses.dataclass(frozen=True)
class EffectiveMemory:
    """`change[distance]`: how much a changed token moves the output that many tokens later. NaN without a pair.

    It is a mean over `pairs[distance]` pairs of a place and a position.
    """

    change: Float[np.ndarray, "t"]
    pairs: Int64[np.ndarray, "t"]

    @property
    def reach(self) -> int:
        """The longest distance at which anything moved at all; -1 if nothing did."""
        return int(np.flatnonzero(self.change > 0).max(initial=-1))


@checked
def effective_memory(
    model: LanguageModel,
    tokens: Int32[np.ndarray, "n t"],
    *,
    num_places: int = 16,
    seed: int = 0,
    places: Integer[np.ndarray, "n p"] | None = None,
    read: Bool[np.ndarray, "n t"] | None = None,
) -> EffectiveMemory:
    """How far back a changed token still moves the logits, by distance.

    One token of a sample, at a place s, is replaced by another of the ids that stand in `tokens`, each equally likely.
    At a position i >= s let z be the logits less their mean over the vocabulary, and z' those with the token replaced.
    The change is |z' - z| / |z|, and its distance i - s. change[D] is the mean over all pairs (s, i) with
    i - s = D: every sample is changed at each of its places, one at a time.

    It is exactly 0 where the model cannot read: local layers without a residual branch reach layers * (W - 1) back
    together, the residual branch alone reads the token itself and what is W back or more, a global layer everything.
    A sample is one document; special tokens are changed like others.

    Args:
      tokens: samples, such as a `RecallBatch`'s or a window of text.
      num_places: places of each sample, drawn evenly from `seed`; without effect if `places` are given.
      places: the tokens to change, by position; an equal number in every sample.
      read: the positions at which the change counts; default: all.

    Raises:
      ValueError: num_places outside 1 to t, places outside the samples, or samples of one id only.

    Cost: n (p + 1) forward passes, and as many of the head again. Logits are formed by blocks of tokens.
    """
    n, t = tokens.shape
    ids = np.unique(tokens)
    if len(ids) < 2:
        raise ValueError(
            "effective_memory: tokens must hold at least two ids, so that one can replace another; "
            f"got {ids.tolist()}; give other samples"
        )
    source = bits("effective_memory", seed)
    if places is None:
        if not 1 <= num_places <= t:
            raise ValueError(f"effective_memory: num_places must be 1 to {t}, the samples' length; got {num_places}")
        places = distinct(source, n, num_places, t)
    if places.size == 0 or places.min() < 0 or places.max() >= t:
        raise ValueError(
            f"effective_memory: places must be positions 0 to {t - 1} of the samples, at least one; "
            f"got {places.shape[1]}, {'' if places.size == 0 else f'from {places.min()} to {places.max()}'}"
        )
    rank = np.searchsorted(ids, np.take_along_axis(tokens, places, axis=1))
    others = ids[(rank + 1 + below(source, places.shape, len(ids) - 1)) % len(ids)]
    total, pairs = np.zeros(t), np.zeros(t, np.int64)
    for sample in range(n):
        before = _final_stream(model, jnp.asarray(tokens[sample]))
        for place, other in zip(places[sample], others[sample], strict=True):
            replaced = tokens[sample].copy()
            replaced[place] = other
            after = _final_stream(model, jnp.asarray(replaced))  # the same program: what is equal is so to the bit
            at = np.arange(place, t) if read is None else place + np.flatnonzero(read[sample, place:])
            change = _change_of_logits(model, before, after)
            total += np.bincount(at - place, change[at], minlength=t)
            pairs += np.bincount(at - place, minlength=t)
    if not pairs.any():
        raise ValueError("effective_memory: no position is read at or after a place; got read=False at all of them")
    return EffectiveMemory(np.where(pairs > 0, total / np.maximum(pairs, 1), np.nan), pairs)


@eqx.filter_jit
def _final_stream(model: LanguageModel, tokens: Int[Array, "t"]) -> Float[Array, "t m"]:
    return model.final_stream(tokens)


def _change_of_logits(model: LanguageModel, before: Array, after: Array) -> Float[np.ndarray, "t"]:
    block = max(1, MAX_LOGITS // model.config.vocabulary_size)
    pieces = ([x[start : start + block] for x in (before, after)] for start in range(0, len(before), block))
    changes = [_relative_change(*(_centred_logits(model, x) for x in piece)) for piece in pieces]
    return np.concatenate(changes, dtype=np.float64)


@eqx.filter_jit
def _centred_logits(model: LanguageModel, x: Float[Array, "t m"]) -> Float[Array, "t vocabulary"]:
    logits = model.logits(x)
    return logits - jnp.mean(logits, axis=-1, keepdims=True)


@jax.jit
def _relative_change(before: Array, after: Array) -> Array:
    return jnp.linalg.norm(after - before, axis=-1) / jnp.linalg.norm(before, axis=-1)


def attribute_task(
    model: LanguageModel, batch: RecallBatch, *, samples: int = 8, num_places: int = 8
) -> dict[str, Any]:
    """A row for a line of JSON: what each branch contributes on a task's samples.

    `accuracy` and `exact` (`RecallScore`) without each branch, of the whole batch; of its first `samples` samples,
    `residual_share` of each layer's output (`branch_shares`, the mean over positions; None for layers that it refuses)
    and `memory`, rows [low, high, change] of `effective_memory` for low <= distance < high.
    """
    tokens, variants = batch.tokens[:samples], switched(model)
    try:
        shares = branch_shares(model, tokens)
    except ValueError:  # layers that norm the sum of their branches have none
        shares = None
    memory = {name: effective_memory(x, tokens, num_places=num_places) for name, x in variants.items()}
    scores = accuracy_by_branch(model, batch)
    return {
        "accuracy": {name: result.accuracy for name, result in scores.items()},
        "exact": {name: result.exact for name, result in scores.items()},
        "residual_share": shares and dict(zip(shares.layers, shares.residual.mean(axis=1).tolist(), strict=True)),
        "memory": {name: _in_bins(x) for name, x in memory.items()},
    }


def _in_bins(memory: EffectiveMemory) -> list[tuple[int, int, float]]:
    rows, total = [], np.where(memory.pairs > 0, memory.change * memory.pairs, 0)
    for low in (2**power for power in range(len(total).bit_length())):
        if pairs := memory.pairs[low : 2 * low].sum():
            rows.append((low, 2 * low, float(total[low : 2 * low].sum() / pairs)))
    return rows
