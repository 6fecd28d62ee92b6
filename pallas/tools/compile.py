"""`python -m pallas compile`: compile our kernels for a device that is not here, and print what the compiler says.

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
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

import pallas
from pallas import feature_map
from pallas.tools import machine_code, provenance

PACKAGES = ("jax", "jaxlib", "jax-cuda13-plugin", "jax-cuda13-pjrt", "nvidia-cuda-nvcc", "nvidia-cuda-nvdisasm")
NEEDED = ("jax-cuda13-plugin", "jax-cuda13-pjrt", "nvidia-cuda-nvdisasm")
INSTALL = "pip install 'jax>=0.11.2,<0.12' 'jax-cuda13-plugin>=0.11.2,<0.12' 'nvidia-cuda-nvdisasm>=13,<14'"
MOST_SPILLED = 3072  # bytes; 2,548 where features are given with segments and start states, 1,992 elsewhere
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


@dataclasses.dataclass(frozen=True)
class Case:
    """A program to compile: an op on a batch of sequences, forward alone or with the gradients of all inputs."""

    name: str
    op: str = "rattention"
    batch: int = 1
    length: int = 4096
    num_heads: int = 16
    num_kv_heads: int = 4
    head_size: int = 128
    window: int = 512
    feature_map: str = "softmax"  # or "custom": one that the kernels do not know, so that its features are given
    segmented: bool = False
    with_states: bool = False
    backward: bool = True
    most_memory: float | None = None
    implementation: str = "gpu"

    @property
    def title(self) -> str:
        return f"{self.name}: {'forward + backward' if self.backward else 'forward'}"


PAPER_3B = Case("3b 8 x 4096", batch=8)
SEGMENTED = Case("segments and states", segmented=True, with_states=True)
WINDOW = Case("window alone", op="sliding_window_attention")
RESIDUAL = Case("residual alone", op="residual_linear_attention")
CASES = (
    PAPER_3B,
    dataclasses.replace(PAPER_3B, backward=False),
    Case("3b 1 x 32768", length=32768),
    Case("3b 1 x 262144", length=262144, most_memory=MOST_MEMORY),
    Case("d = 64", batch=8, head_size=64),
    SEGMENTED,
    dataclasses.replace(SEGMENTED, backward=False),
    Case("three heads to one", num_heads=3, num_kv_heads=1),
    Case("features given", feature_map="custom"),
    dataclasses.replace(SEGMENTED, name="features given, segments and states", feature_map="custom"),
    Case("relu", feature_map="relu"),
    Case(
        "three heads of 64 to one, packed",
        num_heads=3,
        num_kv_heads=1,
        head_size=64,
        feature_map="relu",
        segmented=True,
    ),
    Case("elu, packed", num_heads=3, num_kv_heads=1, feature_map="elu_plus_one", segmented=True),
    WINDOW,
    dataclasses.replace(WINDOW, backward=False),
    RESIDUAL,
    dataclasses.replace(RESIDUAL, backward=False),
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


def program(case: Case, array):
    """(function, arguments) of a case; array(shape, dtype) makes an argument that has no value."""
    c = case
    queries, keys = (c.batch, c.length, c.num_heads, c.head_size), (c.batch, c.length, c.num_kv_heads, c.head_size)
    x = {"q": array(queries, jnp.bfloat16), "k": array(keys, jnp.bfloat16), "v": array(keys, jnp.bfloat16)}
    whole: dict[str, Any] = {}  # not one for each sequence
    settings: dict[str, Any] = {"window": c.window, "implementation": c.implementation}
    if c.op == "rattention":
        x |= {"q_rla": x["q"], "k_rla": x["k"]}
        whole = {name: array(queries[2:], jnp.float32) for name in ("swa_gain", "rla_gain")}
    if c.op != "sliding_window_attention":
        phi = jax.nn.silu if c.feature_map == "custom" else getattr(feature_map, c.feature_map)
        settings["feature_map"] = phi
        if c.with_states:
            f = jax.eval_shape(phi, jax.ShapeDtypeStruct((c.head_size,), jnp.float32)).shape[0]
            state = array((c.batch, c.num_kv_heads, f, c.head_size), jnp.float32)
            x |= {"initial_state": state, "segment_state": state}
    ids = array((c.batch, c.length), jnp.int32) if c.segmented else None

    def forward(x, whole, ids):
        def one(x, ids):
            rest = {name: value for name, value in x.items() if name not in ("q", "k", "v")}
            return getattr(pallas, c.op)(x["q"], x["k"], x["v"], segment_ids=ids, **rest, **whole, **settings)

        return jax.vmap(one)(x, ids)

    def both(x, whole, ids, cotangent):
        out, pull = jax.vjp(lambda x, whole: forward(x, whole, ids), x, whole)
        return out, pull(cotangent)

    return (both, (x, whole, ids, x["q"])) if c.backward else (forward, (x, whole, ids))


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
    sizes = compiled.memory_analysis()
    memory = {name: getattr(sizes, f"{name}_size_in_bytes") for name in ("argument", "output", "temp", "alias")}
    num_kernels = (compiled.as_text() or "").count('custom_call_target="mosaic_gpu')
    (folder / "result.json").write_text(json.dumps({"memory": memory, "num_kernels": num_kernels}))


def compile_case(case: Case, target: str) -> dict[str, Any]:
    """Kernels, memory and seconds of a case, or the error; compiled in a process of its own."""
    began = time.perf_counter()
    code = "import json, pathlib, sys; from pallas.tools.compile import Case, compile_here; "
    code += "_, case, target, folder = sys.argv; compile_here(Case(**json.loads(case)), target, pathlib.Path(folder))"
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        command = [sys.executable, "-c", code, json.dumps(dataclasses.asdict(case)), target, name]
        with (folder / "output").open("w") as output, (folder / "errors").open("w") as errors:
            done = subprocess.run(command, stdout=output, stderr=errors, env=_environment(name), cwd=folder)
        try:
            if done.returncode:
                raise ValueError(last_error((folder / "errors").read_text(errors="replace"), done.returncode))
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
        memory = found["memory"]
        memory["total"] = memory["argument"] + memory["output"] + memory["temp"] - memory["alias"]
    return found | {"seconds": round(time.perf_counter() - began, 1)}


def _environment(folder: str) -> dict[str, str]:
    """For the process that compiles: no device, listings on its output, and nothing from a cache."""
    paths = [str(Path(__file__).parents[2]), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    new = {"JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(path for path in paths if path)}
    new |= {f"MOSAIC_GPU_DUMP_{what}": "1" for what in ("PTX", "PTXAS", "SASS")}
    new |= {"JAX_ENABLE_COMPILATION_CACHE": "false", "TMPDIR": folder}
    toolkit = _toolkit()
    if toolkit is not None:  # the kernels' ptxas is found on the path, libdevice where the flag says
        new["PATH"] = f"{toolkit / 'bin'}{os.pathsep}{os.environ.get('PATH', '')}"
        new["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_cuda_data_dir={toolkit}".strip()
    return {name: value for name, value in os.environ.items() if not name.startswith("MOSAIC_GPU_DUMP")} | new


def _toolkit() -> Path | None:
    """Where the package nvidia-cuda-nvcc has put ptxas; without it XLA looks for a CUDA toolkit on this machine."""
    try:
        files = importlib.metadata.files("nvidia-cuda-nvcc") or []
    except importlib.metadata.PackageNotFoundError:
        return None
    return next((Path(str(file.locate())).parents[1] for file in files if file.name == "ptxas"), None)


def last_error(text: str, status: int) -> str:
    """The exception's own lines, without the trace before it."""
    lines = text.strip().splitlines()
    starts = [i for i, line in enumerate(lines) if re.match(r"[\w.]*(Error|Exception|Interrupt)\b", line)]
    kept = lines[starts[-1] :] if starts else lines[-5:]
    return "\n".join(line[:300] for line in kept[:12]) or f"the compiler ended with status {status}"


