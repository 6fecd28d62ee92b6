"""The architectures of other libraries that a `LanguageModel` can be: their configs, and the names of their tensors.

All are Llama's: q, k and v, rotary positions, a gated feed-forward with silu, RMS norms before both. Mistral has a
window, Qwen2 biases of q, k and v, Qwen3 norms of q and k, SmolLM3 layers without positions.
"""

from typing import Any, NamedTuple

from rattn_eqx.model.config import LayerKind, ModelConfig
from rattn_eqx.model.rotary import RopeScaling

# What a config means that does not say it: as the classes of Hugging Face's `transformers`.
_USUAL = {"rope_theta": 1e4, "tie_word_embeddings": False, "rms_norm_eps": 1e-6, "hidden_act": "silu"}
_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": _USUAL,
    "mistral": _USUAL | {"sliding_window": 4096, "num_key_value_heads": 8},
    "qwen2": _USUAL | {"sliding_window": 4096, "num_key_value_heads": 32, "max_window_layers": 28},
    "qwen3": _USUAL | {"sliding_window": 4096, "num_key_value_heads": 32, "max_window_layers": 28, "head_dim": 128},
    "smollm3": _USUAL | {"rope_theta": 2e6, "tie_word_embeddings": True, "num_key_value_heads": 4},
}
_CLASSES = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3", "smollm3": "SmolLM3"}
_SIZES = {
    "vocab_size": "vocabulary_size",
    "hidden_size": "model_width",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "num_key_value_heads": "num_kv_heads",
    "head_dim": "head_size",
    "intermediate_size": "feed_forward_width",
}
_MOST_LAYERS = 4096
_SCALING = {
    "factor": "factor",
    "low_freq_factor": "low_frequency_factor",
    "high_freq_factor": "high_frequency_factor",
    "original_max_position_embeddings": "original_length",
}


class Tensor(NamedTuple):
    """A tensor of a checkpoint and the parameter that it is.

    path: of the parameter, as "blocks.0.attention.projections.query_weight".
    shape: at Hugging Face. transposed: is the parameter that of [in, out], with axes of heads where it has them?
    """

    path: str
    shape: tuple[int, ...]
    transposed: bool


def model_config(config: dict[str, Any]) -> ModelConfig:
    """The config of the model that Hugging Face's config.json describes.

    Raises:
      ValueError: for an unknown architecture, a field that is missing or of another kind, and for what no
        `LanguageModel` computes; names the field.
    """
    kind = config.get("model_type")
    if kind not in _DEFAULTS:
        raise ValueError(f"model_type must be one of {', '.join(_DEFAULTS)}; it is {kind!r:.80}")
    given = _DEFAULTS[kind] | {name: value for name, value in config.items() if value is not None or name in _NULL}
    given.setdefault("num_key_value_heads", given.get("num_attention_heads"))
    if "head_dim" not in given:
        width, heads = (_whole(given, name) for name in ("hidden_size", "num_attention_heads"))
        if width % heads:
            raise ValueError(f"hidden_size must be a multiple of num_attention_heads; they are {width} and {heads}")
        given["head_dim"] = width // heads
    sizes = {ours: _whole(given, name) for name, ours in _SIZES.items()}
    if sizes["num_layers"] > _MOST_LAYERS:
        raise ValueError(f"num_hidden_layers must be at most {_MOST_LAYERS:,}; it is {sizes['num_layers']:,}")
    for name, only in _refused(kind).items():
        if given.get(name, only) != only:
            raise ValueError(f"{name} must be {only!r}: nothing else is computed here; it is {given[name]!r:.80}")
    theta, scaling = _rope(given)
    kinds, window = _layers(kind, given, sizes["num_layers"])
    fields: dict[str, Any] = {
        **sizes,
        "window": window,
        "pattern": _shortest(kinds),
        "residual": False,
        "qk_norm": kind == "qwen3",
        "qkv_bias": kind == "qwen2",
        "gate": "silu",
        "tie_embeddings": given["tie_word_embeddings"],
        "rope_theta": theta,
        "rope_scaling": scaling,
        "norm_eps": given["rms_norm_eps"],
        "embedding_scale": 1.0,
    }
    try:
        return ModelConfig(**fields)
    except ValueError as error:
        raise ValueError(f"its config must be one of a model; {error}") from error


