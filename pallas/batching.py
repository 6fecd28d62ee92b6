"""A function of batched arrays, called for one sequence."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap


def batched(function: Callable, *arguments, one_of: Callable = lambda path: False):
    """`function` of arrays with a leading batch axis, called for one sequence; vmap lengthens that axis.

    one_of(path): may this array keep a batch axis of 1 if no vmap maps it? Others are broadcast.
    """
    mapped = custom_vmap(function)

    @mapped.def_vmap
    def rule(size, is_batched, *arguments):
        leaves = zip(jax.tree.leaves(arguments), jax.tree.leaves(tuple(is_batched)), strict=True)
        batch = max(x.shape[int(batched)] for x, batched in leaves)

        def flat(path, x, batched):
            if not batched and x.shape[0] == 1 and one_of(path):
                return x
            x = jnp.broadcast_to(x if batched else x[None], (size, batch, *x.shape[1 + batched :]))
            return x.reshape(size * batch, *x.shape[2:])

        results = mapped(*jax.tree_util.tree_map_with_path(flat, arguments, tuple(is_batched)))
        split = jax.tree.map(lambda x: x.reshape(size, batch, *x.shape[1:]), results)
        return split, jax.tree.map(lambda _: True, results)

    results = mapped(*jax.tree.map(lambda x: x[None], arguments))
    return jax.tree.map(lambda x: x[0], results)
