"""What an argument of the command line may be: functions for argparse, whose errors say what is wrong."""

import argparse
import dataclasses
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

PRESETS = ("tiny", "small", "paper_3b", "paper_12b")
FEATURE_MAPS = ("softmax", "relu", "identity", "elu_plus_one", "exp", "squared_relu", "taylor")
GRIDS = ("quick", "sweep", "pareto", "pareto_global", "variants", "remedies", "maps", "larger")
SETTINGS = {  # of `rattn ablate --set`
    "model.FIELD": "model_width num_layers num_heads num_kv_heads head_size feed_forward_width window pattern residual "
    "feature_map learned_feature_scale num_meta_tokens swa_gain rla_gain qk_norm rope_theta gate tie_embeddings "
    "qkv_bias norm_eps embedding_scale sinks feature_projection",
    "departures.FIELD": "branch_norm feature_input head_split decay_gate num_valued_sinks conv_width",
    "training.FIELD": "steps batch_size context learning_rate warmup_steps own_rate weight_decay clip_norm optimizer "
    "compute_dtype rematerialise evaluation_tokens",
    "alone": "task task_options.NAME task_share task_loss windows window_dropout test_lengths test_samples",
}
OF_MODEL = "the model's, if it is of a file of yours: the file as it was in training"
HARDWARES = ("h100", "h200", "tpu_v5p")


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Shows a default where there is one, and keeps the lines of a text."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return "\n".join(super(Help, self)._fill_text(line, width, indent) for line in text.split("\n"))

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default in (None, False, "") else super()._get_help_string(action)


def whole(low: int = -(2**31), high: int = 2**31 - 1) -> Callable[[str], int]:
    """A whole number of a range; by default 32 bits, as arrays are counted on a device."""

    def parse(text: str) -> int:
        number = None if len(text) > 30 else _number(int, text)
        if number is None or not low <= number <= high:
            raise argparse.ArgumentTypeError(f"must be a whole number from {low} to {high}; got {text!r:.60}")
        return number

    return parse


def finite(text: str) -> float:
    """A number, neither NaN nor infinite, that float32 holds."""
    number = _number(float, text)
    if number is None or not abs(number) < 3e38 or not math.isfinite(number):
        raise argparse.ArgumentTypeError(f"must be a finite number; got {text!r:.60}")
    return number


def place(text: str) -> str:
    """A path, or a name in its stead, with ~ expanded."""
    if not text or "\0" in text:
        raise argparse.ArgumentTypeError(f"must be a name or path; got {text!r:.60}")
    return os.path.expanduser(text)


def path(text: str) -> Path:
    """A path with ~ expanded."""
    found = Path(place(text))
    try:
        found.resolve()
    except (OSError, RuntimeError):  # which one depends on Python's version
        raise argparse.ArgumentTypeError(f"must not lead in a circle of links; got {text!r:.200}") from None
    return found


def utf8(text: str) -> str:
    """Text in UTF-8 under any locale: bytes that the locale could not decode stand in `text` as surrogates."""
    try:
        return text.encode("utf-8", "surrogateescape").decode("utf-8")
    except UnicodeError:
        raise argparse.ArgumentTypeError(f"must be UTF-8 text; got {text!r:.60}") from None


def _number(kind: Callable, text: str):
    try:
        return kind(text)
    except ValueError:
        return None


def model_config(options: argparse.Namespace, config: Any = None) -> Any:
    """The `ModelConfig` of a preset, or the one given, with what the options change."""
    from rattn_eqx.model.presets import presets

    config = config or presets[options.preset]
    changes = {"window": options.window, "residual": False if options.no_residual else None}
    if options.feature_map is not None:
        from rattn_eqx.model.map_files import is_place, read_map

        place = is_place(options.feature_map)
        changes["feature_map"] = read_map(options.feature_map, config.head_size) if place else options.feature_map
    pattern = getattr(options, "pattern", None)
    changes["pattern"] = None if pattern is None else tuple(pattern.split(","))
    return dataclasses.replace(config, **{name: value for name, value in changes.items() if value is not None})
