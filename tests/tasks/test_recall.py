"""Recall tasks: a solver finds every answer and its distance, seeds fix every byte, scores are counted by hand."""

import hashlib
import itertools
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from recall_solvers import (
    Solver,
    solve_bigrams,
    solve_common_words,
    solve_frequent_words,
    solve_mqar,
    solve_needle,
    solve_variables_in_bytes,
    solve_variables_in_tokens,
    words_of_text,
    words_of_tokens,
)

from rattn_eqx.tasks.draw import below, bits, distinct, shuffled
from rattn_eqx.tasks.recall import DistanceBin, RecallBatch, bigrams, mqar, score, share_beyond
from rattn_eqx.tasks.recall_text import common_words, frequent_words, needle, variables

SAMPLE = Path(__file__).parents[2] / "data" / "sample"
TEXT = b"\n".join(path.read_bytes() for path in sorted(SAMPLE.glob("*.txt")))

# name: generator, length, options, solver, the first 16 hex digits of a hash, scored positions a sample
CASES: dict[str, tuple[Callable, int, dict, Solver, str, int | None]] = {
    "mqar": (mqar, 256, {"gap": 129}, solve_mqar, "6f3f1a1194f9ffb9", 8),
    "mqar, tight": (mqar, 31, {"num_pairs": 8, "num_queries": 8, "gap": 0}, solve_mqar, "5343fdda3f813eb4", 8),
    "mqar, few ids": (mqar, 65, {"num_pairs": 9, "vocabulary_size": 26}, solve_mqar, "4fe46ce7609d4313", 8),
    "bigrams": (bigrams, 256, {"window": 32}, solve_bigrams(64), "dad53326558c98e8", None),
    "bigrams, close": (
        bigrams,
        100,
        {"window": 1, "num_symbols": 9, "run_length": 7},
        solve_bigrams(9),
        "bf4b055b631568ed",
        None,
    ),
    "needle": (needle, 400, {}, solve_needle, "3da4a28431f2d2c1", 7),
    "needle, hex": (needle, 400, {"key": "hex", "num_keys": 5, "num_queries": 3}, solve_needle, "093f29f0e6026490", 21),
    "needle, values": (
        needle,
        400,
        {"key": "number", "num_values": 2, "num_queries": 2},
        solve_needle,
        "a25d5aa8f33b8621",
        28,
    ),
    "needle, corpus": (
        needle,
        333,
        {"haystack": "corpus", "text": TEXT, "gap": 100},
        solve_needle,
        "2a01818c9926a72f",
        7,
    ),
    "needle, needles": (
        needle,
        600,
        {"haystack": "needles", "num_keys": 3, "num_values": 2, "num_queries": 2, "gap": 65},
        solve_needle,
        "a560dc869b17e2bc",
        28,
    ),
    "variables": (variables, 400, {"num_queries": 2, "gap": 64}, solve_variables_in_bytes, "cc3ab7d04c5c85e4", 10),
    "variables, tokens": (
        variables,
        128,
        {"level": "token", "num_chains": 4, "num_queries": 3},
        solve_variables_in_tokens(192),
        "81415aff8e12a503",
        3,
    ),
    "common words": (common_words, 400, {}, solve_common_words(words_of_text, 10, 2), "6b0f24b288256fd7", 18),
    "common words, tokens": (
        common_words,
        128,
        {"level": "token", "num_common": 4, "common": 5, "rare": 3},
        solve_common_words(words_of_tokens, 5, 3),
        "20f377e6c45baf9b",
        4,
    ),
    "frequent words": (frequent_words, 400, {}, solve_frequent_words(words_of_text), "655761c3a1f37039", 18),
    "frequent words, tokens": (
        frequent_words,
        256,
        {"level": "token", "num_frequent": 4},
        solve_frequent_words(words_of_tokens),
        "7e8751e28081b4fb",
        4,
    ),
}


def draw(name: str, seed: int, n: int) -> RecallBatch:
    generator, length, options, *_ = CASES[name]
    return generator(seed, n, length, **options)


