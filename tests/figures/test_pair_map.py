"""The picture of a head shows what the ops compute: its pairs, its weights, its state and what the state gives back."""

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import pytest

import pallas
from pallas import feature_map as maps
from pallas import reference
from pallas.numerics import relative_rms
from rattn_eqx.figures import pair_map as pm

LENGTH, D = 23, 6
WINDOWS = [0, 1, 5, LENGTH - 1, LENGTH, LENGTH + 3]


def head(scale: float = 1.0, length: int = LENGTH):
    return pm.random_head(length=length, head_size=D, scale=scale, seed=3)


def one_head(x):
    return x[:, None, :]


@pytest.mark.parametrize("window", WINDOWS)
def test_each_causal_pair_is_seen_by_one_branch(window):
    in_window, in_state = pm.branches(LENGTH, window)
    for t in range(LENGTH):
        newest = [t - back for back in range(window) if t - back >= 0]  # the query's own first
        for s in range(LENGTH):
            assert in_window[t, s] == (s in newest)
            assert in_state[t, s] == (s <= t and s not in newest)
    counted = in_window.astype(int) + in_state
    assert np.array_equal(counted, np.tril(np.ones((LENGTH, LENGTH), int)))


@pytest.mark.parametrize("window", WINDOWS)
def test_pairs_are_those_that_move_the_ops(window):
    q, k, _ = map(one_head, head())
    tokens = one_head(jnp.eye(LENGTH))  # the output's channel s is the weight of key s
    found = pm.pair_map(*head(), window=window, feature_map=maps.softmax)
    local = pallas.sliding_window_attention(q, k, tokens, window=window)
    far = pallas.residual_linear_attention(q, k, tokens, window=window)
    assert isinstance(far, jax.Array)
    assert np.array_equal(found.in_window, np.asarray(local[:, 0]) != 0)
    assert np.array_equal(found.in_state, np.asarray(far[:, 0]) != 0)


@pytest.mark.parametrize("window", [0, 5, LENGTH - 1])
@pytest.mark.parametrize("name", maps.named)
def test_feature_weights_are_the_ops_over_their_sizes(name, window):
    q, k, v = head(1.5)
    found = pm.pair_map(q, k, v, window=window, feature_map=maps.named[name])
    scores, _ = reference.residual_linear_attention(
        *map(one_head, (q, k, jnp.eye(LENGTH))),
        window=window,
        feature_map=maps.named[name],
        **dict.fromkeys(("initial_state", "segment_state", "segment_ids")),
    )
    scores = np.asarray(scores[:, 0])
    sizes = np.abs(scores).sum(axis=1, keepdims=True)
    expected = np.where(sizes > 0, scores / np.where(sizes > 0, sizes, 1), 0)
    assert relative_rms(found.feature_weights, expected) < 1e-5
    np.testing.assert_allclose(np.abs(found.feature_weights).sum(axis=1)[window:], 1, rtol=1e-5)


@pytest.mark.parametrize("window", [0, 5, LENGTH - 1])
def test_softmax_weights_are_attentions_to_the_tokens_before(window):
    q, k, v = head(2.0)
    found = pm.pair_map(q, k, v, window=window, feature_map=maps.relu)
    assert not found.softmax_weights[:window].any()
    late, n = q[window:], LENGTH - window  # query t stands at t - W and so sees the keys of its residual set
    full = pallas.sliding_window_attention(one_head(late), one_head(k[:n]), one_head(jnp.eye(n)), window=n)
    np.testing.assert_allclose(found.softmax_weights[window:, :n], full[:, 0], rtol=1e-4, atol=1e-7)
    assert not found.softmax_weights[:, n:].any()


@pytest.mark.parametrize("sink", [None, 1.5])
@pytest.mark.parametrize("window", [0, 1, 5, LENGTH])
def test_the_windows_weights_are_the_ops_of_what_the_window_reads(window, sink):
    (q, k, v), (q_window, k_window, _) = head(), pm.random_head(length=LENGTH, head_size=D, seed=4)
    found = pm.pair_map(q, k, v, window=window, feature_map=maps.relu, q_window=q_window, k_window=k_window, sink=sink)
    tokens = one_head(jnp.eye(LENGTH))
    logits = None if sink is None else jnp.asarray([sink])
    local = pallas.sliding_window_attention(
        one_head(q_window), one_head(k_window), tokens, window=window, sink_logits=logits
    )
    np.testing.assert_allclose(found.window_weights, local[:, 0], rtol=1e-4, atol=1e-7)
    plain = pm.pair_map(q, k, v, window=window, feature_map=maps.relu)
    np.testing.assert_array_equal(found.feature_weights, plain.feature_weights)
    assert window == LENGTH or np.abs(found.softmax_weights - plain.softmax_weights).max() > 0.1


