"""`python -m pallas check`: what is drawn, what a failure prints, how it is made smaller, what a lost worker is."""

import dataclasses
import json
import os
import time

import jax.numpy as jnp
import numpy as np
import pytest

from pallas import chunked
from pallas.__main__ import main
from pallas.block_sizes import BlockSizes
from pallas.tools import random_cases
from pallas.tools.case_errors import BOUND, allowed, bounds, errors
from pallas.tools.cases import BOTH, RLA, STATES, SWA, Case, compiled, parse, to_line
from pallas.tools.check import Held, Tally, hold, in_workers, shrink
from pallas.tools.random_cases import MAPS, draw, options, redraw, simpler

KINDS = [("gpu", 4096), ("gpu", 200), ("tpu", 300), ("chunked", 1200)]
SMALL = Case(BOTH, 24, 5, sizes=(4, 2, 8, 5), segments=(4, 20), dtype="float32", map="relu")


@pytest.mark.parametrize(("implementation", "longest"), KINDS)
def test_a_case_is_its_line_and_a_simpler_one_is_a_case(implementation, longest):
    for seed in range(60):
        program = draw(seed, implementation, longest)
        assert program == draw(seed, implementation, longest)
        for number in range(3):
            case = redraw(program, number)
            assert case.program == program.program
            assert parse(to_line(case)) == case
            for one in simpler(case):
                assert parse(to_line(one)) == one
                rows = one.segments if one.batch else [one.segments] * bool(one.segments)
                assert all(sum(row) == one.num_keys for row in rows)
                assert one.num_keys >= one.t >= 1
                assert one.sizes[0] % one.sizes[1] == 0


def test_what_is_drawn_covers_the_contract():
    met = [options(redraw(draw(seed, "gpu", 4096), number)) for seed in range(100) for number in range(10)]
    found = {factor: {str(one[factor]) for one in met} for factor in met[0]}
    assert found["op"] == {SWA, RLA, BOTH}
    assert found["map"] == {*MAPS, "-"}
    assert found["segments"] == {"none", "one", "several", "one a token"}
    assert found["window"] == {"0", "1", "inside", "s or more"}
    assert found["states"] == {"none", "initial_state", "segment_state", "initial_state+segment_state"}
    assert found["group"] == {"odd", "even"}
    assert {"4", "8", "16", "33", "64", "100", "127", "128"} == found["d"]
    assert {"0.01", "30.0"} <= found["size"] & found["size_rla"]
    assert {"0.1", "30.0"} <= found["size_qk"]
    assert {"-1.0", "0.0", "1.0"} <= found["mean"]
    for factor in ("more keys", "backward", "shared", "steps", "sinks", "swa_norm"):
        assert found[factor] == {"True", "False"}
    longest = [draw(seed, "gpu", 4096).t for seed in range(100)]
    assert min(longest) == 1
    assert max(longest) == 4096


@pytest.mark.parametrize(
    ("case", "alone"),
    [
        (Case(BOTH, 8, 7, states=()), True),  # the last query has one key behind its window
        (Case(BOTH, 8, 6, states=()), False),
        (Case(BOTH, 2, 0, s=6, segments=(1,) * 6, states=("initial_state",)), True),  # which the last two do not read
        (Case(BOTH, 2, 0, s=6, segments=(1,) * 6, states=("segment_state",)), False),
        (Case(BOTH, 2, 0, s=6, segments=(4, 2), states=()), False),
        (Case(BOTH, 1, 1, states=("initial_state",)), False),
    ],
)
def test_what_a_norm_leaves_of_the_gradient_of_one_key_is_measured_by_what_it_took(case, alone):
    expected = {name: np.full((4, 4), 1e-6) for name in ("d q_rla", "d k_rla")}
    expected["d rla_gain"] = np.ones((2, 8))
    found = errors(case, {name: 2 * x for name, x in expected.items()}, expected)
    assert all(found[name] < 1e-4 if alone else found[name] == pytest.approx(1) for name in ("d q_rla", "d k_rla"))
    wrong = errors(case, {name: x + 1 for name, x in expected.items()}, expected)
    assert all(x > 0.5 for x in wrong.values())


def test_a_start_state_that_is_read_beside_no_key_leaves_keys_as_they_are():
    case = Case(BOTH, 6, 3, segments=(4, 2), states=("segment_state",))  # one key behind a window, in the first segment
    expected = {name: np.full((4, 4), 1e-6) for name in ("d q_rla", "d k_rla")} | {"d rla_gain": np.ones((2, 8))}
    found = errors(case, {name: 2 * x for name, x in expected.items()}, expected)
    assert found["d k_rla"] < 1e-4
    assert found["d q_rla"] == pytest.approx(1)


