"""A run folder belongs to one config, and what it refuses it explains."""

import dataclasses
import hashlib
import json
import math
import os
import re
import stat
from pathlib import Path
from typing import Any

import pytest
from training_child import MODEL, training

from rattn_eqx.data.files import write_text
from rattn_eqx.data.tokenizers import BPETokenizer, ByteTokenizer, load_tokenizer
from rattn_eqx.model.rotary import RopeScaling
from rattn_eqx.training.config import RunConfig
from rattn_eqx.training.run_folder import (
    Metrics,
    identity,
    load_config,
    metrics_obstacle,
    of_another_run,
    open_run,
    read_metrics,
)

CONFIG = RunConfig(dataclasses.replace(MODEL, pattern=("local", "global")), training(), "0" * 64)
ROWS = [
    {"step": 1, "bits_per_byte": 8.1},
    {"step": 2, "bits_per_byte": None},
    {"step": 2, "validation_bits_per_byte": 8.0},
    {"step": 3, "bits_per_byte": 7.5},
    {"step": 4, "bits_per_byte": 7.25},
]


def write_metrics(folder: Path, last: str = "") -> Path:
    path = folder / "metrics.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS) + last)
    return path


def test_a_config_comes_back_from_json(tmp_path):
    folder = tmp_path / "runs" / "first"
    open_run(folder, CONFIG, ByteTokenizer())
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "tokenizer.json"]
    read = load_config(folder)
    assert read == CONFIG
    assert read.model.pattern == ("local", "global")
    assert hash(read) == hash(CONFIG)
    assert load_tokenizer(folder / "tokenizer.json") == ByteTokenizer()
    written = (folder / "config.json").read_bytes()
    open_run(folder, CONFIG, ByteTokenizer())
    assert (folder / "config.json").read_bytes() == written


def test_a_config_with_parts_comes_back_and_one_from_before_them_too(tmp_path):
    open_run(tmp_path / "old", CONFIG, ByteTokenizer())
    path = tmp_path / "old" / "config.json"
    values = json.loads(path.read_text())
    for name in ("qkv_bias", "norm_eps", "embedding_scale", "rope_scaling"):
        del values["model"][name]
    path.write_text(json.dumps(values))
    assert load_config(tmp_path / "old") == CONFIG
    changes: dict[str, Any] = {"rope_scaling": RopeScaling(8, 1, 4, 8192), "embedding_scale": 1}
    config = dataclasses.replace(CONFIG, model=dataclasses.replace(MODEL, pattern=("global_rope",), **changes))
    open_run(tmp_path / "new", config, ByteTokenizer())
    assert load_config(tmp_path / "new") == config
    damaged = json.loads((tmp_path / "new" / "config.json").read_text())
    damaged["model"]["rope_scaling"]["factor"] = 0.5
    (tmp_path / "new" / "config.json").write_text(json.dumps(damaged))
    with pytest.raises(ValueError, match=r"is damaged: RopeScaling: factor and original_length must be at least 1"):
        load_config(tmp_path / "new")


def test_a_config_from_when_models_had_departures_comes_back_unless_it_has_one(tmp_path):
    open_run(tmp_path, CONFIG, ByteTokenizer())
    path = tmp_path / "config.json"
    values = json.loads(path.read_text())
    former = {"branch_norm": "group", "feature_input": "raw", "head_split": False, "decay_gate": False}
    values["model"] |= former | {"num_sinks": 0, "conv_width": 0}
    path.write_text(json.dumps(values))
    assert load_config(tmp_path) == CONFIG
    open_run(tmp_path, CONFIG, ByteTokenizer())
    values["model"]["num_sinks"] = 4
    path.write_text(json.dumps(values))
    with pytest.raises(ValueError, match=r"has parts exchanged \(num_sinks=4\), which only `rattn ablate` trains now"):
        load_config(tmp_path)


def test_a_folder_of_another_config_is_refused_by_field(tmp_path):
    open_run(tmp_path, CONFIG, ByteTokenizer())
    other = RunConfig(
        dataclasses.replace(CONFIG.model, window=9, pattern=("local",)),
        dataclasses.replace(CONFIG.training, seed=1),
        "1" * 64,
    )
    expected = (
        f"open_run: {tmp_path} holds a run of another config: model.window is 8 there and 9 here; "
        f"model.pattern is ('local', 'global') there and ('local',) here; training.seed is 0 there and 1 here; "
        f"corpus is '{'0' * 64}' there and '{'1' * 64}' here (the text that the corpus is made of has changed). "
        "Choose another folder with --out, or give the options that the run was started with"
    )
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match=f"^{re.escape(expected)}$"):
        open_run(tmp_path, other, ByteTokenizer())
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_folder_of_another_tokenizer_is_refused(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    letters = {"a": 0, "b": 1, "document": 2, "padding": 3}
    definition = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=letters, merges=[])).to_str()
    open_run(tmp_path, CONFIG, ByteTokenizer())
    with pytest.raises(ValueError, match=r"tokenizer is '\w{64}' there and '\w{64}' here. Choose another folder"):
        open_run(tmp_path, CONFIG, BPETokenizer(definition))


