"""The ops compose with JAX's transformations, and `chunked` stays linear in the number of tokens under them."""

import functools

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
import token_loop

import pallas
from pallas.numerics import relative_rms

BOUND = 1e-5  # float32
WINDOW = 20

compiled = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})  # runs are instant


def draw(seed=0, **sizes):
    sizes = {"num_heads": 2, "num_kv_heads": 1, "head_size": 4, "value_size": 4} | sizes
    return {name: jnp.asarray(x, jnp.float32) for name, x in token_loop.draw(150, seed=seed, **sizes).items()}


def rattention(arrays, ids=None, implementation=None):
    return pallas.rattention(
        **arrays, window=WINDOW, segment_ids=ids, return_final_state=True, implementation=implementation
    )


def loss(arrays, ids=None, implementation=None):
    """Weighs every element of both results differently."""
    results = rattention(arrays, ids, implementation)
    return sum(jnp.sum(jnp.cos(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape) * x) for x in results)


def assert_same(got, expected):
    got, expected = (jax.tree_util.tree_leaves_with_path(tree) for tree in (got, expected))
    for (path, x), (expected_path, y) in zip(got, expected, strict=True):
        name = jax.tree_util.keystr(path)
        assert path == expected_path
        assert relative_rms(x, y) <= BOUND, f"{name}: {relative_rms(x, y):.1e}"


@pytest.fixture(autouse=True)
def _full_precision():
    with jax.default_matmul_precision("highest"):
        yield


def test_jit(implementation):
    arrays = draw()
    op = functools.partial(rattention, implementation=implementation)
    assert_same(compiled(op)(arrays), op(arrays))


def test_vmap(implementation):
    """A batch of sequences under shared parameters, each packed in its own way."""
    parameters = ("swa_gain", "rla_gain", "initial_state", "segment_state")
    sequences = [draw(seed) for seed in range(3)]
    ids = [jnp.asarray(token_loop.segment_ids(length, 150 - length)) for length in (20, 149, 70)]
    for name in parameters:
        for sequence in sequences:
            sequence[name] = sequences[0][name]
    batched = {
        name: x if name in parameters else jnp.stack([sequence[name] for sequence in sequences])
        for name, x in sequences[0].items()
    }
    axes = {name: None if name in parameters else 0 for name in batched}
    one = functools.partial(loss, implementation=implementation)

    def total(batched):
        return jnp.sum(jax.vmap(one, in_axes=(axes, 0))(batched, jnp.stack(ids)))

    value, gradients = compiled(jax.value_and_grad(total))(batched)
    single_call = compiled(jax.value_and_grad(one))
    singles = [single_call(*pair) for pair in zip(sequences, ids, strict=True)]
    assert_same(value, sum(value for value, _ in singles))
    for name in batched:
        single = jnp.stack([gradient[name] for _, gradient in singles])
        assert_same({name: gradients[name]}, {name: jnp.sum(single, 0) if name in parameters else single})


def test_checkpoint(implementation):
    arrays = draw()
    one = functools.partial(loss, implementation=implementation)
    assert_same(compiled(jax.grad(jax.checkpoint(one)))(arrays), compiled(jax.grad(one))(arrays))


def test_scan_over_layers(implementation):
    """A stack of layers as one scan equals a Python loop over them, with the gradients of their weights."""
    t, m, num_layers = 150, 8, 2
    generator = np.random.default_rng(0)
    x = jnp.asarray(generator.standard_normal((t, m)), jnp.float32)
    layers = {name: generator.standard_normal((num_layers, m, 2, 4)) * 0.3 for name in ("q", "k", "v")}
    layers |= {name: generator.standard_normal((num_layers, 2, 4)) for name in ("swa_gain", "rla_gain")}
    layers = {name: jnp.asarray(x, jnp.float32) for name, x in layers.items()}

    def layer(x, weights):
        qkv = [jnp.einsum("tm,mhd->thd", x, weights[name]) for name in ("q", "k", "v")]
        gains = {name: weights[name] for name in ("swa_gain", "rla_gain")}
        y = pallas.rattention(*qkv, **gains, window=WINDOW, implementation=implementation)
        return x + jnp.reshape(jnp.asarray(y), (t, m)), None

    def scanned(layers):
        return jnp.sum(jnp.square(jax.lax.scan(jax.checkpoint(layer), x, layers)[0]))

    def looped(layers):
        y = x
        for i in range(num_layers):
            y, _ = layer(y, {name: weight[i] for name, weight in layers.items()})
        return jnp.sum(jnp.square(y))

    assert_same(compiled(jax.value_and_grad(scanned))(layers), compiled(jax.value_and_grad(looped))(layers))


def test_forward_mode_of_chunked():
    arrays, tangents = draw(), draw(seed=1)
    ids = jnp.asarray(token_loop.segment_ids(90, 60))

    @functools.partial(compiled, static_argnames="implementation")
    def derivative(arrays, tangents, implementation):
        return jax.jvp(lambda arrays: rattention(arrays, ids, implementation), (arrays,), (tangents,))

    assert_same(derivative(arrays, tangents, "chunked"), derivative(arrays, tangents, "reference"))


def inner_jaxprs(parameter):
    """The jaxprs in one parameter of an equation: a body, or a tuple of branches."""
    for value in parameter if isinstance(parameter, tuple | list) else (parameter,):
        if isinstance(value, jax.extend.core.ClosedJaxpr):
            yield value.jaxpr
        elif isinstance(value, jax.extend.core.Jaxpr):
            yield value


def largest_array(jaxpr) -> int:
    """Elements of the largest array that any equation writes, in this jaxpr or one inside it."""
    largest = 0
    for equation in jaxpr.eqns:
        sizes = [variable.aval.size for variable in equation.outvars if hasattr(variable.aval, "size")]
        inner = [largest_array(j) for parameter in equation.params.values() for j in inner_jaxprs(parameter)]
        largest = max([largest, *sizes, *inner])
    return largest


def largest_intermediate(t: int, window: int, implementation: str, *, gradient: bool, packed: bool) -> int:
    shapes = {name: x.shape for name, x in token_loop.draw(2, num_heads=2, num_kv_heads=1, value_size=4).items()}
    arrays = {
        name: jax.ShapeDtypeStruct((t, *shape[1:]) if shape[0] == 2 and len(shape) == 3 else shape, jnp.float32)
        for name, shape in shapes.items()
    }

    def total(arrays):
        ids = jnp.arange(t) // 100 if packed else None
        results = pallas.rattention(
            **arrays, window=window, segment_ids=ids, return_final_state=True, implementation=implementation
        )
        return sum(jnp.sum(x) for x in results)

    return largest_array(jax.make_jaxpr(jax.grad(total) if gradient else total)(arrays).jaxpr)


@pytest.mark.parametrize("gradient", [False, True], ids=["forward", "gradient"])
@pytest.mark.parametrize("window", [0, 64, "t"])
@pytest.mark.parametrize("packed", [False, True], ids=["one document", "packed"])
def test_chunked_has_no_array_of_t_by_t(gradient, window, packed):
    def largest(t):
        at = t if window == "t" else window
        return largest_intermediate(t, at, "chunked", gradient=gradient, packed=packed)

    assert largest(8192) < 8192**2 / 16
    assert largest(32768) <= 4.5 * largest(8192)  # proportional to t, with slack for padding


@pytest.mark.parametrize("gradient", [False, True], ids=["forward", "gradient"])
def test_the_search_finds_the_array_of_the_reference(gradient):
    assert largest_intermediate(4096, 64, "reference", gradient=gradient, packed=False) >= 4096**2
