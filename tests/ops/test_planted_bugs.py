"""A bug planted in `chunked` is caught by the bounds, far from them: the suite cannot pass with a wrong mask."""

import types
from pathlib import Path

import numpy as np
import pytest
from conformance import BOTH, BOUND, RLA, SWA, Case, errors, reference, values_and_gradients

from pallas import chunked

BUGS = {
    "window one too short": (SWA, "column > row - window)", "column > row - window + 1)"),
    "window one too long": (SWA, "column > row - window)", "column >= row - window)"),
    "sees the next token": (SWA, "(column <= row)", "(column <= row + 1)"),
    "window's heads in another group": (
        SWA,
        "query_spans(q.reshape(t, kv, h // kv, d))",
        "query_spans(jnp.swapaxes(q.reshape(t, h // kv, kv, d), 1, 2))",
    ),
    "window reads the segment before": (SWA, "query_runs[:, None] == key_runs", "query_runs[:, None] - 1 <= key_runs"),
    "edge of the residual set strict": (RLA, "bool))", "bool), -1)"),
    "edge of the residual set one too far": (RLA, "bool))", "bool), 1)"),
    "state one chunk late": (
        RLA,
        "(sums, run_before, run_after))",
        "(jnp.roll(sums, 1, 0).at[0].set(0), run_before, run_after))",
    ),
    "state one chunk early": (RLA, "return start + sums, state", "return start + sums, start + sums"),
    "residual branch's heads in another group": (
        RLA,
        "query_chunks(q.reshape(t, kv, h // kv, d))",
        "query_chunks(jnp.swapaxes(q.reshape(t, h // kv, kv, d), 1, 2))",
    ),
    "edge block reads the segment before": (
        RLA,
        "edge & (query_runs[:, None] == key_runs",
        "edge & (query_runs[:, None] - 1 <= key_runs",
    ),
    "state carried into the next segment": (RLA, "jnp.where(run_before == run_after, state, fresh)", "state"),
    "state adds keys of an older segment": (RLA, "(key_runs == run_after)", "(key_runs <= run_after)"),
    "state read by another segment": (RLA, "older = (query_runs == run_before)", "older = (query_runs >= run_before)"),
    "final state of the segment before": (RLA, "jnp.where(runs[-1] == last_run[-1], state, fresh)", "state"),
    "norms shared by both branches": (BOTH, "swa_gain, rla_gain, eps)", "rla_gain, rla_gain, eps)"),
    "sinks count nothing": (SWA, "jnp.ones(rows, dtype)", "jnp.zeros(rows, dtype)"),
    "sinks of other heads": (SWA, "sink_logits.astype", "jnp.roll(sink_logits, 1).astype"),
}


def chunked_with(right: str, wrong: str) -> types.ModuleType:
    source = Path(chunked.__file__).read_text()
    assert right in source, f"the line to change is gone: {right}"
    module = types.ModuleType("chunked_with_a_bug")
    exec(source.replace(right, wrong), module.__dict__)
    return module


@pytest.mark.parametrize("bug", BUGS)
def test_caught(monkeypatch, bug):
    op, right, wrong = BUGS[bug]
    monkeypatch.setattr(chunked, op, getattr(chunked_with(right, wrong), op))
    case = Case(op, 300, 64, sizes=(4, 2, 8, 5), segments=(70, 1, 130, 59, 40), sinks=op == SWA)
    arrays = case.arrays("float32")
    got = values_and_gradients(case, arrays, "float32", implementation="chunked")
    found = errors(case, got, reference(case, arrays))
    largest = max(found, key=lambda name: np.nan_to_num(found[name], nan=np.inf))
    assert not found[largest] <= 5 * BOUND["bfloat16"], f"{largest}: {found[largest]:.1e}"
