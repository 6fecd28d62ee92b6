"""The grids of ablations that this project ran, each a function that gives a list of trials, and how to vary one."""

import dataclasses
import itertools
import json
import math
from pathlib import Path
from typing import Any

from rattn_eqx.ablation.layer import NO_DEPARTURES, Departures
from rattn_eqx.ablation.trial import Trial
from rattn_eqx.data.programs import read_source, run_source
from rattn_eqx.model import map_files
from rattn_eqx.model.config import ModelConfig
from rattn_eqx.training.config import TrainConfig

MOST = 10_000  # trials of a grid
NO_SETTINGS = ("name", "model", "training", "departures", "task_options")  # of a trial: parts that have settings
MAP = "model.feature_map"
FULL = 2**20  # a window longer than any sequence here: full attention

# 3.2 million parameters. The head size is one that the GPU kernels compute without padding.
SMALL = ModelConfig(
    vocabulary_size=258,
    model_width=256,
    num_layers=4,
    num_heads=4,
    num_kv_heads=2,
    head_size=64,
    feed_forward_width=768,
    window=128,
    rla_gain=0.3,
)
# 49 million tokens. Many small batches learn recall in fewer tokens than few large ones: LOG.md.
TRAINING = TrainConfig(
    steps=3000,
    batch_size=8,
    context=2048,
    learning_rate=2e-3,
    warmup_steps=300,
    compute_dtype="bfloat16",
    evaluation_tokens=2**19,
)
# Eight needles in text, and all of them asked for.
NEEDLE: dict[str, int | str] = {"haystack": "corpus", "num_keys": 8, "num_queries": 8}
LENGTHS = (2048, 4096, 8192, 16384, 32768)

NO_GLOBAL = ("local",)
MIXERS: dict[str, dict[str, Any]] = {
    "full": {"residual": False, "window": FULL},
    "window": {"residual": False},
    "rattention": {},
}
# What the paper's ablation table changes, and what it does not, as `trial` takes it; "rattention" begins with gains of
# 1 and 0.3.
VARIANTS: dict[str, dict[str, Any]] = {
    "rattention": {},
    "window alone": {"residual": False},
    "relu": {"feature_map": "relu"},
    "identity": {"feature_map": "identity"},
    "squared relu": {"feature_map": "squared_relu"},
    "Taylor": {"feature_map": "taylor"},
    "learned map": {"feature_map": "learned"},
    "decay gate": {"departures": Departures(decay_gate=True)},
    "head split": {"departures": Departures(head_split=True)},
    "no window": {"window": 0},
    "no group norm": {"departures": Departures(branch_norm="none")},
    "one norm": {"departures": Departures(branch_norm="sum")},
    "gain 1": {"rla_gain": 1.0},
    "window's gain 0.1": {"swa_gain": 0.1},
    "normed q and k": {"departures": Departures(feature_input="normed")},
    "learned scale": {"learned_feature_scale": True},
    "learned state": {"num_meta_tokens": 16},
    "sinks": {"departures": Departures(num_valued_sinks=4)},
    "convolution": {"departures": Departures(conv_width=4)},
}
# Windows and mixers of a Pareto curve, the ends first: a grid may be stopped.
PARETO = list(itertools.product((32, 128, 512, 64, 256), ("window", "rattention")))
SWEPT = (1e-3, 2e-3, 4e-3)
# Without a global layer 3,000 steps teach full attention alone to name needles, at one rate of `sweep`: it trains at
# that rate, the others at the one that ends `sweep` with the lowest training loss.
NO_GLOBAL_RATES = {"full": 1e-3, "window": 2e-3, "rattention": 2e-3}
NO_GLOBAL_STEPS = 6000
NO_GLOBAL_LENGTHS = LENGTHS[:4]


def trial(name: str, mixer: str = "rattention", departures: Departures = NO_DEPARTURES, **model) -> Trial:
    """A trial of the small model on text with needles: a mixer, departures, fields of `ModelConfig` exchanged."""
    config = dataclasses.replace(SMALL, **(MIXERS[mixer] | model))
    return Trial(name, config, TRAINING, departures, task_options=NEEDLE, test_lengths=LENGTHS, test_samples=64)


def sweep() -> list[Trial]:
    """The learning rate of each family of mixers, without a global layer."""
    trials = [trial(f"{mixer} 64", mixer, pattern=NO_GLOBAL, window=64) for mixer in ("window", "rattention")]
    return [_at_rate(each, rate) for each in [trial("full", "full", pattern=NO_GLOBAL), *trials] for rate in SWEPT]


def pareto() -> list[Trial]:
    """The window alone against RATTENTION at windows from 32 to 512, and full attention, without a global layer.

    Twice the steps of `pareto_global`: recall comes later where no layer sees everything.
    """
    return [_no_global("full", FULL), *(_no_global(mixer, window) for window, mixer in PARETO)]


