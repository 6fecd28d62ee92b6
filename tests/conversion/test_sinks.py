"""Sinks are fitted to what a layer gave, and where they begin is the best of the grid."""

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from test_conversion import IDS, TOKENS, pair

from rattn_eqx.conversion import sinks
from rattn_eqx.conversion.sinks import fit_sinks
from rattn_eqx.conversion.verdict import window_imposed
from rattn_eqx.model.attention import RAttention
from rattn_eqx.model.local_layers import with_sinks, with_window


def test_no_sink_of_the_grid_gives_more_of_what_a_head_gave(monkeypatch):
    monkeypatch.setattr(sinks, "GRID", np.arange(-6.0, 4.5, 0.5).astype(np.float32))
    teacher, model = pair(window=5)
    fitted = fit_sinks(model, jnp.asarray(TOKENS), jnp.asarray(IDS))
    whole_window = with_window(window_imposed(model), 40)  # the old layers, of the same type
    errors = {value: np.zeros((3, 2)) for value in sinks.GRID}  # of layers and heads
    for tokens, ids in zip(TOKENS, jnp.asarray(IDS), strict=True):
        x, layer = teacher.embed(jnp.asarray(tokens)), 0
        for old, new, full in zip(teacher.blocks, model.blocks, whole_window.blocks, strict=True):
            if isinstance(new.attention, RAttention):
                normed = old.attention_norm(x)
                heads = lambda layer, normed=normed, ids=ids: layer.attend(*layer.inputs(normed), ids)
                whole = np.asarray(heads(full.attention))
                for value in sinks.GRID:
                    with_it = eqx.tree_at(lambda x: x.sink_logits, new.attention, jnp.full((2,), value))
                    errors[value][layer] += np.square(np.asarray(heads(with_it)) - whole).sum(axis=(0, 2))
                layer += 1
            x = old(x, ids)
    best = sinks.GRID[np.argmin([errors[value] for value in sinks.GRID], axis=0)]
    found = []
    with_sinks(fitted, lambda number, logits: found.append(np.asarray(logits)) or logits)
    np.testing.assert_array_equal(found, best)
    assert len(set(best.ravel())) > 2
    assert np.abs(best).max() < 6
