"""A grid of trials: what a line says, that a grid goes on where it stopped, what a table says."""

import dataclasses
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rattn_eqx.__main__ import main
from rattn_eqx.ablation import grids, run
from rattn_eqx.ablation.grids import parse_settings, product
from rattn_eqx.ablation.layer import Departures
from rattn_eqx.ablation.rows import append_rows, read_rows, summary
from rattn_eqx.ablation.run import run_grid, run_trial, train_trial
from rattn_eqx.ablation.table import bootstrap, mean_and_half_width, paired_difference, table
from rattn_eqx.ablation.trial import Trial, migrated
from rattn_eqx.figures.curves import by_length
from rattn_eqx.model import map_files
from rattn_eqx.model.config import ModelConfig
from rattn_eqx.training.config import TrainConfig

pytestmark = pytest.mark.standard_dtype_promotion  # optax

TINY = Trial(
    "tiny",
    ModelConfig(
        vocabulary_size=258,
        model_width=8,
        num_layers=1,
        num_heads=1,
        num_kv_heads=1,
        head_size=8,
        feed_forward_width=8,
        window=3,
        pattern=("local",),
    ),
    TrainConfig(steps=3, batch_size=2, context=24, learning_rate=1e-2, warmup_steps=1),
    task="mqar",
    task_options={"num_pairs": 2, "num_queries": 2, "gap": 6},
    task_share=1,
    test_samples=4,
)
COMMITTED = Path(__file__).parents[2] / "data" / "runs" / "ablations.jsonl"
QUIET: dict[str, Any] = {"show_progress": False, "implementation": "reference"}  # which compiles soonest


@pytest.fixture(scope="module")
def rows():
    return run_trial(TINY, [0, 5], None, commit="c0ffee", **QUIET)


def test_a_line_holds_the_trial_and_what_came_of_it(rows):
    first, second = json.loads(json.dumps(rows))
    assert (first["seed"], second["seed"]) == (0, 5)
    assert first["commit"] == "c0ffee"
    assert first["tokens"] == 3 * 2 * 24
    assert [step for step, _ in first["losses"]] == [1, 2, 3]
    assert first["losses"] != second["losses"]
    [test] = first["tests"]
    assert (test["length"], test["positions"], test["beyond_window"]) == (24, 8, 1.0)
    assert first["without_residual"]["tests"][0]["accuracy"] is not None
    assert first["bits_per_byte"] is None
    assert Trial.from_json(first["name"], first["trial"]) == TINY
    assert "tiny" not in json.dumps(first["trial"])


def test_a_seed_trains_alone_as_it_trains_beside_others(rows):
    _, losses, skipped = train_trial(TINY, [5], None, **QUIET)
    assert np.allclose(losses[:, 0], [loss for _, loss in rows[1]["losses"]], atol=2e-4)
    assert skipped.tolist() == [0]


def test_a_loss_that_is_not_finite_is_counted_where_gradients_are(monkeypatch):
    really = run.mean_loss
    monkeypatch.setattr(run, "mean_loss", lambda *batch: really(*batch) + jax.lax.stop_gradient(jnp.nan))
    _, losses, skipped = train_trial(TINY, [0, 5], None, **QUIET)
    assert np.isnan(losses).all()
    assert skipped.tolist() == [3, 3]


def test_a_grid_goes_on_where_it_stopped(tmp_path, monkeypatch, rows):
    ran = []

    def record(trial, seeds, data, **options):
        ran.append((trial.name, seeds))
        return [
            row | {"name": trial.name, "trial": trial.to_json(), "seed": seed}
            for row, seed in zip(rows, seeds, strict=False)
        ]

    monkeypatch.setattr(run, "run_trial", record)
    trials, out = product([TINY], {"model.window": [2, 3, 4]}), tmp_path / "new" / "out.jsonl"
    run_grid(trials, [0], None, out, part=(1, 2), report=lambda _: None)
    assert ran == [("tiny window=2", [0]), ("tiny window=4", [0])]
    run_grid(trials, [0, 1], None, out, report=lambda _: None)
    assert ran[2:] == [("tiny window=2", [1]), ("tiny window=3", [0, 1]), ("tiny window=4", [1])]
    run_grid(trials, [0, 1], None, out, report=lambda _: None)
    assert len(ran) == 5
    renamed = [dataclasses.replace(trial, name=trial.name + "!") for trial in trials]
    run_grid(renamed, [0, 1], None, out, report=lambda _: None)
    assert len(ran) == 5  # a name changes nothing
    changed = product(trials, {"training.learning_rate": [1e-3]})
    run_grid(changed, [0, 1], None, out, report=lambda _: None)
    assert len(ran) == 8