def test_a_prepared_map_is_the_map():
    prepared = pm.prepare(maps.taylor, D)
    ways = [pm.pair_map(*head(), window=5, feature_map=x) for x in (maps.taylor, prepared)]
    np.testing.assert_array_equal(ways[0].feature_weights, ways[1].feature_weights)
    with pytest.raises(ValueError, match=r"^pair_map: the map was prepared for d=6; got d=7; prepare it again"):
        pm.pair_map(*pm.random_head(head_size=7), window=5, feature_map=prepared)


@pytest.mark.parametrize("name", ["softmax", "identity", "taylor"])
def test_singular_values_and_recall_are_those_of_the_ops_state(name):
    q, k, v = head()
    found = pm.pair_map(q, k, v, window=5, feature_map=maps.named[name])
    arrays = map(one_head, (q, k, v))
    _, state = pallas.residual_linear_attention(
        *arrays, window=5, feature_map=maps.named[name], return_final_state=True
    )
    values = np.linalg.svd(np.asarray(state[0], float), compute_uv=False)
    assert relative_rms(found.singular_values[: len(values)], values / values[0]) < 1e-5
    assert not (found.singular_values[len(values) :] > 1e-6).any()
    assert found.effective_rank == pytest.approx(pm.effective_rank(values), rel=1e-4)
    read = np.asarray(maps.named[name](k[:-5]) @ state[0])
    stored = np.asarray(v[:-5])
    cosine = (read * stored).sum(axis=1) / np.linalg.norm(read, axis=1) / np.linalg.norm(stored, axis=1)
    np.testing.assert_allclose(found.recall, cosine, atol=1e-5)


def test_effective_rank():
    assert pm.effective_rank(np.zeros(4)) == 0
    assert pm.effective_rank(np.zeros(0)) == 0
    assert pm.effective_rank(np.array([3.0, 0.0])) == pytest.approx(1)
    assert pm.effective_rank(np.array([2.0, 2.0, 2.0, 2.0, 0.0])) == pytest.approx(4)
    assert pm.effective_rank(np.array([3.0, 1.0])) == pytest.approx(4 / 3**0.75)  # exp of the entropy of 3/4 and 1/4


def test_keys_that_cannot_collide_give_their_values_back():
    k = jnp.eye(D)
    q, v = jnp.ones((D, D)), jnp.asarray(np.random.default_rng(0).standard_normal((D, 4)), jnp.float32)
    found = pm.pair_map(q, k, v, window=0, feature_map=maps.identity)
    assert not found.collisions.any()
    np.testing.assert_allclose(found.recall, 1, rtol=1e-6)
    np.testing.assert_allclose(found.singular_values[:4], found.value_singular_values[:4], rtol=1e-5)
    np.testing.assert_allclose(found.feature_weights, np.tril(np.ones((D, D))) / np.arange(1, D + 1)[:, None])


def test_equal_keys_collide_wholly():
    k, v = jnp.ones((8, D)), jnp.asarray(np.random.default_rng(0).standard_normal((8, D)), jnp.float32)
    found = pm.pair_map(k, k, v, window=3, feature_map=maps.softmax)
    np.testing.assert_allclose(found.collisions, 1 - 1 / 5, rtol=1e-6)
    np.testing.assert_allclose(found.softmax_collisions, 1 - 1 / 5, rtol=1e-6)
    assert found.effective_rank == pytest.approx(1, abs=1e-4)
    assert found.distance == pytest.approx(0, abs=1e-6)
    assert found.uniform_distance == pytest.approx(0, abs=1e-6)


