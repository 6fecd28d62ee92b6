"""A tiny training run that tests share; run as a program, one that dies where it is told to.

    python training_child.py FOLDER SCRATCH NUM_DEVICES SETTINGS [FATAL_STEP FATAL_BYTES]

trains in FOLDER with SETTINGS, the JSON of what differs from `training()`. SCRATCH holds the tokens and what XLA
compiled. With FATAL_STEP the process kills itself when FATAL_BYTES of that step's checkpoint are written.
"""

import json
import os
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import numpy as np

from rattn_eqx.data.corpus import build_corpus
from rattn_eqx.data.tokenizers import ByteTokenizer, tokenize
from rattn_eqx.model.config import ModelConfig
from rattn_eqx.training.config import RunConfig, TrainConfig
from rattn_eqx.training.run_folder import read_metrics

SAMPLE = Path(__file__).parents[1] / "data" / "sample"
MODEL = ModelConfig(
    vocabulary_size=258,
    model_width=16,
    num_layers=1,
    num_heads=2,
    num_kv_heads=1,
    head_size=8,
    feed_forward_width=32,
    window=8,
)


def training(**changes: Any) -> TrainConfig:
    settings: dict[str, Any] = {
        "steps": 60,
        "batch_size": 2,
        "context": 32,
        "learning_rate": 1e-2,
        "warmup_steps": 4,
        "checkpoint_every": 25,
        "evaluate_every": 20,
        "evaluation_tokens": 128,
    }
    return TrainConfig(**settings | changes)


def run_arguments(scratch: Path, **changes: Any) -> tuple[RunConfig, Path, Path, ByteTokenizer]:
    """What `train` is given besides the folder, for the sample corpus."""
    corpus, tokenizer = build_corpus(SAMPLE, scratch), ByteTokenizer()
    config = RunConfig(MODEL, training(**changes), corpus.manifest["sha256"])
    return config, *tokenize(corpus, tokenizer, scratch), tokenizer


def bits(tree: Any) -> list[bytes]:
    """Of every array of a pytree."""
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(eqx.filter(tree, eqx.is_array))]


def curve(folder: Path) -> list[dict]:
    """The rows of a run, without what the clock says."""
    return [{name: value for name, value in row.items() if name != "seconds"} for row in read_metrics(folder)]


def keep_compiled(folder: Path) -> None:
    """Compile each program once: every call of `train` builds its step anew, and compiling is most of the time."""
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def die_in_checkpoint(step: int, num_bytes: int) -> None:
    really_savez = np.savez

    def savez(file, **arrays):
        if json.loads(arrays["metadata"].tobytes())["step"] == step:
            with tempfile.TemporaryFile() as whole:
                really_savez(whole, **arrays)
                whole.seek(0)
                file.write(whole.read(num_bytes))
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        really_savez(file, **arrays)

    np.savez = savez


def main(folder: str, scratch: str, num_devices: str, settings: str, *fatal: str) -> None:
    jax.config.update("jax_num_cpu_devices", int(num_devices))
    keep_compiled(Path(scratch) / "compiled")
    from rattn_eqx.training.loop import train

    if fatal:
        die_in_checkpoint(*map(int, fatal))
    arguments = run_arguments(Path(scratch), **json.loads(settings))
    train(Path(folder), *arguments, report=lambda line: print(line, flush=True), show_progress=False)


if __name__ == "__main__":
    main(*sys.argv[1:])
