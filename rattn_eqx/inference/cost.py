"""What a model costs to hold and to generate with: arithmetic on a `ModelConfig`, no weights and no device.

Parameters are counted of a built model too, whose layers may not be those of its config.
"""

import dataclasses
import functools
import math
import operator
import os
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp

from pallas.feature_map import as_pair
from rattn_eqx.model.config import LayerKind, ModelConfig
from rattn_eqx.model.language_model import LanguageModel
from rattn_eqx.model.map_files import map_of, short
from rattn_eqx.training.config import TrainConfig

LAYER = 2**20  # bytes that tracing and compiling a layer takes at least


@dataclasses.dataclass(frozen=True)
class Hardware:
    """One accelerator: memory bandwidth in bytes/s, and dense bfloat16 FLOP/s, both as its maker states them."""

    name: str
    memory_bandwidth: float
    flops: float


h100 = Hardware("h100", 3.35e12, 989e12)  # SXM, without sparsity
h200 = Hardware("h200", 4.8e12, 989e12)
tpu_v5p = Hardware("tpu_v5p", 2.765e12, 459e12)

hardwares = {hardware.name: hardware for hardware in (h100, h200, tpu_v5p)}


@dataclasses.dataclass(frozen=True)
class StepTime:
    """Seconds to generate one token for every sequence of a batch, as the sum of two terms.

    `cache` is the time to read every sequence's keys and values; `weights` that to multiply by the parameters, which
    either their reading ("bandwidth") or the products ("compute") limits.
    """

    cache: float
    weights: float
    weights_limit: Literal["bandwidth", "compute"]

    @property
    def total(self) -> float:
        return self.cache + self.weights

    @property
    def larger(self) -> Literal["cache", "weights"]:
        """The term that takes more of the time."""
        return "cache" if self.cache > self.weights else "weights"


def parameters_by_part(model: ModelConfig | LanguageModel) -> dict[str, int]:
    """The number of parameters of each part of a model, or of one with this config: from its shapes alone.

    A tied head is counted once, in "embedding". Norms are those of the stream; qk-norms, gains and meta tokens count
    with their attention.
    """
    if isinstance(model, ModelConfig):
        model = _shapes(model)
    attention: dict[LayerKind, int] = {"local": 0, "global": 0, "global_rope": 0}
    for kind, block in zip(model.config.layer_kinds, model.blocks, strict=True):
        attention[kind] += _size(block.attention)
    return {
        "embedding": _size(model.embedding),
        "local attention": attention["local"],
        "global attention": attention["global"] + attention["global_rope"],
        "feed-forward": _size([block.feed_forward for block in model.blocks]),
        "norms": _size([(b.attention_norm, b.feed_forward_norm) for b in model.blocks]) + _size(model.final_norm),
        "head": _size(model.head),
    }


def count_parameters(model: ModelConfig | LanguageModel) -> int:
    """The number of parameters of a model, or of one with this config, found without memory for them."""
    return sum(parameters_by_part(model).values())


def kv_cache_bytes(config: ModelConfig, context: int, *, bytes_per_element: int = 2) -> int:
    """Bytes of the keys and values that one sequence of `context` tokens keeps, over all layers and kv heads.

    A global layer keeps every token; a local layer its newest min(window, context), with the residual branch or
    without. That branch's state is apart: `state_bytes`.

    Raises:
      ValueError: if context is below 1 or beyond 63 bits.
    """
    _require_positive("kv_cache_bytes", context=context)
    tokens = sum(min(config.window, context) if kind == "local" else context for kind in config.layer_kinds)
    return tokens * 2 * config.num_kv_heads * config.head_size * bytes_per_element


def cache_bytes(config: ModelConfig, context: int, *, dtype: str = "bfloat16") -> int:
    """Bytes of the `Cache` of one sequence with room for `context` tokens: of all its arrays, to the byte.

    More than `kv_cache_bytes` and `state_bytes`: a local layer with a residual branch also holds the keys as that
    branch reads them, and each layer an int32.

    Raises:
      ValueError: if context is below 1 or beyond 63 bits.
    """
    _require_positive("cache_bytes", context=context)
    return eqx.filter_eval_shape(_shapes(config).init_cache, config.room(context), dtype).num_bytes


