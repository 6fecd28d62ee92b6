"""`rattn import`."""

import argparse

from rattn_eqx.arguments import Help, path
from rattn_eqx.console import say


def add(commands: argparse._SubParsersAction) -> None:
    """The command's arguments."""
    command = commands.add_parser(
        "import", help="bring in a checkpoint of another library", formatter_class=Help,
        description="Turn a Hugging Face folder (config.json, safetensors files, tokenizer.json) or a GGUF file of "
        "Llama's, Mistral's, Qwen2's, Qwen3's or SmolLM3's architecture into a folder that the other commands read.",
    )  # fmt: skip
    command.set_defaults(run=run)
    add = command.add_argument
    add(
        "path",
        type=path,
        metavar="PATH",
        help="the folder or file; or package:NAME, the GGUF file of an installed package",
    )
    add("--out", type=path, required=True, help="folder to write, which must not exist")
    add("--dtype", choices=["float32", "bfloat16", "float16"], help="of parameters; default: each as it is stored, "
        "float32 where it is quantised")  # fmt: skip
    add("--compute-dtype", choices=["float32", "bfloat16"], default="float32", help="in which the model computes")


def run(options: argparse.Namespace) -> None:
    from rattn_eqx.inference.cost import count_parameters
    from rattn_eqx.weights.load import import_checkpoint

    about, tokenizer = import_checkpoint(
        options.path, options.out, dtype=options.dtype or "stored", compute_dtype=options.compute_dtype
    )
    tokens = "no tokenizer" if tokenizer is None else f"a tokenizer of {tokenizer.vocabulary_size:,} tokens"
    kinds = about.model.layer_kinds
    layers = ", ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds))
    say(f"{options.out}: {count_parameters(about.model):,} parameters, layers {layers}, {tokens}")
