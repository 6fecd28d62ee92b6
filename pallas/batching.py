"""A function of batched arrays, called for one sequence."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap


def batched(function: Callable, *arguments):
    """`function` of arrays with a leading batch axis, called for one sequence; vmap lengthens that axis."""
    mapped = custom_vmap(function)

    @mapped.def_vmap
    def rule(size, is_batched, *arguments):
        whole = lambda x, batched: x if batched else jnp.broadcast_to(x, (size, *x.shape))
        flat = lambda x: x.reshape(size * x.shape[1], *x.shape[2:])
        results = mapped(*jax.tree.map(lambda x, b: flat(whole(x, b)), arguments, tuple(is_batched)))
        split = jax.tree.map(lambda x: x.reshape(size, x.shape[0] // size, *x.shape[1:]), results)
        return split, jax.tree.map(lambda _: True, results)

    results = mapped(*jax.tree.map(lambda x: x[None], arguments))
    return jax.tree.map(lambda x: x[0], results)
