"""Modules and configs tell a user's mistakes by name, before anything is computed."""

import dataclasses
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from test_modules import CONFIG, SIZES

from pallas.feature_map import Hedgehog
from rattn_eqx.ablation.layer import Departures, ablate
from rattn_eqx.model.attention import GlobalAttention, RAttention
from rattn_eqx.model.block import Block
from rattn_eqx.model.feed_forward import FeedForward
from rattn_eqx.model.language_model import LanguageModel
from rattn_eqx.model.norm import RMSNorm
from rattn_eqx.model.projections import Projections
from rattn_eqx.model.rotary import rotary

X, IDS, IDS_OF_3 = jnp.ones((5, 8)), jnp.zeros(5, jnp.int32), jnp.zeros(3, jnp.int32)


@pytest.mark.parametrize(
    ("build", "arguments", "named"),
    [
        (lambda key: RAttention(8, **SIZES, window=2, key=key), (X[None],), "x"),
        (lambda key: RAttention(8, **SIZES, window=2, key=key), (jnp.ones((5, 8), jnp.int32),), "x"),
        (lambda key: RAttention(8, **SIZES, window=2, key=key), (X, IDS_OF_3), "segment_ids"),
        (lambda key: RAttention(8, **SIZES, window=2, key=key), (jnp.ones((5, 9)),), "x"),
        (lambda key: GlobalAttention(8, **SIZES, key=key), (jnp.ones((5, 9)),), "x"),
        (lambda key: FeedForward(8, 12, key=key), (jnp.ones((5, 9)),), "x"),
        (lambda key: RMSNorm(8), (jnp.ones((5, 9)),), "x"),
        (lambda key: Hedgehog(8, key=key), (jnp.ones((5, 9)),), "x"),
        (lambda key: Block(CONFIG, "local", key=key), (jnp.ones((5, CONFIG.model_width + 1)),), "x"),
        (lambda key: Block(CONFIG, "global", key=key), (X[None],), "x"),
        (lambda key: Block(CONFIG, "local", key=key), (X, X[:, 0]), "segment_ids"),
        (lambda key: LanguageModel(CONFIG, key=key), (IDS[None],), "tokens"),
        (lambda key: LanguageModel(CONFIG, key=key), (X[:, 0],), "tokens"),
        (lambda key: LanguageModel(CONFIG, key=key), (IDS, IDS_OF_3), "segment_ids"),
    ],
)
def test_wrong_ranks_widths_and_dtypes_are_named(build, arguments, named):
    module = eqx.filter_eval_shape(build, jax.random.key(0))
    with pytest.raises(jaxtyping.TypeCheckError, match=f"The problem arose whilst typechecking parameter '{named}'"):
        eqx.filter_eval_shape(module, *arguments)


@pytest.mark.parametrize(
    ("method", "arguments", "named"),
    [
        ("project", (jnp.ones((5, 9)),), "x"),
        ("norm", (jnp.ones((5, 4, 3)), jnp.ones((5, 2, 4))), "q"),
        ("norm", (jnp.ones((5, 4, 4)), jnp.ones((5, 2, 3))), "k"),
        ("merge", (jnp.ones((5, 3, 4)),), "heads"),
        ("merge", (jnp.ones((5, 4, 3)),), "heads"),
    ],
)
def test_a_wrong_size_is_named_in_every_projection(method, arguments, named):
    projections = Projections(8, 4, 2, 4, qk_norm=True, key=jax.random.key(0))
    with pytest.raises(jaxtyping.TypeCheckError, match=f"whilst typechecking parameter '{named}'"):
        getattr(projections, method)(*arguments)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": 3}, "num_heads must be a multiple of num_kv_heads; got 3 and 2"),
        ({"window": -1}, "window must be at least 0.*; got window=-1"),
        ({"window": 0, "residual": False}, "at least 1 without the residual branch; got window=0, residual=False"),
        ({"residual": False, "learned_scale": True}, "residual branch; got residual=False, learned_scale=True"),
        ({"residual": False, "num_meta_tokens": 2}, "belong to the residual branch.*num_meta_tokens=2"),
    ],
)
def test_options_that_do_not_fit_together(options, message):
    with pytest.raises(ValueError, match=message):
        RAttention(8, **(SIZES | {"window": 2} | options), key=jax.random.key(0))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"window": -3}, "window must be at least 0; got window=-3"),
        ({"num_heads": 0}, "num_heads must be at least 1; got 0"),
        ({"num_layers": 0}, "num_layers must be at least 1; got 0"),
        ({"feed_forward_width": -1}, "feed_forward_width must be at least 1; got -1"),
        (
            {"num_heads": 3, "num_kv_heads": 2},
            "num_heads must be a multiple of num_kv_heads; got num_heads=3, num_kv_heads=2",
        ),
        ({"gate": "relu"}, "gate must be 'gelu' or 'silu'; got 'relu'"),
        ({"feature_map": "sofmax"}, "feature_map must be one of softmax, .*; got 'sofmax'"),
        ({"head_size": 3}, "head_size must be even"),
        ({"norm_eps": -1e-6}, "norm_eps must be at least 0; got -1e-06"),
        ({"embedding_scale": "1"}, "embedding_scale must be a finite number or nothing; got '1'"),
        ({"rope_scaling": 8.0}, "rope_scaling must be RopeScaling; got 8.0"),
    ],
)
def test_a_config_that_cannot_be_built_is_refused(changes, message):
    with pytest.raises(ValueError, match=f"^ModelConfig: {message}"):
        dataclasses.replace(CONFIG, **changes)


