"""`python -m pallas compile --target v5e v5p v6e tpu7x`: what the TPU compiler says of our kernels, without a TPU.

For every case: memory, and from the final schedules of all its kernels and XLA fusions the instruction bundles and the
matrix-unit instructions, loop bodies times their trips, per 128 tokens and query head. These are counts, not times.

Counted too high: both sides of a branch. Counted too low: a loop inside that of a fusion, whose length is not told,
counts once; such loops are listed. Each case is compiled in a process of its own, whose environment says where its
listings go.
"""

import argparse
import dataclasses
import json
import re
import tempfile
import time
from pathlib import Path
from typing import Any

import jax

from pallas.block_sizes import BlockSizes
from pallas.tools import programs, provenance
from pallas.tools.programs import Case, memory, program

TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}
PACKAGES = ("jax", "jaxlib", "libtpu")
INSTALL = "pip install 'jax>=0.11.2,<0.12' 'libtpu>=0.0.48,<0.0.49'"
MOST = {"forward": (111, 1150), "backward": (314, 2350)}  # matrix instructions and bundles that v5e may need
DUMPED = "--xla_jf_dump_llo_text=true --xla_jf_dump_llo_pass_label_regex=final|dedup"
UNIT = 128  # tokens of one query head
MODELS = {"3b": (16, 4), "12b": (40, 8)}
LENGTHS = {4096: 8, 8192: 4, 131072: 1}  # sequences of a batch
OPS = ("residual_linear_attention", "rattention")


def cases() -> list[Case]:
    """The paper's shapes, forward and with the backward pass."""
    found = []
    for op in OPS:
        for name, (heads, kv) in MODELS.items():
            for length, batch in LENGTHS.items():
                for window in (512, 1024):
                    title = f"{op} {name} {batch} x {length} window {window}"
                    sizes: dict[str, Any] = dict(batch=batch, length=length, num_heads=heads, num_kv_heads=kv)
                    for backward in (False, True):
                        program: dict[str, Any] = dict(op=op, window=window, backward=backward)
                        found.append(Case(title, **sizes, **program, implementation="tpu"))
    return found


def is_quick(case: Case) -> bool:
    return (case.num_heads, case.length, case.window) == (16, 4096, 512)


@dataclasses.dataclass
class Loop:
    """A loop of a schedule, or the schedule itself; what stands in loops inside it is theirs."""

    depth: int
    parent: "Loop | None"
    bundles: int = 0
    matmuls: int = 0
    slots: int = 0  # of matrix units, of `units` that each bundle has


def parse_schedule(listing: str, slots: list[int] | None = None) -> list[Loop]:
    """The loops of a final_bundles listing, in the order in which they begin. slots: used by each bundle, if known.

    A line that begins a bundle has its address, a label ("LB": a loop begins here), and a ">" for each loop around it.
    """
    loops = [Loop(0, None)]
    latest = {0: loops[0]}  # by depth
    current, index = loops[0], 0
    for line in listing.splitlines():
        begins = re.match(r"\s*(?:0x)?([0-9a-f]+)\s+([A-Z]{2})?\s*:\s+(>*)\s*\{(.*)", line)
        if begins:
            address, label, around, what = begins.groups()
            if int(address, 16) != index:
                raise ValueError(f"compile: bundle {index} is missing from the schedule; found {address}")
            depth = len(around)
            waits = not depth and (what.startswith("}") or "sbr.rel" in what)  # after a branch: no loops are marked
            if label == "LB":
                latest[depth] = Loop(depth, latest.get(depth - 1))
                loops.append(latest[depth])
            if not waits:
                if depth not in latest:
                    raise ValueError(f"compile: bundle {address} lies in {depth} loops that did not begin")
                current = latest[depth]
            current.bundles += 1
            current.slots += slots[index] if slots else 0
            index += 1
        current.matmuls += len(re.findall(r"= vmatmul\.", line))
    if not index:
        raise ValueError("compile: a schedule without bundles")
    return loops


def parse_slots(listing: str) -> tuple[int, list[int]]:
    """Of a static-per-bundle-utilization listing: slots for matrix units in a bundle, and those that each uses."""
    names, capacity, *table = listing.partition("CAPAC")[2].splitlines()[1:]
    column = [name.strip() for name in names.split(",")].index("MXU")
    used = [int(row.split()[column]) for row in table if re.fullmatch(r"[\d ]+", row.strip())]
    return int(capacity.split()[column]), used


def totals(loops: list[Loop], trips: list[int | float]) -> dict[str, Any]:
    """Sums over a run: loop i runs trips[i] times for each time that the one around it does; 1 where trips end."""
    times: dict[int, float] = {}
    found = {"bundles": 0.0, "matmuls": 0.0, "slots": 0.0}
    for i, loop in enumerate(loops):
        own = trips[i - 1] if 0 < i <= len(trips) else 1
        times[id(loop)] = own * (1 if loop.parent is None else times[id(loop.parent)])
        for name in found:
            found[name] += getattr(loop, name) * times[id(loop)]
    return found | {"loops_of_unknown_length": max(len(loops) - 1 - len(trips), 0)}