def test_the_gradient_of_a_sink_is_measured_by_the_sizes_of_its_terms():
    case = Case(SWA, 64, 16, sizes=(2, 1, 8, 8), sinks=True, size_qk=3.0)
    expected = compiled(case, "float64", "reference")(case)
    terms = np.abs(expected["d sink_logits"]).max()
    off = errors(case, expected | {"d sink_logits": expected["d sink_logits"] + 0.01 * terms}, expected)
    assert 1e-4 < off["d sink_logits"] < 0.02
    far = dataclasses.replace(case, static=(("scale", -9.0),), mean=1.0)  # no sink or key but has all the weight
    expected = compiled(far, "float64", "reference")(far)
    assert np.isfinite(allowed(far, "gpu", expected, errors(far, expected, expected))["d sink_logits"])


def test_the_gradient_of_one_key_is_measured_by_itself_where_eps_decides_it():
    case = Case(BOTH, 9, 8, sizes=(2, 1, 8, 8), states=(), static=(("eps", 0.01),), size=0.01, final=False)
    with_norm = dataclasses.replace(case, static=(), size=1.0)
    for each, caught in ((case, True), (with_norm, False)):
        expected = compiled(each, "float64", "reference")(each)
        for name in ("d q_rla", "d k_rla"):
            zeroed = errors(each, expected | {name: 0 * expected[name]}, expected)
            assert (zeroed[name] > 0.3) == caught


def test_lines_are_words():
    case = dataclasses.replace(
        SMALL, segments=((24,), (1,) * 24), batch=2, states=(), static=(("scale", 0.5),), mean=1.0
    )
    assert to_line(case) == (
        "op=rattention t=24 window=5 sizes=4,2,8,5 segments=24/1x24 states=none scale=0.5 mean=1.0 map=relu batch=2"
    )
    blocks = dataclasses.replace(SMALL, static=(("block_sizes", BlockSizes(kernel_chunk=64, chunks_per_state=3)),))
    assert "block_sizes=64x3" in to_line(blocks)
    assert parse(to_line(blocks)) == blocks


@pytest.mark.parametrize(
    ("line", "named"), [("op=rattention t=x window=1", "'t=x'"), ("op=rattention", "window"), ("fast=1", "'fast=1'")]
)
def test_a_line_that_is_no_call_is_named(line, named):
    with pytest.raises(ValueError, match=f"^check: .*{named}.*; give a line as"):
        parse(line)


def test_numbers_are_the_same_for_every_precision():
    case = dataclasses.replace(SMALL, dtype="bfloat16", size=3.0, size_rla=0.1)
    narrow, wide = case.arrays(), case.arrays("float64")
    assert narrow["q"].dtype == jnp.bfloat16
    assert narrow["swa_gain"].dtype == np.float32
    for name, x in wide.items():
        np.testing.assert_allclose(narrow[name].astype(np.float64), x, rtol=4e-3)
    assert wide["v"].std() == pytest.approx(3, rel=0.2)
    assert wide["k_rla"].std() == pytest.approx(0.1, rel=0.2)


def test_where_a_softmax_sees_one_key_rounding_is_measured_against_what_gradients_would_be():
    case = Case(SWA, 9, 9, segments=(1,) * 9, sizes=(1, 1, 4, 4))
    exact = compiled(case, "float64", "reference")(case)
    assert not np.any(np.abs(exact["d q"]) > 1e-12)
    found = errors(case, exact | {"d q": exact["d q"] + 1e-5}, exact)
    assert 1e-6 < found["d q"] < 1e-3
    assert bounds("bfloat16", "gpu", {"output": 1e-3})["output"] == pytest.approx(5e-3)
    assert bounds("bfloat16", "gpu", {})["output, exact zeros"] == 0


def plant(monkeypatch):
    """The residual branch of `chunked` reads the segment before."""
    right = chunked._rla

    def wrong(*arrays, segment_ids, **keywords):
        return right(*arrays, segment_ids=None if segment_ids is None else segment_ids * 0, **keywords)

    monkeypatch.setattr(chunked, "_rla", wrong)


@pytest.mark.slow
def test_a_call_is_held_and_a_wrong_one_made_smaller(monkeypatch):
    (right,) = hold([SMALL], "chunked")
    assert right.wrong == ""
    assert right.errors.keys() == right.bounds.keys() >= {"output", "final_state", "d q", "d k_rla", "d swa_gain"}
    plant(monkeypatch)
    (wrong,) = hold([parse(right.line)], "chunked")
    assert "output" in wrong.wrong
    least = shrink(SMALL, "chunked", until=time.time() + 600)
    assert least is not None
    case = parse(least.line)
    assert least.wrong
    assert (case.op, len(case.segments), case.backward, case.states) == (RLA, 2, False, ())
    assert case.t < 10
    assert case.sizes[0] == 1


