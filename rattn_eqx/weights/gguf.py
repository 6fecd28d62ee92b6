"""A GGUF file as a Hugging Face checkpoint: names, layout, config and tokenizer.

The header is read here, since the `gguf` package believes what a file claims; the package knows the quantised formats.
"""

import math
import os
import re
import struct
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from rattn_eqx.data.files import open_regular
from rattn_eqx.weights.foreign import Foreign
from rattn_eqx.weights.gguf_tokenizer import tokenizer_json

MOST_METADATA = 2**25  # bytes before the tensors; a vocabulary of 150,000 pieces and its merges take some 8 MB
MOST_ENTRIES = 2**16  # fields, and tensors
_MAGIC, _VERSIONS = b"GGUF", (2, 3)
_SCALARS = dict(enumerate(("<B", "<b", "<H", "<h", "<I", "<i", "<f", "<?"))) | {10: "<Q", 11: "<q", 12: "<d"}
_TEXT, _ARRAY = 8, 9
# By GGML's number of a type.
_PLAIN = {0: np.dtype("<f4"), 1: np.dtype("<f2"), 30: np.dtype(ml_dtypes.bfloat16)}
_QUANTISED = {2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0"}
_QUANTISED |= {10: "Q2_K", 11: "Q3_K", 12: "Q4_K", 13: "Q5_K", 14: "Q6_K"}
_BLOCK = 2**22  # numbers of a quantised tensor that are decoded at once
_CLASSES = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3", "smollm3": "SmolLM3"}
_ARCHITECTURES = ("llama", "qwen2", "qwen3", "smollm3")  # Mistral's files say llama
_INTERLEAVED = ("llama", "smollm3")  # those whose q and k rows stand in the pairs that RoPE turns
_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_OF_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_ROPE_FACTORS = "rope_freqs.weight"  # part of the config at Hugging Face


class _Tensor(NamedTuple):
    kind: int
    shape: tuple[int, ...]  # [out, in]
    start: int
    num_bytes: int


def read(path: Path | str) -> Foreign:
    """A GGUF file as the Hugging Face checkpoint that it was made of; each tensor is read when it is asked for.

    Architectures llama (Mistral's too), qwen2, qwen3 and smollm3; tensors in F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1,
    Q8_0 and K-quants. Nothing in the file is executed, and what it claims is held against its length first.

    Raises:
      ValueError: for what is no sound GGUF file, another architecture, and a tensor of an unknown name or type; names
        path and reason.
      ImportError: the `gguf` package is missing, and a tensor is quantised.
      OSError: as `open`.

    Warns:
      UserWarning: why there is no tokenizer, where the file's is of an unknown kind.
    """
    with open_regular(Path(path)) as file:
        size = os.fstat(file.fileno()).st_size
        data = np.memmap(file, np.uint8, "r") if size else np.zeros(0, np.uint8)
    try:
        metadata, tensors = _read_header(data)
        architecture = _text(metadata, "general.architecture")
        if architecture not in _ARCHITECTURES:
            known = ", ".join(_ARCHITECTURES)
            raise ValueError(f"its architecture must be one of {known}; it is {architecture!r:.80}")
        factors = tensors.pop(_ROPE_FACTORS, None)
        names = {_hugging_face(name): name for name in tensors}
        config = _config(architecture, metadata, tensors)
        if factors is not None:
            scaling = _llama3_scaling(_numbers(data, factors), config["rope_theta"], config["head_dim"])
            config |= {} if scaling is None else {"rope_scaling": scaling}
        tokenizer, chat_template = tokenizer_json(metadata), metadata.get("tokenizer.chat_template")
        if not isinstance(chat_template, str | None):
            raise ValueError(f"tokenizer.chat_template must be a text; it is {chat_template!r:.80}")
        heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
        if architecture not in _INTERLEAVED:
            heads = {}
        for name in names:
            if (count := heads.get(name.split(".")[-2])) and tensors[names[name]].shape[0] % (2 * count):
                raise ValueError(f"{names[name]} must have an even number of rows for each of {count} heads")
    except (ValueError, struct.error) as error:
        raise ValueError(f"gguf: {path} refused: {error}; give a sound GGUF file of a known model") from error

    def tensor(name: str) -> np.ndarray:
        if name not in names:
            raise ValueError(f"gguf: {path} has no tensor {name}; it has {', '.join(list(names)[:3])}, ...")
        numbers = _numbers(data, tensors[names[name]])
        count = heads.get(name.split(".")[-2])
        return numbers if count is None else _in_halves(numbers, count)

    shapes = {name: tensors[names[name]].shape for name in names}
    return Foreign(Path(path), config, shapes, tensor, tokenizer, chat_template)


class _Header:
    """The bytes before the tensors, read in order; a ValueError where they are not what they should be."""

    def __init__(self, data: np.ndarray):
        self.data = memoryview(data)  # pyright: ignore[reportArgumentType]
        self.at, self.end = 0, min(len(data), MOST_METADATA)

    def take(self, num_bytes: int, what: str) -> memoryview:
        if num_bytes > self.end - self.at:
            raise ValueError(
                f"{what} at byte {self.at:,} must end within the file and its first {MOST_METADATA:,} bytes; it has "
                f"{num_bytes:,} bytes where {self.end - self.at:,} are left"
            )
        self.at += num_bytes
        return self.data[self.at - num_bytes : self.at]

    def number(self, form: str, what: str) -> Any:
        return struct.unpack(form, self.take(struct.calcsize(form), what))[0]

    def text(self, what: str) -> str:
        return bytes(self.take(self.number("<Q", what), what)).decode("utf-8")

    def value(self, kind: int, what: str) -> Any:
        """A number, a text, a list of texts, or an array of numbers."""
        if kind == _TEXT:
            return self.text(what)
        if kind in _SCALARS:
            return self.number(_SCALARS[kind], what)
        if kind != _ARRAY:
            raise ValueError(f"{what} must have a known type; got {kind}")
        of, count = self.number("<I", what), self.number("<Q", what)
        if of in _SCALARS:
            data = self.take(count * struct.calcsize(_SCALARS[of]), what)
            return np.frombuffer(data, _SCALARS[of]).copy()
        if of != _TEXT:
            raise ValueError(f"{what} must be an array of numbers or texts; got one of type {of}")
        if 8 * count > self.end - self.at:
            raise ValueError(f"{what} must lie within the file; it claims {count:,} texts")
        return [self.text(what) for _ in range(count)]


def _read_header(data: np.ndarray) -> tuple[dict[str, Any], dict[str, _Tensor]]:
    """Metadata, and where each tensor lies; nothing has been read of the tensors."""
    header = _Header(data)
    if (magic := bytes(header.take(4, "its magic"))) != _MAGIC:
        raise ValueError(f"it must begin with {_MAGIC!r}; it begins with {magic!r}")
    if (version := header.number("<I", "its version")) not in _VERSIONS:
        raise ValueError(f"its version must be 2 or 3, little-endian; it is {version}")
    num_tensors, num_fields = header.number("<Q", "its tensors"), header.number("<Q", "its fields")
    if max(num_tensors, num_fields) > MOST_ENTRIES:
        raise ValueError(
            f"it must have at most {MOST_ENTRIES:,} tensors and fields; it claims {num_tensors:,} and {num_fields:,}"
        )
    metadata: dict[str, Any] = {}
    for _ in range(num_fields):
        key = header.text("a field's name")
        if key in metadata:
            raise ValueError(f"each field must stand there once; {key!r:.80} does twice")
        metadata[key] = header.value(header.number("<I", f"field {key!r:.80}"), f"field {key!r:.80}")
    stated: dict[str, tuple[int, tuple[int, ...], int]] = {}
    for _ in range(num_tensors):
        name = header.text("a tensor's name")
        what = f"tensor {name!r:.80}"
        if name in stated:
            raise ValueError(f"each tensor must stand there once; {name!r:.80} does twice")
        num_axes = header.number("<I", what)
        if not 1 <= num_axes <= 4:
            raise ValueError(f"{what} must have 1 to 4 axes; it has {num_axes}")
        shape = tuple(reversed([header.number("<Q", what) for _ in range(num_axes)]))
        stated[name] = header.number("<I", what), shape, header.number("<Q", what)
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
        raise ValueError(f"general.alignment must be a power of two; it is {alignment!r:.80}")
    start = -(-header.at // alignment) * alignment
    tensors = {name: _placed(name, *about, start, alignment, len(data)) for name, about in stated.items()}
    end = start
    for name, tensor in sorted(tensors.items(), key=lambda item: item[1].start):
        if tensor.start < end:
            raise ValueError(f"tensors must not overlap; {name!r:.80} begins at byte {tensor.start:,}, before {end:,}")
        end = tensor.start + tensor.num_bytes
    return metadata, tensors


def _placed(
    name: str, kind: int, shape: tuple[int, ...], offset: int, start: int, alignment: int, size: int
) -> _Tensor:
    """A tensor that lies within the file."""
    if kind not in _PLAIN and kind not in _QUANTISED:
        known = ", ".join(["F32", "F16", "BF16", *_QUANTISED.values()])
        raise ValueError(f"tensor {name!r:.80} must be one of {known}; it has GGML's type {kind}")
    per_block, block_bytes = (1, _PLAIN[kind].itemsize) if kind in _PLAIN else _block_size(kind)
    count = math.prod(shape)
    if count < 1 or shape[-1] % per_block:
        raise ValueError(
            f"tensor {name!r:.80} must have rows of at least one number, in blocks of {per_block}; its shape is {shape}"
        )
    num_bytes = count // per_block * block_bytes
    if offset % alignment or start + offset + num_bytes > size:
        raise ValueError(
            f"tensor {name!r:.80} must lie within the file, at a multiple of {alignment} bytes; it claims "
            f"{num_bytes:,} bytes from {start + offset:,} on, of {size:,}"
        )
    return _Tensor(kind, shape, start + offset, num_bytes)


def _numbers(data: np.ndarray, tensor: _Tensor) -> np.ndarray:
    """A tensor's numbers in its own dtype; of a quantised one as float32, decoded a block of rows at a time."""
    stored = data[tensor.start : tensor.start + tensor.num_bytes]
    if tensor.kind in _PLAIN:
        return np.array(stored.view(_PLAIN[tensor.kind]).reshape(tensor.shape), subok=False)
    package = _package()
    kind = package.GGMLQuantizationType(tensor.kind)
    rows = stored.reshape(math.prod(tensor.shape[:-1]), -1)
    numbers = np.empty((len(rows), tensor.shape[-1]), np.float32)
    step = max(1, _BLOCK // tensor.shape[-1])
    for at in range(0, len(rows), step):
        numbers[at : at + step] = package.quants.dequantize(np.asarray(rows[at : at + step]), kind)
    return numbers.reshape(tensor.shape)


def _in_halves(numbers: np.ndarray, num_heads: int) -> np.ndarray:
    """Rows of q or k as Hugging Face has them: of each head, first the one part of every pair that RoPE turns, then the
    other; GGUF has pair after pair."""
    pairs = numbers.reshape(num_heads, -1, 2, *numbers.shape[1:])
    return pairs.swapaxes(1, 2).reshape(numbers.shape)


def _hugging_face(name: str) -> str:
    """Hugging Face's name of a tensor."""
    match = re.fullmatch(r"(?:blk\.(\d{1,9})\.)?([a-z_]+)\.(weight|bias)", name)
    layer, part, kind = match.groups() if match else (None, "", "")
    ours = (_TOP if layer is None else _OF_LAYER).get(part)
    if ours is None:
        raise ValueError(f"tensor {name!r:.80} is none of a known model")
    return f"{ours}.{kind}" if layer is None else f"model.layers.{int(layer)}.{ours}.{kind}"


def _config(architecture: str, metadata: dict[str, Any], tensors: dict[str, _Tensor]) -> dict[str, Any]:
    """What Hugging Face's config.json says."""
    key = lambda name: f"{architecture}.{name}"
    whole = lambda name, default=None: _whole(metadata, key(name), default)
    number = lambda name, default=None: _number(metadata, key(name), default)
    if (embedding := tensors.get("token_embd.weight")) is None:
        raise ValueError("it must have a tensor token_embd.weight; it has none")
    width, num_heads, num_layers = whole("embedding_length"), whole("attention.head_count"), whole("block_count")
    if num_layers > len(tensors):
        raise ValueError(f"{key('block_count')} must be the number of layers; it is {num_layers:,}")
    has_window = architecture == "llama" and key("attention.sliding_window") in metadata
    kind = "mistral" if has_window else architecture
    config = {
        "model_type": kind,
        "architectures": [f"{_CLASSES[kind]}ForCausalLM"],
        "vocab_size": embedding.shape[0],
        "hidden_size": width,
        "intermediate_size": whole("feed_forward_length"),
        "num_hidden_layers": num_layers,
        "num_attention_heads": num_heads,
        "num_key_value_heads": whole("attention.head_count_kv", num_heads),
        "head_dim": whole("attention.key_length", width // num_heads),
        "hidden_act": "silu",
        "max_position_embeddings": whole("context_length"),
        "rms_norm_eps": number("attention.layer_norm_rms_epsilon"),
        "rope_theta": number("rope.freq_base", 10000.0),
        "tie_word_embeddings": "output.weight" not in tensors,
        "attention_bias": "blk.0.attn_q.bias" in tensors,
    }
    if has_window:
        config["sliding_window"] = whole("attention.sliding_window")
    if architecture == "smollm3":  # as llama.cpp, which has it in its code
        config["no_rope_layers"] = [int((layer + 1) % 4 != 0) for layer in range(num_layers)]
    scaling = metadata.get(key("rope.scaling.type"), "none")
    if scaling != "none":
        config["rope_scaling"] = {"rope_type": scaling, "factor": number("rope.scaling.factor", 1.0)}
    for name, of in {"bos": "bos", "eos": "eos", "pad": "padding", "eot": "eot"}.items():
        if f"tokenizer.ggml.{of}_token_id" in metadata:
            config[f"{name}_token_id"] = _whole(metadata, f"tokenizer.ggml.{of}_token_id", low=0)
    if (turn := config.pop("eot_token_id", None)) is not None:  # of a turn; Hugging Face lists both, where they differ
        ends = list(dict.fromkeys([config.get("eos_token_id", turn), turn]))
        config["eos_token_id"] = ends if len(ends) > 1 else turn
    return config


def _llama3_scaling(factors: np.ndarray, theta: float, head_size: int) -> dict[str, Any] | None:
    """Hugging Face's settings of the factors by which Llama 3 slows RoPE: GGUF keeps nothing else of them.

    Of the four settings, `factor` is their maximum; the others are those of every model of Meta's.
    """
    refusal = ValueError(f"{_ROPE_FACTORS} must be Llama 3's, for {head_size // 2} frequencies; it is another")
    if factors.shape != (head_size // 2,) or not factors.min() >= 1:
        raise refusal
    settings = {"factor": float(factors.max()), "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    settings["original_max_position_embeddings"] = 8192
    low, high = settings["low_freq_factor"], settings["high_freq_factor"]
    turns = 8192 * theta ** (-np.arange(0, head_size, 2) / head_size) / (2 * math.pi)
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    if not np.allclose(factors, 1 / ((1 - smooth) / settings["factor"] + smooth), rtol=1e-3):
        raise refusal
    return None if settings["factor"] == 1 else {"rope_type": "llama3", **settings}


def _text(metadata: dict[str, Any], key: str) -> str:
    if not isinstance(value := metadata.get(key), str):
        raise ValueError(f"{key} must be a text; it is {value!r:.80}")
    return value


def _whole(metadata: dict[str, Any], key: str, default: int | None = None, low: int = 1) -> int:
    value = metadata.get(key, default)
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value < 2**31:
        raise ValueError(f"{key} must be a whole number of at least {low}; it is {value!r:.80}")
    return value


def _number(metadata: dict[str, Any], key: str, default: float | None = None) -> float:
    value = metadata.get(key, default)
    if not isinstance(value, float) or not 0 < value < math.inf:
        raise ValueError(f"{key} must be a number above 0; it is {value!r:.80}")
    return float(str(np.float32(value)))  # 1e-5, not the float32 nearest to it


def _block_size(kind: int) -> tuple[int, int]:
    """Numbers and bytes of a block."""
    package = _package()
    return package.GGML_QUANT_SIZES[package.GGMLQuantizationType(kind)]


def _package() -> Any:
    try:
        import gguf
    except ImportError as error:
        raise ImportError("gguf: quantised tensors need the gguf package: pip install 'rattn-eqx[weights]'") from error
    return gguf