def content(batch: RecallBatch) -> str:
    arrays = (batch.tokens, batch.targets, batch.distance)
    return hashlib.sha256(b"".join(np.ascontiguousarray(a, "<i4").tobytes() for a in arrays)).hexdigest()[:16]


@pytest.mark.parametrize("name", CASES)
def test_a_solver_finds_every_answer_and_its_distance(name):
    _, length, _, solve, _, scored_positions = CASES[name]
    batch = draw(name, 1, 1000)
    assert batch.tokens.shape == batch.targets.shape == batch.distance.shape == (1000, length)
    np.testing.assert_array_equal(batch.tokens[:, 1:], batch.targets[:, :-1])
    assert 0 <= batch.tokens.min() <= batch.targets.max() < batch.vocabulary_size
    if scored_positions is not None:
        assert (batch.scored.sum(axis=1) == scored_positions).all()
    assert batch.scored.sum() >= 5000 or scored_positions in (3, 4)
    for tokens, targets, distance in zip(batch.tokens.tolist(), batch.targets, batch.distance, strict=True):
        for place in np.flatnonzero(distance):
            answer, evidence = solve(tokens[: place + 1])
            assert (answer, place - evidence) == (targets[place], distance[place])


@pytest.mark.parametrize("name", ["bigrams", "bigrams, close"])
def test_bigrams_score_all_transitions_last_seen_beyond_the_window(name):
    _, _, options, *_ = CASES[name]
    window, marker = options["window"], options.get("num_symbols", 64)
    batch = draw(name, 2, 50)
    for tokens, targets, distance in zip(batch.tokens, batch.targets, batch.distance, strict=True):
        seen, expected = {}, np.zeros_like(distance)
        for place, (symbol, after) in enumerate(zip(tokens.tolist(), targets.tolist(), strict=True)):
            if marker in (symbol, after):
                continue
            if symbol in seen and place - seen[symbol] >= window:
                expected[place] = place - seen[symbol]
            seen[symbol] = place + 1
        np.testing.assert_array_equal(distance, expected)


@pytest.mark.parametrize("name", [name for name in CASES if CASES[name][0] in (needle, variables)])
def test_text_scores_all_values_of_the_questions_and_nothing_else(name):
    batch = draw(name, 2, 50)
    for tokens, targets, scored in zip(batch.tokens, batch.targets, batch.scored, strict=True):
        sequence = [*tokens.tolist(), int(targets[-1])]
        if CASES[name][2].get("level") == "token":
            expected = [place + 1 for place, token in enumerate(sequence) if token == 1]
        else:
            text = bytes(sequence[1:])
            questions = text.index(b" Again:")
            found = [m for m in re.finditer(rb"(?<= is )[\d, ]+|(?<= = )\d+", text) if m.start() > questions]
            expected = [1 + m.start() + at - 1 for m in found for at in range(len(m[0])) if m[0][at : at + 1].isdigit()]
        assert np.flatnonzero(scored).tolist() == expected


@pytest.mark.parametrize("name", CASES)
def test_the_seed_fixes_every_byte(name):
    batch = draw(name, 7, 300)
    assert content(batch) == content(draw(name, 7, 300)) == CASES[name][4]
    tokens = [draw(name, seed, 300).tokens for seed in (7, 8, 2**64 - 1)]
    assert len({array.tobytes() for array in tokens}) == 3
    assert len({row.tobytes() for row in batch.tokens}) == 300


@pytest.mark.parametrize("name", CASES)
def test_chance_is_what_the_best_blind_guess_scores(name):
    """The commonest target at each place in an answer, chosen on one half of the samples and scored on the other."""
    batch = draw(name, 3, 2000)
    answers = batch.targets[batch.scored].reshape(-1, batch.answer_size)
    half = len(answers) // 2
    guess = np.array([np.bincount(column).argmax() for column in answers[:half].T])
    accuracy = np.mean(answers[half:] == guess)
    samples = answers[half:].size / (1 if CASES[name][0] is not bigrams else 20)  # a sample's transitions repeat
    assert abs(accuracy - batch.chance) < 4.5 * np.sqrt(batch.chance / samples)


