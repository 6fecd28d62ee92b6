"""Bugs and races planted in the Hopper kernels: the suite's bounds and the race detector see each of them."""

import contextlib
import dataclasses
import functools
import importlib
import inspect
import types
from pathlib import Path

import jax
import pytest
from conformance import BOTH, RLA, SWA, Case, bounds, errors, reference, values_and_gradients
from hopper_cases import PAIR, blocks

pytest.importorskip("jax", "0.11", reason="the kernels need jax 0.11 (Python 3.12)")


pytestmark = pytest.mark.kernel


MODULES = ("plan", "warpgroup", "forward", "window_forward", "residual_forward", "state_sweep", "window_backward")
MODULES += ("residual_query_backward", "residual_key_backward", "step", "step_window")


@pytest.fixture
def plant(monkeypatch):
    """Plants bugs, and has nothing traced before or with them used."""
    jax.clear_caches()
    yield functools.partial(change_source, monkeypatch)
    jax.clear_caches()


def change_source(monkeypatch, name: str, *changes: tuple[str, str]):
    """Change lines of a kernel's source, and with them every function and method of that file, wherever imported."""
    original = importlib.import_module(f"pallas.hopper.{name}")
    source = Path(str(original.__file__)).read_text()
    for right, wrong in changes:
        assert right in source, f"the line to change is gone: {right}"
        source = source.replace(right, wrong)
    changed = types.ModuleType(f"{name}_with_a_bug")
    exec(compile(source, changed.__name__, "exec"), changed.__dict__)
    importers = [importlib.import_module(f"pallas.hopper.{module}") for module in MODULES]
    for attribute, value in vars(changed).items():
        if getattr(value, "__module__", None) != changed.__name__:
            continue
        if inspect.isclass(value):
            for member, function in vars(value).items():
                if not member.startswith("__") and (inspect.isfunction(function) or isinstance(function, property)):
                    monkeypatch.setattr(getattr(original, attribute), member, function)
        else:
            old = getattr(original, attribute)
            for importer in importers:
                if getattr(importer, attribute, None) is old:  # other files have functions of that name
                    monkeypatch.setattr(importer, attribute, value)


def small(op: str, *segments: int, window: int = 40) -> Case:
    return Case(op, 200, window, sizes=PAIR, segments=segments, states=(), static=(blocks(64, 1),))


BUGS = {
    "window one too long, forward": (
        small(SWA),
        "window_forward",
        "(distance < plan.window)",
        "(distance <= plan.window)",
    ),
    "window one too short, backward": (
        small(SWA),
        "window_backward",
        "(distance < plan.window)",
        "(distance < plan.window - 1)",
    ),
    "edge of the residual set strict, forward": (
        small(RLA),
        "residual_forward",
        ">= plan.window",
        "> plan.window",
    ),
    "edge of the residual set strict, backward": (
        small(RLA),
        "residual_key_backward",
        "distance >= plan.window",
        "distance > plan.window",
    ),
    "edge of the residual set strict, gradient of queries": (
        small(RLA),
        "residual_query_backward",
        ">= plan.window",
        "> plan.window",
    ),
    "edge blocks begin a state early": (
        small(RLA),
        "plan",
        "begin = state * (self.spacing // self.chunk)",
        "begin = jnp.maximum(state - 1, 0) * (self.spacing // self.chunk)",
    ),
    "state saved one place late": (small(RLA), "state_sweep", "else index + 1", "else index + 2"),
    "keys miss the queries before the next state": (
        small(RLA),
        "plan",
        "newest = (key // self.spacing + 1)",
        "newest = (key // self.spacing)",
    ),
    "window's keys see another segment's queries": (
        small(SWA, 70, 1, 129),
        "window_backward",
        "seen &= iota(*square, 0) + key >= down(start, ROWS)",
        "seen &= down(start, ROWS) >= 0",
    ),
    "residual keys see another segment's queries": (
        small(RLA, 70, 1, 129),
        "residual_key_backward",
        "seen &= iota(*square, 0) + key >= down(start, ROWS)",
        "seen &= down(start, ROWS) >= 0",
    ),
    "state carried into the next segment": (
        small(RLA, 70, 1, 129),
        "state_sweep",
        "total = total * inputs.carry_keep[batch, index]",
        "pass",
    ),
    "no mask after the unmasked blocks": (
        small(SWA, window=190),
        "window_forward",
        "lax.fori_loop(masked_again, end, masked, carry)",
        "lax.fori_loop(masked_again, end, plain, carry)",
    ),
    "mean of a centred state left out, forward": (small(RLA), "residual_forward", "down(means[0], ROWS)", "0.0"),
    "mean of a centred gradient left out": (small(RLA), "residual_key_backward", "dv += down(mean, ROWS)", "pass"),
    "delta dropped for queries": (
        small(SWA),
        "window_backward",
        "(d_weights - across(delta, plan.chunk))",
        "d_weights",
    ),
    "delta dropped for keys": (small(SWA), "window_backward", "(d_weights - down(delta, ROWS))", "d_weights"),
    "second softmax of x, not of -x": (small(RLA), "residual_forward", "-x if i else x", "x"),
    "window's keys sum one head of the group": (
        small(SWA),
        "window_backward",
        "kv_head * group + step % group",
        "kv_head * group",
    ),
    "residual keys sum one head of the group": (
        small(RLA),
        "residual_key_backward",
        "kv_head * group + step % group",
        "kv_head * group",
    ),
    "the second part of the output is saved as 0": (
        Case(SWA, 200, 40, sizes=PAIR, mean=4.0, static=(blocks(64, 1),)),
        "forward",
        "self.put(split(out, True)[1], ",
        "self.put(0.0 * out, ",
    ),
    "a sink counts nothing": (
        dataclasses.replace(small(SWA), sinks=True),
        "window_forward",
        "zero_rows(ROWS, 1.0)",
        "zero_rows(ROWS)",
    ),
    "gain's gradient without y": (
        small(BOTH),
        "warpgroup",
        "sum_rows(d_out * y)",
        "sum_rows(d_out)",
    ),
}


