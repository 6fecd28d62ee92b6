"""Recall tasks whose answers lie a known distance back: the batch they share, its score, and two tasks over tokens.

`mqar` and `bigrams` stand here; `needle`, `variables`, `common_words` and `frequent_words` in `recall_text.py`. Each
makes a batch from a seed, without a download; `rattn evaluate` scores a trained run on them.

A sample is a sequence of `length + 1` tokens, read as a language model reads text: position i sees the tokens up to
its own and predicts the one after it. Only positions that predict a part of an answer are scored.
"""

import dataclasses
import itertools

import numpy as np
from jaxtyping import Bool, Int32, Integer

from pallas.checked import checked
from rattn_eqx.tasks.draw import below, bits, distinct

_BLOCK = 256  # samples that are made together: their arrays fit in a core's cache


@checked
@dataclasses.dataclass(frozen=True)
class RecallBatch:
    """n samples of t positions.

    `targets` are the tokens one place on. `distance` says at each scored position i how many tokens back the evidence
    lies: i - j, at least 1, where j is the nearest place from which the answer can be known, as each task defines it;
    it is 0 where nothing is scored. A window
    of W keys, the query's own included, sees the evidence if distance < W.

    `chance` is the expected accuracy, over scored positions, of the best guess that knows the task but reads nothing of
    the sample. An answer is `answer_size` scored positions, one after the other. All tokens are below
    `vocabulary_size`.
    """

    tokens: Int32[np.ndarray, "n t"]
    targets: Int32[np.ndarray, "n t"]
    distance: Int32[np.ndarray, "n t"]
    chance: float
    answer_size: int
    vocabulary_size: int

    @property
    @checked
    def scored(self) -> Bool[np.ndarray, "n t"]:
        """Where a part of an answer is predicted."""
        return self.distance > 0


@dataclasses.dataclass(frozen=True)
class DistanceBin:
    """The scored positions with low <= distance < high, and the share of them that is right."""

    low: int
    high: int
    positions: int
    accuracy: float


@dataclasses.dataclass(frozen=True)
class RecallScore:
    """How predictions fared: `accuracy` over scored positions, `exact` over answers that are right in every position.

    `chance` is the batch's, for `accuracy`. Bins without a scored position are left out.
    """

    positions: int
    answers: int
    accuracy: float
    exact: float
    chance: float
    bins: tuple[DistanceBin, ...]


@checked
def share_beyond(batch: RecallBatch, window: int) -> float:
    """The share of scored positions whose evidence a window of `window` keys, the query's included, does not reach.

    That is distance >= window. A stack of such layers reaches further: give num_layers * window for it. 0 if nothing
    is scored.
    """
    distances = batch.distance[batch.scored]
    return float(np.mean(distances >= window)) if distances.size else 0.0


@checked
def score(
    batch: RecallBatch, predictions: Integer[np.ndarray, "n t"], edges: tuple[int, ...] | None = None
) -> RecallScore:
    """Accuracy overall and by distance.

    Args:
      predictions: the token predicted after each position, such as the argmax of a model's logits.
      edges: ascending; bins are [edges[i], edges[i + 1]). Default: the powers of two up to the longest distance.

    Raises:
      ValueError: predictions of another shape, edges that do not ascend, or a batch with nothing scored.
    """
    if predictions.shape != batch.tokens.shape:
        raise ValueError(
            f"score: predictions must have the batch's shape; got {predictions.shape} for {batch.tokens.shape}; "
            "give one token for each position"
        )
    scored = batch.scored
    distances, right = batch.distance[scored], predictions[scored] == batch.targets[scored]
    if not right.size:
        raise ValueError(
            "score: nothing is scored in this batch; got 0 positions; draw more samples, longer ones, "
            "or a smaller window"
        )
    if edges is None:
        edges = tuple(2**power for power in range(int(distances.max()).bit_length() + 1))
    if any(low >= high for low, high in itertools.pairwise(edges)):
        raise ValueError(f"score: edges must ascend; got {edges}")
    bins = []
    for low, high in itertools.pairwise(edges):
        inside = right[(low <= distances) & (distances < high)]
        if inside.size:
            bins.append(DistanceBin(low, high, inside.size, float(inside.mean())))
    whole = right.reshape(-1, batch.answer_size).all(axis=1)
    return RecallScore(right.size, whole.size, float(right.mean()), float(whole.mean()), batch.chance, tuple(bins))


