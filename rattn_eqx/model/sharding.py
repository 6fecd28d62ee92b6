"""Data parallelism: a batch cut over devices, parameters on every one of them."""

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

BATCH = "batch"  # the name of the mesh's only axis


def batch_mesh(batch_size: int) -> Mesh:
    """A mesh of one axis over as many of this process's devices as divide the batch."""
    num_devices = math.gcd(batch_size, jax.local_device_count())
    return jax.make_mesh(
        (num_devices,), (BATCH,), axis_types=(AxisType.Auto,), devices=jax.local_devices()[:num_devices]
    )


def replicate(tree: Any, mesh: Mesh) -> Any:
    """The arrays of a tree, whole on every device of the mesh."""
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))


def over_batch(function: Callable, mesh: Mesh, num_replicated: int) -> Callable:
    """Run `function` on every device with its share of the last argument, a tree of [batch, ...] arrays.

    The first `num_replicated` arguments are the same on every device, and so must the results be: `function` reduces
    over the axis `BATCH` itself.
    """
    specs = (*[PartitionSpec()] * num_replicated, PartitionSpec(BATCH))
    return jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=PartitionSpec(), check_vma=False)
