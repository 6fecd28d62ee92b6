"""Feature maps phi of the residual branch: callables from `(..., d)` to `(..., f)`.

Each computes in float32 (float64 when its input is float64) and returns that dtype. A user's own map is any callable
of the same form, or a pair `(phi_q, phi_k)`; its parameters are differentiated.
"""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from beartype import beartype
from jaxtyping import Array, Float, PRNGKeyArray, jaxtyped

FeatureMap = Callable | tuple[Callable, Callable]

EXP_LIMIT = 10.0  # exp(10)^2 summed over a million tokens is still far from float32's largest number


def _widen(x: Array) -> Array:
    return x.astype(jnp.float64 if x.dtype == jnp.float64 else jnp.float32)


@jaxtyped(typechecker=beartype)
def softmax(x: Float[Array, "*batch d"]) -> Float[Array, "*batch f"]:
    """The paper's map: phi(x) = [softmax(x), softmax(-x)], so f = 2 d and each half sums to 1."""
    x = _widen(x)
    return jnp.concatenate([jax.nn.softmax(x, axis=-1), jax.nn.softmax(-x, axis=-1)], axis=-1)


@jaxtyped(typechecker=beartype)
def relu(x: Float[Array, "*batch d"]) -> Float[Array, "*batch f"]:
    """phi(x) = [relu(x), relu(-x)], f = 2 d."""
    x = _widen(x)
    return jnp.concatenate([jax.nn.relu(x), jax.nn.relu(-x)], axis=-1)


@jaxtyped(typechecker=beartype)
def squared_relu(x: Float[Array, "*batch d"]) -> Float[Array, "*batch f"]:
    """phi(x) = [relu(x)^2, relu(-x)^2], f = 2 d."""
    return jnp.square(relu(x))


@jaxtyped(typechecker=beartype)
def identity(x: Float[Array, "*batch d"]) -> Float[Array, "*batch d"]:
    """phi(x) = x, f = d: plain linear attention, whose scores may be negative."""
    return _widen(x)


@jaxtyped(typechecker=beartype)
def elu_plus_one(x: Float[Array, "*batch d"]) -> Float[Array, "*batch d"]:
    """phi(x) = elu(x) + 1, f = d (Katharopoulos et al., arXiv 2006.16236)."""
    return jax.nn.elu(_widen(x)) + 1


@jaxtyped(typechecker=beartype)
def exp(x: Float[Array, "*batch d"]) -> Float[Array, "*batch d"]:
    """phi(x) = exp(clip(x, -10, 10)), f = d. Clipped, because a maximum over the sequence would leak the future."""
    return jnp.exp(jnp.clip(_widen(x), -EXP_LIMIT, EXP_LIMIT))


@jaxtyped(typechecker=beartype)
def taylor(x: Float[Array, "*batch d"]) -> Float[Array, "*batch f"]:
    """Second-order Taylor map: phi(q) . phi(k) = 1 + a + a^2 / 2 with a = q . k / sqrt(d) (Based, arXiv 2402.18668).

    f = 1 + d + d (d + 1) / 2, since x_i x_j is kept once: for small d.
    """
    x = _widen(x)
    d = x.shape[-1]
    row, column = jnp.triu_indices(d)
    weight = (jnp.where(row == column, 0.5**0.5, 1.0) / d**0.5).astype(x.dtype)
    second = x[..., row] * x[..., column] * jnp.broadcast_to(weight, (*x.shape[:-1], row.size))
    return jnp.concatenate([jnp.ones_like(x[..., :1]), x / d**0.25, second], axis=-1)


@jaxtyped(typechecker=beartype)
class Hedgehog(eqx.Module):
    """A learned map: phi(x) = [softmax(x W), softmax(-x W)], f = 2 e (after Hedgehog, arXiv 2402.04347).

    W starts as the identity where d = e, so that training begins at the paper's map plus a little noise.
    """

    weight: Float[Array, "d e"]

    def __init__(self, head_size: int, num_features: int | None = None, *, key: PRNGKeyArray):
        num_features = head_size if num_features is None else num_features
        noise = jax.random.normal(key, (head_size, num_features)) * (0.1 / head_size**0.5)
        self.weight = jnp.eye(head_size, num_features) + noise

    @jaxtyped(typechecker=beartype)
    def __call__(self, x: Float[Array, "*batch {self.weight.shape[0]}"]) -> Float[Array, "*batch f"]:
        x = _widen(x)
        return softmax(x @ self.weight.astype(x.dtype))


named = {
    "softmax": softmax,
    "relu": relu,
    "identity": identity,
    "elu_plus_one": elu_plus_one,
    "exp": exp,
    "squared_relu": squared_relu,
    "taylor": taylor,
}


def as_pair(feature_map: FeatureMap) -> tuple[Callable, Callable]:
    """(phi_q, phi_k) of a map or of a pair of maps."""
    return feature_map if isinstance(feature_map, tuple) else (feature_map, feature_map)


def num_features(feature_map: FeatureMap, head_size: int, dtype=jnp.float32) -> int:
    """f, the size of phi's result for a head of size d, found without computing anything."""
    x = jax.ShapeDtypeStruct((1, 1, head_size), dtype)  # axes in front, as keys have
    return jax.eval_shape(lambda x: as_pair(feature_map)[1](x), x).shape[-1]
