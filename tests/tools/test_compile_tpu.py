"""The TPU kernels compile for TPUs that are not here; schedules are read right; what is wrong is said."""

import functools
import importlib.metadata
import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import jax
import pytest
from conftest import AS_USERS

from pallas.__main__ import main
from pallas.tools import compile_tpu
from pallas.tools.compile_tpu import (
    Loop,
    cases,
    compile_case,
    failures,
    kernel_trips,
    parse_schedule,
    parse_slots,
    totals,
)
from pallas.tools.programs import Case

HERE: dict[str, str | None] = {name: "0.11.2" for name in compile_tpu.PACKAGES}
SCHEDULE = """= control target key start
LB: loop body
PF: predicated region fallthrough
= control target key end

     0   :  { %s1_s0 = inlined_call_operand.vmem [shape: bf16[1,4,4096,128], index: 0, kind: input]
several lines: 0x5 : > { of a comment */ }
   0x1   :  { %4 = vsyncpa [#allocation1], 0  ;;  %s5_s0 = smov 0 } /* Start region 1 */
   0x2 LB: > { %s27_s22 = sadd.s32 1, %s12  ;;  %9 = vmatmul.bf16.gmra.mxu0 %v1  ;;  %8 = vmatpush.bf16.msra.mxu1 %v2 }
   0x3   : > { %10 = sbr.rel (%p10891_p8) target = $region16 }
   0x4   :  {}
   0x5 PF: > { %v2_v1 = vld [vmem:[%s36142_s0]] }
   0x6 LB: >> { %11 = vmatmul.msk.bf16.gmra.mxu1 %v3
  ;;  %12 = vmatmul.lmr.bf16.gmra.16.mxu2 %v4 }
   0x7   : >> { %13 = vpop.f32.mrf.mxu1 }
   0x8   :  { %14 = sbr.rel (!%p2_p2) target = $region20 }
   0x9   : > { %15 = vst [vmem:[%s36142_s0]] %v1 }
   0xa LB: >> { %16 = vmatmul.bf16.gmra.mxu1 %v3 }
   0xb   : > { %17 = vst [vmem:[%s36142_s0]] %v1 }
   0xc   :  { %18 = vsyncpa [#allocation1], 1 }
"""
SLOTS = """== CAPACTIY:
MXU, XLU, VALU
    4     3     4
== UTILIZATION:
1 0 0
0 0 2
"""


@pytest.fixture(autouse=True)
def _as_users_compile(monkeypatch):
    for name, value in AS_USERS.items():
        monkeypatch.setenv(name, value)


def test_a_schedule_is_read_loop_by_loop():
    slots = [0, 0, 2, 0, 0, 0, 2, 0, 0, 0, 1, 0, 0]
    whole, grid, first, second = parse_schedule(SCHEDULE, slots)
    assert [loop.depth for loop in (whole, grid, first, second)] == [0, 1, 2, 2]
    assert [loop.bundles for loop in (whole, grid, first, second)] == [3, 6, 3, 1]
    assert [loop.matmuls for loop in (whole, grid, first, second)] == [0, 1, 2, 1]
    assert [loop.slots for loop in (whole, grid, first, second)] == [0, 2, 2, 1]
    assert (first.parent, second.parent, grid.parent) == (grid, grid, whole)
    run = totals([whole, grid, first, second], [10, 4, 2])
    assert run == {"bundles": 203, "matmuls": 110, "slots": 120, "loops_of_unknown_length": 0}
    assert totals([whole, grid, first, second], [10])["loops_of_unknown_length"] == 2


def test_schedules_that_make_no_sense_are_no_result():
    for text in ("", SCHEDULE.replace("   0x7   :", "   0x9   :"), SCHEDULE.replace("   0x2 LB:", "   0x2   :")):
        with pytest.raises(ValueError, match="compile: "):
            parse_schedule(text)


def test_slots_are_read():
    assert parse_slots(SLOTS) == (4, [1, 0])


