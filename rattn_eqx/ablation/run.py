"""Ablations: a grid of trials, each trained and tested for several seeds; `rattn ablate`.

A trial's seeds train together as one vmapped program on one device, for as long as a figure needs and no longer: there
are no checkpoints. What is kept is a line of JSON for each seed when its trial is done. A grid that is started again
runs the trials whose lines are missing.
"""

import dataclasses
import functools
import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray
from tqdm import tqdm

from pallas.tools.provenance import facts
from rattn_eqx.ablation.layer import ablate
from rattn_eqx.ablation.rows import SOURCE, append_rows, read_rows, summary
from rattn_eqx.ablation.trial import Trial
from rattn_eqx.data.batches import long_documents
from rattn_eqx.data.corpus import build_corpus
from rattn_eqx.data.tokenizers import ByteTokenizer, tokenize
from rattn_eqx.evaluation.attribution import attribute_task
from rattn_eqx.evaluation.recall import evaluate_task, make_task, require_task_memory
from rattn_eqx.evaluation.text import loss_by_position, switch_off, without_residual
from rattn_eqx.inference.cost import count_parameters, require_memory, training_bytes
from rattn_eqx.model.language_model import LanguageModel
from rattn_eqx.model.map_files import check_map, source_of
from rattn_eqx.training.loop import validation_loss
from rattn_eqx.training.step import build_model, make_optimizer, mean_loss, train_step

POOL = 2**24  # tokens of the task's samples that training draws from, over and over
TEST_SEED = 2**31  # no trial's samples
DISPATCH = 25  # steps in one call of the device


@dataclasses.dataclass(frozen=True)
class Data:
    """What trials read: training tokens, the path of the validation tokens, the training text, and their hash."""

    train: np.ndarray
    validation: Path
    text: bytes
    sha256: str


def load_data(source: str, cache: Path, *, exclude: tuple[Path, ...] = ()) -> Data:
    """The corpus of `rattn pretrain` in bytes, as `corpus.build_corpus` gathers it or finds it under `cache`."""
    corpus = build_corpus(source, cache, exclude=exclude)
    train, validation = tokenize(corpus, ByteTokenizer(), cache)
    text = b"\n".join(corpus.documents("train"))
    return Data(np.load(train, mmap_mode="r"), validation, text, corpus.manifest["sha256"])


def run_grid(
    trials: list[Trial],
    seeds: list[int],
    data: Data | None,
    out: Path,
    *,
    part: tuple[int, int] = (1, 1),
    attribution: bool = False,
    commit: str | None = None,
    report: Callable[[str], object] = tqdm.write,
    show_progress: bool = True,
) -> None:
    """Run every trial whose lines are not in `out` yet, and append them: one for each seed.

    Args:
      part: (i, n) runs the i-th of n equal shares, counted from 1, so that n processes can share a grid and a file.
      attribution: as of `run_trial`; lines that are there already count as done without it too.
      commit: of this code, to be written in the lines; None asks git.
      report: told each trial's result in a line.

    Raises:
      ValueError: two trials of one name, a part out of range, a line of `out` that is no result; before any trial runs,
        what `check_trial` refuses.
    """
    (index, parts), corpus = part, None if data is None else data.sha256
    mine = share(trials, part)
    done = {(_key(row["trial"], row["corpus"]), row["seed"]) for row in read_rows(out)}
    left = [[seed for seed in seeds if (_key(trial.to_json(), corpus), seed) not in done] for trial in mine]
    for trial, missing in zip(mine, left, strict=True):
        if missing:
            check_trial(trial, len(missing), data)
    for number, (trial, missing) in enumerate(zip(mine, left, strict=True)):
        if not missing:
            report(f"{trial.name}: already in {out}")
            continue
        title = f"{number * parts + index}/{len(trials)} {trial.name}"
        rows = run_trial(
            trial, missing, data, attribution=attribution, commit=commit, title=title, show_progress=show_progress
        )
        out.parent.mkdir(parents=True, exist_ok=True)
        append_rows(out, rows)
        report(f"{title}: {summary(rows)}")


def parse_part(text: str) -> tuple[int, int]:
    """(i, n) of "i/n", such as "1/3".

    Raises:
      ValueError: for anything else.
    """
    if not re.fullmatch("[0-9]{1,9}/[0-9]{1,9}", text):
        raise ValueError(f"ablate: --part must be i/n such as 1/3; got {text!r:.80}")
    index, _, parts = text.partition("/")
    return int(index), int(parts)


