"""Each feature map is its formula, stays finite, and enters the op as it is, called or paired, learned or not."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import token_loop

import pallas
from pallas import feature_map as maps
from pallas.error import relative_rms
from rattn_eqx.attention import RAttention

X = np.random.default_rng(0).standard_normal((3, 2, 4)) * 3 + 0.5


def softmax(x):
    weights = np.exp(x - x.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


def both_signs(function):
    return lambda x: np.concatenate([function(x), function(-x)], axis=-1)


def taylor(x):
    """The monomials of 1 + a + a^2 / 2 in the order of a triangle's rows: a product of two channels is kept once."""
    d = x.shape[-1]
    columns = [np.ones(x.shape[:-1])] + [x[..., i] / d**0.25 for i in range(d)]
    for i in range(d):
        for j in range(i, d):
            columns.append(x[..., i] * x[..., j] / d**0.5 * (np.sqrt(0.5) if i == j else 1))
    return np.stack(columns, axis=-1)


FORMULAS = {
    "softmax": both_signs(softmax),
    "relu": both_signs(lambda x: np.maximum(x, 0)),
    "identity": lambda x: x,
    "elu_plus_one": lambda x: np.where(x > 0, x + 1, np.exp(x)),
    "exp": np.exp,
    "squared_relu": both_signs(lambda x: np.maximum(x, 0) ** 2),
    "taylor": taylor,
}


def test_every_named_map_has_a_formula_here():
    assert maps.named.keys() == FORMULAS.keys()
    assert all(maps.named[name] is getattr(maps, name) for name in FORMULAS)


@pytest.mark.parametrize("name", FORMULAS)
def test_formula(name):
    features = maps.named[name](jnp.asarray(X, jnp.float32))
    np.testing.assert_allclose(features, FORMULAS[name](X), rtol=3e-5, atol=1e-6)
    assert features.shape[-1] == maps.num_features(maps.named[name], X.shape[-1])