@pytest.mark.parametrize("kind", ["all", "answers"])
def test_the_loss_is_the_mean_that_a_trial_names(kind):
    trial = dataclasses.replace(TINY, task_share=0.5, task_loss=kind)
    model = run.make_model(trial, key=jax.random.key(0), implementation="reference")
    rng = np.random.default_rng(0)
    sequences, answers = rng.integers(0, 256, (2, 25)), np.zeros((2, 24), bool)
    sequences[:, 0] = 256
    answers[0, [3, 17, 20]] = True  # the first sequence is the task's
    loss = jax.jit(lambda *batch: run._loss(model, trial, batch, jnp.ones(1, bool)))
    got = loss(jnp.asarray(sequences), jnp.asarray(answers))
    one = jax.jit(lambda tokens: model(tokens, jnp.zeros_like(tokens)))
    logits = np.stack([one(jnp.asarray(x[:-1])) for x in sequences]).astype(np.float64)
    nats = np.log(np.exp(logits).sum(-1)) - np.take_along_axis(logits, sequences[:, 1:, None], axis=-1)[..., 0]
    expected = nats.mean() if kind == "all" else nats[1].mean() + nats[0, [3, 17, 20]].mean()
    assert np.isclose(got, expected, rtol=1e-5)


def test_random_windows_and_a_dropped_branch_change_training(rows):
    plain = rows[0]["losses"][0][1]
    without = train_trial(dataclasses.replace(TINY, window_dropout=1), [0], None, **QUIET)[1]
    drawn = train_trial(dataclasses.replace(TINY, windows=(1, 24)), [0], None, **QUIET)
    assert abs(plain - without[0, 0]) > 1e-3
    assert abs(plain - drawn[1][0, 0]) > 1e-3
    local: Any = drawn[0].blocks[0].attention
    assert local.window == 3


def test_the_pool_is_as_many_tokens_at_every_length(monkeypatch):
    monkeypatch.setattr(run, "POOL", 100)
    assert len(run._sources(TINY, None)[1]) == 4
    monkeypatch.setattr(run, "POOL", 1000)
    assert len(run._sources(TINY, None)[1]) == 6, "no more than three steps of two samples read"


def test_text_and_samples_share_a_batch(tmp_path):
    rng = np.random.default_rng(0)
    for name in range(3):
        (tmp_path / f"{name}.txt").write_text(" ".join(map(str, rng.integers(0, 1000, 200))))
    data = run.load_data(str(tmp_path), tmp_path / "cache")
    training = dataclasses.replace(TINY.training, context=120, evaluation_tokens=240)
    trial = dataclasses.replace(
        TINY, task="needle", task_options={"haystack": "corpus", "num_keys": 1}, task_share=0.5, training=training
    )
    assert trial.needs_text
    [row] = json.loads(json.dumps(run_trial(trial, [0], data, attribution=True, **QUIET)))
    assert 6 < row["bits_per_byte"] < 14
    assert row["text"]["documents"] >= 1
    [[low, high, bits]] = row["text"]["by_position"]
    assert (low, high) == (0, 120)
    assert 6 < bits < 14
    found = row["attribution"]
    names = ["whole", "window off", "residual off"]
    assert [*found["bits_per_byte"]] == [*found["exact"]] == [*found["memory"]] == names
    assert len(set(found["bits_per_byte"].values())) == 3
    assert found["bits_per_byte"]["whole"] == row["bits_per_byte"]
    assert found["bits_per_byte"]["residual off"] == row["without_residual"]["bits_per_byte"]
    assert found["exact"]["whole"] == row["tests"][0]["exact"]
    assert row["corpus"] == data.sha256
    assert '"text"' not in json.dumps(row["trial"])
    with pytest.raises(ValueError, match="needs a text; got none"):
        train_trial(trial, [0], None, **QUIET)


def test_a_model_without_shares_is_attributed_all_the_same():
    model = dataclasses.replace(TINY.model, swa_gain=0.5)
    one_norm = dataclasses.replace(TINY, model=model, departures=Departures(branch_norm="sum"))
    [row] = run_trial(one_norm, [0], None, attribution=True, **QUIET)
    assert row["attribution"]["residual_share"] is None
    assert row["attribution"]["exact"]["whole"] == row["tests"][0]["exact"]


