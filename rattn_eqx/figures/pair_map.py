"""What one head does with its pairs of query and key under a window and a feature map: numbers, and one figure of them.

One query head and one key/value head, one document, no norm or gain. Arithmetic is NumPy's, so that a new shape
compiles nothing but the feature map.
"""

import dataclasses
import io
from collections.abc import Callable

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, LogNorm, to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator

from pallas.checked import checked
from pallas.checks import check_feature_map
from pallas.feature_map import FeatureMap, as_pair
from pallas.numerics import accumulation_dtype
from rattn_eqx.figures.names import BLACK, BLUE, ORANGE, PLAIN, shown

GREY, FUTURE = "#777777", "#F2F2F2"


@checked
@dataclasses.dataclass(frozen=True)
class PairMap:
    """What `pair_map` computes for t tokens. The state that the last query reads holds n = max(t - window, 0) of them.

    Attributes:
      window: W, how many keys a query sees in its window, its own included.
      in_window: is key s in the window of query t? s <= t and s > t - W.
      in_state: is key s in the residual set of query t? s <= t - W.
      window_weights: softmax over the window of q_t . k_s / sqrt(d), of what the window reads. Rows sum to 1, or to
        less with a sink.
      softmax_weights: the same over the residual set, without a sink: what full attention would do there. Rows sum to
        1; a row without residual keys is 0.
      feature_weights: phi(q_t) . phi(k_s), divided by the sum of their sizes over the residual set, so that sizes sum
        to 1 in each row; 0 where all are 0. The branch itself does not divide: a norm follows it, which takes any
        factor of a row out again.
      distance: total variation between the two, half the sum of |softmax - feature|, averaged over the queries with two
        residual keys or more: 0 is equal, 1 is nothing in common (NaN without such a query).
      uniform_distance: the same between the softmax weights and equal weights, which is what ignoring the query gives.
      singular_values: of the state S = sum over the n stored tokens of phi(k_s)^T v_s, divided by the largest,
        descending; 0 where S is.
      effective_rank: of S, the exponential of the entropy of its singular values' shares of their sum (Roy and
        Vetterli, 2007): between 1 and min(n, f, dv), and 0 for an empty state.
      value_singular_values, value_effective_rank: the same of the n stored values alone, which is a state whose keys
        never collide: phi(k_s) . phi(k_u) = 1 for s = u and 0 otherwise.
      collisions: for each stored key, when phi_q(k_s) itself is the query, the share of what it reads that belongs to
        the other n - 1: 1 - |phi_q(k_s) . phi_k(k_s)| / sum over u of |phi_q(k_s) . phi_k(k_u)|. 0 is its own value
        alone, 1 - 1/n a mean of all, 1 nothing of its own.
      softmax_collisions: the same with exp(k_s . k_u / sqrt(d)) for the product of features.
      recall: the cosine of phi_q(k_s) S with v_s, for each stored key: 1 is the stored value's direction, which is all
        that the norm lets through; 0 where the read value is 0.
    """

    window: int
    in_window: Bool[np.ndarray, "t t"]
    in_state: Bool[np.ndarray, "t t"]
    window_weights: Float[np.ndarray, "t t"]
    softmax_weights: Float[np.ndarray, "t t"]
    feature_weights: Float[np.ndarray, "t t"]
    distance: float
    uniform_distance: float
    singular_values: Float[np.ndarray, "r"]
    effective_rank: float
    value_singular_values: Float[np.ndarray, "r_values"]
    value_effective_rank: float
    collisions: Float[np.ndarray, "n"]
    softmax_collisions: Float[np.ndarray, "n"]
    recall: Float[np.ndarray, "n"]


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A feature map that was checked for a head size, and is compiled once for many calls of `pair_map`."""

    phi_q: Callable
    phi_k: Callable
    head_size: int


def prepare(feature_map: FeatureMap, head_size: int, dtype=jnp.float32) -> Prepared:
    """The map for many calls with heads of one size.

    Raises:
      ValueError: for a map that does not map (..., d) to (..., f), or mixes tokens.
    """
    check_feature_map("pair_map", feature_map, head_size, dtype)
    phi_q, phi_k = as_pair(feature_map)
    compiled = eqx.filter_jit(phi_q)
    return Prepared(compiled, compiled if phi_k is phi_q else eqx.filter_jit(phi_k), head_size)


@checked
def random_head(
    *, length: int = 64, head_size: int = 32, scale: float | int = 1.0, seed: int = 0
) -> tuple[Float[Array, "t d"], Float[Array, "t d"], Float[Array, "t d"]]:
    """q, k and v of one head, independent normal numbers, float32.

    Args:
      length: t, in tokens.
      head_size: d, of queries, keys and values.
      scale: the root mean square of the elements of q and k. A dot product q . k / sqrt(d) has that of scale^2. The
        elements of v have 1.
      seed: the same seed draws the same numbers, which `scale` multiplies.
    """
    for name, value in (("length", length), ("head_size", head_size)):
        if value < 1:
            raise ValueError(f"random_head: {name} must be at least 1; got {name}={value}; pass a positive number")
    if not (0 < scale < np.inf):
        raise ValueError(f"random_head: scale must be positive and finite; got scale={scale}; 1 draws standard normals")
    rng = np.random.default_rng(seed)
    q, k, v = (rng.standard_normal((length, head_size)) for _ in range(3))
    return jnp.asarray(scale * q, jnp.float32), jnp.asarray(scale * k, jnp.float32), jnp.asarray(v, jnp.float32)


@checked
def branches(length: int, window: int) -> tuple[Bool[np.ndarray, "t t"], Bool[np.ndarray, "t t"]]:
    """Which pairs (query t, key s) the window sees, t - W < s <= t, and which the residual branch sees, s <= t - W."""
    t, s = np.arange(length)[:, None], np.arange(length)[None, :]
    return (t - window < s) & (s <= t), s <= t - window


@checked
def effective_rank(singular_values: Float[np.ndarray, "r"]) -> float:
    """exp(-sum of p log p) with p the singular values' shares of their sum (Roy and Vetterli, 2007); 0 if all are 0.

    >>> round(effective_rank(np.array([2.0, 2.0, 2.0, 0.0])), 6), effective_rank(np.zeros(3))
    (3.0, 0.0)
    """
    positive = singular_values[singular_values > 0]
    if not len(positive):
        return 0.0
    shares = positive / positive.sum()
    return float(np.exp(-np.sum(shares * np.log(shares))))


@checked
def pair_map(
    q: Float[Array, "t d"],
    k: Float[Array, "t d"],
    v: Float[Array, "t dv"],
    *,
    window: int,
    feature_map: FeatureMap | Prepared,
    q_window: Float[Array, "t d"] | None = None,
    k_window: Float[Array, "t d"] | None = None,
    sink: float | None = None,
) -> PairMap:
    """Masks, weights, state and collisions of one head, as `PairMap` defines them.

    Args:
      q, k, v: one head as the map reads it, of `random_head`, of a model (`evaluation.heads`) or your own. float64
        stays float64.
      window: W, how many keys a query sees in its window, its own included; 0 leaves all to the residual branch.
      feature_map: a callable (..., d) -> (..., f), or a pair (phi_q, phi_k), as the ops take it; or what `prepare` made
        of it.
      q_window, k_window: q and k as the window reads them, with rotary positions and norms; default: q and k.
      sink: a logit without a value in the window's softmax.

    Raises:
      ValueError: for a negative window, a feature map of another form, or features that are not finite.
    """
    if window < 0:
        raise ValueError(
            f"pair_map: window must be at least 0; got window={window}; it counts keys, the query's own included"
        )
    (length, d), dtype = q.shape, accumulation_dtype(q, k, v)
    if length < 1:
        raise ValueError("pair_map: t must be at least 1; got t=0; pass one query or more")
    prepared = feature_map if isinstance(feature_map, Prepared) else prepare(feature_map, d, dtype)
    if prepared.head_size != d:
        raise ValueError(f"pair_map: the map was prepared for d={prepared.head_size}; got d={d}; prepare it again")
    phi_q, phi_k = prepared.phi_q, prepared.phi_k
    stored = max(length - window, 0)
    both = jnp.concatenate([q, k]).astype(dtype)  # one shape for every window: a map is compiled once for each d
    features_q = _features("phi_q", phi_q, both)
    features_k = features_q if phi_k is phi_q else _features("phi_k", phi_k, both)
    of_queries, of_stored_as_queries = features_q[:length], features_q[length : length + stored]
    of_keys = features_k[length:]
    k_wide, v_wide = (np.asarray(x, features_k.dtype) for x in (k, v))
    of_window = (q if q_window is None else q_window, k if k_window is None else k_window)
    q_near, k_near = (np.asarray(x, features_k.dtype) for x in of_window)

    in_window, in_state = branches(length, window)
    logits = q_near @ k_near.T / d**0.5
    by_softmax = _softmax(logits, in_state)
    by_features = _shares(of_queries @ of_keys.T, in_state)
    uniform = _shares(np.ones_like(by_softmax), in_state)

    everything = np.ones((stored, stored), bool)
    own_scores = of_stored_as_queries @ of_keys[:stored].T
    own_features = _shares(own_scores, everything)
    own_softmax = _softmax(k_wide[:stored] @ k_wide[:stored].T / d**0.5, everything)
    stored_r = _triangle(v_wide[:stored])
    values, of_values = _singular_values(_triangle(of_keys[:stored]) @ stored_r.T), _singular_values(stored_r)
    return PairMap(
        window=window,
        in_window=in_window,
        in_state=in_state,
        window_weights=_softmax(logits, in_window, sink),
        softmax_weights=by_softmax,
        feature_weights=by_features,
        distance=_distance(by_softmax, by_features, in_state),
        uniform_distance=_distance(by_softmax, uniform, in_state),
        singular_values=values,
        effective_rank=effective_rank(values),
        value_singular_values=of_values,
        value_effective_rank=effective_rank(of_values),
        collisions=1 - np.abs(np.diagonal(own_features)),
        softmax_collisions=1 - np.diagonal(own_softmax),
        recall=_cosine(own_scores @ v_wide[:stored], v_wide[:stored]),
    )


@checked
def draw(found: PairMap, title: str = "") -> Figure:
    """The six parts of `found` as one figure: pairs, both kinds of weights, their agreement, the state, collisions."""
    # rcParams may ask for a layout engine, which takes longer than all else; matplotlib's types forget "none".
    figure = Figure(figsize=(12, 7.4), layout="none")  # pyright: ignore[reportArgumentType]
    (pairs, exact, linear), (agreement, state, collisions) = figure.subplots(2, 3)
    figure.subplots_adjust(left=0.06, right=0.93, bottom=0.075, top=0.88, wspace=0.29, hspace=0.33)
    figure.suptitle(shown(title), fontsize=13, **PLAIN)
    _draw_pairs(pairs, found)
    _draw_weights(exact, found, found.softmax_weights, "softmax weights of the residual pairs")
    _draw_weights(linear, found, found.feature_weights, "φ(q)·φ(k) weights of the residual pairs")
    _draw_scale(figure, linear)
    _draw_agreement(agreement, found)
    _draw_state(state, found)
    _draw_collisions(collisions, found)
    return figure


def png(figure: Figure, dots_per_inch: int = 80) -> bytes:
    """The figure as the bytes of a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dots_per_inch)
    return buffer.getvalue()


