"""The training loop."""

import contextlib
import functools
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from tqdm import tqdm

from rattn_eqx.data.batches import training_batches, validation_batches
from rattn_eqx.data.files import lock, remove_unfinished
from rattn_eqx.data.tokenizers import Tokenizer, load_tokenizer
from rattn_eqx.evaluation.text import evaluate
from rattn_eqx.model.language_model import LanguageModel
from rattn_eqx.model.sharding import batch_mesh, replicate
from rattn_eqx.training.checkpoint import (
    CheckpointError,
    claimed_metadata,
    explained,
    prune,
    restore_latest,
    save_checkpoint,
)
from rattn_eqx.training.config import Objective, RunConfig, TrainConfig
from rattn_eqx.training.objective import Aim
from rattn_eqx.training.run_folder import (
    Metrics,
    digest,
    identity,
    load_config,
    metrics_obstacle,
    of_another_run,
    open_run,
)
from rattn_eqx.training.step import build_model, learning_rate_schedule, make_optimizer, make_step

MAX_SKIPPED = 10  # steps in a row whose gradients are not finite, before the run stops


def initial_state(config: RunConfig, model: LanguageModel | None = None) -> dict[str, Any]:
    """The model and the optimiser state that a run begins with; what a checkpoint holds. model: None is drawn."""
    if model is None:
        model = build_model(config.model, config.training, key=jax.random.key(config.training.seed))
    else:  # as the config computes; and copied, since steps take over their arrays
        make = lambda key: build_model(config.model, config.training, key=key)
        like = eqx.filter_eval_shape(make, jax.random.key(config.training.seed))
        copies = [jnp.copy(x) if eqx.is_array(x) else x for x in jax.tree.leaves(model)]
        model = jax.tree.unflatten(jax.tree.structure(like), copies)
    return {"model": model, "optimizer": make_optimizer(config.training).init(eqx.filter(model, eqx.is_array))}


def load_model(folder: Path, *, report: Callable[[str], object] = print) -> tuple[LanguageModel, Tokenizer, RunConfig]:
    """The model of a run's newest checkpoint, its tokenizer and its config. The run may be training.

    Args:
      report: called with one sentence for every checkpoint that is passed over.

    Raises:
      ValueError: if the folder is no run, has no checkpoint yet, or none that is sound and of this run.
    """
    config, tokenizer = load_config(folder), load_tokenizer(folder / "tokenizer.json")
    if config.model.vocabulary_size != tokenizer.vocabulary_size:
        raise ValueError(
            f"load_model: {folder} has a model of {config.model.vocabulary_size} tokens in config.json and "
            f"{tokenizer.vocabulary_size} in tokenizer.json; put back the run's own"
        )
    run = identity(config, tokenizer)
    obstacle = lambda metadata: of_another_run(metadata, run) if "run" in metadata else None
    claims = {path: obstacle(metadata) for path, metadata in claimed_metadata(folder / "checkpoints").items()}
    if claims and None not in claims.values():  # else a config of a million layers would first be traced
        path, reason = next(iter(claims.items()))
        raise CheckpointError(
            f"load_model: {folder} has no checkpoint of its own; of {path}: {reason}; put back its files"
        )
    like = eqx.filter_eval_shape(initial_state, config)
    restored = restore_latest(folder / "checkpoints", like, report=report, obstacle=obstacle)
    if restored is None:
        raise ValueError(f"load_model: {folder} has no checkpoint yet; let `rattn pretrain` reach its first one")
    state, metadata, path = restored
    if "run" not in metadata:
        report(
            f"checkpoint {path} does not say which run it belongs to, as older versions wrote it: taken as this one's"
        )
    return state["model"], tokenizer, config


def batches_of(tokens: Path, settings: TrainConfig, tokenizer: Tokenizer) -> Any:
    """The `training_batches` of a run."""
    return training_batches(
        tokens,
        context=settings.context,
        batch_size=settings.batch_size,
        seed=settings.seed,
        document=tokenizer.document,
    )


def checkpoints_of(function: str, folder: Path) -> Path:
    """Where a run's checkpoints are; a ValueError for what is no folder of its own."""
    path = folder / "checkpoints"
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        raise ValueError(f"{function}: {path} must be a folder and no link; remove it, or give its place as --out")
    return path


def validation_loss(model: LanguageModel, config: TrainConfig, validation_tokens: Path, tokenizer: Tokenizer) -> float:
    """Bits per byte on the first `config.evaluation_tokens` validation tokens."""
    batches = validation_batches(
        validation_tokens,
        context=config.context,
        batch_size=config.batch_size,
        document=tokenizer.document,
        padding=tokenizer.padding,
        max_tokens=config.evaluation_tokens,
    )
    return evaluate(model, batches, tokenizer)


