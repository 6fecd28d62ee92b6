"""Calls of the ops as they are held to the definition: what a call is made of, its numbers, its program, its line.

`python -m pallas check` draws them at random; tests/ write them down. A case is a frozen value and one line of text,
and either gives the other back, so that a failure is replayed from what was printed.
"""

import contextlib
import dataclasses
import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import pallas
from pallas import feature_map
from pallas.block_sizes import BlockSizes
from pallas.numerics import accumulation_dtype
from pallas.step_cache import StepCache, in_slots

STATES = ("initial_state", "segment_state")
ARRAYS = {
    "sliding_window_attention": ("q", "k", "v", "sink_logits"),
    "residual_linear_attention": ("q", "k", "v", "initial_state", "segment_state"),
    "rattention": ("q", "k", "v", "sink_logits", "swa_gain", "rla_gain", "q_rla", "k_rla", *STATES),
}
SWA, RLA, BOTH = ARRAYS
OF_HEADS = ("q", "k", "v", "q_rla", "k_rla")
WHOLE = ("sink_logits", "swa_gain", "rla_gain", "weight_q", "weight_k")  # not one for each sequence of a batch
PARAMETERS = (*STATES, *WHOLE)  # float32 where activations are bfloat16
REMEDY = "give a line as `check` prints it"
LEARNED = ("learned", "pair")  # maps with parameters: one for queries and keys, or one for each


