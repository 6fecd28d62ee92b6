"""What one head of a model reads: the queries, keys and values of both branches, for a text."""

import dataclasses

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Integer

from pallas.checked import checked
from pallas.feature_map import FeatureMap
from rattn_eqx.model.attention import GlobalAttention, RAttention
from rattn_eqx.model.language_model import LanguageModel

PIECE = 64  # tokens: texts are filled up to a multiple, so that few lengths are compiled


@checked
@dataclasses.dataclass(frozen=True)
class Head:
    """One query head and the key/value head that it reads, of one layer, for t tokens of one document, in float32.

    `q_window`, `k_window`: what the window's branch multiplies, with qk-norm and rotary positions; its logits are their
    products over sqrt(d). `q`, `k`: what the residual branch's map is given, with the layer's learned matrices and
    scales, without norm and positions. `v`: the values of both.

    `window`: of a local layer, None of a global one, which sees all. `feature_map`: the residual branch's, None without
    one. A global layer's `q`, `k` are what a residual branch in its place would begin with. `sink`: the logit without a
    value in the window's softmax, or None. `meta_tokens`: whether the state begins with learned pairs, which are no
    tokens of the text.
    """

    q_window: Float[Array, "t d"]
    k_window: Float[Array, "t d"]
    q: Float[Array, "t d"]
    k: Float[Array, "t d"]
    v: Float[Array, "t dv"]
    window: int | None
    feature_map: FeatureMap | None
    sink: float | None
    meta_tokens: bool


@checked
def attention_inputs(model: LanguageModel, tokens: Integer[np.ndarray, "t"]) -> tuple[Float[Array, "t m"], ...]:
    """The normed stream that each layer's attention reads, from the first layer to the last, for one document."""
    t = len(tokens)
    filled = np.zeros(-(-t // PIECE) * PIECE, np.int32)  # what stands after a token does not reach it
    filled[:t] = tokens
    return tuple(x[:t] for x in _inputs_of_layers(model, jnp.asarray(filled)))


@checked
def read_head(model: LanguageModel, inputs: tuple[Float[Array, "t m"], ...], layer: int, head: int) -> Head:
    """The head of a layer, both counted from 0, for what `attention_inputs` gives.

    Raises:
      ValueError: no such layer or head, or a layer of another kind, such as an ablated one.
    """
    if not 0 <= layer < len(model.blocks):
        raise ValueError(f"read_head: layer must be 0 to {len(model.blocks) - 1}; got layer={layer}")
    attention = model.blocks[layer].attention
    if type(attention) not in (RAttention, GlobalAttention):
        raise ValueError(
            f"read_head: layer {layer} must be an RAttention or a GlobalAttention; it is a {type(attention).__name__}; "
            "choose another layer or model"
        )
    projections = attention.projections
    num_heads, num_kv_heads = projections.query_weight.shape[1], projections.key_weight.shape[1]
    if not 0 <= head < num_heads:
        raise ValueError(f"read_head: head must be 0 to {num_heads - 1}; got head={head}")
    q_window, k_window, q, k, v = _of_heads(attention, inputs[layer])
    of_keys = head // (num_heads // num_kv_heads)
    local = attention if isinstance(attention, RAttention) else None
    of = lambda number, *arrays: [x[:, number].astype(jnp.float32) for x in arrays]
    (q_window, q), (k_window, k, v) = of(head, q_window, q), of(of_keys, k_window, k, v)
    return Head(
        q_window,
        k_window,
        q,
        k,
        v,
        window=None if local is None else local.window,
        feature_map=None if local is None or local.rla_gain is None else local.feature_map,
        sink=None if local is None or local.sink_logits is None else float(local.sink_logits[head]),
        meta_tokens=local is not None and local.meta_tokens is not None,
    )


def head_inputs(model: LanguageModel, tokens: Integer[np.ndarray, "t"], layer: int, head: int) -> Head:
    """`read_head` for these tokens."""
    return read_head(model, attention_inputs(model, tokens), layer, head)


@eqx.filter_jit
def _inputs_of_layers(model: LanguageModel, tokens: Int[Array, "t"]) -> list[Array]:
    x, inputs = model.embed(tokens), []
    for block in model.blocks:
        inputs.append(block.attention_norm(x))
        x = block(x)
    return inputs


@eqx.filter_jit
def _of_heads(attention: RAttention | GlobalAttention, x: Array) -> tuple[Array, Array, Array, Array, Array]:
    if isinstance(attention, RAttention):
        return attention.inputs(x)
    q_window, k_window, v = attention.inputs(x)
    q, k, _ = attention.projections.project(x)
    return q_window, k_window, q, k, v
