"""What the benchmark times: our ops, and everybody else's, as functions of the same arrays.

A peer that is missing, or that cannot do it, raises; the benchmark then prints why. Nothing falls back.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

import pallas
from pallas.checked import checked
from pallas.feature_map import named, num_features
from pallas.reference import normed_sum

Op = Literal["sliding_window_attention", "residual_linear_attention", "rattention"]
Inputs = dict[str, Array]

READS: dict[Op, tuple[str, ...]] = {  # the inputs of `make_inputs` that each op reads, and gets gradients of
    "sliding_window_attention": ("q", "k", "v"),
    "residual_linear_attention": ("q_rla", "k_rla", "v"),
    "rattention": ("q", "k", "v", "q_rla", "k_rla", "swa_gain", "rla_gain"),
}


@dataclasses.dataclass(frozen=True)
class Problem:
    """Sizes of a batch of sequences. `window` and `feature_map` are RATTENTION's, `wide_window` the plain window's."""

    batch: int
    length: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    window: int
    wide_window: int
    feature_map: str
    dtype: str = "bfloat16"


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table: whose implementation of which op. A window of the length or more is full attention.

    `make` gives a function of `make_inputs`' dictionary, or raises where the implementation is not to be had. With
    `torch` it gives instead the calls to time, one for each set of inputs: `make(backward, num_sets)`.
    """

    op: Op
    window: int
    by: str
    make: Callable[..., Any]
    feature_map: str | None = None
    torch: bool = False


@functools.partial(jax.jit, static_argnums=0)
def make_inputs(problem: Problem, key: Array) -> Inputs:
    """Random normal inputs of every op, and a cotangent of their output; gains are around 1."""
    p = problem
    queries, keys = (p.batch, p.length, p.num_heads, p.head_size), (p.batch, p.length, p.num_kv_heads, p.head_size)
    shapes = {"q": queries, "q_rla": queries, "k": keys, "k_rla": keys, "v": keys, "cotangent": queries}
    subkeys = iter(jax.random.split(key, len(shapes) + 2))
    inputs = {name: jax.random.normal(next(subkeys), shape, jnp.dtype(p.dtype)) for name, shape in shapes.items()}
    gains = {name: 1 + 0.1 * jax.random.normal(next(subkeys), queries[2:]) for name in ("swa_gain", "rla_gain")}
    return inputs | gains


def flops(row: Row, problem: Problem, *, backward: bool) -> float:
    """The products that the definition needs, 2 FLOPs a multiply-add; exponentials, norms and masked pairs are none.

    Window: each query and head reads min(t + 1, W) keys. A pair costs d + dv forward (q.k and p v) and 3 d + 2 dv
    backward (q.k again, since scores are too many to keep, dP, dV, dQ, dK).
    Residual: r = max(t - W, 0) queries have a residual set, of r keys in all. As a recurrence, a read and an update
    of the state are f dv each: h r reads and kv r updates forward, 2 h r + 2 kv r backward (dphi(q), dS; dphi(k), dV).
    What a chunked form adds on top, the block on the window's edge and states computed again, is not useful work.
    """
    p, d = problem, problem.head_size
    total = 0
    if row.op != "residual_linear_attention":
        window = min(row.window, p.length)
        pairs = window * (window + 1) // 2 + (p.length - window) * window
        total += pairs * p.num_heads * (2 * d + (5 * d if backward else 0))
    if row.op != "sliding_window_attention":
        features = num_features(named[row.feature_map or p.feature_map], d)
        residual = max(p.length - row.window, 0)
        total += residual * features * d * (p.num_heads + p.num_kv_heads) * (3 if backward else 1)
    return 2.0 * p.batch * total


def least_bytes(row: Row, inputs: Inputs, *, backward: bool) -> float:
    """Each input read once and each output written once: o, and backward the cotangent and a gradient per input."""
    read = sum(inputs[name].nbytes for name in READS[row.op])
    out = inputs["cotangent"].nbytes
    return float(2 * read + 2 * out if backward else read + out)