def test_the_command_runs_lists_replays_and_tabulates(tmp_path, capsys, monkeypatch):
    grid, out = tmp_path / "grid.py", tmp_path / "out.jsonl"
    monkeypatch.setattr(grids, "quick", lambda: [TINY])
    grid.write_text("from rattn_eqx.ablation.grids import quick\ntrials = quick()\n")
    assert main(["ablate", "--grid", str(grid), "--set", "model.window=2,3", "--list"]) == 0
    assert capsys.readouterr().out == (
        "trial          map      window  steps\ntiny window=2  softmax  2       3\ntiny window=3  softmax  3       3\n"
    )
    assert main(["ablate", "--grid", str(grid), "--seeds", "1", "--out", str(out), "--attribution"]) == 0
    [row] = read_rows(out)
    assert "memory" in row["attribution"]
    assert main(["ablate", "--replay", f"{out}:1"]) == 0
    then, now = capsys.readouterr().out.splitlines()[-2:]
    assert then.split()[1:5] == now.split()[1:5]
    assert main(["ablate", "--table", "--out", str(out)]) == 0
    assert "tiny" in capsys.readouterr().out
    for arguments, words in (
        (["--replay", f"{out}:2"], "a line from 1 to 1"),
        (["--grid", "nothing"], "no grid 'nothing'"),
        (["--set", "model.width=3"], "no setting 'model.width'"),
        (["--set", "model.num_valued_sinks=4"], "no setting 'model.num_valued_sinks'; it is departures"),
        (["--set", "model.window"], "NAME=VALUE,VALUE"),
        (["--set", "model.window=2", "--set", "model.window=3"], "model.window is set twice; give all its values"),
        (["--table"], "the results have no line; run a grid first"),
        (["--part", "3"], "must be i/n"),
        (["--table", "--out", str(out), "--baseline", "x"], "no trial 'x'"),
        (["--replay", f"{out}:²"], "a line from 1 to 1"),
        (["--only", "x"], "no trial has 'x' in its name; the grid has quick"),
        (["--set", "model.vocabulary_size=5"], "model.vocabulary_size must be at least 258"),
        (["--set", "model=3"], "no setting 'model'; use model.FIELD"),
        (["--set", "model.window=abc"], "ModelConfig: window must be an integer of at most 64 bits; got 'abc'"),
        (["--set", "training.steps=1.5"], "TrainConfig: steps must be an integer of at most 64 bits; got 1.5"),
        (["--set", "training.learning_rate=NaN"], "learning_rate must be a finite number"),
        (["--set", "training.seed=1"], "no setting 'training.seed'"),
        (["--set", "task_options.x=1"], "mqar has no option x"),
        (["--set", "task=" + "[" * 100_000], "no task '[["),
        (["--set", "model.num_layers=100000000000"], "must fit in memory"),
        (["--set", "test_samples=100000000000", "--seeds", "1"], "test_samples must be at least 1 and below 2**31"),
        (["--part", "3/2"], "1 <= i <= n; got 3/2"),
        (["--out", str(tmp_path)], "must be a regular file"),
    ):
        assert main(["ablate", "--out", str(tmp_path / "new.jsonl"), *arguments]) == 2
        assert words in capsys.readouterr().err


