"""`rattn pretrain`."""

import argparse
import dataclasses
import os

from rattn_eqx.arguments import FEATURE_MAPS, PRESETS, Help, finite, model_config, path, place, utf8, whole


def add(commands: argparse._SubParsersAction) -> None:
    """The command's arguments."""
    command = commands.add_parser(
        "pretrain",
        help="train a language model on text and leave a run folder",
        description="Train a local-global RATTENTION language model on text. The defaults learn Python source in a few "
        "minutes on two CPU cores. Stopped at any moment, the same command continues exactly.",
        formatter_class=Help,
    )
    command.set_defaults(run=run)
    add = command.add_argument
    add("--out", type=path, default="runs/tiny", help="run folder")
    add("--corpus", type=place, default="python", help="'python': the interpreter's standard library; 'environment': "
        "with the installed packages; 'package:NAME': one of them with its documents; or a file or folder of text, "
        "such as /usr/share/doc/NAME")  # fmt: skip
    add("--cache", type=path, default="~/.cache/rattn", help="where corpora and tokens are kept between runs")
    add("--tokenizer", choices=["byte", "bpe"], default="byte", help="bytes, or a BPE trained on the corpus")
    add("--vocabulary", type=whole(), default=4096, help="tokens of the BPE vocabulary")
    add("--preset", choices=PRESETS, default="tiny", help="model size")
    add("--window", type=whole(), help="keys that a local layer's query sees, itself included; default: the preset's")
    add("--no-residual", action="store_true", help="leave the residual branch out: plain sliding-window attention; "
        "with --window of the context's length, full attention")  # fmt: skip
    add("--feature-map", type=place, help=f"of the residual branch: {', '.join(FEATURE_MAPS)}, learned; or one of your "
        "own, FILE.py:NAME, as `rattn ablate --help` explains it; default: the preset's")  # fmt: skip
    add("--pattern", help="layer kinds, repeated: local,local,local,global (global_rope: with positions); default: the "
        "preset's")  # fmt: skip
    add("--context", type=whole(), default=512, help="tokens in a training sequence")
    add("--batch-size", type=whole(), default=2, help="sequences in a step")
    add("--microbatches", type=whole(), default=1, help="pieces that a step's batch is computed in, to save memory")
    add("--steps", type=whole(), default=2600, help="optimiser steps")
    add("--learning-rate", type=finite, default=3e-3, help="at its highest")
    add("--own-rate", type=finite, default=1.0, help="times it, for what local layers have of their own: gains, scales")
    add("--warmup-steps", type=whole(), help="steps until the learning rate is at its highest; default: a tenth")
    add("--weight-decay", type=finite, default=0.1, help="of the matrices of attention and feed-forward")
    add("--clip-norm", type=finite, default=1.0, help="longest global norm of the gradients; longer ones are shortened")
    add("--optimizer", choices=["adamw", "rmsprop"], default="adamw", help="rmsprop has momentum, as in the paper")
    add("--compute-dtype", choices=["float32", "bfloat16"], default="float32", help="parameters stay float32")
    add("--rematerialise", action="store_true", help="recompute blocks in the backward pass, to save memory")
    add("--checkpoint-every", type=whole(), default=200, help="steps between checkpoints")
    add("--evaluate-every", type=whole(), default=650, help="steps between evaluations")
    add("--evaluation-tokens", type=whole(), default=131072, help="validation tokens that an evaluation reads")
    add("--seed", type=whole(0, 2**32 - 1), default=0, help="of the parameters, the shuffle and the sample")
    add("--devices", type=whole(), help="CPU devices that share a batch; default: one for each core, at most one "
        "for each sequence; another number gives results that differ by rounding")  # fmt: skip
    add("--prompt", type=utf8, default="def ", help="the sample begins with it")
    add("--sample-tokens", type=whole(), default=200, help="length of the sample")


def _use_cpu_devices(count: int) -> None:
    import jax

    jax.config.update("jax_num_cpu_devices", count)  # before any device is touched


def run(options: argparse.Namespace) -> None:
    if options.devices is not None and not 1 <= options.devices <= 1024:
        raise ValueError(f"pretrain: devices must be at least 1; got {options.devices}; at most 1024")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    sequences = max(1, options.batch_size // max(1, options.microbatches))
    _use_cpu_devices(options.devices or min(cores, sequences))

    from rattn_eqx.pretrain import pretrain
    from rattn_eqx.training.config import TrainConfig

    names = [field.name for field in dataclasses.fields(TrainConfig)]
    settings = {name: getattr(options, name) for name in names}
    if options.warmup_steps is None:
        settings["warmup_steps"] = options.steps // 10
    pretrain(
        options.out,
        model_config(options),
        TrainConfig(**settings),
        corpus=options.corpus,
        cache=options.cache,
        bpe_vocabulary=options.vocabulary if options.tokenizer == "bpe" else None,
        prompt=options.prompt,
        sample_tokens=options.sample_tokens,
    )
