"""Costs against the paper's figures and against arithmetic done by hand."""

import dataclasses
import itertools
import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas.feature_map import Hedgehog
from rattn_eqx.inference import cost
from rattn_eqx.model.config import ModelConfig
from rattn_eqx.model.language_model import LanguageModel
from rattn_eqx.model.presets import paper_3b, paper_12b, presets

ODD = ModelConfig(
    vocabulary_size=13,
    model_width=6,
    num_layers=5,
    num_heads=4,
    num_kv_heads=2,
    head_size=8,
    feed_forward_width=10,
    window=3,
    pattern=("local", "global"),
    learned_feature_scale=True,
    num_meta_tokens=7,
    tie_embeddings=False,
)


def test_parameters_by_hand():
    projections = 2 * 6 * 4 * 8 + 2 * 6 * 2 * 8 + 2 * 8  # q and out, k and v, qk-norm
    assert cost.parameters_by_part(ODD) == {
        "embedding": 13 * 6,
        "local attention": 3 * (projections + 2 * 4 * 8 + (4 + 2) * 8 + 2 * 7 * 2 * 8),  # gains, scales, meta tokens
        "global attention": 2 * projections,
        "feed-forward": 5 * 3 * 6 * 10,
        "norms": (2 * 5 + 1) * 6,
        "head": 6 * 13,
    }


@pytest.mark.parametrize("config", [ODD, presets["tiny"]], ids=["odd", "tiny"])
def test_no_parameter_is_left_out_or_counted_twice(config):
    model = eqx.filter_eval_shape(LanguageModel, config, key=jax.random.key(0))
    arrays = [leaf for leaf in jax.tree.leaves(model) if isinstance(leaf, jax.ShapeDtypeStruct)]
    assert cost.count_parameters(config) == sum(math.prod(array.shape) for array in arrays)


def test_the_papers_sizes():
    assert cost.count_parameters(paper_3b) == 2_978_373_632
    assert cost.count_parameters(paper_12b) == 12_835_302_400


def test_kv_cache_by_hand():
    per_token = 2 * 2 * 8 * 2  # keys and values, kv heads, size, bytes
    assert cost.kv_cache_bytes(ODD, 100) == (3 * 3 + 2 * 100) * per_token
    assert cost.kv_cache_bytes(ODD, 2) == 5 * 2 * per_token
    assert cost.kv_cache_bytes(ODD, 100, bytes_per_element=4) == 2 * cost.kv_cache_bytes(ODD, 100)
    assert cost.kv_cache_bytes(dataclasses.replace(ODD, window=0), 100) == 2 * 100 * per_token


@pytest.mark.parametrize(("window", "saving"), [(4096, 0.0), (1024, 0.5625), (512, 0.65625)])
def test_the_papers_saving_at_context_4096(window, saving):
    config = dataclasses.replace(paper_12b, window=window)
    assert cost.kv_cache_saving(config, 4096) == saving


def test_states():
    assert cost.state_bytes(paper_12b) == 30 * 8 * 256 * 128 * 4
    assert cost.state_bytes(dataclasses.replace(paper_12b, feature_map="identity")) == 30 * 8 * 128 * 128 * 4
    assert cost.state_bytes(dataclasses.replace(paper_12b, residual=False)) == 0
    assert cost.state_in_tokens(f=256, dv=128, d=128) == 128
    one_token_of_one_head = 2 * 128 * 2
    assert cost.state_bytes(paper_12b) == 30 * 8 * 256 * one_token_of_one_head  # 256 tokens of bfloat16 bytes


CACHES = {
    "odd": {},
    "tiny": dataclasses.asdict(presets["tiny"]),
    "local alone": {"pattern": ("local",), "tie_embeddings": True},
    "global alone": {"pattern": ("global",), "learned_feature_scale": False, "num_meta_tokens": 0},
    "without the residual branch": {"residual": False, "learned_feature_scale": False, "num_meta_tokens": 0},
    "window 0": {"window": 0},
    "rotary global layers": {"pattern": ("local", "global_rope"), "qkv_bias": True},
    "window beyond the length": {"window": 1000},
    "window beyond the length, local alone": {"window": 1000, "pattern": ("local",)},
    "identity": {"feature_map": "identity"},
    "taylor": {"feature_map": "taylor"},
    "hedgehog": {"feature_map": "hedgehog"},
}


@pytest.mark.parametrize("name", CACHES)
def test_the_bytes_of_a_cache_are_those_that_are_held(name):
    changes = dict(CACHES[name])
    learned = changes.get("feature_map") == "hedgehog"
    config = dataclasses.replace(ODD, **({} if learned else changes))
    map_of = (lambda key: Hedgehog(config.head_size, key=key)) if learned else None
    shapes = eqx.filter_eval_shape(LanguageModel, config, feature_map=map_of, key=jax.random.key(0))
    zeros = lambda x: jnp.zeros(x.shape, x.dtype) if isinstance(x, jax.ShapeDtypeStruct) else x
    model = jax.tree.map(zeros, shapes)
    for dtype, length in itertools.product(("float32", "bfloat16"), (1, 40)):
        cache = model.init_cache(config.room(length), dtype)
        held = sum(np.asarray(x).nbytes for x in jax.tree.leaves(cache))
        assert cost.cache_bytes(config, length, dtype=dtype) == held == cache.num_bytes


