"""Someone else's model: their feature map, stacked layers, scan, checkpoint, vmap and optimiser around `RAttention`."""

import equinox as eqx
import jax
import jax.numpy as jnp
import optax

from rattn_eqx.attention import RAttention


class TheirMap(eqx.Module):
    weight: jax.Array

    def __call__(self, x):
        return jax.nn.softplus(x @ self.weight)


class TheirLayer(eqx.Module):
    norm: eqx.nn.LayerNorm
    attention: RAttention

    def __init__(self, key):
        feature_map = TheirMap(jax.random.normal(key, (4, 6)))
        self.norm = eqx.nn.LayerNorm(16)
        self.attention = RAttention(
            16, num_heads=4, num_kv_heads=2, head_size=4, window=3, feature_map=feature_map, key=key
        )

    def __call__(self, x):
        return x + self.attention(jax.vmap(self.norm)(x))


def apply(layers, x):
    parameters, static = eqx.partition(layers, eqx.is_array)

    @eqx.filter_checkpoint
    def one_layer(x, parameters):
        return eqx.combine(parameters, static)(x), None

    return jax.lax.scan(one_layer, x, parameters)[0]


@eqx.filter_value_and_grad
def loss_and_gradients(layers, x, y):
    return jnp.mean(jnp.square(jax.vmap(apply, in_axes=(None, 0))(layers, x) - y))


@eqx.filter_jit
def step(layers, state, x, y):
    loss, gradients = loss_and_gradients(layers, x, y)
    updates, state = optimizer.update(gradients, state, eqx.filter(layers, eqx.is_inexact_array))
    return eqx.apply_updates(layers, updates), state, loss, gradients


layers = eqx.filter_vmap(TheirLayer)(jax.random.split(jax.random.key(0), 3))
optimizer = optax.adam(1e-2)
state = optimizer.init(eqx.filter(layers, eqx.is_inexact_array))
x = jax.random.normal(jax.random.key(1), (2, 12, 16))
y = jnp.roll(x, 5, axis=1)  # further back than the window
losses = []
for _ in range(10):
    layers, state, loss, gradients = step(layers, state, x, y)
    losses.append(float(loss))
assert losses[-1] < 0.8 * losses[0], losses
assert jnp.all(jnp.any(gradients.attention.feature_map.weight != 0, axis=(1, 2))), "their map was not trained"
print(losses[0], losses[-1])
