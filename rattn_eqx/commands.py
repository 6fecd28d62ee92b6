"""The command line: `rattn pretrain`, `rattn generate`, `rattn evaluate`, `rattn ablate`, `rattn cost`, `rattn cache`.

Nothing slow is imported before a command runs: help is quick.
"""

import argparse
import contextlib
import dataclasses
import linecache
import os
import sys
import traceback

from rattn_eqx import interrupt
from rattn_eqx.arguments import finite, path, place, utf8, whole
from rattn_eqx.console import close_output, open_streams, say

PRESETS = ("tiny", "small", "paper_3b", "paper_12b")
FEATURE_MAPS = ("softmax", "relu", "identity", "elu_plus_one", "exp", "squared_relu", "taylor")
HARDWARES = ("h100", "h200", "tpu_v5p")


def run(given: list[str]) -> int:
    """Run one command, as `__main__.main`, which heeds Ctrl-C."""
    open_streams()
    try:
        options = _parser().parse_args(given)
        options.run(options)
        sys.stdout.flush()
    except BrokenPipeError:
        return 141  # as of a process that SIGPIPE ends
    except MemoryError as error:
        return _out_of_memory(error)
    except Exception as error:
        if interrupt.caused(error):
            raise KeyboardInterrupt from error
        if isinstance(error, RuntimeError) and str(error).startswith("RESOURCE_EXHAUSTED"):  # as XLA says it
            return _out_of_memory(error)
        if not _is_refusal(error):
            raise
        say(str(error))
        return 2
    finally:
        close_output()
    return 0


def _is_refusal(error: Exception) -> bool:
    """Whether the system refused something, or a `raise` of ours: anything else is a bug, and shows its traceback."""
    if isinstance(error, OSError | ImportError):
        return True
    if not isinstance(error, ValueError | NotImplementedError | FloatingPointError):
        return False
    *_, (frame, line) = traceback.walk_tb(error.__traceback__)
    file = frame.f_code.co_filename
    statement = linecache.getline(file, line).strip()  # none where there are no sources
    packages = [os.path.join(os.path.dirname(os.path.dirname(__file__)), name, "") for name in ("rattn_eqx", "pallas")]
    return not statement or (file.startswith(tuple(packages)) and statement.startswith("raise"))


