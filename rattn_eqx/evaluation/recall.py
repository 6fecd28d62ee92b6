"""How well a model solves recall tasks, by the length of the sample and the distance of the evidence."""

import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Int32, TypeCheckError

from pallas.checked import checked
from rattn_eqx.data.pretrained_tokenizer import PretrainedTokenizer
from rattn_eqx.data.tokenizers import ByteTokenizer, Tokenizer
from rattn_eqx.inference.cost import require_memory
from rattn_eqx.model.config import ModelConfig
from rattn_eqx.model.language_model import MAX_LOGITS, LanguageModel, map_logits
from rattn_eqx.tasks.recall import RecallBatch, RecallScore, bigrams, mqar, score, share_beyond
from rattn_eqx.tasks.recall_text import common_words, frequent_words, needle, variables

MOST_SYMBOLS = 2**15  # that a task takes

tasks: Mapping[str, Callable[..., RecallBatch]] = {
    "mqar": mqar,
    "bigrams": bigrams,
    "needle": needle,
    "variables": variables,
    "common_words": common_words,
    "frequent_words": frequent_words,
}


@checked
def make_task(
    name: str, model: LanguageModel, tokenizer: Tokenizer, seed: int, n: int, length: int, options: dict[str, Any]
) -> RecallBatch:
    """A batch of a task that a model can read: `tasks[name]`, with what the model fixes filled in.

    That is `vocabulary_size`, the model's without its two special tokens (with them, of a checkpoint's tokenizer),
    where the task has tokens of its own, and `window`, the model's, where the task asks for one; `options` has
    precedence.

    Raises:
      ValueError: no such task or option, an option's value of the wrong kind, a task in bytes for a run without the
        byte tokenizer, a task with more token ids than the model has, or what the task itself refuses.
    """
    if name not in tasks:
        raise ValueError(f"evaluate: no task {name!r}; the tasks are {', '.join(tasks)}")
    known = [p.name for p in inspect.signature(tasks[name]).parameters.values() if p.kind is p.KEYWORD_ONLY]
    if unknown := [option for option in options if option not in known]:
        raise ValueError(f"evaluate: {name} has no option {', '.join(unknown)}; its options are {', '.join(known)}")
    in_bytes = name == "needle" or ("level" in known and options.get("level", "byte") == "byte")
    if in_bytes and not isinstance(tokenizer, ByteTokenizer):
        level = ", or give the option level=token" if "level" in known else ""
        raise ValueError(
            f"evaluate: {name} is written in bytes and needs the byte tokenizer; got a run with another, of "
            f"{tokenizer.vocabulary_size} tokens; evaluate a run of `rattn pretrain --tokenizer byte`{level}"
        )
    # A checkpoint's special tokens may stand anywhere: there, all ids are symbols.
    symbols = tokenizer.vocabulary_size if isinstance(tokenizer, PretrainedTokenizer) else tokenizer.document
    fixed = {"vocabulary_size": min(symbols, MOST_SYMBOLS), "window": max(1, model.config.window)}
    try:
        batch = tasks[name](seed, n, length, **{key: fixed[key] for key in fixed if key in known} | options)
    except TypeCheckError as error:
        given = ", ".join(f"{key}={value!r}" for key, value in options.items())
        raise ValueError(f"evaluate: {name} takes no option of such a kind; got {given}; see help() of it") from error
    limit = model.config.vocabulary_size if in_bytes else symbols
    if batch.vocabulary_size > limit:
        raise ValueError(
            f"evaluate: {name} must fit in the run's token ids; got a task of {batch.vocabulary_size} ids and a run "
            f"with {limit}, its special tokens left out; give fewer symbols or a smaller vocabulary_size"
        )
    return batch


