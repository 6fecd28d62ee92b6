"""`python -m pallas compile --target h100`: what the compiler says of our Hopper kernels, without a GPU.

Every line of the table is one kernel of one case: registers that each of its threads starts with (warpgroups then trade
them, 240 to compute and 24 to copy), bytes spilled, shared memory of a block in bytes, wgmma instructions, and how many
of them read an operand that the compiler has lost (machine_code.py), of which there must be none.

Each case is compiled in a process of its own: listings are written to a process's output, as its environment says.
"""

import argparse
import concurrent.futures
import dataclasses
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import jax

from pallas.tools import machine_code, programs, provenance
from pallas.tools.programs import Case, memory, program

PACKAGES = ("jax", "jaxlib", "jax-cuda13-plugin", "jax-cuda13-pjrt", "nvidia-cuda-nvcc", "nvidia-cuda-nvdisasm")
NEEDED = ("jax-cuda13-plugin", "jax-cuda13-pjrt", "nvidia-cuda-nvdisasm")
INSTALL = "pip install 'jax>=0.11.2,<0.12' 'jax-cuda13-plugin>=0.11.2,<0.12' 'nvidia-cuda-nvdisasm>=13,<14'"
MOST_SPILLED = 3072  # bytes; 2,548 with features from XLA, segments and start states, 1,992 elsewhere
MOST_MEMORY = 12e9  # bytes, of the longest case
TARGETS = {  # what XLA would ask the device
    "h100": """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448 shared_memory_per_core: 233472
  registers_per_block_limit: 65536 registers_per_core_limit: 65536
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  device_memory_size: 84942979072 memory_bandwidth: 3352320000000 l2_cache_size: 52428800
  cuda_compute_capability { major: 9 }
}
runtime_version { major: 13 minor: 0 }
dnn_version_info { major: 9 minor: 10 }
platform_name: "CUDA"
device_description_str: "NVIDIA H100 80GB HBM3"
"""
}
COLUMNS = ("registers", "spill_stores", "spill_loads", "shared_memory", "wgmma", "lost_operands")


PAPER_3B = Case("3b 8 x 4096", batch=8)
SEGMENTED = Case("segments and states", segmented=True, with_states=True)
WINDOW = Case("window alone", op="sliding_window_attention")
RESIDUAL = Case("residual alone", op="residual_linear_attention")
STEP = Case("step", op="rattention_step", batch=64, length=8, backward=False)
CASES = (
    PAPER_3B,
    dataclasses.replace(PAPER_3B, backward=False),
    Case("3b 1 x 32768", length=32768),
    Case("3b 1 x 262144", length=262144, most_memory=MOST_MEMORY),
    Case("d = 64", batch=8, head_size=64),
    SEGMENTED,
    dataclasses.replace(SEGMENTED, backward=False),
    Case("three heads to one", num_heads=3, num_kv_heads=1),
    Case("custom map", feature_map="custom"),
    dataclasses.replace(SEGMENTED, name="custom map, segments and states", feature_map="custom"),
    Case("relu", feature_map="relu"),
    Case(
        "three heads of 64 to one, packed, sinks",
        num_heads=3,
        num_kv_heads=1,
        head_size=64,
        feature_map="relu",
        segmented=True,
        sinks=True,
        swa_norm=False,
    ),
    Case("elu, packed", num_heads=3, num_kv_heads=1, feature_map="elu_plus_one", segmented=True),
    WINDOW,
    dataclasses.replace(WINDOW, backward=False),
    RESIDUAL,
    dataclasses.replace(RESIDUAL, backward=False),
    STEP,
    dataclasses.replace(STEP, name="step of one sequence", batch=1),
    dataclasses.replace(
        STEP,
        name="step, elu, three heads of 64 to one, sinks",
        sinks=True,
        swa_norm=False,
        num_heads=3,
        num_kv_heads=1,
        head_size=64,
        window=100,
        feature_map="elu_plus_one",
    ),
    dataclasses.replace(STEP, name="step of a window", op="sliding_window_attention_step", batch=1, window=8192),
)


@dataclasses.dataclass(frozen=True)
class Kernel:
    """What the compiler says of one kernel; memory in bytes."""

    name: str
    registers: int
    spill_stores: int
    spill_loads: int
    shared_memory: int
    wgmma: int
    lost_operands: int