def share(trials: list[Trial], part: tuple[int, int]) -> list[Trial]:
    """The i-th of n equal shares of a grid, for part (i, n), counted from 1.

    Raises:
      ValueError: two trials of one name, a part out of range.
    """
    names = [trial.name for trial in trials]
    if len(set(names)) < len(names):
        twice = ", ".join(name for name in names if names.count(name) > 1)
        raise ValueError(f"run_grid: names must differ; got {twice:.200}")
    index, parts = part
    if not 1 <= index <= parts:
        raise ValueError(f"run_grid: part must be i/n with 1 <= i <= n; got {index}/{parts}")
    return trials[index - 1 :: parts]


def check_model(trial: Trial, num_seeds: int) -> None:
    """Refuse a trial whose model could not be trained, before its text is read.

    Raises:
      ValueError: departures that the model lacks the parts for, a feature map as `map_files.check_map`, more than the
        machine's memory holds.
    """
    check_map(trial.model.feature_map, trial.model.head_size)
    require_memory(f"ablate: {trial.name}", num_seeds * training_bytes(trial.model, trial.training),
        "give fewer seeds, or a smaller model, batch or context")  # fmt: skip
    lengths = [*trial.test_lengths, trial.training.context]
    require_task_memory(trial.model, lengths, trial.test_samples)
    _shapes(trial)


def check_trial(trial: Trial, num_seeds: int, data: Data | None) -> None:
    """Refuse a trial that could not be run, before any is.

    Raises:
      ValueError: as `check_model`; a task or options that make no samples.
    """
    check_model(trial, num_seeds)
    context, lengths = trial.training.context, trial.test_lengths or (trial.training.context,)
    if data is not None and trial.needs_text and len(data.train) <= context:
        raise ValueError(
            f"ablate: {trial.name} must have a context shorter than the text; got {context} and {len(data.train)} "
            "tokens; give a shorter one or more text"
        )
    model, options = _shapes(trial), task_options(trial, data)
    for length in {*lengths, context}:
        make_task(trial.task, model, ByteTokenizer(), TEST_SEED, 1, length, options)


