"""`rattn`: what it writes, what it prints, and how it takes a user's mistakes."""

import argparse
import contextlib
import dataclasses
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import weakref
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from training_child import MODEL, SAMPLE, training

from pallas import feature_map
from rattn_eqx import arguments, interrupt
from rattn_eqx.__main__ import main
from rattn_eqx.ablation import grids
from rattn_eqx.ablation.layer import Departures
from rattn_eqx.ablation.trial import Trial
from rattn_eqx.commands import _parser
from rattn_eqx.data.tokenizers import ByteTokenizer, load_tokenizer
from rattn_eqx.inference import cost
from rattn_eqx.model.config import ModelConfig
from rattn_eqx.model.presets import presets
from rattn_eqx.training.config import RunConfig, TrainConfig
from rattn_eqx.training.loop import load_model
from rattn_eqx.training.run_folder import load_config, open_run, read_metrics

TINY = ["--steps", "6", "--context", "32", "--window", "8", "--pattern", "local", "--sample-tokens", "8"]
TINY += ["--evaluation-tokens", "256", "--evaluate-every", "3", "--checkpoint-every", "4", "--devices", "1"]


def rattn(*arguments: object, scratch: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs a command in a fresh process: `pretrain` sets the number of devices, once a process."""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])} | environment
    if scratch is not None:
        environment |= {"JAX_COMPILATION_CACHE_DIR": str(scratch), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    command = [sys.executable, "-m", "rattn_eqx", *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, encoding="utf-8")


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("command_line")


@pytest.fixture(scope="module")
def pretrain_arguments(scratch: Path) -> list[object]:
    return ["pretrain", "--out", scratch / "run", "--corpus", SAMPLE, "--cache", scratch / "cache", *TINY]


@pytest.fixture(scope="module")
def finished(scratch: Path, pretrain_arguments: list[object]) -> subprocess.CompletedProcess[str]:
    done = rattn(*pretrain_arguments, scratch=scratch / "compiled")
    assert done.returncode == 0, done.stderr
    return done


def test_pretrain_leaves_a_run_folder(finished, scratch):
    folder = scratch / "run"
    present = {path.name for path in folder.iterdir()}
    files = {"config.json", "tokenizer.json", "metrics.jsonl", "results.json", "loss.png", "sample.txt"}
    assert present == files | {"checkpoints", ".lock"}
    assert [path.name[:13] for path in sorted((folder / "checkpoints").iterdir())] == ["step_00000004", "step_00000006"]
    rows = read_metrics(folder)
    assert [row["step"] for row in rows] == [1, 2, 3, 3, 4, 5, 6, 6]
    results = json.loads((folder / "results.json").read_text())
    bits = results["bits_per_byte"]
    assert list(bits) == ["this model", "this model, residual branch off", "order-3 byte model", "gzip -9"]
    assert bits["this model"] == rows[-1]["validation_bits_per_byte"]
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert (folder / "sample.txt").read_bytes().startswith(b"def ")


def test_pretrain_prints_the_manifest_and_what_to_beat(finished, scratch):
    manifest = json.loads(next((scratch / "cache").glob("files-*/manifest.json")).read_text())
    results = json.loads((scratch / "run" / "results.json").read_text())
    bits, out = results["bits_per_byte"], finished.stdout
    assert f"corpus {SAMPLE}" in out
    assert manifest["sha256"] in out
    for name in ("order-3 byte model", "gzip -9"):
        assert f"{name} {bits[name]:.3f}" in out.split("to beat")[1].splitlines()[0]
        assert f"{name:<34}{bits[name]:.3f}" in out
    assert f"{results['parameters']:,} parameters, window 8, context 32, residual branch on" in out
    assert "6 steps of 2 x 32 tokens on 1 cpu device(s)" in out
    assert (scratch / "run" / "sample.txt").read_text().strip() in out
    assert f"run folder {scratch / 'run'}, " in out


def test_the_same_command_again_finishes_without_training(finished, pretrain_arguments, scratch):
    folder = scratch / "run"
    keep = ["metrics.jsonl", "results.json", "sample.txt", "config.json"]
    before = {name: (folder / name).read_bytes() for name in keep}
    (folder / "results.json").unlink()  # as if stopped after the last step
    again = rattn(*pretrain_arguments, scratch=scratch / "compiled")
    assert again.returncode == 0, again.stderr
    assert {name: (folder / name).read_bytes() for name in keep} == before
    assert "resuming after step 6 from " in again.stdout


def test_pretrain_on_bpe_tokens_and_go_on(pretrain_arguments, scratch):
    folder = scratch / "bpe"
    command = [*pretrain_arguments, "--out", folder, "--tokenizer", "bpe", "--vocabulary", "400"]
    outputs = []
    for _ in range(2):
        done = rattn(*command, scratch=scratch / "compiled")
        assert done.returncode == 0, done.stderr
        results = json.loads((folder / "results.json").read_text())
        names = ["this model", "this model, residual branch off", "order-3 byte model", "gzip -9"]
        assert list(results["bits_per_byte"]) == names
        assert all(0 < bits < 16 for bits in results["bits_per_byte"].values())
        assert [row["step"] for row in read_metrics(folder)] == [1, 2, 3, 3, 4, 5, 6, 6]
        outputs.append(done.stdout)
        for checkpoint in (folder / "checkpoints").glob("step_00000006.*"):
            checkpoint.unlink()  # as if stopped after step 4
    assert "resuming after step" not in outputs[0]
    assert "resuming after step 4 from " in outputs[1]
    tokenizer = load_tokenizer(folder / "tokenizer.json")
    assert tokenizer.vocabulary_size == load_config(folder).model.vocabulary_size == 400
    assert results["validation_bytes"] > 256  # 256 tokens of more than a byte


def test_generate(finished, scratch, capfdbinary):
    command = ["generate", "--run", str(scratch / "run"), "--prompt", "The ", "--num-tokens", "6"]

    def generated(*options: str) -> bytes:
        assert main([*command, *options]) == 0
        return capfdbinary.readouterr().out

    greedy = generated("--temperature", "0")
    assert greedy.startswith(b"The ")
    assert greedy.endswith(b"\n")
    assert len(greedy) == len(b"The ") + 6 + 1
    assert generated("--temperature", "0", "--seed", "1") == greedy
    assert generated("--top-k", "1", "--seed", "2") == greedy
    drawn = generated("--temperature", "2", "--top-k", "200", "--top-p", "0.99", "--seed", "3")
    assert drawn != greedy
    assert len(b"The \n") < len(drawn.decode()) <= len(greedy), "some are no text, or parts of characters"


def test_generate_from_one_prompt_ends_before_a_stop_string(finished, scratch, capfdbinary):
    command = ["generate", "--run", str(scratch / "run"), "--prompt", "The ", "--temperature", "2", "--seed", "3"]

    def generated(*options: str) -> tuple[bytes, str]:
        assert main([*command, *options]) == 0
        said = capfdbinary.readouterr()
        return said.out, said.err.decode()

    whole, told = generated("--num-tokens", "70")
    text = whole[len("The ") : -1].decode()
    held = f"caches of 1 x {cost.cache_bytes(load_config(scratch / 'run').model, 1, dtype='float32'):,} bytes\n"
    assert re.fullmatch(f"rattn: 70 tokens, [0-9,]+ tokens/s after the first 1; {held}", told)
    at_once, told = generated("--num-tokens", "70", "--no-stream", "--max-length", "80")
    assert at_once == whole
    assert "70 tokens, " in told
    assert "tokens/s after the first 64; " in told
    _, told = generated("--num-tokens", "9", "--no-stream")
    assert told == f"rattn: 9 tokens, {held}", "a speed, of tokens that all came at once"
    stop = text[20:23]
    assert generated("--num-tokens", "70", "--stop", "no such text", "--stop", stop)[0].decode() == (
        "The " + text[: text.index(stop)] + "\n"
    )


def test_generate_from_several_prompts_writes_lines_of_json(finished, scratch, tmp_path, capfd, monkeypatch):
    command = ["generate", "--run", str(scratch / "run"), "--num-tokens", "6", "--temperature", "0"]

    def generated(*options: str) -> list[dict]:
        assert main([*command, *options]) == 0
        said = capfd.readouterr()
        assert re.search(r"rattn: \d+ tokens, .*caches of \d x [0-9,]+ bytes\n", said.err)
        return sorted(map(json.loads, said.out.splitlines()), key=lambda row: row["index"])

    given = ["The ", "caf\xe9 \f x", ""]
    rows = generated("--prompt", given[0], "--prompt", given[1], "--prompt", given[2])
    assert [row["prompt"] for row in rows] == given
    assert [set(row) for row in rows] == [{"index", "prompt", "text", "ended"}] * 3
    assert {row["ended"] for row in rows} == {"count"}
    lines = "\r\n".join(given[1:]).encode() + b"\r\n"
    (tmp_path / "prompts").write_bytes(lines)
    assert generated("--prompt", given[0], "--prompts", str(tmp_path / "prompts")) == rows
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines.rstrip()), encoding="ascii"))
    assert generated("--prompts", "-", "--no-stream") == [row | {"index": 0} for row in rows[1:2]]
    assert [row["text"] for row in generated("--prompt", "a", "--prompt", "b", "--num-tokens", "0")] == ["", ""]


def test_mistakes_in_prompts_print_one_line(finished, scratch, tmp_path, capfd, monkeypatch):
    command = ["generate", "--run", str(scratch / "run"), "--num-tokens", "6"]
    (tmp_path / "latin").write_bytes("caf\xe9\n".encode("latin-1"))
    (tmp_path / "empty").touch()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"")))
    for options, words in (
        (["--prompts", str(tmp_path / "latin")], "latin is not: 'utf-8' codec can't decode byte 0xe9"),
        (["--prompts", str(tmp_path / "empty")], "empty must have a prompt on each line; it is empty"),
        (["--prompts", "-"], "the standard input must have a prompt on each line; it is empty"),
        (["--prompts", str(tmp_path)], "must be a regular file; it is a folder"),
        (["--prompts", str(tmp_path / "none")], "No such file"),
        (["--stop", ""], "stop must be strings of at least one character"),
        (["--max-length", "0"], "max_length must be at least 1; got 0"),
        (["--num-tokens", "-1"], "num_tokens must be at least 0"),
    ):
        assert main([*command, *options]) == 2, options
        said = capfd.readouterr()
        [line] = said.err.splitlines()
        assert line.startswith("rattn: ")
        assert words in line
        assert said.out == ""


def test_evaluate_the_perplexity_of_a_file(finished, scratch, tmp_path, capfd):
    text = tmp_path / "text"
    text.write_bytes(b"A text of some length.\n" * 12)
    command = ["evaluate", "--run", str(scratch / "run"), "--perplexity", str(text), "--out", str(tmp_path / "rows")]
    assert main(command) == 0
    out = capfd.readouterr().out.splitlines()
    [row] = map(json.loads, (tmp_path / "rows").read_text().splitlines())
    bins = row["bins"]
    assert [(x["low"], x["high"]) for x in bins] == [(0, 128), (128, 256), (256, 276)]
    assert sum(x["num_bytes"] for x in bins) == 276
    nats = sum(x["nats"] for x in bins)
    assert out[0] == (
        f"{text}, 276 tokens after the first: perplexity {np.exp(nats / 276):.3f}, "
        f"{nats / np.log(2) / 276:.3f} bits per byte"
    )
    assert [line.split()[:4] for line in out[1:]] == [
        ["position", str(x["low"]), "to", f"{x['high'] - 1}:"] for x in bins
    ]
    model, tokenizer, _ = load_model(scratch / "run", report=lambda line: None)
    tokens = np.array([tokenizer.document, *text.read_bytes()], np.int32)
    logs = jax.nn.log_softmax(model(jnp.asarray(tokens[:-1])))
    assert nats == pytest.approx(-np.asarray(logs)[np.arange(276), tokens[1:]].sum(), rel=1e-5)


def test_evaluate_a_task_or_a_text(finished, scratch, tmp_path, capfd):
    command = ["evaluate", "--run", str(scratch / "run")]
    (tmp_path / "empty").touch()
    for options, words in (
        ([], "evaluate: --task or --perplexity must be given, and one of them; got neither"),
        (["--task", "mqar", "--perplexity", "x"], "and one of them; got both"),
        (["--perplexity", str(tmp_path / "none")], "No such file"),
        (["--perplexity", str(tmp_path)], "must be a regular file; it is a folder"),
        (["--perplexity", str(tmp_path / "empty")], "empty must have text; it is empty"),
    ):
        assert main([*command, *options]) == 2, options
        said = capfd.readouterr()
        [line] = said.err.splitlines()
        assert line.startswith("rattn: ")
        assert words in line
        assert said.out == ""


def test_cost_prints_the_papers_saving(capsys):
    assert main(["cost", "--preset", "paper_12b", "--window", "1024", "--context", "4096"]) == 0
    out = capsys.readouterr().out
    (saved,) = [line for line in out.splitlines() if line.strip().startswith("saved")]
    assert "56.2%" in saved or "56.3%" in saved
    assert "12,835," in out


def test_defaults_are_those_of_the_train_config():
    options = _parser().parse_args(["pretrain"])
    for field in dataclasses.fields(TrainConfig):
        if field.default is not dataclasses.MISSING:
            assert getattr(options, field.name) == field.default, field.name


def test_help(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    out = capsys.readouterr().out
    (commands,) = [action for action in _parser()._actions if isinstance(action, argparse._SubParsersAction)]
    names = {"pretrain", "import", "convert", "generate", "evaluate", "ablate", "cost", "cache"}
    assert set(commands.choices) == names
    for name, command in commands.choices.items():
        assert name in out
        with pytest.raises(SystemExit) as ended:
            main([name, "--help"])
        assert ended.value.code == 0
        shown = capsys.readouterr().out
        assert "(default: None)" not in shown
        for action in command._actions:
            called = action.option_strings[-1] if action.option_strings else action.metavar
            assert called in shown
            assert action.help, f"{name} {called} has no explanation"


def test_module_and_script_are_the_same(pretrain_arguments):
    shown = rattn("--help")
    assert shown.returncode == 0
    assert shown.stdout.startswith("usage: rattn ")
    assert rattn().returncode == 2


def mistakes(folder: Path) -> dict[str, tuple[list[str], str]]:
    """Mistakes that are found before a device is touched, and what is said of each."""
    empty, binary, cache = folder / "empty", folder / "binary.bin", folder / "cache"
    empty.mkdir()
    binary.write_bytes(bytes(range(256)))
    other = folder / "other"
    open_run(other, RunConfig(MODEL, training(), "0" * 64), ByteTokenizer())
    plot = folder / "plot" / "loss.png"
    plot.mkdir(parents=True)
    (loop := folder / "loop").symlink_to(loop)
    pretrain = ["pretrain", "--cache", str(cache), "--out", str(folder / "out")]
    sample = [*pretrain, "--corpus", str(SAMPLE), *TINY]
    nowhere = [*sample, "--corpus", str(folder / "no")]  # what is refused before there is a corpus
    (mine := folder / "mine.py").write_text("phi = lambda x: x - x.mean()\n")
    no_run = f"load_config: {empty} is not a run folder, it has no config.json; start one with `rattn pretrain`"
    return {
        "missing corpus": ([*pretrain, "--corpus", str(folder / "no")], f"build_corpus: no file or folder at {folder}"),
        "empty folder": ([*pretrain, "--corpus", str(empty)], f"build_corpus: no text files under {empty}; give a "),
        "binary file": ([*pretrain, "--corpus", str(binary)], "build_corpus: none of the 1 files under "),
        "feature map": ([*sample, "--feature-map", "sofmax"], "ModelConfig: feature_map must be one of softmax, "),
        "pattern": (
            [*sample, "--pattern", "local,globe"],
            "ModelConfig: pattern[1] must be 'local' or 'global' or 'global_rope'; got 'globe'",
        ),
        "window": ([*sample, "--window", "-1"], "window must be at least 0"),
        "warm-up": ([*nowhere, "--warmup-steps", "6"], "TrainConfig: warmup_steps must be at least 0 and less than "),
        "steps": ([*sample, "--steps", "0"], "TrainConfig: steps must be at least 1; got 0"),
        "devices": (
            [*sample, "--devices", "-1", "--out", str(folder / "devices")],
            "devices must be at least 1; got -1",
        ),
        "evaluation": ([*sample, "--evaluation-tokens", "0"], "evaluation_tokens must be at least 1; got 0"),
        "context": ([*sample, "--context", "1000000"], "the split is shorter than one window; got "),
        "map that mixes": (
            [*nowhere, "--feature-map", f"{mine}:phi"],
            "phi_q must act on the last axis alone; <lambda> (mine.py:1) mixes tokens or heads",
        ),
        "other run": (
            [*nowhere, "--out", str(other)],
            f"{other} holds a run of another config: model.model_width is 16",
        ),
        "no run": (["generate", "--run", str(empty)], no_run),
        "no checkpoint": (["generate", "--run", str(other)], f"load_model: {other} has no checkpoint yet; let `rattn"),
        "sample": ([*sample, "--sample-tokens", "-1"], "pretrain: sample_tokens must be at least 0; got -1"),
        "prompt": ([*sample, "--prompt", "caf\udce9"], "argument --prompt: must be UTF-8 text; got 'caf\\udce9'"),
        "plot": ([*sample, "--out", str(plot.parent)], f"pretrain: {plot} must be a file; it is a folder; remove it"),
        "memory": (
            [*sample, "--batch-size", "1000000000"],
            "a batch of 1000000000 x 32 tokens and a model of width 96 ",
        ),
        "devices, many": ([*sample, "--devices", "1000000000"], "devices must be at least 1; got 1000000000; at most "),
        "samples": (
            ["evaluate", "--run", "x", "--task", "mqar", "--samples", "1" + "0" * 11],
            "argument --samples: must",
        ),
        "seed": (["generate", "--run", "x", "--seed", "9" * 23], "argument --seed: must be a whole number from 0 to "),
        "digits": (["cost", "--context", "9" * 400], "argument --context: must be a whole number from "),
        "circle": ([*sample, "--cache", str(loop)], "argument --cache: must not lead in a circle of links; got "),
        "no command": ([], "the following arguments are required: COMMAND; see rattn --help"),
        "cost window": (["cost", "--window", "-5"], "window must be at least 0"),
        "cost context": (["cost", "--context", "0"], "context must be at least 1; got context=0"),
    }


# Each command in a process of its own, forked where everything is imported and no device touched.
SEVERAL = """
import json, os, sys, traceback
import rattn_eqx.inference.cost, rattn_eqx.pretrain
from rattn_eqx.__main__ import main

for arguments in json.loads(sys.argv[1]):
    print("next", file=sys.stderr, flush=True)
    if (child := os.fork()) == 0:
        try:
            print("status", main(arguments), file=sys.stderr, flush=True)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(0)
    os.waitpid(child, 0)
"""


@pytest.fixture(scope="module")
def mistakes_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("mistakes")


@pytest.fixture(scope="module")
def told(mistakes_folder: Path) -> dict[str, tuple[str, str]]:
    """For each mistake what should be said, and what was."""
    cases = mistakes(mistakes_folder)
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    arguments = json.dumps([arguments for arguments, _ in cases.values()])
    command = [sys.executable, "-W", "ignore:os.fork", "-c", SEVERAL, arguments]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=True)
    said = run.stderr.split("next\n")[1:]
    return {name: (message, text) for (name, (_, message)), text in zip(cases.items(), said, strict=True)}


NAMES = ["missing corpus", "empty folder", "binary file", "feature map", "pattern", "window", "warm-up", "steps"]
NAMES += ["devices", "evaluation", "context", "other run", "no run", "no checkpoint", "cost window", "cost context"]
NAMES += ["sample", "prompt", "plot", "memory", "devices, many", "samples", "seed", "digits", "circle", "no command"]
NAMES += ["map that mixes"]


@pytest.mark.parametrize("name", NAMES)
def test_a_mistake_prints_one_line(told, name: str):
    message, said = told[name]
    assert "Traceback" not in said, said
    line, status = said.splitlines()
    assert line.startswith("rattn: ")
    assert message in line
    assert status == "status 2"


def test_a_mistake_leaves_no_run_folder(told, mistakes_folder: Path):
    """Else the same command, put right, would be refused: the folder would hold a run of another config."""
    assert told
    assert not (mistakes_folder / "out").exists()


@pytest.mark.parametrize("name", ["temperature", "top-k", "top-p"])
def test_bad_sampling_options_print_one_line(finished, scratch, capfd, name: str):
    assert main(["generate", "--run", str(scratch / "run"), f"--{name}", "-1"]) == 2
    said = capfd.readouterr()
    assert len(said.err.splitlines()) == 1
    assert said.err.startswith("rattn: ")
    assert f"{name.replace('-', '_')} must" in said.err
    assert said.out == "", "text before the mistake was found"


def test_a_damaged_run_folder_prints_one_line(finished, scratch, tmp_path, capfdbinary):
    for damage in ("checkpoints", "config.json", "tokenizer.json"):
        folder = tmp_path / damage
        shutil.copytree(scratch / "run", folder)
        for path in (folder / damage).iterdir() if damage == "checkpoints" else [folder / damage]:
            path.write_bytes(path.read_bytes()[:10])
        assert main(["generate", "--run", str(folder)]) == 2
        lines = capfdbinary.readouterr().err.decode().splitlines()
        assert all(line.startswith("rattn: ") for line in lines)
        assert str(folder) in lines[-1]
        assert len(lines) == 1


def test_a_locale_that_knows_no_accents(finished, pretrain_arguments, scratch):
    """The sample is in UTF-8; what is printed is replaced."""
    plain = {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "C"}
    shutil.copytree(scratch / "run", folder := scratch / "accents")
    command = [*pretrain_arguments, "--out", folder, "--prompt", "caf\xe9 "]
    done = rattn(*command, scratch=scratch / "compiled", **plain)
    assert done.returncode == 0, done.stderr
    assert (folder / "sample.txt").read_bytes().startswith("caf\xe9 ".encode())
    assert "caf\\xe9 " in done.stdout


def test_printing_replaces_what_a_stream_cannot_show(monkeypatch):
    shown = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(shown, encoding="cp1252"))
    monkeypatch.setattr(cost, "describe_cost", lambda *_, **__: "caf\xe9 \u2192")
    assert main(["cost"]) == 0
    assert shown.getvalue() == b"caf\xe9 \\u2192" + os.linesep.encode()


def test_a_file_of_scores_that_cannot_be_written_is_refused_before_the_work(finished, scratch, capsys, monkeypatch):
    from rattn_eqx.evaluation import recall

    monkeypatch.setattr(recall, "evaluate_task", lambda *_, **__: pytest.fail("worked"))
    command = ["evaluate", "--run", str(scratch / "run"), "--task", "mqar", "--out"]
    for path, words in ((scratch / "no" / "scores", "No such file"), (scratch, "must be a regular file")):
        assert main([*command, str(path)]) == 2
        assert words in capsys.readouterr().err


def test_home_is_found_in_every_path(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    (commands,) = [action for action in _parser()._actions if isinstance(action, argparse._SubParsersAction)]
    names = {"--out", "--corpus", "--cache", "--run", "--text", "--grid", "--replay", "--prompts", "--perplexity"}
    given = {"evaluate": ["--task", "mqar"], "import": ["x", "--out=x"], "convert": ["x", "--out=x"]}
    for name, command in commands.choices.items():
        for action in command._actions:
            if names.intersection(action.option_strings):
                required = ["--run=x"] if name in ("generate", "evaluate") else []
                command_line = [name, *given.get(name, []), *required, f"{action.option_strings[-1]}=~/x"]
                found = getattr(_parser().parse_args(command_line), action.dest)
                assert str(found) == str(tmp_path / "x"), command_line
            else:
                assert action.type is not Path


def test_names_that_are_written_twice():
    assert tuple(presets) == arguments.PRESETS
    assert tuple(feature_map.named) == arguments.FEATURE_MAPS
    assert tuple(cost.hardwares) == arguments.HARDWARES
    assert tuple(grids.grids) == arguments.GRIDS
    kinds = {"model.FIELD": ModelConfig, "departures.FIELD": Departures, "training.FIELD": TrainConfig, "alone": Trial}
    left_out = {"rope_scaling", "vocabulary_size", "seed", "checkpoint_every", "evaluate_every"}  # of no use there
    left_out |= {"microbatches"}
    for head, kind in kinds.items():
        fields = {field.name for field in dataclasses.fields(kind)} - {*grids.NO_SETTINGS, *left_out}
        assert set(arguments.SETTINGS[head].split()) - {"task_options.NAME"} == fields


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("RESOURCE_EXHAUSTED: Out of memory\nallocating")])
def test_memory_that_runs_out_prints_one_line(monkeypatch, capsys, error):
    monkeypatch.setattr(cost, "describe_cost", lambda *_, **__: (_ for _ in ()).throw(error))
    assert main(["cost"]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("rattn: out of memory")


@pytest.mark.parametrize("error", [TypeError, KeyError, RuntimeError, AttributeError, RecursionError, OverflowError])
def test_a_bug_shows_its_traceback(monkeypatch, error):
    monkeypatch.setattr(cost, "describe_cost", lambda *_, **__: (_ for _ in ()).throw(error))
    with pytest.raises(error):
        main(["cost"])


def test_a_value_error_that_no_line_of_ours_raises_is_a_bug(monkeypatch):
    monkeypatch.setattr(cost, "describe_cost", lambda *_, **__: np.zeros(2) + np.zeros(3))
    with pytest.raises(ValueError, match="could not be broadcast"):
        main(["cost"])


def test_an_interrupt_that_ends_in_another_error_is_an_interrupt(monkeypatch, capsys):
    def work(*_, **__):
        try:
            raise KeyboardInterrupt
        finally:
            int("what a finally may meet on the way out")

    monkeypatch.setattr(cost, "describe_cost", work)
    assert main(["cost"]) == 130
    assert capsys.readouterr().err == "\nrattn: stopped\n"


# Ctrl-C when the module named first is imported, by a command that nothing slow is imported before.
INTERRUPTED = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
import rattn_eqx.__main__
assert not {"jax", "numpy", "pallas"} & set(sys.modules)

class Finder:
    def find_spec(name, *_):
        if name == sys.argv[1]:
            try:
                os.kill(os.getpid(), signal.SIGINT)
            except KeyboardInterrupt:
                os.abort()  # as an extension module may

sys.meta_path.insert(0, Finder)
sys.exit(rattn_eqx.__main__.main(sys.argv[2:]))
"""


@pytest.mark.parametrize("module", ["jax", "numpy.random"])
def test_an_interrupt_during_imports(module):
    command = [sys.executable, "-c", INTERRUPTED, module, "pretrain", "--out", "a b"]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, encoding="utf-8")
    assert (done.returncode, done.stdout) == (130, "")
    assert done.stderr == "\nrattn: stopped, resume with: rattn pretrain --out 'a b'\n"


