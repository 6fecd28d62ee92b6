"""What is fixed when a TPU kernel is compiled, feature maps formed in VMEM, and products for the matrix unit."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas.feature_map import IN_KERNELS, KernelMap, identity, softmax

LANES = 128
PLAIN = (((1,), (0,)), ((), ()))  # a b
RIGHT = (((1,), (1,)), ((), ()))  # a b^T
LEFT = (((0,), (0,)), ((), ()))  # a^T b
UNROLLED = 8  # heads of a group whose work the compiler may interleave; more of them are a loop
LOWEST = -1e30  # of logits: far below any, and finite, so that no difference of two is NaN


def _softmax(x, real):
    if real is not None:
        x = jnp.where(real, x, LOWEST)
    weights = jnp.exp(x - x.max(axis=1, keepdims=True))
    return weights * (1.0 / weights.sum(axis=1, keepdims=True))


@dataclasses.dataclass(frozen=True)
class Plan:
    """Static facts of one call. Query i stands at aligned position i; what is aligned differs by branch.

    Residual branch: keys are moved `window` towards the queries, so that query i reads the keys at positions up to i.
    Local branch: `back` positions lie before the first query's, and query i sees positions i + back - window + 1 to
    i + back.
    """

    window: int
    scale: float
    length: int  # queries, padded: a multiple of block
    head_size: int  # of q and k before padding
    value_size: int
    map_name: str
    segmented: bool
    num_start_states: int  # 0; 1: the initial state; 2: segment_state too
    chunk: int  # queries of one head that a product takes
    block: int  # queries that one step of the grid takes: a multiple of chunk
    back: int  # of the local branch: a multiple of block
    first_key: int  # of the local branch: positions before it hold no key
    exact: bool  # float32 operands and products, not bfloat16 ones
    eps: float | None  # outputs are normed, with this under the root; None: they are not
    interpret: bool
    delicate: bool = False  # bfloat16, normed, and phi without a sum of one: see `precise`

    @property
    def dtype(self):
        """Of operands."""
        return jnp.float32 if self.exact else jnp.bfloat16

    @property
    def unit(self) -> float | None:
        """Of a normed output, at most sqrt(value_size), kept as an integer of 16 bits; None: it is float32."""
        return None if self.exact or self.delicate else self.value_size**0.5 / 32767

    @property
    def precision(self):
        return lax.Precision.HIGHEST if self.exact else lax.Precision.DEFAULT

    @property
    def map(self) -> KernelMap:
        return IN_KERNELS[self.map_name]

    @property
    def width(self) -> int:
        """Lanes of a head, and of a slice of phi."""
        return round_up(self.head_size, LANES)

    @property
    def value_width(self) -> int:
        return round_up(self.value_size, LANES)

    @property
    def num_features(self) -> int:
        return self.map.slices * self.width

    @property
    def centred(self) -> bool:
        """Are states rounded without their mean over each slice of f?

        The mean is large, and the softmax map's Jacobian removes it from gradients: they would be left with its
        rounding. That each slice of phi sums to 1 gives outputs their part of it back.
        """
        return self.map.sums_to_one and not self.exact

    @property
    def precise(self) -> bool:
        """Are states read, and their gradients summed, beyond bfloat16?

        Start states are float32. And the gradient of a normed output is orthogonal to it, while values and states lie
        nearly along it: of their products little is left but rounding, unless the map's Jacobian removes the rest, as
        softmax's does.
        """
        return self.delicate or (self.num_start_states > 0 and not self.exact)

    @property
    def chunks(self) -> int:
        """In a block: the paper's m."""
        return self.block // self.chunk

    @property
    def blocks(self) -> int:
        return self.length // self.block

    @property
    def key_blocks(self) -> int:
        """Blocks of keys that a block of queries may see, of the local branch."""
        return self.back // self.block + 1

    def dot(self, a, b, dimensions=PLAIN):
        """A product with float32 sums."""
        return lax.dot_general(a, b, dimensions, precision=self.precision, preferred_element_type=jnp.float32)

    def parts(self, x):
        """x as operands: rounded, and where `precise` what rounding took from it too."""
        rounded = x.astype(self.dtype)
        if not self.precise or x.dtype != jnp.float32:
            return [rounded]
        return [rounded, (x - rounded.astype(jnp.float32)).astype(self.dtype)]

    def product(self, a, b, dimensions=PLAIN) -> Any:
        """Of parts; that of what rounding took from both is left out."""
        return sum(self.dot(x, y, dimensions) for i, x in enumerate(a) for j, y in enumerate(b) if i + j < 2)

    def slices_of(self, x):
        """phi(x) in float32, [rows, num_features], and its signed inputs. x: [rows, width]."""
        real = lanes((1, self.width)) < self.head_size if self.width > self.head_size else None
        signed = [x, -x][: self.map.slices]
        return along_lanes([self.slice_of(x, real) for x in signed]), signed

    def slice_of(self, x, real):
        """value(x); 0 in padding, where `real` is false."""
        if self.map is softmax:  # padding takes no part in its sums
            return _softmax(x, real)
        return self.map.value(x) if real is None or self.map is identity else jnp.where(real, self.map.value(x), 0.0)

    def phi(self, x):
        return self.slices_of(x.astype(jnp.float32))[0]

    def pull_back(self, phi, x, d_phi):
        """The gradient of x, from phi(x) in float32 and its cotangent."""
        x, columns = x.astype(jnp.float32), self.width
        d: Any = None
        for i, signed in enumerate([x, -x][: self.map.slices]):
            part = slice(i * columns, (i + 1) * columns)
            found = self.map.pull_back(signed, phi[:, part], d_phi[:, part])
            d = found if i == 0 else d - found
        return d

    def normed(self, out, axis: int):
        """out, float32 with its values along `axis`, as it is kept: normed, and the factor that did it."""
        assert self.eps is not None
        factor = lax.rsqrt(jnp.square(out).sum(axis=axis, keepdims=True) / self.value_size + self.eps)
        return out * (factor if self.unit is None else factor * (1 / self.unit)), factor

    def store_out(self, given: dict, head, rows, out, factor=None):
        """Of a head: out [rows, dv] float32 and factor [1, rows]."""
        ref = given["out"]
        if ref.dtype == jnp.int16:
            out = jnp.round(out).astype(jnp.int32)
        ref[head, rows, :] = out.astype(ref.dtype)
        if factor is not None:
            given["factor"][head, :, rows] = factor

    def out_shapes(self, batch: int, kv: int, group: int, out_dtype) -> dict:
        """Of out and, if it is normed, of the factor."""
        if self.eps is None:
            return {"out": struct((batch, kv, group, self.length, self.value_width), out_dtype)}
        kept = jnp.float32 if self.unit is None else jnp.int16
        out = struct((batch, kv, group, self.length, self.value_width), kept)
        return {"out": out, "factor": struct((batch, kv, group, 1, self.length), jnp.float32)}

    def compiler_params(self, *order: Any):
        """Axes of the grid, the last by default and `order` in all other cases: which may run in any order?"""
        axes: Any = ("parallel", "parallel", *(order or ("arbitrary",)))
        return pltpu.CompilerParams(dimension_semantics=axes)

    def interpreted(self):
        return pltpu.InterpretParams() if self.interpret else False


def round_up(x: int, multiple: int) -> int:
    return -(-x // multiple) * multiple


def lanes(shape):
    return lax.broadcasted_iota(jnp.int32, shape, 1)


def sublanes(shape):
    return lax.broadcasted_iota(jnp.int32, shape, 0)


def along_lanes(parts):
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=1)


def each_head(group: int, body: Callable, carry):
    """`carry = body(head, carry)` for every head of a group."""
    if group > UNROLLED:
        return lax.fori_loop(0, group, body, carry)
    for head in range(group):
        carry = body(head, carry)
    return carry


def rows_of(index, chunk: int):
    return pl.ds(pl.multiple_of(index * chunk, chunk), chunk)


def zeros(*shape):
    return jnp.zeros(shape, jnp.float32)


def struct(shape, dtype):
    return jax.ShapeDtypeStruct(shape, dtype)