# What .ci/run plants: one bug in each file of kernels. The others by hand.
QUICK = (
    "window one too long, forward",
    "edge of the residual set strict, backward",
    "state carried into the next segment",
    "gain's gradient without y",
    "second softmax of x, not of -x",
    "delta dropped for keys",
    "edge of the residual set strict, gradient of queries",
)


@pytest.mark.parametrize("bug", [bug if bug in QUICK else pytest.param(bug, marks=pytest.mark.long) for bug in BUGS])
def test_a_planted_bug_is_caught(plant, bug):
    case, module, right, wrong = BUGS[bug]
    arrays = case.arrays("bfloat16")
    plant(module, (right, wrong))
    got = values_and_gradients(case, arrays, "bfloat16", implementation="gpu")
    expected = reference(case, arrays)
    allowed = bounds(case, "bfloat16", "gpu", arrays, expected)
    excess = {name: error / (allowed[name] or 1) for name, error in errors(case, got, expected).items()}
    assert not all(ratio <= 3 for ratio in excess.values()), excess  # NaN is caught too


WAIT = "plgpu.barrier_wait(self.full.at[lax.rem(use, jnp.int32(self.size))])"
FREE = "plgpu.barrier_wait(self.free.at[slot])"
RELEASE = "plgpu.barrier_arrive(self.free.at[lax.rem(use, jnp.int32(self.size))])"
WINDOW = Case(SWA, 400, 400, sizes=PAIR, static=(blocks(64, 1),))
PACKED = Case(BOTH, 200, 40, sizes=PAIR, segments=(70, 130), static=(blocks(64, 1),))
RACES = {
    "read before the copy has landed": (WINDOW, (WAIT, "pass")),
    "freed before it is read": (WINDOW, (RELEASE, "pass"), (WAIT, f"{WAIT}; plgpu.commit_smem(); {RELEASE}")),
    "overwritten before it is free": (WINDOW, (FREE, "pass")),
    "sent anew before the copy before has left": (
        PACKED,
        ("plgpu.wait_smem_to_gmem(0, wait_read_only=True)\n    stage", "stage"),
    ),
    "the next tile's queries loaded over these": (PACKED, ("plgpu.commit_smem()\n    pl.when", "pl.when")),
}


def look_for_races(plant, case: Case, *changes):
    plgpu = importlib.import_module("jax.experimental.pallas.mosaic_gpu")
    plant("warpgroup", *changes)
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
        values_and_gradients(case, case.arrays("bfloat16"), "bfloat16", implementation="gpu")


OPERANDS = Case(BOTH, 130, 40, sizes=(2, 1, 8, 8), segments=(70, 60))


@pytest.mark.parametrize("case", [PACKED, Case(SWA, 200, 40, sizes=PAIR, static=(blocks(64, 1),)), OPERANDS], ids=str)
def test_no_races(plant, capsys, case):
    look_for_races(plant, case)
    assert "RACE DETECTED" not in capsys.readouterr().out


@pytest.mark.parametrize("race", RACES)
def test_a_planted_race_is_found(plant, capsys, race):
    case, *changes = RACES[race]
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # the interpreter may fail too
        look_for_races(plant, case, *changes)
    assert "RACE DETECTED" in capsys.readouterr().out
