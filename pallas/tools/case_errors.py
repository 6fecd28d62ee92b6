"""How far a case's results are from the definition's, and how far they may be."""

import collections
import functools

import numpy as np

from pallas.numerics import relative_rms
from pallas.tools.cases import BOTH, RLA, Case

BOUND = {"float64": 1e-12, "float32": 1e-5, "bfloat16": 5e-3}  # of `chunked`
FLOOR = {"float32": 1e-5, "bfloat16": 3e-3}  # a kernel may be off by this and by twice what `chunked` is off by
CANCELLED = 0.5  # part of the size that gradients would have if they did not cancel
OF_KEYS = ("d k", "d v", "d k_rla")
PER_TOKEN = ("output", "d q", "d q_rla", *OF_KEYS)


def errors(case: Case, got: dict, expected: dict) -> dict[str, float]:
    """Relative RMS error by tensor; infinite where the definition is exactly 0 and the result is not.

    Where the window's softmax is all but one key's, d q and d k are differences of numbers that are all but equal: they
    are measured against no less than CANCELLED of the size they would have if they were not. So are d q_rla and d k_rla
    and what a map's weights get of them, where no residual set holds more than one key: it only scales the output, and
    the norm leaves of that what eps does.
    d sink_logits is a sum over tokens of numbers of either sign: it is measured against no less than the root of their
    squares' sum.
    """
    assert got.keys() == expected.keys()
    size = lambda x: float(np.sqrt(np.mean(np.square(np.asarray(x, np.float64)))))
    found = {name: relative_rms(got[name], expected[name]) for name in expected}
    natural: dict[str, float] = {}
    if case.op != RLA and case.backward and case.window > 0:
        natural |= _sizes_of_window_gradients(case)
    if case.op == BOTH and case.backward:
        of_any, of_keys = _most_in_residual_sets(case)
        if of_any <= 1 or of_keys == 1:
            sizes = _sizes_of_residual_gradients(case, size(expected["d rla_gain"]))
            natural |= sizes if of_any <= 1 else {name: sizes[name] for name in ("d k_rla", "d weight_k")}
    least = {name: CANCELLED * natural[name] for name in natural if name in expected}
    if "d sink_logits" in expected and case.window > 0:
        least["d sink_logits"] = _of_sinks(case)[0]
    for name in least:
        if size(expected[name]) < least[name]:
            found[name] = size(np.asarray(got[name], np.float64) - expected[name]) / least[name]
    for name in ("output", "final_state"):
        if name in expected and np.any(got[name][expected[name] == 0]):
            found[f"{name}, exact zeros"] = np.inf
    return found


@functools.lru_cache(maxsize=64)
def _sizes_of_window_gradients(case: Case) -> dict[str, float]:
    """About what d q and d k are where nothing cancels, for random numbers."""
    h, kv, _, dv = case.sizes
    weights, *_ = _weights(case)
    if case.op == BOTH and case.swa_norm:  # which undoes what a sink does
        weights = weights / np.maximum(weights.sum(axis=1, keepdims=True), 1e-30)
    sharpness = float(np.mean(np.square(weights).sum(axis=1)))
    of_output = case.size  # v, or, where a norm and a gain follow, v / rms(o_swa) times the gain
    if case.op == BOTH and case.swa_norm:
        of_output = (1 + case.mean**2) * (case.mean**2 + sharpness) ** -0.5
    of_queries = abs(case.scale) * case.size_qk * of_output * (dv * sharpness) ** 0.5
    return {"d q": of_queries, "d k": of_queries * (h / kv) ** 0.5}


@functools.lru_cache(maxsize=64)
def _of_sinks(case: Case) -> tuple[float, float]:
    """About the root of the sum of squares, over tokens, of what d sink_logits sums; and how many tokens that is.

    A token's number is the product of its sink's weight, a cotangent and the output, or where a norm follows the normed
    output: were the norm not there, which leaves of that what eps does. Those of a few tokens may be much larger than
    the others': by the fourth moments of the weights, and of a product of two random numbers.
    """
    weights, sinks, keys = _weights(case)
    least = 1e-30  # float32 ends there
    sinks, of_keys, size = np.maximum(sinks, least), np.ones_like(sinks), (1 + case.mean**2) ** 0.5
    if not (case.op == BOTH and case.swa_norm):
        total = weights.sum(axis=1)
        spread = np.square(weights).sum(axis=1) / np.maximum(np.square(total), least)
        size = case.size * (case.mean**2 + float(np.mean(spread))) ** 0.5
        of_keys = np.maximum(keys, least)
    squares = np.maximum(np.square(sinks * of_keys), least**2)
    count = case.t * max(case.batch, 1)
    of_all = size * (case.sizes[3] * count * float(squares.mean())) ** 0.5
    return of_all, count * float(squares.mean() ** 2 / np.square(squares).mean()) / 3


def _size_of_logits(case: Case) -> float:
    """About the largest of the window's."""
    return abs(case.scale) * case.size_qk**2 * case.sizes[2] * (1 + case.mean**2)


def _sizes_of_residual_gradients(case: Case, d_gain: float) -> dict[str, float]:
    """About what d q_rla and d k_rla would be but for the norm, where each key is read alone.

    What reads a number of size x changes by as much as 1 / x of its output, whose size is that of the gain's gradient,
    a sum over tokens: little where eps, not the norm, decides it.
    """
    h, kv, d, dv = case.sizes
    normed = d_gain / (case.t * max(case.batch, 1)) ** 0.5
    of_queries = normed * (1 + case.mean**2) ** 0.5 * (dv / d) ** 0.5 / case.size_rla
    of_map = of_queries * case.size_rla * ((1 + case.mean**2) * case.t * h * max(case.batch, 1)) ** 0.5
    of_keys = of_queries * (case.t * h / (case.num_keys * kv)) ** 0.5
    return {"d q_rla": of_queries, "d k_rla": of_keys, "d weight_q": of_map, "d weight_k": of_map}


