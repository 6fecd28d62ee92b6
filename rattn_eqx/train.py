"""The training loop."""

import contextlib
import json
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from tqdm import tqdm

from rattn_eqx.checkpoint import explained, restore_latest, save_checkpoint
from rattn_eqx.evaluate import evaluate
from rattn_eqx.language_model import LanguageModel, batch_logits
from rattn_eqx.loss import cross_entropy
from rattn_eqx.run_folder import RunConfig, TrainConfig, cut_metrics, load_config, open_run
from rattn_eqx.sharding import BATCH, batch_mesh, over_batch, replicate
from rattn_eqx.tokens import Tokenizer, load_tokenizer, training_batches, validation_batches

MAX_SKIPPED = 10  # steps in a row whose gradients are not finite, before the run stops


def learning_rate_schedule(config: TrainConfig) -> optax.Schedule:
    """Linear warm-up from 0 at the first step, then a cosine that would be 0 one step after the last."""
    return optax.warmup_cosine_decay_schedule(0.0, config.learning_rate, config.warmup_steps, config.steps)


def make_optimizer(config: TrainConfig) -> optax.GradientTransformation:
    """AdamW, or RMSProp with momentum as the paper has it; gradients clipped by their global norm.

    Weight decay acts on the matrices of attention and feed-forward alone. A step whose gradients are not finite leaves
    parameters and optimiser state as they were, and is counted.
    """
    schedule = learning_rate_schedule(config)
    if config.optimizer == "adamw":
        update = optax.adamw(schedule, b1=0.9, b2=0.95, weight_decay=config.weight_decay, mask=is_decayed)
    else:
        update = optax.chain(
            optax.scale_by_rms(decay=0.95, eps_in_sqrt=False),
            optax.trace(decay=0.9),
            optax.add_decayed_weights(config.weight_decay, mask=is_decayed),
            optax.scale_by_learning_rate(schedule),
        )
    clipped = optax.chain(optax.clip_by_global_norm(config.clip_norm), update)
    return optax.apply_if_finite(clipped, max_consecutive_errors=2**31 - 1)


def is_decayed(parameters: Any) -> Any:
    """For each parameter, whether weight decay acts on it: those called `*_weight`."""
    return jax.tree_util.tree_map_with_path(lambda path, _: jax.tree_util.keystr(path).endswith("_weight"), parameters)


def initial_state(config: RunConfig) -> dict[str, Any]:
    """The model and the optimiser state that a run begins with; what a checkpoint holds."""
    model = LanguageModel(
        config.model,
        compute_dtype=config.training.compute_dtype,
        rematerialise=config.training.rematerialise,
        key=jax.random.key(config.training.seed),
    )
    return {"model": model, "optimizer": make_optimizer(config.training).init(eqx.filter(model, eqx.is_array))}


def load_model(folder: Path, *, report: Callable[[str], object] = print) -> tuple[LanguageModel, Tokenizer, RunConfig]:
    """The model of a run's newest checkpoint, its tokenizer and its config.

    Args:
      report: called with one sentence for every damaged checkpoint that is passed over.

    Raises:
      ValueError: if the folder is no run, has no checkpoint yet, or no sound one.
    """
    config = load_config(folder)
    restored = restore_latest(folder / "checkpoints", eqx.filter_eval_shape(initial_state, config), report=report)
    if restored is None:
        raise ValueError(f"load_model: {folder} has no checkpoint yet; let `rattn pretrain` reach its first one")
    return restored[0]["model"], load_tokenizer(folder / "tokenizer.json"), config


def mean_loss(model: LanguageModel, batch: dict[str, jax.Array]) -> jax.Array:
    """Nats per token, over a batch of `tokens`, `targets` and `segment_ids`, each [batch, context]."""
    targets = batch["targets"]
    logits = batch_logits(model, batch["tokens"], batch["segment_ids"])
    return cross_entropy(logits, targets, jnp.ones(targets.shape, bool)) / targets.size


def validation_loss(model: LanguageModel, config: TrainConfig, validation_tokens: Path, tokenizer: Tokenizer) -> float:
    """Bits per byte on the first `config.evaluation_tokens` validation tokens."""
    batches = validation_batches(
        validation_tokens,
        context=config.context,
        batch_size=config.batch_size,
        document=tokenizer.document,
        max_tokens=config.evaluation_tokens,
    )
    return evaluate(model, batches, tokenizer)


def make_step(static: LanguageModel, config: TrainConfig, mesh: Mesh) -> Callable:
    """The compiled step (parameters, optimiser state, batch) -> (parameters, optimiser state, loss, gradient norm).

    The batch is cut over devices, and each device's share into `config.microbatches` pieces, one after the other.
    """
    optimizer = make_optimizer(config)

    def loss_and_gradients(parameters, batch):
        return jax.value_and_grad(lambda p: mean_loss(eqx.combine(p, static), batch))(parameters)

    def device_mean(parameters, batch):
        if config.microbatches == 1:
            total = loss_and_gradients(parameters, batch)
        else:
            pieces = jax.tree.map(lambda x: x.reshape(config.microbatches, -1, *x.shape[1:]), batch)
            zero = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, parameters))
            add = lambda total, piece: (jax.tree.map(jnp.add, total, loss_and_gradients(parameters, piece)), None)
            total = jax.tree.map(lambda x: x / config.microbatches, jax.lax.scan(add, zero, pieces)[0])
        return jax.lax.pmean(total, BATCH)

    mean = over_batch(device_mean, mesh, 1)

    def step(parameters, optimizer_state, batch):
        loss, gradients = mean(parameters, batch)
        updates, optimizer_state = optimizer.update(gradients, optimizer_state, parameters)
        return optax.apply_updates(parameters, updates), optimizer_state, loss, optax.tree.norm(gradients)

    return jax.jit(step, donate_argnums=(0, 1))