def foreign_config(kind: str, model: ModelConfig) -> dict[str, Any]:
    """The inverse of `model_config`: what config.json says of such a model.

    Raises:
      ValueError: for a model that is none of this architecture; names the fields that differ.
    """
    if kind not in _DEFAULTS:
        raise ValueError(f"model_type must be one of {', '.join(_DEFAULTS)}; got {kind!r:.80}")
    kinds = model.layer_kinds
    config: dict[str, Any] = {"model_type": kind, "architectures": [f"{_CLASSES[kind]}ForCausalLM"]}
    config |= {name: getattr(model, ours) for name, ours in _SIZES.items()}
    config |= {"hidden_act": model.gate, "rms_norm_eps": model.norm_eps, "rope_theta": model.rope_theta}
    config |= {"tie_word_embeddings": model.tie_embeddings, "rope_scaling": None}
    if model.rope_scaling is not None:
        parts = {name: getattr(model.rope_scaling, ours) for name, ours in _SCALING.items()}
        config["rope_scaling"] = {"rope_type": "llama3", **parts}
    window = model.window if "local" in kinds else None
    if kind == "mistral":
        config["sliding_window"] = window
    if kind in ("qwen2", "qwen3", "smollm3"):
        config |= {"use_sliding_window": window is not None, "sliding_window": window}
        config["layer_types"] = ["sliding_attention" if x == "local" else "full_attention" for x in kinds]
    if kind == "smollm3":
        config["no_rope_layers"] = [int(x != "global") for x in kinds]
    require_same(kind, model_config(config), model)
    return config


def require_same(what: str, described: ModelConfig, model: ModelConfig) -> None:
    """Refuse a model that is not the one described; the ValueError names the fields in which it differs."""
    names = [name for name in described.__dataclass_fields__ if name not in ("window", "pattern")]
    different = [name for name in names if getattr(described, name) != getattr(model, name)]
    if described.layer_kinds != model.layer_kinds:
        different.append("pattern")
    if "local" in model.layer_kinds and described.window != model.window:
        different.append("window")
    if different:
        shown = ", ".join(f"{name}={getattr(model, name)!r:.80}" for name in different)
        raise ValueError(
            f"save: the model must be an unchanged one of {what}; it has {shown}; save it in our own format, with "
            "weights.own.save"
        )


def tensors(model: ModelConfig) -> dict[str, Tensor]:
    """Every tensor of a checkpoint of such a model, by Hugging Face's name."""
    m, w, d = model.model_width, model.feed_forward_width, model.head_size
    h, kv = model.num_heads * d, model.num_kv_heads * d
    found = {"model.embed_tokens.weight": Tensor("embedding", (model.vocabulary_size, m), False)}
    for layer in range(model.num_layers):
        there, here = f"model.layers.{layer}", f"blocks.{layer}"
        attention, ours = f"{there}.self_attn", f"{here}.attention.projections"
        for name, part, size in (("q_proj", "query", h), ("k_proj", "key", kv), ("v_proj", "value", kv)):
            found[f"{attention}.{name}.weight"] = Tensor(f"{ours}.{part}_weight", (size, m), True)
            if model.qkv_bias:
                found[f"{attention}.{name}.bias"] = Tensor(f"{ours}.{part}_bias", (size,), False)
        found[f"{attention}.o_proj.weight"] = Tensor(f"{ours}.out_weight", (m, h), True)
        if model.qk_norm:
            found[f"{attention}.q_norm.weight"] = Tensor(f"{ours}.query_norm.weight", (d,), False)
            found[f"{attention}.k_norm.weight"] = Tensor(f"{ours}.key_norm.weight", (d,), False)
        for name, part, shape in (
            ("gate_proj", "gate", (w, m)),
            ("up_proj", "up", (w, m)),
            ("down_proj", "down", (m, w)),
        ):
            found[f"{there}.mlp.{name}.weight"] = Tensor(f"{here}.feed_forward.{part}_weight", shape, True)
        found[f"{there}.input_layernorm.weight"] = Tensor(f"{here}.attention_norm.weight", (m,), False)
        found[f"{there}.post_attention_layernorm.weight"] = Tensor(f"{here}.feed_forward_norm.weight", (m,), False)
    found["model.norm.weight"] = Tensor("final_norm.weight", (m,), False)
    if not model.tie_embeddings:
        found["lm_head.weight"] = Tensor("head", (model.vocabulary_size, m), True)
    return found


# Fields whose null says something; of the others it is the default.
_NULL = ("sliding_window",)


