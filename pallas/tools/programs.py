"""The programs that `python -m pallas compile` compiles, each in a process of its own, for GPUs and TPUs alike."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

import pallas
from pallas import feature_map
from pallas.tools import provenance


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
    feature_map: str = "softmax"  # or "custom": one that the kernels do not know, so that XLA computes its features
    segmented: bool = False
    with_states: bool = False
    sinks: bool = False
    swa_norm: bool = True
    backward: bool = True
    most_memory: float | None = None
    implementation: str = "gpu"

    @property
    def title(self) -> str:
        return f"{self.name}: {'forward + backward' if self.backward else 'forward'}"


def program(case: Case, array):
    """(function, arguments) of a case; array(shape, dtype) makes an argument that has no value."""
    c = case
    if c.op.endswith("_step"):
        return step_program(case, array)
    queries, keys = (c.batch, c.length, c.num_heads, c.head_size), (c.batch, c.length, c.num_kv_heads, c.head_size)
    x = {"q": array(queries, jnp.bfloat16), "k": array(keys, jnp.bfloat16), "v": array(keys, jnp.bfloat16)}
    whole: dict[str, Any] = {}  # not one for each sequence
    settings: dict[str, Any] = {"window": c.window, "implementation": c.implementation}
    if c.op == "rattention":
        x |= {"q_rla": x["q"], "k_rla": x["k"]}
        whole = {name: array(queries[2:], jnp.float32) for name in ("swa_gain", "rla_gain")}
        whole |= {} if c.swa_norm else {"swa_gain": None}
    if c.sinks:
        whole["sink_logits"] = array((c.num_heads,), jnp.float32)
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
            return getattr(pallas, c.op)(**x, segment_ids=ids, **whole, **settings)

        return jax.vmap(one)(x, ids)

    def both(x, whole, ids, cotangent):
        out, pull = jax.vjp(lambda x, whole: forward(x, whole, ids), x, whole)
        return out, pull(cotangent)

    return (both, (x, whole, ids, x["q"])) if c.backward else (forward, (x, whole, ids))


def step_program(case: Case, array):
    """Likewise, of `case.length` tokens one after the other, each of which is the next one's query."""
    b, kv, d, residual = case.batch, case.num_kv_heads, case.head_size, case.op == "rattention_step"
    ring, key = array((b, case.window, kv, d), jnp.bfloat16), array((b, kv, d), jnp.bfloat16)
    token, settings, state = {"k": key, "v": key}, {"implementation": case.implementation}, None
    gains: dict[str, Any] = {}
    if residual:
        phi = getattr(feature_map, case.feature_map)
        f = jax.eval_shape(phi, jax.ShapeDtypeStruct((d,), jnp.float32)).shape[0]
        token["k_rla"], settings["feature_map"], state = key, phi, array((b, kv, f, d), jnp.float32)
        gains = {name: array((case.num_heads, d), jnp.float32) for name in ("swa_gain", "rla_gain")}
        gains |= {} if case.swa_norm else {"swa_gain": None}
    if case.sinks:
        gains["sink_logits"] = array((case.num_heads,), jnp.float32)
    held = ring, ring if residual else None, ring, state, array((b,), jnp.int32)

    def one(q, token, cache, gains):
        q_rla = {"q_rla": q} if residual else {}
        return getattr(pallas, case.op)(q, **token, **q_rla, cache=cache, **gains, **settings)

    def steps(q, token, gains, held):
        batch = jax.vmap(one, in_axes=(0, 0, 0, None))
        body = lambda _, carry: batch(carry[0], token, carry[1], gains)
        return jax.lax.fori_loop(0, case.length, body, (q, jax.vmap(pallas.StepCache)(*held)))

    return steps, (array((b, case.num_heads, d), jnp.bfloat16), token, gains, held)


def memory(compiled: Any) -> dict[str, int]:
    """Bytes that a compiled program takes."""
    sizes = compiled.memory_analysis()
    return {name: getattr(sizes, f"{name}_size_in_bytes") for name in ("argument", "output", "temp", "alias")}


def compile_in_child(module: str, case: Case, target: str, folder: Path, environment: dict[str, str]) -> None:
    """`pallas.tools.MODULE.compile_here` in a process of its own, since a listing goes where its environment says.

    The folder gets what the process prints, `output` and `errors`, and what `compile_here` writes.

    Raises:
      ValueError: with the error that ended the process.
    """
    code = (
        f"import json, pathlib, sys; from pallas.tools import {module}, programs; _, case, target, folder = sys.argv; "
        f"{module}.compile_here(programs.Case(**json.loads(case)), target, pathlib.Path(folder))"
    )
    command = [sys.executable, "-c", code, json.dumps(dataclasses.asdict(case)), target, str(folder)]
    with (folder / "output").open("w") as output, (folder / "errors").open("w") as errors:
        done = subprocess.run(command, stdout=output, stderr=errors, env=environment, cwd=folder)
    if done.returncode:
        raise ValueError(last_error((folder / "errors").read_text(errors="replace"), done.returncode))


def environment(folder: Path) -> dict[str, str]:
    """For the process that compiles: this code, no device, and nothing from a cache."""
    paths = [str(Path(__file__).parents[2]), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    return os.environ | {
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
        "JAX_ENABLE_COMPILATION_CACHE": "false",
        "TMPDIR": str(folder),
    }


def last_error(text: str, status: int) -> str:
    """The exception's own lines, without the trace before it."""
    lines = text.strip().splitlines()
    starts = [i for i, line in enumerate(lines) if re.match(r"[\w.]*(Error|Exception|Interrupt)\b", line)]
    kept = lines[starts[-1] :] if starts else lines[-5:]
    return "\n".join(line[:300] for line in kept[:12]) or f"the compiler ended with status {status}"


def old_jax(install: str) -> str | None:
    """Why this jax cannot compile for a device that is not here, or None."""
    if jax.__version_info__ >= (0, 11, 2):
        return None
    return f"compile: needs jax 0.11.2 or newer, and so Python 3.12 or newer; this is {jax.__version__}: {install}"


def chosen(cases: Sequence[Case], only: str) -> list[Case]:
    """Cases whose title holds one of the words, comma-separated; all, if there is no word."""
    words = [word for word in only.lower().split(",") if word]
    return [case for case in cases if not words or any(word in case.title for word in words)]


def print_heading(targets: Sequence[str], about: dict[str, Any]) -> None:
    print(f"compiled for {', '.join(targets)}, {about['date']}, commit {about['commit']}")
    print(provenance.in_words(about["versions"]))


def print_failures(wrong: Sequence[str]) -> int:
    """Print them, one line each; returns the exit status."""
    print("".join(f"FAILED {line}\n" for line in wrong), end="")
    return 1 if wrong else 0
