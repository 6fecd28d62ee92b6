"""Bugs planted in the recall tasks' generators are caught by the tests of `test_recall.py`, hashes aside."""

import inspect
import sys
from collections.abc import Callable

import pytest
import test_recall

from rattn_eqx.tasks import draw, recall, recall_text

SOLVER = test_recall.test_a_solver_finds_every_answer_and_its_distance
BLIND = test_recall.test_chance_is_what_the_best_blind_guess_scores
MQAR = test_recall.test_mqar_is_laid_out_as_its_docstring_says
BIGRAMS = test_recall.test_bigrams_follow_a_rule_of_each_samples_own
GAPS = test_recall.test_gaps_keep_the_evidence_out_of_reach
CHANCE = test_recall.test_chance_by_hand
SAME = test_recall.test_the_seed_fixes_every_byte
DRAWS = test_recall.test_draws_are_even_and_distinct

VALUES = "values = num_keys + below(source, keys.shape, num_values)"
ASKED = "asked = distinct(source, len(rows), num_queries, num_pairs)"
EVIDENCE = "len(between) + np.arange(_VALUE)\n    first"

BUGS = {  # function, line, line with the bug, test, its case
    "distance one short": (recall.mqar, "(places[rows, asked] + 1)", "(places[rows, asked] + 2)", SOLVER, "mqar"),
    "gap one short": (recall.mqar, "length + 1 - gap - 2", "length + 2 - gap - 2", GAPS, None),
    "a value is a key": (recall.mqar, VALUES, VALUES.replace("num_keys + ", ""), SOLVER, "mqar"),
    "a value follows from its key": (recall.mqar, VALUES, "values = num_keys + keys", MQAR, None),
    "values never repeat": (
        recall.mqar,
        VALUES,
        VALUES.replace("below", "distinct").replace("keys.shape", "*keys.shape"),
        MQAR,
        None,
    ),
    "half of the values": (recall.mqar, VALUES, VALUES.replace("num_values)", "num_values // 2)"), BLIND, "mqar"),
    "a filler is a value": (recall.mqar, "(num_keys + num_values + np", "(num_keys + num_values - 1 + np", MQAR, None),
    "a query comes twice": (
        recall.mqar,
        ASKED,
        "asked = below(source, (len(rows), num_queries), num_pairs)",
        SOLVER,
        "mqar",
    ),
    "queries in the pairs' order": (
        recall.mqar,
        ASKED,
        ASKED.replace("distinct", "np.sort(distinct") + ")",
        MQAR,
        None,
    ),
    "the answer stands before its query": (
        recall.mqar,
        "    return as_batch(sequence, distance, 1 / num_values",
        "    sequence[:, key_places[0] - 1] = sequence[:, key_places[0] + 1]\n"
        "    return as_batch(sequence, distance, 1 / num_values",
        MQAR,
        None,
    ),
    "pairs at one place": (recall.mqar, "2 * below(source, keys.shape, slots)", "2 * (slots // 2)", MQAR, None),
    "blocks repeat": (recall.mqar, 'bits("mqar", seed, block)', 'bits("mqar", seed)', MQAR, None),
    "chance of keys and values": (
        recall.mqar,
        "distance, 1 / num_values",
        "distance, 1 / (2 * num_values)",
        CHANCE,
        "mqar",
    ),
    "a transition from the place before": (recall.bigrams, "(order[:, :-1] + 1)", "order[:, :-1]", SOLVER, "bigrams"),
    "a symbol follows itself": (recall.bigrams, "others + (others >= np.arange(num_symbols))", "others", BIGRAMS, None),
    "one rule for all samples": (
        recall.bigrams,
        "others = below(source, (n, num_symbols), num_symbols - 1)",
        "others = np.repeat(below(source, (1, num_symbols), num_symbols - 1), n, axis=0)",
        BLIND,
        "bigrams",
    ),
    "chance of all ids": (
        recall.bigrams,
        "distance, 1 / (num_symbols - 1)",
        "distance, 1 / num_symbols",
        CHANCE,
        "bigrams",
    ),
    "window strict": (recall.share_beyond, "distances >= window", "distances > window", GAPS, None),
    "the digit after": (
        recall_text.needle,
        EVIDENCE,
        EVIDENCE.replace("np.arange(", "1 + np.arange("),
        SOLVER,
        "needle",
    ),
    "needles in the gap": (
        recall_text.needle,
        "num_needles, size, body - gap)\n    starts",
        "num_needles, size, body)\n    starts",
        GAPS,
        None,
    ),
    "another key's value": (
        recall_text.needle,
        "values[:, :num_queries], b",
        "np.roll(values, 1, axis=1)[:, :num_queries], b",
        SOLVER,
        "needle",
    ),
    "certain a mention early": (recall_text.common_words, "-(rare + 1)]", "-(rare + 2)]", SOLVER, "common words"),
    "certain at a tie": (
        recall_text.frequent_words,
        "-(counts[rank + 1] + 1)]",
        "-counts[rank + 1]]",
        SOLVER,
        "frequent words",
    ),
    "the clock in the seed": (
        draw.bits,
        "key=np.array([seed, block]",
        "key=np.array([__import__('time').time_ns(), block]",
        SAME,
        "mqar",
    ),
    "last id never drawn": (draw._below, "np.uint64(bound)) >>", "np.uint64(bound - 1)) >>", DRAWS, None),
    "biased shuffle": (
        draw.distinct,
        "place + _below(source, (n,), space - place)",
        "_below(source, (n,), space)",
        DRAWS,
        None,
    ),
}


def plant(monkeypatch: pytest.MonkeyPatch, function: Callable, right: str, wrong: str) -> None:
    """Let `test_recall`, and what it tests, see the function with a changed line."""
    source, name, module = inspect.getsource(function), function.__name__, sys.modules[function.__module__]
    assert right in source, f"the line to change is gone: {right}"
    namespace = dict(vars(module))
    exec(source.replace(right, wrong), namespace)
    for user in (recall, recall_text, draw, test_recall):
        if hasattr(user, name):
            monkeypatch.setattr(user, name, namespace[name])
    for case, (generator, *rest) in test_recall.CASES.items():
        if generator is function:
            monkeypatch.setitem(test_recall.CASES, case, (namespace[name], *rest))


@pytest.mark.parametrize("bug", BUGS)
def test_caught(monkeypatch, bug):
    function, right, wrong, check, case = BUGS[bug]
    arguments = [] if case is None else [case]
    plant(monkeypatch, function, right, right)
    check(*arguments)
    monkeypatch.undo()
    plant(monkeypatch, function, right, wrong)
    with pytest.raises((AssertionError, IndexError)):
        check(*arguments)