def rows(problem: Problem, implementations: Sequence[str]) -> list[Row]:
    """Every implementation and every peer, for one size of problem."""
    p, window, phi = problem, problem.window, problem.feature_map
    swa: Op = "sliding_window_attention"
    rla: Op = "residual_linear_attention"
    jla, fused = "jax-linear-attention", "jax-linear-attention, fused backward"
    linear = functools.partial(jla_residual, feature_map="identity", window=0, cut=False)
    windows = dict.fromkeys((p.length, min(p.wide_window, p.length), window))  # full attention first
    table = [Row(swa, w, "cuDNN", functools.partial(cudnn, p, w)) for w in windows]
    for name in implementations:
        for op in (swa, rla, "rattention"):
            make = functools.partial(ours, op, window, phi, name)
            table.append(Row(op, window, f"ours, {name}", make, None if op == swa else phi))
    table += [
        Row(swa, window, "tokamax", functools.partial(tokamax, window)),
        Row(swa, window, jla, functools.partial(jla_window, window, "ranged")),
        Row(swa, window, fused, functools.partial(jla_window, window, "fused")),
        Row(rla, 0, jla, functools.partial(on_residual, linear), "identity"),
    ]
    for name, cut in (("shifted", False), ("cut", True)):
        residual = functools.partial(jla_residual, feature_map=phi, window=window, cut=cut)
        table += [
            Row(rla, window, f"{jla}, {name}", functools.partial(on_residual, residual), phi),
            Row("rattention", window, f"peers' parts, {name}", functools.partial(parts, residual, window), phi),
        ]
    return [*table, Row(rla, window, "flash-linear-attention", functools.partial(fla, p), phi, torch=True)]


def ours(op: Op, window: int, feature_map: str, implementation: str, block_sizes=None) -> Callable[[Inputs], Array]:
    """Our op, batched."""
    options: dict[str, Any] = dict(window=window, implementation=implementation, block_sizes=block_sizes)
    if op == "sliding_window_attention":
        return lambda x: jax.vmap(functools.partial(pallas.sliding_window_attention, **options))(x["q"], x["k"], x["v"])
    options["feature_map"] = named[feature_map]
    if op == "residual_linear_attention":
        one: Any = functools.partial(pallas.residual_linear_attention, **options)
        return lambda x: jax.vmap(one)(x["q_rla"], x["k_rla"], x["v"])

    def both(x):
        def one(q, k, v, q_rla, k_rla) -> Any:
            gains = {"swa_gain": x["swa_gain"], "rla_gain": x["rla_gain"]}
            return pallas.rattention(q, k, v, q_rla=q_rla, k_rla=k_rla, **gains, **options)

        return jax.vmap(one)(*(x[name] for name in READS["rattention"][:5]))

    return both


def cudnn(problem: Problem, window: int) -> Callable[[Inputs], Array]:
    """Causal attention by cuDNN, through `jax.nn`."""
    local = None if window >= problem.length else (window - 1, 0)
    attend = functools.partial(jax.nn.dot_product_attention, is_causal=True, implementation="cudnn")
    return lambda x: attend(x["q"], x["k"], x["v"], local_window_size=local)


def tokamax(window: int) -> Callable[[Inputs], Array]:
    """Tokamax's Hopper attention with a left window."""
    import tokamax  # pyright: ignore[reportMissingImports]

    attend = functools.partial(tokamax.dot_product_attention, is_causal=True, implementation="mosaic")
    return lambda x: attend(x["q"], x["k"], x["v"], local_window_size=(window - 1, 0))


def jla_window(window: int, backward: str) -> Callable[[Inputs], Array]:
    """The sliding-window attention of jax-linear-attention, by its own kernels and not by the cuDNN that it prefers."""
    from jla.ops.mosaic_gpu.attention import flash_attention  # pyright: ignore[reportMissingImports]

    return lambda x: flash_attention(x["q"], x["k"], x["v"], sliding_window=window, backward=backward)


