"""From a corpus to a finished run folder: what `rattn pretrain` does."""

import dataclasses
import math
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from rattn_eqx.data import files
from rattn_eqx.data.byte_models import gzip_bits_per_byte, interpolated_bits_per_byte
from rattn_eqx.data.corpus import build_corpus, describe
from rattn_eqx.data.tokenizers import BYTE_VOCABULARY, BPETokenizer, ByteTokenizer, Tokenizer, tokenize
from rattn_eqx.evaluation.text import without_residual
from rattn_eqx.figures import curves
from rattn_eqx.inference.cost import count_parameters, require_memory, training_bytes
from rattn_eqx.inference.text import generate_text
from rattn_eqx.model.config import ModelConfig
from rattn_eqx.model.map_files import check_map
from rattn_eqx.training.config import RunConfig, TrainConfig
from rattn_eqx.training.loop import train, validation_loss
from rattn_eqx.training.run_folder import check_folder, read_metrics

RESULTS, PLOT, SAMPLE = "results.json", "loss.png", "sample.txt"  # of a finished run, in its folder


def pretrain(
    folder: Path,
    model: ModelConfig,
    training: TrainConfig,
    *,
    corpus: str,
    cache: Path,
    bpe_vocabulary: int | None = None,
    prompt: str = "def ",
    sample_tokens: int = 200,
    show_progress: bool = True,
) -> dict[str, Any]:
    """Gather text, train a model on it, and leave results, a plot and a sample in the run folder.

    Called again with the same arguments it continues where it was stopped.

    Args:
      folder: of the run.
      model: its vocabulary is replaced by the tokenizer's.
      training: how long and how.
      corpus: "python", "environment" or a path: see `corpus.build_corpus`.
      cache: where corpora and token files are kept between runs.
      bpe_vocabulary: tokens of a BPE vocabulary trained on the corpus; None for bytes.
      prompt, sample_tokens: of the sample.

    Raises:
      ValueError: before the work, a sample_tokens below 0, a prompt that is not UTF-8, more than the machine's memory
        holds, a folder where a result is to be written; and as `build_corpus` and `train`.
      FloatingPointError, OSError: as `build_corpus` and `train`; LockedError while another process has the folder.

    Returns:
      The content of results.json: bits per byte of the model, of the model without its residual branch, and of what
      it is to beat, all on the same bytes.
    """
    _check(folder, model, training, bpe_vocabulary, prompt, sample_tokens)
    started = time.monotonic()
    with files.lock(folder, f"pretrain: {folder}"), files.lock(cache, f"pretrain: {cache}", shared=True):
        text = build_corpus(corpus, cache, exclude=(folder,))
        print(describe(text.manifest))
        tokenizer = ByteTokenizer() if bpe_vocabulary is None else BPETokenizer.train(text, bpe_vocabulary)
        train_tokens, validation_tokens = tokenize(text, tokenizer, cache)
        in_bytes = isinstance(tokenizer, ByteTokenizer)  # else found, and held against their digests, twice
        byte_path = train_tokens if in_bytes else tokenize(text, ByteTokenizer(), cache)[0]
        model = dataclasses.replace(model, vocabulary_size=tokenizer.vocabulary_size)
        config = RunConfig(model, training, text.manifest["sha256"])

        held_out = np.load(validation_tokens, mmap_mode="r")[: training.evaluation_tokens + 1]
        held_out_bytes = as_bytes(held_out, tokenizer)
        num_bytes = int(np.count_nonzero(held_out_bytes < ByteTokenizer().document))
        to_beat = {
            "order-3 byte model": interpolated_bits_per_byte(np.load(byte_path, mmap_mode="r"), held_out_bytes),
            "gzip -9": gzip_bits_per_byte(held_out_bytes),
        }
        print(
            f"model       {count_parameters(model):,} parameters, window {model.window}, context {training.context}, "
            f"residual branch {'on' if model.residual else 'absent'}\n"
            f"training    {training.steps:,} steps of {training.batch_size} x {training.context} tokens on "
            f"{jax.local_device_count()} {jax.devices()[0].platform} device(s)\n"
            f"to beat     {', '.join(f'{name} {bits:.3f}' for name, bits in to_beat.items())} bits per byte, "
            f"on the first {num_bytes:,} validation bytes"
        )

        trained = train(folder, config, train_tokens, validation_tokens, tokenizer, show_progress=show_progress)

        rows = read_metrics(folder)
        bits = {
            "this model": [row for row in rows if "validation_bits_per_byte" in row][-1]["validation_bits_per_byte"]
        }
        if model.residual:
            without = without_residual(trained)
            bits["this model, residual branch off"] = validation_loss(without, training, validation_tokens, tokenizer)
        bits = {name: value if value is not None and math.isfinite(value) else None for name, value in bits.items()}
        bits |= to_beat
        results = {"bits_per_byte": bits, "validation_bytes": num_bytes, "parameters": count_parameters(model)}
        files.write_json(folder / RESULTS, results)
        curves.save(curves.loss_curves({folder.name: rows}, to_beat), folder / PLOT)

        key = jax.random.key(training.seed)
        sample = prompt + "".join(generate_text(trained, tokenizer, prompt, num_tokens=sample_tokens, key=key))
        files.write_text(folder / SAMPLE, sample + "\n")

        print(f"\nsample, after the prompt {prompt!r}:\n\n{sample}\n")
        print(f"bits per byte on the same {num_bytes:,} validation bytes, lower is better")
        print("\n".join(f"  {name:<34}{'not finite' if x is None else f'{x:.3f}'}" for name, x in bits.items()))
        print(f"run folder {folder}, {time.monotonic() - started:.0f} s in all")
        return results


def _check(
    folder: Path,
    model: ModelConfig,
    training: TrainConfig,
    bpe_vocabulary: int | None,
    prompt: str,
    sample_tokens: int,
) -> None:
    """Refuse what would fail after the work."""
    if sample_tokens < 0:
        raise ValueError(f"pretrain: sample_tokens must be at least 0; got {sample_tokens}")
    try:
        prompt.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"pretrain: the prompt must be UTF-8 text; got {prompt!r:.80}") from error
    for name in (RESULTS, PLOT, SAMPLE):
        if (folder / name).is_dir():
            raise ValueError(
                f"pretrain: {folder / name} must be a file; it is a folder; remove it or give another --out"
            )
    check_map(model.feature_map, model.head_size)
    sized = dataclasses.replace(model, vocabulary_size=bpe_vocabulary or BYTE_VOCABULARY)
    check_folder(folder, sized, training)
    what = f"pretrain: a batch of {training.batch_size} x {training.context} tokens and a model of width "
    require_memory(f"{what}{model.model_width}", training_bytes(sized, training),
        "give a smaller one, or more microbatches")  # fmt: skip


def as_bytes(tokens: np.ndarray, tokenizer: Tokenizer) -> np.ndarray:
    """The same documents as byte tokens, document markers kept."""
    if isinstance(tokenizer, ByteTokenizer):
        return np.asarray(tokens)
    plain = ByteTokenizer()
    documents = np.split(tokens, np.flatnonzero(tokens == tokenizer.document)[1:])
    marker = np.array([plain.document], np.uint16)
    return np.concatenate([part for x in documents for part in (marker, plain.encode(tokenizer.decode(x)))])