def _refused(kind: str) -> dict[str, Any]:
    """Fields that change what a model computes, each with the one value that it may have."""
    fields: dict[str, Any] = {"hidden_act": "silu", "quantization_config": None, "partial_rotary_factor": 1.0}
    if kind in ("llama", "qwen3", "smollm3"):  # biases of the output projection too
        fields["attention_bias"] = False
    return fields | ({"mlp_bias": False} if kind in ("llama", "smollm3") else {})


def _whole(config: dict[str, Any], name: str) -> int:
    value = config.get(name)
    if type(value) is not int or not 1 <= value < 2**31:
        raise ValueError(f"{name} must be a whole number from 1 on; it is {value!r:.80}")
    return value


def _rope(config: dict[str, Any]) -> tuple[Any, RopeScaling | None]:
    """Theta and scaling, which are one object since version 5 of `transformers`."""
    stated = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(stated, dict):
        raise ValueError(f"rope_scaling must be an object; it is {stated!r:.80}")
    theta = stated.get("rope_theta", config["rope_theta"])
    if isinstance(theta, bool) or not isinstance(theta, int | float) or not theta > 0:
        raise ValueError(f"rope_theta must be a number above 0; it is {theta!r:.80}")
    kind = stated.get("rope_type", stated.get("type", "default"))
    if stated.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(f"partial_rotary_factor must be 1.0; it is {stated['partial_rotary_factor']!r:.80}")
    if kind == "default" and not any(isinstance(part, dict) for part in stated.values()):
        return theta, None
    if kind != "llama3":
        raise ValueError(f"rope_scaling must be of rope_type 'default' or 'llama3'; it is {stated!r:.120}")
    if missing := [name for name in _SCALING if name not in stated]:
        raise ValueError(f"rope_scaling must have {', '.join(missing)}; it is {stated!r:.200}")
    return theta, RopeScaling(**{ours: stated[name] for name, ours in _SCALING.items()})


def _layers(kind: str, config: dict[str, Any], count: int) -> tuple[list[LayerKind], int]:
    """The kind of every layer, and the window of those that have one; it is 0 where none has."""
    window = config.get("sliding_window") if kind == "mistral" or config.get("use_sliding_window", False) else None
    has_window: list[bool] = [window is not None] * count
    if kind in ("qwen2", "qwen3") and window is not None:
        has_window = [layer >= _from(config, "max_window_layers") for layer in range(count)]
    has_positions = [True] * count
    if kind == "smollm3":
        every = config.get("no_rope_layer_interval", 4)
        default = [(layer + 1) % every for layer in range(count)] if type(every) is int and every > 0 else None
        stated = config.get("no_rope_layers", default)  # 1 where a layer has rotary positions
        if not isinstance(stated, list) or len(stated) != count or not all(type(x) is int for x in stated):
            raise ValueError(f"no_rope_layers must have a number for each of {count} layers; it is {stated!r:.80}")
        has_positions = [bool(x) for x in stated]
        has_window = [window is not None and not x for x in has_positions]
    if (types := config.get("layer_types")) is not None and kind in ("qwen2", "qwen3", "smollm3"):
        known = {"full_attention": False, "sliding_attention": True}
        if (
            not isinstance(types, list)
            or len(types) != count
            or not all(isinstance(x, str) and x in known for x in types)
        ):
            raise ValueError(
                f"layer_types must say {' or '.join(known)} of each of {count} layers; it is {types!r:.80}"
            )
        has_window = [window is not None and known[x] for x in types]
    if any(local and not rotary for local, rotary in zip(has_window, has_positions, strict=True)):
        raise ValueError(
            "use_sliding_window must be false where layers have no positions: no such layer is computed here"
        )
    kinds: list[LayerKind] = [
        "local" if local else "global_rope" if rotary else "global"
        for local, rotary in zip(has_window, has_positions, strict=True)
    ]
    return kinds, _whole(config, "sliding_window") if "local" in kinds else 0


def _from(config: dict[str, Any], name: str) -> int:
    value = config.get(name)
    if type(value) is not int or value < 0:
        raise ValueError(f"{name} must be a whole number from 0 on; it is {value!r:.80}")
    return value


def _shortest(kinds: list[LayerKind]) -> tuple[LayerKind, ...]:
    """The shortest pattern that, repeated, is these layers."""
    lengths = range(1, len(kinds) + 1)
    length = next(n for n in lengths if all(kind == kinds[i % n] for i, kind in enumerate(kinds)))
    return tuple(kinds[:length])
