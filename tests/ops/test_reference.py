"""`implementation="reference"` equals the token loop, and is exactly zero where nothing is read."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import token_loop
from jax.test_util import check_grads

import pallas
from pallas.numerics import relative_rms

compiled = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})  # runs are instant

WINDOWS = [(t, window) for t in (1, 2, 7, 33) for window in sorted({0, 1, 3, 8, t, t + 5})]
FEATURE_MAPS = {
    "softmax": (token_loop.softmax_map, 2),
    "relu": (token_loop.relu_map, 2),
    "identity": (token_loop.identity_map, 1),
}


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def assert_equals_loop(t, window, *, s=None, sizes=None, ids=None, states=True, feature_map="softmax", **options):
    """Compares the three ops; `options` are scale and eps."""
    loop_map, multiple = FEATURE_MAPS[feature_map]
    sizes = {"num_heads": 4, "num_kv_heads": 2, "head_size": 4, "value_size": 6} | (sizes or {})
    arrays = token_loop.draw(t, s=s, feature_size=multiple * sizes["head_size"], **sizes)
    qkv = [arrays.pop(name) for name in ("q", "k", "v")]
    q_rla, k_rla = arrays["q_rla"], arrays["k_rla"]
    start = {name: arrays.pop(name) for name in ("initial_state", "segment_state")}
    start = (start if states else {}) | {"segment_ids": ids}
    local = {"scale": options.get("scale"), "segment_ids": ids}
    expected = {
        "swa": token_loop.sliding_window_attention(*qkv, window=window, **local),
        "rla": token_loop.residual_linear_attention(q_rla, k_rla, qkv[2], window=window, feature_map=loop_map, **start),
        "rattention": token_loop.rattention(*qkv, window=window, feature_map=loop_map, **arrays, **start, **options),
    }

    rla = {"feature_map": getattr(pallas.feature_map, feature_map), "return_final_state": True}
    static = {"window": window, "implementation": "reference"}

    @compiled
    def reference(qkv, q_rla, k_rla, arrays, start):
        return {
            "swa": pallas.sliding_window_attention(
                *qkv, scale=options.get("scale"), segment_ids=start["segment_ids"], **static
            ),
            "rla": pallas.residual_linear_attention(q_rla, k_rla, qkv[2], **start, **rla, **static),
            "rattention": pallas.rattention(*qkv, **arrays, **start, **rla, **options, **static),
        }

    got = reference(qkv, q_rla, k_rla, arrays, start)
    assert_named_close(got, expected)


def assert_named_close(got, expected, bound=1e-12):
    expected = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(expected)}
    got = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(got)}
    assert got.keys() == expected.keys()
    for name, leaf in expected.items():
        assert got[name].dtype == jnp.float64, name
        assert not np.any(np.asarray(got[name])[leaf == 0]), f"{name}: not exactly zero where the loop is"
        if np.any(leaf):
            error = relative_rms(got[name], leaf)
            assert error <= bound, f"{name}: {error:.1e}"


@pytest.mark.parametrize(("t", "window"), WINDOWS)
def test_lengths_and_windows(t, window):
    assert_equals_loop(t, window)


@pytest.mark.parametrize("heads", [(4, 1), (4, 2), (3, 3)])
def test_grouped_queries(heads):
    assert_equals_loop(7, 3, sizes={"num_heads": heads[0], "num_kv_heads": heads[1], "head_size": 3, "value_size": 5})


@pytest.mark.parametrize(
    ("t", "s", "window", "states"),
    [(1, 9, 3, True), (1, 9, 0, False), (1, 9, 20, True), (7, 8, 1, False), (7, 20, 8, True), (2, 33, 31, False)],
)
def test_more_keys_than_queries(t, s, window, states):
    assert_equals_loop(t, window, s=s, states=states)


@pytest.mark.parametrize(
    "ids",
    [
        token_loop.segment_ids(9, 8),  # longer than the window, so that the boundary leaves it
        token_loop.segment_ids(15, 2),  # the last boundary inside the last query's window
        token_loop.segment_ids(3, 1, 1, 12),
        token_loop.segment_ids(6, 4, 7, ids=(5, -2, 5)),  # an id that comes back is a new segment
        token_loop.segment_ids(16, 1, ids=(1, 0)),
        token_loop.segment_ids(13, 4),  # the last segment begins at s - W: at the last query's first local key
        token_loop.segment_ids(12, 5),  # and one earlier: its first key is the last query's only residual
        token_loop.segment_ids(17),
    ],
    ids=lambda ids: "".join(map(str, ids)),
)
@pytest.mark.parametrize(("t", "states"), [(17, True), (6, False)])
def test_segments(ids, t, states):
    assert_equals_loop(t, 4, s=17, ids=ids, states=states)


@pytest.mark.parametrize("window", [0, 1, 25])
def test_segments_at_other_windows(window):
    assert_equals_loop(15, window, s=20, ids=token_loop.segment_ids(4, 3, 1, 2, 10, ids=(0, 1, 0, 1, 2)))


@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
def test_feature_maps(feature_map):
    assert_equals_loop(12, 3, feature_map=feature_map, ids=token_loop.segment_ids(7, 5))


def test_scale_and_eps():
    assert_equals_loop(12, 5, scale=0.3, eps=0.5)


@pytest.mark.parametrize("window", [1, 5, 20])
def test_sinks_and_a_window_without_a_norm(window):
    arrays: dict[str, Any] = token_loop.draw(12) | {"swa_gain": None, "sink_logits": np.array([-1.0, 0.0, 1.0, 30.0])}
    of_window = {name: arrays[name] for name in ("q", "k", "v", "sink_logits")}
    static = {"window": window, "implementation": "reference"}

    @compiled
    def reference(of_window, arrays):
        alone = pallas.sliding_window_attention(**of_window, **static)
        return alone, pallas.rattention(**arrays, **static, return_final_state=True)

    expected = token_loop.sliding_window_attention(**of_window, window=window)
    assert_named_close(reference(of_window, arrays), (expected, token_loop.rattention(**arrays, window=window)))
    assert np.abs(expected[:, 3]).max() < 1e-9  # a head whose sink is far above all logits attends to nothing


def test_residual_reads_the_local_queries_and_keys_unless_given_its_own():
    arrays = token_loop.draw(9)
    del arrays["q_rla"], arrays["k_rla"]
    static = {"window": 3, "return_final_state": True, "implementation": "reference"}
    got = compiled(lambda arrays: pallas.rattention(**arrays, **static))(arrays)
    assert_named_close(got, token_loop.rattention(**arrays, window=3, eps=1e-6))


def test_final_state_is_returned_only_on_request():
    arrays = jax.tree.map(jnp.asarray, token_loop.draw(9))
    for op, names in ((pallas.residual_linear_attention, "q k v"), (pallas.rattention, "q k v swa_gain rla_gain")):
        some = {name: arrays[name] for name in names.split()}
        static = {"window": 3, "implementation": "reference"}
        output, _ = jax.eval_shape(lambda a, op=op, static=static: op(**a, **static, return_final_state=True), some)
        assert jax.eval_shape(lambda a, op=op, static=static: op(**a, **static), some) == output


def test_gradients_are_the_derivative():
    arrays = jax.tree.map(jnp.asarray, token_loop.draw(9))
    ids = jnp.asarray(token_loop.segment_ids(6, 3))

    @jax.jit
    def op(arrays):
        return pallas.rattention(
            **arrays, window=3, segment_ids=ids, return_final_state=True, implementation="reference"
        )

    check_grads(op, (arrays,), order=1, modes=("fwd", "rev"), atol=1e-7, rtol=1e-7)


def pull_back_ones(op, arrays):
    @compiled
    def pulled_back(arrays):
        output, pull_back = jax.vjp(op, arrays)
        return output, pull_back(jnp.ones_like(output))[0]

    return pulled_back(arrays)


def test_empty_window_is_exactly_zero_without_gradient():
    arrays = {name: array for name, array in token_loop.draw(9).items() if name in "qkv"}
    output, gradients = pull_back_ones(
        lambda a: pallas.sliding_window_attention(**a, window=0, implementation="reference"), arrays
    )
    assert output.shape == (9, 4, 6)
    assert not np.any(output)
    for name, gradient in gradients.items():
        np.testing.assert_array_equal(gradient, np.zeros_like(arrays[name]), err_msg=name)


@pytest.mark.parametrize("window", [9, 20])
def test_empty_residual_is_exactly_zero_without_gradient(window):
    arrays = {name: array for name, array in token_loop.draw(9).items() if name in "qkv"}
    output, gradients = pull_back_ones(
        lambda a: pallas.residual_linear_attention(**a, window=window, implementation="reference"), arrays
    )
    assert not np.any(output)
    for name, gradient in gradients.items():
        np.testing.assert_array_equal(gradient, np.zeros_like(arrays[name]), err_msg=name)


@pytest.mark.parametrize(("window", "silent"), [(0, "swa_gain"), (9, "rla_gain")])
def test_rattention_with_an_empty_branch_has_finite_gradients(window, silent):
    arrays = token_loop.draw(9)
    del arrays["initial_state"], arrays["segment_state"]
    output, gradients = pull_back_ones(
        lambda a: pallas.rattention(**a, window=window, implementation="reference"), arrays
    )
    assert np.all(np.isfinite(output))
    assert all(np.all(np.isfinite(gradient)) for gradient in gradients.values())
    assert not np.any(gradients[silent])
    assert np.any(gradients["v"])


@pytest.mark.standard_dtype_promotion
@pytest.mark.parametrize("window", [1, 4, 9, 12])
def test_the_loop_itself_equals_jax_attention(window):
    arrays = {name: array for name, array in token_loop.draw(9, value_size=4).items() if name in "qkv"}
    q, k, v = (jnp.asarray(array) for array in arrays.values())
    expected = jax.nn.dot_product_attention(q, k, v, is_causal=True, local_window_size=(window - 1, 0))
    got = token_loop.sliding_window_attention(**arrays, window=window)
    np.testing.assert_allclose(got, expected, atol=1e-6)  # JAX takes its softmax in float32


def test_the_loop_itself_equals_a_masked_product():
    q, k, v = (token_loop.draw(9, num_heads=1, num_kv_heads=1)[name][:, 0] for name in "qkv")
    got, _ = token_loop.residual_linear_attention(
        q[:, None], k[:, None], v[:, None], window=3, feature_map=token_loop.identity_map
    )
    np.testing.assert_allclose(got[:, 0], np.tril(q @ k.T, -3) @ v, rtol=1e-12, atol=1e-14)
