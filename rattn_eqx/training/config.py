"""How a model is trained, as frozen values that a run folder stores as JSON."""

import dataclasses
from typing import Literal

from rattn_eqx.model.config import ModelConfig
from rattn_eqx.model.fields import settle


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """How a model is trained. Lengths are in tokens, intervals in optimiser steps.

    `microbatches` splits a batch into pieces whose gradients are summed: less memory, the same step.
    The learning rate rises over `warmup_steps` and falls to 0 along a cosine; `own_rate` times it is that of what local
    layers have of their own (`local_layers.own_parameters`).
    """

    steps: int
    batch_size: int
    context: int
    learning_rate: float
    warmup_steps: int
    own_rate: float = 1.0
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    optimizer: Literal["adamw", "rmsprop"] = "adamw"
    microbatches: int = 1
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    rematerialise: bool = False
    checkpoint_every: int = 200
    evaluate_every: int = 650
    evaluation_tokens: int = 131072
    seed: int = 0

    def __post_init__(self):
        settle(self)
        for name in (
            "steps",
            "batch_size",
            "context",
            "microbatches",
            "checkpoint_every",
            "evaluate_every",
            "evaluation_tokens",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"TrainConfig: {name} must be at least 1; got {getattr(self, name)}")
            if getattr(self, name) >= 2**31:
                raise ValueError(f"TrainConfig: {name} must be below 2**31; got {getattr(self, name)}")
        for name in ("learning_rate", "own_rate", "clip_norm"):
            if not getattr(self, name) > 0:
                raise ValueError(f"TrainConfig: {name} must be above 0 and finite; got {getattr(self, name)}")
        if self.weight_decay < 0:
            raise ValueError(f"TrainConfig: weight_decay must be at least 0 and finite; got {self.weight_decay}")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"TrainConfig: seed must be at least 0 and below 2**32; got {self.seed}")
        if self.batch_size % self.microbatches:
            raise ValueError(
                "TrainConfig: batch_size must be a multiple of microbatches; "
                f"got batch_size={self.batch_size}, microbatches={self.microbatches}"
            )
        if not 0 <= self.warmup_steps < self.steps:
            raise ValueError(
                "TrainConfig: warmup_steps must be at least 0 and less than steps; "
                f"got warmup_steps={self.warmup_steps}, steps={self.steps}"
            )


@dataclasses.dataclass(frozen=True)
class Objective:
    """What a converted model is trained to besides the loss on the text, so that it does not pass by a branch.

    `distillation`, 0 to 1, is the share of the loss that is KL(old || new) of the next token, in nats, from the model
    whose sha256 is `teacher` (`run_folder.digest`). `window_dropout` is how probable it is at first that a local
    layer's window says nothing for a step, drawn for each layer; it falls in a line to 0 at half of the steps.
    `windows`: each step takes one of them in place of the model's, drawn evenly; the last tenth of the steps takes the
    model's own.
    """

    distillation: float | int = 0.0
    teacher: str | None = None
    window_dropout: float | int = 0.0
    windows: tuple[int, ...] = ()

    def __post_init__(self):
        settle(self)
        if not 0 <= self.distillation <= 1:
            raise ValueError(f"Objective: distillation must be a share, 0 to 1; got {self.distillation}")
        if not 0 <= self.window_dropout < 1:
            raise ValueError(
                f"Objective: window_dropout must be a probability, at least 0 and below 1; got {self.window_dropout}"
            )
        if (self.distillation > 0) is not (self.teacher is not None):
            raise ValueError(
                f"Objective: teacher belongs to a distillation above 0; got distillation={self.distillation}, "
                f"teacher={self.teacher}"
            )
        if small := [window for window in self.windows if window < 1]:
            raise ValueError(f"Objective: windows must be at least 1 each; got {small[0]}")


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """The model, how it is trained, and on what: `corpus` is the sha256 of the corpus's text, as it is split.

    `start` is the sha256 of the parameters that the run begins with (`run_folder.digest`), None where they are drawn
    from the seed. `objective`: None is the loss on the text alone.

    A run's result depends on two things more: on its tokenizer, which is in tokenizer.json, and by rounding on the
    number of devices, which is in each checkpoint's metadata.
    """

    model: ModelConfig
    training: TrainConfig
    corpus: str
    start: str | None = None
    objective: Objective | None = None

    def __post_init__(self):
        settle(self)