def parse_listing(listing: str, claims: list[tuple[str, str]]) -> list[Kernel]:
    """Kernels from what the compiler wrote: PTX and then ptxas's lines, for each.

    claims: the resources that each kernel asked for, by its name. They come in another order, and a name may come more
    than once: a kernel's are those with its name and its number of barriers (the most shared memory, if several).
    """
    asked: dict[tuple[str, int], int] = {}
    for name, text in claims:
        barriers = sum(int(n) * int(times) for n, times in re.findall(r"num_barriers=(\d+)[^)]*\): (\d+)", text))
        key, shared = (name, barriers), _number(r"smem_scratch_bytes=(\d+)", text) + 8 * barriers
        asked[key] = max(shared, asked.get(key, 0))
    kernels = []
    for section in re.split(r"^// Generated by LLVM NVPTX.*$", listing, flags=re.MULTILINE)[1:]:
        [entry] = re.findall(r"\.entry (\w+)", section)
        compiled = re.findall(r"Compiling entry function '(\w+)'", section)
        name = entry.removesuffix("_mosaic_gpu_kernel")
        key = name, section.count("mbarrier.init.shared")
        if compiled != [entry] or key not in asked:
            raise ValueError(
                f"compile: listings disagree: PTX of {entry} with {key[1]} barriers, ptxas compiled {compiled}, "
                f"asked for (name, barriers): {sorted(asked)}"
            )
        spills = r"stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
        [(stores, loads)] = re.findall(spills, section)
        registers, wgmma = _number(r"Used (\d+) registers", section), section.count("wgmma.mma_async")
        if wgmma and not machine_code.num_products(section):
            raise ValueError(f"compile: the machine code of {name} is not listed, for want of nvdisasm: {INSTALL}")
        lost = len(machine_code.lost_operands(section))
        kernels.append(Kernel(name, registers, int(stores), int(loads), asked[key], wgmma, lost))
    return kernels


def _number(pattern: str, text: str) -> int:
    found = re.findall(pattern, text)
    if len(found) != 1:
        raise ValueError(f"compile: expected {pattern!r} once in the compiler's listing; found it {len(found)} times")
    return int(found[0])


def compile_here(case: Case, target: str, folder: Path) -> None:
    """Compile in this process, whose environment `compile_case` has set. Writes what a run takes into the folder."""
    from jax.experimental import topologies
    from jax.sharding import AbstractDevice, AbstractMesh, SingleDeviceSharding

    topology = topologies.get_topology_desc(platform="cuda", topology="1x1x1", target_config=TARGETS[target])
    sharding = SingleDeviceSharding(topology.devices[0])
    function, arguments = program(case, lambda shape, dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding))
    device = AbstractDevice(topology.devices[0].device_kind, 132, "gpu")
    os.environ["MOSAIC_GPU_DUMP_TO"] = str(folder)  # a file for each kernel, small ones
    with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=device)):
        lowered = jax.jit(function).lower(*arguments)
    del os.environ["MOSAIC_GPU_DUMP_TO"]  # hundreds of megabytes; without it the listings go to the output
    compiled = lowered.compile()
    num_kernels = (compiled.as_text() or "").count('custom_call_target="mosaic_gpu')
    (folder / "result.json").write_text(json.dumps({"memory": memory(compiled), "num_kernels": num_kernels}))


def compile_case(case: Case, target: str) -> dict[str, Any]:
    """Kernels, memory and seconds of a case, or the error; compiled in a process of its own."""
    began = time.perf_counter()
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        try:
            programs.compile_in_child("compile_gpu", case, target, folder, environment(folder))
            found = json.loads((folder / "result.json").read_text())
            files = sorted(folder.glob("*.resources.txt"))
            claims = [
                (re.sub(r"_\d+$", "", file.name.removesuffix(".resources.txt")), file.read_text()) for file in files
            ]
            kernels = parse_listing((folder / "output").read_text(errors="replace"), claims)
            if len(kernels) != found["num_kernels"] or not kernels:
                raise ValueError(f"compile: {found['num_kernels']} kernels run, of which {len(kernels)} are listed")
            found["kernels"] = [dataclasses.asdict(kernel) for kernel in kernels]
        except ValueError as error:
            found["error"] = str(error)
    if "memory" in found:
        size = found["memory"]
        size["total"] = size["argument"] + size["output"] + size["temp"] - size["alias"]
    return found | {"seconds": round(time.perf_counter() - began, 1)}