def versions() -> dict[str, str | None]:
    """Of the packages, and of the ptxas that compiles, if it is on the path or in a package."""
    ptxas = shutil.which("ptxas", path=_environment("").get("PATH"))
    said = subprocess.run([ptxas, "--version"], capture_output=True, text=True).stdout if ptxas else ""
    return provenance.versions(PACKAGES) | {"ptxas": next(iter(re.findall(r"\bV([\d.]+)", said)), None)}


def refusal(target: str, found: dict[str, str | None]) -> str | None:
    """Why nothing can be compiled for a target with these versions, or None."""
    if target not in TARGETS:
        return f"compile: unknown target {target!r}; there is {', '.join(TARGETS)}, and v5e, v5p, v6e, tpu7x"
    missing = [name for name in NEEDED if found[name] is None]
    if jax.__version_info__ < (0, 11, 2):
        return f"compile: needs jax 0.11.2 or newer, and so Python 3.12 or newer; this is {jax.__version__}: {INSTALL}"
    if missing:
        return f"compile: needs {' and '.join(missing)}: {INSTALL}"
    return None


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
        memory = (
            f", {size['total']}{limit} GB: inputs {size['argument']}, outputs {size['output']}, rest {size['temp']}"
        )
    print(f"\n{case.title}{memory} ({found['seconds']:.0f} s)")
    if "error" in found:
        print(f"  does not compile: {found['error']}")
    for kernel in found.get("kernels", ()):
        print(f"  {kernel['name']:28}" + "".join(f"{kernel[column]:>15,}" for column in COLUMNS), flush=True)


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m pallas compile",
        description="Compile our kernels for a device that is not here. Ends with status 1 if one does not compile or "
        "spills too much, or if the longest case takes too much memory.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--target", nargs="+", default=["h100"], help="devices: h100, or any of v5e, v5p, v6e, tpu7x")
    add("--only", default="", help="cases whose title holds one of these words, comma-separated: relu,alone")
    add("--quick", action="store_true", help="TPUs: the cases of 3b, 8 x 4096, window 512 alone")
    add("--most-spilled", type=int, default=MOST_SPILLED, help="bytes that a kernel may spill")
    add("--jobs", type=int, default=min(os.cpu_count() or 1, 8), help="cases compiled at the same time")
    add("--out", type=Path, help="file that one JSON object a case is added to")
    add("--commit", help="written beside the numbers; default: what git says")
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> int:
    """Compile the cases and print the table; returns the exit status."""
    options = parse(arguments)
    from pallas.tools import compile_tpu

    if any(target in compile_tpu.TOPOLOGIES for target in options.target):
        return compile_tpu.main(options)
    found_versions, target = versions(), options.target[0]
    refused = refusal(target, found_versions)
    words = [word for word in options.only.lower().split(",") if word]
    chosen = [case for case in CASES if not words or any(word in case.title for word in words)]
    if refused or not chosen:
        print(refused or f"compile: no case holds {options.only!r}; there are: {', '.join(c.title for c in CASES)}")
        return 2
    about = {"target": target, "date": provenance.now()}
    about |= {"commit": options.commit or provenance.commit(), "versions": found_versions}
    print(f"compiled for {target}, {about['date']}, commit {about['commit']}")
    print(", ".join(f"{name} {version}" for name, version in found_versions.items() if version))
    print(f"\n  {'kernel':28}" + "".join(f"{column.replace('_', ' '):>15}" for column in COLUMNS))
    wrong, kernels = [], []
    with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
        results = pool.map(compile_case, chosen, [target] * len(chosen))
        for case, found in zip(chosen, results, strict=True):
            show(case, found)
            wrong += failures(case, found, options.most_spilled)
            kernels += found.get("kernels", [])
            if options.out:
                options.out.parent.mkdir(parents=True, exist_ok=True)
                with options.out.open("a") as file:
                    file.write(json.dumps(dataclasses.asdict(case) | found | about) + "\n")
    most = max((max(kernel["spill_stores"], kernel["spill_loads"]) for kernel in kernels), default=0)
    print(f"\n{len(kernels)} kernels compiled, spilling {most} bytes at most; {options.most_spilled} are allowed")
    print("".join(f"FAILED {line}\n" for line in wrong), end="")
    return 1 if wrong else 0