def test_whole_numbers_are_numbers():
    config = dataclasses.replace(CONFIG, rope_theta=10_000, swa_gain=1, rla_gain=0)
    model = eqx.filter_eval_shape(LanguageModel, config, key=jax.random.key(0))
    assert eqx.filter_eval_shape(model, IDS).shape == (5, config.vocabulary_size)
    x = jnp.asarray([[[1.0, 2.0, 3.0, 4.0]]])
    assert jnp.array_equal(RMSNorm(4, eps=0)(x), RMSNorm(4, eps=0.0)(x))
    position = jnp.asarray([3])
    assert jnp.array_equal(rotary(x, position, theta=10_000), rotary(x, position, theta=1e4))
    layer = RAttention(8, **SIZES, window=2, rope_theta=10_000, swa_gain=1, rla_gain=0, key=jax.random.key(0))
    assert layer(X).dtype == jnp.float32


@pytest.mark.parametrize(
    ("module", "numbers"),
    [
        (RAttention, {"model_width": 8, **SIZES, "window": 2, "rla_gain": 0.5}),
        (GlobalAttention, {"model_width": 8, **SIZES}),
        (FeedForward, {"model_width": 8, "width": 12}),
        (Hedgehog, {"head_size": 4}),
        (RMSNorm, {"size": 8, "eps": 0.5}),
    ],
)
def test_numpys_numbers_are_numbers(module, numbers):
    of_numpy = {name: np.int64(x) if isinstance(x, int) else np.float32(x) for name, x in numbers.items()}
    key: dict[str, Any] = {} if module is RMSNorm else {"key": jax.random.key(0)}
    assert eqx.tree_equal(module(**of_numpy, **key), module(**numbers, **key), typematch=True)


@pytest.mark.parametrize("name", ["model_width", "window", "feature_map", "rla_gain", "key"])
def test_another_type_is_told_in_one_line(name):
    model = LanguageModel(CONFIG, key=jax.random.key(0))
    options: dict[str, Any] = {"model_width": 8, "window": 2, "key": jax.random.key(0), **SIZES}
    options[name] = 3 if name == "feature_map" else model
    with pytest.raises(jaxtyping.TypeCheckError, match=f"typechecking parameter '{name}'") as told:
        RAttention(**options)
    assert "\n" not in str(told.value)
    assert len(str(told.value)) < 600


@pytest.mark.parametrize("departures", [{}, {"num_valued_sinks": 2, "conv_width": 3}, {"decay_gate": True}])
def test_parameters_are_float32_where_float64_is_enabled(departures):
    config = dataclasses.replace(CONFIG, feature_map="learned", tie_embeddings=False)
    config = dataclasses.replace(config, num_meta_tokens=0) if "decay_gate" in departures else config
    if not departures:
        config = dataclasses.replace(config, sinks=True, swa_gain=None, feature_projection=True)

    def build():
        return ablate(LanguageModel(config, key=jax.random.key(0)), Departures(**departures))

    plain = build()
    with jax.enable_x64(True):
        wide = build()
        assert eqx.filter_eval_shape(wide, jnp.zeros(5, jnp.int32)).dtype == jnp.float32
    parameters = jax.tree.leaves(eqx.filter(wide, eqx.is_array))
    assert {x.dtype for x in parameters} == {jnp.dtype("float32")}
    for x, y in zip(parameters, jax.tree.leaves(eqx.filter(plain, eqx.is_array)), strict=True):
        np.testing.assert_array_equal(x, y)


def test_a_feature_map_without_a_residual_branch_is_refused():
    config = dataclasses.replace(CONFIG, residual=False, learned_feature_scale=False, num_meta_tokens=0)
    with pytest.raises(ValueError, match=r"^LanguageModel: feature_map belongs to the residual branch"):
        LanguageModel(config, feature_map=lambda key: Hedgehog(4, key=key), key=jax.random.key(0))