def test_a_pair_of_maps_reads_its_own_side():
    q, k, v = head()
    doubled = (lambda x: x[..., :3], lambda x: 2 * x[..., 3:])
    found = pm.pair_map(q, k, v, window=4, feature_map=doubled)
    last = np.asarray(k[: LENGTH - 4, 3:] @ q[-1, :3])
    np.testing.assert_allclose(found.feature_weights[-1, : LENGTH - 4], last / np.abs(last).sum(), rtol=1e-4, atol=1e-6)
    similar = np.asarray(k[: LENGTH - 4, :3] @ k[: LENGTH - 4, 3:].T)
    own = np.abs(np.diagonal(similar)) / np.abs(similar).sum(axis=1)
    np.testing.assert_allclose(found.collisions, 1 - own, rtol=1e-4, atol=1e-6)


def test_float64_stays_float64():
    with jax.enable_x64(True):
        q, k, v = (x.astype(jnp.float64) for x in head())
        found = pm.pair_map(q, k, v, window=4, feature_map=maps.softmax)
    assert found.feature_weights.dtype == found.singular_values.dtype == np.float64


def test_scale_is_the_size_of_q_and_k_alone():
    (q, k, v), (q2, k2, v2) = pm.random_head(length=500), pm.random_head(length=500, scale=2)
    for x, wide in ((q, q2), (k, k2)):
        np.testing.assert_allclose(wide, 2 * x, rtol=1e-6)
        assert float(jnp.sqrt(jnp.mean(x**2))) == pytest.approx(1, abs=0.02)
    np.testing.assert_array_equal(v, v2)


@pytest.mark.parametrize("window", [0, 1, 5, LENGTH - 2, LENGTH - 1, LENGTH, LENGTH + 3])
@pytest.mark.parametrize("name", ["softmax", "identity"])
def test_every_window_is_drawn(name, window):
    found = pm.pair_map(*head(8.0), window=window, feature_map=maps.named[name])
    figure = pm.draw(found, "a title")
    assert figure.get_suptitle() == "a title"
    pairs = sum(window > t - s for t in range(LENGTH) for s in range(t + 1))
    shown = [text.get_text() for text in figure.axes[0].texts]
    assert shown[:2] == [f"window: {pairs} pairs", f"residual: {LENGTH * (LENGTH + 1) // 2 - pairs} pairs"]
    if window < LENGTH - 1:
        assert all(axes.get_xlabel() and axes.get_ylabel() for axes in figure.axes[:6])
    assert not any("nan" in axes.get_title() for axes in figure.axes)
    assert pm.png(figure).startswith(b"\x89PNG\r\n\x1a\n")


def test_negative_weights_are_said_and_a_pair_of_both_branches_would_be_red():
    found = pm.pair_map(*head(), window=5, feature_map=maps.identity)
    assert [text.get_text() for text in pm.draw(found).axes[2].texts] == ["black: negative"]
    image = pm.draw(found).axes[0].images[0]
    assert image.to_rgba(np.array([[1.0, 2.0, 3.0]]))[0, 2].tolist() == [1, 0, 0, 1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"window": -1}, r"window must be at least 0; got window=-1; it counts keys, the query's own included"),
        ({"feature_map": lambda x: x.sum(axis=-1)}, r"phi_q and phi_k must map .* got \(2, 3, 7, 6\) -> \(2, 3, 7\)"),
        ({"feature_map": lambda x: jnp.log(x)}, r"features must be finite; phi_q gave \d+ of 276 that are not.*clip"),
        ({"feature_map": (maps.relu, lambda x: 1 / maps.relu(x))}, "features must be finite; phi_k gave 276 of 552"),
    ],
)
def test_what_pair_map_refuses(change, message):
    with pytest.raises(ValueError, match=f"^pair_map: {message}"):
        pm.pair_map(*head(), **({"window": 4, "feature_map": maps.relu} | change))


def test_what_random_head_refuses():
    with pytest.raises(ValueError, match=r"^random_head: length must be at least 1; got length=0; pass"):
        pm.random_head(length=0)
    with pytest.raises(ValueError, match=r"^random_head: head_size must be at least 1; got head_size=-2; pass"):
        pm.random_head(head_size=-2)
    for scale in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match=f"^random_head: scale must be positive and finite; got scale={scale}; 1"):
            pm.random_head(scale=scale)


def test_a_layout_engine_set_for_all_figures_is_left_out():
    with matplotlib.rc_context({"figure.constrained_layout.use": True}):
        figure = pm.draw(pm.pair_map(*head(), window=5, feature_map=maps.relu))
    assert figure.get_layout_engine() is None