@dataclasses.dataclass(frozen=True)
class Case:
    """One call of one op and its numbers.

    sizes: (num_heads, num_kv_heads, head_size, value_size). segments: the lengths of segments, (): no ids; of a batch,
    a tuple for each sequence. states: those that are passed. static: other keywords of the op. map: of
    `feature_map.named`, or of LEARNED. shared: the residual branch reads the window's q and k. sinks: the window has
    `sink_logits`; swa_norm: it has a norm and a gain, if it is not alone. Numbers are size * (standard normal + mean);
    size_qk stands for size in what the window's softmax reads, size_rla in what maps read.
    final: the final state has a cotangent, too; then most of the keys' gradients come from it, not from the kernels.
    steps: the t tokens are taken one by one by the op's step, after a cache of the keys before them; the definition
    is the whole sequence's, without gradients or segments.
    """

    op: str
    t: int
    window: int
    s: int | None = None
    sizes: tuple[int, int, int, int] = (2, 1, 8, 8)
    segments: tuple = ()
    states: tuple[str, ...] = STATES
    static: tuple = ()
    mean: float = 0.5
    size: float = 1.0
    size_qk: float = 1.0
    size_rla: float = 1.0
    map: str = "softmax"
    dtype: str = "float32"
    batch: int = 0
    backward: bool = True
    shared: bool = False
    sinks: bool = False
    swa_norm: bool = True
    final: bool = True
    steps: bool = False
    seed: int = 0

    def __str__(self):
        heads = "h{}kv{}d{}dv{}".format(*self.sizes)
        return f"{self.op}-t{self.t}-w{self.window}-s{self.num_keys}-{len(self.segments)}seg-{heads}"

    @property
    def num_keys(self) -> int:
        return self.t if self.s is None else self.s

    @property
    def scale(self) -> float:
        """Of the window's logits."""
        return dict(self.static).get("scale", self.sizes[2] ** -0.5)

    @property
    def program(self) -> "Case":
        """The case without the numbers that a compiled program reads: cases equal in this share their programs."""
        whole = (self.num_keys,)
        marker = () if not self.segments else (whole,) * self.batch if self.batch else whole
        defaults = dict(mean=0.5, size=1.0, size_qk=1.0, size_rla=1.0, final=True, seed=0)
        return dataclasses.replace(self, segments=marker, **defaults)

    @property
    def names(self) -> tuple[str, ...]:
        """Of its array arguments."""
        read_by_both = {"q_rla", "k_rla"} if self.shared and self.op == BOTH else set()
        skipped = {name for name in STATES if name not in self.states} | read_by_both
        skipped |= {name for name, has in (("sink_logits", self.sinks), ("swa_gain", self.swa_norm)) if not has}
        weights = {"learned": ("weight_q",), "pair": ("weight_q", "weight_k")}.get(self.map, ())
        return (*(x for x in ARRAYS[self.op] if x not in skipped), *(weights if self.op != SWA else ()))

    @property
    def num_features(self) -> int:
        d = self.sizes[2]
        phi = dict(self.static).get("feature_map")
        if phi is None and self.map in LEARNED:
            return 2 * d if self.map == "learned" else d
        return feature_map.num_features(feature_map.named[self.map] if phi is None else phi, d)

    def shape(self, name: str) -> tuple[int, ...]:
        """Of an argument or result of one sequence."""
        (h, kv, d, dv), f = self.sizes, self.num_features
        shapes = {
            "q": (self.t, h, d),
            "k": (self.num_keys, kv, d),
            "v": (self.num_keys, kv, dv),
            "state": (kv, f, dv),
            "gain": (h, dv),
            "sink_logits": (h,),
            "output": (self.t, h, dv),
        }
        if name.startswith("weight"):
            return (d, d)
        return shapes["state" if "state" in name else "gain" if "gain" in name else name.removesuffix("_rla")]

    def arrays(self, dtype: str | None = None, seed: int | None = None) -> dict[str, np.ndarray]:
        """Rounded to the dtype, so that every precision is asked about the same numbers."""
        dtype, drawn = dtype or self.dtype, {}
        generator = np.random.default_rng(self.seed if seed is None else seed)
        for name in self.names:
            shape = self.shape(name)
            shape = (self.batch, *shape) if self.batch and name not in WHOLE else shape
            numbers = generator.standard_normal(shape)
            if name.startswith("weight"):
                numbers = numbers / shape[0] ** 0.5
            elif name.endswith("gain"):
                numbers = numbers + self.mean
            else:
                numbers = self.size_of(name) * (numbers + self.mean)
            drawn[name] = numbers.astype(jnp.float32 if name in PARAMETERS and dtype != "float64" else dtype)
        return drawn

    def size_of(self, name: str) -> float:
        if name == "sink_logits":
            return 3.0  # as likely as a hundred keys, or as one
        if name not in ("q", "k", "q_rla", "k_rla"):
            return self.size
        return self.size_rla if self.op == RLA or name.endswith("rla") else self.size_qk

    def cotangents(self) -> dict[str, np.ndarray]:
        """Of what the op returns, float64, to be rounded to each result's dtype."""
        generator = np.random.default_rng([self.seed, 1])
        names = ("output",) if self.op == SWA else ("output", "final_state")
        batch = (self.batch,) if self.batch else ()
        draw = lambda name: generator.standard_normal((*batch, *self.shape(name))).astype(jnp.bfloat16)
        drawn = {name: draw(name).astype(np.float64) for name in names}
        return drawn if self.final else drawn | {name: 0 * drawn[name] for name in names[1:]}

    def ids(self) -> np.ndarray | None:
        """int32 [s], or [batch, s]."""
        if not self.segments:
            return None
        count = lambda lengths: np.repeat(np.arange(len(lengths)), lengths).astype(np.int32)
        return np.stack([count(x) for x in self.segments]) if self.batch else count(self.segments)


def precision(dtype: str, on: str | None):
    """float64 switched on where it is asked for, float32 products in float32; on a "cpu", or where JAX would run."""
    stack = contextlib.ExitStack()
    stack.enter_context(jax.default_matmul_precision("highest"))
    if on is not None:
        stack.enter_context(jax.default_device(jax.local_devices(backend=on)[0]))
    if dtype == "float64":
        stack.enter_context(jax.enable_x64(True))
    return stack


def options_of_compiler(on: str | None) -> dict | None:
    """On a CPU, none of the optimisations: compiling is most of the time."""
    return {"xla_backend_optimization_level": 0} if "cpu" in (on, jax.default_backend()) else None