def _out_of_memory(error: Exception) -> int:
    reason = str(error).partition("\n")[0]
    say(f"out of memory{f' ({reason})' if reason else ''}; give smaller sizes, such as fewer samples or sequences")
    return 2


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise ValueError(f"{message}; see {self.prog} --help")


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Shows a default where there is one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default in (None, False, "") else super()._get_help_string(action)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="rattn", description="Train, sample and price RATTENTION language models.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    command = commands.add_parser(
        "pretrain",
        help="train a language model on text and leave a run folder",
        description="Train a local-global RATTENTION language model on text. The defaults learn Python source in a few "
        "minutes on two CPU cores. Stopped at any moment, the same command continues exactly.",
        formatter_class=_Help,
    )
    command.set_defaults(run=_pretrain)
    add = command.add_argument
    add("--out", type=path, default="runs/tiny", help="run folder")
    add("--corpus", type=place, default="python", help="'python': the interpreter's standard library; 'environment': "
        "with the installed packages; or a file or folder of your own text")  # fmt: skip
    add("--cache", type=path, default="~/.cache/rattn", help="where corpora and tokens are kept between runs")
    add("--tokenizer", choices=["byte", "bpe"], default="byte", help="bytes, or a BPE trained on the corpus")
    add("--vocabulary", type=whole(), default=4096, help="tokens of the BPE vocabulary")
    add("--preset", choices=PRESETS, default="tiny", help="model size")
    add("--window", type=whole(), help="keys that a local layer's query sees, itself included; default: the preset's")
    add("--no-residual", action="store_true", help="leave the residual branch out: plain sliding-window attention; "
        "with --window of the context's length, full attention")  # fmt: skip
    add("--feature-map", help=f"of the residual branch: {', '.join(FEATURE_MAPS)}; default: the preset's")
    add("--pattern", help="layer kinds, repeated: local,local,local,global; default: the preset's")
    add("--context", type=whole(), default=512, help="tokens in a training sequence")
    add("--batch-size", type=whole(), default=2, help="sequences in a step")
    add("--microbatches", type=whole(), default=1, help="pieces that a step's batch is computed in, to save memory")
    add("--steps", type=whole(), default=2600, help="optimiser steps")
    add("--learning-rate", type=finite, default=3e-3, help="at its highest")
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

    command = commands.add_parser(
        "generate", help="continue a prompt with a trained run", formatter_class=_Help,
        description="Write what a trained model thinks comes after the prompt.",
    )  # fmt: skip
    command.set_defaults(run=_generate)
    add = command.add_argument
    add("--run", dest="folder", type=path, required=True, help="run folder that `rattn pretrain` left")
    add("--prompt", type=utf8, action="append", help="text to continue; given again, several texts, each written as a "
        "line of JSON when it is whole")  # fmt: skip
    add("--prompts", type=path, metavar="FILE", help="a prompt on each line of a file, or of the standard input (-)")
    add("--chat", action="store_true", help="the prompt is a user's message, and the answer of a checkpoint that was "
        "trained to chat is written, without the prompt")  # fmt: skip
    add("--num-tokens", type=whole(), default=300, help="most tokens to write, for each prompt")
    add("--stop", type=utf8, action="append", help="end before this text; may be given again")
    add("--max-length", type=whole(), help="tokens that global layers have room for; default: a power of two that fits")
    add("--no-stream", action="store_true", help="write 64 tokens at a time, which is faster")
    add("--temperature", type=finite, default=0.8, help="0 takes the likeliest token each time")
    add("--top-k", type=whole(), help="draw from the k likeliest tokens only")
    add("--top-p", type=finite, help="draw from the fewest likeliest tokens that hold this probability")
    add("--seed", type=whole(0, 2**32 - 1), default=0, help="of the draws")

    command = commands.add_parser(
        "evaluate", help="score a trained run on a recall task, by length and distance", formatter_class=_Help,
        description="Score a trained run on a task whose answers lie a known distance back, beside chance. Each task's "
        "exact definition is in its docstring, in rattn_eqx/tasks/recall.py and recall_text.py.",
    )  # fmt: skip
    command.set_defaults(run=_evaluate)
    add = command.add_argument
    add("--run", dest="folder", type=path, required=True, help="run folder that `rattn pretrain` left")
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

    command = commands.add_parser(
        "ablate", help="train and test a grid of small models", formatter_class=_Help,
        description="Train every trial of a grid for some seeds, test it, and add a line of JSON for each seed. "
        "Started again, it runs what is missing.",
    )  # fmt: skip
    command.set_defaults(run=_ablate)
    add = command.add_argument
    add(
        "--grid",
        type=place,
        default="quick",
        help="a grid of rattn_eqx/ablation/grids.py, or a Python file that defines `trials`",
    )
    add("--set", metavar="SETTING=VALUE,...", action="append", dest="settings", help="run every trial with each of "
        "these values, such as model.window=4,8 or departures.num_sinks=0,4; again, for all combinations")  # fmt: skip
    add("--only", help="trials whose name has this in it")
    add("--list", action="store_true", help="print the trials and do nothing")
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

    command = commands.add_parser(
        "cost", help="parameters, cache and generation time of a model size", formatter_class=_Help,
        description="What a model costs to hold and to generate with, by the paper's formula. Computes no model.",
    )  # fmt: skip
    command.set_defaults(run=_cost)
    add = command.add_argument
    add("--preset", choices=PRESETS, default="paper_12b", help="model size")
    add("--window", type=whole(), help="keys that a local layer's query sees, itself included; default: the preset's")
    add("--no-residual", action="store_true", help="without the residual branch")
    add("--context", type=whole(high=2**53), default=4096, help="tokens that a sequence has so far")
    add("--batch", type=whole(high=2**53), default=64, help="sequences generated together")
    add("--hardware", choices=HARDWARES, default="h100", help="whose bandwidth and FLOP/s to use")

    command = commands.add_parser(
        "cache", help="list what is kept between runs, and remove what is of no use", formatter_class=_Help,
        description="List the corpora and token files of a cache. Each is read once, to see whether it is damaged.",
    )  # fmt: skip
    command.set_defaults(run=_cache)
    add = command.add_argument
    add("--cache", type=path, default="~/.cache/rattn", help="where corpora and tokens are kept between runs")
    add("--prune", action="store_true", help="remove what is superseded, damaged or unfinished; not during a run")
    return parser


