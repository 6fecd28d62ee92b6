"""Layer-wise transfer: every local layer learns to give, from the old model's stream, what the old layer gives there.

Only what is new in a local layer is learned: sinks, which are first fitted (`sinks.py`), gains and matrices before the
map. The stream is the old model's,
which the converted model still holds, so that no layer has to make up for what another has not learned yet.
"""

import contextlib
import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int
from tqdm import tqdm

from pallas.checked import checked
from rattn_eqx.conversion.sinks import fit_sinks
from rattn_eqx.conversion.student import replaced
from rattn_eqx.data.files import lock, remove_unfinished
from rattn_eqx.data.tokenizers import Tokenizer
from rattn_eqx.model.attention import RAttention
from rattn_eqx.model.language_model import LanguageModel
from rattn_eqx.model.local_layers import own_parameters
from rattn_eqx.training.checkpoint import explained, prune, restore_latest, save_checkpoint
from rattn_eqx.training.config import TrainConfig
from rattn_eqx.training.loop import MAX_SKIPPED, batches_of, checkpoints_of
from rattn_eqx.training.run_folder import Metrics, as_json, digest, metrics_obstacle
from rattn_eqx.training.step import apply_if_finite, learning_rate_schedule

FITTED = 4  # sequences that the sinks are fitted to before the first step
SINKS = 10.0  # how much faster sinks learn: logits have far to go, matrices near the identity have not


@checked
def lost_shares(
    model: LanguageModel, tokens: Int[Array, "batch t"], segment_ids: Int[Array, "batch t"]
) -> Float[Array, "layers"]:
    """Of each local layer the share of the old layer's output that it does not give: sum |new - old|^2 / sum |old|^2.

    Args:
      model: a converted one whose projections are still the old model's.
      tokens, segment_ids: packed documents, as in training.
    """

    def one(tokens, segment_ids):
        x, squares = model.embed(tokens), []
        for block in model.blocks:
            normed, layer = block.attention_norm(x), block.attention
            old = replaced(layer) if isinstance(layer, RAttention) else layer
            gathered = old(normed, segment_ids)
            if isinstance(layer, RAttention):
                new = eqx.filter_checkpoint(layer)(normed, segment_ids)
                sum_of = lambda y: jnp.sum(jnp.square(y.astype(jnp.float32)))
                squares.append(jnp.stack([sum_of(new - gathered), sum_of(gathered)]))
            x = x + gathered
            x = x + block.feed_forward(block.feed_forward_norm(x))
        return jnp.stack(squares)

    lost, whole = jax.vmap(one)(tokens, segment_ids).sum(axis=0).T
    return lost / whole


def transfer(
    folder: Path,
    model: LanguageModel,
    settings: TrainConfig,
    tokens: Path,
    tokenizer: Tokenizer,
    *,
    report: Callable[[str], object] = tqdm.write,
    show_progress: bool = True,
) -> LanguageModel:
    """The model after `settings.steps` of transfer, from the folder's newest checkpoint if it has one.

    Stopped at any moment and called again with the same arguments it goes on exactly, as `train` does.

    Args:
      folder: of metrics.jsonl (a row a step: the mean lost share, and every layer's) and checkpoints/; made if missing.
      model: `student`'s.
      settings: of which steps, batch_size, context, learning_rate, warmup_steps, clip_norm, checkpoint_every and seed
        count; the optimiser is Adam, and sinks learn at SINKS times the rate.
      tokens: a token file that `tokenizers.tokenize` wrote.
      report, show_progress: as of `train`.

    Raises:
      ValueError: if the folder holds a transfer of another model, text or settings. LockedError, FloatingPointError,
        OSError: as `train`.
    """
    with lock(folder, f"transfer: {folder}"):
        return _transfer(folder, model, settings, tokens, tokenizer, report, show_progress)


