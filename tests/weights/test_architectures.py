"""Models of other libraries are ours: their logits, their files out again to the bit, and their caches."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas.numerics import relative_rms
from rattn_eqx.model.config import ModelConfig
from rattn_eqx.model.language_model import LanguageModel
from rattn_eqx.model.rotary import RopeScaling
from rattn_eqx.weights import architectures, hugging_face, own
from rattn_eqx.weights.load import load

FIXTURES = Path(__file__).parent / "fixtures"
NAMES = ("llama", "mistral", "qwen2", "qwen3", "smollm3")
KINDS = {
    "llama": ("global_rope",) * 3,
    "mistral": ("local",) * 3,
    "qwen2": ("global_rope", "local", "local"),
    "qwen3": ("global_rope",) * 3,
    "smollm3": ("global_rope", "global", "global_rope"),
}
BOUND = 2e-5


def expected(name: str) -> tuple[jax.Array, np.ndarray]:
    with np.load(FIXTURES / name / "expected.npz") as stored:
        return jnp.asarray(stored["tokens"]), stored["logits"]


def folder_of(name: str) -> dict:
    """Everything that a folder says: config, and bytes, shape and dtype of each tensor."""
    foreign = hugging_face.read(FIXTURES / name)
    return {"config": foreign.config, "tensors": tensors_of(foreign)}


def tensors_of(foreign) -> dict[str, tuple]:
    arrays = {key: foreign.read(key) for key in foreign.shapes}
    return {key: (str(x.dtype), x.shape, x.tobytes()) for key, x in arrays.items()}


@pytest.mark.parametrize("name", NAMES)
def test_the_logits_are_those_of_transformers_and_of_a_cache(name):
    tokens, logits = expected(name)
    model, tokenizer, config = load(FIXTURES / name)
    assert tokenizer is None
    assert config.layer_kinds == KINDS[name]
    assert {str(x.dtype) for x in jax.tree.leaves(eqx.filter(model, eqx.is_array))} == {"float32"}
    whole = eqx.filter_jit(model)(tokens)
    errors = [relative_rms(ours, theirs) for ours, theirs in zip(whole, logits, strict=True)]
    assert max(errors) < BOUND, int(np.argmax(errors))
    step, cache, found = eqx.filter_jit(model.decode_step), model.init_cache(len(tokens)), []
    stream, cache = model.extend(tokens[:17], cache)
    found = [model.logits(stream)]
    for token in tokens[17:]:
        one, cache = step(token, cache)
        found.append(one[None])
    assert relative_rms(jnp.concatenate(found), logits) < BOUND


@pytest.mark.parametrize("name", NAMES)
def test_a_model_goes_out_as_it_came_and_in_again(name, tmp_path):
    there = folder_of(name)
    model, _, _ = load(FIXTURES / name, dtype="stored")
    sharded: dict[str, Any] = {"max_shard_bytes": 60_000} if name == "llama" else {}
    texts: dict[str, Any] = {"tokenizer": '{"a": "\u00e9"}', "chat_template": "{{ messages }}"}
    hugging_face.save(model, tmp_path / "out", there["config"], **sharded, **texts)
    again = hugging_face.read(tmp_path / "out")
    assert tensors_of(again) == there["tensors"]
    assert again.config == there["config"]
    assert (again.tokenizer, again.chat_template) == (*texts.values(),)
    files = {path.name for path in (tmp_path / "out").glob("*.safetensors")}
    assert files == {path.name for path in (FIXTURES / name).glob("*.safetensors")}
    hugging_face.save(model, tmp_path / "by_name", name)  # a config made of ours means the same
    described = hugging_face.read(tmp_path / "by_name").config
    assert architectures.model_config(described) == model.config
    own.save(model, tmp_path / "own", origin={"hugging_face": there["config"]})
    back, _, config = load(tmp_path / "own", dtype="stored")
    assert config == model.config
    assert eqx.tree_equal(back, model)
    assert load(tmp_path / "own")[0].embedding.dtype == jnp.float32


def test_dtypes_by_name():
    wide, narrow = (load(FIXTURES / "mistral", dtype=dtype)[0] for dtype in (None, "bfloat16"))
    assert (wide.compute_dtype, narrow.compute_dtype) == ("float32", "bfloat16")
    pairs = zip(*(jax.tree.leaves(eqx.filter(model, eqx.is_array)) for model in (wide, narrow)), strict=True)
    assert all(jnp.array_equal(a, b.astype(jnp.float32)) for a, b in pairs)
    assert narrow.embedding.dtype == jnp.bfloat16
    mixed, _, _ = load(FIXTURES / "mistral", compute_dtype="bfloat16")
    assert (mixed.compute_dtype, str(mixed.embedding.dtype)) == ("bfloat16", "float32")
    tokens, logits = expected("mistral")
    assert relative_rms(eqx.filter_jit(narrow)(tokens), logits) < 0.05
    for given in ("float8", "stored"):
        with pytest.raises(ValueError, match=f"load: compute_dtype must be one of 'float32', .*; got '{given}'"):
            load(FIXTURES / "mistral", compute_dtype=given)
    with pytest.raises(ValueError, match=r"load: dtype must be one of 'float32', .*, 'stored', or None; got 'float8'"):
        load(FIXTURES / "mistral", "float8")


def changed(name: str, **changes) -> ModelConfig:
    config = json.loads((FIXTURES / name / "config.json").read_text()) | changes
    return architectures.model_config({key: value for key, value in config.items() if value != "absent"})


def test_configs_of_every_version_and_what_they_leave_out():
    scaling = {"type": "llama3", "factor": 8, "low_freq_factor": 1, "high_freq_factor": 4}
    scaling["original_max_position_embeddings"] = 8192
    assert changed("llama", rope_scaling=scaling).rope_scaling == RopeScaling(8, 1, 4, 8192)
    assert changed("llama", rope_scaling=None).rope_scaling is None
    assert changed("llama", rope_theta="absent", rope_scaling=None).rope_theta == 1e4
    assert changed("qwen3", rope_parameters={"rope_type": "default", "rope_theta": 3.0}).rope_theta == 3.0
    assert changed("llama", num_key_value_heads=None).num_kv_heads == 4
    assert changed("llama", head_dim=None).head_size == 8
    assert changed("qwen3", head_dim="absent").head_size == 128
    assert changed("smollm3", tie_word_embeddings="absent").tie_embeddings
    assert not changed("qwen3", tie_word_embeddings="absent").tie_embeddings
    assert changed("mistral", sliding_window=None).pattern == ("global_rope",)
    assert changed("mistral", sliding_window="absent").window == 4096
    qwen = changed("qwen2", layer_types="absent", max_window_layers=2)
    assert (qwen.layer_kinds, qwen.window, qwen.residual) == (("global_rope", "global_rope", "local"), 5, False)
    assert changed("qwen2", use_sliding_window=False).pattern == ("global_rope",)
    every = changed("smollm3", num_hidden_layers=8, no_rope_layers="absent", layer_types="absent")
    assert every.pattern == ("global_rope", "global_rope", "global_rope", "global")


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("llama", {"model_type": "gpt2"}, "model_type must be one of llama, .*; it is 'gpt2'"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act must be 'silu'.*; it is 'gelu'"),
        ("llama", {"attention_bias": True}, "attention_bias must be False"),
        ("smollm3", {"mlp_bias": True}, "mlp_bias must be False"),
        ("llama", {"quantization_config": {"bits": 4}}, "quantization_config must be None"),
        ("llama", {"rope_scaling": {"type": "yarn", "factor": 4.0}}, "must be of rope_type 'default' or 'llama3'"),
        ("llama", {"rope_scaling": {"rope_type": "llama3", "factor": 4.0}}, "must have low_freq_factor, high_freq"),
        ("llama", {"rope_scaling": 4}, "rope_scaling must be an object; it is 4"),
        ("qwen2", {"layer_types": ["full_attention"]}, "layer_types must say .* of each of 3 layers"),
        ("smollm3", {"use_sliding_window": True, "sliding_window": 8, "layer_types": "absent"}, "have no positions"),
        ("smollm3", {"no_rope_layers": [1]}, "no_rope_layers must have a number for each of 3 layers"),
        ("llama", {"hidden_size": "absent"}, "hidden_size must be a whole number from 1 on; it is None"),
        ("llama", {"vocab_size": True}, "vocab_size must be a whole number from 1 on; it is True"),
        ("llama", {"num_hidden_layers": 2**30}, "num_hidden_layers must be at most 4,096"),
        ("llama", {"num_key_value_heads": 3}, "num_heads must be a multiple of num_kv_heads"),
        ("llama", {"rms_norm_eps": "1e-5"}, "norm_eps must be a finite number; got '1e-5'"),
        ("llama", {"rope_theta": 0}, "rope_theta must be a number above 0"),
    ],
)
def test_what_no_model_of_ours_computes_is_named(name, changes, message):
    with pytest.raises(ValueError, match=message):
        changed(name, **changes)


def test_a_missing_an_extra_and_a_misshapen_tensor_are_named():
    there = hugging_face.read(FIXTURES / "qwen2")
    shapes = dict(there.shapes)
    key, shape = "model.layers.1.self_attn.k_proj.bias", shapes["model.norm.weight"]
    missing = {name: size for name, size in shapes.items() if name != key}
    for changes, message in (
        (missing, f"{key} is missing"),
        (
            shapes | {"model.layers.0.self_attn.o_proj.bias": (32,)},
            r"'model.layers.0.self_attn.o_proj.bias' is of no kn",
        ),
        (shapes | {"model.norm.weight": (31,)}, r"model.norm.weight must be \[32\], and is \[31\]"),
        (shapes | {"lm_head.weight": shape}, "lm_head.weight must be model.embed_tokens.weight"),
        ({"model.norm.weight": shape}, "must have tensors for 3 layers; it has 1 tensors in all"),
    ):
        with pytest.raises(ValueError, match=message) as refusal:
            hugging_face.model_of(dataclasses.replace(there, shapes=changes))
        assert str(there.source) in str(refusal.value)


def test_a_tied_head_may_stand_there_twice_and_a_buffer_of_old():
    there = hugging_face.read(FIXTURES / "smollm3")
    embedding = "model.embed_tokens.weight"
    shapes = there.shapes | {"lm_head.weight": there.shapes[embedding]}
    shapes["model.layers.0.self_attn.rotary_emb.inv_freq"] = (4,)
    read = lambda name: there.read(embedding if name == "lm_head.weight" else name)
    model = hugging_face.model_of(dataclasses.replace(there, shapes=shapes, read=read))
    assert eqx.tree_equal(model, load(FIXTURES / "smollm3")[0])
    wrong = lambda name: there.read(embedding) * np.float32(1 + (name == "lm_head.weight"))
    with pytest.raises(ValueError, match=r"lm_head.weight must be model.embed_tokens.weight, to which .* ties it"):
        hugging_face.model_of(dataclasses.replace(there, shapes=shapes, read=wrong))


def test_a_model_of_8b_is_mapped_without_memory():
    config = dict(
        model_type="llama",
        vocab_size=128_256,
        hidden_size=4096,
        intermediate_size=14_336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        rope_theta=5e5,
    )
    table = architectures.tensors(architectures.model_config(config))
    assert len(table) == 3 + 32 * 9
    shapes = {name: tensor.shape for name, tensor in table.items()}
    assert sum(int(np.prod(shape)) for shape in shapes.values()) == 8_030_261_248
    assert shapes["model.layers.31.self_attn.k_proj.weight"] == (1024, 4096)
    assert shapes["model.layers.0.mlp.down_proj.weight"] == (4096, 14_336)
    there = dataclasses.replace(hugging_face.read(FIXTURES / "llama"), config=config, shapes=shapes)
    model, _ = hugging_face.matched(there)
    assert (model.head_size, model.num_layers, model.tie_embeddings) == (128, 32, False)


def test_a_converted_model_is_no_checkpoint_of_another_library(tmp_path):
    model, _, config = load(FIXTURES / "llama")
    converted = dataclasses.replace(config, pattern=("local", "global_rope", "local"), window=4, residual=True)
    drawn = LanguageModel(converted, key=jax.random.key(0))
    for described in (json.loads((FIXTURES / "llama" / "config.json").read_text()), "llama"):
        with pytest.raises(ValueError, match=r"must be an unchanged one of llama; it has residual=True, .*own.save"):
            hugging_face.save(drawn, tmp_path / "out", described)
    own.save(drawn, tmp_path / "own")
    assert eqx.tree_equal(load(tmp_path / "own")[0], drawn)
    with pytest.raises(ValueError, match="must not exist yet"):
        own.save(drawn, tmp_path / "own")
    other = eqx.tree_at(lambda m: m.blocks[0].attention, drawn, model.blocks[0].attention)
    with pytest.raises(
        ValueError, match=r"the model's layers must be those of its config; blocks.0.attention.* is another"
    ):
        own.save(other, tmp_path / "other")
    mapped = LanguageModel(converted, feature_map=lambda key: jnp.exp, key=jax.random.key(0))
    with pytest.raises(ValueError, match="the model's feature maps must be that of its config, softmax"):
        own.save(mapped, tmp_path / "mapped")
