"""Random calls from the whole contract, and simpler ones than a call.

A number, the seed, draws a program: what is compiled. Each factor goes through all its options in a shuffled order
before any comes again, so that a few dozen seeds meet them all. A program then serves many draws of numbers, segments
and means.
"""

import dataclasses
import zlib
from collections.abc import Iterator

import numpy as np

from pallas import feature_map
from pallas.block_sizes import BlockSizes
from pallas.tools.cases import BOTH, LEARNED, RLA, STATES, SWA, Case

LONGEST = {"chunked": 1200, "tpu": 300}  # tokens of an interpreted call
LONGEST_OF_OTHERS = 200
LONGEST_ON_DEVICE = 4096
MOST_PAIRS = 1.2e7  # of a query head and a key that the definition forms, in all
DTYPES = {"tpu": ("bfloat16", "float32"), "chunked": ("float32", "bfloat16", "float64")}  # of others bfloat16
OPS = (RLA, BOTH, SWA, BOTH, RLA)
MAPS = (*feature_map.named, *LEARNED)
LENGTHS = (1, 2, 63, 64, 65, 127, 128, 129, 150, 191, 200, 256, 300, 500, 700, 1000, 1500, 2048, 3000, 4096)
MORE_KEYS = (0, 0, 0, 1, 63, 64, 130, 1000)
WINDOWS = (0, 1, 2, 63, 64, 65, 100, 128, 129, 512, 1000, "t - 1", "t", "t + 1", "s", "2 s", "any", "any")
KV, GROUPS = (1, 2, 1, 3), (1, 2, 3, 4, 5, 8)
HEAD_SIZES = (8, 33, 64, 64, 64, 100, 128, 128, 128, 127)
SEGMENTS = ("one", "few", "few", "many", "one a token", "at tiles")
MEANS, SIZES = (-1.0, 0.0, 0.5, 1.0), (0.01, 0.1, 1.0, 1.0, 3.0, 30.0)
# q and k of less than 0.1 make the window's softmax so flat that its weights, rounded for the product with the values,
# err alike, which the gradient of its queries does not forgive (LOG.md, 2026-11-28).
# What maps read: below these a map that is not 0 at 0 is flat, and what its gradient is made of are differences that
# features in bfloat16 do not hold; above them softmax keeps nothing but its largest channel (LOG.md, 2026-11-27).
SIZES_OF_MAPS: dict[str, tuple[float, ...]] = dict.fromkeys(("softmax", "learned"), (0.3, 1.0, 1.0, 3.0, 10.0))
SIZES_OF_MAPS |= dict.fromkeys(("exp", "elu_plus_one", "pair"), (1.0, 1.0, 3.0, 30.0))
SIZES_OF_MAPS["taylor"] = (0.01, 0.1, 0.3, 1.0)  # above, 1 + x + x^2/2 is a small difference of large products


def dtypes_of(implementation: str) -> tuple[str, ...]:
    """The dtypes of q, k and v that it is held in."""
    return DTYPES.get(implementation, ("bfloat16",))