def call(case: Case, arrays: dict, ids, implementation: str | None, **static) -> dict:
    """The op's results by name, for one sequence."""
    keywords: dict[str, Any] = dict(window=case.window, implementation=implementation) | dict(case.static) | static
    arrays = dict(arrays)
    if case.op == BOTH and not case.swa_norm:
        keywords["swa_gain"] = None
    if case.op != SWA:
        keywords["return_final_state"] = True
        weights = [arrays.pop(name) for name in ("weight_q", "weight_k") if name in arrays]
        keywords = {"feature_map": _map(case.map, weights)} | keywords
    if case.steps and implementation != "reference":
        return _by_steps(case, keywords | arrays)
    result = getattr(pallas, case.op)(**keywords | arrays, segment_ids=ids)
    return {"output": result} if case.op == SWA else {"output": result[0], "final_state": result[1]}


def _by_steps(case: Case, given: dict) -> dict:
    """The results of the last t tokens, one by one after a cache of the keys before, whose free slots hold NaN."""
    before, window = case.num_keys - case.t, given.pop("window")
    rows = {name: given.pop(name) for name in ("q", "k", "v", "q_rla", "k_rla") if name in given}
    initial = given.pop("initial_state", None)
    given.pop("return_final_state", None)
    state = None
    if case.op == BOTH:
        keys = rows.get("k_rla", rows["k"])
        start = jnp.zeros(case.shape("state"), accumulation_dtype(*rows.values())) if initial is None else initial
        phi = feature_map.as_pair(given["feature_map"])[1]
        older = [x[: max(before - window, 0)].astype(start.dtype) for x in (keys, rows["v"])]
        state = start + jnp.einsum("skf,skv->kfv", phi(older[0]).astype(start.dtype), older[1], precision="highest")

    def ring(name: str):
        held = rows[name][max(before - window, 0) : before]
        free = jnp.full((window - held.shape[0], *held.shape[1:]), jnp.nan, held.dtype)
        return in_slots(jnp.concatenate([free, held]), jnp.asarray(before, jnp.int32))

    keys_rla = ring("k_rla") if "k_rla" in rows else None
    cache, found = StepCache(ring("k"), keys_rla, ring("v"), state, jnp.asarray(before, jnp.int32)), []
    step = pallas.rattention_step if case.op == BOTH else pallas.sliding_window_attention_step
    for i in range(case.t):
        token = {name: x[i if name.startswith("q") else before + i] for name, x in rows.items()}
        out, cache = step(**token, cache=cache, **given)
        found.append(out)
    return {"output": jnp.stack(found)} | ({"final_state": cache.state} if case.op == BOTH else {})


def _map(name: str, weights: list):
    if name == "learned":
        return lambda x: feature_map.softmax(x @ weights[0].astype(x.dtype))
    if name == "pair":
        return tuple(lambda x, weight=weight: jax.nn.softplus(x @ weight.astype(x.dtype)) for weight in weights)
    return feature_map.named[name]


