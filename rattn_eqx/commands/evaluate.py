"""`rattn evaluate`."""

import argparse
import dataclasses
import sys

from rattn_eqx.arguments import OF_MODEL, Help, path, place, whole
from rattn_eqx.console import say


def add(commands: argparse._SubParsersAction) -> None:
    """The command's arguments."""
    command = commands.add_parser(
        "evaluate", help="score a trained run on a recall task, by length and distance", formatter_class=Help,
        description="Score a trained run on a task whose answers lie a known distance back, beside chance. Each task's "
        "exact definition is in its docstring, in rattn_eqx/tasks/recall.py and recall_text.py.",
    )  # fmt: skip
    command.set_defaults(run=run)
    add = command.add_argument
    add("--run", dest="folder", type=path, required=True, help="run folder that `rattn pretrain` or `rattn "
        "import` left, or another path of a model")  # fmt: skip
    add("--feature-map", type=place, metavar="FILE.py:NAME", help=OF_MODEL)
    add("--perplexity", type=path, metavar="FILE", help="instead of a task: how well the model predicts a text of any "
        "length, by position")  # fmt: skip
    add("--task", help="a task of rattn_eqx/evaluation/recall.py, such as mqar (token ids), needle "
        "(bytes) or variables (bytes, or token ids with --option level=token)")  # fmt: skip
    add("--lengths", default="512,1k,2k", help="tokens in a sample, k for 1,024")
    add("--samples", type=whole(), default=64, help="samples of each length")
    add("--seed", type=whole(0, 2**64 - 1), default=0, help="of the samples")
    add("--option", metavar="NAME=VALUE", action="append", help="of the task, such as num_pairs=8; may be "
        "given again")  # fmt: skip
    add("--text", type=path, help="file whose text is the haystack of needle's haystack=corpus")
    add("--attribution", action="store_true", help="also what each branch contributes: accuracy without it, its share "
        "of each layer's output, and how far back a changed token moves the logits")  # fmt: skip
    add("--out", type=path, help="file to which a line of JSON is added for each length")


def run(options: argparse.Namespace) -> None:
    from rattn_eqx.ablation.rows import append_rows
    from rattn_eqx.data import files
    from rattn_eqx.evaluation.recall import evaluate_task, parse_lengths, parse_options
    from rattn_eqx.weights.load import load_with_tokenizer

    if (options.task is None) is (options.perplexity is None):
        given = "neither" if options.task is None else "both"
        raise ValueError(f"evaluate: --task or --perplexity must be given, and one of them; got {given}")
    if options.perplexity is not None and (options.text is not None or options.attribution or options.option):
        raise ValueError("evaluate: --text, --attribution and --option belong to --task; got them with --perplexity")
    lengths, task_options = parse_lengths(options.lengths), parse_options(options.option or [])
    if options.text is not None:
        task_options = {"haystack": "corpus", **task_options, "text": files.read_bytes(options.text, 2**30)}
    model, tokenizer = load_with_tokenizer(options.folder, feature_map=options.feature_map, report=say)
    if options.out is not None:
        files.open_append(options.out).close()  # before the work
    if options.perplexity is not None:
        _perplexity(model, tokenizer, options)
        return
    results = evaluate_task(
        model, tokenizer, options.task, lengths, samples=options.samples, seed=options.seed, options=task_options
    )
    for result, row in results:
        print(
            f"{options.task}, length {row['length']:,}: accuracy {result.accuracy:.3f}, chance {result.chance:.3f}; "
            f"{result.exact:.3f} of {result.answers:,} answers whole"
        )
        if row["window"] is not None:
            print(
                f"  evidence beyond the window of {row['window']:,}: {row['beyond_window']:.1%}; "
                f"beyond all local layers' windows: {row['beyond_layers']:.1%}"
            )
        for bin in result.bins:
            print(f"  distance {bin.low:>7,} to {bin.high - 1:>7,}: {bin.accuracy:.3f} of {bin.positions:,}")
        if options.attribution:
            row["attribution"] = _attribution(model, tokenizer, options, row["length"], task_options)
        sys.stdout.flush()
        if options.out is not None:
            append_rows(options.out, [{"run": str(options.folder), **row}])


def _perplexity(model, tokenizer, options: argparse.Namespace) -> None:
    from rattn_eqx.ablation.rows import append_rows
    from rattn_eqx.evaluation.perplexity import Bin, file_perplexity

    bins = file_perplexity(model, options.perplexity, tokenizer, show_progress=True)
    total = Bin(0, bins[-1].high, sum(x.nats for x in bins), sum(x.num_bytes for x in bins))
    print(f"{options.perplexity}, {total.high:,} tokens after the first: perplexity {total.perplexity:.3f}, "
          f"{total.bits_per_byte:.3f} bits per byte")  # fmt: skip
    for x in bins:
        print(f"  position {x.low:>9,} to {x.high - 1:>9,}: perplexity {x.perplexity:8.3f}, "
              f"{x.bits_per_byte:.3f} bits per byte")  # fmt: skip
    if options.out is not None:
        rows = [dataclasses.asdict(x) | {"bits_per_byte": x.bits_per_byte} for x in bins]
        append_rows(options.out, [{"run": str(options.folder), "text": str(options.perplexity), "bins": rows}])


def _attribution(model, tokenizer, options: argparse.Namespace, length: int, task_options: dict) -> dict:
    from rattn_eqx.evaluation.attribution import attribute_task
    from rattn_eqx.evaluation.recall import make_task

    row = attribute_task(
        model, make_task(options.task, model, tokenizer, options.seed, options.samples, length, task_options)
    )
    print("  accuracy: " + ", ".join(f"{name} {x:.3f}" for name, x in row["accuracy"].items()))
    shares = ", ".join(f"{layer}: {share:.2f}" for layer, share in (row["residual_share"] or {}).items())
    print(f"  residual branch's share of the output norm, by layer: {shares or 'none, its layers norm the sum'}")
    print("  a changed token moves the logits by, " + ", ".join(row["memory"]) + ":")
    for bins in zip(*row["memory"].values(), strict=True):
        print(f"  distance {bins[0][0]:>7,} to {bins[0][1] - 1:>7,}: " + "  ".join(f"{x:8.2g}" for *_, x in bins))
    return row
