"""`python -m pallas check`: does this machine compute what the definition says? For a new card, driver or jax, first.

Random calls from the whole contract (random_cases.py) are held to the float64 definition: output, final state and every
gradient, and two runs equal to the bit. A program is compiled once and given many draws of numbers, segments and sizes.
Every failure is one line that replays it, and the first of a kind are made smaller until they no longer fail.

Programs compile and run side by side in worker processes, each replaced after some tens of programs: a process can hold
only so many. A worker that dies or hangs is a failure of its call.
"""

import argparse
import collections
import dataclasses
import json
import multiprocessing
import multiprocessing.connection
import os
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from pallas.ops import KERNELS, choose, family
from pallas.tools import provenance
from pallas.tools.case_errors import allowed, errors
from pallas.tools.cases import Case, compiled, parse, to_line
from pallas.tools.random_cases import LONGEST, LONGEST_OF_OTHERS, LONGEST_ON_DEVICE, draw, options, redraw, simpler

PACKAGES = ("jax", "jaxlib", "jax-cuda13-plugin", "jax-cuda13-pjrt", "libtpu")
PROGRAMS_OF_A_WORKER = 24
HANGS = 600  # seconds for one program and its draws, or for making one failure smaller


@dataclasses.dataclass(frozen=True)
class Held:
    """One call held to the definition. errors, bounds: by tensor. wrong: what is outside, "" if nothing is."""

    line: str
    errors: dict[str, float]
    bounds: dict[str, float]
    wrong: str

    def shares(self) -> dict[str, tuple[float, float, float]]:
        """(error / bound, error, bound) by tensor."""
        share = lambda error, bound: error / bound if bound else float(error > 0)
        return {name: (share(x, self.bounds[name]), x, self.bounds[name]) for name, x in self.errors.items()}


# What workers do.


def about() -> dict[str, Any]:
    """The device, and the implementation that None picks there for bfloat16."""
    import jax
    import jax.numpy as jnp

    q = jnp.ones((1, 1, 64), jnp.bfloat16)
    device = jax.devices()[0]
    kind, chosen = device.device_kind, choose("check", None, q, q, q)
    driver = str(getattr(device.client, "platform_version", "")).split("\n")[0]
    present = [name for name in KERNELS if family(name).present()]
    return dict(device=kind, platform=device.platform, driver=driver, chosen=chosen, present=present)


def hold(cases: list[Case], implementation: str, until: float = float("inf")) -> list[Held]:
    """Cases of one program, as long as there is time: until a number of seconds since the epoch."""
    import jax

    program = compiled(cases[0], cases[0].dtype, implementation)
    definition = compiled(cases[0], "float64", "reference", on="cpu")
    less = "reference" if implementation == "chunked" else "chunked"
    simpler = definition if cases[0].dtype == "float64" else compiled(cases[0], cases[0].dtype, less, on="cpu")
    held = []
    for case in cases:
        if held and time.time() > until:
            break
        first, second = program(case), program(case)
        expected = definition(case)
        found = errors(case, first, expected)
        bounds = dict.fromkeys(found, 0.0)  # exact zeros are exact
        bounds |= allowed(case, implementation, expected, errors(case, simpler(case), expected))
        outside = [name for name in found if not found[name] <= bounds[name]]
        wrong = [f"{name} {found[name]:.1e} > {bounds[name]:.1e}" for name in outside]
        wrong += [f"{name}: two runs differ" for name in first if first[name].tobytes() != second[name].tobytes()]
        held.append(Held(to_line(case), found, bounds, ", ".join(wrong)))
    jax.clear_caches()
    return held


def shrink(case: Case, implementation: str, until: float) -> Held | None:
    """The simplest call on the way from this one that fails, too; None if it does not fail again."""
    (least,) = hold([case], implementation)
    if not least.wrong:
        return None
    tried = {to_line(case.program)}
    again = True
    while again:
        again = False
        for one in simpler(parse(least.line)):
            if time.time() > until:
                return least
            if to_line(one) in tried:
                continue
            tried.add(to_line(one))
            try:
                (found,) = hold([one], implementation)
            except Exception:  # a call that cannot be is no smaller failure
                continue
            if found.wrong:
                least, again = found, True
                break
    return least


