"""Random argument lists over all commands: no traceback, one line for a mistake, no memory for what is refused."""

import collections
import os
import random
import traceback
from pathlib import Path

import jax
import pytest
from small_model import drawn
from training_child import MODEL, SAMPLE

from rattn_eqx.__main__ import main
from rattn_eqx.commands import pretrain
from rattn_eqx.data.tokenizers import ByteTokenizer
from rattn_eqx.model.config import ModelConfig
from rattn_eqx.model.presets import presets
from rattn_eqx.weights import own

pytestmark = [pytest.mark.slow, pytest.mark.standard_dtype_promotion]  # optax

GRID = """
import dataclasses
from rattn_eqx.ablation.grids import quick
[made] = quick()
training = dataclasses.replace(made.training, steps=2, batch_size=2, warmup_steps=1)
trials = [dataclasses.replace(made, training=training, test_samples=2)]
"""
OLD = ModelConfig(vocabulary_size=258, model_width=12, num_layers=2, num_heads=2, num_kv_heads=1, head_size=6,
    feed_forward_width=16, window=0, residual=False, pattern=("global_rope",), qk_norm=False)  # fmt: skip
FOREIGN = str(Path(__file__).parent / "weights/fixtures/llama")
NUMBERS = ["-1", "0", "1", "2", "1.5", "nan", "-inf", "1e400", "1e-40", "9" * 23, "9" * 400, "9" * 5000, "²", ""]
LARGE = ["2147483647", "2147483648", "9223372036854775807"]  # not for what is done so many times
NAMES = ["", "x", "caf\udce9", "a\nb", "\0", "%s", "-", "--", "→", "x" * 5000, "../", "~nobody/x"]
VALUES = ["", "=", "3", "abc", "1.5", "NaN", "null", "true", "{}", "[]", "[" * 10_000, "1,2", "1+2", "9" * 5000, "-1"]
VALUES += ['"x"', *LARGE]
PATHS = ["", "~", "~/x", "no/x", "/dev/zero", "/dev/null", "\0", "x" * 300, "pipe", "folder", "loop", "binary", "a\nb"]
PATHS += ["caf\udce9"]


def options(folder: Path) -> dict[str, tuple[list[str], dict[str, list[str]]]]:
    """By command: arguments of an untouched one, and what else its options may be given."""
    cache, paths = ["--cache", "cache"], [*PATHS, "grid.py", "out.jsonl", "edited.jsonl", "run"]
    sizes = dict.fromkeys(["--window", "--vocabulary", "--context", "--batch-size", "--microbatches"], NUMBERS + LARGE)
    often = dict.fromkeys(["--steps", "--warmup-steps", "--sample-tokens", "--checkpoint-every"], NUMBERS)
    rates = dict.fromkeys(["--learning-rate", "--weight-decay", "--clip-norm"], NUMBERS)
    words = dict.fromkeys(["--pattern", "--feature-map", "--optimizer", "--tokenizer", "--preset", "--prompt"], NAMES)
    seeds = {"--seed": NUMBERS + LARGE, "--evaluation-tokens": NUMBERS + LARGE, "--devices": NUMBERS + LARGE}
    trained = ["--out", "run", "--corpus", str(SAMPLE), *cache, "--steps", "2", "--context", "32", "--devices", "1",
        "--evaluation-tokens", "256", "--sample-tokens", "2"]  # fmt: skip
    trial = ["name", "model", "model.window", "model.num_layers", "model.model_width", "model.vocabulary_size",
        "model.pattern", "model.feature_map", "model.head_size", "training.steps", "training.batch_size",
        "training.context", "training.seed", "training.learning_rate", "departures.num_valued_sinks", "departures.x",
        "departures.conv_width", "task", "task_options", "task_options.gap", "task_options.num_pairs",
        "task_options.vocabulary_size", "task_share", "test_lengths", "test_samples", "windows", "window_dropout",
        ""]  # fmt: skip
    settings = [f"{name}={x}" for name in trial for x in VALUES if name != "training.steps" or x not in LARGE]
    task = [f"{name}={x}" for name in ("num_pairs", "num_queries", "gap", "vocabulary_size", "x") for x in VALUES]
    lengths = ["", "x", "0", "8", "64,32", "1k", "9" * 400, "\u00b2", "2147483647", "2097151k", "2097152k", ","]
    return {
        "pretrain": (trained, sizes | often | rates | words | seeds | {"--corpus": paths, "--cache": paths}),
        "generate": (
            ["--run", "run", "--num-tokens", "2"],
            {"--run": paths, "--num-tokens": NUMBERS, "--temperature": NUMBERS + LARGE, "--top-k": NUMBERS + LARGE,
             "--top-p": NUMBERS, "--prompt": NAMES, "--seed": NUMBERS + LARGE, "--prompts": [*paths, "-"],
             "--stop": NAMES, "--max-length": NUMBERS + LARGE, "--no-stream": []},
        ),
        "evaluate": (
            ["--run", "run", "--task", "mqar", "--samples", "2", "--lengths", "32", "--option", "num_pairs=2",
             "--option", "num_queries=2"],
            {"--run": paths, "--task": [*NAMES, "needle", "bigrams", "variables"], "--samples": NUMBERS + LARGE,
             "--lengths": lengths, "--option": task, "--text": paths, "--seed": NUMBERS + LARGE, "--out": paths,
             "--perplexity": paths},
        ),
        "evaluate --perplexity": (
            ["--run", "run", "--perplexity", "grid.py"],
            {"--run": paths, "--perplexity": paths, "--task": NAMES, "--out": paths, "--text": paths},
        ),
        "ablate": (
            ["--grid", "grid.py", "--seeds", "1", "--out", "out.jsonl", *cache],
            {"--grid": paths, "--set": settings, "--only": NAMES, "--seeds": NUMBERS + LARGE, "--out": paths,
             "--part": [*VALUES, "1/1", "3/2", "\u00b2/\u00b2", "1/" + "9" * 400], "--commit": NAMES,
             "--replay": [*paths, "out.jsonl:1", "out.jsonl:0", "edited.jsonl:1", "out.jsonl:\u00b2", "run:1"],
             "--baseline": NAMES, "--table": [], "--list": []},
        ),
        "cost": ([], {"--window": NUMBERS + LARGE, "--context": NUMBERS + LARGE, "--batch": NUMBERS + LARGE,
                      "--preset": [*presets, "x"], "--hardware": NAMES, "--no-residual": []}),
        "convert": (
            ["old", "--out", "converted", "--corpus", str(SAMPLE), *cache, "--window", "6", "--pattern", "local,global",
             "--context", "32", "--transfer-steps", "2", "--steps", "2", "--evaluation-tokens", "256", "--texts", "1",
             "--text-length", "64"],
            {"--out": [*paths, *"abc"], "--corpus": paths, "--cache": paths, "--pattern": [*NAMES, "global", "local"],
             "--distillation": NUMBERS, "--window-dropout": NUMBERS, "--windows": [*VALUES, "3,5"], "--no-sinks": [],
             "--transfer-rate": NUMBERS, "--learning-rate": NUMBERS, "--no-residual": [], "--rematerialise": []}
            | dict.fromkeys(["--transfer-steps", "--steps", "--checkpoint-every", "--texts"], NUMBERS)
            | dict.fromkeys(["--window", "--text-length", "--context", "--batch-size", "--microbatches", "--seed",
                             "--evaluation-tokens"], NUMBERS + LARGE),
        ),
        "import": ([FOREIGN, "--out", "imported"], {"--out": [*paths, *"defgh"], "--dtype": ["float16", *NAMES]}),
        "cache": (cache, {"--cache": paths, "--prune": []}),
    }  # fmt: skip