def _transfer(folder, model, settings: TrainConfig, tokens: Path, tokenizer: Tokenizer, report, show_progress: bool):
    """`transfer`, by the one process that holds the folder's lock."""
    checkpoints, batches = checkpoints_of("transfer", folder), batches_of(tokens, settings, tokenizer)
    remove_unfinished(folder)
    own, rest = eqx.partition(model, own_parameters(model))
    optimizer = _optimizer(settings)
    state = {"own": own, "optimizer": optimizer.init(own)}
    of_this = as_json({"model": digest(model), "config": dataclasses.asdict(model.config),
        "tokens": tokens.parent.name, "settings": dataclasses.asdict(settings)})  # fmt: skip
    at_start, first, kept = batches.get_state(), 0, 0

    def obstacle(metadata: dict[str, Any]) -> str | None:
        if metadata.get("transfer") != of_this:
            return "it belongs to the transfer of another model, text or settings"
        return metrics_obstacle(folder / "metrics.jsonl", metadata)

    restored = restore_latest(checkpoints, state, report=report, obstacle=obstacle)
    if restored is None:
        with contextlib.closing(batches_of(tokens, settings, tokenizer)) as beginning:
            batch = next(beginning)
        fitted = fit_sinks(model, jnp.asarray(batch["tokens"][:FITTED]), jnp.asarray(batch["segment_ids"][:FITTED]))
        state["own"], _ = eqx.partition(fitted, own_parameters(fitted))
    else:
        state, metadata, path = restored
        first, kept = int(metadata["step"]), metadata["metrics"]["rows"]
        batches.set_state(dict.fromkeys(at_start, first))
        prune(path)
        report(f"resuming the transfer after step {first} from {path}")
    arrays, static = eqx.partition(rest, eqx.is_array)

    @jax.jit
    def step(state, arrays, batch):
        def loss(own):
            shares = lost_shares(eqx.combine(own, arrays, static), batch["tokens"], batch["segment_ids"])
            return shares.mean(), shares

        (mean, shares), gradients = jax.value_and_grad(loss, has_aux=True)(state["own"])
        updates, optimizer_state = optimizer.update(gradients, state["optimizer"], state["own"], others=mean)
        return {"own": optax.apply_updates(state["own"], updates), "optimizer": optimizer_state}, mean, shares

    metrics = Metrics(folder / "metrics.jsonl", kept)
    bar = tqdm(total=settings.steps, initial=first, unit="step", disable=not show_progress, dynamic_ncols=True)
    with contextlib.closing(batches), contextlib.closing(metrics), bar:
        for number in range(first + 1, settings.steps + 1):
            state, mean, shares = step(state, arrays, next(batches))
            row = {"step": number, "lost": float(mean)} | {f"layer {i}": float(x) for i, x in enumerate(shares)}
            with explained(f"transfer: the metrics of step {number}", folder):
                metrics.add({name: x if math.isfinite(x) else None for name, x in row.items()})
            bar.set_postfix_str(f"{row['lost']:.3f} of the layers' outputs lost", refresh=False)
            bar.update()
            if int(state["optimizer"].notfinite_count) >= MAX_SKIPPED:
                raise FloatingPointError(
                    f"transfer: loss or gradients were not finite for {MAX_SKIPPED} steps in a row, up to step "
                    f"{number}; lower --transfer-rate (now {settings.learning_rate:g}) in a new folder"
                )
            if number == settings.steps or number % settings.checkpoint_every == 0:
                with explained(f"transfer: the metrics of step {number}", folder):
                    rows = metrics.state()
                place = {"step": number, "transfer": of_this, "metrics": rows}
                save_checkpoint(checkpoints, number, state, place)
    return eqx.combine(state["own"], rest)


def _optimizer(settings: TrainConfig) -> optax.GradientTransformationExtraArgs:
    def faster_sinks(updates: Any, _: Any) -> Any:
        scaled = lambda path, x: x * SINKS if jax.tree_util.keystr(path).endswith(".sink_logits") else x
        return jax.tree_util.tree_map_with_path(scaled, updates)

    return apply_if_finite(
        optax.chain(
            optax.clip_by_global_norm(settings.clip_norm),
            optax.adam(learning_rate_schedule(settings), b2=0.95),
            optax.stateless(faster_sinks),
        )
    )