_MAP, _TIMES = "RdBu_r", LogNorm(1 / 8, 8)
_COLOURS = ScalarMappable(_TIMES, _MAP)


def _features(name: str, phi, x: Float[Array, "t d"]) -> np.ndarray:
    features = np.asarray(phi(x))
    bad = ~np.isfinite(features)
    if bad.any():
        raise ValueError(
            f"pair_map: features must be finite; {name} gave {bad.sum()} of {bad.size} that are not, for inputs up to "
            f"{float(jnp.abs(x).max()):.3g} in size; clip them in the map, or scale q and k down"
        )
    return features


def _softmax(logits: np.ndarray, where: np.ndarray, sink: float | None = None) -> np.ndarray:
    """Softmax over each row's pairs in `where`, and a sink without a weight; 0 elsewhere, and in a row without any."""
    largest = np.max(logits, axis=1, where=where, initial=-np.inf if sink is None else sink, keepdims=True)
    largest = np.where(np.isfinite(largest), largest, 0)
    sizes = np.exp(np.where(where, logits - largest, -np.inf))
    total = sizes.sum(axis=1, keepdims=True) + (0 if sink is None else np.exp(sink - largest))
    return np.divide(sizes, total, out=np.zeros_like(sizes), where=total > 0)


def _shares(scores: np.ndarray, where: np.ndarray) -> np.ndarray:
    """Scores in `where` over the sum of their sizes in the row; 0 elsewhere, and in a row whose sum is 0."""
    scores = np.where(where, scores, 0)
    total = np.abs(scores).sum(axis=1, keepdims=True)
    return np.divide(scores, total, out=np.zeros_like(scores), where=total > 0)