def test_an_interrupt_that_is_swallowed_comes_again(monkeypatch, capsys):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it

    def work(*_, **__):
        with contextlib.suppress(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(5)
        try:
            time.sleep(5)
        finally:
            time.sleep(2 * interrupt.AGAIN)  # cleaning up is left alone
            cleaned.append(True)

    cleaned = []
    monkeypatch.setattr(cost, "describe_cost", work)
    assert main(["cost"]) == 130
    assert cleaned
    assert capsys.readouterr().err == "\nrattn: stopped\n"
    time.sleep(1.5 * interrupt.AGAIN)
    assert signal.signal(signal.SIGINT, before) is signal.default_int_handler


def test_an_interrupt_that_a_callback_swallows_comes_again_at_once(monkeypatch, capsys):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)

    def interrupted(_):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)

    def work(*_, **__):
        collected = set()
        watcher = weakref.ref(collected, interrupted)
        del collected
        time.sleep(5)
        return watcher

    monkeypatch.setattr(interrupt, "AGAIN", 60)
    monkeypatch.setattr(cost, "describe_cost", work)
    started = time.monotonic()
    assert main(["cost"]) == 130
    assert time.monotonic() - started < 3
    assert capsys.readouterr().err == "\nrattn: stopped\n"
    signal.signal(signal.SIGINT, before)


def test_a_reader_that_goes_away_ends_it_quietly():
    read, write = os.pipe()
    os.close(read)
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1]), "PYTHONUNBUFFERED": ""}
    for given, status in ((["cost"], 141), (["--help"], 0)):
        command = [sys.executable, "-m", "rattn_eqx", *given]
        done = subprocess.run(command, env=environment, stdout=write, stderr=subprocess.PIPE, timeout=60)
        assert (done.returncode, done.stderr) == (status, b"")
    os.close(write)