def kernel_trips(case: Case, kind: str) -> dict[str, list[int | float]]:
    """How often each loop of our kernels runs, outermost first: the grid, then those inside."""
    from pallas.tpu.ops import residual_blocks, window_blocks

    c, sizes = case, BlockSizes()
    bytes_of_group = c.num_heads // c.num_kv_heads * c.head_size * 2
    chunk, block = residual_blocks(sizes, c.length, bytes_of_group, kind)
    residual = [c.batch * c.num_kv_heads * -(-c.length // block), block // chunk]
    chunk, block = window_blocks(sizes, c.length, c.window, bytes_of_group)
    steps, chunks, back = -(-c.length // block), block // chunk, -(-(c.window - 1) // block)  # back: blocks of keys
    pairs = sum(  # of query and key chunks that one block of queries meets
        1
        for query in range(chunks)
        for key in range(chunks * (back + 1))
        if -chunk < (query - key) * chunk + back * block < c.window + chunk - 1
    )
    query_steps = c.batch * c.num_kv_heads * steps * (back + 1)
    key_steps = c.batch * c.num_kv_heads * (steps + back) * (back + 1)  # the last blocks of keys meet fewer queries
    found: dict[str, list[int | float]] = {
        "residual_forward": [*residual],
        "residual_backward": [*residual, residual[1]],
        "window_forward": [query_steps, chunks, pairs / (back + 1) / chunks],
        "window_backward_queries": [query_steps, chunks, pairs / (back + 1) / chunks],
        "window_backward_keys": [key_steps, chunks, pairs / (back + 1) / chunks],
    }
    return found


def read_program(folder: Path, hlo: str, case: Case, kind: str) -> dict[str, Any]:
    """Every kernel and fusion that the program runs, fusions without a listing, and a bundle's matrix-unit slots."""
    listings = {}
    for file in folder.glob("*-final_bundles.txt"):
        name = re.fullmatch(r"\d+-(.+)-\d+-final_bundles\.txt", file.name)
        if name and not file.name.endswith("analysis_final_bundles.txt"):
            listings[name[1]] = file
    alike = {}
    for file in folder.glob("*deduplication-map.txt"):
        for section in file.read_text().split("key:")[1:]:
            key, *members = [line.strip() for line in section.splitlines()]
            alike |= {member: key for member in members if member and not member.startswith(("ordinal", "equivalent"))}
    trips, kernels, unlisted, units = kernel_trips(case, kind), [], [], 0
    entry = hlo[hlo.index("\nENTRY") :]
    for line in entry.splitlines():
        match = re.match(r"\s+(?:ROOT )?%([\w.-]+) = ", line)
        if not match:
            continue
        file = listings.get(alike.get(match[1], match[1]))
        if file is None:
            if 'custom_call_target="tpu_custom_call"' in line:
                raise ValueError(f"compile: no schedule of {match[1]}")
            if " fusion(" in line:
                unlisted.append(match[1])
            continue
        stem = re.sub(r"-\d+-final_bundles.txt$", "", file.name)
        [usage] = folder.glob(f"{stem}-*-final_hlo-static-per-bundle-utilization.txt")
        units, used = parse_slots(usage.read_text())
        loops = parse_schedule(file.read_text(errors="replace"), used)
        ours = trips.get(match[1].rsplit(".", 1)[0])
        bounds = re.search(r'"iteration_bounds":\[([^\]]*)\]', line)
        steps = [int(x.strip('"')) for x in bounds[1].split(",") if x] if bounds else []
        run = totals(loops, ours if ours else [product(steps)])
        kernels.append({"name": match[1], "ours": ours is not None} | run)
    return {"kernels": kernels, "unlisted": unlisted, "units": units}


def product(numbers) -> int:
    result = 1
    for number in numbers:
        result *= number
    return result


def compile_here(case: Case, target: str, folder: Path) -> None:
    """Compile in this process, whose environment `compile_case` has set. Writes what a run takes into the folder."""
    from jax.experimental import topologies
    from jax.sharding import AbstractDevice, AbstractMesh, SingleDeviceSharding

    device = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[target]).devices[0]
    sharding = SingleDeviceSharding(device)
    function, arguments = program(case, lambda shape, dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding))
    abstract = AbstractDevice(device.device_kind, getattr(device, "num_cores", None) or 1, "tpu")
    with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=abstract)):
        lowered = jax.jit(function).lower(*arguments)
    compiled = lowered.compile()
    hlo = compiled.as_text() or ""
    scoped = [
        int(x) for x in re.findall(r'"used_scoped_memory_configs":\[\{"memory_space":"1"[^}]*"size":"(\d+)"', hlo)
    ]
    result = {"memory": memory(compiled), "device_kind": device.device_kind, "vmem": max(scoped, default=0)}
    (folder / "result.json").write_text(
        json.dumps(result | read_program(folder / "dump", hlo, case, device.device_kind))
    )


def compile_case(case: Case, target: str) -> dict[str, Any]:
    """What a case takes, or the error; compiled in a process of its own."""
    began = time.perf_counter()
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "dump").mkdir()
        try:
            programs.compile_in_child("compile_tpu", case, target, folder, environment(folder))
            found = json.loads((folder / "result.json").read_text())
            found["per_unit"] = per_unit(case, found)
        except ValueError as error:
            found["error"] = str(error)
    return found | {"seconds": round(time.perf_counter() - began, 1)}