def _distance(x: np.ndarray, y: np.ndarray, where: np.ndarray) -> float:
    several = where.sum(axis=1) > 1
    return float(0.5 * np.abs(x - y).sum(axis=1)[several].mean()) if several.any() else float("nan")


def _triangle(x: np.ndarray) -> np.ndarray:
    """R of x^T = Q R. keys^T values has the singular values of R R'^T, values those of R'."""
    return np.asarray(np.linalg.qr(x.T, mode="r")) if len(x) else np.zeros((0, 0), x.dtype)


def _singular_values(matrix: np.ndarray) -> np.ndarray:
    """Over the largest."""
    found = np.linalg.svd(matrix, compute_uv=False)
    return found / found[0] if len(found) and found[0] > 0 else found


def _cosine(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    sizes = np.linalg.norm(x, axis=1) * np.linalg.norm(y, axis=1)
    return np.divide(np.sum(x * y, axis=1), sizes, out=np.zeros_like(sizes), where=sizes > 0)


def _title(axes: Axes, text: str) -> None:
    axes.set_title(text, fontsize=10, y=1.02)  # without a height, matplotlib measures every label to find one


def _plain_ticks(axis: Axis) -> None:
    """Of a logarithmic axis: 0.01, which unlike a power of ten needs no parser of formulas."""
    axis.set_major_formatter("{x:g}")
    axis.set_minor_locator(NullLocator())


def _nothing(axes: Axes, text: str = "no residual pairs:\nthe window sees all") -> None:
    axes.text(0.5, 0.5, text, ha="center", va="center", transform=axes.transAxes)
    axes.set(xticks=[], yticks=[])


def _draw_square(axes: Axes, picture: np.ndarray, **options) -> None:
    axes.imshow(picture, interpolation="nearest", **options)
    axes.set(xlabel="key position s", ylabel="query position t")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(5, integer=True))


