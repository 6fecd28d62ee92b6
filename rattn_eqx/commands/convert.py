"""`rattn convert`."""

import argparse
from typing import Any

from rattn_eqx.arguments import Help, finite, path, place, whole


def add(commands: argparse._SubParsersAction) -> None:
    """The command's arguments."""
    command = commands.add_parser(
        "convert", help="turn a pretrained full-attention model into RATTENTION", formatter_class=Help,
        description="Turn a pretrained full-attention model into RATTENTION. First every local layer learns by itself "
        "to give what the layer gave that it replaces; then, with --steps, the whole model is trained on the text. It "
        "ends with a table of what was lost and won back. Stopped at any moment, the same command continues exactly.",
    )  # fmt: skip
    command.set_defaults(run=run)
    add = command.add_argument
    add(
        "path",
        type=path,
        metavar="PATH",
        help="the model: a folder that `rattn import` left, a Hugging Face folder, a GGUF file, or package:NAME",
    )
    add("--out", type=path, required=True, help="folder of the conversion; the converted model is its model/")
    add("--corpus", type=place, default="python", help="text to learn from and to be measured on, as of `pretrain`")
    add("--cache", type=path, default="~/.cache/rattn", help="where corpora and tokens are kept between runs")
    add("--window", type=whole(), default=64, help="keys that a local layer's query sees, its own included")
    add("--pattern", default="local,local,local,global", help="repeated: local layers are converted, global ones stay")
    add("--transfer-steps", type=whole(), default=200, help="of the layers by themselves")
    add("--transfer-rate", type=finite, default=1e-2, help="learning rate of the transfer, at its highest")
    add("--steps", type=whole(0), default=0, help="of training the whole model afterwards")
    add("--learning-rate", type=finite, default=3e-4, help="of that training, at its highest")
    add(
        "--own-rate",
        type=finite,
        default=10.0,
        help="times it, for what local layers have of their own: sinks, gains, maps",
    )
    add("--context", type=whole(), default=512, help="tokens in a sequence")
    add("--batch-size", type=whole(), default=1, help="sequences in a step")
    add("--microbatches", type=whole(), default=1, help="pieces that a step's batch is computed in, to save memory")
    add("--compute-dtype", choices=["float32", "bfloat16"], default="float32", help="parameters stay float32")
    add("--distillation", type=finite, default=0.0, help="share of that training's loss: KL from the old model, 0 to 1")
    add("--window-dropout", type=finite, default=0.0, help="how often a layer's window is silent in it, at first")
    add("--windows", type=windows, default=(), metavar="W,...", help="windows that its steps draw from, at random")
    add("--no-residual", action="store_true", help="the window alone, to compare with")
    add("--no-sinks", action="store_true", help="no learned logits without a value in the window's softmax")
    add("--rematerialise", action="store_true", help="recompute blocks in the backward pass, to save memory")
    add("--evaluation-tokens", type=whole(), default=16384, help="held-out tokens that training is evaluated on")
    add("--checkpoint-every", type=whole(), default=50, help="steps between checkpoints")
    add("--texts", type=whole(), default=8, help="held-out texts that losses are measured on")
    add("--text-length", type=whole(), default=1024, help="tokens of each")
    add("--seed", type=whole(0, 2**32 - 1), default=0, help="of the shuffle")


def windows(text: str) -> tuple[int, ...]:
    """Windows such as "32,64"."""
    return tuple(map(whole(), text.split(",")))


def run(options: argparse.Namespace) -> None:
    from rattn_eqx.conversion.convert import convert, settings
    from rattn_eqx.training.config import Objective

    kinds: dict[str, Any] = {"local": "local", "global": "global_rope", "global_rope": "global_rope"}
    names = options.pattern.split(",")
    if unknown := [name for name in names if name not in kinds]:
        raise ValueError(f"convert: --pattern must hold local and global alone; got {unknown[0]!r:.80}")
    shared: dict[str, Any] = {
        name: getattr(options, name) for name in ("batch_size", "context", "compute_dtype", "checkpoint_every", "seed")
    }
    training = objective = None
    of_objective = {name: getattr(options, name) for name in ("distillation", "window_dropout", "windows")}
    if any(of_objective.values()):
        if not options.steps:
            raise ValueError("convert: --distillation, --window-dropout and --windows belong to --steps above 0; got 0")
        teacher = "filled in" if options.distillation > 0 else None
        objective = Objective(teacher=teacher, **of_objective)
    if options.steps:
        of_all: dict[str, Any] = dict(
            evaluation_tokens=options.evaluation_tokens,
            own_rate=options.own_rate,
            rematerialise=options.rematerialise,
            microbatches=options.microbatches,
            weight_decay=0.0,
        )
        training = settings(options.steps, learning_rate=options.learning_rate, **of_all, **shared)
    convert(
        options.out,
        options.path,
        pattern=tuple(kinds[name] for name in names),
        window=options.window,
        transferring=settings(options.transfer_steps, learning_rate=options.transfer_rate, **shared),
        training=training,
        objective=objective,
        residual=not options.no_residual,
        sinks=not options.no_sinks,
        corpus=options.corpus,
        cache=options.cache,
        num_texts=options.texts,
        text_length=options.text_length,
    )