def run_trial(
    trial: Trial,
    seeds: list[int],
    data: Data | None,
    *,
    implementation: str | None = None,
    attribution: bool = False,
    commit: str | None = None,
    title: str = "",
    show_progress: bool = True,
    on_losses: Callable[[np.ndarray], object] = lambda losses: None,
) -> list[dict[str, Any]]:
    """Train a trial for each seed, all at once, and test each: its lines.

    A seed fixes the initial parameters and the order of texts and samples, which are the same for trials of one context
    and batch: differences between trials can be paired by seed.

    Args:
      data: what text is read; may be None where `task_share` is 1.
      implementation: of the ops.
      attribution: whether to ask, of a model with a residual branch, what each branch contributes:
        `attribution.attribute_task`, and bits per byte with each branch switched off.
      commit: of this code; None asks git.
      on_losses: as of `train_trial`.
    """
    started, about = time.monotonic(), facts(commit)
    title = title or trial.name
    models, losses, skipped = train_trial(
        trial, seeds, data, implementation=implementation, title=title, show_progress=show_progress, on_losses=on_losses
    )
    trained = time.monotonic() - started
    context = trial.training.context
    lengths = list(trial.test_lengths or (context,))
    options = task_options(trial, data)
    tokenizer = ByteTokenizer()
    validation = data.validation if data is not None and trial.task_share < 1 else None
    documents = None if validation is None else long_documents(validation, max(lengths) + 1)
    batch = None
    if attribution and trial.model.residual:
        batch = make_task(trial.task, models, tokenizer, TEST_SEED, trial.test_samples, context, options)

    def bits(model: LanguageModel) -> float | None:
        return None if validation is None else validation_loss(model, trial.training, validation, tokenizer)

    def test(model: LanguageModel, lengths: list[int]) -> dict[str, Any]:
        tests = evaluate_task(
            model, tokenizer, trial.task, lengths, samples=trial.test_samples, seed=TEST_SEED, options=options
        )
        return {"bits_per_byte": bits(model), "tests": [row for _, row in tests]}

    rows = []
    for index, seed in enumerate(seeds):
        model = jax.tree.map(lambda x, i=index: x[i] if eqx.is_array(x) else x, models)
        row = {"name": trial.name, "trial": trial.to_json(), "seed": seed} | test(model, lengths)
        if (source := source_of(trial.model.feature_map)) is not None:
            row[SOURCE] = source
        if trial.model.residual:
            row["without_residual"] = test(without_residual(model), [context])
        if documents is not None:
            by_position = loss_by_position(model, documents, tokenizer)
            row["text"] = {"documents": len(documents), "by_position": by_position}
        if batch is not None:
            row["attribution"] = attribute_task(model, batch)
            row["attribution"]["bits_per_byte"] = {
                "whole": row["bits_per_byte"],
                "window off": bits(switch_off(model, "window")),
                "residual off": row["without_residual"]["bits_per_byte"],
            }
        every = max(1, len(losses) // 50)
        row["losses"] = [[step + 1, round(float(losses[step, index]), 4)] for step in range(0, len(losses), every)]
        row |= {
            "parameters": count_parameters(model),
            "tokens": trial.training.steps * trial.training.batch_size * context,
            "skipped": int(skipped[index]),
            "corpus": data.sha256 if data is not None else None,
            "seconds": round(time.monotonic() - started, 1),
            "training_seconds": round(trained, 1),
        }
        rows.append(row | about)
    return rows


def train_trial(
    trial: Trial,
    seeds: list[int],
    data: Data | None,
    *,
    implementation: str | None = None,
    title: str = "",
    show_progress: bool = True,
    on_losses: Callable[[np.ndarray], object] = lambda losses: None,
) -> tuple[LanguageModel, np.ndarray, np.ndarray]:
    """Train one model for each seed.

    Args:
      on_losses: told the losses of each step and seed, up to `DISPATCH` steps at a time; what it raises ends training.

    Returns:
      A `LanguageModel` whose arrays have an axis of seeds in front, the loss of each step and seed, and the number of
      steps that each seed skipped because its gradients were not finite.
    """
    # The update is linear in the learning rate, which stays outside: a sweep compiles once, where there is a cache.
    config = dataclasses.replace(trial.training, learning_rate=1.0)
    rate = jnp.float32(trial.training.learning_rate)
    make = lambda key: make_model(trial, key=key, implementation=implementation)
    models = eqx.filter_vmap(make)(jax.vmap(jax.random.key)(jnp.asarray(seeds, jnp.uint32)))
    parameters, _ = eqx.partition(models, eqx.is_array)
    optimizer = make_optimizer(config)
    state: Any = jax.vmap(optimizer.init)(parameters)
    sources = _sources(trial, data)
    keys = jax.vmap(lambda seed: jax.random.fold_in(jax.random.key(seed), 7))(jnp.asarray(seeds, jnp.uint32))

    def one_seed(window, number, kept, sources, rate, parameters, state, key):
        batch = _batch(jax.random.fold_in(key, number), sources, trial)
        loss = lambda p, batch: _loss(_with_window(trial, implementation, window, p), trial, batch, kept)
        return train_step(jax.value_and_grad(loss), optimizer, parameters, state, batch, scale=rate)[:3]

    @functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
    def steps(window, carry, numbers, sources, rate, keys):
        def step(carry, number):
            kept = jax.random.uniform(jax.random.fold_in(jax.random.key(0), number), (trial.model.num_layers,))
            one = functools.partial(one_seed, window, number, kept >= trial.window_dropout, sources, rate)
            parameters, state, loss = jax.vmap(one)(carry[0], carry[1], keys)
            return (parameters, state), loss

        return jax.lax.scan(step, carry, numbers)

    windows = trial.windows or (trial.model.window,)
    together = 1 if len(windows) > 1 else DISPATCH
    drawn = np.random.default_rng(0).choice(windows, config.steps)
    carry: Any = (parameters, state)
    losses = []
    bar = tqdm(total=config.steps, unit="step", disable=not show_progress, dynamic_ncols=True, desc=title, leave=False)
    with bar:
        for start in range(0, config.steps, together):
            numbers = jnp.arange(start, min(start + together, config.steps))
            carry, loss = steps(int(drawn[start]), carry, numbers, sources, rate, keys)
            losses.append(np.asarray(loss))
            on_losses(losses[-1])
            bar.set_postfix_str(f"loss {losses[-1][-1].mean():.3f}", refresh=False)
            bar.update(len(numbers))
    parameters, state = carry
    model = _with_window(trial, implementation, trial.model.window, parameters)
    return model, np.concatenate(losses), np.asarray(state.total_notfinite)


def task_options(trial: Trial, data: Data | None) -> dict[str, Any]:
    """The trial's task options, with the training text where its haystack is the corpus."""
    options: dict[str, Any] = dict(trial.task_options)
    if options.get("haystack") == "corpus" and data is not None:
        options["text"] = data.text
    return options


def make_model(trial: Trial, *, key: PRNGKeyArray, implementation: str | None = None) -> LanguageModel:
    """The trial's model as training begins with it."""
    model = build_model(trial.model, trial.training, key=key, implementation=implementation)
    return ablate(model, trial.departures)


def _shapes(trial: Trial, implementation: str | None = None) -> LanguageModel:
    """The trial's model with a `jax.ShapeDtypeStruct` in place of every parameter."""
    make = lambda key: make_model(trial, key=key, implementation=implementation)
    return eqx.filter_eval_shape(make, jax.random.key(0))


def _with_window(trial: Trial, implementation: str | None, window: int, parameters: Any) -> LanguageModel:
    """The model with these parameters and this window, which is part of a model's structure."""
    trial = dataclasses.replace(trial, model=dataclasses.replace(trial.model, window=window))
    shapes = _shapes(trial, implementation)
    arrays, static = eqx.partition(shapes, lambda x: isinstance(x, jax.ShapeDtypeStruct))
    return eqx.combine(jax.tree.unflatten(jax.tree.structure(arrays), jax.tree.leaves(parameters)), static)


def _sources(trial: Trial, data: Data | None) -> tuple[Array, Array, Array]:
    """On the device: training text, the pool's sequences, and where their answers stand."""
    if trial.needs_text and data is None:
        raise ValueError(
            f"Trial {trial.name}: task_share={trial.task_share} with task_options={trial.task_options} needs a text; "
            "got none; give data"
        )
    context = trial.training.context
    text = np.zeros(context + 1, np.uint16) if data is None else data.train
    sequences, answers = np.zeros((1, context + 1), np.uint16), np.zeros((1, context), bool)
    if trial.task_sequences:
        needed = trial.task_sequences * trial.training.steps
        count = min(max(1, POOL // context), needed)
        drawn = make_task(trial.task, _shapes(trial), ByteTokenizer(), 0, count, context, task_options(trial, data))
        sequences = np.concatenate([drawn.tokens, drawn.targets[:, -1:]], axis=1).astype(np.uint16)
        answers = drawn.scored
    return jnp.asarray(text), jnp.asarray(sequences), jnp.asarray(answers)


def _batch(
    key: PRNGKeyArray, sources: tuple[Array, Array, Array], trial: Trial
) -> tuple[Int[Array, "batch length"], Bool[Array, "batch t"]]:
    """Sequences of context + 1 tokens, samples of the task first, and where the samples' answers stand."""
    text, pool, answers = sources
    text_key, pool_key = jax.random.split(key)
    context, num_tasks = trial.training.context, trial.task_sequences
    num_texts = trial.training.batch_size - num_tasks
    chosen = jax.random.randint(pool_key, (num_tasks,), 0, pool.shape[0])
    starts = jax.random.randint(text_key, (num_texts,), 0, text.shape[0] - context)
    cut = jax.vmap(lambda start: jax.lax.dynamic_slice(text, (start,), (context + 1,)))
    sequences = jnp.concatenate([pool[chosen], cut(starts)]).astype(jnp.int32)
    return sequences, jnp.concatenate([answers[chosen], jnp.zeros((num_texts, context), bool)])


def _loss(model: LanguageModel, trial: Trial, batch, kept: Bool[Array, "layers"]) -> Float[Array, ""]:
    if trial.window_dropout:
        local = [i for i, kind in enumerate(trial.model.layer_kinds) if kind == "local"]
        where = lambda model: [model.blocks[i].attention.swa_gain for i in local]
        gains = [gain * kept[i] for i, gain in zip(local, where(model), strict=True)]
        model = eqx.tree_at(where, model, gains)
    sequences, answers = batch
    tokens, targets = sequences[:, :-1], sequences[:, 1:]
    segment_ids = jnp.cumsum(tokens == ByteTokenizer().document, axis=-1)
    is_text = jnp.broadcast_to(jnp.arange(len(tokens))[:, None] >= trial.task_sequences, targets.shape)
    scored = () if trial.task_loss == "all" else (is_text, answers)
    return mean_loss(model, dict(tokens=tokens, targets=targets, segment_ids=segment_ids), scored)


def _key(trial: dict[str, Any], corpus: str | None) -> str:
    return json.dumps([trial, corpus], sort_keys=True)