def _work(pipe) -> None:
    while (job := pipe.recv()) is not None:
        function, arguments = job
        try:
            pipe.send(("done", globals()[function](*arguments)))
        except Exception as error:
            lines = traceback.format_exception_only(error)[-1].strip().splitlines()
            pipe.send(("error", f"{lines[0][:300]}"))


# The process that deals out the work.


class Worker:
    """A process that does one job at a time."""

    def __init__(self):
        context = multiprocessing.get_context("spawn")
        self.pipe, other = context.Pipe()
        self.process = context.Process(target=_work, args=(other,), daemon=True)
        self.process.start()
        other.close()
        self.jobs, self.job, self.began = 0, None, 0.0

    def start(self, function: str, *arguments) -> None:
        self.jobs, self.job, self.began = self.jobs + 1, (function, *arguments), time.time()
        self.pipe.send((function, arguments))

    def result(self) -> tuple[str, Any]:
        """("done", what the job returned), or ("error" or "aborted", why)."""
        try:
            return self.pipe.recv()
        except (EOFError, OSError):
            self.process.join(5)
            return "aborted", f"the process ended with status {self.process.exitcode}"

    def stop(self) -> None:
        self.process.kill()
        self.process.join(5)


def in_workers(count: int, jobs: Iterator[tuple]) -> Iterator[tuple[tuple, str, Any]]:
    """(job, "done", result) or (job, "error" or "aborted" or "hung", why) of each job, as they end."""
    idle, busy = [Worker() for _ in range(count)], {}
    try:
        while True:
            while idle and (job := next(jobs, None)) is not None:
                worker = idle.pop()
                worker.start(*job)
                busy[worker.pipe] = worker
            if not busy:
                return
            for pipe in multiprocessing.connection.wait(list(busy), timeout=5):
                worker = busy.pop(pipe)
                how, what = worker.result()
                yield worker.job, how, what
                if how == "aborted" or worker.jobs >= PROGRAMS_OF_A_WORKER:
                    worker.stop()
                    worker = Worker()
                idle.append(worker)
            for pipe, worker in list(busy.items()):
                if time.time() - worker.began > HANGS:
                    worker.stop()
                    del busy[pipe]
                    yield worker.job, "hung", f"no result in {HANGS} s"
                    idle.append(Worker())
    finally:
        for worker in [*idle, *busy.values()]:
            worker.stop()


@dataclasses.dataclass
class Tally:
    """What was met, and the errors nearest to their bounds."""

    calls: int = 0
    programs: int = 0
    failures: list = dataclasses.field(default_factory=list)  # (what, line)
    worst: dict = dataclasses.field(default_factory=dict)  # (map, tensor): (error / bound, error, bound, line)
    met: collections.Counter = dataclasses.field(default_factory=collections.Counter)

    def add(self, held: list[Held]) -> None:
        self.programs += 1
        for one in held:
            self.calls += 1
            case = parse(one.line)
            found = options(case)
            self.met.update(found.items())
            for tensor, share in one.shares().items():
                key = found["map"], tensor
                self.worst[key] = max(self.worst.get(key, (-1.0,)), (*share, one.line), key=lambda x: x[0])
            if one.wrong:
                self.failures.append((one.wrong, one.line))

    def fail(self, what: str, case: Case) -> None:
        self.failures.append((what, to_line(case)))

    def show(self) -> None:
        tensors = list(dict.fromkeys(tensor for _, tensor in self.worst))
        print(f"\nworst error / its bound, in {self.calls:,} calls of {self.programs} programs")
        columns = [name for name in dict.fromkeys(map_ for map_, _ in self.worst)]
        print("  " + " ".join(f"{name[:12]:>12}" for name in ("", *columns)))
        for tensor in tensors:
            cells = [self.worst.get((name, tensor)) for name in columns]
            print("  " + " ".join([f"{tensor[:12]:>12}", *(f"{x[0]:12.2f}" if x else f"{'':12}" for x in cells)]))
        by_factor = collections.defaultdict(list)
        for (factor, option), count in sorted(self.met.items(), key=str):
            by_factor[factor].append(f"{option} {count}")
        print("\ncalls that met each option")
        for factor, counts in by_factor.items():
            print(f"  {factor}: {', '.join(counts)}")


