"""From a pretrained model to a converted one and what it lost: what `rattn convert` does."""

import dataclasses
import math
import time
from pathlib import Path
from typing import Any

import numpy as np

from pallas.tools.provenance import facts
from rattn_eqx.conversion import verdict
from rattn_eqx.conversion.student import student, student_config
from rattn_eqx.conversion.transfer import transfer
from rattn_eqx.data import files
from rattn_eqx.data.batches import long_documents
from rattn_eqx.data.corpus import build_corpus, describe
from rattn_eqx.data.tokenizers import Tokenizer, tokenize
from rattn_eqx.evaluation.text import switch_off
from rattn_eqx.figures import conversion, curves
from rattn_eqx.inference.cost import count_parameters
from rattn_eqx.model.config import LayerKind
from rattn_eqx.model.language_model import LanguageModel
from rattn_eqx.training.config import Objective, RunConfig, TrainConfig
from rattn_eqx.training.loop import train
from rattn_eqx.training.run_folder import as_json, digest, read_metrics
from rattn_eqx.weights import own
from rattn_eqx.weights.load import load_with_tokenizer

ABOUT, MODEL, RESULTS = "conversion.json", "model", "results.json"  # of a conversion, in its folder
OLD, IMPOSED = "the model as it was", "its window imposed"
TRANSFERRED, CONVERTED, WITHOUT = "after the transfer", "converted", "converted, residual branch off"


def convert(
    folder: Path,
    source: Path | str,
    *,
    pattern: tuple[LayerKind, ...],
    window: int,
    transferring: TrainConfig,
    training: TrainConfig | None,
    objective: Objective | None = None,
    residual: bool = True,
    sinks: bool = True,
    corpus: str,
    cache: Path,
    num_texts: int = 8,
    text_length: int = 1024,
    show_progress: bool = True,
) -> dict[str, Any]:
    """Convert a model, and leave in the folder the converted one (`MODEL`, which every command reads) and results.

    First each local layer learns by itself (`transfer`), then, if asked for, the whole model is trained on the text.
    Called again with the same arguments it continues where it was stopped.

    Args:
      folder: of the conversion: transfer/, training/, a plot of each, model/ and results.json.
      source: of the model: as `load`.
      pattern, window, residual, sinks: as `student_config`.
      transferring: as `transfer`'s settings.
      training: as `train`; None: no training after the transfer.
      objective: of that training; its teacher is filled in.
      corpus, cache: of the text, as in `pretrain`; its held-out part is what losses are measured on.
      num_texts, text_length: held-out texts, and tokens of each, that losses are measured on.

    Raises:
      ValueError: before the work, for what `load` and `student_config` refuse, a model without a tokenizer, and
        held-out texts that are all shorter than text_length; and as `transfer` and `train`.

    Returns:
      The content of results.json: nats per token within and beyond the window's length, and facts found, by model.
    """
    started = time.monotonic()
    if not window < text_length:
        raise ValueError(f"convert: texts must be longer than the window; got {text_length} tokens and window={window}")
    if (folder / "config.json").exists():
        raise ValueError(f"convert: --out must be a folder of its own; {folder} holds a model; give another")
    with files.lock(folder, f"convert: {folder}"), files.lock(cache, f"convert: {cache}", shared=True):
        files.remove_unfinished(folder)
        teacher, tokenizer = load_with_tokenizer(source, "float32", compute_dtype=transferring.compute_dtype)
        config = student_config(teacher.config, pattern, window, residual=residual, sinks=sinks)
        model, start = student(teacher, config), digest(teacher)
        if objective is not None:
            objective = dataclasses.replace(objective, teacher=start if objective.distillation else None)
        verdict.check_prompts(tokenizer)
        about = as_json({"source": str(source), "model": start, "config": dataclasses.asdict(config),
            "transfer": dataclasses.asdict(transferring),
            "training": None if training is None else dataclasses.asdict(training),
            "objective": None if objective is None else dataclasses.asdict(objective)})  # fmt: skip
        _check(folder, about)  # before the text is read
        text = build_corpus(corpus, cache, exclude=(folder,))
        print(describe(text.manifest))
        train_tokens, held_out = tokenize(text, tokenizer, cache)
        texts = long_documents(held_out, text_length + 1, document=tokenizer.document)[:num_texts]
        if not len(texts):
            raise ValueError(
                f"convert: a held-out text must have {text_length} tokens; none of {corpus} has; give more or longer "
                "text, or a smaller --text-length"
            )
        about["corpus"] = text.manifest["sha256"]
        _open(folder, about)
        kinds = config.layer_kinds
        print(
            f"model       {count_parameters(config):,} parameters, {kinds.count('local')} of {len(kinds)} layers "
            f"local, window {window}"
        )
        stages = {OLD: teacher, IMPOSED: verdict.window_imposed(model)}
        if residual or sinks:  # else a layer has nothing of its own to learn
            print(
                f"transfer    {transferring.steps:,} steps of {transferring.batch_size} x {transferring.context} tokens"
            )
            options: dict[str, Any] = dict(show_progress=show_progress)
            model = transfer(folder / "transfer", model, transferring, train_tokens, tokenizer, **options)
            curves.save(conversion.lost_shares(read_metrics(folder / "transfer")), folder / "transfer.png")
        if training is not None:
            stages[TRANSFERRED] = model
            run = RunConfig(config, training, text.manifest["sha256"], digest(model), objective)
            old = teacher if objective is not None and objective.distillation else None
            print(f"training    {training.steps:,} steps of {training.batch_size} x {training.context} tokens")
            options = dict(start=model, teacher=old, show_progress=show_progress)
            model = train(folder / "training", run, train_tokens, held_out, tokenizer, **options)
            rows = {folder.name: read_metrics(folder / "training")}
            curves.save(curves.loss_curves(rows), folder / "training.png")
        stages |= {CONVERTED: model, WITHOUT: switch_off(model, "residual")}
        if not (folder / MODEL).exists():  # else it is this one: `_open` saw to that
            own.save(model, folder / MODEL, tokenizer=tokenizer, origin={"converted": about})
        results = _results(stages, texts, tokenizer, window)
        files.write_json(folder / RESULTS, results | {"about": about, "run": facts(None)})
        print(table(results))
        print(f"converted model {folder / MODEL}, {time.monotonic() - started:.0f} s in all")
        return results