def draw(seed: int, implementation: str, longest: int) -> Case:
    """What is compiled for a seed; its numbers are those of `redraw(draw(...), 0)`."""
    generator = np.random.default_rng([seed, 7])

    def pick(name: str, options):
        round_, place = divmod(seed, len(options))
        order = np.random.default_rng([round_, zlib.crc32(name.encode())]).permutation(len(options))
        return options[order[place]]

    op, map_name = pick("op", OPS), pick("map", MAPS)
    t = pick("t", [length for length in LENGTHS if length <= longest])
    more = min(pick("more keys", MORE_KEYS), longest // 2)
    s = t + more
    window = pick("window", WINDOWS)
    named = {"t - 1": t - 1, "t": t, "t + 1": t + 1, "s": s, "2 s": 2 * s, "any": int(generator.integers(0, s + 2))}
    window = named[window] if isinstance(window, str) else window
    kv, group, d = pick("kv", KV), pick("group", GROUPS), pick("d", HEAD_SIZES)
    while t * s * kv * group > MOST_PAIRS and kv * group > 1:
        kv, group = (1, group) if kv > 1 else (1, max(group - 2, 1))
    if map_name == "taylor" and op != SWA:
        d = (4, 8, 16)[seed % 3]
    dv = pick("dv", ("d", "d", 1, 40, 64, 128))
    dv = d if dv == "d" else dv
    dv = 33 if dv < 8 and op == BOTH else dv  # few channels may all but cancel, which a norm enlarges
    dv = max(dv, 5) if op == RLA else dv  # or, of a single one, in every feature at once
    batch = pick("batch", (0, 0, 0, 2, 3)) if t * s * kv * group < MOST_PAIRS / 4 else 0
    states = pick("states", ((), STATES, ("initial_state",), ("segment_state",), STATES)) if op != SWA else ()
    static: list = []
    shared = op == BOTH and pick("shared", (False, False, True))
    sinks = op != RLA and pick("sinks", (False, True))
    size_rla = pick("size_rla", SIZES_OF_MAPS.get(map_name, SIZES))
    size_qk = size_rla if shared else pick("size_qk", SIZES[1:])
    if shared:
        size_qk = size_rla = max(size_rla, SIZES[1])
    scale = pick("scale", (None, None, None, 0.5, -0.2))
    if size_qk > 3:  # logits of thousands, whose rounding alone would decide which key is seen
        scale = d**-0.5 / size_qk**2
    if op != RLA and scale is not None:
        static.append(("scale", scale))
    if op == BOTH and pick("eps", (False, False, True)):
        static.append(("eps", 0.01))
    blocks = pick("blocks", (None,) * 6 + ((64, 1), (64, 2), (64, 3), (128, 1), (128, 2)))
    if implementation == "gpu" and blocks is not None:
        static.append(("block_sizes", BlockSizes(kernel_chunk=blocks[0], chunks_per_state=blocks[1])))
    segments = _of_batch((s,), batch) if pick("segmented", (False, True)) else ()
    steps = implementation != "tpu" and op != RLA and pick("steps", (False, False, True))
    if steps:  # a few tokens, after as many keys as they would have been
        t = min(t, 1 + seed % 3)
        segments, states = (), tuple(name for name in states if name == "initial_state")
        static = [x for x in static if x[0] != "block_sizes"]
        window = max(int(window), 1) if op == SWA else window
    return Case(
        op,
        t,
        int(window),
        s if s > t else None,
        (kv * group, kv, d, dv),
        segments,
        states,
        tuple(static),
        size=pick("size", SIZES),
        size_qk=size_qk if op != RLA else 1.0,
        size_rla=size_rla if op != SWA else 1.0,
        map=map_name if op != SWA else "softmax",
        dtype=pick("dtype", dtypes_of(implementation)),
        batch=batch,
        backward=pick("backward", (True, True, True, False)) and not steps,
        shared=shared,
        sinks=sinks,
        swa_norm=op != BOTH or pick("swa_norm", (True, False)),
        steps=steps,
        seed=seed,
    )


def redraw(case: Case, number: int) -> Case:
    """The same program with other numbers, in other segments."""
    generator = np.random.default_rng([case.seed, number])
    pick = lambda options: options[generator.integers(len(options))]
    segments = case.segments
    if segments:
        rows = [_lengths(case.num_keys, pick(SEGMENTS), generator) for _ in range(max(case.batch, 1))]
        segments = tuple(rows) if case.batch else rows[0]
    seed = int(generator.integers(2**31))
    return dataclasses.replace(case, segments=segments, mean=pick(MEANS), final=pick((False, False, True)), seed=seed)


def _lengths(s: int, kind: str, generator) -> tuple[int, ...]:
    """The lengths of segments of s tokens."""
    if kind == "one a token":
        return (1,) * s
    most = {"one": 0, "few": 4, "many": 40, "at tiles": 6}[kind]
    cuts = generator.integers(1, max(s, 2), int(generator.integers(min(most, 1), most + 1)))
    if kind == "at tiles":  # where blocks begin, or one token off
        cuts = cuts // 64 * 64 + generator.integers(-1, 2, cuts.size)
    cuts = np.unique(cuts[(cuts > 0) & (cuts < s)])
    return tuple(int(x) for x in np.diff([0, *cuts, s]))


def _of_batch(lengths: tuple[int, ...], batch: int) -> tuple:
    return (lengths,) * batch if batch else lengths


def options(case: Case) -> dict[str, object]:
    """What the case met of what can be chosen, by factor: for counting."""
    h, kv, d, dv = case.sizes
    kinds = {"none": not case.segments, "one a token": case.segments in ((1,) * case.num_keys, ((1,) * case.num_keys,))}
    rows = case.segments if case.batch else (case.segments,)
    several = sum(len(row) for row in rows) > len(rows)
    segments = next((name for name, met in kinds.items() if met), "several" if several else "one")
    return {
        "op": case.op,
        "map": case.map if case.op != SWA else "-",
        "window": "0"
        if not case.window
        else "1"
        if case.window == 1
        else "s or more"
        if case.window >= case.num_keys
        else "inside",
        "more keys": case.num_keys > case.t,
        "group": "odd" if (h // kv) % 2 else "even",
        "kv": kv,
        "d": d,
        "dv": "d" if dv == d else "other",
        "segments": segments,
        "states": "+".join(case.states) or "none",
        "batch": case.batch,
        "backward": case.backward,
        "shared": case.shared,
        "sinks": case.sinks,
        "swa_norm": case.swa_norm,
        "steps": case.steps,
        "final": case.final,
        "mean": case.mean,
        "size": case.size,
        "size_qk": case.size_qk,
        "size_rla": case.size_rla,
        "dtype": case.dtype,
    }


def simpler(case: Case) -> Iterator[Case]:
    """Calls with less in them, those first that leave the least to compute."""
    change = lambda **changes: _fitted(dataclasses.replace(case, **changes))
    h, kv, d, dv = case.sizes
    if case.batch:
        yield change(batch=0, segments=case.segments[0] if case.segments else ())
        yield change(batch=0, segments=case.segments[-1] if case.segments else ())
    for heads in ((1, 1), (h // kv, 1), (2 * kv, kv), (kv, kv), (h - kv, kv)):
        if 0 < heads[0] <= h and heads[1] <= kv:
            yield change(sizes=(*heads, d, dv))
    if case.segments and not case.batch:
        yield change(segments=())
        yield change(segments=(case.num_keys,))
        for part in (case.segments[: len(case.segments) // 2], case.segments[len(case.segments) // 2 :]):
            if 0 < len(part) < len(case.segments):
                yield change(segments=part)
    yield change(backward=False)
    yield change(final=False)
    yield change(states=())
    for name in case.states[1:]:
        yield change(states=(name,))
    yield change(shared=False)
    yield change(sinks=False)
    yield change(swa_norm=True)
    for i in range(len(case.static)):
        if case.static[i][0] == "scale" and case.size_qk > 1:
            continue
        yield change(static=case.static[:i] + case.static[i + 1 :])
    for name in ("softmax", "relu"):
        if case.op != SWA and case.map not in ("softmax", name):
            yield change(map=name)
    without = lambda *names: tuple(x for x in case.static if x[0] not in names)
    if case.steps:
        yield change(steps=False)
    if case.op == BOTH and not case.steps:
        yield change(op=RLA, shared=False, sinks=False, swa_norm=True, static=without("scale", "eps"))
        yield change(op=SWA, shared=False, swa_norm=True, static=without("eps"), states=(), map="softmax")
    yield change(mean=0.0)
    yield change(size=1.0)
    yield change(size_qk=1.0, static=without("scale"))
    yield change(size_rla=1.0)
    for size in (8, 64):
        if d > size:
            yield change(sizes=(h, kv, size, min(dv, size)))
    yield change(sizes=(h, kv, d, d))
    if case.s is not None:
        yield change(s=None)
        yield change(s=case.t + (case.s - case.t) // 2)
    extra = case.num_keys - case.t
    for t in (case.t // 2, case.t * 3 // 4, case.t - 64, case.t - 8, case.t - 1):
        if 0 < t < case.t:
            yield change(t=t, s=t + extra if extra else None)
    for window in (1, 64, case.window // 2, case.window - 1):
        if 0 < window < case.window:
            yield change(window=window)


def _fitted(case: Case) -> Case:
    """Segments cut or lengthened to the keys there are."""
    if not case.segments:
        return case
    rows = []
    for row in case.segments if case.batch else (case.segments,):
        ends = np.minimum(np.cumsum(row), case.num_keys)
        lengths = [int(x) for x in np.diff([0, *ends]) if x > 0]
        lengths[-1] += case.num_keys - sum(lengths)
        rows.append(tuple(lengths))
    return dataclasses.replace(case, segments=tuple(rows) if case.batch else rows[0])