def test_a_folder_without_config_is_no_run(tmp_path):
    for folder in (tmp_path, tmp_path / "missing"):
        message = f"load_config: {folder} is not a run folder, it has no config.json; start one with `rattn pretrain`"
        with pytest.raises(ValueError, match=re.escape(message)):
            load_config(folder)


def test_a_run_killed_between_tokenizer_and_config_is_opened_afresh(tmp_path):
    (tmp_path / "tokenizer.json").write_text("half a fi")
    open_run(tmp_path, CONFIG, ByteTokenizer())
    assert load_config(tmp_path) == CONFIG
    assert load_tokenizer(tmp_path / "tokenizer.json") == ByteTokenizer()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps must be at least 1; got 0"),
        ({"batch_size": -1}, "batch_size must be at least 1; got -1"),
        ({"context": 0}, "context must be at least 1; got 0"),
        ({"microbatches": 0}, "microbatches must be at least 1; got 0"),
        ({"checkpoint_every": 0}, "checkpoint_every must be at least 1; got 0"),
        ({"evaluate_every": 0}, "evaluate_every must be at least 1; got 0"),
        ({"learning_rate": 0.0}, "learning_rate must be above 0 and finite; got 0.0"),
        ({"learning_rate": math.inf}, "learning_rate must be a finite number; got inf"),
        ({"learning_rate": math.nan}, "learning_rate must be a finite number; got nan"),
        ({"clip_norm": -1.0}, "clip_norm must be above 0 and finite; got -1.0"),
        ({"clip_norm": math.inf}, "clip_norm must be a finite number; got inf"),
        ({"weight_decay": -0.1}, "weight_decay must be at least 0 and finite; got -0.1"),
        ({"weight_decay": math.inf}, "weight_decay must be a finite number; got inf"),
        ({"weight_decay": math.nan}, "weight_decay must be a finite number; got nan"),
        ({"optimizer": "sgd"}, "optimizer must be 'adamw' or 'rmsprop'; got 'sgd'"),
        ({"compute_dtype": "float16"}, "compute_dtype must be 'float32' or 'bfloat16'; got 'float16'"),
        ({"batch_size": 6, "microbatches": 4}, "must be a multiple of microbatches; got batch_size=6, microbatches=4"),
        ({"warmup_steps": 60}, "at least 0 and less than steps; got warmup_steps=60, steps=60"),
        ({"warmup_steps": -1}, "at least 0 and less than steps; got warmup_steps=-1, steps=60"),
    ],
)
def test_bad_settings_are_refused(changes: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=f"^TrainConfig: .*{re.escape(message)}$"):
        training(**changes)


def test_the_narrowest_settings_are_accepted():
    training(steps=1, batch_size=1, context=1, warmup_steps=0, checkpoint_every=1, evaluate_every=1)
    training(batch_size=6, microbatches=3, warmup_steps=59)
    training(weight_decay=0.0, optimizer="rmsprop", compute_dtype="bfloat16")


@pytest.mark.parametrize("last", ["", '{"step": 5, "bits_per_', '{"step": 5}\n'])
def test_metrics_past_a_checkpoint_are_cut(tmp_path, last: str):
    path = tmp_path / "metrics.jsonl"
    metrics = Metrics(path, 0)
    states = [metrics.state()]
    for row in ROWS:
        metrics.add(row)
        states.append(metrics.state())
    metrics.close()
    whole = path.read_bytes()
    for kept, stated in enumerate(states):
        path.write_bytes(whole + last.encode())
        assert metrics_obstacle(path, {"metrics": stated}) is None
        again = Metrics(path, stated["rows"])
        assert path.read_bytes() == b"".join(whole.splitlines(keepends=True)[:kept])
        assert again.state() == stated
        again.close()
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize("damage", ["shorter", "other", "missing", "folder", "FIFO", "not stated", "edited"])
def test_metrics_that_are_not_those_of_the_checkpoint_are_an_obstacle(tmp_path, damage: str):
    path = write_metrics(tmp_path)
    content = path.read_bytes()
    metadata: dict[str, Any] = {"metrics": {"rows": len(ROWS), "sha256": hashlib.sha256(content).hexdigest()}}
    assert metrics_obstacle(path, metadata) is None
    match damage:
        case "shorter":
            path.write_bytes(content[:-1])
        case "other":
            path.write_bytes(content.replace(b"8.1", b"8.2"))
        case "not stated":
            metadata = {}
        case "edited":
            metadata["metrics"]["rows"] = -1
        case _:
            path.unlink()
    if damage == "folder":
        path.mkdir()
    if damage == "FIFO":
        os.mkfifo(path)
    reason = metrics_obstacle(path, metadata)
    assert reason is not None
    assert str(path) in reason or "does not state its metrics" in reason