def _model_config(options: argparse.Namespace):
    from rattn_eqx.model.presets import presets

    config = presets[options.preset]
    changes = {"window": options.window, "residual": False if options.no_residual else None}
    changes["feature_map"] = getattr(options, "feature_map", None)
    pattern = getattr(options, "pattern", None)
    changes["pattern"] = None if pattern is None else tuple(pattern.split(","))
    return dataclasses.replace(config, **{name: value for name, value in changes.items() if value is not None})


def _use_cpu_devices(count: int) -> None:
    import jax

    jax.config.update("jax_num_cpu_devices", count)  # before any device is touched


def _pretrain(options: argparse.Namespace) -> None:
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
        _model_config(options),
        TrainConfig(**settings),
        corpus=options.corpus,
        cache=options.cache,
        bpe_vocabulary=options.vocabulary if options.tokenizer == "bpe" else None,
        prompt=options.prompt,
        sample_tokens=options.sample_tokens,
    )


def _generate(options: argparse.Namespace) -> None:
    import json
    import time

    import jax

    from rattn_eqx.inference.generate import STEPS
    from rattn_eqx.inference.text import generate_texts
    from rattn_eqx.training.loop import load_model

    prompts = _prompts(options)
    said = [[{"role": "user", "content": prompt}] if options.chat else prompt for prompt in prompts]
    model, tokenizer, _ = load_model(options.folder, report=say)
    keys = jax.random.key(options.seed)
    drawn = generate_texts(
        model,
        tokenizer,
        said,
        num_tokens=options.num_tokens,
        max_length=options.max_length,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        stop=options.stop or (),
        stream=not options.no_stream,
        key=keys[None] if len(prompts) == 1 else keys,
    )
    output, texts, many = sys.stdout.buffer, [""] * len(prompts), len(prompts) > 1 or options.prompts is not None
    if not many and not options.chat:
        output.write(prompts[0].encode("utf-8"))

    def write_line(row: int, ended: str) -> None:
        line = {"index": row, "prompt": prompts[row], "text": texts[row], "ended": ended}
        output.write(json.dumps(line, ensure_ascii=False).encode("utf-8") + b"\n")

    at_once = STEPS if options.no_stream else 1  # tokens of each text: the first of them come after compiling
    counts, started = [0] * len(prompts), None
    for row, piece, ended in drawn:
        started = started or time.monotonic()
        counts[row] += 1
        texts[row] += piece
        if not many:
            output.write(piece.encode("utf-8"))
        elif ended is not None:
            write_line(row, ended)
        output.flush()
    for row, count in enumerate(counts):
        if many and not count:  # --num-tokens 0
            write_line(row, "count")
    output.write(b"" if many else b"\n")
    output.flush()
    later = sum(max(0, count - at_once) for count in counts)
    seconds = time.monotonic() - (started or 0)
    speed = f"{later / max(seconds, 1e-9):,.0f} tokens/s after the first {at_once}; " if later else ""
    say(f"{sum(counts):,} tokens, {speed}caches of {_cache_in_words(model, tokenizer, said, options)}")


