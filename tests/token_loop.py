"""RATTENTION token by token and head by head in float64 NumPy, and the random inputs it is compared on.

Written from the equations alone (arXiv 2506.15545, section 3), with no vectorisation over tokens or heads, so that it
shares no trick and no mistake with the package.
"""

from collections.abc import Callable

import numpy as np

FeatureMap = Callable[[np.ndarray], np.ndarray]


def draw(
    t: int,
    *,
    s: int | None = None,
    num_heads: int = 4,
    num_kv_heads: int = 2,
    head_size: int = 4,
    value_size: int = 6,
    feature_size: int | None = None,
    seed: int = 0,
) -> dict[str, np.ndarray]:
    """Draws every array argument of `rattention`: scale 1, mean 0.5, by default the softmax map's feature size."""
    s = t if s is None else s
    feature_size = 2 * head_size if feature_size is None else feature_size
    shapes = {
        "q": (t, num_heads, head_size),
        "k": (s, num_kv_heads, head_size),
        "v": (s, num_kv_heads, value_size),
        "q_rla": (t, num_heads, head_size),
        "k_rla": (s, num_kv_heads, head_size),
        "initial_state": (num_kv_heads, feature_size, value_size),
        "segment_state": (num_kv_heads, feature_size, value_size),
        "swa_gain": (num_heads, value_size),
        "rla_gain": (num_heads, value_size),
    }
    generator = np.random.default_rng(seed)
    return {name: generator.standard_normal(shape) + 0.5 for name, shape in shapes.items()}


def segment_ids(*lengths: int, ids: tuple[int, ...] | None = None) -> np.ndarray:
    """One id per token for segments of these lengths; ids count up unless given."""
    return np.repeat(np.arange(len(lengths)) if ids is None else np.array(ids), lengths).astype(np.int32)


def softmax_map(x: np.ndarray) -> np.ndarray:
    return np.concatenate([softmax(x), softmax(-x)])


def relu_map(x: np.ndarray) -> np.ndarray:
    return np.concatenate([np.maximum(x, 0), np.maximum(-x, 0)])


def identity_map(x: np.ndarray) -> np.ndarray:
    return x


def softmax(x: np.ndarray) -> np.ndarray:
    weights = np.exp(x - x.max())
    return weights / weights.sum()


def sliding_window_attention(q, k, v, *, window, scale=None, sink_logits=None, segment_ids=None) -> np.ndarray:
    t, s = q.shape[0], k.shape[0]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    starts = run_starts(segment_ids, s)
    output = np.zeros((t, q.shape[1], v.shape[-1]))
    for row, head in np.ndindex(t, q.shape[1]):
        position, shared = s - t + row, head // (q.shape[1] // k.shape[1])
        keys = range(max(starts[position], position - window + 1), position + 1)
        if keys:
            logits = [scale * np.dot(q[row, head], k[key, shared]) for key in keys]
            values = [v[key, shared] for key in keys]
            if sink_logits is not None:
                logits, values = [*logits, sink_logits[head]], [*values, np.zeros(v.shape[-1])]
            output[row, head] = sum(w * value for w, value in zip(softmax(np.array(logits)), values, strict=True))
    return output


def residual_linear_attention(
    q, k, v, *, window, feature_map=softmax_map, initial_state=None, segment_state=None, segment_ids=None
) -> tuple[np.ndarray, np.ndarray]:
    """The output and the final state."""
    t, s = q.shape[0], k.shape[0]
    phi_q, phi_k = feature_map if isinstance(feature_map, tuple) else (feature_map, feature_map)
    zero = np.zeros((k.shape[1], phi_k(k[0, 0]).size, v.shape[-1]))
    initial_state = zero if initial_state is None else initial_state
    segment_state = zero if segment_state is None else segment_state
    starts = run_starts(segment_ids, s)

    def state_read_at(position: int, shared: int) -> np.ndarray:
        state = (initial_state if starts[position] == 0 else segment_state)[shared].copy()
        for key in range(starts[position], position - window + 1):
            state += np.outer(phi_k(k[key, shared]), v[key, shared])
        return state

    output = np.zeros((t, q.shape[1], v.shape[-1]))
    for row, head in np.ndindex(t, q.shape[1]):
        shared = head // (q.shape[1] // k.shape[1])
        output[row, head] = phi_q(q[row, head]) @ state_read_at(s - t + row, shared)
    return output, np.stack([state_read_at(s - 1, shared) for shared in range(k.shape[1])])


def rattention(
    q,
    k,
    v,
    *,
    window,
    swa_gain,
    rla_gain,
    q_rla=None,
    k_rla=None,
    feature_map=softmax_map,
    scale=None,
    sink_logits=None,
    eps=1e-6,
    initial_state=None,
    segment_state=None,
    segment_ids=None,
) -> tuple[np.ndarray, np.ndarray]:
    """The output and the final state."""
    of_window = dict(window=window, scale=scale, sink_logits=sink_logits, segment_ids=segment_ids)
    local = sliding_window_attention(q, k, v, **of_window)
    residual, final_state = residual_linear_attention(
        q if q_rla is None else q_rla,
        k if k_rla is None else k_rla,
        v,
        window=window,
        feature_map=feature_map,
        initial_state=initial_state,
        segment_state=segment_state,
        segment_ids=segment_ids,
    )
    output = np.zeros_like(local)
    for row, head in np.ndindex(*local.shape[:2]):
        for branch, gain in ((local, swa_gain), (residual, rla_gain)):
            x = branch[row, head]
            output[row, head] += x if gain is None else x / np.sqrt(np.mean(x**2) + eps) * gain[head]
    return output, final_state


def run_starts(segment_ids: np.ndarray | None, s: int) -> list[int]:
    """For each position, the first position of its maximal run of equal ids."""
    starts = [0]
    for position in range(1, s):
        same = segment_ids is None or segment_ids[position] == segment_ids[position - 1]
        starts.append(starts[-1] if same else position)
    return starts