def _no_global(mixer: str, window: int) -> Trial:
    label = "full" if window == FULL else f"{mixer} {window}"
    made = trial(f"{label}, no global", mixer, pattern=NO_GLOBAL, window=window)
    training = dataclasses.replace(made.training, steps=NO_GLOBAL_STEPS, learning_rate=NO_GLOBAL_RATES[mixer])
    return dataclasses.replace(made, training=training, test_lengths=NO_GLOBAL_LENGTHS)


def pareto_global() -> list[Trial]:
    """As `pareto`, with the paper's pattern of three local layers to one global, and one rate for all."""
    full = trial("full, 3:1", "full")
    return [full, *(trial(f"{mixer} {window}, 3:1", mixer, window=window) for window, mixer in PARETO)]


def variants() -> list[Trial]:
    """RATTENTION-64 without a global layer, with one part exchanged at a time; a quarter of the steps of `pareto`."""
    base: dict[str, Any] = {"pattern": NO_GLOBAL, "window": 64}
    made = [trial(name, **(base | changes)) for name, changes in VARIANTS.items()]
    training = dataclasses.replace(TRAINING, steps=1500)
    made = [dataclasses.replace(each, training=training, test_lengths=()) for each in made]
    random_window = dataclasses.replace(made[0], name="random window", windows=(32, 64, 128))
    return [*made, random_window, dataclasses.replace(made[0], name="window dropped", window_dropout=0.5)]


def remedies() -> list[Trial]:
    """RATTENTION-512 of `pareto`, whose residual branch does next to nothing, and what may wake it."""
    base = _no_global("rattention", 512)
    return [
        base,
        dataclasses.replace(base, name="random window 64 or 512, no global", windows=(64, 512)),
        dataclasses.replace(base, name="window dropped 512, no global", window_dropout=0.5),
        _changed(base, "window's gain 0.1 512, no global", swa_gain=0.1),
    ]


def maps() -> list[Trial]:
    """RATTENTION-256 of `pareto`, where the residual branch decides what is recalled, with other feature maps."""
    base = _no_global("rattention", 256)
    changes = {name: VARIANTS[name] for name in ("relu", "identity", "squared relu", "learned map", "normed q and k")}
    changes["normed q and k, learned scale"] = VARIANTS["normed q and k"] | VARIANTS["learned scale"]
    return [base, *(_changed(base, f"{name} 256, no global", **fields) for name, fields in changes.items())]


def larger() -> list[Trial]:
    """Window and RATTENTION of `pareto_global` at 64, in a model of 25 million parameters."""
    size: dict[str, Any] = {
        "model_width": 512, "num_layers": 8, "num_heads": 8, "num_kv_heads": 4, "feed_forward_width": 1536,
    }  # fmt: skip
    training = dataclasses.replace(TRAINING, steps=2000, learning_rate=1e-3)
    made = [trial(f"{mixer} 64, 3:1, larger", mixer, window=64, **size) for mixer in ("window", "rattention")]
    return [dataclasses.replace(each, training=training, test_lengths=(2048, 8192)) for each in made]


def _changed(each: Trial, name: str, departures: Departures = NO_DEPARTURES, **model) -> Trial:
    return dataclasses.replace(each, name=name, model=dataclasses.replace(each.model, **model), departures=departures)


def _at_rate(each: Trial, rate: float) -> Trial:
    training = dataclasses.replace(each.training, learning_rate=rate)
    return dataclasses.replace(each, name=f"{each.name}, rate {rate:g}", training=training, test_lengths=())


def quick() -> list[Trial]:
    """One small model on associative recall beyond its windows: a minute on two CPU cores, for `--set` to vary."""
    model = ModelConfig(
        vocabulary_size=258, model_width=48, num_layers=2, num_heads=2, num_kv_heads=2, head_size=24,
        feed_forward_width=96, window=8, pattern=NO_GLOBAL, feature_map="squared_relu",
    )  # fmt: skip
    training = TrainConfig(steps=300, batch_size=32, context=64, learning_rate=1e-2, warmup_steps=40)
    recall: dict[str, int | str] = {"num_pairs": 4, "num_queries": 2, "gap": 24, "vocabulary_size": 16}
    departures = Departures(conv_width=2)
    return [Trial("quick", model, training, departures, task="mqar", task_options=recall, task_share=1)]


grids = {
    "quick": quick,
    "sweep": sweep,
    "pareto": pareto,
    "pareto_global": pareto_global,
    "variants": variants,
    "remedies": remedies,
    "maps": maps,
    "larger": larger,
}


