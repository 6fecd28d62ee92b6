"""The least kernel that ptxas 13.0 compiles wrong: `python register_operands.py` on a Hopper GPU, `--compile` anywhere.

sum over j of (x keys[j]^T) values[j]: x is a register operand made before the loop, the scores are one made in it.
Where a wait stands between making the scores and multiplying them, ptxas 13.0.48 and 13.0.88 keep them in x's own
registers: from the second iteration on x is lost. 13.1.80 to 13.5.37 do not, nor does 13.0 if the wait comes first.
"""

import functools
import os
import sys

if "--compile" in sys.argv:
    os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

MATRIX = plgpu.Layout.WGMMA
ACC = plgpu.ACC  # pyright: ignore[reportPrivateImportUsage]  # jax 0.10 does not export it
ITERATIONS = 3


def body(x, keys, values, out, x_tile, key_tile, value_tile, keys_there, values_there, *, wait_first: bool):
    plgpu.copy_gmem_to_smem(x, x_tile, keys_there)
    plgpu.barrier_wait(keys_there)
    kept = plgpu.load(x_tile, layout=MATRIX)  # pyright: ignore[reportCallIssue]  # jax 0.10: an index

    def iteration(j, total):
        plgpu.copy_gmem_to_smem(keys.at[j], key_tile, keys_there)
        plgpu.copy_gmem_to_smem(values.at[j], value_tile, values_there)
        plgpu.barrier_wait(keys_there)
        if wait_first:
            plgpu.barrier_wait(values_there)

        def product(sums):
            plgpu.wgmma(sums, kept, key_tile.transpose((1, 0)))
            return sums[...]

        scores = pl.run_scoped(product, ACC((64, 64), jnp.float32)).astype(jnp.bfloat16)
        if not wait_first:
            plgpu.barrier_wait(values_there)
        return pl.run_state(lambda sums: plgpu.wgmma(sums, scores, value_tile))(ACC.init(total))

    total = lax.fori_loop(0, ITERATIONS, iteration, plgpu.layout_cast(jnp.zeros((64, 64), jnp.float32), MATRIX))
    x_tile[...] = total.astype(jnp.bfloat16)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(x_tile, out)
    plgpu.wait_smem_to_gmem(0)


def kernel(wait_first: bool):
    tile = plgpu.SMEM((64, 64), jnp.bfloat16, transforms=(plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128)))
    named = functools.partial(body, wait_first=wait_first)
    name = "waits_first" if wait_first else "waits_between"
    named.__name__ = name  # pyright: ignore[reportAttributeAccessIssue]
    scratch = [tile, tile, tile, plgpu.Barrier(), plgpu.Barrier()]
    out = jax.ShapeDtypeStruct((64, 64), jnp.bfloat16)
    return plgpu.kernel(named, out_type=out, scratch_types=scratch, grid=(1,), grid_names=("block",))


def compile_both() -> None:
    """For an H100 that is not here; the listings go to the output, as the environment says."""
    from jax.experimental import topologies
    from jax.sharding import AbstractDevice, AbstractMesh, SingleDeviceSharding

    from pallas.tools.compile_gpu import TARGETS

    topology = topologies.get_topology_desc(platform="cuda", topology="1x1x1", target_config=TARGETS["h100"])
    sharding = SingleDeviceSharding(topology.devices[0])
    shapes = ((64, 64), (ITERATIONS, 64, 64), (ITERATIONS, 64, 64))
    arrays = [jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=sharding) for shape in shapes]
    device = AbstractDevice(topology.devices[0].device_kind, 132, "gpu")
    for wait_first in (True, False):
        with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=device)):
            lowered = jax.jit(kernel(wait_first)).lower(*arrays)
        lowered.compile()


def run_both() -> dict[str, float]:
    """The relative error of each, on a GPU."""
    generator = np.random.default_rng(0)
    draw = lambda *shape: generator.standard_normal(shape).astype(jnp.bfloat16)
    x, keys, values = draw(64, 64), draw(ITERATIONS, 64, 64), draw(ITERATIONS, 64, 64)
    wide = [a.astype(np.float64) for a in (x, keys, values)]
    expected = sum(wide[0] @ key.T @ value for key, value in zip(wide[1], wide[2], strict=True))
    found = {}
    for wait_first in (True, False):
        got = np.asarray(jax.jit(kernel(wait_first))(x, keys, values), np.float64)
        error = float(np.linalg.norm(got - expected) / np.linalg.norm(expected))
        found["waits first" if wait_first else "waits between"] = error
    return found


if __name__ == "__main__":
    compile_both() if "--compile" in sys.argv else print(run_both())
