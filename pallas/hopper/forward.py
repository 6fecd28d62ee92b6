"""The forward kernel: both branches, both norms and one store, for 64 queries of two heads (or 128 of one).

Two consumer warpgroups compute, one producer warpgroup copies. Each consumer walks over the key blocks of its window
with an online softmax (window_forward.py), reads the state that the sweep (state_sweep.py) saved before the window, and
the keys between that state and the window by a masked product (residual_forward.py).
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas.hopper import residual_forward, window_forward
from pallas.hopper.arrays import Inputs
from pallas.hopper.plan import Place, Plan
from pallas.hopper.state_sweep import Swept
from pallas.hopper.warpgroup import (
    PER_COLUMN,
    PER_ROW,
    ROWS,
    Ring,
    across,
    axis_index,
    down,
    for_each_tile,
    launch,
    lo_step,
    load_next,
    load_normed,
    pack_normed,
    resident_blocks,
    send,
    step_of_normed,
    tile,
    to_registers,
    unpack_normed,
)
from pallas.numerics import split


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ForwardInputs(Inputs):
    """The call's inputs [b, ...] as kernels read them (gradients.py), and what belongs to them."""

    start_means: Any = None  # [b, n, kv, slices, dv] float32
    states: Any = None  # the sweep's, as the next three
    state_means: Any = None
    states_lo: Any = None
    swept_features: Any = None
    segment_start: Any = None  # [b, t]

    @property
    def features(self):
        """Of the keys."""
        return self.features_k if self.swept_features is None else self.swept_features


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ForwardOutputs:
    """The output and, if saved, what the backward pass reads of this kernel."""

    out: Any = None  # [b, t, h, dv]
    lse: Any = None  # [b, h, t]: log2 of the sum of exp2 of the window's logits
    y_swa: Any = None  # [b, t, h, dv]: o_swa / rms(o_swa), packed; also of a window without a norm, if not alone
    r_swa: Any = None  # [b, h, t]: 1 / rms(o_swa), likewise
    y_rla: Any = None
    r_rla: Any = None
    y_rla_lo: Any = None  # with `plan.precise`: the second packed part
    out_lo: Any = None  # of a window alone and without a norm: the second part of out


def forward(inputs: Inputs, start_means, swept: Swept, segment_start, plan: Plan, *, save: bool) -> ForwardOutputs:
    """Both branches, or the one that the plan has; `save`: for a backward pass."""
    batch = inputs.v.shape[0]
    heads, d = plan.num_heads, plan.head_size
    by_head = jax.ShapeDtypeStruct((batch, plan.num_queries, heads, d), jnp.bfloat16)
    per_query = jax.ShapeDtypeStruct((batch, heads, plan.num_queries), jnp.float32)
    saved = lambda shape, condition: shape if save and condition else None
    outputs = ForwardOutputs(
        out=by_head,
        lse=saved(per_query, plan.swa),
        y_swa=saved(by_head, plan.swa and not plan.swa_alone),
        r_swa=saved(per_query, plan.swa and not plan.swa_alone),
        y_rla=saved(by_head, plan.rla_normed),
        r_rla=saved(per_query, plan.rla_normed),
        y_rla_lo=saved(by_head, plan.precise),
        out_lo=saved(by_head, plan.swa_alone),
    )
    scratch = {
        "ring": Ring.scratch(tile(plan.stages, plan.chunk, d), 2, plan.interpret),
        "q_tile": tile(2, ROWS, d),
        "q_rla_tile": tile(2, ROWS, d),
        "stage": tile(2, ROWS, d),
        "loaded": plgpu.Barrier(num_barriers=2),
        "rla_loaded": plgpu.Barrier(num_barriers=2),
        "turn": plgpu.Barrier(num_arrivals=2),
    }
    if plan.swa_normed or plan.rla_normed:
        scratch["gain_rows"] = plgpu.SMEM((2, 2, d), jnp.float32)
        scratch["gains_loaded"] = plgpu.Barrier(num_barriers=2, num_arrivals=plan.swa_normed + plan.rla_normed)
    num_tiles = plan.num_tiles(batch)
    grid = {"block": resident_blocks(num_tiles, plan.interpret)}
    body = functools.partial(_forward_block, plan=plan, num_tiles=num_tiles)
    arrays = ForwardInputs(
        **vars(inputs),
        start_means=start_means,
        states=swept.states,
        state_means=swept.means,
        states_lo=swept.states_lo,
        swept_features=swept.features,
        segment_start=segment_start,
    )
    return launch(body, arrays, outputs, scratch, grid=grid, warpgroups=3, interpret=plan.interpret, reduction_bytes=0)


def _forward_block(
    inputs: ForwardInputs, outputs: ForwardOutputs, ring: Ring, plan: Plan, num_tiles: int, **scratch
) -> None:
    """A block stays on its multiprocessor and takes one tile of queries after the other, copies running ahead."""
    warpgroup = axis_index("warpgroup")

    @pl.when(warpgroup < 2)
    def _():
        plgpu.set_max_registers(240, action="increase")
        consumer = _Consumer(inputs, outputs, ring, plan, warpgroup, **scratch)
        consumer.load_queries(plan.place(axis_index("block"), warpgroup))
        for_each_tile(num_tiles, consumer.tile, jnp.int32(0))
        plgpu.wait_smem_to_gmem(0)

    @pl.when(warpgroup == 2)
    def _():
        plgpu.set_max_registers(24, action="decrease")

        def copy(index, _, use):
            place = plan.place(index, 0)
            if plan.swa:
                use = window_forward.copy(inputs, ring, place, plan, use)
            return residual_forward.copy(inputs, ring, place, plan, use) if plan.rla else use

        ring.drain(for_each_tile(num_tiles, copy, jnp.int32(0)))


