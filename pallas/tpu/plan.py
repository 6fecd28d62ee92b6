"""What is fixed when a TPU kernel is compiled; feature maps computed in VMEM; matrix products for the MXU."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas.block_sizes import round_up
from pallas.feature_map import IN_KERNELS, KernelMap, identity, softmax
from pallas.numerics import split

LANES = 128
NN = (((1,), (0,)), ((), ()))  # dimension numbers of a b
NT = (((1,), (1,)), ((), ()))  # a b^T
TN = (((0,), (0,)), ((), ()))  # a^T b
UNROLLED = 8  # a loop over at most so many heads of a group is unrolled, so that the compiler may interleave them
MASK_VALUE = -1e30  # of masked logits: finite, so that the difference of two is not NaN


def _softmax(x, real):
    if real is not None:
        x = jnp.where(real, x, MASK_VALUE)
    weights = jnp.exp(x - x.max(axis=1, keepdims=True))
    return weights * (1.0 / weights.sum(axis=1, keepdims=True))


@dataclasses.dataclass(frozen=True)
class Plan:
    """Static facts of one call. The kernels know positions in the padded arrays they read, which differ by branch.

    Residual branch: keys are shifted by `window` positions to the right, so that query i reads keys at positions up to
    i: causal linear attention.
    Window: the arrays of keys begin `back` positions before the first query, so that query i sees keys at positions
    i + back - window + 1 to i + back.
    """

    window: int
    scale: float
    length: int  # queries, padded: a multiple of block
    head_size: int  # of q and k before padding
    value_size: int
    map_name: str
    segmented: bool
    num_start_states: int  # 0; 1: the initial state; 2: segment_state too
    chunk: int  # tokens of one head that one matrix product takes
    block: int  # tokens that one step of the grid takes: a multiple of chunk
    back: int  # of the window: a multiple of block
    first_key: int  # of the window: positions before it hold no key
    float32: bool  # operands and products, which else are bfloat16
    eps: float | None  # of the RMS norm that the kernel applies to its output; None: it applies none
    interpret: bool
    split_scores: bool = False  # phi(k) and gradients of scores are [hi, lo] too: see `split_states`

    @property
    def dtype(self):
        """Of the operands of products."""
        return jnp.float32 if self.float32 else jnp.bfloat16

    @property
    def int16_step(self) -> float | None:
        """Of a normed output, which is at most sqrt(value_size), as int16: what 1 stands for. None: it is float32."""
        return None if self.float32 or self.split_scores else self.value_size**0.5 / 32767

    @property
    def precision(self):
        return lax.Precision.HIGHEST if self.float32 else lax.Precision.DEFAULT

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
        """Is the mean of a state over each slice of f subtracted before the state is rounded to bfloat16?

        The mean is large, and the Jacobian of softmax removes it from gradients, but not its rounding error. Each slice
        of phi sums to 1, so that outputs get the mean back as one added row.
        """
        return self.map.sums_to_one and not self.float32

    @property
    def split_states(self) -> bool:
        """Are states and the gradients they sum up operands as [hi, lo], with 16 bits, not 8, of their mantissa?

        Start states are float32 numbers of the user. And the gradient of a normed output is orthogonal to the output,
        while values and states are nearly parallel to it: their products cancel, and rounding errors remain, unless the
        Jacobian of the map removes those, as that of softmax does.
        """
        return self.split_scores or (self.num_start_states > 0 and not self.float32)

    @property
    def chunks(self) -> int:
        """In a block: the m of the paper, chunks between two saved states."""
        return self.block // self.chunk

    @property
    def blocks(self) -> int:
        return self.length // self.block

    @property
    def key_blocks(self) -> int:
        """Blocks of keys that a block of queries may see, of the window: its own and those before it."""
        return self.back // self.block + 1

    def dot(self, a, b, dimensions=NN):
        """A product accumulated in float32."""
        return lax.dot_general(a, b, dimensions, precision=self.precision, preferred_element_type=jnp.float32)

    def split(self, x, precise: bool | None = None) -> list:
        """x as an operand: [hi], or [hi, lo] if precise, by default where `split_states`."""
        precise = self.split_states if precise is None else precise
        if self.float32:
            return [x.astype(jnp.float32)]
        return split(x, precise and x.dtype == jnp.float32)

    def dot_split(self, a: list, b: list, dimensions=NN) -> Any:
        """Of operands that may be split: hi hi + hi lo + lo hi; lo lo is too small to matter."""
        return sum(self.dot(x, y, dimensions) for i, x in enumerate(a) for j, y in enumerate(b) if i + j < 2)

    def phi(self, x):
        """phi(x) in float32, [rows, num_features]: of x and, of a signed map, of -x. x: [rows, width]."""
        x = x.astype(jnp.float32)
        real = lanes((1, self.width)) < self.head_size if self.width > self.head_size else None
        return along_lanes([self.slice_of(x, real) for x in [x, -x][: self.map.slices]])

    def slice_of(self, x, real):
        """value(x); 0 in padded lanes, where `real` is false."""
        if self.map is softmax:  # its sums leave padded lanes out
            return _softmax(x, real)
        return self.map.value(x) if real is None or self.map is identity else jnp.where(real, self.map.value(x), 0.0)

    def pull_back(self, phi, x, d_phi):
        """The gradient of x, from phi(x) in float32 and the gradient of phi(x)."""
        x, columns = x.astype(jnp.float32), self.width
        d_x: Any = None
        for i, signed in enumerate([x, -x][: self.map.slices]):
            of_slice = slice(i * columns, (i + 1) * columns)
            d_signed = self.map.pull_back(signed, phi[:, of_slice], d_phi[:, of_slice])
            d_x = d_signed if i == 0 else d_x - d_signed
        return d_x

    def normed(self, out, axis: int):
        """RMS norm of out, float32, over `axis`: (y in float32 or in steps of int16, rstd)."""
        assert self.eps is not None
        rstd = lax.rsqrt(jnp.square(out).sum(axis=axis, keepdims=True) / self.value_size + self.eps)
        return out * (rstd if self.int16_step is None else rstd * (1 / self.int16_step)), rstd

    def store_out(self, refs: dict, head, rows, out, rstd=None):
        """Of a head: out [rows, dv] float32 and rstd [1, rows]."""
        ref = refs["out"]
        if ref.dtype == jnp.int16:
            out = jnp.round(out).astype(jnp.int32)
        ref[head, rows, :] = out.astype(ref.dtype)
        if rstd is not None:
            refs["rstd"][head, :, rows] = rstd

    def out_shapes(self, batch: int, kv: int, group: int, out_dtype) -> dict:
        """Of out and, if the kernel norms it, of rstd."""
        if self.eps is None:
            return {"out": struct((batch, kv, group, self.length, self.value_width), out_dtype)}
        dtype = jnp.float32 if self.int16_step is None else jnp.int16
        out = struct((batch, kv, group, self.length, self.value_width), dtype)
        return {"out": out, "rstd": struct((batch, kv, group, 1, self.length), jnp.float32)}

    def compiler_params(self, *order: Any):
        """Dimension semantics: of batch, kv head and then `order`, by default one sequential axis."""
        axes: Any = ("parallel", "parallel", *(order or ("arbitrary",)))
        return pltpu.CompilerParams(dimension_semantics=axes)

    def interpreted(self):
        return pltpu.InterpretParams() if self.interpret else False


def lanes(shape):
    """The column of each element."""
    return lax.broadcasted_iota(jnp.int32, shape, 1)


def sublanes(shape):
    """The row of each element."""
    return lax.broadcasted_iota(jnp.int32, shape, 0)


def along_lanes(slices):
    return slices[0] if len(slices) == 1 else jnp.concatenate(slices, axis=1)


def each_head(group: int, body: Callable, carry):
    """`carry = body(head, carry)` for every head of a group."""
    if group > UNROLLED:
        return lax.fori_loop(0, group, body, carry)
    for head in range(group):
        carry = body(head, carry)
    return carry


def rows_of(index, chunk: int):
    """The rows of a chunk, as an aligned slice."""
    return pl.ds(pl.multiple_of(index * chunk, chunk), chunk)


def zeros(*shape):
    return jnp.zeros(shape, jnp.float32)


def struct(shape, dtype):
    return jax.ShapeDtypeStruct(shape, dtype)
