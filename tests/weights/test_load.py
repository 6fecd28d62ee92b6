"""`load` and `rattn import`: what a path holds, in memory that is bounded; and what is refused."""

import dataclasses
import json
import os
import pickle
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import tiny_tokenizer
from training_child import MODEL, training

import rattn_eqx
from rattn_eqx.__main__ import main
from rattn_eqx.data.tokenizers import ByteTokenizer
from rattn_eqx.model.config import ModelConfig
from rattn_eqx.model.language_model import LanguageModel
from rattn_eqx.training.checkpoint import save_checkpoint
from rattn_eqx.training.config import RunConfig
from rattn_eqx.training.loop import initial_state
from rattn_eqx.training.run_folder import identity, open_run
from rattn_eqx.weights import architectures, hugging_face, own
from rattn_eqx.weights.load import import_checkpoint
from rattn_eqx.weights.safetensors import LONGEST_HEADER, open_tensors, shards, write_tensors

FIXTURES = Path(__file__).parent / "fixtures"


def file_of(header: Any, data: bytes = bytes(8)) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(start: int, end: int, shape: Any = (1,), kind: str = "F32") -> dict[str, Any]:
    return {"dtype": kind, "shape": shape if isinstance(shape, str) else list(shape), "data_offsets": [start, end]}