@checked
def jla_residual(
    q: Float[Array, "batch t h d"],
    k: Float[Array, "batch t kv d"],
    v: Float[Array, "batch t kv dv"],
    *,
    feature_map: str,
    window: int,
    cut: bool,
) -> Float[Array, "batch t h dv"]:
    """Residual linear attention from the causal linear attention of jax-linear-attention, which knows neither maps,
    windows nor grouped queries.

    Features go in pieces of d channels, a call each, and their outputs add up. Keys and values are repeated for every
    query head, and shifted right by `window` tokens after phi: the first are 0, and their v is 0 and adds nothing.
    With `cut` no zeros are computed with: the first `window` queries, which read nothing, are left out instead.
    """
    from jla import ops  # pyright: ignore[reportMissingImports]

    (t, h, d), kv, dtype = q.shape[1:], k.shape[2], v.dtype
    window = min(window, t)
    phi = jax.checkpoint(lambda x: named[feature_map](x).astype(dtype))  # computing it twice is cheaper than keeping it
    shifted = lambda x: jnp.pad(x, ((0, 0), (window, 0), (0, 0), (0, 0)))
    repeat = lambda x: jnp.repeat(x, h // kv, axis=2)

    if cut and window == t:
        return jnp.zeros((*q.shape[:3], v.shape[3]), dtype)
    features_q, features_k = phi(q[:, window:] if cut else q), phi(k[:, : t - window])
    if not cut:
        features_k, v = shifted(features_k), shifted(v[:, : t - window])
    else:
        v = v[:, : t - window]
    values = repeat(v)
    no_decay = jnp.zeros(values.shape[:3], jnp.float32)
    out = jnp.zeros(values.shape, jnp.float32)
    for first in range(0, features_q.shape[-1], d):
        piece_q, piece_k = features_q[..., first : first + d], repeat(features_k[..., first : first + d])
        kernel = dict(g=no_decay, scale=1.0, impl="mosaic_gpu")
        out = out + ops.linear_attention("simple_gla", piece_q, piece_k, values, **kernel)[0].astype(jnp.float32)
    out = out.astype(dtype)
    return shifted(out) if cut else out


def on_residual(residual: Callable[..., Array]) -> Callable[[Inputs], Array]:
    """`jla_residual` as a function of the inputs."""
    import jla.ops  # noqa: F401 (missing: said now) # pyright: ignore[reportMissingImports]

    return lambda x: residual(x["q_rla"], x["k_rla"], x["v"])


def parts(residual: Callable[..., Array], window: int) -> Callable[[Inputs], Array]:
    """RATTENTION as one can put it together from the fastest peers' ops: their two branches, XLA's norms."""
    swa = jla_window(window, "ranged")
    float32 = lambda x: x.astype(jnp.float32)

    def both(x):
        o_swa, o_rla = swa(x), residual(x["q_rla"], x["k_rla"], x["v"])
        norm = lambda o_swa, o_rla: normed_sum(float32(o_swa), float32(o_rla), x["swa_gain"], x["rla_gain"], 1e-6)
        return jax.vmap(norm)(o_swa, o_rla).astype(x["v"].dtype)

    return both


def fla(problem: Problem, backward: bool, num_sets: int) -> list[Callable[[], object]]:
    """Residual linear attention from flash-linear-attention's chunked op, in PyTorch: one call for all features, keys
    and values repeated and shifted as in `jla_residual`."""
    import torch  # pyright: ignore[reportMissingImports]
    from fla.ops.simple_gla import chunk_simple_gla  # pyright: ignore[reportMissingImports]

    p = problem
    if p.feature_map not in ("softmax", "relu", "identity"):
        raise NotImplementedError(f"no {p.feature_map} map in PyTorch here")
    if not torch.cuda.is_available():
        raise RuntimeError("PyTorch sees no GPU")
    options: dict[str, Any] = dict(device="cuda", dtype=getattr(torch, p.dtype))

    def phi(x):
        if p.feature_map == "identity":
            return x
        one = torch.relu if p.feature_map == "relu" else functools.partial(torch.softmax, dim=-1)
        return torch.cat([one(x.float()), one(-x.float())], dim=-1).to(x.dtype)

    window = min(p.window, p.length)

    def shifted(x):  # to the right by `window` tokens, zeros first; then a copy for each query head
        x = torch.nn.functional.pad(x, (0, 0, 0, 0, window, -window))
        return x.repeat_interleave(p.num_heads // p.num_kv_heads, dim=2)

    def residual(q, k, v):
        return chunk_simple_gla(phi(q), shifted(phi(k)), shifted(v), scale=1.0)[0]

    def one_set():
        heads = (p.num_heads, p.num_kv_heads, p.num_kv_heads)
        x = [torch.randn(p.batch, p.length, n, p.head_size, requires_grad=backward, **options) for n in heads]
        cotangent = torch.randn(p.batch, p.length, p.num_heads, p.head_size, **options)
        if backward:
            return lambda: torch.autograd.grad(residual(*x), x, cotangent)
        return lambda: residual(*x)

    return [one_set() for _ in range(num_sets)]