def kv_cache_saving(config: ModelConfig, context: int) -> float:
    """The part of the cache that local layers save, against every layer keeping the whole context; 0 to 1.

    The paper's 12B model at context 4096 saves 0.5625 with window 1024 (its "about 56%") and nothing with window 4096
    (arXiv 2506.15545, section 1). States are left out, as there.
    """
    every_layer_global = dataclasses.replace(config, pattern=("global",))
    return 1 - kv_cache_bytes(config, context) / kv_cache_bytes(every_layer_global, context)


def state_bytes(config: ModelConfig, *, bytes_per_element: int = 4) -> int:
    """Bytes of one sequence's residual states: f * dv numbers for each kv head of each local layer, float32 by default.

    They do not grow with the context. 0 for a model without the residual branch.
    """
    if not config.residual:
        return 0
    per_layer = config.num_kv_heads * _features(config) * config.head_size * bytes_per_element
    return config.layer_kinds.count("local") * per_layer


def state_in_tokens(f: int, dv: int, d: int) -> float:
    """How many tokens' keys and values hold as many numbers as one head's state: f * dv / (2 * d).

    128 for the softmax map (f = 2 d) at d = dv = 128. As bytes it is twice that where the state is float32 and the
    cache bfloat16.
    """
    return f * dv / (2 * d)


def step_time(
    config: ModelConfig,
    batch: int,
    context: int,
    hardware: Hardware,
    *,
    bytes_per_element: int = 2,
    include_state: bool = False,
) -> StepTime:
    """The least time of one generation step, by the paper's formula (arXiv 2506.15545, Fig. 7 and its appendix).

    T = B S_kv / BW + max(2 B P_count / F, P_size / BW): reading the cache is always limited by bandwidth BW; the
    products with the P_count parameters by either compute F or the reading of their P_size bytes. A lower bound, for
    one device that holds everything.

    Args:
      batch: B, the sequences generated together.
      context: tokens that every sequence has so far; S_kv is `kv_cache_bytes` of them.
      bytes_per_element: of the cache and of the parameters; 2 is bfloat16.
      include_state: also count the residual states, read and written in float32 each step; the paper leaves them out.

    Raises:
      ValueError: if batch or context is below 1 or beyond 63 bits.
    """
    _require_positive("step_time", batch=batch, context=context)
    cache = kv_cache_bytes(config, context, bytes_per_element=bytes_per_element)
    if include_state:
        cache += 2 * state_bytes(config)
    parameters = count_parameters(config)
    reading = parameters * bytes_per_element / hardware.memory_bandwidth
    multiplying = 2 * batch * parameters / hardware.flops
    return StepTime(
        cache=batch * cache / hardware.memory_bandwidth,
        weights=max(multiplying, reading),
        weights_limit="compute" if multiplying > reading else "bandwidth",
    )


def describe_cost(config: ModelConfig, *, context: int, batch: int, hardware: Hardware) -> str:
    """A table of the above for reading: parameters by part, layers, cache, states and the time of a step.

    Raises:
      ValueError: as `step_time`.
    """
    time = step_time(config, batch, context, hardware)
    with_state = step_time(config, batch, context, hardware, include_state=True)
    kinds, parts = config.layer_kinds, parameters_by_part(config)
    cache, state = kv_cache_bytes(config, context), state_bytes(config)
    total, speed = sum(parts.values()), batch / time.total
    local = f"window {config.window}"
    if config.residual:
        local += f", residual branch with the {short(config.feature_map)} map"

    positions = "no positions"
    if rotary := kinds.count("global_rope"):
        positions = f"{rotary} with rotary positions" if "global" in kinds else "rotary positions"

    per_head = ""
    if config.residual:
        as_tokens = state_in_tokens(_features(config), config.head_size, config.head_size)
        per_head = f"; as many numbers per head as the keys and values of {as_tokens:g} tokens"

    rows = [("parameters", f"{total:,}", f"{_bytes(2 * total)} in bfloat16")]
    rows += [(f"  {part}", f"{size:,}", f"{size / total:.1%}") for part, size in parts.items() if size]
    rows += [
        ("layers", f"{config.num_layers}", f"width {config.model_width}, feed-forward {config.feed_forward_width}"),
        ("  local", f"{kinds.count('local')}", local),
        ("  global", f"{config.num_layers - kinds.count('local')}", f"every token, {positions}"),
        ("  heads", f"{config.num_heads}", f"{config.num_kv_heads} for keys and values, size {config.head_size}"),
        ("one sequence", f"{context:,}", "tokens of context"),
        ("  keys, values", _bytes(cache), "bfloat16"),
        ("  saved", f"{kv_cache_saving(config, context):.1%}", "against every layer keeping the whole context"),
        ("  as held", f"{cache_bytes(config, context):,} B", "of arrays: with keys for both branches, and states"),
        ("  states", _bytes(state), f"float32, the same for every context{per_head}"),
        (f"a step of {batch:,}", _milliseconds(time.total), f"at least: {speed:,.0f} tokens/s on one {hardware.name}"),
        ("  cache", _milliseconds(time.cache), "limited by bandwidth"),
        ("  weights", _milliseconds(time.weights), f"limited by {time.weights_limit}"),
        ("  with states", _milliseconds(with_state.total), "read and written each step"),
    ]
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    return "\n".join(f"{name:<{widths[0]}}  {value:>{widths[1]}}  {note}" for name, value, note in rows)