def test_the_command_runs_replays_and_tabulates_maps_of_a_file(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(grids, "quick", lambda: [TINY])
    monkeypatch.setitem(grids.grids, "quick", grids.quick)
    (mine := tmp_path / "mine.py").write_text(
        f"# {tmp_path}\nfrom pallas.feature_map import Hedgehog as make, relu\nphi = lambda x: relu(x) + 0.5\n"
    )
    maps, out = f"relu,{mine}:phi,{mine}:make", str(tmp_path / "out.jsonl")
    assert main(["ablate", "--feature-map", maps, "--seeds", "1", "--out", out]) == 0
    assert main(["ablate", "--set", f"model.feature_map={maps}", "--seeds", "1", "--out", out]) == 0
    assert capsys.readouterr().out.count("already in") == 3
    rows = read_rows(Path(out))
    assert [row.get("feature_map_source") for row in rows] == [None, mine.read_text(), mine.read_text()]
    sha256 = hashlib.sha256(mine.read_bytes()).hexdigest()
    assert rows[2]["trial"]["model"]["feature_map"] == f"mine.py:make:{sha256}"
    assert rows[2]["parameters"] == rows[1]["parameters"] + 8 * 8
    assert main(["ablate", "--table", "--out", out]) == 0
    shown = capsys.readouterr().out
    assert f"tiny feature_map=mine.py:phi:{sha256[:8]} " in shown
    assert "one seed" in shown
    assert "nan" not in shown

    monkeypatch.setattr(map_files, "_read", {})  # as in another process
    assert main(["ablate", "--replay", f"{out}:3"]) == 2
    assert "give --feature-map mine.py:make" in capsys.readouterr().err
    (tmp_path / "copy.py").write_text(rows[2]["feature_map_source"])
    assert main(["ablate", "--replay", f"{out}:3", "--feature-map", f"{tmp_path / 'copy.py'}:make"]) == 0
    then, now = capsys.readouterr().out.splitlines()[-2:]
    assert then.split()[1:5] == now.split()[1:5]
    mine.write_text(f"{mine.read_text()}\n")
    for line, name, words in (
        (3, "make", "must have the source of the model's map"),
        (3, "phi", "is not the model's, which has mine.py:make"),
        (1, "phi", "is not the model's, which has relu; leave it out"),
    ):
        assert main(["ablate", "--replay", f"{out}:{line}", "--feature-map", f"{mine}:{name}"]) == 2
        assert words in capsys.readouterr().err
    edited = json.dumps(rows[2] | {"feature_map_source": mine.read_text()})
    (tmp_path / "edited.jsonl").write_text(edited + "\n")
    with pytest.raises(ValueError, match=r"line 1 of .* is no result: feature_map_source is not that of model.feature"):
        read_rows(tmp_path / "edited.jsonl")


def test_a_map_that_cannot_be_trained_is_told_before_the_text_is_read(tmp_path, capsys):
    (mine := tmp_path / "mine.py").write_text("phi = lambda x: x - x.mean()\n")
    arguments = ["--grid", "larger", "--corpus", str(tmp_path / "none"), "--out", str(tmp_path / "out.jsonl")]
    assert main(["ablate", "--feature-map", f"{mine}:phi", *arguments]) == 2
    assert "mine.py:1) mixes tokens or heads" in capsys.readouterr().err
    (tmp_path / "out.jsonl").write_text("{}")
    assert main(["ablate", *arguments]) == 2
    assert "line 1 of" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("x = 1\ntrials = [x / 0]\n", "raised ZeroDivisionError: division by zero (line 2)"),
        ("x = 1\nx = (\n", "raised SyntaxError: '(' was never closed"),
        ("import sys\nsys.exit(3)\n", "raised SystemExit: 3 (line 2)"),
        ("trials = [1]", "must define `trials`, a list of Trial, at least one; got [1]"),
    ],
)
def test_a_grid_that_raises_names_the_users_line(tmp_path, capsys, text, words):
    (grid := tmp_path / "grid.py").write_text(text)
    assert main(["ablate", "--grid", str(grid), "--list"]) == 2
    [said] = capsys.readouterr().err.splitlines()
    assert f"ablate: {grid} {words}" in said


def test_a_grid_is_checked_before_its_first_trial(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "run_trial", lambda *_, **__: pytest.fail("ran"))
    trials = product([TINY], {"task_options.gap": [6, 600]})
    with pytest.raises(ValueError, match="must fit in length"):
        run_grid(trials, [0], None, tmp_path / "out.jsonl")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda row: [1], r"an object is needed, got \[1\]"),
        (lambda row: row | {"tests": 3}, "tests is 3"),
        (lambda row: row | {"tests": [3]}, "an object is needed, got 3"),
        (lambda row: row | {"seed": "0"}, "seed is '0'"),
        (lambda row: {**row, "trial": {}}, "model"),
        (lambda row: {**row, "trial": row["trial"] | {"task_share": "all"}}, "task_share must be"),
        (lambda row: row | {"bits_per_byte": float("nan")}, "NaN is no number of JSON"),
        (lambda row: None, "an object is needed"),
    ],
)
def test_a_line_that_is_no_result_is_named(tmp_path, rows, change, words):
    out = tmp_path / "out.jsonl"
    out.write_text(json.dumps(rows[0]) + "\n\n" + json.dumps(change(rows[0])) + "\n")
    with pytest.raises(ValueError, match=rf"ablate: line 3 of {out} is no result: .*{words}"):
        read_rows(out)
    out.write_text("[" * 100_000)
    with pytest.raises(ValueError, match="line 1 of"):
        read_rows(out)


