"""One cell of a grid of ablations."""

import dataclasses
import json
from typing import Any, Literal

from rattn_eqx.ablation.layer import NO_DEPARTURES, Departures
from rattn_eqx.data.tokenizers import BYTE_VOCABULARY
from rattn_eqx.model.config import ModelConfig
from rattn_eqx.model.fields import made, settle
from rattn_eqx.training.config import TrainConfig

FORMER_NAMES: dict[str, str] = {"num_sinks": "num_valued_sinks"}  # of departures


@dataclasses.dataclass(frozen=True)
class Trial:
    """One cell of a grid: a model, how it is trained, where its layers depart from the paper's, what it is tested on.

    `training.seed` counts for nothing: a trial is run for seeds. A step reads `training.batch_size` sequences, of which
    `task_share` (rounded to whole sequences) are samples of the recall task and the others text. `task_loss="all"` is
    the mean over all tokens; "answers" adds the mean over the text's tokens and the mean over the answers'.

    `windows`: each step trains with one of these, drawn at random, and tests run with the model's own (SWAX, arXiv
    2509.24552). `window_dropout`: the chance, at each step and local layer, that the window's branch is left out in
    training (arXiv 2510.05901).

    Raises:
      ValueError: a field of another type, a share outside [0, 1], a window_dropout where there are not two branches, a
        vocabulary without room for the byte tokenizer's ids, no tests' sample, or a length below 1.
    """

    name: str
    model: ModelConfig
    training: TrainConfig
    departures: Departures = NO_DEPARTURES
    task: str = "needle"
    task_options: dict[str, int | str] = dataclasses.field(default_factory=dict)
    task_share: float | int = 0.5
    task_loss: Literal["all", "answers"] = "answers"
    windows: tuple[int, ...] = ()
    window_dropout: float | int = 0.0
    test_lengths: tuple[int, ...] = ()
    test_samples: int = 128

    def __post_init__(self):
        settle(self)
        for name in ("task_share", "window_dropout"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"Trial {self.name}: {name} must lie between 0 and 1; got {getattr(self, name)}")
        if self.model.vocabulary_size < BYTE_VOCABULARY:
            raise ValueError(
                f"Trial {self.name}: model.vocabulary_size must be at least {BYTE_VOCABULARY}, to hold the byte "
                f"tokenizer's ids; got {self.model.vocabulary_size}"
            )
        for name, sizes, low in (
            ("test_samples", (self.test_samples,), 1),
            ("test_lengths", self.test_lengths, 1),
            ("windows", self.windows, 0),
        ):
            if any(not low <= size < 2**31 for size in sizes):
                raise ValueError(f"Trial {self.name}: {name} must be at least {low} and below 2**31; got {sizes}")
        if self.window_dropout and not (self.model.residual and self.model.swa_gain is not None):
            raise ValueError(
                f"Trial {self.name}: window_dropout needs the residual branch, and a gain of the window; got "
                f"residual={self.model.residual}, swa_gain={self.model.swa_gain}; use window_dropout=0"
            )

    @property
    def task_sequences(self) -> int:
        """Samples of the task in a batch."""
        return round(self.task_share * self.training.batch_size)

    @property
    def needs_text(self) -> bool:
        """Whether the trial reads a corpus."""
        in_text = self.task_options.get("haystack") == "corpus"
        return in_text or self.task_sequences < self.training.batch_size

    def to_json(self) -> dict[str, Any]:
        """All but the name, as JSON holds it: two trials are the same if this is."""
        values = dataclasses.asdict(self)
        del values["name"], values["training"]["seed"]
        return json.loads(json.dumps(values))

    @classmethod
    def from_json(cls, name: str, values: dict[str, Any]) -> "Trial":
        """The trial whose `to_json` is `migrated(values)`."""
        values = migrated(values)
        kinds = {"model": ModelConfig, "training": TrainConfig, "departures": Departures}
        return made(cls, values | {"name": name} | {field: made(kind, values[field]) for field, kind in kinds.items()})


def migrated(values: dict[str, Any]) -> dict[str, Any]:
    """A trial's JSON as `Trial.to_json` gives it now, from a line of any age.

    Departures were once fields of the model, and one had another name. One that is younger than the line has its
    default, as the fields of the model and of the training.
    """
    names = {field.name: field.name for field in dataclasses.fields(Departures)} | FORMER_NAMES
    departures = {names[name]: value for name, value in values["model"].items() if name in names}
    model = {name: value for name, value in values["model"].items() if name not in names}
    model = json.loads(json.dumps(dataclasses.asdict(made(ModelConfig, model))))
    given: dict[str, Any] = values.get("departures", {})
    departures = made(Departures, dict(**departures, **{FORMER_NAMES.get(x, x): value for x, value in given.items()}))
    training = dataclasses.asdict(made(TrainConfig, values["training"]))
    del training["seed"]
    return values | {"model": model, "training": training, "departures": dataclasses.asdict(departures)}
