"""`python -m rattn_eqx.inference.bench`: a step of generation and the reading of a prompt, by kind of attention.

The model has the paper's 3B width and eight of its layers, three local to one global, with random parameters and caches
filled with random numbers. Its local layers are RATTENTION with a window of 512, or a plain window of 4,096 keys, or
every layer is global. Beside each time stands the floor: the bytes that a step must move, at the bandwidth of a copy
that was measured in the same process.
"""

import argparse
import concurrent.futures
import dataclasses
import functools
import math
import os
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from pallas.tools.bench import measure_ceilings, reason
from pallas.tools.provenance import facts, heading, saver
from rattn_eqx.inference.cost import cache_bytes
from rattn_eqx.inference.generate import in_compute_dtype
from rattn_eqx.model.cache import Cache
from rattn_eqx.model.config import ModelConfig
from rattn_eqx.model.language_model import LanguageModel
from rattn_eqx.model.presets import paper_3b, tiny

STEPS = 32  # that one call decodes, on the device
TOGETHER = 8  # programs that are compiled side by side


def kinds(config: ModelConfig, window: int) -> dict[str, ModelConfig]:
    """The models that are compared, which differ in nothing but their attention."""
    return {
        f"RATTENTION {config.window}": config,
        f"window {window}": dataclasses.replace(config, residual=False, window=window),
        "full attention": dataclasses.replace(config, residual=False, pattern=("global",)),
    }


def build(config: ModelConfig, dtype: str) -> LanguageModel:
    """With random parameters, in the dtype that it computes in."""
    make = lambda key: in_compute_dtype(LanguageModel(config, compute_dtype=dtype, key=key))
    return eqx.filter_jit(make)(jax.random.key(0))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _some_numbers(shape: tuple[int, ...], dtype: Any) -> Array:
    """Random ones, of which long arrays repeat 65,536 again and again."""
    few = jax.random.normal(jax.random.key(1), (min(math.prod(shape), 1 << 16),), jnp.float32)
    few = few.astype(dtype)
    return jnp.resize(few, shape)


def filled(model: LanguageModel, batch: int, context: int, room: int, dtype: str) -> Cache:
    """Caches of a batch that have read `context` tokens, of random numbers."""
    like: Any = eqx.filter_eval_shape(model.init_cache, room, dtype)

    def fill(x):  # the integers are lengths, and the document's number, which may be any
        if x.dtype == jnp.int32:
            return jnp.full((batch,), context, jnp.int32)
        return _some_numbers((batch, *x.shape), x.dtype)

    return jax.tree.map(fill, like)