def load_grid(name: str) -> list[Trial]:
    """A grid of this module, or the list `trials` that a Python file of the user's defines.

    Raises:
      ValueError: no such grid or file, or a file without a list of `Trial`.
    """
    if name in grids:
        return grids[name]()
    path = Path(name)
    if path.suffix != ".py" or not path.exists():
        raise ValueError(f"ablate: no grid {name!r}; give {', '.join(grids)} or a Python file that defines `trials`")
    trials = run_source("ablate", path, read_source("ablate", path), "rattn_grid").get("trials")
    if not (isinstance(trials, list) and trials and all(isinstance(each, Trial) for each in trials)):
        raise ValueError(f"ablate: {path} must define `trials`, a list of Trial, at least one; got {trials!r:.80}")
    return trials


def listed(trials: list[Trial]) -> str:
    """A line for each trial: its name, feature map, window and steps."""
    rows = [("trial", "map", "window", "steps")]
    for trial in trials:
        of_map = map_files.short(trial.model.feature_map) if trial.model.residual else "no residual branch"
        windows = trial.windows or (trial.model.window,)
        shown = ["full" if window >= trial.training.context else str(window) for window in windows]
        rows.append((trial.name, of_map, " or ".join(shown), f"{trial.training.steps:,}"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join(line.rstrip() for line in lines)


def named(trials: list[Trial], part: str) -> list[Trial]:
    """The trials whose name has `part` in it.

    Raises:
      ValueError: there is none.
    """
    found = [trial for trial in trials if part in trial.name]
    if not found:
        names = ", ".join(trial.name for trial in trials)
        raise ValueError(f"ablate: no trial has {part!r:.80} in its name; the grid has {names:.400}")
    return found


def product(trials: list[Trial], settings: dict[str, list[Any]]) -> list[Trial]:
    """Every trial with every combination of settings, such as {"model.window": [32, 64], "task_share": [1]}.

    Raises:
      ValueError: for a setting that no trial has, a value that it cannot have, or more than `MOST` trials.
    """
    count = len(trials) * math.prod(map(len, settings.values()))
    if count > MOST:
        raise ValueError(f"ablate: a grid must have at most {MOST:,} trials; got {count:,}; give fewer values")
    made = []
    for trial, values in itertools.product(trials, itertools.product(*settings.values())):
        pairs = list(zip(settings, values, strict=True))
        said = [(key.split(".")[-1], map_files.short(value) if key == MAP else value) for key, value in pairs]
        name = " ".join([trial.name, *(f"{key}={value}" for key, value in said)])
        made.append(dataclasses.replace(_replaced(trial, pairs), name=name))
    return made


def _replaced(trial: Trial, pairs: list[tuple[str, Any]]) -> Trial:
    changes: dict[str, Any] = {}
    for key, value in pairs:
        head, _, tail = key.partition(".")
        owner: Any = getattr(trial, head, None) if tail else trial
        known = [field.name for field in dataclasses.fields(owner)] if dataclasses.is_dataclass(owner) else []
        has_it = (tail and isinstance(owner, dict)) or (tail or head) in known
        if not has_it or key == "training.seed" or key in NO_SETTINGS:
            if head == "model" and hasattr(trial.departures, tail):
                raise ValueError(f"ablate: no setting {key!r}; it is departures.{tail}")
            fields = ", ".join(field.name for field in dataclasses.fields(Trial) if field.name not in NO_SETTINGS)
            raise ValueError(
                f"ablate: no setting {key!r:.80}; use model.FIELD, departures.FIELD, training.FIELD (--seeds, not its "
                f"seed), task_options.NAME or a field of Trial: {fields}"
            )
        if tail:
            changes.setdefault(head, {})[tail] = value
        else:
            changes[head] = value
    for head in changes.keys() & {"model", "training", "departures"}:
        changes[head] = dataclasses.replace(getattr(trial, head), **changes[head])
    if "task_options" in changes:
        changes["task_options"] = trial.task_options | changes["task_options"]
    return dataclasses.replace(trial, **changes)


def parse_settings(texts: list[str]) -> dict[str, list[Any]]:
    """Settings of `product` from the command line, such as "model.window=4,8"; values are JSON, or else text.

    A feature map may be FILE.py:NAME, which is read here (`map_files.read_map`).

    Raises:
      ValueError: for anything without a name and a value, for a name given twice, and as `map_files.read_map`.
    """
    settings: dict[str, list[Any]] = {}
    for text in texts:
        name, _, values = text.partition("=")
        if not (name and values):
            raise ValueError(f"ablate: a setting must be NAME=VALUE,VALUE such as model.window=4,8; got {text!r:.80}")
        if name in settings:
            raise ValueError(f"ablate: {name:.80} is set twice; give all its values at once, as {name:.80}=VALUE,VALUE")
        settings[name] = [_value(name, value) for value in values.split(",")]
    return settings


def _value(name: str, text: str) -> Any:
    if name in ("model.pattern", "windows", "test_lengths"):  # several, with + between
        return tuple(_value("", part) for part in text.split("+"))
    if name == MAP and map_files.is_place(text):
        return map_files.read_map(text)
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text
