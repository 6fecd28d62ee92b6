"""A training run is a folder.

config.json, tokenizer.json, metrics.jsonl and checkpoints/ while it trains; then results.json, loss.png and
sample.txt.
"""

import dataclasses
import hashlib
import itertools
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import numpy as np

from rattn_eqx.data.files import (
    DamagedError,
    open_append,
    open_regular,
    parse_json,
    read_json,
    sync,
    write_json,
)
from rattn_eqx.data.tokenizers import BYTE_VOCABULARY, Tokenizer, load_tokenizer
from rattn_eqx.model.config import ModelConfig
from rattn_eqx.model.fields import made
from rattn_eqx.model.map_files import check_place, is_of_file, keep_source
from rattn_eqx.training.config import Objective, RunConfig, TrainConfig

_LONGEST_ROW = 2**12  # bytes of a line of metrics.jsonl

# Fields that a run's model once had and that are departures of ablations now, with what `rattn pretrain` wrote.
_FORMER = {
    "branch_norm": "group",
    "feature_input": "raw",
    "head_split": False,
    "decay_gate": False,
    "num_sinks": 0,
    "conv_width": 0,
}


def open_run(folder: Path, config: RunConfig, tokenizer: Tokenizer) -> None:
    """Make the folder of a new run, or check that an existing one belongs to `config`.

    Raises:
      ValueError: if the folder holds a run of another config or tokenizer, names what differs; or as `check_folder`.
    """
    check_folder(folder, config.model)
    config_path, tokenizer_path = folder / "config.json", folder / "tokenizer.json"
    if not os.path.lexists(config_path):
        folder.mkdir(parents=True, exist_ok=True)
        tokenizer.save(tokenizer_path)
        keep_source(folder, config.model.feature_map)
        write_json(config_path, dataclasses.asdict(config))  # last: a folder with a config is complete
        return
    _require_same(folder, identity(load_config(folder), load_tokenizer(tokenizer_path)), identity(config, tokenizer))


def check_folder(folder: Path, model: ModelConfig, training: TrainConfig | None = None) -> None:
    """Refuse a folder that a run of this model, and of this training, could not take, before there is a corpus.

    Raises:
      ValueError: if it holds a run of another config, but for its corpus, names what differs; a run without its
        config; or another file in place of the map's source.
    """
    if not os.path.lexists(folder / "config.json"):
        left = [name for name in ("metrics.jsonl", "checkpoints") if os.path.lexists(folder / name)]
        if left:
            raise ValueError(
                f"open_run: {folder} has {' and '.join(left)} but no config.json, so nothing says what they belong to; "
                "put config.json back, or choose another folder with --out"
            )
        check_place(folder, model.feature_map)
    elif training is not None:
        there = load_config(folder)
        if BYTE_VOCABULARY < there.model.vocabulary_size < model.vocabulary_size:  # of a BPE that found no more to join
            model = dataclasses.replace(model, vocabulary_size=there.model.vocabulary_size)
        stated = lambda config: {"config": as_json(dataclasses.asdict(config))}
        _require_same(folder, stated(there), stated(RunConfig(model, training, there.corpus)))


def _require_same(folder: Path, there: dict[str, Any], here: dict[str, Any]) -> None:
    different = _differences(there, here, "there", "here")
    if not different:
        return
    there, here = _flatten(there), _flatten(here)
    changed = lambda name: there.get(name) != here.get(name)
    if changed("config.corpus"):
        different += " (the text that the corpus is made of has changed)"
    maps = [str(values.get("config.model.feature_map")) for values in (there, here)]
    if all(map(is_of_file, maps)) and maps[0][-64:] != maps[1][-64:]:
        different += f" (the source of the feature map has changed; the run's is {folder / maps[0].partition(':')[0]})"
    raise ValueError(
        f"open_run: {folder} holds a run of another config: {different}. "
        "Choose another folder with --out, or give the options that the run was started with"
    )