def step_bytes(model: LanguageModel, cache: Cache, context: int) -> dict[str, int]:
    """Bytes that a step of a batch must move: matrices once, what rings hold once, states twice."""
    size = lambda x: x.size * x.dtype.itemsize
    head = model.embedding if model.head is None else model.head
    matrices = size(head) + sum(size(x) for x in jax.tree.leaves(eqx.filter(model.blocks, eqx.is_array)))
    keys = sum((size(x.keys) + size(x.values)) * min(context, x.keys.shape[1]) // x.keys.shape[1] for x in cache.layers)
    states = sum(2 * size(x.state) for x in cache.layers if x.state is not None)
    return {"parameters": matrices, "keys and values": keys, "states": states}


@dataclasses.dataclass(frozen=True)
class Job:
    """A program to compile and to time: STEPS steps of a batch, or the reading of a piece of one prompt."""

    kind: str  # "decode" or "prefill"
    context: int
    batch: int = 1
    piece: int = 0

    def room(self, samples: int) -> int:
        """Of the cache."""
        return self.context + (samples + 1) * STEPS if self.kind == "decode" else self.context


def program(model: LanguageModel, job: Job) -> Any:
    """A function of parameters, cache and tokens, of which it takes over the last two."""
    _, static = eqx.partition(model, eqx.is_array)

    def decode(parameters, cache: Cache, tokens: Int[Array, "batch"]):
        step_of = jax.vmap(eqx.combine(parameters, static).decode_step)

        def step(_, carry):
            cache, tokens = carry
            logits, cache = step_of(tokens, cache)
            return cache, jnp.argmax(logits, axis=-1).astype(tokens.dtype)

        return jax.lax.fori_loop(0, STEPS, step, (cache, tokens))

    def prefill(parameters, cache: Cache, tokens: Int[Array, "t"]):
        logits, cache = eqx.combine(parameters, static).prefill(tokens, cache)
        return cache, jnp.argmax(logits)

    return jax.jit(decode if job.kind == "decode" else prefill, donate_argnums=1)


def compiled(model: LanguageModel, jobs: list[Job], options: argparse.Namespace) -> dict[Job, Any]:
    """Each job's program, or the error in its place: side by side, since compiling takes longer than all the rest."""
    parameters = eqx.filter(model, eqx.is_array)

    def compile_one(job: Job) -> Any:
        try:
            cache = eqx.filter_eval_shape(model.init_cache, job.room(options.samples), options.dtype)
            tokens = jax.ShapeDtypeStruct((job.batch if job.kind == "decode" else job.piece,), jnp.int32)
            if job.kind == "decode":
                cache = jax.tree.map(lambda x: jax.ShapeDtypeStruct((job.batch, *x.shape), x.dtype), cache)
            return program(model, job).lower(parameters, cache, tokens).compile()
        except Exception as error:
            return error

    with concurrent.futures.ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        return dict(zip(jobs, pool.map(compile_one, jobs), strict=True))


def some_by_some(model: LanguageModel, jobs: list[Job], options: argparse.Namespace) -> Iterator[tuple[Job, Any]]:
    """The programs of all jobs; those of the next few are compiled when the last few have been timed."""
    for first in range(0, len(jobs), TOGETHER):
        some = jobs[first : first + TOGETHER]
        started = time.monotonic()
        programs = compiled(model, some, options)
        print(f"{len(some)} programs compiled in {time.monotonic() - started:.0f} s", flush=True)
        yield from programs.items()


def time_decode(model: LanguageModel, job: Job, run: Any, options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of a step of a batch, its bytes, and memory."""
    cache = filled(model, job.batch, job.context, job.room(options.samples), options.dtype)
    needed, held = step_bytes(model, cache, job.context), sum(x.nbytes for x in jax.tree.leaves(cache))
    predicted = job.batch * cache_bytes(model.config, cache.room or job.context, dtype=options.dtype)
    parameters, tokens, taken = eqx.filter(model, eqx.is_array), jnp.zeros((job.batch,), jnp.int32), []
    for _ in range(options.samples + 1):
        started = time.perf_counter()
        cache, tokens = jax.block_until_ready(run(parameters, cache, tokens))
        taken.append((time.perf_counter() - started) / STEPS)
    sizes = run.memory_analysis()
    memory = (
        sum(getattr(sizes, f"{x}_size_in_bytes") for x in ("argument", "output", "temp")) - sizes.alias_size_in_bytes
    )
    return dict(
        median=statistics.median(taken[1:]), best=min(taken[1:]), samples=options.samples, bytes=needed,
        cache_bytes=held, predicted_cache_bytes=predicted, peak_bytes=memory,
    )  # fmt: skip


def time_prefill(model: LanguageModel, job: Job, run: Any, options: argparse.Namespace) -> dict[str, Any]:
    """Seconds to read one prompt in pieces."""
    whole = job.context - job.context % job.piece
    tokens = jax.random.randint(jax.random.key(2), (whole,), 0, model.config.vocabulary_size)
    parameters, taken = eqx.filter(model, eqx.is_array), []
    for _ in range(max(2, options.samples // 2) + 1):
        cache, token = jax.block_until_ready(model.init_cache(job.context, options.dtype)), None
        started = time.perf_counter()
        for start in range(0, whole, job.piece):
            cache, token = run(parameters, cache, tokens[start : start + job.piece])
        jax.block_until_ready(token)
        taken.append(time.perf_counter() - started)
    timed: dict[str, Any] = dict(median=statistics.median(taken[1:]), best=min(taken[1:]), samples=len(taken) - 1)
    return timed | dict(piece=job.piece, tokens=whole)


def parse(arguments: list[str], on_gpu: bool) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m rattn_eqx.inference.bench",
        description="Time generation with language models that differ in their attention. Without a GPU the model is "
        "tiny, and only shows that everything runs.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--what", default="decode,prefill", help="decode, prefill or both")
    add("--contexts", default="4096,8192,32768,131072" if on_gpu else "64,128", help="tokens that are read before")
    add("--batches", default="1,8,64" if on_gpu else "1,2", help="texts that are generated together")
    add("--layers", type=int, default=8 if on_gpu else 4, help="of the model, three local to one global")
    add("--window", type=int, default=512 if on_gpu else 16, help="of RATTENTION")
    add("--plain-window", type=int, default=4096 if on_gpu else 64, help="of the model without residual branch")
    add("--piece", type=int, default=131072 if on_gpu else 64, help="tokens of a prompt that are read at once")
    add("--dtype", default="bfloat16" if on_gpu else "float32", help="of matrices, keys and values")
    add("--only", default="", help="kinds of attention whose name holds one of these words, comma-separated")
    add("--samples", type=int, default=5 if on_gpu else 2, help="calls of 32 steps that the median is over")
    add("--out", type=Path, help="file that one JSON object a row is added to")
    add("--commit", help="written beside the numbers; default: what git says")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Run the comparison; returns the exit status."""
    on_gpu = jax.devices()[0].platform == "gpu"
    options = parse(sys.argv[1:] if arguments is None else arguments, on_gpu)
    base = dataclasses.replace(paper_3b if on_gpu else tiny, num_layers=options.layers, window=options.window)
    ceilings = measure_ceilings(on_gpu, samples=5 if on_gpu else 2, seconds=0.05 if on_gpu else 0.0)
    about: dict[str, Any] = facts(options.commit) | {"bandwidth": ceilings.bandwidth}
    save = saver(options.out, about)
    print(heading(about))
    print(f"width {base.model_width}, {base.num_layers} layers, {options.dtype}; a copy moves "
          f"{ceilings.bandwidth / 1e12:.2f} TB/s, read and written")  # fmt: skip
    numbers = lambda text: [int(x) for x in text.split(",")]
    jobs = [
        Job("decode", context, batch) for context in numbers(options.contexts) for batch in numbers(options.batches)
    ]
    jobs += [Job("prefill", context, piece=min(options.piece, context)) for context in numbers(options.contexts)]
    jobs = [job for job in jobs if job.kind in options.what.split(",")]
    for name, config in kinds(base, options.plain_window).items():
        if not any(word in name.lower() for word in options.only.lower().split(",")):
            continue
        model = build(config, options.dtype)
        for job, run in some_by_some(model, jobs, options):
            line: dict[str, Any] = dict(kind=job.kind, attention=name, context=job.context, batch=job.batch)
            line |= dict(dtype=options.dtype, config=dataclasses.asdict(config))
            shown = f"{job.kind:8}{name:16}{job.batch:4} x {job.context:7,}  "
            try:
                if isinstance(run, Exception):
                    raise run
                timed = (time_decode if job.kind == "decode" else time_prefill)(model, job, run, options)
            except Exception as error:
                print(f"{shown}not available: {reason(error)}", flush=True)
                save(line | {"not available": reason(error)})
                continue
            save(line | timed)
            print(shown + described(job, timed, ceilings.bandwidth), flush=True)
    return 0


def described(job: Job, timed: dict[str, Any], bandwidth: float) -> str:
    """A row's numbers in words."""
    median = timed["median"]
    if job.kind == "prefill":
        return f"{1e3 * median:9.2f} ms, {timed['tokens'] / median:11,.0f} tokens/s"
    floor = sum(timed["bytes"].values()) / bandwidth
    exact = "as predicted" if timed["cache_bytes"] == timed["predicted_cache_bytes"] else "NOT as predicted"
    return (
        f"{1e3 * median:9.3f} ms, {job.batch / median:9,.0f} tokens/s, {median / floor:5.2f} x the floor of "
        f"{sum(timed['bytes'].values()) / 1e9:6.2f} GB; caches {timed['cache_bytes'] / 1e9:6.2f} GB, {exact}, "
        f"{timed['peak_bytes'] / 1e9:.2f} GB in all"
    )


if __name__ == "__main__":
    sys.exit(main())
