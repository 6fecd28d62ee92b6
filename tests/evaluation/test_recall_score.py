"""`rattn evaluate`: an untrained run scores about chance, in pieces as in one, and what cannot be read is an error."""

import dataclasses
import json
import re
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from training_child import MODEL, SAMPLE, training

from rattn_eqx.__main__ import main
from rattn_eqx.data.corpus import build_corpus
from rattn_eqx.data.tokenizers import BPETokenizer, ByteTokenizer, Tokenizer
from rattn_eqx.evaluation.recall import evaluate_task, make_task, parse_lengths, parse_options, predict, tasks
from rattn_eqx.model.language_model import LanguageModel
from rattn_eqx.tasks.recall import share_beyond
from rattn_eqx.tasks.recall_text import needle
from rattn_eqx.training.checkpoint import save_checkpoint
from rattn_eqx.training.config import RunConfig
from rattn_eqx.training.loop import initial_state
from rattn_eqx.training.run_folder import identity, open_run

OPTIONS = {
    "mqar": {"num_pairs": 4, "num_queries": 4},
    "needle": {"num_keys": 2},
    "variables": {"hops": 1},
    "common_words": {"num_common": 2, "common": 4, "rare": 1},
    "frequent_words": {"num_frequent": 1},
}


def make_run(folder: Path, tokenizer: Tokenizer) -> Path:
    """A run folder whose only checkpoint was never trained."""
    model = dataclasses.replace(MODEL, vocabulary_size=tokenizer.vocabulary_size, num_layers=2)
    config = RunConfig(model, training(), "of no corpus")
    open_run(folder, config, tokenizer)
    metadata = {"run": identity(config, tokenizer)}
    save_checkpoint(folder / "checkpoints", 0, eqx.filter_jit(initial_state)(config), metadata)
    return folder


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return eqx.filter_jit(LanguageModel)(MODEL, key=jax.random.key(0))


@pytest.fixture(scope="module")
def bpe(tmp_path_factory) -> BPETokenizer:
    return BPETokenizer.train(build_corpus(SAMPLE, tmp_path_factory.mktemp("cache")), 400)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "run", ByteTokenizer())


def test_an_untrained_run_scores_about_chance_at_every_length(run, tmp_path, capsys):
    for task in tasks:  # in one test, so that each length is compiled once
        out_path = tmp_path / f"{task}.jsonl"
        arguments = ["--run", str(run), "--task", task, "--lengths", "160,192", "--samples", "60", "--seed", "3"]
        for name, value in OPTIONS.get(task, {}).items():
            arguments += ["--option", f"{name}={value}"]
        assert main(["evaluate", *arguments, "--out", str(out_path)]) == 0
        out = capsys.readouterr().out
        rows = [json.loads(line) for line in out_path.read_text().splitlines()]
        assert [row["length"] for row in rows] == [160, 192]
        for row in rows:
            assert (row["run"], row["task"], row["samples"], row["seed"]) == (str(run), task, 60, 3)
            assert 0 <= row["accuracy"] <= row["chance"] + 4 * (row["chance"] / row["answers"]) ** 0.5
            assert row["exact"] <= row["accuracy"]
            assert row["window"] == 8
            assert 0 < row["beyond_layers"] <= row["beyond_window"] <= 1
            assert sum(positions for _, _, positions, _ in row["by_distance"]) == row["positions"]
            right = sum(positions * accuracy for _, _, positions, accuracy in row["by_distance"])
            np.testing.assert_allclose(right, row["accuracy"] * row["positions"], atol=1e-6)
            assert f"{task}, length {row['length']}: accuracy {row['accuracy']:.3f}, chance {row['chance']:.3f}" in out
            for low, high, positions, accuracy in row["by_distance"]:
                assert re.search(rf"distance +{low} to +{high - 1}: {accuracy:.3f} of {positions:,}\n", out)
        if task == "bigrams":
            assert rows[0]["by_distance"][0][0] >= 8  # the run's window, unless an option gives another


def test_predictions_in_pieces_are_those_of_each_sample_alone(model):
    tokens = np.asarray(jax.random.randint(jax.random.key(1), (5, 40), 0, 256), np.int32)
    alone = np.stack([np.argmax(eqx.filter_jit(model)(jnp.asarray(row)), axis=-1) for row in tokens])
    for max_logits in (1, 2 * 40 * 258):
        np.testing.assert_array_equal(predict(model, tokens, max_logits=max_logits), alone)


@pytest.fixture
def foresight(monkeypatch: pytest.MonkeyPatch) -> None:
    """Predictions are the tokens that follow; the last one, which no text task scores, is not known."""
    shift = lambda model, tokens, **_: np.concatenate([tokens[:, 1:], np.zeros((len(tokens), 1), np.int32)], axis=1)
    monkeypatch.setattr("rattn_eqx.evaluation.recall.predict", shift)


@pytest.mark.usefixtures("foresight")
def test_right_predictions_score_one(run, capsys):
    arguments = ["--lengths", "300", "--option", "num_queries=3"]
    assert main(["evaluate", "--run", str(run), "--task", "needle", *arguments]) == 0
    out = capsys.readouterr().out
    assert "accuracy 1.000, chance 0.100; 1.000 of 192 answers whole" in out
    assert "evidence beyond the window of 8: 100.0%" in out