def test_trips_of_our_kernels():
    case = Case("", batch=2, length=1000, num_heads=16, num_kv_heads=4, window=512)
    trips = kernel_trips(case, "TPU v5 lite")
    assert trips["residual_forward"] == [2 * 4 * 2, 4]
    assert trips["residual_backward"] == [2 * 4 * 2, 4, 4]
    wide, chunks, inner = trips["window_forward"]
    assert (wide, chunks) == (2 * 4 * 2 * 2, 2)
    assert inner * chunks * 2 == 2 * 3  # each chunk of 256 queries meets 3 of keys
    assert kernel_trips(case, "TPU v6 lite")["residual_forward"] == [2 * 4 * 2, 2]


def test_the_cases_are_the_papers():
    found = cases()
    assert len({(case.title, case.op) for case in found}) == len(found) == 2 * 2 * 3 * 2 * 2
    assert {case.length for case in found} == {4096, 8192, 131072}
    assert {(case.num_heads, case.num_kv_heads) for case in found} == {(16, 4), (40, 8)}
    assert sum(compile_tpu.is_quick(case) for case in found) == 4


def per_unit(bundles: float, matmuls: float) -> dict[str, Any]:
    unit = {"bundles": bundles, "of_our_kernels": bundles, "matmuls": matmuls, "utilisation": 0.3}
    return {"per_unit": unit, "memory": {"temp": 1e9}, "vmem": 2**23, "seconds": 1.0}


def test_what_is_wrong_is_said():
    forward, backward = (case for case in cases() if compile_tpu.is_quick(case) and case.op == compile_tpu.OPS[0])
    assert failures("v5e", forward, per_unit(1150, 111), None) == []
    assert failures("v5e", backward, per_unit(3500, 425), per_unit(1150, 111)) == []
    [bundles] = failures("v5e", forward, per_unit(1151, 111), None)
    assert "forward needs 1151 bundles per unit; at most 1150" in bundles
    [matmuls] = failures("v5e", backward, per_unit(3500, 426), per_unit(1150, 111))
    assert "backward needs 315 matmuls per unit; at most 314" in matmuls
    assert failures("v6e", forward, per_unit(9999, 999), None) == []
    [error] = failures("v6e", forward, {"error": "ValueError: no"}, None)
    assert error.endswith("ValueError: no")


def test_the_table_the_file_and_the_status(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(compile_tpu, "refusal", lambda *_: None)
    monkeypatch.setattr(compile_tpu, "compile_case", lambda case, target: per_unit(100, 10))
    out = tmp_path / "results" / "compile.jsonl"
    command = ["compile", "--quick", "--target", "v5e", "v6e", "--out", str(out), "--commit", "abc"]
    assert main(command) == 0
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["target"] for line in lines] == ["v5e"] * 4 + ["v6e"] * 4
    assert {line["commit"] for line in lines} == {"abc"}
    assert "8 programs compiled" in capsys.readouterr().out
    monkeypatch.setattr(compile_tpu, "compile_case", lambda case, target: {"error": "ValueError: no", "seconds": 1.0})
    assert main(command[:-4]) == 1
    assert "does not compile: ValueError: no" in capsys.readouterr().out


def test_refusals(monkeypatch):
    assert "h100 cannot go with TPUs" in (compile_tpu.refusal(["v5e", "h100"], HERE) or "")
    monkeypatch.setattr(jax, "__version_info__", (0, 11, 2))
    assert compile_tpu.refusal(["v5e"], HERE) is None
    assert "needs libtpu: pip install" in (compile_tpu.refusal(["v5e"], HERE | {"libtpu": None}) or "")
    monkeypatch.setattr(jax, "__version_info__", (0, 10, 2))
    assert "needs jax 0.11.2" in (compile_tpu.refusal(["v5e"], HERE) or "")


def test_the_extra_asks_for_what_the_message_says():
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    extra = " ".join(project["optional-dependencies"]["compile"])
    for requirement in compile_tpu.INSTALL.removeprefix("pip install ").replace("'", "").split():
        assert requirement.removesuffix(",<0.12") in extra


def installed() -> bool:
    try:
        importlib.metadata.version("libtpu")
    except importlib.metadata.PackageNotFoundError:
        return False
    return jax.__version_info__ >= (0, 11, 2)


needs_libtpu = pytest.mark.skipif(not installed(), reason="needs libtpu: pip install '.[compile]'")
SMALL = functools.partial(Case, "small", batch=2, length=512, num_heads=4, num_kv_heads=1, implementation="tpu")