CHANCE = {"mqar": 1 / 96, "mqar, tight": 1 / 96, "mqar, few ids": 1 / 9, "bigrams": 1 / 63, "bigrams, close": 1 / 8}
CHANCE |= {"variables, tokens": 1 / 64, "common words, tokens": 1 / 255, "frequent words, tokens": 1 / 255}
CHANCE |= {name: (1 / 21 + 1 / 5) / 2 for name in ("common words", "frequent words")}


@pytest.mark.parametrize("name", CASES)
def test_chance_by_hand(name):
    np.testing.assert_allclose(draw(name, 3, 1).chance, CHANCE.get(name, 1 / 10))


def even(numbers: np.ndarray, kinds: int) -> bool:
    """Whether 0 ... kinds - 1 come equally often, to five standard deviations."""
    counts, expected = np.bincount(numbers.ravel(), minlength=kinds), numbers.size / kinds
    return len(counts) == kinds and abs(counts - expected).max() < 5 * np.sqrt(expected)


def test_mqar_is_laid_out_as_its_docstring_says():
    """Four stretches of 18 tokens, 50 fillers, three queries; ids are 24 keys, 24 values and 16 fillers."""
    batch = mqar(4, 600, 127, num_pairs=4, num_queries=3, gap=50, vocabulary_size=64)
    sequence = np.concatenate([batch.tokens, batch.targets[:, -1:]], axis=1)
    is_key, is_filler = sequence < 24, sequence >= 48
    stretches = is_key[:, :72].reshape(600, 4, 18)
    assert (stretches.sum(axis=2) == 1).all()
    in_stretch = stretches.argmax(axis=2)
    assert (in_stretch % 2 == 0).all()
    assert even(in_stretch // 2, 9)
    places = in_stretch + 18 * np.arange(4)
    written = np.zeros((600, 128), bool)
    np.put_along_axis(written, places, True, axis=1)
    np.put_along_axis(written, places + 1, True, axis=1)
    written[:, 122:] = True
    assert (is_filler == ~written).all()
    assert even(sequence[is_filler] - 48, 16)
    keys, values = (np.take_along_axis(sequence, at, axis=1) for at in (places, places + 1))
    assert even(keys, 24)
    assert even(values - 24, 24)
    assert 0.15 < np.mean([len(set(row)) < 4 for row in values.tolist()]) < 0.32  # of 24 values, four drawn apart
    asked = (sequence[:, 122::2, None] == keys[:, None]).argmax(axis=2)
    assert even(asked, 4)
    assert abs(np.mean((np.diff(asked, axis=1) > 0).all(axis=1)) - 1 / 6) < 0.08  # in the pairs' order by accident only
    assert len({row.tobytes() for row in sequence}) == 600


def test_bigrams_follow_a_rule_of_each_samples_own():
    batch = bigrams(4, 400, 99, window=1, num_symbols=6, run_length=4)
    runs = np.concatenate([batch.tokens, batch.targets[:, -1:]], axis=1).reshape(400, 20, 5)
    assert (runs[:, :, 4] == 6).all()
    assert even(runs[:, :, 0], 6)
    rules = []
    for sample in runs[:, :, :4]:
        pairs = {(a, b) for run in sample.tolist() for a, b in itertools.pairwise(run)}
        rule = dict(pairs)
        assert len(rule) == len(pairs)
        assert all(a != b for a, b in pairs)
        rules += [(b - a) % 6 - 1 for a, b in pairs]
    assert even(np.array(rules), 5)
    assert len({sample.tobytes() for sample in runs}) == 400


def test_gaps_keep_the_evidence_out_of_reach():
    for gap in (0, 1, 100, 239):
        batch = mqar(0, 300, 287, gap=gap)
        assert share_beyond(batch, gap + 1) == 1
    for gap in (0, 1, 30):
        for length in range(33 + gap, 40 + gap):
            batch = mqar(0, 300, length, num_pairs=3, num_queries=2, gap=gap)
            nearest = batch.distance[batch.scored].min()
            assert nearest >= gap + 1
        assert nearest == gap + 1  # no token to spare: the last pair can stand right before the gap
    assert share_beyond(mqar(0, 300, 287, gap=239), 242) < 1  # 1 for a gap one longer
    assert share_beyond(bigrams(0, 30, 300, window=40), 40) == 1
    assert 0 < share_beyond(bigrams(0, 30, 300, window=40), 80) < 1
    for haystack in ("noise", "needles"):
        batch = needle(0, 100, 600, gap=200, haystack=haystack)
        assert share_beyond(batch, 200) == 1
        assert share_beyond(batch, 520) == 0 or batch.distance.max() >= 520
    assert share_beyond(variables(0, 100, 500, gap=200), 200) == 1
    assert share_beyond(needle(0, 300, 600), 200) < 1


@pytest.mark.parametrize(("num_queries", "digits", "whole"), [(1, 0.85, 0.15), (8, 0.89, 0.34)])
def test_what_needles_give_without_their_key(num_queries, digits, whole):
    """Copy any needle that agrees with the digits so far; cross off those that were asked. As the docstring says."""
    assert all(f"{x}" in (needle.__doc__ or "") for x in (digits, whole))
    rng, batch = np.random.default_rng(0), needle(0, 400, 1024, num_keys=8, num_queries=num_queries)
    predictions = np.zeros_like(batch.targets)
    for row, (tokens, targets) in enumerate(zip(batch.tokens, batch.targets, strict=True)):
        left = re.findall(rb" The code of \w+ is (\d{7})\.", bytes(tokens[1:].tolist()))
        for places in np.flatnonzero(batch.scored[row]).reshape(-1, 7):
            answer = bytes(targets[places].tolist())
            for digit, place in enumerate(places):
                agree = [value for value in left if value[:digit] == answer[:digit]]
                predictions[row, place] = agree[rng.integers(len(agree))][digit]
            left.remove(answer)
    result = score(batch, predictions)
    assert abs(result.accuracy - digits) < 0.02
    assert abs(result.exact - whole) < 0.04


def test_share_beyond_counts_the_querys_own_key_to_the_window():
    distance = np.array([[0, 3, 4, 0], [0, 0, 0, 5]], np.int32)
    batch = RecallBatch(np.zeros((2, 4), np.int32), np.zeros((2, 4), np.int32), distance, 0.5, 1, 2)
    assert [share_beyond(batch, window) for window in (3, 4, 5, 6)] == [1, 2 / 3, 1 / 3, 0]
    nothing = RecallBatch(batch.tokens, batch.targets, np.zeros_like(distance), 0.5, 1, 2)
    assert share_beyond(nothing, 1) == 0
    with pytest.raises(ValueError, match="score: nothing is scored in this batch"):
        score(nothing, nothing.targets)


@pytest.mark.parametrize("generator", dict.fromkeys(generator for generator, *_ in CASES.values()))
def test_docstrings_give_the_share_beyond_a_window(generator):
    batch = generator(5, 500, 1024, **{"window": 64} if generator is bigrams else {})
    stated = re.search(r"1,024.*: ([\d.]+)% of 64, ([\d.]+)% of 256, ([\d.]+)% of 512\.", generator.__doc__)
    assert stated is not None
    for share, window in zip(stated.groups(), (64, 256, 512), strict=True):
        assert abs(float(share) / 100 - share_beyond(batch, window)) < 0.05


def test_score_by_hand():
    targets = np.array([[1, 2, 3, 4], [5, 6, 7, 8]], np.int32)
    distance = np.array([[0, 0, 9, 9], [1, 3, 0, 0]], np.int32)
    batch = RecallBatch(np.zeros_like(targets), targets, distance, 0.25, 2, 9)
    predictions = np.array([[0, 0, 3, 4], [5, 0, 7, 8]])
    result = score(batch, predictions)
    assert (result.positions, result.answers, result.accuracy, result.exact, result.chance) == (4, 2, 0.75, 0.5, 0.25)
    assert result.bins == (DistanceBin(1, 2, 1, 1.0), DistanceBin(2, 4, 1, 0.0), DistanceBin(8, 16, 2, 1.0))
    assert score(batch, predictions, (1, 10)).bins == (DistanceBin(1, 10, 4, 0.75),)
    with pytest.raises(ValueError, match="edges must ascend"):
        score(batch, predictions, (1, 1))
    with pytest.raises(ValueError, match=r"batch's shape; got \(2, 3\) for \(2, 4\)"):
        score(batch, predictions[:, 1:])


def test_draws_are_even_and_distinct():
    counts = np.bincount(below(bits("test", 0), (90_000,), 9))
    assert len(counts) == 9
    assert abs(counts - 10_000).max() < 450
    for count, space in ((5, 5), (5, 30), (7, 5000), (3, 26**5)):
        drawn = distinct(bits("test", 1), 1000, count, space)
        assert drawn.min() >= 0
        assert drawn.max() < space
        assert all(len(set(row)) == count for row in drawn.tolist())
        assert abs(drawn.mean(axis=0) / (space - 1) - 0.5).max() < 0.05
    orders = shuffled(bits("test", 2), 6000, 3) @ [9, 3, 1]
    assert abs(np.unique(orders, return_counts=True)[1] - 1000).max() < 150


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: mqar(-1, 1, 128), r"mqar: seed must be at least 0 and below 2\*\*64; got -1"),
        (lambda: mqar(0, 0, 64), "mqar: n must be at least 1; got 0"),
        (lambda: mqar(0, 1, 64, num_pairs=2, num_queries=3), "num_queries must be at most num_pairs"),
        (lambda: mqar(0, 1, 64, num_pairs=9, vocabulary_size=23), "give at least 24 ids or fewer pairs"),
        (lambda: mqar(0, 1, 30, num_pairs=8, num_queries=8, gap=0), "which need length >= 31; give more length"),
        (lambda: mqar(0, 1, 64, gap=-1), "gap=-1"),
        (lambda: bigrams(0, 1, 64, window=0), "bigrams: window must be at least 1; got 0"),
        (lambda: bigrams(0, 1, 64, window=1, num_symbols=2), "num_symbols must be at least 3"),
        (lambda: bigrams(0, 1, 64, window=1, run_length=1), "run_length at least 2"),
        (lambda: needle(0, 1, 600, num_queries=5), "num_queries must be at most num_keys"),
        (lambda: needle(0, 1, 100), "needle: 4 sentences of 31 tokens, gap >= 0 and the questions must fit"),
        (lambda: needle(0, 1, 300, gap=200), "got length=300, gap=200"),
        (lambda: needle(0, 1, 300, gap=150, haystack="needles"), "got length=300, gap=150"),
        (lambda: needle(0, 1, 600, haystack="corpus"), "needs a text of at least 562 bytes .* got none"),
        (lambda: needle(0, 1, 600, haystack="corpus", text=b"short"), "got 5 bytes"),
        (lambda: needle(0, 1, 200, haystack="corpus", text=b" The code of " * 20), "got a text with"),
        (lambda: variables(0, 1, 400, num_queries=3), "num_queries must be at most num_chains"),
        (lambda: variables(0, 1, 100), "variables: 8 sentences of 19 tokens"),
        (lambda: variables(0, 1, 99, level="token", vocabulary_size=16), "give 24, or fewer chains or hops"),
        (lambda: common_words(0, 1, 400, common=2), "common must be above rare; got common=2, rare=2"),
        (lambda: common_words(0, 1, 100), "at least 30 words; got room for 10 .* give a length of 240"),
        (lambda: common_words(0, 1, 999, level="token"), "give 487 ids, less length, or level='byte'"),
        (
            lambda: frequent_words(0, 1, 200, num_frequent=12),
            "counts of the first num_frequent \\+ 1 ranks must differ",
        ),
        (lambda: frequent_words(0, 1, 20), "the list must hold at least 4 words"),
        (lambda: frequent_words(0, 1, 999, level="token", vocabulary_size=20), "frequent_words: vocabulary_size must"),
    ],
)
def test_bad_arguments_are_errors_that_say_what_to_do(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_the_lengths_that_errors_ask_for_suffice():
    assert mqar(0, 2, 31, num_pairs=8, num_queries=8, gap=0).scored.sum() == 16
    assert common_words(0, 2, 240).scored.sum() == 36
    assert common_words(0, 2, 999, level="token", vocabulary_size=487).scored.sum() == 6
    assert variables(0, 2, 99, level="token", vocabulary_size=24).scored.sum() == 2