@pytest.mark.usefixtures("foresight")
def test_the_corpus_haystack_comes_from_a_file(run, tmp_path, capsys):
    (tmp_path / "text.txt").write_text("lorem ipsum " * 50)
    arguments = ["evaluate", "--run", str(run), "--task", "needle", "--lengths", "200", "--samples", "2"]
    out = ["--out", str(tmp_path / "rows.jsonl")]
    assert main([*arguments, *out, "--text", str(tmp_path / "text.txt")]) == 0
    assert json.loads((tmp_path / "rows.jsonl").read_text())["options"] == {"haystack": "corpus", "text": "600 bytes"}
    assert main([*arguments, "--option", "haystack=corpus"]) == 2
    assert "needs a text of at least 162 bytes" in capsys.readouterr().err


@pytest.mark.usefixtures("foresight")
def test_rows_tell_local_layers_reach():
    for pattern in (("local",), ("global",)):
        config = dataclasses.replace(MODEL, num_layers=3, window=128, pattern=pattern)
        model = eqx.filter_eval_shape(LanguageModel, config, key=jax.random.key(0))
        options = {"num_keys": 2}
        [(_, row)] = evaluate_task(model, ByteTokenizer(), "needle", [300], samples=50, seed=0, options=options)
        assert row["accuracy"] == row["exact"] == 1
        if pattern == ("local",):
            assert (row["window"], row["beyond_layers"]) == (128, 0)
            assert row["beyond_window"] == share_beyond(needle(0, 50, 300, num_keys=2), 128)
        else:
            assert row["window"] is row["beyond_window"] is row["beyond_layers"] is None


def test_tasks_that_a_run_cannot_hold_are_errors(bpe):
    shapes = lambda config: eqx.filter_eval_shape(LanguageModel, config, key=jax.random.key(0))
    model, other = shapes(MODEL), shapes(dataclasses.replace(MODEL, vocabulary_size=bpe.vocabulary_size))
    for task in ("needle", "variables"):
        with pytest.raises(ValueError, match=f"evaluate: {task} is written in bytes and needs the byte tokenizer; got"):
            make_task(task, other, bpe, 0, 1, 400, {})
    batch = make_task("variables", other, bpe, 0, 1, 400, {"level": "token"})
    assert batch.vocabulary_size == bpe.document
    assert make_task("mqar", model, ByteTokenizer(), 0, 1, 400, {}).vocabulary_size == 256
    with pytest.raises(ValueError, match="got a task of 301 ids and a run with 256, its special tokens left out"):
        make_task("bigrams", model, ByteTokenizer(), 0, 1, 400, {"num_symbols": 300})
    with pytest.raises(ValueError, match="got a task of 257 ids and a run with 256"):
        make_task("mqar", model, ByteTokenizer(), 0, 1, 400, {"vocabulary_size": 257})
    with pytest.raises(ValueError, match=r"give 2\d\d ids, less length, or level='byte'"):
        make_task("common_words", model, ByteTokenizer(), 0, 1, 600, {"level": "token"})


def test_attribution_is_printed_and_written(run, tmp_path, capsys):
    arguments = ["--run", str(run), "--task", "mqar", "--lengths", "96", "--samples", "10", "--attribution"]
    assert main(["evaluate", *arguments, "--out", str(tmp_path / "out.jsonl")]) == 0
    out = capsys.readouterr().out
    row = json.loads((tmp_path / "out.jsonl").read_text())
    found = row["attribution"]
    names = ["whole", "window off", "residual off"]
    assert [*found["accuracy"]] == [*found["memory"]] == names
    assert found["accuracy"]["whole"] == row["accuracy"]
    assert "  accuracy: " + ", ".join(f"{name} {found['accuracy'][name]:.3f}" for name in names) in out
    assert [*found["residual_share"]] == ["0", "1"]
    assert all(0 < share < 1 for share in found["residual_share"].values())
    beyond = {name: [change for low, _, change in found["memory"][name] if low >= 16] for name in names}
    assert min(beyond["whole"]) > 0
    assert max(beyond["residual off"]) == 0  # two windows of 8 reach 14 back
    assert [high - low for low, high, _ in found["memory"]["whole"]] == [1, 2, 4, 8, 16, 32, 64]
    assert len(re.findall(r"distance +\d+ to +\d+: +[\d.e-]+ +[\d.e-]+ +[\d.e-]+\n", out)) == 7


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--task", "recite"], "no task 'recite'; the tasks are mqar, bigrams, needle"),
        (["--option", "depth=3"], "mqar has no option depth; its options are num_pairs, num_queries, gap"),
        (["--option", "num_pairs=many"], "mqar takes no option of such a kind; got num_pairs='many'"),
        (["--option", "num_pairs"], "an option must be NAME=VALUE such as num_pairs=8; got 'num_pairs'"),
        (["--lengths", "1k,x"], "lengths must be numbers above 0 such as 512,1k,2k; got 'x'"),
        (["--lengths", "512,16"], "mqar: pairs, gap >= 0 and queries must fit in length"),
        (["--samples", "0"], "mqar: n must be at least 1; got 0"),
    ],
)
def test_mistakes_are_one_line(arguments, message, run, capsys):
    assert main(["evaluate", "--run", str(run), "--task", "mqar", *arguments]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert not captured.out


def test_no_run_is_an_error(tmp_path, capsys):
    assert main(["evaluate", "--run", str(tmp_path), "--task", "mqar"]) == 2
    assert "is not a run folder" in capsys.readouterr().err


def test_lengths_and_options_are_read():
    assert parse_lengths("64,1k,2K") == [64, 1024, 2048]
    assert parse_options(["num_pairs=8", "key=hex", "gap=-1"]) == {"num_pairs": 8, "key": "hex", "gap": -1}
