"""`rattn ablate`."""

import argparse
import contextlib

from rattn_eqx.arguments import FEATURE_MAPS, GRIDS, SETTINGS, Help, path, place, whole

EPILOG = "\n".join(
    [
        "settings:",
        *(f"{head}: {', '.join(names.split())}" for head, names in SETTINGS.items()),
        "Several windows, test_lengths or layers of model.pattern are joined by +.",
        "",
        f"A feature map is {', '.join(FEATURE_MAPS)}, learned, or FILE.py:NAME of yours, which is run: a function "
        "(..., d) -> (..., f), a pair of them for q and k, an Equinox module, or make(head_size, *, key), which gives "
        "each layer a module to train. Results hold its source, so that they can be replayed.",
        "",
        "examples:",
        "rattn ablate --feature-map squared_relu,mine.py:phi --seeds 2 --out mine.jsonl",
        "rattn ablate --table --out mine.jsonl",
        "rattn ablate --replay mine.jsonl:3 --feature-map mine.py:phi",
    ]
)


def add(commands: argparse._SubParsersAction) -> None:
    """The command's arguments."""
    command = commands.add_parser(
        "ablate", help="train and test a grid of small models", formatter_class=Help,
        description="Train every trial of a grid for some seeds, test it, and add a line of JSON for each seed. "
        "Started again, it runs what is missing.",
        epilog=EPILOG,
    )  # fmt: skip
    command.set_defaults(run=run)
    add = command.add_argument
    add(
        "--grid",
        type=place,
        default="quick",
        help=f"{', '.join(GRIDS)}, of rattn_eqx/ablation/grids.py; or a Python file that defines `trials`",
    )
    add("--set", metavar="SETTING=VALUE,...", action="append", dest="settings", help="run every trial with each of "
        "these values, such as model.window=4,8 or departures.conv_width=0,4; again, for all combinations")  # fmt: skip
    add("--feature-map", type=place, metavar="MAP,...", help="short for --set model.feature_map=MAP,...; with "
        "--replay, the line's, if it is of a file of yours")  # fmt: skip
    add("--only", help="trials whose name has this in it")
    add("--list", action="store_true", help="print the trials, with map, window and steps, and do nothing")
    add("--seeds", type=whole(1, 1000), default=3, help="seeds 0, 1, ... of each trial")
    add("--out", type=path, default="runs/ablations.jsonl", help="file of results")
    add("--corpus", type=place, default="python", help="text, as of `rattn pretrain`; read if a trial needs it")
    add("--cache", type=path, default="~/.cache/rattn", help="where corpora and tokens are kept between runs")
    add("--part", default="1/1", help="i/n runs the i-th of n shares of the grid: n processes may share a file")
    add("--attribution", action="store_true", help="also what each branch contributes, as of `rattn evaluate`; lines "
        "that --out has already stay as they are")  # fmt: skip
    add("--commit", help="of this code, for the results; default: git's")
    add(
        "--replay",
        type=place,
        metavar="FILE:LINE",
        help="run the trial and seed of a line of results again, and print both",
    )
    add("--table", action="store_true", help="print what --out holds: means, and differences with 95%% intervals")
    add("--baseline", help="trial that --table compares the others with, seed by seed; default: its first")


def run(options: argparse.Namespace) -> None:
    from rattn_eqx.ablation import grids, rows, run, table
    from rattn_eqx.ablation.trial import Trial
    from rattn_eqx.data.files import lock, open_append
    from rattn_eqx.model.map_files import read_named

    if options.table:
        print(table.table(rows.read_rows(options.out), options.baseline))
        return
    old = rows.replayed(options.replay) if options.replay else None
    if old is not None:
        trials, seeds = [Trial.from_json(old["name"], old["trial"])], [old["seed"]]
        if options.feature_map is not None:
            read_named(trials[0].model.feature_map, options.feature_map)
    else:
        settings = options.settings or []
        if options.feature_map is not None:
            settings = [*settings, f"{grids.MAP}={options.feature_map}"]
        trials = grids.product(grids.load_grid(options.grid), grids.parse_settings(settings))
        trials, seeds = grids.named(trials, options.only or ""), list(range(options.seeds))
    if options.list:
        print(grids.listed(trials))
        return
    part = run.parse_part(options.part)
    mine = run.share(trials, part)
    if old is None:  # before the work
        options.out.parent.mkdir(parents=True, exist_ok=True)
        open_append(options.out).close()
        rows.read_rows(options.out)
    with contextlib.ExitStack() as stack:
        data = None
        if any(trial.needs_text for trial in mine):
            for trial in mine:  # before the text is read
                run.check_model(trial, 1)
            stack.enter_context(lock(options.cache, f"ablate: {options.cache}", shared=True))
            data = run.load_data(options.corpus, options.cache, exclude=(options.out,))
        if old is not None:
            run.check_trial(trials[0], 1, data)
            print(f"then {rows.summary([old])}, commit {old['commit']}, {old['device']}")
            if old["corpus"] != (corpus := None if data is None else data.sha256):
                print(f"the line's corpus is {old['corpus']}, the one read now {corpus}")
            print(f"now  {rows.summary(run.run_trial(trials[0], seeds, data, commit=options.commit))}")
            return
        run.run_grid(
            trials, seeds, data, options.out, part=part, attribution=options.attribution, commit=options.commit
        )
