"""Someone else's model: their feature map, stacked layers, scan, checkpoint, vmap and optimiser around `RAttention`."""

import equinox as eqx
import jax
import jax.numpy as jnp
import optax

from rattn_eqx import RAttention


class TheirMap(eqx.Module):
    weight: jax.Array

    def __call__(self, x):
        return jax.nn.softplus(x @ self.weight)


def make_layer(key):
    their_map = TheirMap(jax.random.normal(key, (4, 6)))
    return RAttention(16, num_heads=4, num_kv_heads=2, head_size=4, window=3, feature_map=their_map, key=key)


def apply(layers, x):
    parameters, static = eqx.partition(layers, eqx.is_array)
    layer = eqx.filter_checkpoint(lambda x, parameters: (x + eqx.combine(parameters, static)(x), None))
    return jax.lax.scan(layer, x, parameters)[0]


@eqx.filter_jit
def step(layers, state, x, y):
    loss = lambda layers: jnp.mean(jnp.square(jax.vmap(apply, in_axes=(None, 0))(layers, x) - y))
    value, gradients = eqx.filter_value_and_grad(loss)(layers)
    updates, state = optimizer.update(gradients, state)
    return eqx.apply_updates(layers, updates), state, value, gradients


layers = eqx.filter_vmap(make_layer)(jax.random.split(jax.random.key(0), 3))
optimizer = optax.adam(1e-2)
state = optimizer.init(eqx.filter(layers, eqx.is_inexact_array))
x = jax.random.normal(jax.random.key(1), (2, 12, 16))
y = jnp.roll(x, 5, axis=1)  # further back than the window
losses = []
for _ in range(10):
    layers, state, loss, gradients = step(layers, state, x, y)
    losses.append(float(loss))
assert losses[-1] < 0.8 * losses[0], losses
assert jnp.all(jnp.any(gradients.feature_map.weight != 0, axis=(1, 2))), "their map was not trained"