def test_the_bytes_of_a_cache_by_hand():
    keys_and_values = 2 * 2 * 8 * 2  # each, kv heads, size, bytes
    state, length = 2 * 16 * 8 * 4, 4
    local = 3 * keys_and_values + 3 * 2 * 8 * 2 + state + length  # keys once more, for the residual branch
    assert cost.cache_bytes(ODD, 100) == 3 * local + 2 * (100 * keys_and_values + length) + 4  # a segment id
    of_window = 100 * keys_and_values + length
    without = dataclasses.replace(ODD, window=500, residual=False, learned_feature_scale=False, num_meta_tokens=0)
    assert cost.cache_bytes(without, 100) == 5 * of_window + 4
    local_alone = dataclasses.replace(ODD, pattern=("local",))
    assert cost.cache_bytes(local_alone, 2) == cost.cache_bytes(local_alone, 10**9) == 5 * local + 4
    with pytest.raises(ValueError, match="cache_bytes: context must be at least 1; got context=0"):
        cost.cache_bytes(ODD, 0)


def test_step_time_by_hand():
    machine = cost.Hardware("by hand", memory_bandwidth=1000.0, flops=4000.0)
    parameters = 2 * 13 * 6 + 3 * (592 + 64 + 48 + 224) + 2 * 592 + 900 + 66
    time = cost.step_time(ODD, 5, 100, machine)
    assert time.cache == pytest.approx(5 * 209 * 64 * 2 / 2 / 1000)
    assert time.weights == pytest.approx(2 * 5 * parameters / 4000)
    assert time.weights_limit == "compute"
    assert time.total == time.cache + time.weights

    alone = cost.step_time(ODD, 3, 1, machine)
    assert alone.weights == pytest.approx(2 * parameters / 1000)
    assert (alone.weights_limit, alone.larger) == ("bandwidth", "weights")
    state = 3 * 2 * 16 * 8 * 4
    with_state = cost.step_time(ODD, 3, 1, machine, include_state=True)
    assert with_state.cache - alone.cache == pytest.approx(3 * 2 * state / 1000)


@pytest.mark.parametrize("config", [paper_3b, paper_12b], ids=["3b", "12b"])
def test_the_papers_limit_over_a_window_of_4096(config):
    """At context 16384, 3 x 512 + 16384 tokens in place of 3 x 4096 + 16384: 1.6 for any size with this pattern."""
    baseline = dataclasses.replace(config, window=4096, residual=False)

    def times(batch):
        return [cost.step_time(x, batch, 16384, cost.h100) for x in (baseline, config)]

    speedups = [times(batch)[0].total / times(batch)[1].total for batch in (1, 8, 64, 512)]
    assert math.isclose(times(512)[0].cache / times(512)[1].cache, 1.6)
    assert speedups == sorted(speedups)
    assert speedups[0] < 1.05
    # The products with the parameters, the same for both, keep the whole step somewhat below the cache's limit.
    assert speedups[-1] == pytest.approx({paper_3b: 1.577, paper_12b: 1.536}[config], abs=1e-3)


def test_the_table_shows_what_the_functions_say():
    table = cost.describe_cost(paper_12b, context=4096, batch=64, hardware=cost.h100)
    rows = {line[:14].strip(): line for line in table.splitlines()}
    time = cost.step_time(paper_12b, 64, 4096, cost.h100)
    for name, words in {
        "parameters": ["12,835,302,400", "25.67 GB"],
        "feed-forward": ["10,066,329,600", "78.4%"],
        "local": ["30", "window 512"],
        "global": ["10"],
        "saved": ["65.6%"],
        "keys, values": ["230.7 MB"],
        "as held": [f" {cost.cache_bytes(paper_12b, 4096):,} B"],
        "states": ["31.46 MB", "128 tokens"],
        "a step of 64": [f"{1e3 * time.total:.3g} ms", "h100"],
        "weights": ["bandwidth"],
    }.items():
        assert all(word in rows[name] for word in words), rows[name]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((ODD, 0, 10, cost.h100), "step_time: batch must be at least 1; got batch=0"),
        ((ODD, 1, 0, cost.h100), "context=0"),
    ],
)
def test_sizes_out_of_range(arguments, message):
    with pytest.raises(ValueError, match=message):
        cost.step_time(*arguments)


def test_matrices_are_most_of_the_parameters():
    for name, config in presets.items():
        assert 0.98 < cost.num_weights(config) / cost.count_parameters(config) <= 1, name
    untied = dataclasses.replace(presets["tiny"], tie_embeddings=False)
    assert 0.98 < cost.num_weights(untied) / cost.count_parameters(untied) <= 1
    with pytest.raises(ValueError, match=r"all must fit in memory, .* GB; got at least 1e\+06 GB; give less"):
        cost.require_memory("all", 10**15, "give less")