@checked
def predict(
    model: LanguageModel, tokens: Int32[np.ndarray, "n t"], *, max_logits: int = MAX_LOGITS
) -> Int32[np.ndarray, "n t"]:
    """The likeliest token after each position, a few samples at a time.

    So many samples are computed together that their logits are at most `max_logits` numbers (256 MiB of them by
    default), or one sample where it alone has more, whose logits are formed by blocks.
    The last piece is filled up, so that the model is compiled once.
    """
    n, length = tokens.shape
    size = min(n, max(1, max_logits // (length * model.config.vocabulary_size)))
    predictions = np.empty((n, length), np.int32)
    for start in range(0, n, size):
        piece = tokens[start : start + size]
        filled = np.concatenate([piece, np.repeat(piece[-1:], size - len(piece), axis=0)])
        predictions[start : start + size] = np.asarray(_likeliest(model, jnp.asarray(filled)))[: len(piece)]
    return predictions


@eqx.filter_jit
def _likeliest(model: LanguageModel, tokens: Int[Array, "batch t"]) -> Int[Array, "batch t"]:
    likeliest = lambda logits: jnp.argmax(logits, axis=-1).astype(jnp.int32)
    return map_logits(likeliest, model, tokens, jnp.zeros_like(tokens))


def evaluate_task(
    model: LanguageModel,
    tokenizer: Tokenizer,
    name: str,
    lengths: list[int],
    *,
    samples: int,
    seed: int,
    options: dict[str, Any],
) -> Iterator[tuple[RecallScore, dict[str, Any]]]:
    """A score for each length, and the same as a row for a line of JSON.

    The row also says which share of the scored positions has its evidence beyond the model's window, and beyond
    the reach of all its local layers' windows one on another; None for both where no layer is local.

    Raises:
      ValueError: as `make_task`, at the call for every length, before anything is computed; and for more than the
        machine's memory holds.
    """
    require_task_memory(model.config, lengths, samples)
    batches = [make_task(name, model, tokenizer, seed, samples, length, options) for length in lengths]

    def scored() -> Iterator[tuple[RecallScore, dict[str, Any]]]:
        window, num_local = model.config.window, model.config.layer_kinds.count("local")
        for batch, length in zip(batches, lengths, strict=True):
            result = score(batch, predict(model, batch.tokens))
            shown = {
                key: f"{len(value)} bytes" if isinstance(value, bytes) else value for key, value in options.items()
            }
            row = {"task": name, "length": length, "samples": samples, "seed": seed, "options": shown}
            row |= {"chance": result.chance, "accuracy": result.accuracy, "exact": result.exact}
            row |= {"positions": result.positions, "answers": result.answers, "window": window if num_local else None}
            for key, reach in (("beyond_window", window), ("beyond_layers", window * num_local)):
                row[key] = share_beyond(batch, reach) if num_local else None
            row["by_distance"] = [[b.low, b.high, b.positions, b.accuracy] for b in result.bins]
            yield result, row

    return scored()


def require_task_memory(config: ModelConfig, lengths: Sequence[int], samples: int) -> None:
    """Refuse tests that this machine cannot hold, before memory is taken.

    Raises:
      ValueError: the samples of all lengths, and the activations and logits of the longest one, are more than it has.
    """
    longest = max(lengths, default=0)
    held = 20 * samples * sum(lengths)  # ids, targets and distances, and the whole sample in int64
    held += 4 * min(longest * config.vocabulary_size, MAX_LOGITS) + 4 * longest * config.model_width
    require_memory(f"evaluate: {samples} samples of length {longest}", held, "give fewer or shorter ones")


def parse_lengths(text: str) -> list[int]:
    """Lengths such as "512,1k,2k" in tokens; k stands for 1,024.

    Raises:
      ValueError: for anything else, and for a length of 0 or of 2**31 and more.
    """
    lengths = []
    for part in text.split(","):
        found = re.fullmatch("([0-9]{1,10})([kK]?)", part)
        lengths.append(int(found[1]) * (1024 if found[2] else 1) if found else 0)
        if not 1 <= lengths[-1] < 2**31:
            raise ValueError(
                f"evaluate: lengths must be numbers above 0 such as 512,1k,2k; got {part!r:.80} in {text!r:.80}; "
                "each is below 2**31"
            )
    return lengths


def parse_options(pairs: list[str]) -> dict[str, int | str]:
    """Options such as ["num_pairs=8", "key=hex"]; a whole number becomes an int.

    Raises:
      ValueError: for anything without a name and a value, and for a number beyond 64 bits.
    """
    options: dict[str, int | str] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not (name and equals and value):
            raise ValueError(f"evaluate: an option must be NAME=VALUE such as num_pairs=8; got {pair!r:.80}")
        number = re.fullmatch("-?[0-9]+", value)
        if number and not (len(value) < 21 and -(2**63) <= int(value) < 2**63):
            raise ValueError(f"evaluate: a number must be of at most 64 bits; got {pair!r:.80}")
        options[name] = int(value) if number else value
    return options