def identity(config: RunConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    """What a run's checkpoints belong to, as JSON holds it: its config, the corpus's digest among it, its tokenizer."""
    return {
        "config": as_json(dataclasses.asdict(config)),
        "tokenizer": hashlib.sha256(tokenizer.to_json().encode()).hexdigest(),
    }


def as_json(values: dict[str, Any]) -> dict[str, Any]:
    """What a file of JSON gives back of values: lists for tuples."""
    return json.loads(json.dumps(values))


def digest(parameters: Any) -> str:
    """sha256 of the arrays of a pytree, with their paths, dtypes and shapes."""
    found = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(eqx.filter(parameters, eqx.is_array)):
        found.update(f"{jax.tree_util.keystr(path)} {leaf.dtype} {leaf.shape}\n".encode())
        found.update(np.asarray(leaf).tobytes())
    return found.hexdigest()


def of_another_run(metadata: dict[str, Any], run: dict[str, Any]) -> str | None:
    """Why a checkpoint with this metadata does not belong to the run of an `identity`, or None."""
    match metadata.get("run"):
        case {"config": dict(config), "tokenizer": str(tokenizer)}:
            pass
        case _:
            return "it does not say which run it belongs to; an older version of rattn-eqx wrote it, which can go on"
    try:
        stated, _ = _config_of(config)  # a field that is younger than the checkpoint has its default
    except ValueError as error:
        return f"its config is no config of this version of rattn-eqx: {error}"
    found = {"config": as_json(dataclasses.asdict(stated)), "tokenizer": tokenizer}
    different = _differences(found, run, "in it", "in config.json and tokenizer.json")
    return f"it belongs to another run: {different}" if different else None


def _differences(one: dict[str, Any], other: dict[str, Any], at_one: str, at_other: str) -> str:
    old, new = _flatten(one), _flatten(other)
    names = [name for name in {**new, **old} if old.get(name, "absent") != new.get(name, "absent")]
    json_value = lambda value: tuple(value) if isinstance(value, list) else value
    show = lambda values, name: f"{json_value(values[name])!r:.160}" if name in values else "absent"
    return "; ".join(
        f"{name.removeprefix('config.')} is {show(old, name)} {at_one} and {show(new, name)} {at_other}"
        for name in names
    )


def load_config(folder: Path) -> RunConfig:
    """Read config.json.

    Raises:
      ValueError: if the folder is no run, or an older one of a model with parts exchanged.
    """
    path = folder / "config.json"
    if not os.path.lexists(path):
        raise ValueError(
            f"load_config: {folder} is not a run folder, it has no config.json; start one with `rattn pretrain`"
        )
    try:
        config, former = _config_of(read_json(path))
    except ValueError as error:
        raise ValueError(
            f"load_config: {path} is damaged: {error}; put back a good copy, or start again in another folder"
        ) from error
    if changed := [f"{name}={value!r}" for name, value in former.items() if value != _FORMER[name]]:
        raise ValueError(
            f"load_config: the model of {folder} has parts exchanged ({', '.join(changed)}), which only `rattn ablate` "
            "trains now; use the version that it was trained with"
        )
    return config


def _config_of(values: Any) -> tuple[RunConfig, dict[str, Any]]:
    """The config that JSON held, and the fields of a former version's model; a ValueError names what is wrong."""
    match values:
        case {"model": dict(model), "training": dict(training), "corpus": str(corpus)}:
            pass
        case _:
            raise ValueError("it must hold model, training and corpus")
    former = {name: value for name, value in model.items() if name in _FORMER}
    model = {name: value for name, value in model.items() if name not in _FORMER}
    start = values.get("start")  # younger than some runs
    if not isinstance(start, str | None):
        raise ValueError(f"start must be a text or null; got {start!r:.80}")
    match values.get("objective"):  # younger too
        case None:
            objective = None
        case dict(stated):
            objective = made(Objective, stated)
        case other:
            raise ValueError(f"objective must be an object or null; got {other!r:.80}")
    return RunConfig(made(ModelConfig, model), made(TrainConfig, training), corpus, start, objective), former


class Metrics:
    """The open metrics.jsonl of a run that trains: rows are added, and a checkpoint states which stood before it.

    What is stated leaves `seconds` out, so that a run resumed writes the checkpoints of one that nobody stopped.
    """

    def __init__(self, path: Path, kept: int):
        """Open the file, made if it is missing, and drop what it has past its first `kept` rows."""
        self._file = open_append(path)
        self._rows, self._digest = kept, hashlib.sha256()
        lines = list(itertools.islice(_whole_lines(path), kept))
        for line in lines:
            self._digest.update(_stated(json.loads(line)))
        # Unlike a rewritten copy, a shorter file needs no space on a full disk.
        os.ftruncate(self._file.fileno(), sum(len(line) for line in lines))

    def add(self, row: dict[str, Any]) -> None:
        """Write one row, which must hold no number that JSON lacks."""
        self._file.write((json.dumps(row, allow_nan=False) + "\n").encode())
        self._file.flush()
        self._rows += 1
        self._digest.update(_stated(row))

    def state(self) -> dict[str, Any]:
        """What a checkpoint states, once the rows are on the disk: it never outlives them."""
        sync(self._file)
        return {"rows": self._rows, "sha256": self._digest.hexdigest()}

    def close(self) -> None:
        self._file.close()


def metrics_obstacle(path: Path, metadata: dict[str, Any]) -> str | None:
    """Why metrics.jsonl does not have the rows that stood before a checkpoint with this metadata, or None."""
    match metadata.get("metrics"):
        case {"rows": int(rows), "sha256": str(digest)} if rows >= 0:
            pass
        case _:
            return "it does not state its metrics; it is of an older version of rattn-eqx, or edited"
    found, number = hashlib.sha256(), 0
    try:
        for number, line in enumerate(itertools.islice(_whole_lines(path), rows), 1):
            found.update(_stated(_row(line, f"line {number} of {path}")))
    except (OSError, ValueError) as error:
        return f"its metrics cannot be read: {error}"
    if number < rows or found.hexdigest() != digest:
        return f"{path} does not begin with the {rows:,} rows that it was saved after; put back a good copy"
    return None


def _whole_lines(path: Path) -> Iterator[bytes]:
    return itertools.takewhile(lambda line: line.endswith(b"\n"), _lines(path))


def _lines(path: Path) -> Iterator[bytes]:
    """The lines of metrics.jsonl, the last of which may be cut off; a DamagedError for one that is too long."""
    with open_regular(path) as file:
        while line := file.readline(_LONGEST_ROW):
            if len(line) == _LONGEST_ROW:
                raise DamagedError(f"{path} must have rows of less than {_LONGEST_ROW} bytes; put back a good copy")
            yield line


def _row(line: bytes, where: str) -> dict[str, Any]:
    match parse_json(line.decode("utf-8", "replace"), where):
        case {"step": int()} as row if all(value is None or isinstance(value, int | float) for value in row.values()):
            return row
        case other:
            raise ValueError(
                f"{where} must be an object of numbers with a step; got {other!r:.80}; put back a good copy"
            )


def _stated(row: dict[str, Any]) -> bytes:
    return json.dumps({name: value for name, value in row.items() if name != "seconds"}).encode() + b"\n"


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl: one for each step, one for each evaluation.

    `seconds` counts from the call of `train` that wrote the row: it begins at 0 again where a run was resumed.

    Raises:
      ValueError: for a line that is no row, with its number.
    """
    path = folder / "metrics.jsonl"
    return [_row(line, f"read_metrics: line {number} of {path}") for number, line in enumerate(_lines(path), 1)]


def _flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    pairs = {}
    for name, value in values.items():
        pairs |= _flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return pairs
