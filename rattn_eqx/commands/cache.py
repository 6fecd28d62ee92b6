"""`rattn cache`."""

import argparse

from rattn_eqx.arguments import Help, path


def add(commands: argparse._SubParsersAction) -> None:
    """The command's arguments."""
    command = commands.add_parser(
        "cache", help="list what is kept between runs, and remove what is of no use", formatter_class=Help,
        description="List the corpora and token files of a cache. Each is read once, to see whether it is damaged.",
    )  # fmt: skip
    command.set_defaults(run=run)
    add = command.add_argument
    add("--cache", type=path, default="~/.cache/rattn", help="where corpora and tokens are kept between runs")
    add("--prune", action="store_true", help="remove what is superseded, damaged or unfinished; not during a run")


def run(options: argparse.Namespace) -> None:
    from rattn_eqx.data.cache import contents, describe, prune

    if not options.cache.exists():
        print(f"no cache at {options.cache}")
        return
    if options.prune:
        for entry in prune(options.cache):
            print(f"removed {describe(entry)}")
    for entry in contents(options.cache):
        print(describe(entry))