class Deadly:
    """Ends the process that unpickles it."""

    def __reduce__(self):
        return os._exit, (3,)


def test_a_worker_that_dies_is_a_failure_of_its_call_alone():
    jobs = iter([("parse", "op=rattention t=3 window=2"), ("parse", Deadly()), ("parse", "nonsense"), ("parse", "t=1")])
    found = {how: what for _, how, what in in_workers(1, jobs)}
    assert found["done"] == Case(BOTH, 3, 2)
    assert found["aborted"] == "the process ended with status 3"
    assert found["error"].startswith("ValueError: check: ")


@pytest.fixture
def pretended(monkeypatch):
    """No process: every program is right but for those of odd length, and takes no time."""

    def in_workers(count, jobs):
        for job in jobs:
            if job[0] == "about":
                yield job, "done", dict(device="pretended", platform="cpu", driver="", chosen="chunked", present=[])
            elif job[0] == "shrink":
                yield job, "done", None
            elif job[1][0].t % 3 == 2:
                yield job, "hung", "no result in 600 s"
            else:
                wrong = "output 1.0e+00 > 1.0e-05" if job[1][0].t % 2 else ""
                yield job, "done", [Held(to_line(case), {"output": 1e-6}, {"output": 1e-5}, wrong) for case in job[1]]

    monkeypatch.setattr("pallas.tools.check.in_workers", in_workers)


def test_the_command_counts_saves_and_goes_on_with_the_next_seeds(pretended, tmp_path, capsys):
    out = tmp_path / "found" / "check.jsonl"
    arguments = ["check", "--programs", "12", "--draws", "2", "--out", str(out), "--commit", "abc"]
    assert main(arguments) == 1
    shown = capsys.readouterr().out
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["seed"] for line in lines] == list(range(12))
    assert {line["commit"] for line in lines} == {"abc"}
    right = [line for line in lines if not line["failures"]]
    assert right
    assert all(line["calls"] == 2 and line["worst"]["output"][0] == pytest.approx(0.1) for line in right)
    assert shown.count("FAILED output 1.0e+00 > 1.0e-05") + shown.count("FAILED hung") == sum(
        len(line["failures"]) for line in lines
    )
    replay = next(line for line in shown.splitlines() if "--replay" in line)
    assert parse(replay.split("'")[1]).t % 2 or "hung" in shown
    main(arguments)
    assert [json.loads(line)["seed"] for line in out.read_text().splitlines()] == list(range(24))
    assert main(["check", "--replay", "nonsense"]) == 2
    first = tmp_path / "first.jsonl"
    assert main(["check", "--programs", "12", "--draws", "2", "-x", "--out", str(first)]) == 1
    stopped = [bool(json.loads(line)["failures"]) for line in first.read_text().splitlines()]
    assert stopped == [bool(line["failures"]) for line in lines][: len(stopped)]
    assert stopped.index(True) == len(stopped) - 1


def test_the_tally_keeps_what_is_nearest_to_its_bound(capsys):
    tally = Tally()
    tally.add([Held(to_line(SMALL), {"d q": error}, {"d q": 1.0}, "") for error in (0.1, 0.9, 0.5)])
    assert tally.worst["relu", "d q"][:3] == (0.9, 0.9, 1.0)
    assert (tally.calls, tally.programs, tally.met["op", BOTH]) == (3, 1, 3)
    tally.show()
    shown = capsys.readouterr().out
    assert "0.90" in shown
    assert "segments: several 3" in shown


def test_programs_that_are_too_large_for_the_definition_are_not_drawn():
    for seed in range(200):
        case = draw(seed, "gpu", 4096)
        assert case.t * case.num_keys * case.sizes[0] * max(case.batch, 1) <= random_cases.MOST_PAIRS * 3
        assert case.states == () or case.states[0] in STATES


def test_chunked_may_be_as_far_off_as_the_definition_in_its_dtype():
    case = Case(RLA, 24, 5, dtype="bfloat16")
    expected = {"output": np.ones((24, 2, 8)), "d q": np.ones((24, 2, 8))}
    found = allowed(case, "chunked", expected, {"output": 1e-3, "d q": 4e-3})
    assert found == {"output": BOUND["bfloat16"], "d q": 8e-3}
    usual = allowed(Case(SWA, 24, 5), "chunked", expected, {})
    assert max(usual.values()) < 1.1 * BOUND["float32"]
    large = allowed(Case(SWA, 24, 5, size_qk=30.0), "chunked", expected, {})
    assert min(large.values()) > 10 * BOUND["float32"]
