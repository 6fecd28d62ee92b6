"""A cache in a file: equal to the bit, continued by another process, and nothing else is taken for one."""

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.flax import save_file
from small_model import CONFIG

from rattn_eqx.inference.cache import load_cache, save_cache
from rattn_eqx.inference.generate import generate
from rattn_eqx.model.language_model import LanguageModel

KEY = jax.random.key(1)
REMEDY = "read the text again with model.prefill"

CHILD = """
import sys
import jax
import numpy as np
from test_cache_file import DTYPES, make, texts
from rattn_eqx.inference.cache import load_cache

for dtype in DTYPES:
    model = make(compute_dtype=dtype)
    print(texts(model, load_cache(f"{sys.argv[1]}/{dtype}", model)))
"""
DTYPES = ["float32", "bfloat16"]


def make(key=KEY, compute_dtype: str = "float32", **changes: Any) -> LanguageModel:
    config = dataclasses.replace(CONFIG, **changes)
    return eqx.filter_jit(LanguageModel)(config, compute_dtype=compute_dtype, key=key)


def read(model: LanguageModel, num_tokens: int, **options):
    tokens = jnp.arange(num_tokens, dtype=jnp.int32) * 7 % 11
    return eqx.filter_jit(model.prefill)(tokens, model.init_cache(**options))[1]


def texts(model: LanguageModel, cache) -> tuple[list[int], str]:
    """Drawn tokens, and the bytes of the logits after a token."""
    logits, _ = eqx.filter_jit(model.decode_step)(jnp.array(3, jnp.int32), cache)
    return list(generate(model, [3, 5], num_tokens=9, cache=cache, key=KEY)), np.asarray(logits).tobytes().hex()


def equal_to_the_bit(one, other) -> None:
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert (x.dtype, x.shape) == (y.dtype, y.shape)
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return make()


@pytest.fixture
def saved(model, tmp_path) -> Path:
    save_cache(tmp_path / "saved", read(model, 8, max_length=16), model)
    return tmp_path / "saved"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pattern", [("local", "global"), ("local",)])
def test_to_the_bit(tmp_path, dtype, pattern):
    model = make(compute_dtype=dtype, pattern=pattern)
    cache = read(model, 8, max_length=None if pattern == ("local",) else 16)
    assert cache.dtype == dtype
    save_cache(str(tmp_path / "one"), cache, model)
    loaded = load_cache(str(tmp_path / "one"), model)
    equal_to_the_bit(loaded, cache)
    assert (loaded.room, int(loaded.length)) == (cache.room, 8)


def test_of_a_batch_and_of_another_dtype(model, tmp_path):
    cache = read(model, 8, max_length=16, dtype="bfloat16")
    batch = jax.tree.map(lambda x: jnp.stack([x, x + 1]), cache)
    for saved in (cache, batch):
        save_cache(tmp_path / "saved", saved, model)  # in place of the one before
        equal_to_the_bit(load_cache(tmp_path / "saved", model), saved)


def test_it_is_a_file_that_other_programs_read(saved):
    with safe_open(saved, framework="numpy") as file:
        names = set(file.keys())
        assert file.metadata()["format"] == "rattn-eqx cache, version 1"
    fields = {"keys", "keys_rla", "values", "state", "length"}
    of_global = fields - {"keys_rla", "state"}
    assert names == {f"layers.0.{x}" for x in fields} | {f"layers.1.{x}" for x in of_global} | {"segment_id"}


def test_another_process_continues_it_to_the_bit(tmp_path):
    expected = []
    for dtype in DTYPES:
        model = make(compute_dtype=dtype)
        cache = read(model, 40, max_length=64)
        save_cache(tmp_path / dtype, cache, model)
        expected.append(str(texts(model, cache)))
    root = Path(__file__).parents[2]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, [root, root / "tests", Path(__file__).parent]))}
    command = [sys.executable, "-c", CHILD, str(tmp_path)]
    child = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert child.returncode == 0, child.stderr
    assert child.stdout.splitlines() == expected


@pytest.mark.parametrize(
    "changes", [{"key": jax.random.key(2)}, {"window": 5}, {"num_layers": 4}, {"compute_dtype": "bfloat16"}]
)
def test_of_another_model(saved, changes):
    message = f"load_cache: {re.escape(str(saved))} is a cache of another model, or of other parameters; {REMEDY}"
    with pytest.raises(ValueError, match=message):
        load_cache(saved, make(**changes))


def test_a_cache_of_another_model_is_not_saved(model, tmp_path):
    for cache in (read(model, 8, max_length=16), jax.tree.map(lambda x: x[None], read(model, 8, max_length=16))):
        with pytest.raises(ValueError, match=r"the cache must be of this model .*layers\[0\].keys must be"):
            save_cache(tmp_path / "saved", cache, make(window=5))
    assert not (tmp_path / "saved").exists()


def refused(path: Path, model: LanguageModel, remedy: str = REMEDY) -> str:
    with pytest.raises(ValueError, match=re.escape(str(path))) as told:
        load_cache(path, model)
    assert remedy in str(told.value)
    return str(told.value)


def test_cut_short(saved, model):
    whole = saved.read_bytes()
    for length in (0, 1, 7, 8, 9, 100, len(whole) // 2, len(whole) - 1):
        saved.write_bytes(whole[:length])
        assert "is damaged" in refused(saved, model)
    saved.write_bytes(whole + b"\0")
    assert "is damaged" in refused(saved, model)


def test_any_byte_changed(saved, model):
    """Of the header each, of the arrays some."""
    whole = saved.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    for at in [*range(header), *range(header, len(whole), 37), len(whole) - 1]:
        for flip in (1, 2, 4, 16):
            saved.write_bytes(whole[:at] + bytes([whole[at] ^ flip]) + whole[at + 1 :])
            said = refused(saved, model)
            assert at < header or "its content is not what was written" in said
    for zeroed in (bytes(len(whole)), whole[:header] + bytes(len(whole) - header)):
        saved.write_bytes(zeroed)
        refused(saved, model)


@pytest.mark.parametrize(
    "room", ["null", "17", "0", "-1", "1e3", '"16"', "[16]", "true", "9" * 30, "9" * 5000, "NaN", "{", "[" * 10**5]
)
def test_a_room_that_is_another(saved, model, room):
    with safe_open(saved, framework="flax") as file:
        arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        metadata = file.metadata()
    save_file(arrays, saved, metadata | {"room": room})
    refused(saved, model)


def test_no_cache_at_all(model, tmp_path):
    other = tmp_path / "other"
    save_file({"x": jnp.zeros(3)}, other)
    assert "must be a cache that save_cache wrote" in refused(other, model)
    for text in (b"", b"text of some length, and no cache", json.dumps({"a": 1}).encode(), bytes(100)):
        other.write_bytes(text)
        refused(other, model)


def test_no_file(model, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    signal.alarm(20)  # a FIFO would wait for ever
    try:
        for name in ("pipe", "loop"):
            refused(tmp_path / name, model, "must be a regular file")
        refused(tmp_path, model, "it is a folder; give another path")
        refused(Path("/dev/zero"), model, "it is a pipe or a device")
    finally:
        signal.alarm(0)
    with pytest.raises(FileNotFoundError, match="missing"):
        load_cache(tmp_path / "missing", model)