@pytest.mark.parametrize("name", FORMULAS)
def test_computed_in_float32_or_wider(name):
    narrow = jnp.asarray(X, jnp.bfloat16)
    features = maps.named[name](narrow)
    assert features.dtype == jnp.float32
    np.testing.assert_array_equal(features, maps.named[name](narrow.astype(jnp.float32)))
    with jax.enable_x64(True):
        wide = maps.named[name](jnp.asarray(X))
        assert wide.dtype == jnp.float64
        np.testing.assert_allclose(wide, FORMULAS[name](X), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.parametrize("size", [1e4, -1e4])
def test_finite_far_out(name, size):
    x = jnp.asarray([size, 1.0, -size, 0.0], jnp.float32)
    features, pull_back = jax.vjp(maps.named[name], x)
    (gradient,) = pull_back(jnp.ones_like(features))
    assert np.isfinite(features).all()
    assert np.isfinite(gradient).all()
    assert np.isfinite(features @ features * 1e6), "a million equal tokens overflow"


def test_exp_is_clipped_and_flat_beyond():
    x = jnp.asarray([-1e4, -10.5, -2.0, 3.0, 10.5, 1e4])
    np.testing.assert_allclose(maps.exp(x), np.exp([-10, -10, -2, 3, 10, 10]), rtol=1e-5)
    gradient = jax.grad(lambda x: maps.exp(x).sum())(x)
    np.testing.assert_allclose(gradient, [0, 0, np.exp(-2), np.exp(3), 0, 0], rtol=1e-5)


@pytest.mark.parametrize("d", [1, 4, 5])
def test_taylor_products(d):
    q, k = np.random.default_rng(d).standard_normal((2, 6, d))
    features = [np.asarray(maps.taylor(jnp.asarray(x, jnp.float32))) for x in (q, k)]
    a = q @ k.T / d**0.5
    np.testing.assert_allclose(features[0] @ features[1].T, 1 + a + a**2 / 2, rtol=1e-4, atol=1e-5)


def test_hedgehog_begins_near_softmax_and_projects():
    x = jnp.asarray(X, jnp.float32)
    hedgehog = maps.Hedgehog(4, key=jax.random.key(0))
    assert relative_rms(hedgehog(x), FORMULAS["softmax"](X)) < 0.3
    wider = maps.Hedgehog(4, 7, key=jax.random.key(0))
    np.testing.assert_allclose(wider(x), FORMULAS["softmax"](X @ np.asarray(wider.weight)), rtol=1e-4, atol=1e-6)
    assert maps.num_features(wider, 4) == 14


def projected(weight):
    return lambda x: jnp.tanh(x @ weight)


WEIGHTS = np.random.default_rng(1).standard_normal((2, 4, 3))
JAX_MAPS = {
    "callable": projected(jnp.asarray(WEIGHTS[0], jnp.float32)),
    "pair": tuple(projected(jnp.asarray(weight, jnp.float32)) for weight in WEIGHTS),
    "taylor": maps.taylor,
    "exp": maps.exp,
}
LOOP_MAPS = {
    "callable": lambda x: np.tanh(x @ WEIGHTS[0]),
    "pair": tuple(lambda x, weight=weight: np.tanh(x @ weight) for weight in WEIGHTS),
    "taylor": taylor,
    "exp": np.exp,
}


@pytest.mark.parametrize("implementation", ["reference", "chunked"])
@pytest.mark.parametrize("name", JAX_MAPS)
def test_in_the_op(implementation, name):
    drawn = token_loop.draw(23, value_size=5)
    arrays = [drawn[name] for name in ("q", "k", "v")]
    output, state = pallas.residual_linear_attention(
        *(jnp.asarray(array, jnp.float32) for array in arrays),
        window=4,
        feature_map=JAX_MAPS[name],
        return_final_state=True,
        implementation=implementation,
        block_sizes=pallas.BlockSizes(chunk=8),
    )
    expected = token_loop.residual_linear_attention(*arrays, window=4, feature_map=LOOP_MAPS[name])
    assert relative_rms(output, expected[0]) < 1e-5
    assert relative_rms(state, expected[1]) < 1e-5


LINEAR = eqx.nn.Linear(4, 6, key=jax.random.key(0))


@pytest.mark.parametrize(
    ("feature_map", "message"),
    [
        (
            (maps.identity, lambda x: x[..., :2]),
            r"\(2, 3, 5, 4\) -> \(2, 3, 5, 4\) and \(2, 5, 4\) -> \(2, 5, 2\); keep",
        ),
        (lambda x: x.sum(axis=-1), r"got \(2, 3, 5, 4\) -> \(2, 3, 5\) and \(2, 5, 4\) -> \(2, 5\); keep every axis"),
        (lambda x: x.mean(axis=0, keepdims=True), r"got \(2, 3, 5, 4\) -> \(1, 3, 5, 4\) and"),
        (LINEAR, r"phi_q raised TypeError on \(2, 3, 5, 4\).*wrap a map of single vectors in jnp.vectorize"),
        (eqx.nn.Linear(4, 4, use_bias=False, key=jax.random.key(0)), "phi_q raised TypeError"),
        (jax.vmap(jax.vmap(LINEAR)), r"phi_q raised TypeError on \(2, 3, 5, 4\)"),
        ((jnp.vectorize(LINEAR, signature="(d)->(f)"), LINEAR), r"phi_k raised TypeError on \(2, 5, 4\)"),
    ],
    ids=["two sizes", "no axis", "mixes tokens", "single vectors", "square", "one axis too few", "phi_k"],
)
def test_a_map_of_another_form_is_refused(feature_map, message):
    x = jnp.ones((5, 2, 4))
    rule = r"phi_q and phi_k must map \(..., d\) to \(..., f\); "
    with pytest.raises(ValueError, match=f"^residual_linear_attention: {rule}.*{message}"):
        pallas.residual_linear_attention(x, x, x, window=2, feature_map=feature_map)
    with pytest.raises(ValueError, match=f"^RAttention: {rule}.*{message}"):
        RAttention(
            8, num_heads=2, num_kv_heads=2, head_size=4, window=2, feature_map=feature_map, key=jax.random.key(0)
        )


VECTORIZED = jnp.vectorize(LINEAR, signature="(d)->(f)")


@pytest.mark.parametrize("phi_k", [VECTORIZED, jax.vmap(jax.vmap(LINEAR))], ids=["vectorized", "axes of keys"])
@pytest.mark.parametrize("implementation", ["reference", "chunked"])
def test_a_map_of_single_vectors_enters_as_its_refusal_says(implementation, phi_k):
    q, k, v = jnp.asarray(np.random.default_rng(3).standard_normal((3, 9, 2, 4)), jnp.float32)
    options: dict[str, Any] = dict(window=2, implementation=implementation)
    output: Any = pallas.residual_linear_attention(q, k, v, feature_map=(VECTORIZED, phi_k), **options)
    loop = lambda x: np.asarray(LINEAR.weight) @ x + np.asarray(LINEAR.bias)
    expected, _ = token_loop.residual_linear_attention(*map(np.asarray, (q, k, v)), window=2, feature_map=loop)
    assert relative_rms(output, expected) < 1e-5