def train(
    folder: Path,
    config: RunConfig,
    train_tokens: Path,
    validation_tokens: Path,
    tokenizer: Tokenizer,
    *,
    report: Callable[[str], object] = tqdm.write,
    show_progress: bool = True,
) -> LanguageModel:
    """Train until `config.training.steps`, from the folder's newest checkpoint if it has one.

    A run that was stopped at any moment and is started again with the same config goes on exactly: on one machine and
    number of threads and devices, its metrics (`seconds` aside) and parameters are those of an uninterrupted run, bit
    for bit. On another number of devices it goes on with results that differ by rounding, and says so.

    Args:
      folder: the run folder, made if missing.
      config: the model, how it is trained, and on which corpus.
      train_tokens, validation_tokens: token files that `tokens.tokenize` wrote.
      tokenizer: the one they were written with.
      report: told what happens, a line at a time.
      show_progress: draw a bar with the loss, tokens per second since the first step, and the time left.

    Raises:
      ValueError: if the folder holds a run of another config.
      NotImplementedError: in a launch of several processes.
      FloatingPointError: if loss or gradients stay non-finite for MAX_SKIPPED steps in a row.
      OSError: if the disk is full; the last checkpoint stays usable.
    """
    if jax.process_count() > 1:
        raise NotImplementedError(f"train: one process at a time; got {jax.process_count()}; launch it without others")
    settings = config.training
    state = initial_state(config)
    batches = training_batches(
        train_tokens,
        context=settings.context,
        batch_size=settings.batch_size,
        seed=settings.seed,
        document=tokenizer.document,
    )
    open_run(folder, config, tokenizer)

    first = 0
    mesh = batch_mesh(settings.batch_size // settings.microbatches)
    restored = restore_latest(folder / "checkpoints", state, report=report)
    if restored is not None:
        state, metadata, path = restored
        first = metadata["step"]
        batches.set_state(metadata["batches"])
        report(f"resuming after step {first} from {path}")
        if metadata["devices"] != mesh.size:
            report(f"on {mesh.size} device(s), not the {metadata['devices']} of before: results differ by rounding")
    cut_metrics(folder / "metrics.jsonl", first)

    parameters, static = eqx.partition(state["model"], eqx.is_array)
    parameters, optimizer_state = replicate((parameters, state["optimizer"]), mesh)
    step = make_step(static, settings, mesh)
    learning_rate = learning_rate_schedule(settings)
    started = compiled = time.monotonic()
    skipped_before = int(optimizer_state.total_notfinite)
    bar = tqdm(total=settings.steps, initial=first, unit="step", disable=not show_progress, dynamic_ncols=True)
    with contextlib.closing(batches), open(folder / "metrics.jsonl", "a") as metrics, bar:

        def record(row: dict[str, Any]) -> None:
            row = {name: None if value != value or abs(value) == math.inf else value for name, value in row.items()}
            row["seconds"] = round(time.monotonic() - started, 3)
            with explained(f"train: the metrics of step {row['step']}", folder):
                metrics.write(json.dumps(row, allow_nan=False) + "\n")
                metrics.flush()

        for number in range(first + 1, settings.steps + 1):
            batch = next(batches)
            parameters, optimizer_state, loss, norm = step(parameters, optimizer_state, batch)
            skipped = int(optimizer_state.total_notfinite)
            bytes_per_token = tokenizer.byte_lengths[batch["targets"]].mean()
            bits = float(loss) / math.log(2) / bytes_per_token
            rate = float(jnp.asarray(learning_rate(number - 1 - skipped)))
            record(
                dict(step=number, bits_per_byte=bits, gradient_norm=float(norm), learning_rate=rate, skipped=skipped)
            )
            if number == first + 1:
                compiled = time.monotonic()
            seen = (number - first - 1) * settings.batch_size * settings.context
            speed = seen / max(time.monotonic() - compiled, 1e-9)
            bar.set_postfix_str(f"{bits:.3f} bits/byte, {speed:,.0f} tokens/s", refresh=False)
            bar.update()

            if skipped > skipped_before:
                report(f"step {number}: loss or gradients were not finite; step skipped ({skipped} so far)")
                skipped_before = skipped
            if int(optimizer_state.notfinite_count) >= MAX_SKIPPED:
                raise FloatingPointError(
                    f"train: loss or gradients were not finite for {MAX_SKIPPED} steps in a row, up to step {number}; "
                    f"lower the learning rate (now at most {settings.learning_rate:g}) in a new folder; "
                    f"checkpoints in {folder} are intact"
                )
            last = number == settings.steps
            if last or number % settings.evaluate_every == 0:
                bits = validation_loss(eqx.combine(parameters, static), settings, validation_tokens, tokenizer)
                record(dict(step=number, validation_bits_per_byte=bits))
            if last or number % settings.checkpoint_every == 0:
                state = {"model": eqx.combine(parameters, static), "optimizer": optimizer_state}
                metadata = {"step": number, "batches": batches.get_state(), "devices": mesh.size}
                with explained(f"train: the metrics of step {number}", folder):
                    os.fsync(metrics.fileno())  # a checkpoint never outlives the rows before it
                save_checkpoint(folder / "checkpoints", number, state, metadata)
    return eqx.combine(jax.device_put(parameters, jax.local_devices()[0]), static)