SOUND = {"a": entry(0, 4), "b": entry(4, 8)}
HOSTILE = {
    "empty": (b"", "its header must have 2 to"),
    "cut in the header": (file_of(SOUND)[:40], "lie within the file"),
    "cut in the data": (file_of(SOUND)[:-1], "must lie within the file's 7 bytes"),
    "header longer than the file": ((2**40).to_bytes(8, "little") + b"{}", "it claims 1,099,511,627,776 of 10"),
    "huge header": (file_of(b" " * (LONGEST_HEADER + 1)), f"2 to {LONGEST_HEADER:,} bytes"),
    "a pickle": (pickle.dumps({"a": np.zeros(3)}), "its header must have 2 to"),
    "no JSON": (file_of(b"{" * 9), "its header must be JSON"),
    "a deep list": (file_of(b"[" * 100_000), "its header must be JSON"),
    "a list": (file_of([1, 2]), "its header must be an object"),
    "metadata": (file_of({"__metadata__": {"a": 1}}, b""), "its __metadata__ must be texts"),
    "overlap": (file_of({"a": entry(0, 4), "b": entry(2, 6)}, bytes(6)), "'b' begins at 2, not 4"),
    "a gap": (file_of({"a": entry(0, 4), "b": entry(5, 9)}, bytes(9)), "'b' begins at 5, not 4"),
    "bytes of none": (file_of(SOUND, bytes(9)), "1 bytes at its end belong to none"),
    "a huge shape": (file_of({"a": entry(0, 8, (2**40, 2**20))}), "4,611,686,018,427,387,904 bytes, and it claims"),
    "a product beyond 64 bits": (file_of({"a": entry(0, 8, (2**33, 2**33))}), "must lie within the file"),
    "a negative size": (file_of({"a": entry(0, 8, (-1, -2))}), "axes of sizes below"),
    "a negative offset": (file_of({"a": entry(-4, 0)}), "must lie within the file's 8 bytes"),
    "offsets turned round": (file_of({"a": entry(4, 0)}), "must lie within the file's 8 bytes"),
    "sizes that are no numbers": (file_of({"a": entry(0, 8, (True, 2.0))}), "axes of sizes below"),
    "a shape that is a text": (file_of({"a": entry(0, 8, "22")}), "must have dtype, shape and data_offsets"),
    "many axes": (file_of({"a": entry(0, 4, (1,) * 9)}), "at most 8 axes"),
    "integers": (file_of({"a": entry(0, 8, (1,), "I64")}), "must be of F32, F16, BF16; it is of 'I64'"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_is_refused_with_path_and_reason(tmp_path, name):
    data, reason = HOSTILE[name]
    path = tmp_path / "model.safetensors"
    path.write_bytes(data)
    with pytest.raises(ValueError, match="refused") as refusal:
        open_tensors(path)
    assert str(refusal.value).startswith(f"load: {path} refused: ")
    assert reason in str(refusal.value)


def test_memory_stays_bounded_whatever_a_header_claims(tmp_path):
    path = tmp_path / "model.safetensors"
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with path.open("wb") as file:  # of 2**40 bytes, none of them on the disk
        file.write((2**39).to_bytes(8, "little"))
        file.truncate(2**40)
    with pytest.raises(ValueError, match="its header must have 2 to"):
        open_tensors(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**17  # kB
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(ValueError, match="must be a regular file"):
        open_tensors(path)


def test_what_is_written_is_read_and_the_format_s_own_library_agrees(tmp_path):
    library = pytest.importorskip("safetensors.numpy")
    arrays = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.array(2.5, np.float16)}
    arrays["\u00e9 long name"] = np.zeros((0, 3), np.float32)
    path = tmp_path / "x.safetensors"
    write_tensors(path, {name: x.shape for name, x in arrays.items()}, arrays.__getitem__, {"format": "pt"})
    for read in (library.load_file(path), {name: open_tensors(path).read(name) for name in arrays}):
        assert {name: (x.dtype, x.shape, x.tobytes()) for name, x in read.items()} == {
            name: (x.dtype, x.shape, x.tobytes()) for name, x in arrays.items()
        }
    assert open_tensors(path).metadata == {"format": "pt"}
    with pytest.raises(ValueError, match="save: a must be of shape"):
        write_tensors(tmp_path / "y", {"a": (3,)}, lambda name: np.zeros(3, np.int32), {})
    assert not (tmp_path / "y").exists()


def copied(name: str, folder: Path) -> Path:
    shutil.copytree(FIXTURES / name, folder)
    return folder


@pytest.mark.parametrize(
    "file", ["../qwen3/model.safetensors", "/etc/passwd", "a\\b.safetensors", "model.bin", 3, "x\0.safetensors"]
)
def test_an_index_names_files_beside_it_alone(tmp_path, file):
    folder = copied("llama", tmp_path / "model")
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.norm.weight"] = file
    path.write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"must name \.safetensors files beside it") as refusal:
        rattn_eqx.load(folder)
    assert str(path) in str(refusal.value)


def test_folders_that_hold_no_model(tmp_path):
    folder = copied("llama", tmp_path / "model")
    index = folder / "model.safetensors.index.json"
    kept = index.read_text()
    moved = json.loads(kept)
    moved["weight_map"]["model.norm.weight"] = "model-00001-of-00002.safetensors"
    moved["weight_map"]["model.embed_tokens.weight"] = "model-00002-of-00002.safetensors"
    for text, message in ((json.dumps(moved), "must be those that model.safetensors.index.json says"),
        ("{}", "must have a weight_map"), ("{", "must be JSON")):  # fmt: skip
        index.write_text(text)
        with pytest.raises(ValueError, match=message):
            rattn_eqx.load(folder)
    index.unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(1))
    with pytest.raises(ValueError, match=r"pytorch_model.bin is a pickle, which is never opened"):
        rattn_eqx.load(folder)
    (folder / "config.json").write_text('{"model_type": "gpt2"}')
    index.write_text(kept)
    with pytest.raises(ValueError, match=r"model refused: model_type must be one of llama, .*; it is 'gpt2'"):
        rattn_eqx.load(folder)
    (tmp_path / "binary").write_bytes(b"GGML")
    with pytest.raises(ValueError, match=r"binary must be a GGUF file, or the folder of a model"):
        rattn_eqx.load(tmp_path / "binary")