def _most_in_residual_sets(case: Case) -> tuple[int, int]:
    """Keys in the largest residual set of any query, of which a start state counts as many; and in the largest of those
    that have a key."""
    ids = case.ids()
    ids = np.zeros((1, case.num_keys), int) if ids is None else ids.reshape(-1, case.num_keys)
    starts = np.stack([np.searchsorted(row, row) for row in ids])[:, case.num_keys - case.t :]  # ids do not fall
    distance = np.arange(case.num_keys - case.t, case.num_keys) - case.window + 1 - starts
    reads_state = np.where(starts == 0, "initial_state" in case.states, "segment_state" in case.states)
    count = np.maximum(distance, 0) + max(case.num_keys, 2) * reads_state
    return int(count.max()), int(count[distance > 0].max(initial=0))


def _weights(case: Case) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The weights of keys [queries, s], for some queries of the first head; of every head's sink beside the first's
    keys [queries, h], and of those keys together beside every head's sink."""
    arrays, ids = case.arrays(), case.ids()
    first = (0,) if case.batch else ()
    q, k = (np.asarray(arrays[name][first], np.float64)[:, 0] for name in ("q", "k"))
    ids = np.zeros(case.num_keys, int) if ids is None else ids[first]
    rows = np.unique(np.linspace(0, case.t - 1, 64).astype(int))
    distance = (rows + case.num_keys - case.t)[:, None] - np.arange(case.num_keys)
    seen = (distance >= 0) & (distance < max(case.window, 1)) & (ids == ids[rows + case.num_keys - case.t][:, None])
    logits = case.scale * q[rows] @ k.T
    sinks = arrays["sink_logits"][None] if case.sinks else np.full((1, case.sizes[0]), -np.inf)
    highest = logits.max(axis=1, keepdims=True, where=seen, initial=-np.inf)
    weights = np.exp(logits - highest, where=seen, out=0 * logits)
    total = weights.sum(axis=1, keepdims=True)
    of_keys = np.log(total) + highest
    total_log = np.logaddexp(sinks, of_keys)
    of_keys = np.exp(of_keys - total_log)
    return weights / total * of_keys[:, :1], np.exp(sinks - total_log), of_keys


def bounds(dtype: str, implementation: str | None, of_chunked: dict[str, float]) -> collections.defaultdict:
    """The largest error of each tensor: fixed for `chunked`, relative to `chunked`'s own for a kernel."""
    if implementation in (None, "chunked"):
        return collections.defaultdict(lambda: BOUND[dtype])
    allowed = {name: 2 * error + FLOOR[dtype] for name, error in of_chunked.items()}
    return collections.defaultdict(float, allowed)  # exact zeros are exact


def allowed(case: Case, implementation: str, expected: dict, of_simpler: dict[str, float]) -> dict[str, float]:
    """`bounds` for random calls: the largest error of each of their tensors. of_simpler: the errors of `chunked` for a
    kernel, and for `chunked` those of the definition in the case's own dtype.

    `chunked` may be off by twice what the definition is, in sums that all but cancel; and a weight of the window's
    softmax is no more exact than its logit, which in float32 is rounded by 2^-24 of it.

    Of kernels, parameters of a map get sums of what its queries and keys get, and are held to the same; a sink's logit
    gets a sum of what the window's output was, and is held to the bound of the output. And where a
    tensor is made of few tokens, its own or, of keys, those of the queries that it sums over, its error is of few
    roundings: with one token the bound is three times as wide, with ten a fifth wider, with a thousand nothing to speak
    of.
    """
    if implementation == "chunked":
        rounded = 0.0 if case.op == RLA or case.dtype == "float64" else 2**-24 * _size_of_logits(case)
        return {name: max(BOUND[case.dtype], 2 * of_simpler.get(name, 0.0)) + rounded for name in expected}
    base = bounds(case.dtype, implementation, of_simpler)
    base["d sink_logits"] = max(base["d sink_logits"], base["output"])
    found = {name: base[name] for name in expected}
    for name in PER_TOKEN:
        if name in found:
            energy = np.square(np.asarray(expected[name], np.float64)).sum(axis=-1)
            few = float(np.square(energy).sum() / max(np.square(energy.sum()), 1e-300))
            if name in OF_KEYS:
                few = max(few, 1 / (case.t * max(case.batch, 1)))
            found[name] *= 1 + 2 * few
    for name, tokens in _tokens_of_parameters(case).items():
        if name in found:
            found[name] *= 1 + 2 / max(tokens, 1)
    of_map = max((base[name] for name in ("d q", "d k", "d q_rla", "d k_rla") if name in expected), default=0.0)
    return found | {name: max(base[name], of_map) for name in expected if name.startswith("d weight")}


def _tokens_of_parameters(case: Case) -> dict[str, float]:
    """How many tokens the gradient of each parameter of the op sums over, at least."""
    rows = case.segments if case.batch and case.segments else (case.segments or (case.num_keys,),)
    in_first = [max(row[0] - (case.num_keys - case.t), 0) for row in rows]
    tokens = {"d initial_state": min(in_first), "d segment_state": min(case.t - count for count in in_first)}
    of_sinks = {"d sink_logits": _of_sinks(case)[1]} if case.sinks and case.backward and case.window else {}
    return tokens | dict.fromkeys(("d swa_gain", "d rla_gain"), case.t) | of_sinks