def test_numbers_that_are_not_finite_are_null_and_said(tmp_path, rows):
    out, lost = tmp_path / "out.jsonl", [row | {"bits_per_byte": float("nan"), "skipped": 3} for row in rows]
    append_rows(out, lost)
    assert "NaN" not in out.read_text()
    assert [row["bits_per_byte"] for row in read_rows(out)] == [None, None]
    assert "written as null, in 2 of 2 lines" in summary(lost)
    assert "not finite: 3, 3" in summary(lost)
    assert "tiny" in table(read_rows(out))
    assert by_length({"tiny": read_rows(out)}, 24).axes


def test_lines_are_added_whole_or_not_at_all(tmp_path, rows, monkeypatch):
    out, write = tmp_path / "out.jsonl", os.write
    out.write_text(json.dumps(rows[0]))  # as an editor leaves it, without a newline
    append_rows(out, rows[1:])
    before = out.read_bytes()
    assert [row["seed"] for row in read_rows(out)] == [0, 5]

    def full(descriptor: int, data: bytes) -> int:
        if len(data) <= 50:
            raise OSError(28, "No space left on device")
        return write(descriptor, data[:-50])

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OSError, match="No space"):
        append_rows(out, rows)
    assert out.read_bytes() == before


def test_settings_are_read_and_combined():
    texts = ["model.window=4,8", "training.warmup_steps=5", "training.steps=10", "model.pattern=local+global,local"]
    trials = product([TINY], parse_settings([*texts, "task_options.gap=7", "windows=2+4"]))
    assert len(trials) == 4
    assert [trial.model.window for trial in trials] == [4, 4, 8, 8]
    assert [trial.model.pattern for trial in trials] == [("local", "global"), ("local",)] * 2
    last = trials[-1]
    assert (last.training.steps, last.training.warmup_steps) == (10, 5)
    assert last.task_options["gap"] == 7
    assert last.windows == (2, 4)
    assert last.name.endswith("gap=7 windows=(2, 4)")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"task_share": 1.5}, "task_share must lie between 0 and 1"),
        ({"task_loss": "some"}, "must be 'all' or 'answers'"),
        (
            {"window_dropout": 0.5, "model": dataclasses.replace(TINY.model, residual=False)},
            "needs the residual branch",
        ),
    ],
)
def test_trials_that_make_no_sense_are_refused(change, words):
    with pytest.raises(ValueError, match=words):
        dataclasses.replace(TINY, **change)


def test_names_of_a_grid_differ():
    with pytest.raises(ValueError, match="names must differ; got tiny, tiny"):
        run_grid([TINY, TINY], [0], None, Path("nowhere"))


def test_every_grid_of_the_module_can_be_made():
    for name in grids.grids:
        trials = grids.load_grid(name)
        assert len({trial.name for trial in trials}) == len(trials)
        assert all(Trial.from_json(trial.name, trial.to_json()) == trial for trial in trials)


def line(name: str, seed: int, bits: float, accuracy: float) -> dict:
    return {"name": name, "seed": seed, "bits_per_byte": bits, "tests": [{"length": 64, "exact": accuracy}]}


def test_differences_are_paired_by_seed():
    """The t quantile for 3 seeds is 4.303: 1, 2 and 3 spread by 1, so the half width is 4.303 / sqrt(3)."""
    assert mean_and_half_width([1.0, 2.0, 3.0]) == pytest.approx((2.0, 4.30265 / 3**0.5), rel=1e-5)
    rows = [line("a", seed, 10.0 * seed, 0.5) for seed in range(4)]
    rows += [line("b", seed, 10.0 * seed + seed, 0.25) for seed in (1, 2, 3, 7)]
    found = paired_difference(rows, "b", "a", "bits_per_byte")
    assert found.by_seed == {1: 1.0, 2: 2.0, 3: 3.0}
    assert found.mean == 2.0
    assert not found.is_clear
    assert paired_difference(rows, "b", "a", "exact 64").is_clear
    text = table(rows)
    assert "+2.000 ± 2.484" in text
    assert "-0.250 (-0.250 to -0.250)" in text
    with pytest.raises(ValueError, match="share no seed"):
        paired_difference([rows[0], rows[-1]], "b", "a", "bits_per_byte")


