"""Kernels for Hopper GPUs (compute capability 9.0), in Pallas's Mosaic GPU dialect: `ops` is what the dispatch calls.

From a call to the GPU: `ops` pads (`arrays`) and plans (`plan`), `gradients` ties the kernels to differentiation. The
kernels: `state_sweep` sums the residual branch's states; `forward` computes both branches (`window_forward` and
`residual_forward`) and their sum; `window_backward`, `residual_query_backward` and `residual_key_backward`
differentiate. `step` and `step_window` take one token. `warpgroup` is what kernels share.
"""

import jax
from jaxtyping import Array

MOST_HEADS = 64  # of a group, in a step: the rows of a tile


def present() -> bool:
    """Is the default device a Hopper GPU?"""
    return jax.default_backend() == "gpu" and getattr(jax.devices()[0], "compute_capability", "") == "9.0"


def obstacle(op: str, *arrays: Array) -> str | None:
    """Why these kernels cannot serve a call of an op on such arrays of q, k and v (and a step's rings), or None."""
    if jax.__version_info__ < (0, 11):
        return f"needs jax 0.11 or newer (Python 3.12 or newer); this is {jax.__version__}"
    if jax.default_backend() == "gpu" and not present():
        return f"needs a Hopper GPU; this is {jax.devices()[0].device_kind}"
    dtypes = [str(x.dtype) for x in arrays]
    if "float16" in dtypes:
        return "takes no float16, in which the states of unbounded feature maps overflow: cast to bfloat16"
    if set(dtypes) != {"bfloat16"}:
        return f"takes q, k and v in bfloat16 alone; got {', '.join(dict.fromkeys(dtypes))}"
    sizes = [x.shape[-1] for x in arrays]
    if max(sizes) > 128:
        return f"takes head sizes up to 128; got {max(sizes)}"
    group = arrays[0].shape[-2] // arrays[1].shape[-2]
    if op.endswith("_step") and group > MOST_HEADS:
        return f"takes up to {MOST_HEADS} query heads for each key/value head; got {group}"
    return None