def _note(axes: Axes, height: float, text: str, colour: str) -> None:
    axes.text(0.97, height, text, color=colour, ha="right", va="center", fontsize=9, transform=axes.transAxes)


def _draw_pairs(axes: Axes, found: PairMap) -> None:
    kind = found.in_window + 2 * found.in_state.astype(int)  # a pair of both would be 3, which has a colour too
    _draw_square(axes, kind, cmap=ListedColormap([FUTURE, BLUE, ORANGE, "red"]), vmin=0, vmax=3)
    _title(axes, f"which branch sees the pair, W = {found.window}")
    _note(axes, 0.93, f"window: {found.in_window.sum()} pairs", BLUE)
    _note(axes, 0.85, f"residual: {found.in_state.sum()} pairs", "#A87000")
    _note(axes, 0.77, "the future: unseen", GREY)


def _draw_weights(axes: Axes, found: PairMap, weights: np.ndarray, name: str) -> None:
    """Weights as multiples of a uniform row's, so that rows of all lengths compare."""
    _title(axes, name)
    if not found.in_state.any():
        return _nothing(axes)
    times = weights * found.in_state.sum(axis=1, keepdims=True)
    shown = _COLOURS.to_rgba(np.clip(times, 1 / 8, 8))[..., :3]
    shown[~found.in_state] = to_rgb(FUTURE)
    shown[found.in_state & (times < 0)] = (0, 0, 0)
    _draw_square(axes, shown)
    if (times < 0).any():
        _note(axes, 0.93, "black: negative", "black")