def train(
    folder: Path,
    config: RunConfig,
    train_tokens: Path,
    validation_tokens: Path,
    tokenizer: Tokenizer,
    *,
    start: LanguageModel | None = None,
    teacher: LanguageModel | None = None,
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
      train_tokens, validation_tokens: token files that `tokenizers.tokenize` wrote.
      tokenizer: the one they were written with.
      start: the model to begin with, float32, whose `run_folder.digest` is config.start; None: drawn from the seed.
      teacher: the model that an objective distils from, whose digest is config.objective.teacher.
      report: told what happens, a line at a time.
      show_progress: draw a bar with the loss, tokens per second since the first step, and the time left.

    Raises:
      ValueError: if the folder holds a run of another config, or nothing but damaged or foreign checkpoints; and as
        `objective.Aim`.
      LockedError: if another process trains in the folder.
      NotImplementedError: in a launch of several processes.
      FloatingPointError: if loss or gradients stay non-finite for MAX_SKIPPED steps in a row.
      OSError: if the disk is full; the last checkpoint stays usable.
    """
    if (None if start is None else digest(start)) != config.start:
        raise ValueError(
            "train: start must be the model whose digest is config.start; got "
            f"{'none' if start is None else 'another'}; give config.start=run_folder.digest(start)"
        )
    if start is not None and start.config != config.model:
        raise ValueError(
            "train: start must have the config of config.model; got another; give config.model=start.config"
        )
    if jax.process_count() > 1:
        raise NotImplementedError(f"train: one process at a time; got {jax.process_count()}; launch it without others")
    with lock(folder, f"train: {folder}"):
        return _train(folder, config, train_tokens, validation_tokens, tokenizer, start, teacher, report, show_progress)


def _train(
    folder: Path,
    config: RunConfig,
    train_tokens: Path,
    validation_tokens: Path,
    tokenizer: Tokenizer,
    start: LanguageModel | None,
    teacher: LanguageModel | None,
    report: Callable[[str], object],
    show_progress: bool,
) -> LanguageModel:
    """`train`, by the one process that holds the folder's lock."""
    settings = config.training
    batches = batches_of(train_tokens, settings, tokenizer)
    open_run(folder, config, tokenizer)
    checkpoints = checkpoints_of("train", folder)
    remove_unfinished(folder)
    state = initial_state(config, start)
    aim = Aim(config.objective or Objective(), state["model"], teacher, settings.seed, settings.steps)

    first = kept = 0
    mesh = batch_mesh(settings.batch_size // settings.microbatches)
    run = identity(config, tokenizer)
    at_start = batches.get_state()

    def obstacle(metadata: dict[str, Any]) -> str | None:
        if reason := of_another_run(metadata, run) or metrics_obstacle(folder / "metrics.jsonl", metadata):
            return reason
        match metadata:
            case {"step": int(step), "devices": int(), "batches": place} if place == dict.fromkeys(at_start, step):
                return None
        return "its metadata must hold step, devices and the place in the batches"

    restored = restore_latest(checkpoints, state, report=report, obstacle=obstacle)
    if restored is not None:
        state, metadata, path = restored
        first, kept = int(metadata["step"]), metadata["metrics"]["rows"]
        batches.set_state(dict.fromkeys(at_start, first))
        prune(path)
        report(f"resuming after step {first} from {path}")
        if metadata["devices"] != mesh.size:
            report(f"on {mesh.size} device(s), not the {metadata['devices']} of before: results differ by rounding")

    parameters, static = eqx.partition(state["model"], eqx.is_array)
    parameters, optimizer_state = replicate((parameters, state["optimizer"]), mesh)
    teacher_arrays = replicate(aim.teacher, mesh)

    @functools.cache
    def step_of(window: int | None) -> Callable:
        return make_step(static, settings, mesh, functools.partial(aim.loss, window=window))

    learning_rate = learning_rate_schedule(settings)
    started = compiled = time.monotonic()
    skipped_before = int(optimizer_state.total_notfinite)
    bar = tqdm(total=settings.steps, initial=first, unit="step", disable=not show_progress, dynamic_ncols=True)
    metrics = Metrics(folder / "metrics.jsonl", kept)
    with contextlib.closing(batches), contextlib.closing(metrics), bar:

        def record(row: dict[str, Any]) -> None:
            row = {name: None if value != value or abs(value) == math.inf else value for name, value in row.items()}
            row["seconds"] = round(time.monotonic() - started, 3)
            with explained(f"train: the metrics of step {row['step']}", folder):
                metrics.add(row)

        for number in range(first + 1, settings.steps + 1):
            batch = next(batches)
            step, silent = step_of(aim.window(number)), aim.silent(number)
            parameters, optimizer_state, loss, norm = step(parameters, optimizer_state, batch, teacher_arrays, silent)
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
                with explained(f"train: the metrics of step {number}", folder):
                    rows = metrics.state()
                place = {"step": number, "batches": batches.get_state(), "devices": mesh.size}
                save_checkpoint(checkpoints, number, state, place | {"metrics": rows, "run": run})
    return eqx.combine(jax.device_put(parameters, jax.local_devices()[0]), static)
