"""Where a batch becomes a loss, and a loss a step."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from rattn_eqx.model.language_model import LanguageModel, batch_logits
from rattn_eqx.model.loss import cross_entropy
from rattn_eqx.model.sharding import BATCH, over_batch
from rattn_eqx.training.config import TrainConfig


def learning_rate_schedule(config: TrainConfig) -> optax.Schedule:
    """Linear warm-up from 0 at the first step, then a cosine that would be 0 one step after the last."""
    return optax.warmup_cosine_decay_schedule(0.0, config.learning_rate, config.warmup_steps, config.steps)


def make_optimizer(config: TrainConfig) -> optax.GradientTransformation:
    """AdamW, or RMSProp with momentum as the paper has it; gradients clipped by their global norm.

    Weight decay acts on the matrices of attention and feed-forward alone. A step whose gradients are not finite leaves
    parameters and optimiser state as they were, and is counted.
    """
    schedule = learning_rate_schedule(config)
    if config.optimizer == "adamw":
        update = optax.adamw(schedule, b1=0.9, b2=0.95, weight_decay=config.weight_decay, mask=is_decayed)
    else:
        update = optax.chain(
            optax.scale_by_rms(decay=0.95, eps_in_sqrt=False),
            optax.trace(decay=0.9),
            optax.add_decayed_weights(config.weight_decay, mask=is_decayed),
            optax.scale_by_learning_rate(schedule),
        )
    clipped = optax.chain(optax.clip_by_global_norm(config.clip_norm), update)
    return optax.apply_if_finite(clipped, max_consecutive_errors=2**31 - 1)


def is_decayed(parameters: Any) -> Any:
    """For each parameter, whether weight decay acts on it: those called `*_weight`."""
    return jax.tree_util.tree_map_with_path(lambda path, _: jax.tree_util.keystr(path).endswith("_weight"), parameters)


def mean_loss(model: LanguageModel, batch: dict[str, jax.Array]) -> jax.Array:
    """Nats per token, over a batch of `tokens`, `targets` and `segment_ids`, each [batch, context]."""
    targets = batch["targets"]
    logits = batch_logits(model, batch["tokens"], batch["segment_ids"])
    return cross_entropy(logits, targets, jnp.ones(targets.shape, bool)) / targets.size


def make_step(static: LanguageModel, config: TrainConfig, mesh: Mesh) -> Callable:
    """The compiled step (parameters, optimiser state, batch) -> (parameters, optimiser state, loss, gradient norm).

    The batch is cut over devices, and each device's share into `config.microbatches` pieces, one after the other.
    """
    optimizer = make_optimizer(config)

    def loss_and_gradients(parameters, batch):
        return jax.value_and_grad(lambda p: mean_loss(eqx.combine(p, static), batch))(parameters)

    def device_mean(parameters, batch):
        if config.microbatches == 1:
            total = loss_and_gradients(parameters, batch)
        else:
            pieces = jax.tree.map(lambda x: x.reshape(config.microbatches, -1, *x.shape[1:]), batch)
            zero = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, parameters))
            add = lambda total, piece: (jax.tree.map(jnp.add, total, loss_and_gradients(parameters, piece)), None)
            total = jax.tree.map(lambda x: x / config.microbatches, jax.lax.scan(add, zero, pieces)[0])
        return jax.lax.pmean(total, BATCH)

    mean = over_batch(device_mean, mesh, 1)

    def step(parameters, optimizer_state, batch):
        loss, gradients = mean(parameters, batch)
        updates, optimizer_state = optimizer.update(gradients, optimizer_state, parameters)
        return optax.apply_updates(parameters, updates), optimizer_state, loss, optax.tree.norm(gradients)

    return jax.jit(step, donate_argnums=(0, 1))
