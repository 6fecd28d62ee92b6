"""`python -m pallas bench`: time our ops and their peers on this machine's device, against what the device can do.

Every line of the table is one implementation of one op at one size, forward (the output), and forward + backward (the
output and the gradients of all inputs for a random cotangent, in one compiled program). It gives the median and the
quartiles of many samples; useful TFLOP/s (`peers.flops` says what counts) and TB/s (`peers.least_bytes`);
and the part of the floor that was reached, floor / median. The floor is the larger of FLOPs / matrix rate and
bytes / copy bandwidth, both ceilings measured on the device at the start. What cannot run says why.
"""

import argparse
import dataclasses
import functools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from pallas import block_sizes
from pallas.feature_map import named
from pallas.tools.peers import READS, Inputs, Problem, Row, flops, least_bytes, make_inputs, ours, rows
from pallas.tools.provenance import Save, facts, in_words, saver

L2_BYTES = 60e6  # the largest cache of the GPUs we time on; sets of inputs take turns until they are twice that
MOST_CALLS, MOST_SETS = 200, 16
PASSES = ("forward", "forward+backward")

Calls = Sequence[Callable[[], object]]  # one for each set of inputs; each starts the work and does not wait for it
Stopwatch = Callable[[Calls, int], tuple[float, float]]


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds of one call. `waiting` is how many calls were still to finish when the host had queued its last one:
    below 1 the host was the slower, and the time is the host's."""

    median: float
    quartiles: tuple[float, float]
    least: float
    samples: int
    calls: int
    waiting: float


@dataclasses.dataclass(frozen=True)
class Ceilings:
    """What the device reaches: FLOP/s in a large bfloat16 matrix product, bytes/s (read and written) in a copy."""

    flops: float
    bandwidth: float

    def floor(self, flops: float, num_bytes: float) -> float:
        return max(flops / self.flops, num_bytes / self.bandwidth)


def time_jax(calls: Calls, count: int) -> tuple[float, float]:
    """Seconds from the first of `count` calls until the last has finished, and until it was queued."""
    started, out = time.perf_counter(), None
    for number in range(count):
        out = calls[number % len(calls)]()
    queued = time.perf_counter()
    jax.block_until_ready(out)
    return time.perf_counter() - started, queued - started


def time_torch(calls: Calls, count: int) -> tuple[float, float]:
    """As `time_jax`, by the device's own clock."""
    import torch  # pyright: ignore[reportMissingImports]

    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    started = time.perf_counter()
    begin.record()
    for number in range(count):
        calls[number % len(calls)]()
    end.record()
    queued = time.perf_counter() - started
    end.synchronize()
    return begin.elapsed_time(end) / 1e3, queued


def measure(calls: Calls, stopwatch: Stopwatch, *, samples: int, seconds: float) -> Timing:
    """The time of one call, from `samples` batches of about `seconds` each: queued one after the other, so that the
    host's work overlaps the device's, each with the next set of inputs, so that no cache holds them. The first
    calls, which compile, and two batches more are not counted."""
    stopwatch(calls, len(calls))
    count = math.ceil(seconds * len(calls) / max(stopwatch(calls, len(calls))[0], 1e-9))
    count = min(max(count, 2, len(calls)), MOST_CALLS)
    for _ in range(2):
        stopwatch(calls, count)
    taken = [stopwatch(calls, count) for _ in range(samples)]
    each = [total / count for total, _ in taken]
    low, middle, high = statistics.quantiles(each, n=4, method="inclusive") if samples > 1 else each * 3
    waiting = statistics.median((total - queued) / (total / count) for total, queued in taken)
    return Timing(middle, (low, high), min(each), samples, count, waiting)


def with_gradients(function: Callable[[Inputs], Array]) -> Callable[[Inputs, Array], tuple[Array, Inputs]]:
    """The output and the gradient of every input."""

    def both(x, cotangent):
        out, pull = jax.vjp(function, x)
        return out, pull(cotangent)[0]

    return both


@jax.jit
def relative_error(got: Any, expected: Any) -> Array:
    """The largest relative RMS difference between the leaves of two trees, computed on the device."""

    def one(got, expected):
        got, expected = got.astype(jnp.float32), expected.astype(jnp.float32)
        norm = lambda x: jnp.sqrt(jnp.sum(jnp.square(x)))
        return norm(got - expected) / jnp.maximum(norm(expected), 1e-30)

    return jnp.max(jnp.stack(jax.tree.leaves(jax.tree.map(one, got, expected))))