@needs_libtpu
@pytest.mark.parametrize("target", ["v5e", "tpu7x"])
def test_a_small_case_compiles(target):
    found = compile_case(SMALL(op="rattention", window=100), target)
    assert "error" not in found, found
    ours = {kernel["name"].rsplit(".", 1)[0]: kernel for kernel in found["kernels"] if kernel["ours"]}
    assert ours.keys() == kernel_trips(SMALL(), "").keys()
    for kernel in ours.values():
        assert 0 < kernel["matmuls"] < kernel["bundles"]
        assert kernel["loops_of_unknown_length"] == 0
    assert found["memory"]["argument"] >= 2 * 512 * 4 * 128 * 2 * 3


@needs_libtpu
@pytest.mark.long
@pytest.mark.parametrize(
    "case",
    [
        SMALL(op="rattention", segmented=True, with_states=True, window=100),
        SMALL(op="rattention", segmented=True, head_size=64, window=100),
        SMALL(op="rattention", head_size=256, window=100),
        SMALL(op="residual_linear_attention", feature_map="custom", window=100),
        SMALL(op="residual_linear_attention", feature_map="squared_relu", with_states=True, window=100),
    ],
    ids=lambda case: f"{case.op}-{case.head_size}-{case.feature_map}",
)
def test_other_calls_compile(case):
    assert "error" not in (found := compile_case(case, "v5e")), found


@needs_libtpu
@pytest.mark.long
def test_the_longest_case_fits_a_v5e():
    """Inputs, outputs and temporaries: the compiler refuses more than the 15.75 GiB that programs may use."""
    [case] = [
        c for c in cases() if (c.op, c.num_heads, c.length, c.window) == ("rattention", 40, 131072, 1024) and c.backward
    ]
    assert "error" not in (found := compile_case(case, "v5e")), found
    assert found["memory"]["temp"] < 4.5e9


@needs_libtpu
def test_a_case_that_does_not_compile_says_why():
    found = compile_case(SMALL(op="rattention", num_heads=3, num_kv_heads=2), "v5e")
    assert found["error"].startswith("ValueError: rattention: h must be a multiple of kv")


SHARDED = """
import functools, re
import jax, jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, NamedSharding, PartitionSpec as P
import pallas

devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices
mesh = jax.sharding.Mesh([devices[:2], devices[2:4]], ("batch", "heads"), axis_types=(AxisType.Auto,) * 2)
spec = P("batch", None, "heads", None)
queries, keys = (
    jax.ShapeDtypeStruct((4, 512, heads, 128), jnp.bfloat16, sharding=NamedSharding(mesh, spec)) for heads in (8, 2)
)
gain = jax.ShapeDtypeStruct((8, 128), jnp.float32, sharding=NamedSharding(mesh, P("heads")))

def one(q, k, v, gain):
    return pallas.rattention(q, k, v, window=128, swa_gain=gain, rla_gain=gain, implementation="tpu")

def forward(q, k, v, gain):
    return jax.vmap(one, in_axes=(0, 0, 0, None))(q, k, v, gain)

def both(q, k, v, gain, cotangent):
    out, pull = jax.vjp(lambda q, k, v: forward(q, k, v, gain), q, k, v)
    return out, pull(cotangent)

shard = functools.partial(jax.shard_map, mesh=mesh, check_vma=False)
sharded = shard(both, in_specs=(spec,) * 3 + (P("heads"), spec), out_specs=(spec, (spec,) * 3))
kind = AbstractDevice(devices[0].device_kind, 1, "tpu")
with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=kind)):
    lowered = jax.jit(sharded).lower(queries, keys, keys, gain, queries)
text = lowered.compile().as_text()
print("kernels", text.count('custom_call_target="tpu_custom_call"'))
print("collectives", re.findall(r" (all-[a-z]+|reduce-scatter|collective-[a-z]+)", text))
"""


@needs_libtpu
def test_heads_and_batch_sharded_need_no_collective(tmp_path):
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "PYTHONPATH": str(Path(compile_tpu.__file__).parents[2]),
    }
    command = [sys.executable, "-c", SHARDED]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "kernels 5" in done.stdout
    assert "collectives []" in done.stdout


def test_a_schedule_without_loops():
    assert parse_schedule("     0   :  { %1 = vmatmul.bf16.gmra.mxu0 %v1 }\n") == [Loop(0, None, bundles=1, matmuls=1)]
