"""`python -m rattn_eqx.training.bench`: tokens per second of training steps, by kind of attention.

The model has the paper's 3B width and eight of its layers, three local to one global, so that it fits one GPU. Its
attention is RATTENTION with a window of 512; full attention in every layer; or a plain window of half the length, as in
the paper's table of step times. A step is the loss of a batch, its gradients, and AdamW's update, in one compiled
program. Where its kind of attention is no RATTENTION, a layer uses cuDNN (`--plain cudnn`), the fastest there is.
"""

import argparse
import dataclasses
import functools
import sys
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
from jaxtyping import Array, Float

from pallas.checked import checked
from pallas.tools.bench import measure, measure_ceilings, reason, time_jax
from pallas.tools.peers import Problem, Row, flops
from pallas.tools.provenance import facts, heading, saver
from rattn_eqx.inference.cost import hardwares, parameters_by_part
from rattn_eqx.model.attention import GlobalAttention, RAttention
from rattn_eqx.model.config import ModelConfig
from rattn_eqx.model.language_model import LanguageModel
from rattn_eqx.model.presets import paper_3b, tiny
from rattn_eqx.training.config import TrainConfig
from rattn_eqx.training.step import build_model, make_optimizer, make_step


class CudnnAttention(eqx.Module):
    """A layer without residual branch, with its own projections, whose heads cuDNN computes."""

    layer: RAttention | GlobalAttention

    @checked
    def __call__(self, x: Float[Array, "t m"], segment_ids: None = None) -> Float[Array, "t m"]:
        q, k, *_, v = self.layer.inputs(x)
        window = None
        if isinstance(self.layer, RAttention):
            window = (self.layer.window - 1, 0) if self.layer.window < x.shape[0] else None
        attend: Any = functools.partial(jax.nn.dot_product_attention, is_causal=True, implementation="cudnn")
        return self.layer.projections.merge(attend(q, k, v, local_window_size=window))


