"""The grids of ablations that this project ran: each a function that gives a list of trials."""

import dataclasses

from rattn_eqx.ablate import Trial
from rattn_eqx.presets import ModelConfig
from rattn_eqx.run_folder import TrainConfig

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
TRAINING = TrainConfig(
    steps=1000,
    batch_size=16,
    context=2048,
    learning_rate=2e-3,
    warmup_steps=100,
    compute_dtype="bfloat16",
    evaluation_tokens=2**19,
)
# Four needles in text, all of them asked for: a guess among the needles is right in a quarter of the answers.
NEEDLE = {"haystack": "corpus", "num_keys": 4, "num_queries": 4}

NO_GLOBAL = ("local",)
MIXERS = {
    "full": {"residual": False, "window": FULL},
    "window": {"residual": False},
    "linear": {"window": 0},
    "rattention": {},
}


def trial(name: str, *, steps: int = TRAINING.steps, rate: float = TRAINING.learning_rate, **model) -> Trial:
    """A trial of the small model on text with needles, with fields of its `ModelConfig` exchanged."""
    training = dataclasses.replace(TRAINING, steps=steps, warmup_steps=steps // 10, learning_rate=rate)
    return Trial(name, dataclasses.replace(SMALL, **model), training, task_options=NEEDLE)


def pareto(**options) -> list[Trial]:
    """The window alone against RATTENTION at windows from 32 to 512, and full attention: one layer in four global, or none."""
    trials = []
    for label, pattern in (("3:1", SMALL.pattern), ("no global", NO_GLOBAL)):
        trials.append(trial(f"full, {label}", pattern=pattern, **MIXERS["full"], **options))
        for window in (32, 64, 128, 256, 512):
            for mixer in ("window", "rattention"):
                name = f"{mixer} {window}, {label}"
                trials.append(trial(name, pattern=pattern, **(MIXERS[mixer] | {"window": window}), **options))
    return trials


def quick() -> list[Trial]:
    """One small model on associative recall beyond its windows: seconds on a CPU, for `--set` to vary."""
    model = dataclasses.replace(
        SMALL, model_width=64, num_layers=2, num_heads=2, num_kv_heads=1, head_size=32, feed_forward_width=128,
        window=8, pattern=NO_GLOBAL, feature_map="relu", rla_gain=0.1, conv_width=3,
    )  # fmt: skip
    training = TrainConfig(steps=400, batch_size=32, context=64, learning_rate=3e-3, warmup_steps=40)
    options: dict[str, int | str] = {"num_pairs": 4, "num_queries": 4, "gap": 20}
    return [Trial("quick", model, training, task="mqar", task_options=options, task_share=1)]


grids = {"pareto": pareto, "quick": quick}