def test_metrics_are_not_written_through_a_link(tmp_path):
    (tmp_path / "metrics.jsonl").symlink_to(tmp_path / "theirs")
    (tmp_path / "theirs").write_text("theirs")
    with pytest.raises(ValueError, match="must be a regular file and no link; give another path"):
        Metrics(tmp_path / "metrics.jsonl", 0)
    assert (tmp_path / "theirs").read_text() == "theirs"


def test_a_checkpoint_is_of_the_run_whatever_fields_came_later():
    run = identity(CONFIG, ByteTokenizer())
    older = json.loads(json.dumps(run))
    del older["config"]["model"]["qk_norm"], older["config"]["training"]["rematerialise"]
    older["config"]["model"]["num_sinks"] = 0  # a field that models had once
    assert of_another_run({"run": older}, run) is None
    older["config"]["model"]["rope_theta"] = 1e4
    assert of_another_run({"run": older}, run) == (
        "it belongs to another run: model.rope_theta is 10000.0 in it and 500000.0 in config.json and tokenizer.json"
    )
    del older["config"]["model"]["window"]
    assert "is no config of this version" in str(of_another_run({"run": older}, run))
    assert "does not say which run it belongs to" in str(of_another_run({}, run))


def test_a_row_too_long_to_be_one_is_not_read(tmp_path):
    path = write_metrics(tmp_path, "[" + "{}," * 2000 + "{}]\n")
    with pytest.raises(ValueError, match="must have rows of less than 4096 bytes"):
        read_metrics(tmp_path)
    with path.open("r+b") as file:
        file.truncate(2**40)
    with pytest.raises(ValueError, match="must have rows of less than 4096 bytes"):
        read_metrics(tmp_path)


@pytest.mark.parametrize("left", ["metrics.jsonl", "checkpoints"])
def test_what_a_run_left_without_its_config_is_refused(tmp_path, left: str):
    (tmp_path / left).mkdir()
    with pytest.raises(ValueError, match=f"has {left} but no config.json.*put config.json back, or choose another"):
        open_run(tmp_path, CONFIG, ByteTokenizer())
    assert [path.name for path in tmp_path.iterdir()] == [left]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": {"model_width": 96.0}}, "model_width must be an integer of at most 64 bits; got 96.0"),
        ({"model": {"window": float("nan")}}, "must be JSON; NaN is no number of JSON"),
        ({"model": {"residual": "no"}}, "residual must be true or false; got 'no'"),
        ({"model": {"depth": 3}}, "ModelConfig: missing none, unknown depth"),
        ({"training": {"steps": "6"}}, "TrainConfig: steps must be an integer of at most 64 bits; got '6'"),
        ({"training": None}, "it must hold model, training and corpus"),
        ({"corpus": 3}, "it must hold model, training and corpus"),
        ("[" * 100_000, "must be JSON"),
        ('"text"', "it must hold model, training and corpus"),
        (b"\xff", "must be UTF-8 text"),
    ],
)
def test_a_config_edited_to_something_else_is_refused_by_key(tmp_path, change, message: str):
    open_run(tmp_path, CONFIG, ByteTokenizer())
    path = tmp_path / "config.json"
    if isinstance(change, dict):
        values = json.loads(path.read_text())
        for name, value in change.items():
            values[name] = values[name] | value if isinstance(value, dict) else value
        change = json.dumps(values)
    path.write_bytes(change if isinstance(change, bytes) else change.encode())
    with pytest.raises(ValueError, match=f"^load_config: {path} is damaged: .*{re.escape(message)}.*put back a good"):
        load_config(tmp_path)


@pytest.mark.parametrize("line", ["[1]", "3", "{}", '{"step": "1"}', '{"step": 1, "bits_per_byte": NaN}', "{"])
def test_a_line_of_metrics_that_is_no_row_is_named(tmp_path, line: str):
    path = write_metrics(tmp_path, line)
    with pytest.raises(ValueError, match=f"read_metrics: line 6 of {path} must be"):
        read_metrics(tmp_path)


def test_a_file_is_on_the_disk_before_it_takes_its_name(tmp_path, monkeypatch):
    done, replace, fsync = [], os.replace, os.fsync

    def record(descriptor):
        status = os.fstat(descriptor)
        done.append("folder" if stat.S_ISDIR(status.st_mode) else status.st_size)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", record)
    monkeypatch.setattr(os, "replace", lambda *paths: (done.append("replace"), replace(*paths)))
    write_text(tmp_path / "file", "seven\n\n")
    assert done == [7, "replace", "folder"]
    assert (tmp_path / "file").read_text() == "seven\n\n"


def test_metrics_come_back(tmp_path):
    write_metrics(tmp_path)
    rows = read_metrics(tmp_path)
    assert rows[2:] == ROWS[2:]
    assert repr(rows) == repr(ROWS)