def kinds(config: ModelConfig, length: int) -> dict[str, ModelConfig]:
    """The models that are compared at one length, which differ in nothing but their local layers' attention."""
    full = dataclasses.replace(config, residual=False, window=length)
    plain = dataclasses.replace(config, residual=False, window=length // 2)
    return {
        f"RATTENTION {config.window}": config,
        "full attention": full,
        f"window {plain.window}": plain,
    }


def with_cudnn(model: LanguageModel) -> LanguageModel:
    """The model with `CudnnAttention` wherever there is no residual branch."""
    plain = [
        number
        for number, block in enumerate(model.blocks)
        if isinstance(block.attention, GlobalAttention) or block.attention.rla_gain is None
    ]
    where = lambda model: [model.blocks[number].attention for number in plain]
    return eqx.tree_at(where, model, [CudnnAttention(layer) for layer in where(model)]) if plain else model


def step_flops(config: ModelConfig, batch: int, length: int) -> float:
    """Model FLOPs of a step: 6 for each token and parameter of a matrix (the head among them, the embedding's look-up
    not), and 3 times the forward FLOPs of attention as `pallas.tools.peers.flops` counts them. What is recomputed to
    save memory is not counted."""
    parts = parameters_by_part(config)
    head = parts["embedding"] if config.tie_embeddings else parts["head"]
    weights = parts["local attention"] + parts["global attention"] + parts["feed-forward"] + head
    total = 6.0 * weights * batch * length
    sizes = (batch, length, config.num_heads, config.num_kv_heads, config.head_size)
    problem = Problem(*sizes, config.window, length, config.feature_map)
    local = "rattention" if config.residual else "sliding_window_attention"
    for kind in config.layer_kinds:
        row = (
            Row(local, config.window, "", tuple)
            if kind == "local"
            else Row("sliding_window_attention", length, "", tuple)
        )
        total += 3 * flops(row, problem, backward=False)
    return total


def time_model(config: ModelConfig, batch: int, length: int, options: argparse.Namespace) -> Any:
    """The timing of one step, and the loss after the last."""
    settings = TrainConfig(
        steps=10_000, batch_size=batch, context=length, learning_rate=1e-4, warmup_steps=100,
        compute_dtype=options.compute_dtype, rematerialise=not options.keep_activations,
    )  # fmt: skip

    @eqx.filter_jit
    def initial(key):
        model = build_model(config, settings, key=key, implementation=options.implementation)
        model = with_cudnn(model) if options.plain == "cudnn" else model
        return model, make_optimizer(settings).init(eqx.filter(model, eqx.is_array))

    carried: list[Any] = [*initial(jax.random.key(0)), None]  # parameters, optimiser state, loss
    carried[0], static = eqx.partition(carried[0], eqx.is_array)
    step = make_step(static, settings)

    def call(tokens, targets):  # the next step waits on the device for this one, not on the host
        # Sequences of one document each: no segment ids, which cuDNN does not know.
        carried[:] = step(*carried[:2], {"tokens": tokens, "targets": targets})[:3]
        return carried

    keys = jax.random.split(jax.random.key(1), 4)
    draw = lambda key: jax.random.randint(key, (batch, length), 0, config.vocabulary_size)
    calls = [functools.partial(call, draw(keys[i]), draw(keys[i + 1])) for i in (0, 2)]
    timing = measure(calls, time_jax, samples=options.samples, seconds=options.seconds)
    return timing, float(carried[2])


def is_out_of_memory(error: Exception) -> bool:
    return "RESOURCE_EXHAUSTED" in str(error) or "out of memory" in str(error).lower()


def compare(config: ModelConfig, batch: int, length: int, options: argparse.Namespace) -> dict[str, Any] | None:
    """The timing of each kind of model, or why there is none; None if the batch does not fit one of them."""
    found: dict[str, Any] = {}
    for name, kind in kinds(config, length).items():
        if not any(word in name.lower() for word in options.only.lower().split(",")):
            continue
        try:
            found[name] = kind, time_model(kind, batch, length, options)
        except Exception as error:
            if is_out_of_memory(error) and batch > 1:
                return None
            found[name] = kind, reason(error)
    return found


def parse(arguments: list[str], on_gpu: bool) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m rattn_eqx.training.bench",
        description="Time training steps of language models that differ in their attention. Without a GPU the model is "
        "tiny, and only shows that everything runs.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--shapes", default="8x4096 4x8192" if on_gpu else "2x32", help="batch x length; a batch too large is halved")
    add("--layers", type=int, default=8 if on_gpu else 4, help="of the model, three local to one global")
    add("--window", type=int, default=512 if on_gpu else 8, help="of RATTENTION")
    add("--implementation", default="gpu" if on_gpu else "chunked", help="of our ops")
    add("--plain", default="cudnn" if on_gpu else "ours", choices=["cudnn", "ours"],
        help="whose attention layers without residual branch use")  # fmt: skip
    add("--compute-dtype", default="bfloat16", choices=["bfloat16", "float32"])
    add("--keep-activations", action="store_true", help="do not recompute blocks in the backward pass")
    add("--only", default="", help="kinds of attention whose name holds one of these words, comma-separated")
    add("--samples", type=int, default=7 if on_gpu else 2, help="batches of steps that the median is over")
    add("--seconds", type=float, default=1.0 if on_gpu else 0.0, help="about how long a batch of steps takes")
    add("--out", type=Path, help="file that one JSON object a row is added to")
    add("--commit", help="written beside the numbers; default: what git says")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Run the comparison; returns the exit status."""
    on_gpu = jax.devices()[0].platform == "gpu"
    options = parse(sys.argv[1:] if arguments is None else arguments, on_gpu)
    config = dataclasses.replace(paper_3b if on_gpu else tiny, num_layers=options.layers, window=options.window)
    ceilings = measure_ceilings(on_gpu, samples=options.samples, seconds=0.05 if on_gpu else 0.0)
    about = facts(options.commit) | {"ceilings": dataclasses.asdict(ceilings)}
    save = saver(options.out, about)
    device = jax.devices()[0].device_kind
    stated = next((hardware.flops for name, hardware in hardwares.items() if name in device.lower()), None)
    print(heading(about))
    print(f"width {config.model_width}, {config.num_layers} layers, {options.compute_dtype}, {options.implementation}")
    for shape in options.shapes.split():
        batch, length = (int(size) for size in shape.split("x"))
        while (found := compare(config, batch, length, options)) is None:
            print(f"{batch} x {length} does not fit, half of it instead")
            batch //= 2
        for name, (kind, result) in found.items():
            line = dict(kind="model", attention=name, batch=batch, length=length, config=dataclasses.asdict(kind))
            line |= dict(implementation=options.implementation, plain=options.plain, dtype=options.compute_dtype)
            if isinstance(result, str):
                save(line | {"not available": result})
                print(f"{batch} x {length:5} {name:18} not available: {result}")
                continue
            timing, loss = result
            work, speed = step_flops(kind, batch, length), batch * length / timing.median
            used = {"of the measured": work / timing.median / ceilings.flops}
            used |= {"of the stated": work / timing.median / stated} if stated else {}
            save(line | dataclasses.asdict(timing) | dict(tokens_per_second=speed, flops=work, loss=loss, used=used))
            shown = ", ".join(f"{part:.1%} {which} FLOP/s" for which, part in used.items())
            milliseconds = f"{1e3 * timing.median:9.2f} ms ({', '.join(f'{1e3 * x:.2f}' for x in timing.quartiles)})"
            print(f"{batch} x {length:5} {name:18} {milliseconds} {speed:12,.0f} tokens/s, {shown}; loss {loss:.3f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
