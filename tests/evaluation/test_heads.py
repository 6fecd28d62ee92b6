"""What is read of a head is what its layer computes with: its heads, put together again, are the layer's output."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from small_model import drawn

from pallas import reference
from pallas.numerics import relative_rms
from rattn_eqx.ablation.layer import Departures, ablate
from rattn_eqx.evaluation.heads import Head, attention_inputs, head_inputs, read_head
from rattn_eqx.model.attention import RAttention
from rattn_eqx.model.config import ModelConfig

CONFIG = ModelConfig(
    vocabulary_size=13, model_width=12, num_layers=3, num_heads=4, num_kv_heads=2, head_size=6, feed_forward_width=12,
    window=5, pattern=("local", "global_rope", "global"), feature_map="learned", learned_feature_scale=True,
    feature_projection=True, sinks=True, rope_theta=50.0,
)  # fmt: skip
TOKENS = np.random.default_rng(0).integers(0, 13, 71)  # more than a piece


def output(head: Head, swa_gain, rla_gain):
    """[t, dv] of one head by the definition."""
    one = lambda x: x[:, None]
    t, d = head.q_window.shape
    sink = None if head.sink is None else jnp.asarray([head.sink], jnp.float32)
    window = t if head.window is None else head.window
    near = reference.sliding_window_attention(
        *map(one, (head.q_window, head.k_window, head.v)), window=window, scale=d**-0.5, segment_ids=None,
        sink_logits=sink,
    )  # fmt: skip
    if head.feature_map is None:
        return near[:, 0]
    far, _ = reference.residual_linear_attention(
        *map(one, (head.q, head.k, head.v)), window=window, feature_map=head.feature_map, initial_state=None,
        segment_state=None, segment_ids=None,
    )  # fmt: skip
    gains = (None if swa_gain is None else swa_gain[None], rla_gain[None])
    return reference.normed_sum(near, far, *gains, 1e-6)[:, 0]


@pytest.mark.parametrize("changes", [{}, {"residual": False, "learned_feature_scale": False,
                                          "feature_projection": False}, {"swa_gain": None, "qk_norm": False}],
                         ids=["both branches", "window alone", "as converted"])  # fmt: skip
def test_heads_together_are_the_layers_output(changes):
    model = drawn(dataclasses.replace(CONFIG, **changes), size=0.6)
    inputs = attention_inputs(model, TOKENS)
    for layer, block in enumerate(model.blocks):
        attention = block.attention
        heads = [read_head(model, inputs, layer, head) for head in range(4)]
        gain = lambda name, head, of=attention: None if getattr(of, name, None) is None else getattr(of, name)[head]
        outputs = [output(x, gain("swa_gain", i), gain("rla_gain", i)) for i, x in enumerate(heads)]
        expected = attention(inputs[layer])
        assert relative_rms(attention.projections.merge(jnp.stack(outputs, axis=1)), expected) < 1e-5, layer
        is_local = isinstance(attention, RAttention)
        assert (heads[0].window, heads[0].sink is not None) == (5 if is_local else None, is_local)


def test_the_inputs_are_the_streams_that_the_model_forms():
    model = drawn(CONFIG, size=0.6)
    x = model.embed(jnp.asarray(TOKENS, jnp.int32))
    for block, found in zip(model.blocks, attention_inputs(model, TOKENS), strict=True):
        assert relative_rms(found, block.attention_norm(x)) < 1e-5
        x = block(x)


def test_a_global_layers_residual_inputs_have_neither_norm_nor_positions():
    model = drawn(CONFIG, size=0.6)
    head = head_inputs(model, TOKENS, 1, 3)
    q, k, _ = model.blocks[1].attention.projections.project(attention_inputs(model, TOKENS)[1])
    np.testing.assert_allclose(head.q, q[:, 3], rtol=1e-6)
    np.testing.assert_allclose(head.k, k[:, 1], rtol=1e-6)
    assert relative_rms(head.q_window, head.q) > 0.1


def test_what_is_refused():
    model = drawn(CONFIG, size=0.6)
    for layer in (-1, 3):
        with pytest.raises(ValueError, match=f"^read_head: layer must be 0 to 2; got layer={layer}"):
            head_inputs(model, TOKENS, layer, 0)
    with pytest.raises(ValueError, match=r"^read_head: head must be 0 to 3; got head=4"):
        head_inputs(model, TOKENS, 0, 4)
    with pytest.raises(ValueError, match=r"^read_head: layer 0 must be an RAttention or .* it is a AblatedAttention"):
        head_inputs(ablate(model, Departures(conv_width=2)), TOKENS, 0, 0)