def _prompts(options: argparse.Namespace) -> list[str]:
    """Those given, then those of a file: one on each line."""
    from rattn_eqx.data import files

    prompts = list(options.prompt or [])
    if options.prompts is not None:
        source = "the standard input" if str(options.prompts) == "-" else options.prompts
        data = sys.stdin.buffer.read() if str(options.prompts) == "-" else files.read_bytes(options.prompts, 2**26)
        try:
            lines = data.decode("utf-8").replace("\r\n", "\n").split("\n")  # a form feed is part of a prompt
        except UnicodeDecodeError as error:
            raise ValueError(f"generate: prompts must be UTF-8 text; {source} is not: {error}") from error
        prompts += lines if lines[-1] else lines[:-1]
        if not prompts:
            raise ValueError(f"generate: {source} must have a prompt on each line; it is empty")
    return prompts or [""]


def _cache_in_words(model, tokenizer, prompts: list, options: argparse.Namespace) -> str:
    from rattn_eqx.inference.cost import cache_bytes
    from rattn_eqx.inference.generate import room
    from rattn_eqx.inference.text import prompt_tokens

    longest = max(len(prompt_tokens(tokenizer, prompt)) for prompt in prompts) + options.num_tokens
    each = cache_bytes(model.config, room(model, longest, options.max_length) or 1, dtype=model.compute_dtype)
    return f"{len(prompts)} x {each:,} bytes"


def _evaluate(options: argparse.Namespace) -> None:
    from rattn_eqx.ablation.rows import append_rows
    from rattn_eqx.data import files
    from rattn_eqx.evaluation.recall import evaluate_task, parse_lengths, parse_options
    from rattn_eqx.training.loop import load_model

    if (options.task is None) is (options.perplexity is None):
        given = "neither" if options.task is None else "both"
        raise ValueError(f"evaluate: --task or --perplexity must be given, and one of them; got {given}")
    if options.perplexity is not None and (options.text is not None or options.attribution or options.option):
        raise ValueError("evaluate: --text, --attribution and --option belong to --task; got them with --perplexity")
    lengths, task_options = parse_lengths(options.lengths), parse_options(options.option or [])
    if options.text is not None:
        task_options = {"haystack": "corpus", **task_options, "text": files.read_bytes(options.text, 2**30)}
    model, tokenizer, _ = load_model(options.folder, report=say)
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


def _ablate(options: argparse.Namespace) -> None:
    from rattn_eqx.ablation import grids, rows, run, table
    from rattn_eqx.ablation.trial import Trial
    from rattn_eqx.data.files import lock, open_append

    if options.table:
        print(table.table(rows.read_rows(options.out), options.baseline))
        return
    old = rows.replayed(options.replay) if options.replay else None
    if old is not None:
        trials, seeds = [Trial.from_json(old["name"], old["trial"])], [old["seed"]]
    else:
        trials = grids.product(grids.load_grid(options.grid), grids.parse_settings(options.settings or []))
        trials, seeds = grids.named(trials, options.only or ""), list(range(options.seeds))
    if options.list:
        print("\n".join(trial.name for trial in trials))
        return
    part = run.parse_part(options.part)
    mine = run.share(trials, part)
    if old is None:  # before the work
        options.out.parent.mkdir(parents=True, exist_ok=True)
        open_append(options.out).close()
    with contextlib.ExitStack() as stack:
        data = None
        if any(trial.needs_text for trial in mine):
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


def _cost(options: argparse.Namespace) -> None:
    from rattn_eqx.inference.cost import describe_cost, hardwares

    hardware = hardwares[options.hardware]
    print(describe_cost(_model_config(options), context=options.context, batch=options.batch, hardware=hardware))


def _cache(options: argparse.Namespace) -> None:
    from rattn_eqx.data.cache import contents, describe, prune

    if not options.cache.exists():
        print(f"no cache at {options.cache}")
        return
    if options.prune:
        for entry in prune(options.cache):
            print(f"removed {describe(entry)}")
    for entry in contents(options.cache):
        print(describe(entry))
