"""Which tokens each number of a function's result depends on, read from its program: nothing is computed.

A feature map must act on the last axis alone. One that also looks along tokens or heads (a maximum over the sequence,
a cumulative sum, batch statistics) leaks the future, and every implementation would cut it into other pieces. So the
map is traced on 8 tokens, each of them one bit, and the bits are followed through its primitives. What is closed over,
traced or not, carries no bit, and no value of it is needed.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

TOKENS = 8

ELEMENTWISE = """
    abs acos acosh add add_any and asin asinh atan atan2 atanh bessel_i0e bessel_i1e bitcast_convert_type cbrt ceil
    clamp clz convert_element_type copy copy_p cos cosh digamma div eq eq_to erf erf_inv erfc exp exp2 expm1 floor ge gt
    igamma igammac imag integer_pow is_finite le le_to lgamma log log1p logistic lt lt_to max min mul mul_add_any ne neg
    nextafter not or polygamma population_count pow pvary real reduce_precision regularized_incomplete_beta rem round
    rsqrt select_and_add select_n sharding_constraint shift_left shift_right_arithmetic shift_right_logical sign sin
    sinh sqrt square stop_gradient sub tan tanh xor zeta optimization_barrier
"""
REDUCTIONS = "reduce_sum reduce_max reduce_min reduce_prod reduce_and reduce_or reduce_xor argmax argmin"
CUMULATIVE = "cumsum cumprod cummax cummin cumlogsumexp"
CALLS = "jit pjit closed_call core_call checkpoint remat remat2 custom_jvp_call custom_vjp_call custom_vjp_call_jaxpr"
MOVED = "broadcast_in_dim concatenate pad reshape rev slice split squeeze transpose"


class Unknown(Exception):
    """A primitive through which no dependence can be followed. Its name is the argument."""


@dataclasses.dataclass(frozen=True)
class Followed:
    """An array as it is followed: the bits of each of its numbers and, where it is the same for every input, itself."""

    bits: np.ndarray  # uint8
    value: Any = None

    @property
    def every(self):
        return np.bitwise_or.reduce(self.bits, axis=None)


def without_bits(value: Any, shape=None) -> Followed:
    zeros: np.ndarray = np.zeros(np.shape(value) if shape is None else shape, np.uint8)
    known = value is not None and not isinstance(value, Tracer)
    return Followed(zeros, value if known else None)


def mixing(function: Callable, x: jax.ShapeDtypeStruct) -> str | None:
    """What is wrong with a function of x, whose leading axes are `TOKENS` tokens, and the remedy; None: nothing."""
    try:
        if not mixes(jax.make_jaxpr(function)(x)):
            return None
    except Unknown as error:
        return (
            f"goes through the primitive {error}, along which no dependence can be followed; "
            "compute the features outside and pass them as q and k with feature_map=identity"
        )
    return (
        "mixes tokens or heads, and would leak the future; write it for one vector and wrap it in "
        "jnp.vectorize(phi, signature='(d)->(f)')"
    )


def mixes(program: ClosedJaxpr) -> bool:
    """Do numbers of its result depend on other tokens than their own?

    Raises:
      Unknown: where that cannot be told.
    """
    (result,) = program.out_avals
    tokens = program.in_avals[0].shape[:-1]
    own = (np.uint8(1) << np.arange(TOKENS, dtype=np.uint8)).reshape(*tokens, 1)
    (found,) = _follow(program, [Followed(np.broadcast_to(own, program.in_avals[0].shape))])
    return bool(np.any(found.bits & ~np.broadcast_to(own, result.shape)))


def _follow(program: ClosedJaxpr, arguments: Sequence[Followed]) -> list[Followed]:
    jaxpr, consts = program.jaxpr, [without_bits(x) for x in program.consts]
    known = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *arguments], strict=True))
    read = lambda x: without_bits(np.asarray(x.val)) if isinstance(x, Literal) else known[x]
    for equation in jaxpr.eqns:
        inputs = [read(x) for x in equation.invars]
        found = _through(equation, inputs)
        known.update(zip(equation.outvars, found, strict=True))
    return [read(x) for x in jaxpr.outvars]


def _through(equation, inputs: list[Followed]) -> list[Followed]:
    name, parameters = equation.primitive.name, equation.params
    shapes = [x.aval.shape for x in equation.outvars]
    inner = _called(equation)
    if name == "scan":
        return _scan(equation, inputs)
    if name == "while":
        return _while(parameters, inputs)
    if name == "cond":
        index, *operands = inputs
        branches = [_follow(_closed(branch), operands) for branch in parameters["branches"]]
        return [Followed(_any(*(x.bits for x in results), index.every)) for results in zip(*branches, strict=True)]
    if inner is not None:
        return _follow(inner, inputs)
    if not any(x.every for x in inputs):  # the same for every input; itself, where an index may need it
        return _computed(equation, inputs, shapes)
    if name in ELEMENTWISE.split():
        return [Followed(np.broadcast_to(_any(*(x.bits for x in inputs)), shape).copy()) for shape in shapes]
    if name in REDUCTIONS.split():
        return [Followed(np.bitwise_or.reduce(inputs[0].bits, axis=tuple(parameters["axes"])))]
    if name == "reduce":  # by a function of its own
        operands = inputs[: len(inputs) // 2]
        bits = _any(*(x.bits for x in operands), *(x.every for x in inputs[len(operands) :]))
        return [Followed(np.bitwise_or.reduce(bits, axis=tuple(parameters["dimensions"]))) for _ in shapes]
    if name in CUMULATIVE.split():
        turned = (lambda x: np.flip(x, parameters["axis"])) if parameters["reverse"] else (lambda x: x)
        return [Followed(turned(np.bitwise_or.accumulate(turned(inputs[0].bits), axis=parameters["axis"])))]
    if name in ("sort", "top_k", "fft"):
        last = len(parameters.get("fft_lengths", "x"))
        axes = (parameters["dimension"],) if name == "sort" else tuple(range(-last, 0))
        along = np.bitwise_or.reduce(_any(*(x.bits for x in inputs)), axis=axes, keepdims=True)
        return [Followed(np.broadcast_to(along, shape).copy()) for shape in shapes]
    if name == "dot_general":
        return [Followed(_product(inputs, **{"dimension_numbers": parameters["dimension_numbers"]}))]
    if name in MOVED.split():
        return _moved(equation, inputs)
    if name == "gather":
        return [Followed(_gathered(equation, *inputs))]
    if name == "dynamic_slice":
        operand, *starts = inputs
        cut = [axis for axis, size in enumerate(parameters["slice_sizes"]) if size < operand.bits.shape[axis]]
        window = tuple(slice(0, size) for size in parameters["slice_sizes"])
        return [Followed(_along(operand.bits, cut)[window] | _any(*(x.every for x in starts)))]
    if name == "dynamic_update_slice" or name.startswith("scatter"):
        return [Followed(_written(equation, inputs))]
    raise Unknown(name)


def _called(equation) -> ClosedJaxpr | None:
    """The program that a jit, a checkpoint or a function with derivatives of its own calls."""
    if equation.primitive.name not in CALLS.split():
        return None
    programs = (equation.params.get(key) for key in ("jaxpr", "call_jaxpr", "fun_jaxpr"))
    return next((_closed(x) for x in programs if isinstance(x, (ClosedJaxpr, Jaxpr))), None)


def _closed(program: ClosedJaxpr | Jaxpr) -> ClosedJaxpr:
    return program if isinstance(program, ClosedJaxpr) else ClosedJaxpr(program, ())


def _any(*bits) -> Any:
    total = np.uint8(0)
    for x in bits:
        total = np.bitwise_or(total, x)
    return total


def _along(bits, axes):
    """Every number along `axes` gets the bits of all."""
    return np.broadcast_to(np.bitwise_or.reduce(bits, axis=tuple(axes), keepdims=True), bits.shape) if axes else bits


def _computed(equation, inputs, shapes) -> list[Followed]:
    if any(x.value is None for x in inputs) or sum(map(math.prod, shapes)) > 1e6 or equation.effects:
        return [without_bits(None, shape) for shape in shapes]
    with jax.ensure_compile_time_eval():
        found = equation.primitive.bind(*(jnp.asarray(x.value) for x in inputs), **equation.params)
    return [without_bits(x) for x in (found if equation.primitive.multiple_results else [found])]


def _bound(equation, *arrays):
    """The primitive itself, of arrays of numbers that stand for places or bits."""
    with jax.ensure_compile_time_eval():
        found = equation.primitive.bind(*(jnp.asarray(x) for x in arrays), **equation.params)
    return [np.asarray(x) for x in found] if equation.primitive.multiple_results else [np.asarray(found)]


def _moved(equation, inputs) -> list[Followed]:
    name, parameters, (first, *rest) = equation.primitive.name, equation.params, inputs
    shape = equation.outvars[0].aval.shape
    if name in ("reshape", "squeeze"):
        return [Followed(first.bits.reshape(shape))]
    if name == "broadcast_in_dim":
        axes = parameters["broadcast_dimensions"]
        place = [first.bits.shape[axes.index(i)] if i in axes else 1 for i in range(len(shape))]
        return [Followed(np.broadcast_to(first.bits.reshape(place), shape).copy())]
    if name == "transpose":
        return [Followed(first.bits.transpose(parameters["permutation"]))]
    if name == "concatenate":
        return [Followed(np.concatenate([x.bits for x in inputs], axis=parameters["dimension"]))]
    return [Followed(x) for x in _bound(equation, *(x.bits for x in [first, *rest]))]


def _product(inputs, dimension_numbers):
    (left_sum, right_sum), (left_batch, right_batch) = dimension_numbers
    left, right = (np.bitwise_or.reduce(x.bits, axis=tuple(axes), keepdims=True) if axes else x.bits
                   for x, axes in zip(inputs, (left_sum, right_sum), strict=True))  # fmt: skip
    free = lambda x, *taken: [axis for axis in range(x.ndim) if axis not in itertools.chain(*taken)]
    left_free, right_free = free(left, left_sum, left_batch), free(right, right_sum, right_batch)
    left = left.transpose(*left_batch, *left_free, *left_sum)
    right = right.transpose(*right_batch, *right_free, *right_sum)
    batch = left.shape[: len(left_batch)]
    left = left.reshape(*batch, *left.shape[len(batch) :][: len(left_free)], *(1,) * len(right_free))
    right = right.reshape(*batch, *(1,) * len(left_free), *right.shape[len(batch) :][: len(right_free)])
    return left | right


def _gathered(equation, operand: Followed, indices: Followed):
    """Where the index is known, what it picks; else what any index might."""
    numbers, sizes = equation.params["dimension_numbers"], equation.params["slice_sizes"]
    if indices.value is not None:
        return _bound(equation, operand.bits, indices.value)[0]
    batching = getattr(numbers, "operand_batching_dims", ())
    cut = [axis for axis, size in enumerate(sizes) if size < operand.bits.shape[axis] and axis not in batching]
    nowhere = np.zeros(indices.bits.shape, np.int32)
    found = _bound(equation, _along(operand.bits, cut), nowhere)[0]
    chosen_by = np.bitwise_or.reduce(indices.bits, axis=-1)  # the last axis of an index holds its coordinates
    place = [1 if axis in numbers.offset_dims else size for axis, size in enumerate(found.shape)]
    return found | chosen_by.reshape(place)


def _written(equation, inputs):
    """An array with others written, added or multiplied into it."""
    operand, *rest = inputs
    update, indices = (rest[0], rest[1:]) if equation.primitive.name == "dynamic_update_slice" else (rest[1], rest[:1])
    if any(x.value is None for x in indices):
        return operand.bits | _any(update.every, *(x.every for x in indices))
    if equation.primitive.name == "dynamic_update_slice":
        return operand.bits | _bound(equation, np.zeros_like(operand.bits), update.bits, *(x.value for x in indices))[0]
    parameters = dict(equation.params) | {"update_jaxpr": None, "update_consts": ()}
    total = operand.bits.copy()
    with jax.ensure_compile_time_eval():
        for bit in range(TOKENS):
            one = jnp.asarray((update.bits >> bit & 1).astype(np.float32))
            mode = {key: parameters[key] for key in ("indices_are_sorted", "unique_indices", "mode")}
            numbers = parameters["dimension_numbers"]
            empty = jnp.zeros(operand.bits.shape, jnp.float32)
            sums = jax.lax.scatter_add(empty, jnp.asarray(indices[0].value), one, numbers, **mode)
            total |= (np.asarray(sums) > 0).astype(np.uint8) << bit
    return total


def _scan(equation, inputs) -> list[Followed]:
    """Turn by turn. What is cut into rows has one axis more outside than inside."""
    program, length = _closed(equation.params["jaxpr"]), equation.params["length"]
    is_row = lambda outer, inner: len(outer.aval.shape) > len(inner.aval.shape)
    num_rows = sum(map(is_row, equation.invars, program.jaxpr.invars))
    num_kept = sum(map(is_row, equation.outvars, program.jaxpr.outvars))
    num_carry = len(equation.outvars) - num_kept
    first, second = len(inputs) - num_rows - num_carry, len(inputs) - num_rows
    consts, carry, rows = inputs[:first], [Followed(x.bits) for x in inputs[first:second]], inputs[second:]
    kept: list[list[np.ndarray]] = []
    for i in reversed(range(length)) if equation.params["reverse"] else range(length):
        found = _follow(program, [*consts, *carry, *(Followed(x.bits[i]) for x in rows)])
        carry = [Followed(x.bits) for x in found[:num_carry]]
        kept.append([x.bits for x in found[num_carry:]])
    kept = kept[::-1] if equation.params["reverse"] else kept
    return carry + [Followed(np.stack(x)) for x in zip(*kept, strict=True)]


def _while(parameters, inputs) -> list[Followed]:
    """Turned until no bit is added."""
    test, body = _closed(parameters["cond_jaxpr"]), _closed(parameters["body_jaxpr"])
    first, second = parameters["cond_nconsts"], parameters["cond_nconsts"] + parameters["body_nconsts"]
    test_consts, body_consts, carry = inputs[:first], inputs[first:second], [Followed(x.bits) for x in inputs[second:]]
    while True:
        (goes_on,) = _follow(test, [*test_consts, *carry])
        found = _follow(body, [*body_consts, *carry])
        new = [Followed(_any(x.bits, y.bits, goes_on.every)) for x, y in zip(carry, found, strict=True)]
        if all(np.array_equal(x.bits, y.bits) for x, y in zip(carry, new, strict=True)):
            return new
        carry = new


def program_text(function: Callable, x: jax.ShapeDtypeStruct) -> str:
    """The program of a function and its derivative, without calls inside: a jitted or wrapped one has the function's.

    Raises:
      TypeError: for a function with a backward pass of its own, which has no derivative to push forward.
    """
    program = jax.make_jaxpr(lambda x, tangent: jax.jvp(function, (x,), (tangent,)))(x, x)
    return str(jax.make_jaxpr(lambda *both: _run(program.jaxpr, program.consts, both))(x, x))


def _run(jaxpr: Jaxpr, consts, arguments):
    known = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *arguments], strict=True))
    read = lambda x: x.val if isinstance(x, Literal) else known[x]
    for equation in jaxpr.eqns:
        inputs, inner = [read(x) for x in equation.invars], _called(equation)
        if inner is not None:
            found = _run(inner.jaxpr, inner.consts, inputs)
        else:
            found = equation.primitive.bind(*inputs, **equation.params)
            found = found if equation.primitive.multiple_results else [found]
        known.update(zip(equation.outvars, found, strict=True))
    return [read(x) for x in jaxpr.outvars]
