"""Kernels for TPUs, in Pallas's Mosaic TPU dialect: `ops` is what the dispatch calls.

From a call to the chip: `ops` lays out and pads (`plan`), `gradients` ties the kernels to differentiation, `window` and
`residual` compute the branches, `window_backward` and `residual_backward` differentiate them. No time was ever measured
on a TPU: values come from the interpreter, costs from the compiler's schedules.
"""

import jax
from jaxtyping import Array


def present() -> bool:
    """Is the default device a TPU?"""
    return jax.default_backend() == "tpu"


def obstacle(op: str, *arrays: Array) -> str | None:
    """Why these kernels cannot serve a call of an op on such arrays of q, k and v, or None."""
    if op.endswith("_step"):
        return "has no kernel for one token"
    return "takes no float64" if any(x.dtype == "float64" for x in arrays) else None
