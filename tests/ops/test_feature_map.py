"""Each feature map is its formula, stays finite, and enters the op as it is, called or paired, learned or not."""

import dataclasses
import functools
import pickle
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import token_loop

import pallas
from pallas import feature_map as maps
from pallas.numerics import relative_rms
from rattn_eqx.model.attention import RAttention

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
    "elu_plus_one": lambda x: np.where(x > 0, x + 1, np.exp(np.minimum(x, 0))),
    "exp": lambda x: np.exp(np.clip(x, -10, 10)),
    "squared_relu": both_signs(lambda x: np.maximum(x, 0) ** 2),
    "taylor": taylor,
}
DERIVATIVES = {  # of a slice of each map that kernels form, in float64; softmax's: a row's Jacobian
    "softmax": lambda x: np.apply_along_axis(lambda p: np.diag(p) - np.outer(p, p), -1, softmax(x)),
    "relu": lambda x: (x > 0) * 1.0,
    "identity": np.ones_like,
    "elu_plus_one": lambda x: np.where(x > 0, 1.0, np.exp(np.minimum(x, 0))),
    "exp": lambda x: np.where(np.abs(x) <= 10, np.exp(np.clip(x, -10, 10)), 0.0),
    "squared_relu": lambda x: 2.0 * np.maximum(x, 0),
}
WIDE = np.array([0, 1e-3, 0.5, 1, 3, 9.5, 10, 10.25, 88, 100, 1e3, 1e4])
WIDE = np.concatenate([-WIDE[:0:-1], WIDE]).reshape(-1, 1) * np.array([1.0, 0.5, 2.0, -1.0])


def test_every_named_map_has_a_formula_here():
    assert maps.named.keys() == FORMULAS.keys()
    assert all(maps.named[name] is getattr(maps, name) for name in FORMULAS)


@pytest.mark.parametrize("name", maps.IN_KERNELS)
def test_value_and_derivative_that_kernels_read(name):
    """Held to the formula by which the definition is written, up to 1e4 and where derivatives jump."""
    row, x = maps.IN_KERNELS[name], jnp.asarray(WIDE, jnp.float32)
    value = row.value(x)
    formula = FORMULAS[name](WIDE)[..., : WIDE.shape[-1]]
    np.testing.assert_allclose(value, formula, rtol=2e-6, atol=1e-30)
    g = np.random.default_rng(0).standard_normal(WIDE.shape)
    found = row.pull_back(x, value, jnp.asarray(g, jnp.float32))
    derivative = DERIVATIVES[name](WIDE)
    expected = derivative * g if derivative.ndim == 2 else np.einsum("nij,nj->ni", derivative, g)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6 if name == "softmax" else 1e-30)
    assert row.sums_to_one == bool(np.allclose(formula.sum(axis=-1), 1))
    assert row.signed == (FORMULAS[name](WIDE).shape[-1] == 2 * WIDE.shape[-1])
    _, pulled = jax.vjp(row, x)  # what the definition differentiates
    both = jnp.asarray(np.concatenate([g, np.zeros_like(g)], axis=-1) if row.signed else g, jnp.float32)
    np.testing.assert_allclose(pulled(both)[0], found, rtol=1e-6, atol=1e-6)


@jax.custom_jvp
def twice_the_gradient(x):
    return maps.relu(x)


twice_the_gradient.defjvp(lambda primals, tangents: (maps.relu(*primals), 2 * jax.jvp(maps.relu, primals, tangents)[1]))


@jax.custom_vjp
def no_gradient(x):
    return maps.softmax(x)


no_gradient.defvjp(lambda x: (maps.softmax(x), x), lambda x, g: (jnp.zeros_like(x),))


def test_a_map_that_is_jitted_or_wrapped_keeps_its_kernel():
    relu, d = maps.relu, 8
    wrapped = (jax.jit(relu), functools.partial(relu), lambda x: relu(x), jax.checkpoint(relu), (relu, jax.jit(relu)))
    assert [maps.in_kernels(phi, d) for phi in wrapped] == [relu] * len(wrapped)
    others = (
        lambda x: 2 * relu(x),
        twice_the_gradient,
        no_gradient,
        dataclasses.replace(relu, value=lambda x: jnp.maximum(x, 1.0)),
        (relu, maps.exp),
        maps.taylor,
        jax.nn.relu,
        maps.Hedgehog(8, key=jax.random.key(0)),
    )
    assert [maps.in_kernels(phi, d) for phi in others] == [None] * len(others)
    assert pickle.loads(pickle.dumps(relu)) is relu


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
    "exp": FORMULAS["exp"],
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
MLP = eqx.nn.MLP(4, 6, 8, 1, key=jax.random.key(0))
MIXING = {
    "maximum over tokens": lambda x: jnp.exp(x - x.max(axis=0)),
    "mean over the last axis but one": lambda x: x - x.mean(axis=-2, keepdims=True),
    "mean over the last but two": lambda x: x - x.mean(axis=-3, keepdims=True) if x.ndim > 3 else x - x[:1],
    "cumulative sum": lambda x: jnp.cumsum(x, axis=0),
    "sort over tokens": lambda x: jnp.sort(x, axis=0),
    "batch statistics": lambda x: (x - x.mean()) / x.std(),
    "a scan along tokens": lambda x: jax.lax.scan(lambda c, y: (c + y, c), jnp.zeros(x.shape[1:]), x)[1],
    "the token before": lambda x: jnp.concatenate([jnp.zeros_like(x[:1]), x[:-1]]),
    "products of tokens": lambda x: (x.reshape(-1, 4) @ x.reshape(-1, 4).T @ x.reshape(-1, 4)).reshape(x.shape),
    "a branch that all decide": lambda x: jax.lax.cond(x.sum() > 0, lambda x: x, lambda x: -x, x),
    "an associative scan": lambda x: jax.lax.associative_scan(jnp.add, x),
    "a convolution along tokens": lambda x: convolved(x),
}
ALIKE = {
    "maximum over a vector": lambda x: jnp.exp(x - x.max(axis=-1, keepdims=True)),
    "a learned projection with a bias": lambda x: jax.nn.softplus(x @ LINEAR.weight.T + LINEAR.bias),
    "vectorized": VECTORIZED,
    "a network": jnp.vectorize(MLP, signature="(d)->(f)"),
    "one that looks at its input's shape": lambda x: x / x.shape[-1] ** 0.5,
    "a reduction of its own": lambda x: x - jax.lax.reduce(x, jnp.float32(0), jnp.hypot, (x.ndim - 1,))[..., None],
    "sorted channels": lambda x: jnp.sort(x, axis=-1),
    "a cumulative sum of channels": lambda x: jnp.cumsum(x, axis=-1),
    "products of channels": lambda x: (x[..., :, None] * x[..., None, :]).reshape(*x.shape[:-1], -1),
    "flattened and back": lambda x: jnp.tanh(x.reshape(-1, 4) @ jnp.ones((4, 3))).reshape(*x.shape[:-1], 3),
    "a loop over channels": lambda x: jax.lax.fori_loop(0, 3, lambda i, y: y + x[..., i][..., None], x),
    "channels by an index of their own": lambda x: jnp.take_along_axis(x, jnp.argsort(x, axis=-1), axis=-1),
    "a row written": lambda x: x.at[..., 0].set(1.0),
}


