"""The gated feed-forward network of a block."""

from typing import Literal

import equinox as eqx
import jax
from jaxtyping import Array, Float, PRNGKeyArray

from pallas.checked import checked
from rattn_eqx.model.initialise import truncated_normal

Gate = Literal["gelu", "silu"]


@checked
class FeedForward(eqx.Module):
    """down(gate(x) * up(x)): GeGLU with gate "gelu", SwiGLU with "silu" (Shazeer, arXiv 2002.05202). No biases."""

    gate_weight: Float[Array, "m w"]
    up_weight: Float[Array, "m w"]
    down_weight: Float[Array, "w m"]
    gate: Gate = eqx.field(static=True)

    def __init__(self, model_width: int, width: int, gate: Gate = "gelu", *, key: PRNGKeyArray):
        keys = jax.random.split(key, 3)
        self.gate_weight = truncated_normal(keys[0], (model_width, width), model_width)
        self.up_weight = truncated_normal(keys[1], (model_width, width), model_width)
        self.down_weight = truncated_normal(keys[2], (width, model_width), width)
        self.gate = gate

    @checked
    def __call__(
        self, x: Float[Array, "t {self.gate_weight.shape[0]}"]
    ) -> Float[Array, "t {self.gate_weight.shape[0]}"]:
        """Each token by itself, in x's dtype."""
        activation = jax.nn.gelu if self.gate == "gelu" else jax.nn.silu
        gate, up, down = (w.astype(x.dtype) for w in (self.gate_weight, self.up_weight, self.down_weight))
        return (activation(x @ gate) * (x @ up)) @ down
