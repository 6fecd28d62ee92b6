"""The arrays of a call: what is differentiated, and where segments start. The kernels' own are in the kernels' files.

All are pytrees, in which None stands for an array that a call does without. The same classes hold arrays outside
a kernel, the kernel's refs inside it, and (for results) shapes: hence fields of any type, with shapes in comments.
"""

import dataclasses
from typing import Any

import jax


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Inputs:
    """What gradients are taken of, padded; also those gradients. Fields are in the order of the kernel's operands.

    Lengths t and s are multiples of a tile, d is the head size of the kernels, 64 or 128, for keys and values alike.
    """

    features_k: Any = None  # [s, kv, f] float32: phi(k_rla), of a feature map that XLA computes, not the kernels
    features_q: Any = None  # [t, h, f] float32: phi(q_rla), likewise
    k: Any = None  # [s, kv, d]
    k_rla: Any = None  # [s, kv, d], of a feature map that the kernels compute
    q: Any = None  # [t, h, d]
    q_rla: Any = None  # [t, h, d], likewise
    rla_gain: Any = None  # [h, d] float32
    sink_logits: Any = None  # [h] float32
    start_states: Any = None  # [n, kv, d, f] float32, transposed: initial_state and, if n is 2, segment_state
    swa_gain: Any = None  # [h, d] float32
    v: Any = None  # [s, kv, d]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Segments:
    """Of packed sequences; all None for a whole one. A factor of 0 forgets what belongs to another segment, 1 keeps it.

    Intervals are the sweep's (state_sweep.py): the keys between two saved states.
    """

    start: Any = None  # [t] int32: position of the first key of each query's segment
    key_keep: Any = None  # [s] float32: is a key of the segment in which its interval ends?
    query_keep: Any = None  # [t] float32: is the state that a query reads of the query's segment?
    carry_keep: Any = None  # [intervals] float32: does the segment in which an interval ends begin before the interval?