def compiled(case: Case, dtype: str, implementation: str | None, on: str | None = None):
    """run(case): results and gradients in NumPy, by name, for any case of the same `program`.

    The compiled program gets a token's heads in one axis, as projections make them: compilers fuse what cuts them
    apart with what follows, and may get that wrong.
    """
    case = case.program

    def results(arrays, ids):
        def op(arrays, ids):
            return call(case, {name: x.reshape(case.shape(name)) for name, x in arrays.items()}, ids, implementation)

        if not case.batch:
            return op(arrays, ids)
        axes = {name: None if name in WHOLE else 0 for name in arrays}
        return jax.vmap(op, in_axes=(axes, None if ids is None else 0))(arrays, ids)

    @functools.partial(jax.jit, compiler_options=options_of_compiler(on))
    def pulled_back(arrays, ids, cotangents):
        if not case.backward:
            return results(arrays, ids)
        found, pull_back = jax.vjp(lambda arrays: results(arrays, ids), arrays)
        (gradients,) = pull_back({name: cotangents[name].astype(x.dtype) for name, x in found.items()})
        return found | {f"d {name}": gradient for name, gradient in gradients.items()}

    def run(case: Case):
        with precision(dtype, on):
            drawn = case.arrays(dtype)
            if dtype == "float64":  # the same numbers as in the narrower dtype
                drawn = {name: x.astype(np.float64) for name, x in case.arrays(case.dtype).items()}
            flat = lambda name, x: x.reshape(*x.shape[:-2], -1) if name in OF_HEADS else x
            arrays = {name: jnp.asarray(flat(name, x)) for name, x in drawn.items()}
            ids = None if not case.segments else jnp.asarray(case.ids())
            cotangents = {name: jnp.asarray(x) for name, x in case.cotangents().items()}
            found = {name: np.asarray(x) for name, x in pulled_back(arrays, ids, cotangents).items()}
            return {name: x.reshape(drawn[name[2:]].shape) if name[:2] == "d " else x for name, x in found.items()}

    return run


def to_line(case: Case) -> str:
    """One line of words, `parse` of which is the case; what has its default is left out."""
    words = []
    for field in dataclasses.fields(Case):
        value = getattr(case, field.name)
        if value == field.default:
            continue
        if field.name == "static":
            words += [f"{name}={_word(x)}" for name, x in value]
        else:
            words.append(f"{field.name}={_word(value)}")
    return " ".join(words)


def _word(value) -> str:
    if isinstance(value, BlockSizes):
        return f"{value.kernel_chunk}x{value.chunks_per_state}"
    if isinstance(value, tuple):
        if value and isinstance(value[0], tuple):
            return "/".join(map(_word, value))
        repeated = [(str(x), len(list(same))) for x, same in itertools.groupby(value)]
        return ",".join(f"{x}x{n}" if n > 4 else ",".join([x] * n) for x, n in repeated) or "none"
    return str(int(value)) if isinstance(value, bool) else str(value)


def parse(line: str) -> Case:
    """The case of a line that `to_line` made.

    Raises:
      ValueError: for a line of another kind, which is named.
    """
    kinds = {field.name: field.type for field in dataclasses.fields(Case)}
    found: dict[str, Any] = {}
    static = []
    for word in line.split():
        name, _, text = word.partition("=")
        try:
            if name == "block_sizes":
                chunk, per_state = map(int, text.split("x"))
                static.append((name, BlockSizes(kernel_chunk=chunk, chunks_per_state=per_state)))
            elif name in ("scale", "eps"):
                static.append((name, float(text)))
            elif name == "states":
                found[name] = () if text == "none" else tuple(text.split(","))
            elif name in ("sizes", "segments"):
                rows = [tuple(_numbers(row)) for row in text.split("/")]
                found[name] = tuple(rows) if "/" in text else rows[0]
            elif name in kinds:
                kind = {"bool": lambda x: bool(int(x)), "float": float, "str": str}.get(str(_name(kinds[name])), int)
                found[name] = kind(text)
            else:
                raise ValueError("no field of a case")
        except ValueError as error:
            raise ValueError(f"check: {word!r} is no word of a case: {error}; {REMEDY}") from error
    try:
        case = Case(**found, static=tuple(static))
    except TypeError as error:
        raise ValueError(f"check: {line!r} is no case: {error}; {REMEDY}") from error
    if case.batch == 1 and case.segments and not isinstance(case.segments[0], tuple):
        case = dataclasses.replace(case, segments=(case.segments,))
    return case


def _numbers(text: str):
    """Of "3,1x4": 3, 1, 1, 1, 1."""
    for word in text.split(","):
        number, _, count = word.partition("x")
        yield from [int(number)] * int(count or 1)


def _name(kind) -> str:
    return getattr(kind, "__name__", str(kind))