def environment(folder: Path) -> dict[str, str]:
    """For the process that compiles: listings on its output."""
    new = {f"MOSAIC_GPU_DUMP_{what}": "1" for what in ("PTX", "PTXAS", "SASS")}
    toolkit = _toolkit()
    if toolkit is not None:  # the kernels' ptxas is found on the path, libdevice where the flag says
        new["PATH"] = f"{toolkit / 'bin'}{os.pathsep}{os.environ.get('PATH', '')}"
        new["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_cuda_data_dir={toolkit}".strip()
    common = programs.environment(folder).items()
    return {name: value for name, value in common if not name.startswith("MOSAIC_GPU_DUMP")} | new


def _toolkit() -> Path | None:
    """Where the package nvidia-cuda-nvcc has put ptxas; without it XLA looks for a CUDA toolkit on this machine."""
    try:
        files = importlib.metadata.files("nvidia-cuda-nvcc") or []
    except importlib.metadata.PackageNotFoundError:
        return None
    return next((Path(str(file.locate())).parents[1] for file in files if file.name == "ptxas"), None)


def versions() -> dict[str, str | None]:
    """Of the packages, and of the ptxas that compiles, if it is on the path or in a package."""
    ptxas = shutil.which("ptxas", path=environment(Path()).get("PATH"))
    said = subprocess.run([ptxas, "--version"], capture_output=True, text=True).stdout if ptxas else ""
    return provenance.versions(PACKAGES) | {"ptxas": next(iter(re.findall(r"\bV([\d.]+)", said)), None)}


def refusal(target: str, found: dict[str, str | None]) -> str | None:
    """Why nothing can be compiled for a target with these versions, or None."""
    if target not in TARGETS:
        return f"compile: unknown target {target!r}; there is {', '.join(TARGETS)}, and v5e, v5p, v6e, tpu7x"
    missing = [name for name in NEEDED if found[name] is None]
    needs = f"compile: needs {' and '.join(missing)}: {INSTALL}" if missing else None
    return programs.old_jax(INSTALL) or needs


def failures(case: Case, found: dict[str, Any], most_spilled: int) -> list[str]:
    """What is wrong with a case, one line each."""
    if "error" in found:
        return [f"{case.title}: {found['error']}"]
    wrong = []
    for kernel in found["kernels"]:
        spilled = max(kernel["spill_stores"], kernel["spill_loads"])
        if spilled > most_spilled:
            wrong.append(f"{case.title}: {kernel['name']} spills {spilled} bytes; at most {most_spilled} may be")
        if kernel["lost_operands"]:
            wrong.append(f"{case.title}: {kernel['name']} lost {kernel['lost_operands']} register operands of products")
    total = found["memory"]["total"]
    if case.most_memory is not None and total > case.most_memory:
        wrong.append(f"{case.title}: takes {total / 1e9:.2f} GB; at most {case.most_memory / 1e9:.2f} may be")
    return wrong


def show(case: Case, found: dict[str, Any]) -> None:
    memory = ""
    if "memory" in found:
        size = {name: f"{size / 1e9:.2f}" for name, size in found["memory"].items()}
        limit = "" if case.most_memory is None else f" of at most {case.most_memory / 1e9:.2f}"
        parts = f"inputs {size['argument']}, outputs {size['output']}, temporary {size['temp']}"
        memory = f", {size['total']}{limit} GB: {parts}"
    print(f"\n{case.title}{memory} ({found['seconds']:.0f} s)")
    if "error" in found:
        print(f"  does not compile: {found['error']}")
    for kernel in found.get("kernels", ()):
        print(f"  {kernel['name']:28}" + "".join(f"{kernel[column]:>15,}" for column in COLUMNS), flush=True)


def run(options: argparse.Namespace) -> int:
    """Compile the cases and print the table; returns the exit status."""
    found_versions, (target, *others) = versions(), options.target
    refused = refusal(target, found_versions)
    if others:
        refused = f"compile: one GPU at a time, and TPUs apart from it; got --target {' '.join(options.target)}"
    chosen = programs.chosen(CASES, options.only)
    if refused or not chosen:
        print(refused or f"compile: no case holds {options.only!r}; there are: {', '.join(c.title for c in CASES)}")
        return 2
    about = {"target": target} | provenance.of_code(options.commit, found_versions)
    save = provenance.saver(options.out, about)
    programs.print_heading([target], about)
    print(f"\n  {'kernel':28}" + "".join(f"{column.replace('_', ' '):>15}" for column in COLUMNS))
    wrong, kernels = [], []
    with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
        results = pool.map(compile_case, chosen, [target] * len(chosen))
        for case, found in zip(chosen, results, strict=True):
            show(case, found)
            wrong += failures(case, found, options.most_spilled)
            kernels += found.get("kernels", [])
            save(dataclasses.asdict(case) | found)
    most = max((max(kernel["spill_stores"], kernel["spill_loads"]) for kernel in kernels), default=0)
    print(f"\n{len(kernels)} kernels compiled, spilling {most} bytes at most; {options.most_spilled} are allowed")
    return programs.print_failures(wrong)