def _draw_scale(figure: Figure, beside: Axes) -> None:
    beside.apply_aspect()
    place = beside.get_position()
    bar = figure.add_axes((place.x1 + 0.008, place.y0, 0.01, place.height))
    bar.pcolormesh([0, 1], np.geomspace(1 / 8, 8, 65), np.geomspace(1 / 8, 8, 64)[:, None], norm=_TIMES, cmap=_MAP)
    bar.set(yscale="log", xticks=[])
    bar.yaxis.set_minor_locator(NullLocator())
    bar.yaxis.tick_right()
    bar.set_yticks([2.0**power for power in range(-3, 4)], ["≤ 1/8", "1/4", "1/2", "1", "2", "4", "≥ 8"], fontsize=8)
    bar.yaxis.set_label_position("right")
    bar.set_ylabel("× mean of the row", fontsize=8, labelpad=0)


def _draw_agreement(axes: Axes, found: PairMap) -> None:
    keys = found.in_state.sum(axis=1, keepdims=True)
    pairs = found.in_state & (keys > 1)
    if not pairs.any():
        _title(axes, "distance from softmax")
        return _nothing(axes, "no query has\ntwo residual keys")
    _title(axes, f"distance from softmax: φ {found.distance:.2f}, uniform {found.uniform_distance:.2f}")
    x, y = ((weights * keys)[pairs] for weights in (found.softmax_weights, found.feature_weights))
    line = np.geomspace(1e-3, 100, 60)
    axes.plot(np.maximum(x, 1e-3), y, ".", markersize=2.5, color=ORANGE, alpha=0.6)
    axes.plot(line, line, color="black", linewidth=1, label="φ = softmax")
    axes.axhline(1, color=GREY, linestyle=":", linewidth=1, label="uniform")
    axes.set(xscale="log", xlim=(0.8e-3, 100), ylim=(min(0, 1.1 * float(y.min())), max(4, 1.1 * float(y.max()))))
    axes.set(xlabel="softmax weight, × mean (≤ 0.001 at the edge)", ylabel="φ weight, × mean of the row")
    _plain_ticks(axes.xaxis)
    axes.legend(fontsize=8, loc="upper left")


def _draw_state(axes: Axes, found: PairMap) -> None:
    n = len(found.collisions)
    _title(axes, f"state of {n} tokens: effective rank {found.effective_rank:.1f}")
    if not n:
        return _nothing(axes)
    for values, rank, colour, name in (
        (found.value_singular_values, found.value_effective_rank, GREY, "values alone"),
        (found.singular_values, found.effective_rank, ORANGE, "state S"),
    ):
        number = np.arange(1, len(values) + 1)
        axes.plot(number, np.maximum(values, 1e-3), ".-", color=colour, label=f"{name}: {rank:.1f}")
    axes.set(yscale="log", ylim=(0.7e-3, 1.5), xlabel="index of the singular value")
    axes.set_ylabel("σ / largest σ (≤ 0.001 at the edge)")
    _plain_ticks(axes.yaxis)
    axes.legend(title="effective rank", fontsize=8, title_fontsize=8, loc="lower left")


def _draw_collisions(axes: Axes, found: PairMap) -> None:
    n = len(found.collisions)
    if not n:
        _title(axes, "collisions")
        return _nothing(axes)
    _title(axes, f"value read back by its own key: median cosine {np.median(found.recall):.2f}")
    for values, colour, name in (
        (found.collisions, ORANGE, f"φ: median {np.median(found.collisions):.2f}"),
        (found.softmax_collisions, BLACK, f"softmax: median {np.median(found.softmax_collisions):.2f}"),
    ):
        axes.plot(np.arange(n), values, ".", color=colour, label=name)
    axes.axhline(1 - 1 / n, color=GREY, linestyle=":", linewidth=1, label=f"all {n} alike: {1 - 1 / n:.2f}")
    axes.set(ylim=(-0.03, 1.45), yticks=[0, 0.25, 0.5, 0.75, 1], xlabel="stored key s")
    axes.set_ylabel("collisions: share read of other keys")
    axes.legend(fontsize=8, loc="upper left")