def _open(folder: Path, about: dict[str, Any]) -> None:
    """Begin a conversion, or check that the folder holds the one of these arguments."""
    _check(folder, about)
    if not (folder / ABOUT).exists():
        files.write_json(folder / ABOUT, about)


def _check(folder: Path, about: dict[str, Any]) -> None:
    """Refuse a folder that holds another conversion, as far as these arguments tell."""
    path = folder / ABOUT
    if not path.exists():
        if left := [name for name in ("transfer", "training", MODEL) if (folder / name).exists()]:
            raise ValueError(f"convert: {folder} has {left[0]} but no {ABOUT}, which says of what; give another --out")
        return
    held = files.read_json(path)
    different = [name for name in about if not isinstance(held, dict) or held.get(name) != about[name]]
    if different:
        raise ValueError(
            f"convert: {folder} holds a conversion that differs in {', '.join(different)}; give another --out, or the "
            "arguments that it was started with"
        )


def _results(stages: dict[str, LanguageModel], texts: np.ndarray, tokenizer: Tokenizer, window: int) -> dict[str, Any]:
    rows = {}
    for loss in verdict.losses(stages, texts, window):
        found = verdict.facts_found(stages[loss.name], tokenizer)
        within, beyond = (x if math.isfinite(x) else None for x in (loss.within, loss.beyond))
        rows[loss.name] = {"within": within, "beyond": beyond, "facts": sum(found), "of_facts": len(found)}
    old, imposed, converted = (rows[name]["beyond"] for name in (OLD, IMPOSED, CONVERTED))
    known = None not in (old, imposed, converted) and imposed > old
    won = (imposed - converted) / (imposed - old) if known else None
    return {"window": window, "texts": list(texts[:, 1:].shape), "models": rows, "won_back": won}


def table(results: dict[str, Any]) -> str:
    """Results in words."""
    window, (count, length) = results["window"], results["texts"]
    lines = [f"nats per token on {count} held-out texts of {length:,} tokens, lower is better; facts told early in "
        "300 tokens and found at their end",
        f"  {'':<34}{f'first {window}':>10}{'after':>10}{'facts':>8}"]  # fmt: skip
    for name, row in results["models"].items():
        told = f"{row['facts']} of {row['of_facts']}"
        losses = [f"{'not finite' if x is None else f'{x:.3f}':>10}" for x in (row["within"], row["beyond"])]
        lines.append(f"  {name:<34}{''.join(losses)}{told:>8}")
    if results["won_back"] is not None:
        lines.append(f"of what the window costs after its first {window} tokens, {results['won_back']:.0%} is won back")
    return "\n".join(lines)


def settings(steps: int, **options: Any) -> TrainConfig:
    """How a stage is trained, with a warm-up of a twentieth."""
    return TrainConfig(steps=steps, warmup_steps=steps // 20, **options)
