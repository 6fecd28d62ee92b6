"""What a module makes of one token, where `jax.vmap` brings a batch of them: its matrices meet all rows at once.

XLA on a GPU reads a matrix for one row at half of the speed at which it reads it for eight (measured on an H200: a
layer of the paper's 3B model in 78 us for one row, 46 for eight), so there are never fewer.
"""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jaxtyping import Array, Float

FEWEST = {"gpu": 8}


def apply(function: Callable[[Any, Array], Any], module: Any, x: Float[Array, "..."]) -> Any:
    """function(module, rows) of the one row x, without its axis of rows; function keeps rows apart.

    On a GPU without gradients, which the step's kernels lack too.
    """
    fewest = FEWEST.get(jax.default_backend(), 1)
    if fewest == 1:
        return jax.tree.map(lambda y: y[0], function(module, x[None]))
    arrays, static = eqx.partition(module, eqx.is_array)

    @custom_vmap
    def rows(arrays, x):
        count = x.shape[0]
        padding = [(0, max(0, fewest - count)), *((0, 0) for _ in x.shape[1:])]
        out = function(eqx.combine(arrays, static), jnp.pad(x, padding))
        return jax.tree.map(lambda y: y[:count], out)

    @rows.def_vmap
    def rule(size, is_batched, arrays, x):
        arrays_batched, x_batched = is_batched
        if any(jax.tree.leaves(arrays_batched)):  # a module for each row
            axes = (jax.tree.map(lambda batched: 0 if batched else None, arrays_batched), 0 if x_batched else None)
            out = jax.vmap(rows.fun, in_axes=axes, axis_size=size)(arrays, x)
        else:
            x = x if x_batched else jnp.broadcast_to(x, (size, *x.shape))
            out = rows(arrays, x.reshape(-1, *x.shape[2:]))
            out = jax.tree.map(lambda y: y.reshape(size, -1, *y.shape[1:]), out)
        return out, jax.tree.map(lambda _: True, out)

    return jax.tree.map(lambda y: y[0], rows(arrays, x[None]))