def test_a_run_folder(tmp_path):
    config = RunConfig(dataclasses.replace(MODEL, pattern=("local", "global_rope")), training(), "0" * 64)
    open_run(tmp_path / "run", config, ByteTokenizer())
    state = initial_state(config)
    save_checkpoint(tmp_path / "run" / "checkpoints", 3, state, {"run": identity(config, ByteTokenizer())})
    model, tokenizer, found = rattn_eqx.load(tmp_path / "run")
    assert (tokenizer, found) == (ByteTokenizer(), config.model)
    assert (np.asarray(model.embedding) == np.asarray(state["model"].embedding)).all()
    narrow, _, _ = rattn_eqx.load(tmp_path / "run", "bfloat16")
    assert (str(narrow.embedding.dtype), narrow.compute_dtype) == ("bfloat16", "bfloat16")
    with pytest.raises(ValueError, match=r"import: .* must be of another library; it is a model of ours"):
        import_checkpoint(tmp_path / "run", tmp_path / "out")


def damaged(folder: Path, change: Any) -> Path:
    path = folder / "config.json"
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))
    return folder


def test_a_folder_of_ours_that_is_not_what_was_written(tmp_path):
    model = LanguageModel(dataclasses.replace(MODEL, num_layers=1), key=jax.random.key(0))
    for number, (change, message) in enumerate(
        (
            (lambda x: x["model"].update(num_layers=3), r"blocks.1.attention.*' must be .*, and is absent"),
            (lambda x: x["model"].update(num_layers=2**40), "must have tensors for 1,099,511,627,776 layers; it has"),
            (lambda x: x["model"].update(model_width=99), r"must be \(.*99.*\), and is \(.*\)"),
            (lambda x: x["model"].update(width=99), "is damaged: ModelConfig: missing none, unknown width"),
            (lambda x: x.update(format="rattn-eqx model, version 9"), "use a newer rattn-eqx"),
            (lambda x: x.update(compute_dtype="int8"), "compute_dtype is 'int8'"),
        )
    ):
        folder = tmp_path / str(number)
        own.save(model, folder)
        with pytest.raises(ValueError, match=message) as refusal:
            rattn_eqx.load(damaged(folder, change))
        assert str(folder) in str(refusal.value)


LLAMA = ModelConfig(
    vocabulary_size=300,
    model_width=16,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_size=8,
    feed_forward_width=24,
    window=0,
    pattern=("global_rope",),
    residual=False,
    qk_norm=False,
    gate="silu",
    embedding_scale=1.0,
)


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    """A Hugging Face folder with a tokenizer."""
    model = jax.tree.map(
        lambda x: x.astype(jnp.bfloat16), LanguageModel(LLAMA, key=jax.random.key(0)), is_leaf=eqx.is_array
    )
    tokenizer = json.loads(tiny_tokenizer.make().to_json())["tokenizers"]
    config = architectures.foreign_config("llama", LLAMA) | tiny_tokenizer.CONFIG
    hugging_face.save(
        model, tmp_path / "there", config, tokenizer=json.dumps(tokenizer), chat_template="{{ messages }}"
    )
    return tmp_path / "there"