def per_unit(case: Case, found: dict[str, Any]) -> dict[str, float]:
    """Bundles and matrix-unit instructions per 128 tokens and query head, and the share of matrix-unit slots used."""
    units = case.batch * case.length * case.num_heads / UNIT
    sums = {name: sum(kernel[name] for kernel in found["kernels"]) for name in ("bundles", "matmuls", "slots")}
    of_ours = sum(kernel["bundles"] for kernel in found["kernels"] if kernel["ours"])
    return {
        "bundles": round(sums["bundles"] / units, 1),
        "of_our_kernels": round(of_ours / units, 1),
        "matmuls": round(sums["matmuls"] / units, 1),
        "utilisation": round(sums["slots"] / (sums["bundles"] * found["units"]), 3),
    }


def environment(folder: Path) -> dict[str, str]:
    """For the process that compiles: schedules into the folder, and a TPU that nobody is asked about."""
    return programs.environment(folder) | {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "LIBTPU_INIT_ARGS": f"--xla_jf_dump_to={folder / 'dump'} " + DUMPED,
    }


def versions() -> dict[str, str | None]:
    """Of the packages."""
    return provenance.versions(PACKAGES)


def refusal(targets: list[str], found: dict[str, str | None]) -> str | None:
    """Why nothing can be compiled for these targets with these versions, or None."""
    unknown = [target for target in targets if target not in TOPOLOGIES]
    if unknown:
        return f"compile: {', '.join(unknown)} cannot go with TPUs in one run; these are {', '.join(TOPOLOGIES)}"
    needs = f"compile: needs libtpu: {INSTALL}" if found["libtpu"] is None else None
    return programs.old_jax(INSTALL) or needs


def failures(target: str, case: Case, found: dict[str, Any], forward: dict[str, Any] | None) -> list[str]:
    """What is wrong with a case, one line each: it does not compile, or v5e needs too much for the residual branch."""
    if "error" in found:
        return [f"{target}, {case.title}: {found['error']}"]
    if target != "v5e" or case.op != OPS[0] or (case.num_heads, case.num_kv_heads) != MODELS["3b"]:
        return []
    mine, unlisted = found["per_unit"], found.get("unlisted")
    if unlisted:
        return [f"{target}, {case.title}: not counted, for want of a schedule: {', '.join(unlisted)}"]
    if case.backward:
        if forward is None or "per_unit" not in forward:
            return []
        mine = {name: mine[name] - forward["per_unit"][name] for name in ("matmuls", "bundles")}
    direction = "backward" if case.backward else "forward"
    wrong = []
    for name, most in zip(("matmuls", "bundles"), MOST[direction], strict=True):
        if mine[name] > most:
            needs = f"{direction} needs {mine[name]:.0f} {name} per unit; at most {most} may be"
            wrong.append(f"{target}, {case.title}: {needs}")
    return wrong


def show(target: str, case: Case, found: dict[str, Any]) -> None:
    if "error" in found:
        print(f"{target:6} {case.title}\n  does not compile: {found['error']}", flush=True)
        return
    unit, memory = found["per_unit"], found["memory"]
    columns = (
        f"{unit['bundles']:,.0f}",
        f"{unit['of_our_kernels']:,.0f}",
        f"{unit['matmuls']:,.0f}",
        f"{unit['utilisation']:.0%}",
        f"{found['vmem'] / 2**20:.1f}",
        f"{memory['temp'] / 1e9:.2f}",
    )
    row = " ".join(f"{column:>9}" for column in columns)
    print(f"{target:6} {case.title:78} {row} {found['seconds']:>6.0f}", flush=True)


HEAD = ("bundles", "of ours", "matmuls", "use", "VMEM MiB", "HBM GB")


def run(options: argparse.Namespace) -> int:
    """Compile the cases and print the table; returns the exit status."""
    found_versions = versions()
    refused = refusal(options.target, found_versions)
    chosen = [case for case in programs.chosen(cases(), options.only) if is_quick(case) or not options.quick]
    if refused or not chosen:
        print(refused or f"compile: no case holds {options.only!r}")
        return 2
    about = provenance.of_code(options.commit, found_versions)
    save = provenance.saver(options.out, about)
    programs.print_heading(options.target, about)
    print("bundles, matmuls: per 128 tokens and query head; use: of matrix-unit slots; HBM: temporaries\n")
    print(f"{'':6} {'case':78} " + " ".join(f"{name:>9}" for name in HEAD) + "      s")
    wrong, number = [], 0
    for target in options.target:
        forward: dict[str, dict] = {}
        for case in chosen:
            found = compile_case(case, target)
            show(target, case, found)
            if not case.backward:
                forward[case.name] = found
            wrong += failures(target, case, found, forward.get(case.name))
            number += "error" not in found
            save(dataclasses.asdict(case) | found | {"target": target})
    print(f"\n{number} programs compiled")
    return programs.print_failures(wrong)