def jobs_of(
    seeds: Iterator[int], implementation: str, longest: int, draws: int | None, until: float, seed_of: dict[str, int]
) -> Iterator[tuple]:
    """A program and its draws for each seed, as long as there is time. seed_of gets each seed, by its first call."""
    for seed in seeds:
        if time.time() > until:
            return
        case = draw(seed, implementation, longest)
        cases = [redraw(case, number) for number in range(draws or draws_of(case, longest))]
        seed_of[to_line(cases[0])] = seed
        yield "hold", cases, implementation, until


def draws_of(case: Case, longest: int) -> int:
    """More where they are quick: the definition forms every pair."""
    if longest in (*LONGEST.values(), LONGEST_OF_OTHERS):
        return 4
    pairs = case.t * case.num_keys * case.sizes[0] * max(case.batch, 1)
    return 30 if pairs < 5e5 else 20 if pairs < 2e6 else 6


def _next_seed(path: Path | None) -> int:
    if path is None or not path.exists():
        return 0
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return 1 + max((line["seed"] for line in lines if "seed" in line), default=-1)


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m pallas check",
        description="Hold random calls to the float64 definition on this machine. Ends with status 1 if one fails.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--minutes", type=float, default=5.0, help="how long; what is compiled by then is still run")
    add("--seed", type=int, help="of the first program; default: the one after the last in --out, or 0")
    add("--programs", type=int, help="at most so many")
    add("--draws", type=int, help="numbers, segments and sizes that each program is given; default: as is quick")
    add("--implementation", choices=["chunked", *KERNELS], help="default: what None picks on this machine")
    add("--longest", type=int, help="tokens of a call; default: 4096 on a device, a few hundred where interpreted")
    add("--jobs", type=int, default=os.cpu_count() or 1, help="worker processes")
    add("-x", "--exitfirst", action="store_true", help="stop at the first program that fails")
    add("--shrink", type=int, default=3, help="kinds of failures made smaller, in at most --minutes more, and 8")
    add("--replay", metavar="LINE", help="hold one call, as a failure's line gives it, and show all its errors")
    add("--out", type=Path, help="file that one JSON object a program is added to")
    add("--commit", help="saved with the results; default: what git says")
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> int:
    """Check, print what was found; returns the exit status: 1 for a failure, 2 for a line that is no call."""
    args = parse_arguments(arguments)
    os.environ.setdefault("PJRT_NPROC", "16")  # the interpreter holds a thread for each warpgroup
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # workers share the device
    try:
        replayed = parse(args.replay) if args.replay else None
    except ValueError as error:
        print(error)
        return 2
    ((_, how, machine),) = in_workers(1, iter([("about",)]))
    if how != "done":
        print(f"check: no device could be asked: {machine}")
        return 1
    implementation = args.implementation or machine["chosen"]
    interpreted = implementation in KERNELS and implementation not in machine["present"]
    where = "interpreted on a CPU" if interpreted else "on this device"
    facts: dict[str, Any] = dict(implementation=implementation, interpreted=interpreted, **machine)
    facts |= provenance.of_code(args.commit, provenance.versions(PACKAGES))
    print(provenance.heading(facts))
    print(f"{implementation}, {where}")
    if replayed is not None:
        return _replay(replayed, implementation)

    began, until = time.time(), time.time() + 60 * args.minutes
    longest = args.longest or (
        LONGEST.get(implementation, LONGEST_OF_OTHERS)
        if interpreted or implementation == "chunked"
        else LONGEST_ON_DEVICE
    )
    first = _next_seed(args.out) if args.seed is None else args.seed
    seeds = iter(range(first, first + (args.programs or 10**9)))
    tally = Tally()
    save = provenance.saver(args.out, facts)
    bar = tqdm(
        total=round(60 * args.minutes),
        unit="s",
        dynamic_ncols=True,
        bar_format="{l_bar}{bar}| {n:.0f} of {total} s{postfix}",
    )
    seed_of: dict[str, int] = {}
    jobs = jobs_of(seeds, implementation, longest, args.draws, until, seed_of)
    for (_, cases, *_), how, what in in_workers(args.jobs, jobs):
        before = len(tally.failures)
        if how == "done":
            tally.add(what)
        else:
            tally.fail(f"{how}: {what}", cases[0])
        new = tally.failures[before:]
        for wrong, line in new:
            bar.write(f"FAILED {wrong}\n  python -m pallas check --implementation {implementation} --replay '{line}'")
        save(_row(seed_of[to_line(cases[0])], cases[0], what if how == "done" else [], new))
        bar.n = min(time.time() - began, bar.total)
        bar.set_postfix_str(f"{tally.calls} calls, {tally.programs} programs, {len(tally.failures)} failures")
        if new and args.exitfirst:
            break
    bar.close()
    tally.show()
    _show_shrunk(tally.failures, implementation, args.jobs, args.shrink, 60 * args.minutes)
    print(f"\n{tally.calls} calls, {tally.programs} programs, seeds from {first}: {len(tally.failures)} failures")
    return 1 if tally.failures else 0