def test_import_and_what_the_other_commands_make_of_it(checkpoint, tmp_path, capsysbinary):
    out = str(tmp_path / "imported")
    assert main(["import", str(checkpoint), "--out", out]) == 0
    assert b"10,256 parameters, layers 2 global_rope, a tokenizer of 300 tokens" in capsysbinary.readouterr().err
    model, tokenizer, config = rattn_eqx.load(out)
    there, of_there, _ = rattn_eqx.load(checkpoint)
    assert eqx.tree_equal(model, there)
    assert config == LLAMA
    assert tokenizer is not None
    assert of_there is not None
    assert tokenizer.to_json() == of_there.to_json()
    entries = open_tensors(tmp_path / "imported" / "model.safetensors").entries
    assert {str(entry.dtype) for entry in entries.values()} == {"bfloat16"}
    origin = own.read_about(tmp_path / "imported").origin
    hugging_face.save(rattn_eqx.load(out, "stored")[0], tmp_path / "again", origin["hugging_face"])
    configs = [hugging_face.read(folder).config for folder in (checkpoint, tmp_path / "again")]
    assert configs[0] == configs[1]
    files = [(folder / "model.safetensors").read_bytes() for folder in (checkpoint, tmp_path / "again")]
    assert files[0] == files[1]
    generate = ["generate", "--num-tokens", "5", "--temperature", "0", "--prompt", "hello"]
    written = []
    for path in (out, str(checkpoint)):
        assert main([*generate, "--run", path]) == 0
        written.append(capsysbinary.readouterr().out)
    assert written[0] == written[1]
    assert written[0].startswith(b"hello")
    assert main(["cost", "--run", out, "--context", "100"]) == 0
    shown = capsysbinary.readouterr().out.decode()
    assert "10,256" in shown
    assert "every token, rotary positions" in shown
    text = tmp_path / "text"
    text.write_text("hello 1234 " * 40)
    assert main(["evaluate", "--run", out, "--perplexity", str(text)]) == 0
    assert b"bits per byte" in capsysbinary.readouterr().out
    assert main(["evaluate", "--run", out, "--task", "mqar", "--lengths", "96", "--samples", "2"]) == 0
    assert main(["import", str(checkpoint), "--out", out]) == 2
    assert b"must not exist yet" in capsysbinary.readouterr().err
    assert main(["import", str(checkpoint), "--out", out + "2", "--dtype", "float32"]) == 0
    entries = open_tensors(tmp_path / "imported2" / "model.safetensors").entries
    assert {str(entry.dtype) for entry in entries.values()} == {"float32"}


def test_a_model_without_a_tokenizer_writes_no_text(tmp_path, capsys):
    assert main(["import", str(FIXTURES / "qwen3"), "--out", str(tmp_path / "out")]) == 0
    assert main(["generate", "--run", str(tmp_path / "out")]) == 2
    assert "out must have a tokenizer; it has none" in capsys.readouterr().err


PEAK = """
import json, resource, sys, time
import rattn_eqx, jax
started = time.monotonic()
model, _, config = rattn_eqx.load(sys.argv[1], dtype="bfloat16")
leaves = [x for x in jax.tree.leaves(model) if hasattr(x, "dtype")]
jax.block_until_ready(leaves)
found = {"peak": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, "bytes": sum(x.nbytes for x in leaves)}
found["seconds"] = time.monotonic() - started
found["corner"] = float(model.blocks[23].feed_forward.down_weight[5, 7])
print(json.dumps(found))
"""


@pytest.mark.long
def test_a_model_of_1_7b_is_loaded_within_its_size_and_a_fifth(tmp_path):
    config = dict(
        model_type="llama",
        vocab_size=49_152,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=24,
        num_attention_heads=32,
        tie_word_embeddings=True,
        dtype="bfloat16",
    )
    shapes = {name: tensor.shape for name, tensor in architectures.tensors(architectures.model_config(config)).items()}
    block = np.random.default_rng(0).standard_normal(2**20).astype(ml_dtypes.bfloat16)
    read = lambda name: np.resize(block, shapes[name])
    parts = shards([(name, 2 * int(np.prod(shape))) for name, shape in shapes.items()], 10**9)
    weight_map, size = {}, 0
    for number, part in enumerate(parts):
        file = f"model-{number + 1:05d}-of-{len(parts):05d}.safetensors"
        write_tensors(tmp_path / file, {name: shapes[name] for name in part}, read, {})
        weight_map |= dict.fromkeys(part, file)
        size += (tmp_path / file).stat().st_size
    assert len(parts) == 4
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    done = subprocess.run([sys.executable, "-c", PEAK, tmp_path], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    print(size, found)
    assert found["bytes"] == 2 * 1_711_376_384
    assert found["corner"] == float(read("model.layers.23.mlp.down_proj.weight")[7, 5])
    assert found["peak"] < 1.2 * size + 5e8
