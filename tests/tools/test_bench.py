"""The benchmark runs without a GPU, counts what it says it counts, and times peers that compute what ours do."""

import dataclasses
import functools
import json
import sys
import types

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest

from pallas import block_sizes
from pallas.__main__ import main
from pallas.block_sizes import BlockSizes
from pallas.tools import bench, peers
from pallas.tools.peers import READS, Op, Problem, Row, flops, least_bytes, make_inputs, ours
from rattn_eqx.model.language_model import LanguageModel
from rattn_eqx.model.presets import tiny
from rattn_eqx.training import bench as model_bench

SMALL = Problem(1, 13, 4, 2, 8, window=5, wide_window=9, feature_map="softmax")
OPS: tuple[Op, ...] = ("sliding_window_attention", "residual_linear_attention", "rattention")


def read(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_row_is_there_with_a_number_or_a_reason(tmp_path, capsys):
    out = tmp_path / "results" / "bench.jsonl"
    arguments = ["--quick", "--shapes", "2x13", "--samples", "2", "--window", "5", "--wide-window", "9"]
    arguments += ["--implementations", "reference"]
    assert main(["bench", *arguments, "--out", str(out), "--commit", "abc"]) == 0
    lines, shown = read(out), capsys.readouterr().out
    timings = [line for line in lines if line["kind"] == "timing"]
    makers = {row.by for row in peers.rows(SMALL, ["reference"])}
    assert {line["by"] for line in timings} == makers
    assert {"cuDNN", "tokamax", "jax-linear-attention", "flash-linear-attention", "peers' parts, cut"} < makers
    for line in lines:
        assert line["device"] == "cpu"
        assert line["commit"] == "abc"
        assert line["versions"]["jax"] == jax.__version__
        assert line["ceilings"]["flops"] > 0
        if line["kind"] == "ratio" or line["by"] != "ours, reference":
            assert "Error: " in line["not available"]
            assert line["not available"] in shown
    maps = {(line["window"], line["feature_map"]) for line in timings if line["by"] == "jax-linear-attention"}
    assert maps == {(5, None), (0, "identity")}
    measured = [line for line in timings if "median" in line]
    assert {(line["op"], line["pass"]) for line in measured} == {(op, which) for op in READS for which in bench.PASSES}
    for line in measured:
        assert 0 < line["least"] <= line["quartiles"][0] <= line["median"] <= line["quartiles"][1]
        assert line["of_floor"] == pytest.approx(line["floor"] / line["median"])
        assert line["floor"] >= line["flops"] / line["ceilings"]["flops"]
        assert line["floor"] >= line["bytes"] / line["ceilings"]["bandwidth"]
        assert line["tflops"] == pytest.approx(line["flops"] / line["median"] / 1e12)
    ratios = {(line["theirs"], line["pass"]) for line in lines if line["kind"] == "ratio"}
    assert len(ratios) == 6


def test_flops_are_those_of_every_pair():
    """Counted pair by pair, for windows below, at and above the length."""
    p, d, features = SMALL, 8, 16
    for window in (1, 5, 13, 40):
        pairs = [(t, s) for t in range(p.length) for s in range(t + 1)]
        local = sum(t - s < window for t, s in pairs)
        reading = len({t for t, s in pairs if t - s >= window})
        read = len({s for t, s in pairs if t - s >= window})
        for backward in (False, True):
            swa = 2 * p.num_heads * local * d * (7 if backward else 2)
            state = 2 * features * d * (p.num_heads * reading + p.num_kv_heads * read) * (3 if backward else 1)
            for op, expected in zip(OPS, (swa, state, swa + state), strict=True):
                row = Row(op, window, "", tuple, "softmax")
                assert flops(row, p, backward=backward) == expected
                assert flops(row, dataclasses.replace(p, batch=3), backward=backward) == 3 * expected


def test_bytes_are_those_of_inputs_and_outputs():
    x = make_inputs(SMALL, jax.random.key(0))
    row = Row("sliding_window_attention", 5, "", tuple)
    queries, keys = 13 * 4 * 8 * 2, 13 * 2 * 8 * 2
    assert least_bytes(row, x, backward=False) == 2 * queries + 2 * keys
    assert least_bytes(row, x, backward=True) == 4 * queries + 4 * keys
    assert all(float(jnp.std(value.astype(jnp.float32))) > 0.05 for value in x.values()), "never zeros"


def test_time_is_that_of_one_call_and_sets_take_turns():
    order: list[int] = []
    clock = iter([0.5, 0.002, *[1.0] * 2, 0.03, 0.01, 0.02])  # compiling, one round, two batches, three samples

    def stopwatch(calls, count):
        assert bench.time_jax(calls, count)[0] > 0
        return next(clock), 0.0

    calls = [functools.partial(order.append, number) for number in range(2)]
    timing = bench.measure(calls, stopwatch, samples=3, seconds=0.005)
    assert timing.calls == 5
    assert order == [0, 1] * 2 + [0, 1, 0, 1, 0] * 5
    assert (timing.median, timing.least, timing.samples) == (0.02 / 5, 0.01 / 5, 3)
    assert timing.quartiles == pytest.approx((0.015 / 5, 0.025 / 5))
    assert timing.waiting == 5


def test_a_peer_that_fails_is_a_row_and_one_that_is_wrong_is_seen(capsys):
    def fail():
        raise RuntimeError("no such kernel\nand more")

    broken = Row("rattention", 5, "peers' parts, broken", fail, "softmax")
    mine = Row("rattention", 5, "ours, gpu", lambda: lambda x: x["q"], "softmax")
    saved: list[dict] = []
    save = lambda line: saved.append(line) or line | {"platform": "cpu"}
    ceilings = bench.Ceilings(1e12, 1e11)
    bench.bench(SMALL, [broken, mine], save, ceilings, check=True, samples=1, seconds=0.0)
    assert saved[0]["not available"] == "RuntimeError: no such kernel"
    assert "not available: RuntimeError: no such kernel\n" in capsys.readouterr().out
    assert [line["kind"] for line in saved] == ["timing"] * 3 + ["ratio"] * 6
    assert saved[1]["error"] > 0.5, "it computes something else"


def test_ratios_are_theirs_over_ours_by_the_fastest(capsys):
    swa, both = "sliding_window_attention", {"forward": 2.0, "forward+backward": 8.0}
    medians = {
        (swa, 13, "cuDNN"): {"forward": 6.0, "forward+backward": 32.0},
        (swa, 9, "cuDNN"): "RuntimeError: cuDNN not found.",
        ("rattention", 5, "ours, gpu"): both,
        ("rattention", 5, "peers' parts, shifted"): {"forward": 8.0, "forward+backward": 12.0},
        ("rattention", 5, "peers' parts, cut"): {"forward": 7.0, "forward+backward": 16.0},
    }
    saved: list[dict] = []
    bench.print_ratios(SMALL, medians, lambda line: saved.append(line) or line)
    assert [line.get("ratio") for line in saved] == [3, 4, None, None, 3.5, 1.5]
    assert all(line["ours"] == "ours, gpu" for line in saved)
    assert capsys.readouterr().out.count("RuntimeError: cuDNN not found.") == 2


@pytest.fixture
def jla(monkeypatch):
    """Stands in for jax-linear-attention: what its two ops compute, by their documentation."""

    def linear_attention(kind, q, k, v, *, g, scale, impl):
        assert (kind, scale, impl) == ("simple_gla", 1.0, "mosaic_gpu")
        assert q.shape == k.shape
        assert g.shape == v.shape[:3]
        decay = jnp.moveaxis(jnp.cumsum(g, axis=1), 1, -1)
        scores = jnp.einsum("bthd,bshd->bhts", *(x.astype(jnp.float32) for x in (q, k)))
        scores = jnp.tril(scores * jnp.exp(decay[..., :, None] - decay[..., None, :]))
        return jnp.einsum("bhts,bshv->bthv", scores, v.astype(jnp.float32)).astype(v.dtype), None

    def flash_attention(q, k, v, *, sliding_window, backward):
        problem = dataclasses.replace(SMALL, window=sliding_window)
        assert backward in ("ranged", "fused")
        return ours("sliding_window_attention", problem.window, "", "reference")({"q": q, "k": k, "v": v})

    names = ("jla", "jla.ops", "jla.ops.mosaic_gpu", "jla.ops.mosaic_gpu.attention")
    modules = {name: types.ModuleType(name) for name in names}
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
        if "." in name:
            parent, _, child = name.rpartition(".")
            monkeypatch.setattr(modules[parent], child, module, raising=False)
    monkeypatch.setattr(modules["jla.ops"], "linear_attention", linear_attention, raising=False)
    monkeypatch.setattr(modules["jla.ops.mosaic_gpu.attention"], "flash_attention", flash_attention, raising=False)


def test_peers_parts_compute_what_ours_do(jla):
    """RATTENTION put together from them holds every row of theirs, and a window that is off by one would be seen."""
    parts = [row for row in peers.rows(SMALL, []) if row.by.startswith("peers' parts")]
    x = make_inputs(SMALL, jax.random.key(0))
    arguments = ({name: x[name] for name in READS["rattention"]}, x["cotangent"])
    expected, wrong = (bench.oracle(dataclasses.replace(parts[0], window=window), SMALL, x) for window in (5, 6))
    assert [row.by for row in parts] == ["peers' parts, shifted", "peers' parts, cut"]
    for row in parts:
        got = jax.jit(bench.with_gradients(row.make()))(*arguments)
        assert bench.relative_error(got, expected) < 1.2e-2
        assert bench.relative_error(got, wrong) > 0.1


def test_sweep_finds_the_fastest_blocks(monkeypatch, tmp_path):
    candidates = [BlockSizes(chunk=32), BlockSizes(chunk=8), BlockSizes(chunk=16)]
    monkeypatch.setattr(block_sizes, "gpu_candidates", lambda head_size, window: candidates)
    seconds = {32: (3.0, 5.0), 16: (2.0, 7.0)}

    def time_row(row, problem, sets, **settings):
        chunk = row.make.args[-1].chunk
        if chunk not in seconds:
            raise RuntimeError("shared memory")
        timings = [bench.Timing(x, (x, x), x, 1, 1, 1.0) for x in seconds[chunk]]
        return dict(zip(bench.PASSES, timings, strict=True))

    monkeypatch.setattr(bench, "time_row", time_row)
    out = tmp_path / "sweep.jsonl"
    bench.main(["--quick", "--sweep", "--shapes", "1x13", "--out", str(out)])
    lines = read(out)
    assert [line["kind"] for line in lines] == ["sweep"] * 5 + ["best"] * 2
    assert lines[2]["not available"] == "RuntimeError: shared memory"
    assert [(line["pass"], line["block_sizes"]["chunk"]) for line in lines[-2:]] == [
        ("forward", 16),
        ("forward+backward", 32),
    ]


def test_command_line(capsys):
    assert main(["--help"]) == 0
    assert main([]) == main(["no"]) == 2
    assert "bench " in capsys.readouterr().out
    with pytest.raises(SystemExit) as ended:
        main(["bench", "--help"])
    assert ended.value.code == 0
    assert "--shapes" in capsys.readouterr().out


@pytest.mark.standard_dtype_promotion
def test_training_steps_are_timed(tmp_path, capsys):
    out = tmp_path / "model.jsonl"
    to = ["--out", str(out), "--commit", "abc", "--implementation", "reference"]
    assert model_bench.main(["--layers", "1", "--shapes", "1x12", "--only", "rattention", *to]) == 0
    lines = read(out)
    assert [line["attention"] for line in lines] == ["RATTENTION 8"]
    for line in lines:
        assert line["tokens_per_second"] == pytest.approx(12 / line["median"])
        assert 0 < line["loss"] < 10
        assert line["commit"] == "abc"
    assert capsys.readouterr().out.count("tokens/s") == 1


def test_flops_of_a_step():
    config = dataclasses.replace(tiny, residual=False, window=40)  # longer than the sequence
    m, h, kv, d, w = 96, 2, 1, 48, 256
    weights = 4 * (m * (h + 2 * kv) * d + h * d * m + 3 * m * w) + 258 * m
    pairs = 32 * 33 // 2
    expected = 5 * (6 * 32 * weights + 3 * 4 * 4 * d * h * pairs)
    assert model_bench.step_flops(config, 5, 32) == pytest.approx(expected, rel=2e-3)  # norms of q and k
    more = model_bench.step_flops(dataclasses.replace(tiny, window=8), 5, 32)
    assert more > model_bench.step_flops(dataclasses.replace(tiny, window=8, residual=False), 5, 32)


def test_cudnn_layers_compute_what_ours_do(monkeypatch):
    """With XLA in cuDNN's place: projections, rotary embedding, window."""
    attention = jax.nn.dot_product_attention
    xla = lambda *arrays, implementation, **options: attention(*arrays, implementation="xla", **options)
    monkeypatch.setattr(jax.nn, "dot_product_attention", xla)
    config = dataclasses.replace(tiny, residual=False, window=5, pattern=("local", "global"), num_layers=2)
    model = eqx.filter_jit(LanguageModel)(config, key=jax.random.key(0))
    other = model_bench.with_cudnn(model)
    assert [type(block.attention) for block in other.blocks] == [model_bench.CudnnAttention] * 2
    logits = [eqx.filter_jit(x)(jnp.arange(12)) for x in (model, other)]
    assert bench.relative_error(logits[1], logits[0]) < 1e-5
    rattention = model_bench.with_cudnn(eqx.filter_eval_shape(LanguageModel, tiny, key=jax.random.key(0)))
    kinds = [type(block.attention).__name__ for block in rattention.blocks]
    assert kinds == ["RAttention"] * 3 + ["CudnnAttention"]