@dataclasses.dataclass(frozen=True)
class _Consumer:
    """One of the two warpgroups that compute, and the memory it uses."""

    inputs: ForwardInputs
    outputs: ForwardOutputs
    ring: Ring
    plan: Plan
    warpgroup: Any
    q_tile: Any
    q_rla_tile: Any
    stage: Any  # through which results go to device memory
    loaded: Any
    rla_loaded: Any
    turn: Any
    gain_rows: Any = None
    gains_loaded: Any = None

    def mine(self, ref):
        return ref.at[self.warpgroup]

    def load_queries(self, place: Place) -> None:
        self.load_q(place)
        self.load_q_rla(place)
        self.load_gains(place)

    def load_q(self, place: Place) -> None:
        if self.plan.swa:
            source = self.inputs.q.at[place.batch, place.rows, place.head]
            plgpu.copy_gmem_to_smem(source, self.mine(self.q_tile), self.mine(self.loaded))

    def load_q_rla(self, place: Place) -> None:
        if self.plan.rla and self.plan.map is not None:
            source = self.inputs.q_rla.at[place.batch, place.rows, place.head]
            plgpu.copy_gmem_to_smem(source, self.mine(self.q_rla_tile), self.mine(self.rla_loaded))

    def load_gains(self, place: Place) -> None:
        for i, gain in enumerate((self.inputs.swa_gain, self.inputs.rla_gain)):
            if gain is not None:
                source, target = gain.at[place.batch, place.head], self.gain_rows.at[self.warpgroup, i]
                plgpu.copy_gmem_to_smem(source, target, self.mine(self.gains_loaded))

    def gained(self, x, branch: int):
        gain = to_registers(self.gain_rows.at[self.warpgroup, branch], PER_COLUMN)
        return x * down(gain, ROWS)

    def norm(self, x, eps: float):
        """(x / rms(x), 1 / rms(x)) of [ROWS, d]."""
        r = lax.rsqrt((x * x).sum(axis=1) * (1.0 / self.plan.value_size) + eps)
        return x * across(r, x.shape[1]), r

    def put(self, value, output, place: Place) -> None:
        """Into the stage and, unless the output is None, from there to the output."""
        target = None if output is None else output.at[place.batch, place.rows, place.head]
        send(self.mine(self.stage), value, target)

    def put_rows(self, value, output, place: Place) -> None:
        if output is not None:
            output.at[place.batch, place.head, place.rows][...] = value

    def tile(self, index, is_last, use):
        """One tile of queries, from start to end. The next one's queries are copied as soon as there is room."""
        plan, inputs, outputs = self.plan, self.inputs, self.outputs
        place = plan.place(index, self.warpgroup)
        start = None  # the first key of each query's segment
        if plan.segmented:
            source = inputs.segment_start.at[place.batch, place.rows]
            start = to_registers(source, PER_ROW, optimized=False)

        prefetch = lambda load: load_next(load, plan, index, is_last, self.warpgroup)
        out: Any = None
        rms_swa: Any = None
        o_rla = r = step = None
        if plan.swa:
            plgpu.barrier_wait(self.mine(self.loaded))
            q_tile = self.mine(self.q_tile)
            sink = None if inputs.sink_logits is None else inputs.sink_logits[place.batch, place.head]
            turns = self.warpgroup, self.turn
            out, lse, use = window_forward.attend(self.ring, place, plan, q_tile, sink, start, use, *turns)
            prefetch(self.load_q)
            self.put_rows(lse, outputs.lse, place)
            if not plan.swa_alone:
                out, r = self.norm(out, plan.swa_eps)
                self.put_rows(r, outputs.r_swa, place)
                rms_swa = None if plan.swa_normed else 1.0 / r
                if plan.rla or outputs.y_swa is not None:  # the stage keeps it, too, to free its registers
                    step = step_of_normed(r, plan.value_size, plan.swa_eps)
                    self.put(pack_normed(out, step), outputs.y_swa, place)
        if plan.rla:
            q_tile, loaded = self.mine(self.q_rla_tile), self.mine(self.rla_loaded)
            q_is_read = lambda: prefetch(self.load_q_rla)
            o_rla, use = residual_forward.read(inputs, self.ring, place, plan, q_tile, loaded, start, use, q_is_read)
            if plan.rla_normed:
                o_rla, r = self.norm(o_rla, plan.eps)
                self.put_rows(r, outputs.r_rla, place)
            if plan.swa:
                out = load_normed(self.mine(self.stage), step)
            if outputs.y_rla is not None:
                step = step_of_normed(r, plan.value_size, plan.eps)
                packed = pack_normed(o_rla, step)
                self.put(packed, outputs.y_rla, place)
                if plan.precise:
                    lo = pack_normed(o_rla - unpack_normed(packed, step), lo_step(step))
                    self.put(lo, outputs.y_rla_lo, place)
        if plan.swa_normed or plan.rla_normed:
            plgpu.barrier_wait(self.mine(self.gains_loaded))
            terms = []
            if plan.swa:
                terms.append(self.gained(out, 0) if plan.swa_normed else out * across(rms_swa, plan.head_size))
            terms += [self.gained(o_rla, 1)] if plan.rla else []
            out = terms[0] if len(terms) == 1 else terms[0] + terms[1]
            prefetch(self.load_gains)
        elif plan.rla:
            out = o_rla
        self.put(out, outputs.out, place)
        if outputs.out_lo is not None:
            self.put(split(out, True)[1], outputs.out_lo, place)
        return use