def training_bytes(config: ModelConfig, training: TrainConfig) -> int:
    """The least memory that training takes, in bytes: what is surely held at once, found from the sizes alone.

    That is the matrices in float32, with their gradients and two moments each; what enters every layer, for each token
    of a piece of the batch; and `LAYER` for the program of a layer. Scores, logits and copies come on top.
    """
    tokens = training.batch_size // training.microbatches * training.context
    held = 16 * num_weights(config) + config.num_layers * LAYER
    itemsize = {"float32": 4, "bfloat16": 2}[training.compute_dtype]
    devices = 1 if jax.default_backend() == "cpu" else jax.local_device_count()  # of which each holds its share
    return held + itemsize * tokens * config.model_width * config.num_layers // devices


def num_weights(config: ModelConfig) -> int:
    """The parameters that stand in matrices, all but the small ones of norms and branches: arithmetic, in no time."""
    heads = 2 * config.num_heads + 2 * config.num_kv_heads
    per_layer = config.model_width * (heads * config.head_size + 3 * config.feed_forward_width)
    embeddings = config.vocabulary_size * config.model_width * (1 if config.tie_embeddings else 2)
    return embeddings + config.num_layers * per_layer


def require_memory(what: str, needed: int, remedy: str) -> None:
    """Refuse arrays that this machine cannot hold, before memory is taken.

    Args:
      what: begins the message, such as "evaluate: 64 samples".
      needed: the least number of bytes that are held at once.

    Raises:
      ValueError: `needed` is more than the memory of the machine and of its accelerator, if there is one.
    """
    limit = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 2**50
    limit = max(limit, (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit", 0))
    if needed > limit:
        raise ValueError(f"{what} must fit in memory, {_bytes(limit)}; got at least {_bytes(needed)}; {remedy}")


@functools.cache
def _shapes(config: ModelConfig) -> LanguageModel:
    """The model with a `jax.ShapeDtypeStruct` in place of every parameter."""
    return eqx.filter_eval_shape(LanguageModel, config, key=jax.eval_shape(jax.random.key, 0))


def _size(tree: Any) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree) if hasattr(leaf, "shape"))


def _require_positive(function: str, **sizes: int) -> None:
    for name, size in sizes.items():
        if not 1 <= operator.index(size) < 2**63:
            raise ValueError(f"{function}: {name} must be at least 1; got {name}={size!r:.80}; below 2**63")


def _bytes(size: int) -> str:
    unit, scale = next((u, x) for u, x in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3), ("B", 1)) if size >= x or x == 1)
    return f"{size / scale:.4g} {unit}"


def _milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.3g} ms"


def _features(config: ModelConfig) -> int:
    """f of the config's map, which is traced and not made."""
    d = config.head_size
    features = lambda key, x: as_pair(map_of(config.feature_map, d, key=key))[1](x)
    head = jax.ShapeDtypeStruct((1, 1, d), jnp.float32)
    return jax.eval_shape(features, jax.eval_shape(jax.random.key, 0), head).shape[-1]
