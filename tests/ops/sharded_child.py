"""The fused op over a sequence cut over simulated devices, against the whole: prints differences by tensor, as JSON.

Arguments: names of CASES, or of BUGS, each of which is planted and tried on one case.
"""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, PartitionSpec

import pallas
from pallas import sharded
from pallas.numerics import relative_rms

CASES = {  # (window, tokens, devices, segments, states)
    "window inside a piece": (5, 64, 8, None, "none"),
    "window of a piece": (8, 64, 8, "random", "same"),
    "window over several pieces": (19, 64, 8, "random", "different"),
    "segments on every border": (6, 64, 8, "borders", "same"),
    "a segment begins with a halo": (8, 64, 4, "halves", "different"),
    "no window": (0, 40, 4, "random", "same"),
    "no window, ids on the borders": (0, 40, 8, "borders", "different"),
    "window beyond the sequence": (90, 40, 2, "random", "none"),
    "window of all but a token": (39, 40, 8, None, "same"),
    "one device": (7, 24, 1, "random", "same"),
}
H, KV, D, DV = 6, 2, 4, 3  # an odd group
BUGGED = "a segment begins with a halo"
BUGS = {  # what is exchanged in the module, and by what
    "halo one short": ("_with_halo", lambda old: lambda x, halo, axis: old(x, halo, axis).at[0].set(0)),
    "halo from the wrong side": ("_from_left", lambda old: from_right),
    "state a device late": ("_state_before", lambda old: lambda *given: late(old, given)),
    "segments missed at a border": ("_extended", lambda old: lambda *given: uncut(old(*given))),
    "no gradient of the halo": ("_from_left", lambda old: lambda x, *given: old(jax.lax.stop_gradient(x), *given)),
}


def from_right(x, axis_name, hops=1):
    n = jax.lax.axis_size(axis_name)
    return jax.lax.ppermute(x, axis_name, [(i + hops, i) for i in range(n - hops)])


def late(old, given):
    return sharded._from_left(old(*given), given[-1])


def uncut(piece):
    return piece._replace(cut=piece.cut.at[0].set(False))


def arrays(t, states):
    draw = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(draw.normal(size=shape), jnp.float32)
    found = dict(
        q=normal(t, H, D), k=normal(t, KV, D), v=normal(t, KV, DV), q_rla=normal(t, H, D), k_rla=normal(t, KV, D)
    )
    found |= dict(swa_gain=normal(H, DV), rla_gain=normal(H, DV), sink_logits=normal(H))
    del found["sink_logits" if states == "none" else "swa_gain"]  # a norm undoes a sink
    if states != "none":
        found["initial_state"] = normal(KV, 2 * D, DV)
    if states == "different":
        found["segment_state"] = normal(KV, 2 * D, DV)
    return found


def ids_of(kind, t, n):
    if kind is None:
        return None
    if kind == "random":
        return jnp.asarray(np.random.default_rng(1).random(t) < 0.12).cumsum() % 2  # ids come back
    return jnp.arange(t) // {"borders": t // n, "halves": 3 * t // (2 * n)}[kind]


def compared(case):
    window, t, n, kind, states = CASES[case]
    ids, given = ids_of(kind, t, n), arrays(t, states)
    mesh = jax.make_mesh((n,), ("sequence",), axis_types=(AxisType.Auto,), devices=jax.devices()[:n])
    cut = {"q", "k", "v", "q_rla", "k_rla"}
    cotangent = jnp.asarray(np.random.default_rng(2).normal(size=(t, H, DV)), jnp.float32)

    def options(x):
        same = {"segment_state": x["initial_state"]} if states == "same" else {}
        return {"swa_gain": None} | x | same

    def whole(x):
        return pallas.rattention(**options(x), window=window, segment_ids=ids, implementation="reference")

    def pieces(x):
        specs = {name: PartitionSpec("sequence") if name in cut else PartitionSpec() for name in x}
        one = lambda x, ids: sharded.rattention(
            **options(x), window=window, segment_ids=ids, axis_name="sequence", implementation="chunked"
        )
        of_ids = PartitionSpec() if ids is None else PartitionSpec("sequence")
        return jax.shard_map(
            one, mesh=mesh, in_specs=(specs, of_ids), out_specs=PartitionSpec("sequence"), check_vma=False
        )(x, ids)

    found = {}
    for name, function in (("whole", whole), ("pieces", pieces)):
        out, pull_back = jax.vjp(jax.jit(function), given)
        found[name] = {"out": out} | {f"d{key}": x for key, x in pull_back(cotangent)[0].items()}
    return {key: float(relative_rms(found["pieces"][key], x)) for key, x in found["whole"].items()}


def with_bug(name):
    attribute, wrong = BUGS[name]
    right = getattr(sharded, attribute)
    setattr(sharded, attribute, wrong(right))
    try:
        return compared(BUGGED)
    finally:
        setattr(sharded, attribute, right)


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 8)  # before any device is touched
    with jax.default_matmul_precision("highest"):
        print(json.dumps({name: with_bug(name) if name in BUGS else compared(name) for name in sys.argv[1:]}))
