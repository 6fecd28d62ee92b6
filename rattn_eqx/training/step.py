"""Where a config becomes a model, a batch a loss, and a loss a step: for training, ablations and the benchmark."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import PRNGKeyArray

from rattn_eqx.model.config import ModelConfig
from rattn_eqx.model.language_model import LanguageModel
from rattn_eqx.model.local_layers import own_parameters
from rattn_eqx.model.loss import summed_nats
from rattn_eqx.model.sharding import BATCH, over_batch
from rattn_eqx.training.config import TrainConfig


def build_model(
    config: ModelConfig, training: TrainConfig, *, key: PRNGKeyArray, implementation: str | None = None
) -> LanguageModel:
    """The model that training begins with: in the dtype and with the rematerialisation that `training` names."""
    return LanguageModel(
        config,
        compute_dtype=training.compute_dtype,
        rematerialise=training.rematerialise,
        implementation=implementation,
        key=key,
    )


def learning_rate_schedule(config: TrainConfig) -> optax.Schedule:
    """Linear warm-up from 0 at the first step, then a cosine that would be 0 one step after the last."""
    return optax.warmup_cosine_decay_schedule(0.0, config.learning_rate, config.warmup_steps, config.steps)


def make_optimizer(config: TrainConfig) -> optax.GradientTransformationExtraArgs:
    """AdamW, or RMSProp with momentum as the paper has it; gradients clipped by their global norm.

    Weight decay acts on the matrices of attention and feed-forward alone. A step whose gradients or `others`, numbers
    given to `update`, are not finite leaves parameters and optimiser state as they were, and is counted.
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
    return apply_if_finite(clipped if config.own_rate == 1 else optax.chain(clipped, _scale_own(config.own_rate)))


def _scale_own(factor: float) -> optax.GradientTransformation:
    def scale(updates: Any, _: Any) -> Any:
        return jax.tree.map(lambda x, own: x * factor if own else x, updates, own_parameters(updates))

    return optax.stateless(scale)


def apply_if_finite(inner: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """As that of optax, which looks at the gradients alone: a loss may be NaN where they are not."""

    def init(params):
        return optax.ApplyIfFiniteState(jnp.int32(0), jnp.array(True), jnp.int32(0), inner.init(params))

    def update(updates, state, params=None, *, others=()):
        is_finite = jnp.all(jnp.array([jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves((updates, others))]))
        accept = lambda: inner.update(updates, state.inner_state, params)
        refuse = lambda: (optax.tree.zeros_like(updates), state.inner_state)
        updates, inner_state = jax.lax.cond(is_finite, accept, refuse)
        in_row = jnp.where(is_finite, 0, state.notfinite_count + 1)
        total = jnp.where(is_finite, state.total_notfinite, state.total_notfinite + 1)
        return updates, optax.ApplyIfFiniteState(in_row, is_finite, total, inner_state)

    return optax.GradientTransformationExtraArgs(init, update)


def is_decayed(parameters: Any) -> Any:
    """For each parameter, whether weight decay acts on it: those called `*_weight`, but for a map's of the user."""
    decayed = lambda path: path.endswith("_weight") and ".feature_map" not in path
    return jax.tree_util.tree_map_with_path(lambda path, _: decayed(jax.tree_util.keystr(path)), parameters)


def mean_loss(model: LanguageModel, batch: dict[str, jax.Array], scored: Sequence[jax.Array] = ()) -> jax.Array:
    """Nats per token, over a batch of `tokens`, `targets` and, for packed documents, `segment_ids`: [batch, context].

    `scored`, masks of the targets, makes it the sum of the means over each of them; a mask of nothing adds 0.
    """
    targets = batch["targets"]
    nats = summed_nats(model, batch, scored or [jnp.ones(targets.shape, bool)])
    if not scored:
        return nats[0] / targets.size
    counts = [jnp.maximum(1, jnp.sum(mask)).astype(jnp.float32) for mask in scored]
    return functools.reduce(jnp.add, map(jnp.divide, nats, counts))


def train_step(
    loss_and_gradients: Callable,
    optimizer: optax.GradientTransformationExtraArgs,
    parameters: Any,
    optimizer_state: Any,
    batch: Any,
    *,
    scale: jax.Array | None = None,
) -> tuple[Any, Any, jax.Array, jax.Array]:
    """Parameters, optimiser state, loss and the gradients' norm after a step.

    A loss or norm that is not finite is skipped and counted as gradients are that are not (`make_optimizer`).

    Args:
      loss_and_gradients: of (parameters, batch).
      scale: what the optimiser's update is multiplied by, such as a learning rate that is no part of the program.
    """
    loss, gradients = loss_and_gradients(parameters, batch)
    norm = optax.tree.norm(gradients)
    updates, optimizer_state = optimizer.update(gradients, optimizer_state, parameters, others=(loss, norm))
    if scale is not None:
        updates = jax.tree.map(lambda x: x * scale, updates)
    return optax.apply_updates(parameters, updates), optimizer_state, loss, norm


def make_step(
    static: LanguageModel, config: TrainConfig, mesh: Mesh | None = None, loss: Callable = mean_loss
) -> Callable:
    """The compiled step (parameters, optimiser state, batch) -> (parameters, optimiser state, loss, gradient norm).

    The batch is cut over the mesh's devices, if there is one, and each device's share into `config.microbatches`
    pieces, one after the other.

    Args:
      loss: of (model, batch) and whatever arrays the step is called with after the batch, whole on every device.
    """
    optimizer = make_optimizer(config)

    def loss_and_gradients(parameters, others, batch):
        return jax.value_and_grad(lambda p: loss(eqx.combine(p, static), batch, *others))(parameters)

    def device_mean(parameters, others, batch):
        if config.microbatches == 1:
            return loss_and_gradients(parameters, others, batch)
        pieces = jax.tree.map(lambda x: x.reshape(config.microbatches, -1, *x.shape[1:]), batch)
        zero = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, parameters))
        add = lambda total, piece: (jax.tree.map(jnp.add, total, loss_and_gradients(parameters, others, piece)), None)
        return jax.tree.map(lambda x: x / config.microbatches, jax.lax.scan(add, zero, pieces)[0])

    mean = device_mean
    if mesh is not None:
        mean = over_batch(lambda *arguments: jax.lax.pmean(device_mean(*arguments), BATCH), mesh, 2)

    def step(parameters, optimizer_state, batch, *others):
        of_batch = lambda parameters, batch: mean(parameters, others, batch)
        return train_step(of_batch, optimizer, parameters, optimizer_state, batch)

    return jax.jit(step, donate_argnums=(0, 1))
