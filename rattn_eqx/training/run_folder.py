"""A training run is a folder.

config.json, tokenizer.json, metrics.jsonl and checkpoints/ while it trains; then results.json, loss.png and
sample.txt.
"""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

from rattn_eqx.data.files import write_json
from rattn_eqx.data.tokenizers import Tokenizer, load_tokenizer
from rattn_eqx.model.config import ModelConfig
from rattn_eqx.training.config import RunConfig, TrainConfig

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
      ValueError: if the folder holds a run of another config or tokenizer; names what differs.
    """
    config_path, tokenizer_path = folder / "config.json", folder / "tokenizer.json"
    if not config_path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        tokenizer.save(tokenizer_path)
        write_json(config_path, dataclasses.asdict(config))  # last: a folder with a config is complete
        return
    old, new = _flatten(dataclasses.asdict(load_config(folder))), _flatten(dataclasses.asdict(config))
    if load_tokenizer(tokenizer_path).to_json() != tokenizer.to_json():
        old, new = {**old, "tokenizer": "of the run"}, {**new, "tokenizer": "another"}
    different = [f"{name} is {old[name]!r} there and {new[name]!r} here" for name in new if old[name] != new[name]]
    if different:
        raise ValueError(
            f"open_run: {folder} holds a run of another config: {'; '.join(different)}. "
            "Choose another folder with --out, or give the options that the run was started with"
        )


def load_config(folder: Path) -> RunConfig:
    """Read config.json.

    Raises:
      ValueError: if the folder is no run, or an older one of a model with parts exchanged.
    """
    path = folder / "config.json"
    if not path.exists():
        raise ValueError(
            f"load_config: {folder} is not a run folder, it has no config.json; start one with `rattn pretrain`"
        )
    try:
        values = json.loads(path.read_text())
        former = {name: value for name, value in values["model"].items() if name in _FORMER}
        model = {name: value for name, value in values["model"].items() if name not in _FORMER}
        config = RunConfig(ModelConfig.from_json(model), TrainConfig(**values["training"]), values["corpus"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"load_config: {path} is damaged: {error}; put back a good copy, or start again in another folder"
        ) from error
    if changed := [f"{name}={value!r}" for name, value in former.items() if value != _FORMER[name]]:
        raise ValueError(
            f"load_config: the model of {folder} has parts exchanged ({', '.join(changed)}), which only `rattn ablate` "
            "trains now; use the version that it was trained with"
        )
    return config


def cut_metrics(path: Path, step: int) -> None:
    """Drop the rows of metrics.jsonl that lie past a checkpoint's `step`, and a last row that was cut off.

    Raises:
      ValueError: if the rows end before `step`; the file is left as it was.
    """
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    last = num_bytes = 0
    for line in lines:
        if not line.endswith(b"\n") or (row := json.loads(line))["step"] > step:
            break
        last, num_bytes = row["step"], num_bytes + len(line)
    if last < step:
        raise ValueError(
            f"cut_metrics: {path} must have rows up to the checkpoint's step; got rows up to step {last} and a "
            f"checkpoint of step {step}; put back a good copy, or remove the checkpoints past step {last}"
        )
    if lines:
        os.truncate(path, num_bytes)  # unlike a rewritten copy, it needs no space on a full disk


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl: one for each step, one for each evaluation.

    `seconds` counts from the call of `train` that wrote the row: it begins at 0 again where a run was resumed.
    """
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def _flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    pairs = {}
    for name, value in values.items():
        pairs |= _flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return pairs