def peak_and_now(reset: bool = False) -> tuple[int, int]:
    """Bytes that this process held at most since the last reset, and holds now."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return tuple(int(status[name].split()[0]) * 1024 for name in ("VmHWM", "VmRSS"))  # type: ignore[return-value]


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="the peak of memory is Linux's to say")
@pytest.mark.parametrize("count", [150, pytest.param(2000, marks=pytest.mark.long)])
def test_random_argument_lists(tmp_path, monkeypatch, capfd, count):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setitem(presets, "tiny", MODEL)
    monkeypatch.setattr(pretrain, "_use_cpu_devices", lambda count: None)
    own.save(drawn(OLD, size=0.4), tmp_path / "old", tokenizer=ByteTokenizer())
    for name in ("home", "folder"):
        (tmp_path / name).mkdir()
    (tmp_path / "grid.py").write_text(GRID)
    (tmp_path / "binary").write_bytes(bytes(range(256)))
    (tmp_path / "loop").symlink_to("loop")
    os.mkfifo(tmp_path / "pipe")
    commands = options(tmp_path)
    for name, (base, _) in commands.items():
        assert main([name.split()[0], *base]) == 0, name
    (tmp_path / "edited.jsonl").write_text((tmp_path / "out.jsonl").read_text().replace('"tests": [', '"tests": [3,'))
    kept = {name: (tmp_path / name).read_bytes() for name in ("out.jsonl", "grid.py", "run/results.json")}
    untouched, _ = peak_and_now()
    rng, statuses, most, wrong = random.Random(count), collections.Counter(), 0, []
    for number in range(count):
        name = rng.choice(list(commands))
        base, more = commands[name]
        arguments = [name.split()[0], *base]
        for option in rng.sample(list(more), min(rng.choice((1, 1, 2, 3)), len(more))):
            arguments += [option, *([rng.choice(more[option])] if more[option] else [])]
        if rng.random() < 0.05:
            arguments.insert(rng.randrange(len(arguments)), rng.choice(NAMES))
        peak_and_now(reset=True)
        capfd.readouterr()
        try:
            status = main(arguments)
        except SystemExit as ended:
            status = ended.code
        except BaseException as error:
            frame = traceback.extract_tb(error.__traceback__)[-1]
            status = f"{type(error).__name__}: {error} ({frame.filename}:{frame.lineno})"[:400]
        said, peak = capfd.readouterr().err.splitlines(), peak_and_now()[0]
        most = max(most, peak)
        in_a_line = status == 0 or (status == 2 and len(said) and said[-1].startswith("rattn: "))
        statuses[status] += 1
        if not in_a_line or peak > untouched + 10**9:
            wrong.append(f"{[part[:60] for part in arguments]}: {status}, {peak - untouched:,} bytes, {said[-1:]}")
        if number % 50 == 49:
            jax.clear_caches()
    assert not wrong, "\n".join([f"{len(wrong)} of {count}:", *wrong])
    for path, content in kept.items():
        assert (tmp_path / path).read_bytes().startswith(content), path
    with capfd.disabled():
        above = (most - untouched) / 1e6
        print(f"{count} lists: {statuses[0]} ran, {statuses[2]} refused; at most {above:.0f} MB above the untouched")