def measure_ceilings(on_gpu: bool, **settings) -> Ceilings:
    """A product of two matrices of 8192 x 8192, and the faster of a copy and a negation of 2 GiB."""
    size, length = (8192, 2**30) if on_gpu else (256, 2**20)
    keys = jax.random.split(jax.random.key(0), 4)
    pairs = [[jax.random.normal(key, (size, size), jnp.bfloat16) for key in keys[i : i + 2]] for i in (0, 2)]
    product = jax.jit(jnp.matmul)
    best = measure([functools.partial(product, *pair) for pair in pairs], time_jax, **settings).median
    x = jax.random.normal(keys[0], (length,), jnp.bfloat16)
    copies = [measure([functools.partial(jax.jit(f), x)] * 2, time_jax, **settings) for f in (jnp.copy, jnp.negative)]
    return Ceilings(2 * size**3 / best, 2 * x.nbytes / min(copy.median for copy in copies))


def reason(error: Exception) -> str:
    """Why a row is not available, in one line."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:200]


def oracle(row: Row, problem: Problem, inputs: Inputs) -> tuple[Array, Inputs]:
    """What the row should compute, by our own definition, or by `chunked` where that would not fit."""
    name = "reference" if problem.length <= 2048 else "chunked"
    function = ours(row.op, row.window, row.feature_map or problem.feature_map, name)
    return jax.jit(with_gradients(function))({n: inputs[n] for n in READS[row.op]}, inputs["cotangent"])


def time_row(row: Row, problem: Problem, sets: Sequence[Inputs], *, check: bool, **settings) -> dict[str, Any]:
    """Timings by pass; with `check` also the error of output and gradients, over the first set of inputs."""
    found: dict[str, Any] = {}
    if row.torch:
        for name, backward in zip(PASSES, (False, True), strict=True):
            found[name] = measure(row.make(backward, len(sets)), time_torch, **settings)
        return found
    function = row.make()
    arguments = [({name: x[name] for name in READS[row.op]}, x["cotangent"]) for x in sets]
    programs = (jax.jit(function), jax.jit(with_gradients(function)))
    calls = [functools.partial(programs[0], x) for x, _ in arguments]
    found[PASSES[0]] = measure(calls, time_jax, **settings)
    calls = [functools.partial(programs[1], *both) for both in arguments]
    found[PASSES[1]] = measure(calls, time_jax, **settings)
    if check:
        found["error"] = float(relative_error(programs[1](*arguments[0]), oracle(row, problem, sets[0])))
    return found


def line_of(row: Row, problem: Problem, timing: Timing, backward: bool, x: Inputs, ceilings: Ceilings) -> dict:
    """One saved line: what was timed, and what follows from it."""
    work, num_bytes = flops(row, problem, backward=backward), least_bytes(row, x, backward=backward)
    floor = ceilings.floor(work, num_bytes)
    return dataclasses.asdict(timing) | dict(
        flops=work,
        bytes=num_bytes,
        tflops=work / timing.median / 1e12,
        tbps=num_bytes / timing.median / 1e12,
        floor=floor,
        of_floor=floor / timing.median,
    )


def cell(line: dict[str, Any]) -> str:
    low, high = (f"{1e3 * x:.3f}" for x in line["quartiles"])
    bound = "" if line["waiting"] >= 1 or line["platform"] == "cpu" else " host-bound"
    rates = f"{line['tflops']:5.0f} TFLOP/s {line['tbps']:5.2f} TB/s {line['of_floor']:4.0%} of floor"
    return f"{1e3 * line['median']:9.3f} ms ({low}..{high}) {rates}{bound}"


def title(row: Row, problem: Problem) -> str:
    kind = {"sliding_window_attention": "window", "residual_linear_attention": "residual", "rattention": "RATTENTION"}
    if row.op == "sliding_window_attention" and row.window >= problem.length:
        return "full causal"
    return f"{kind[row.op]} {row.window} {row.feature_map or ''}"


def bench(problem: Problem, chosen: Sequence[Row], save: Save, ceilings: Ceilings, *, check: bool, **settings) -> None:
    """Time the rows, print and save each as it comes, then the ratios."""
    p = problem
    print(f"\n{p.batch} x {p.length}, {p.num_heads} query and {p.num_kv_heads} kv heads of {p.head_size}, {p.dtype}")
    one = make_inputs(p, jax.random.key(0))
    smallest = sum(one[name].nbytes for name in READS["sliding_window_attention"])
    num_sets = min(max(2, math.ceil(2 * L2_BYTES / smallest)), MOST_SETS)
    sets = [one, *(make_inputs(p, jax.random.key(seed)) for seed in range(1, num_sets))]
    medians: dict[tuple[str, int, str], dict[str, float] | str] = {}
    for row in chosen:
        about = dict(kind="timing", op=row.op, by=row.by) | dataclasses.asdict(p)
        about |= dict(window=row.window, feature_map=row.feature_map)
        key, name = (row.op, row.window, row.by), f"{title(row, p):26} {row.by:38}"
        try:
            found = time_row(row, p, sets, check=check, **settings)
        except Exception as error:  # a peer may fail in any way; the table says how and goes on
            medians[key] = reason(error)
            print(f"{name} not available: {medians[key]}", flush=True)
            save(about | {"not available": medians[key]})
            continue
        medians[key] = {which: found[which].median for which in PASSES}
        for which, backward in zip(PASSES, (False, True), strict=True):
            more = line_of(row, p, found[which], backward, one, ceilings) | dict(error=found.get("error"))
            line = save(about | {"pass": which} | more)
            print(f"{name if not backward else '':65} {which:16} {cell(line)}", flush=True)
        if "error" in found:
            print(f"{'':65} {'':16} relative RMS error {found['error']:.1e}, of output and gradients")
    print_ratios(p, medians, save)


def print_ratios(problem: Problem, medians: dict, save: Save) -> None:
    """Their time over that of our first implementation, so that above 1 ours is the faster."""
    p = problem
    own_name = next((by for op, _, by in medians if op == "rattention" and by.startswith("ours")), None)
    if own_name is None:
        print("no ratios: ours is not among the rows")
        return

    def fastest(found: list, which: str) -> float | str:
        times = [x[which] for x in found if isinstance(x, dict)]
        return min(times) if times else next((x for x in found if isinstance(x, str)), "not among the rows")

    def of(op, window, by):
        return [found for key, found in medians.items() if key[:2] == (op, window) and key[2].startswith(by)]

    wide, mine = min(p.wide_window, p.length), of("rattention", p.window, own_name)
    theirs = {
        "full attention, cuDNN": of("sliding_window_attention", p.length, "cuDNN"),
        f"window {wide}, cuDNN": of("sliding_window_attention", wide, "cuDNN"),
        f"RATTENTION {p.window} from peers' parts, the fastest": of("rattention", p.window, "peers' parts"),
    }
    print(f"ratios: time over that of RATTENTION {p.window} {own_name}")
    for name, found in theirs.items():
        for which in PASSES:
            other, own = fastest(found, which), fastest(mine, which)
            about = {"kind": "ratio", "theirs": name, "ours": own_name, "pass": which} | dataclasses.asdict(p)
            if isinstance(other, str) or isinstance(own, str):
                missing = {"not available": other if isinstance(other, str) else f"{own_name}: {own}"}
                save(about | missing)
                print(f"{name:65} {which:16} not available: {missing['not available']}")
            else:
                save(about | dict(ratio=other / own))
                print(f"{name:65} {which:16} {other / own:9.2f}")


def sweep(problem: Problem, implementation: str, save: Save, ceilings: Ceilings, **settings) -> None:
    """RATTENTION with each candidate for the block sizes, and which is the fastest in each pass."""
    p = problem
    print(f"\nblock sizes at {p.batch} x {p.length}, window {p.window}, heads of {p.head_size}")
    sets = [make_inputs(p, jax.random.key(seed)) for seed in range(2)]
    best: dict[str, tuple[float, Any]] = {}
    for blocks in block_sizes.gpu_candidates(p.head_size, p.window):
        make = functools.partial(ours, "rattention", p.window, p.feature_map, implementation, blocks)
        row = Row("rattention", p.window, f"ours, {implementation}", make, p.feature_map)
        about = dict(kind="sweep", by=row.by, block_sizes=dataclasses.asdict(blocks)) | dataclasses.asdict(p)
        try:
            found = time_row(row, p, sets, check=False, **settings)
        except Exception as error:  # too much shared memory, say
            save(about | {"not available": reason(error)})
            print(f"{blocks} not available: {reason(error)}", flush=True)
            continue
        for which, backward in zip(PASSES, (False, True), strict=True):
            line = save(about | {"pass": which} | line_of(row, p, found[which], backward, sets[0], ceilings))
            print(f"{blocks} {which:16} {cell(line)}", flush=True)
            best[which] = min(best.get(which, (math.inf, None)), (found[which].median, blocks), key=lambda x: x[0])
    for which, (seconds, blocks) in best.items():
        save({"kind": "best", "pass": which, "median": seconds, "block_sizes": dataclasses.asdict(blocks)})
        print(f"best {which:16} {1e3 * seconds:9.3f} ms {blocks}")


def parse(arguments: list[str], on_gpu: bool) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m pallas bench",
        description="Time our ops and their peers on this machine's device. Without a GPU the sizes are tiny, and only "
        "show that everything runs.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add, quick = parser.add_argument, "--quick" in arguments
    shapes = ("1x2048" if quick else "8x4096 4x8192 1x32768") if on_gpu else "2x64"
    add("--shapes", default=shapes, help="batch x length of each problem, in one argument")
    add("--heads", type=int, default=16 if on_gpu else 2, help="query heads")
    add("--kv-heads", type=int, default=4 if on_gpu else 1, help="key/value heads")
    add("--head-size", type=int, default=128 if on_gpu else 16, help="channels of a head")
    add("--window", type=int, default=512 if on_gpu else 24, help="keys that a query sees, its own included")
    add("--wide-window", type=int, default=2048 if on_gpu else 48, help="of the plain window that is timed as well")
    add("--feature-map", default="softmax", choices=list(named), help="of the residual branch")
    add("--implementations", default="gpu" if on_gpu else "chunked", help="of ours: gpu,chunked,reference,tpu")
    add("--only", default="", help="rows whose op or maker holds one of these words, comma-separated: cudnn,ours")
    add("--samples", type=int, default=3 if quick else 15, help="batches of calls that the median is over")
    add("--seconds", type=float, default=0.05 if on_gpu else 0.0, help="about how long a batch of calls takes")
    add("--check", action="store_true", help="also compare outputs and gradients with our own definition")
    add("--sweep", action="store_true", help="time our block sizes instead, and find the fastest")
    add("--quick", action="store_true", help="a short sequence and few samples: does it run?")
    add("--out", type=Path, help="file that one JSON object a row is added to")
    add("--commit", help="saved with the numbers; default: what git says")
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> int:
    """Run the benchmark; returns the exit status."""
    on_gpu = jax.devices()[0].platform == "gpu"
    options = parse(arguments, on_gpu)
    settings: dict[str, Any] = dict(samples=options.samples, seconds=options.seconds)
    about = facts(options.commit)
    ceilings = measure_ceilings(on_gpu, **settings)
    about["ceilings"] = dataclasses.asdict(ceilings)

    save = saver(options.out, about)
    print(f"{about['device']}, {about['date']}, commit {about['commit']}\n{in_words(about['versions'])}")
    print(f"ceilings: {ceilings.flops / 1e12:.0f} TFLOP/s bfloat16 product, {ceilings.bandwidth / 1e12:.2f} TB/s copy")
    words = [word for word in options.only.lower().split(",") if word]
    for shape in options.shapes.split():
        batch, length = (int(size) for size in shape.split("x"))
        sizes = (batch, length, options.heads, options.kv_heads, options.head_size)
        problem = Problem(*sizes, options.window, options.wide_window, options.feature_map)
        implementations = options.implementations.split(",")
        if options.sweep:
            sweep(problem, implementations[0], save, ceilings, **settings)
            continue
        chosen = rows(problem, implementations)
        if words:
            chosen = [row for row in chosen if any(word in f"{row.op} {row.by}".lower() for word in words)]
        bench(problem, chosen, save, ceilings, check=options.check, **settings)
    return 0
