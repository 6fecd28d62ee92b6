"""Small GGUF files, written by the `gguf` package from tensors in Hugging Face's layout."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np

SIZES = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=32)
SIZES |= dict(intermediate_size=96, vocab_size=320)
KEYS = {  # of the metadata, by Hugging Face's name
    "hidden_size": "embedding_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "intermediate_size": "feed_forward_length",
    "max_position_embeddings": "context_length",
}
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def tensors(architecture: str) -> dict[str, np.ndarray]:
    """Random tensors of a model, by Hugging Face's names and in its layout."""
    width, inner, heads, kv, size = 64, 96, 4, 2, 32
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (320, width), "model.norm.weight": (width,)}
    for layer in range(2):
        of = lambda name, layer=layer: f"model.layers.{layer}.{name}"
        shapes |= {of("input_layernorm.weight"): (width,), of("post_attention_layernorm.weight"): (width,)}
        shapes |= {of("mlp.gate_proj.weight"): (inner, width), of("mlp.up_proj.weight"): (inner, width)}
        shapes |= {of("mlp.down_proj.weight"): (width, inner), of("self_attn.o_proj.weight"): (width, heads * size)}
        for name, rows in {"q_proj": heads * size, "k_proj": kv * size, "v_proj": kv * size}.items():
            shapes[of(f"self_attn.{name}.weight")] = (rows, width)
            if architecture == "qwen2":
                shapes[of(f"self_attn.{name}.bias")] = (rows,)
        if architecture == "qwen3":
            shapes |= {of(f"self_attn.{name}_norm.weight"): (size,) for name in "qk"}
    if architecture == "qwen2":
        shapes["lm_head.weight"] = (320, width)
    generator = np.random.default_rng(0)
    return {name: generator.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def gguf_name(name: str) -> str:
    stem, kind = name.rsplit(".", 1)
    if stem.startswith("model.layers."):
        _, _, layer, part = stem.split(".", 3)
        return f"blk.{layer}.{NAMES[part]}.{kind}"
    return f"{NAMES[stem]}.{kind}"


def in_pairs(array: np.ndarray, num_heads: int) -> np.ndarray:
    """Rows of q or k as llama's files have them: 0, d/2, 1, d/2 + 1, ... of each head."""
    size = len(array) // num_heads
    order = [
        head * size + half * size // 2 + i for head in range(num_heads) for i in range(size // 2) for half in (0, 1)
    ]
    return array[order]


def write(
    path: Path,
    architecture: str,
    given: dict[str, np.ndarray],
    *,
    kind: str = "F32",
    fields: dict[str, Any] | None = None,
    raw: dict[str, tuple[np.ndarray, gguf.GGMLQuantizationType]] | None = None,
) -> Path:
    """A file of these tensors: matrices in one type, vectors in F32.

    fields: more metadata, by the whole key. raw: tensors as they are stored, by GGUF's name, instead of others or more.
    """
    raw = raw or {}
    writer = gguf.GGUFWriter(path, architecture)
    for name, key in KEYS.items():
        writer.add_uint32(f"{architecture}.{key}", SIZES.get(name, 2048))
    writer.add_float32(f"{architecture}.attention.layer_norm_rms_epsilon", 1e-5)
    writer.add_float32(f"{architecture}.rope.freq_base", 5e5)
    for key, value in (fields or {}).items():
        add = {str: writer.add_string, bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32}
        add.get(type(value), writer.add_array)(key, value)
    for name, array in given.items():
        if architecture in ("llama", "smollm3") and ("q_proj" in name or "k_proj" in name):
            array = in_pairs(array, 4 if "q_proj" in name else 2)
        of = gguf.GGMLQuantizationType[kind if array.ndim > 1 else "F32"]
        if gguf_name(name) not in raw:
            writer.add_tensor(gguf_name(name), gguf.quants.quantize(array, of), raw_dtype=of)
    for name, (array, of) in raw.items():
        writer.add_tensor(name, array, raw_dtype=of)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
