"""`rattn cost`."""

import argparse

from rattn_eqx.arguments import FEATURE_MAPS, HARDWARES, PRESETS, Help, model_config, path, place, whole


def add(commands: argparse._SubParsersAction) -> None:
    """The command's arguments."""
    command = commands.add_parser(
        "cost", help="parameters, cache and generation time of a model size", formatter_class=Help,
        description="What a model costs to hold and to generate with, by the paper's formula. Computes no model.",
    )  # fmt: skip
    command.set_defaults(run=run)
    add = command.add_argument
    add("--preset", choices=PRESETS, default="paper_12b", help="model size")
    add("--run", dest="folder", type=path, help="in place of a preset: a run folder that `rattn pretrain` or `rattn "
        "import` left, or another path of a model")  # fmt: skip
    add("--feature-map", type=place, help=f"of the residual branch: {', '.join(FEATURE_MAPS)}, learned, or your own, "
        "FILE.py:NAME; with --run the model's own file alone; default: the preset's")  # fmt: skip
    add("--window", type=whole(), help="keys that a local layer's query sees, itself included; default: the preset's")
    add("--no-residual", action="store_true", help="without the residual branch")
    add("--context", type=whole(high=2**53), default=4096, help="tokens that a sequence has so far")
    add("--batch", type=whole(high=2**53), default=64, help="sequences generated together")
    add("--hardware", choices=HARDWARES, default="h100", help="whose bandwidth and FLOP/s to use")


def run(options: argparse.Namespace) -> None:
    from rattn_eqx.inference.cost import describe_cost, hardwares

    config = None
    if options.folder is not None:
        from rattn_eqx.model.map_files import read_named
        from rattn_eqx.weights.load import config_of

        config = config_of(options.folder)
        if options.feature_map is not None:
            read_named(config.feature_map, options.feature_map)
            options.feature_map = None
    hardware = hardwares[options.hardware]
    print(describe_cost(model_config(options, config), context=options.context, batch=options.batch, hardware=hardware))