def test_one_seed_has_no_interval():
    assert np.isnan(mean_and_half_width([1.0])[1])
    assert np.isnan(bootstrap([1.0])).all()
    assert not paired_difference([line("a", 1, 1, 0.5), line("b", 1, 2, 0.75)], "b", "a", "exact 64").is_clear


def test_the_bootstrap_is_that_of_its_definition():
    """Six seeds: t = 2.571, Phi(-sqrt(6 / 5) 2.571) = 0.00243, of all 6^6 resamples; three: the range."""
    shares = [0.0, 0.04, 0.3, 0.42, 0.6, 1.0]
    every = np.sort(np.mean(np.array(shares)[np.indices((6,) * 6).reshape(6, -1)], axis=0))
    expected = every[round(0.00243 * len(every))], every[-round(0.00243 * len(every))]
    assert bootstrap(shares) == pytest.approx(expected, abs=0.012)
    assert bootstrap([0.3, 0.0, 1.0]) == (0.0, 1.0)
    rows = [
        line(name, seed, 1, share) for name, base in (("a", 0), ("b", 1)) for seed, share in enumerate([base, 0, 0])
    ]
    found = paired_difference(rows, "b", "a", "exact 64")
    assert (found.low, found.high, found.is_clear) == (0, 1, False)


def test_committed_results_can_be_replayed():
    """Every line gives its trial back."""
    rows = read_rows(COMMITTED)
    assert len(rows) > 40
    for row in rows:
        trial = Trial.from_json(row["name"], row["trial"])
        assert trial.to_json() == row["trial"]
        assert row["platform"] == ("cpu" if row["name"].startswith("quick") else "gpu")


def test_committed_lines_from_when_departures_were_of_the_model_say_what_they_said():
    lines = [json.loads(text)["trial"] for text in COMMITTED.read_text().splitlines()]
    old = [values for values in lines if "departures" not in values]
    names = [field.name for field in dataclasses.fields(Departures)]
    of_the_model = {"branch_norm", "feature_input", "head_split", "decay_gate", "num_valued_sinks", "conv_width"}
    younger = {name: getattr(Departures(), name) for name in names if name not in of_the_model}
    of_others = ("qkv_bias", "norm_eps", "embedding_scale", "rope_scaling", "sinks", "feature_projection")
    younger |= {name: getattr(TINY.model, name) for name in of_others}
    assert len(old) == 326
    seen = set()
    for values in old:
        now = migrated(values)
        assert now == migrated(now) == Trial.from_json("", values).to_json()
        renamed = {
            "num_valued_sinks" if name == "num_sinks" else name: value for name, value in values["model"].items()
        }
        assert now["model"] | now["departures"] == renamed | younger
        assert [*now["departures"]] == names
        assert now["training"] == values["training"] | {"own_rate": 1.0}
        assert {name: value for name, value in now.items() if name not in ("model", "departures", "training")} == {
            name: value for name, value in values.items() if name not in ("model", "training")
        }
        seen |= {name for name in names if now["departures"][name] != getattr(Departures(), name)}
    assert seen == of_the_model, "the lines try every departure of then"


def test_a_line_without_a_younger_departure_has_its_default():
    values = dataclasses.replace(TINY, departures=Departures(num_valued_sinks=3)).to_json()
    del values["departures"]["conv_width"]
    assert Trial.from_json("", values).departures == Departures(num_valued_sinks=3)
    with pytest.raises(TypeError, match="num_valued_sinks"):
        migrated({**values, "model": values["model"] | {"num_sinks": 3}})


@pytest.mark.parametrize("name", ["variants", "maps", "remedies"])
def test_a_grid_started_again_finds_the_committed_lines(tmp_path, name):
    out, trials = tmp_path / "out.jsonl", grids.load_grid(name)
    out.write_text(COMMITTED.read_text())
    measured = {row["name"] for row in read_rows(out)}
    trials = [trial for trial in trials if trial.name in measured]  # a variant without lines is still to be run
    assert len(trials) >= 4
    [corpus] = {row["corpus"] for row in read_rows(out) if row["name"] == trials[0].name}
    data = run.Data(np.zeros(0), Path(), b"", corpus)
    said = []
    run_grid(trials, [0, 1, 2], data, out, report=said.append)
    assert said == [f"{trial.name}: already in {out}" for trial in trials]
    assert out.read_text() == COMMITTED.read_text()