def convolved(x):
    return jax.lax.conv(x.reshape(1, 1, -1, 4), jnp.ones((1, 1, 3, 1)), (1, 1), "SAME").reshape(x.shape)


def plain(phi):
    return lambda x: phi(x)


def closed_over(phi, parameter):
    return lambda x: phi(x) * jnp.broadcast_to(parameter, jax.eval_shape(phi, x).shape)


def residual(phi):
    x = jnp.ones((5, 2, 4))
    return pallas.residual_linear_attention(x, x, x, window=2, feature_map=phi)


CALLS = {
    "plain": lambda phi: residual(plain(phi)),
    "jitted": lambda phi: residual(jax.jit(plain(phi))),
    "closing over a parameter": lambda phi: jax.jit(lambda w: residual(closed_over(phi, w)))(jnp.float32(2)),
    "inside grad": lambda phi: jax.grad(lambda w: jnp.sum(jnp.asarray(residual(closed_over(phi, w)))))(jnp.float32(2)),
    "inside vmap": lambda phi: jax.vmap(lambda w: residual(closed_over(phi, w)))(jnp.ones(3)),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("name", MIXING)
@pytest.mark.standard_dtype_promotion
def test_a_map_that_mixes_tokens_or_heads_is_refused(name, call):
    rule = "^residual_linear_attention: phi_[qk] must act on the last axis alone"
    with pytest.raises(ValueError, match=rule), jax.numpy_rank_promotion("allow"):
        CALLS[call](MIXING[name])


def test_the_refusal_names_the_map_the_rule_and_the_remedy():
    def batch_norm(x):
        return (x - x.mean()) / x.std()

    rule = r"phi_q must act on the last axis alone; batch_norm \(test_feature_map.py:\d+\) mixes tokens or heads, .*"
    with pytest.raises(ValueError, match=rule + "jnp.vectorize"):
        residual(jax.jit(batch_norm))
    with pytest.raises(ValueError, match=r"through the primitive conv_general_dilated.*feature_map=identity"):
        residual(convolved)


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("name", ALIKE)
def test_a_map_that_looks_alike_and_is_right_is_taken(name, call):
    with jax.numpy_rank_promotion("allow"):
        assert jnp.all(jnp.isfinite(CALLS[call](ALIKE[name])))


@pytest.mark.parametrize("phi_k", [VECTORIZED, jax.vmap(jax.vmap(LINEAR))], ids=["vectorized", "axes of keys"])
@pytest.mark.parametrize("implementation", ["reference", "chunked"])
def test_a_map_of_single_vectors_enters_as_its_refusal_says(implementation, phi_k):
    q, k, v = jnp.asarray(np.random.default_rng(3).standard_normal((3, 9, 2, 4)), jnp.float32)
    options: dict[str, Any] = dict(window=2, implementation=implementation)
    output: Any = pallas.residual_linear_attention(q, k, v, feature_map=(VECTORIZED, phi_k), **options)
    loop = lambda x: np.asarray(LINEAR.weight) @ x + np.asarray(LINEAR.bias)
    expected, _ = token_loop.residual_linear_attention(*map(np.asarray, (q, k, v)), window=2, feature_map=loop)
    assert relative_rms(output, expected) < 1e-5


@pytest.mark.parametrize("name", ["softmax", "relu", "squared_relu", "hedgehog"])
def test_the_halves_of_a_signed_map_are_not_joined(name):
    """XLA of jax 0.11.2 may compute softmax and concatenate in one fusion wrong on an H100: LOG.md, 2026-11-28."""
    phi = maps.Hedgehog(4, key=jax.random.key(0)) if name == "hedgehog" else maps.named[name]
    x = jnp.asarray(X, jnp.float32)
    assert "concatenate" not in str(jax.make_jaxpr(phi)(x))
    np.testing.assert_array_equal(phi(x)[..., 4:], phi(-x)[..., :4])
