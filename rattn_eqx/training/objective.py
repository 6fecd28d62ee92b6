"""Training of a converted model: distillation, windows silent or drawn at random, as `config.Objective` says."""

from typing import Any, final

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool

from pallas.numerics import accumulation_dtype
from rattn_eqx.model.language_model import LanguageModel, by_token, each_sequence
from rattn_eqx.model.local_layers import local_layers, with_sinks, with_window
from rattn_eqx.model.loss import nats_of_tokens
from rattn_eqx.training.config import Objective
from rattn_eqx.training.run_folder import digest
from rattn_eqx.training.step import mean_loss

ALWAYS = 1e9  # a sink's logit that takes the whole softmax
OWN = 0.1  # the last share of the steps, which takes the model's own window


@final
class Aim:
    """The loss of an `Objective`, and what each step draws for it.

    Raises:
      ValueError: for another teacher than the objective's, one of another vocabulary, and for windows or their dropout
        of a model without local layers, or without the sinks that take their place.
    """

    def __init__(
        self, objective: Objective, model: LanguageModel, teacher: LanguageModel | None, seed: int, steps: int
    ):
        if (None if teacher is None else digest(teacher)) != objective.teacher:
            raise ValueError(
                "train: teacher must be the model whose digest is objective.teacher; got "
                f"{'none' if teacher is None else 'another'}; give Objective(teacher=run_folder.digest(teacher))"
            )
        if teacher is not None and teacher.config.vocabulary_size != model.config.vocabulary_size:
            raise ValueError(
                f"train: teacher must have the model's vocabulary of {model.config.vocabulary_size}; got "
                f"{teacher.config.vocabulary_size}"
            )
        local = local_layers(model)
        if (objective.windows or objective.window_dropout) and not local:
            raise ValueError("train: an objective with windows needs local layers; got a model without")
        if objective.window_dropout and any(layer.sink_logits is None for layer in local):
            raise ValueError("train: window_dropout needs sinks, which take the window's place; got a model without")
        self._objective, self._seed, self._steps, self._num_local = objective, seed, steps, len(local)
        self.teacher, self._static = eqx.partition(teacher, eqx.is_array)

    def loss(
        self,
        model: LanguageModel,
        batch: dict[str, Array],
        teacher: Any,
        silent: Bool[Array, "layers"],
        *,
        window: int | None = None,
    ) -> Array:
        """Nats per token of a batch, as `step.mean_loss`, of a step with those windows `silent`, and with that window.

        teacher: the arrays of `self.teacher`, as an argument of the compiled step.
        """
        if window is not None:
            model = with_window(model, window)
        if self._objective.window_dropout:
            model = with_sinks(model, lambda number, sinks: jnp.where(silent[number], ALWAYS, sinks))
        share = self._objective.distillation
        if not share:
            return mean_loss(model, batch)
        old = eqx.combine(teacher, self._static)
        streams = [each_sequence(x.final_stream, batch["tokens"], batch.get("segment_ids")) for x in (model, old)]

        def of_token(logits, stream, target):
            log_new, log_old = (
                jax.nn.log_softmax(x.astype(accumulation_dtype(x))) for x in (logits, old.logits(stream))
            )
            divergence = jnp.sum(jnp.exp(log_old) * (log_old - log_new), axis=-1)
            return (1 - share) * nats_of_tokens(logits, target) + share * divergence

        in_row = lambda x: x.reshape(batch["targets"].size, *x.shape[2:])
        return jnp.mean(by_token(of_token, model, *map(in_row, (*streams, batch["targets"]))))

    def silent(self, number: int) -> Bool[np.ndarray, "layers"]:
        """Which local layers' windows are silent in a step, counted from 1."""
        if not self._objective.window_dropout:
            return np.zeros(self._num_local, bool)
        chance = self._objective.window_dropout * max(0.0, 1 - 2 * (number - 1) / self._steps)
        return self._drawn(number, 0).random(self._num_local) < chance

    def window(self, number: int) -> int | None:
        """The window of a step; None is the model's own."""
        windows = self._objective.windows
        if not windows or number > (1 - OWN) * self._steps:
            return None
        return windows[self._drawn(number, 1).integers(len(windows))]

    def _drawn(self, number: int, what: int) -> np.random.Generator:
        return np.random.default_rng((self._seed, number, what))