@checked
def mqar(
    seed: int,
    n: int,
    length: int,
    *,
    num_pairs: int = 16,
    num_queries: int = 8,
    gap: int | None = None,
    vocabulary_size: int = 256,
) -> RecallBatch:
    """Multi-query associative recall (Arora et al., arXiv 2312.04927) with a gap between the pairs and the queries.

    A sample of length + 1 tokens: a part that holds `num_pairs` pairs "key value" among fillers, then at least `gap`
    fillers, then, at its very end, `num_queries` pairs "key value" of before, each another one, in random order. The
    keys of a sample differ; its values are drawn independently. The first part is cut into `num_pairs` equal stretches
    and each pair stands at a random even place of its own stretch. Fillers are the token ids left over: of
    `vocabulary_size` ids the first 3/8 are keys, the next 3/8 values, the rest fillers.

    Scored: the position of each query's key, which predicts its value. Distance: to the value in the pair, at least
    gap + 1, so that share_beyond(batch, W) is 1 for W <= gap + 1. For layers of window W give gap >= num_layers * W:
    then no stack of windows carries the answer. Chance: 1 / the number of values; a guess among the values of the
    sample would score about 1 / num_pairs.

    Beyond a window, at length 1,024: 100.0% of 64, 100.0% of 256, 100.0% of 512.

    Args:
      seed: 0 to 2**64 - 1; fixes every byte.
      gap: fillers between the last pair's stretch and the first query; default: half of the length.

    Raises:
      ValueError: counts below 1, more queries than pairs, fewer key ids than pairs, or pairs that do not fit.
    """
    gap = length // 2 if gap is None else gap
    room = length + 1 - gap - 2 * num_queries
    num_keys = num_values = vocabulary_size * 3 // 8
    num_fillers = vocabulary_size - num_keys - num_values
    require_counts("mqar", n=n, num_pairs=num_pairs, num_queries=num_queries)
    if num_queries > num_pairs:
        raise ValueError(
            f"mqar: num_queries must be at most num_pairs; got num_queries={num_queries}, num_pairs={num_pairs}"
        )
    if num_keys < num_pairs or vocabulary_size > 2**15:
        raise ValueError(
            "mqar: vocabulary_size must give each pair a key of its own from 3/8 of the ids, and be at most 32768; "
            f"got vocabulary_size={vocabulary_size} for num_pairs={num_pairs}; "
            f"give at least {-(-8 * num_pairs // 3)} ids or fewer pairs"
        )
    slots = room // 2 // num_pairs  # even places in a stretch
    if slots < 1 or gap < 0:
        raise ValueError(
            f"mqar: pairs, gap >= 0 and queries must fit in length + 1 tokens; got length={length}, gap={gap}, "
            f"num_pairs={num_pairs}, num_queries={num_queries}, which need length >= "
            f"{2 * num_pairs + max(gap, 0) + 2 * num_queries - 1}; give more length, fewer pairs or a smaller gap"
        )
    fillers = (num_keys + num_values + np.arange(256) * num_fillers // 256).astype(np.int32)
    sequence = np.empty((n, length + 1), np.int32)
    distance = np.zeros((n, length), np.int32)
    stretches = 2 * slots * np.arange(num_pairs)
    key_places = length + 1 - 2 * num_queries + 2 * np.arange(num_queries)
    for block, start in enumerate(range(0, n, _BLOCK)):
        source, part = bits("mqar", seed, block), slice(start, min(start + _BLOCK, n))
        rows = np.arange(part.stop - start)[:, None]
        noise = source.random_raw((len(rows) * (length + 1) + 7) // 8).astype("<u8").view(np.uint8)
        np.take(fillers, noise[: len(rows) * (length + 1)].reshape(-1, length + 1), out=sequence[part], mode="clip")
        keys = distinct(source, len(rows), num_pairs, num_keys)
        values = num_keys + below(source, keys.shape, num_values)
        places = stretches + 2 * below(source, keys.shape, slots)
        asked = distinct(source, len(rows), num_queries, num_pairs)
        written = sequence[part]
        written[rows, places], written[rows, places + 1] = keys, values
        written[:, key_places], written[:, key_places + 1] = keys[rows, asked], values[rows, asked]
        distance[part, key_places] = key_places - (places[rows, asked] + 1)
    return as_batch(sequence, distance, 1 / num_values, 1, vocabulary_size)


@checked
def bigrams(seed: int, n: int, length: int, *, window: int, num_symbols: int = 64, run_length: int = 4) -> RecallBatch:
    """In-context bigrams: every sample has its own rule of what follows what, scored where it was last seen long ago.

    Each sample draws a successor f(a) != a for each of `num_symbols` symbols, independently. Its length + 1 tokens are
    runs of `run_length` symbols, each run a random start a, then f(a), f(f(a)), ..., and after each run the marker, id
    `num_symbols`. The last run may be cut.

    Scored: positions i that hold a symbol a and are followed by f(a), where the transition from a was seen before, and
    its last time, tokens j - 1 and j, lies beyond the window: i - j >= window. Distance: i - j. So
    share_beyond(batch, window) is 1. More symbols give longer distances: about num_symbols in the mean, with many
    around it, since symbols on a short cycle of f come often. Chance: 1 / (num_symbols - 1). A batch of few or short
    samples may have no scored position at all.

    Beyond a window, at length 1,024 and window=64: 100.0% of 64, 14.3% of 256, 2.2% of 512.

    Raises:
      ValueError: n or window below 1, fewer than 3 symbols or more than 32767, or runs shorter than 2.
    """
    require_counts("bigrams", n=n, length=length, window=window)
    if not 3 <= num_symbols < 2**15 or run_length < 2:
        raise ValueError(
            "bigrams: num_symbols must be at least 3 and below 32768, and run_length at least 2; "
            f"got num_symbols={num_symbols}, run_length={run_length}"
        )
    source = bits("bigrams", seed)
    others = below(source, (n, num_symbols), num_symbols - 1)
    successor = others + (others >= np.arange(num_symbols))
    num_runs = -(-(length + 1) // (run_length + 1))
    runs = np.full((n, num_runs, run_length + 1), num_symbols, np.int16)
    runs[:, :, 0] = below(source, (n, num_runs), num_symbols)
    for place in range(1, run_length):
        runs[:, :, place] = np.take_along_axis(successor, runs[:, :, place - 1].astype(np.int64), axis=1)
    sequence = runs.reshape(n, -1)[:, : length + 1]
    follows = (sequence[:, :-1] != num_symbols) & (sequence[:, 1:] != num_symbols)
    sources = np.where(follows, sequence[:, :-1], num_symbols)
    order = np.argsort(sources, axis=1, kind="stable")  # transitions from the same symbol, in order of place
    ranked = np.take_along_axis(sources, order, axis=1)
    again = (ranked[:, 1:] == ranked[:, :-1]) & (ranked[:, 1:] != num_symbols)
    back = np.where(again, order[:, 1:] - (order[:, :-1] + 1), 0)
    distance = np.zeros((n, length), np.int32)
    np.put_along_axis(distance, order[:, 1:], np.where(back >= window, back, 0).astype(np.int32), axis=1)
    return as_batch(sequence.astype(np.int32), distance, 1 / (num_symbols - 1), 1, num_symbols + 1)


def as_batch(
    sequence: np.ndarray, distance: np.ndarray, chance: float, answer_size: int, vocabulary_size: int
) -> RecallBatch:
    """The batch of sequences [n, t + 1]; tokens and targets are views of them."""
    return RecallBatch(sequence[:, :-1], sequence[:, 1:], distance, chance, answer_size, vocabulary_size)


def require_counts(op: str, **counts: int) -> None:
    """A ValueError for a count below 1."""
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"{op}: {name} must be at least 1; got {count}")


if __name__ == "__main__":  # `python -m rattn_eqx.tasks.recall` prints how fast samples are made
    import time

    seconds = []
    for _ in range(5):
        began = time.perf_counter()
        for seed in range(10):
            mqar(seed, 10_000, 1024)
        seconds.append(time.perf_counter() - began)
    rates = sorted(100_000 / x for x in seconds)
    print(f"mqar: {rates[-1]:,.0f} samples of length 1,024 a second, the best of 5; the worst {rates[0]:,.0f}")