def _row(seed: int, case: Case, held: list[Held], failures: list) -> dict[str, Any]:
    """What is kept of a program: how often it was called and the errors nearest to their bounds."""
    worst: dict[str, tuple] = {}
    for one in held:
        for tensor, share in one.shares().items():
            worst[tensor] = max(worst.get(tensor, (-1.0,)), share)
    return {"seed": seed, "program": to_line(case.program), "calls": len(held), "worst": worst, "failures": failures}


def _replay(case: Case, implementation: str) -> int:
    ((_, how, what),) = in_workers(1, iter([("hold", [case], implementation)]))
    if how != "done":
        print(f"{how}: {what}")
        return 1
    (held,) = what
    for tensor, error in held.errors.items():
        outside = "" if error <= held.bounds[tensor] else "  OUTSIDE"
        print(f"  {tensor:20} {error:9.2e}  bound {held.bounds[tensor]:9.2e}{outside}")
    print(f"FAILED {held.wrong}" if held.wrong else "within bounds, and two runs are equal to the bit")
    return 1 if held.wrong else 0


def _show_shrunk(failures: list, implementation: str, count: int, most: int, seconds: float) -> None:
    """The first failures of different kinds, made smaller."""
    kinds: dict[Any, Case] = {}
    for wrong, line in failures:
        case = parse(line)
        kinds.setdefault((case.op, case.map, wrong.split()[0], bool(case.segments)), case)
    chosen = list(kinds.values())[:most]
    if not chosen:
        return
    seconds = min(seconds, HANGS - 120)  # the last try ends later
    print(f"\nmaking {len(chosen)} of the failures smaller, {seconds:.0f} s at most")
    until = time.time() + seconds
    jobs = (("shrink", case, implementation, until) for case in chosen)
    for (_, case, *_), how, what in in_workers(min(count, len(chosen)), jobs):
        print(f"from  {to_line(case)}")
        if how != "done" or what is None:
            print(f"to    {'nothing: it did not fail again' if how == 'done' else f'{how}: {what}'}")
        else:
            print(f"to    {what.line}\n      {what.wrong}")
