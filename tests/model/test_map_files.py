"""Feature maps of a user's Python file: what they compute, what is refused, and that nobody runs one unasked."""

import dataclasses
import json
import os
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_model import CONFIG
from training_child import MODEL, training

import rattn_eqx
from rattn_eqx.data.tokenizers import ByteTokenizer
from rattn_eqx.model import map_files
from rattn_eqx.model.language_model import LanguageModel
from rattn_eqx.model.local_layers import local_layers
from rattn_eqx.model.map_files import check_map, map_of, read_map, read_named, short
from rattn_eqx.training.checkpoint import save_checkpoint
from rattn_eqx.training.config import RunConfig
from rattn_eqx.training.loop import initial_state
from rattn_eqx.training.run_folder import identity, open_run
from rattn_eqx.training.step import is_decayed
from rattn_eqx.weights import own

KEY = jax.random.key(3)
MINE = """
import equinox as eqx
import jax
import jax.numpy as jnp
from pallas.feature_map import Hedgehog

def phi(x):
    return jnp.concatenate([jnp.maximum(x, 0.0), jnp.maximum(-x, 0.0)], axis=-1)

pair = (lambda x: 2.0 * phi(x), lambda x: 0.5 * phi(x))

class Scaled(eqx.Module):
    a_weight: jax.Array

    def __init__(self, head_size, *, key=None):
        self.a_weight = jnp.ones(())

    def __call__(self, x):
        return phi(x * self.a_weight)

module = Scaled(4)

def make(head_size, *, key):
    return Hedgehog(head_size, key=key)
"""


@pytest.fixture
def mine(tmp_path) -> Path:
    """A file of this test's own: what was read of another has another hash."""
    (path := tmp_path / "mine.py").write_text(f"# {tmp_path}\n{MINE}")
    return path


def logits(model: LanguageModel) -> np.ndarray:
    return np.asarray(model(jnp.arange(11, dtype=jnp.int32)))


@pytest.mark.parametrize(
    ("name", "same"), [("phi", "relu"), ("pair", "relu"), ("module", "relu"), ("Scaled", "relu"), ("make", "learned")]
)
def test_a_map_of_a_file_computes_what_the_same_map_by_name_does(mine, name, same):
    config = dataclasses.replace(CONFIG, num_layers=4, feature_map=read_map(f"{mine}:{name}", CONFIG.head_size))
    assert short(config.feature_map) == f"mine.py:{name}:{config.feature_map.split(':')[2][:8]}"
    model = LanguageModel(config, key=KEY)
    expected = LanguageModel(dataclasses.replace(config, feature_map=same), key=KEY)
    np.testing.assert_allclose(logits(model), logits(expected), rtol=1e-5, atol=1e-6)
    arrays = [x for layer in local_layers(model) for x in jax.tree.leaves(layer.feature_map) if eqx.is_array(x)]
    assert len(arrays) == (2 if name in ("module", "Scaled", "make") else 0)
    assert len({x.unsafe_buffer_pointer() for x in arrays}) == len(arrays), "a step would donate one array twice"
    decayed = jax.tree_util.tree_leaves_with_path(is_decayed(eqx.filter(model, eqx.is_array)))
    assert not any(yes for path, yes in decayed if ".feature_map" in jax.tree_util.keystr(path))


def test_a_source_is_known_by_its_bytes(mine, tmp_path):
    name = read_map(f"{mine}:phi")
    mine.rename(tmp_path / "renamed.py")
    renamed = read_map(f"{tmp_path / 'renamed.py'}:phi")
    assert map_of(name, 4, key=KEY) is map_of(renamed, 4, key=KEY)
    read_named(name, f"{tmp_path / 'renamed.py'}:phi")
    (tmp_path / "renamed.py").write_text(f"{(tmp_path / 'renamed.py').read_text()}\n")
    assert read_map(f"{tmp_path / 'renamed.py'}:phi") != renamed


def test_a_file_is_run_once(mine, capsys):
    mine.write_text(f"print('run')\n{mine.read_text()}")
    for name in ("phi", "make", "phi"):
        read_map(f"{mine}:{name}", 4)
    assert capsys.readouterr().out == "run\n"


WRONG = {
    "phi = lambda x: jnp.exp(x - x.max())": r"phi_q must act on the last axis alone; <lambda> \(mine.py:4\) mixes",
    "phi = lambda x: jnp.cumsum(x, axis=0)": "mixes tokens or heads",
    "phi = lambda x: x.sum(-1)": "keep every axis but the last",
    "phi = lambda x: x > 0": "must give floats; got bool",
    "phi = lambda x: jnp.log(x)": "must be finite, and its gradient too; it is not",
    "phi = lambda x: jnp.sqrt(jnp.maximum(x, 0.0))": "its gradient is not",
    "phi = lambda x: jnp.expp(x)": r"raised AttributeError: .*expp'? ?.*\(line 4\) of heads of size 4",
    "def phi(x):\n    raise SystemExit(3)": r"raised SystemExit: 3 \(line 5\)",
    "def phi(x):\n    return x if x.sum() > 0 else -x": r"raised TracerBoolConversionError: .*\(line 5\)",
    "phi = 3": "must be a map, a pair of maps, an Equinox module or a function make",
    "phi = (jnp.abs, 3)": "must give a map or a pair of maps",
    "def phi(d, *, key):\n    w = jax.random.normal(key, (d,))\n    return lambda x: x * w": "not a function that",
    "def phi(d, *, key):\n    return jnp.zeros(d)": "must give a map or a pair of maps",
    "def phi(d, *, key):\n    return 1 / 0": r"raised ZeroDivisionError: .*\(line 5\) of head_size=4",
    "other = jnp.abs": "defines no phi; it has other",
    "phi = (": r"raised SyntaxError: '\(' was never closed .*\(line 4\); mend it",
    "raise SystemExit(3)": r"raised SystemExit: 3 \(line 4\); mend it",
    "x = 1 / 0": r"raised ZeroDivisionError: division by zero \(line 4\); mend it",
    "from rattn_eqx.model.map_files import read_map\nread_map(f'{__file__}:phi')": "mine.py reads itself; put what it",
    "x = '" + "a" * 2**16 + "'": "must have at most 65,536 bytes",
}


@pytest.mark.parametrize("text", WRONG)
def test_a_file_without_a_map_that_could_be_trained_is_refused_with_its_line(tmp_path, text):
    (tmp_path / "mine.py").write_text(f"# {tmp_path}\nimport jax\nimport jax.numpy as jnp\n{text}\n")
    with pytest.raises(ValueError, match=rf"(?s)feature map mine.py:phi.*{WRONG[text]}"):
        read_map(f"{tmp_path / 'mine.py'}:phi", 4)


def test_what_is_no_small_regular_text_is_not_opened(tmp_path):
    (tmp_path / "folder.py").mkdir()
    os.mkfifo(tmp_path / "pipe.py")
    (tmp_path / "latin.py").write_bytes(b"x = '\xe9'")
    for place, words in (
        ("folder.py:phi", "it is a folder; give a Python file"),
        ("pipe.py:phi", "it is a pipe or a device; give a Python file"),
        ("latin.py:phi", "must be UTF-8 text"),
        ("missing.py:phi", "there is no file"),
        ("mine.py", "must be FILE.py:NAME; give one such as mine.py:phi"),
        ("mine.txt:phi", "must be FILE.py:NAME"),
        ("a:b.py:phi", "there is no file"),
        ("mine.py:a.b", "must be FILE.py:NAME"),
    ):
        with pytest.raises(ValueError, match=words):
            read_map(str(tmp_path / place))


def test_a_config_names_a_map_and_its_source_and_no_other(mine):
    name = read_map(f"{mine}:phi")
    for bad in (
        "mine.py:phi",
        name[:-1],
        f"{name}0",
        f"/tmp/{name}",
        f"../{name}",
        name.replace("phi", "a-b"),
        f"\n{name}",
    ):
        with pytest.raises(ValueError, match="ModelConfig: feature_map must be one of softmax, "):
            dataclasses.replace(CONFIG, feature_map=bad)


def run_of(folder: Path, feature_map: str) -> Path:
    config = RunConfig(dataclasses.replace(MODEL, feature_map=feature_map), training(), "0" * 64)
    open_run(folder, config, ByteTokenizer())
    run = {"run": identity(config, ByteTokenizer())}
    save_checkpoint(folder / "checkpoints", 3, initial_state(config), run)
    return folder


@pytest.mark.parametrize("name", ["phi", "make", "Scaled"])
def test_nothing_is_run_but_the_file_that_a_caller_names(mine, tmp_path, monkeypatch, name):
    """A folder holds the source for those who read; a stranger's may hold anything."""
    feature_map = read_map(f"{mine}:{name}", MODEL.head_size)
    run = run_of(tmp_path / "run", feature_map)
    model, _, _ = rattn_eqx.load(run)
    own.save(model, tmp_path / "model")
    shapes = [x.shape for x in jax.tree.leaves(eqx.filter(model, eqx.is_array))]
    ran = tmp_path / "ran"
    for folder in (run, tmp_path / "model"):
        assert (folder / "mine.py").read_text() == mine.read_text()
        (folder / "mine.py").write_text(f"open({str(ran)!r}, 'w').close()\n")
        (folder / "mine.json").write_text("{}")
    monkeypatch.setattr(map_files, "_read", {})
    own.parameters.structure.cache_clear()
    monkeypatch.chdir(run)
    (changed := tmp_path / "changed.py").write_text(f"{mine.read_text()}\nopen({str(ran)!r}, 'w').close()\n")
    for folder in (run, tmp_path / "model"):
        with pytest.raises(
            ValueError, match=rf"the map mine.py:{name}:\w{{8}} is of a file, .*; give --feature-map mine"
        ):
            rattn_eqx.load(folder)
        with pytest.raises(ValueError, match=r"must have the source of the model's map, .*; it has \w{64}") as refused:
            rattn_eqx.load(folder, feature_map=f"{changed}:{name}")
        assert feature_map.split(":")[2] in str(refused.value)
        with pytest.raises(ValueError, match="is not the model's, which has mine"):
            rattn_eqx.load(folder, feature_map=f"{mine}:pair")
    assert not ran.exists()
    for folder in (run, tmp_path / "model"):
        again, _, config = rattn_eqx.load(folder, feature_map=f"{mine}:{name}")
        assert config.feature_map == feature_map
        assert [x.shape for x in jax.tree.leaves(eqx.filter(again, eqx.is_array))] == shapes
        np.testing.assert_array_equal(logits(again), logits(model))
    assert not ran.exists()


def test_a_map_is_not_named_for_a_model_that_has_none_of_a_file(mine, tmp_path):
    with pytest.raises(ValueError, match="is not the model's, which has softmax; leave it out"):
        rattn_eqx.load(run_of(tmp_path / "run", "softmax"), feature_map=f"{mine}:phi")


def test_the_message_says_that_a_file_of_the_name_has_another_source(mine, monkeypatch):
    name = read_map(f"{mine}:phi")
    monkeypatch.setattr(map_files, "_read", {})
    mine.write_text(f"{mine.read_text()}\n")
    other = read_map(f"{mine}:phi")
    with pytest.raises(ValueError, match=f"the mine.py:phi that was read has another source, {short(other)}; give"):
        map_of(name, 4, key=KEY)


def test_a_model_of_another_map_than_its_config_s_is_not_saved(mine, tmp_path):
    """Another module with an array of the same name and shape would be loaded as the config's."""

    class Other(eqx.Module):
        weight: jax.Array

        def __call__(self, x):
            return jnp.exp(-jnp.abs(x @ self.weight))

    config = dataclasses.replace(CONFIG, feature_map=read_map(f"{mine}:make"))
    eye = jnp.eye(CONFIG.head_size)
    model = LanguageModel(config, feature_map=lambda key: Other(eye), key=KEY)
    with pytest.raises(ValueError, match="save: the model's feature maps must be that of its config"):
        own.save(model, tmp_path / "model")
    own.save(LanguageModel(config, key=KEY), tmp_path / "model")
    found, _, _ = rattn_eqx.load(tmp_path / "model")
    np.testing.assert_array_equal(logits(found), logits(LanguageModel(config, key=KEY)))


def test_a_source_is_kept_beside_a_run_and_nothing_of_the_user_s_replaced(mine, tmp_path):
    config = RunConfig(dataclasses.replace(MODEL, feature_map=read_map(f"{mine}:phi")), training(), "0" * 64)
    (folder := tmp_path / "run").mkdir()
    (folder / "mine.py").write_text("mine, too")
    with pytest.raises(ValueError, match=r"run/mine.py is not the source of the feature map, which is to be"):
        open_run(folder, config, ByteTokenizer())
    assert (folder / "mine.py").read_text() == "mine, too"
    (folder / "mine.py").unlink()
    open_run(folder, config, ByteTokenizer())
    assert (folder / "mine.py").read_text() == mine.read_text()
    assert json.loads((folder / "config.json").read_text())["model"]["feature_map"] == config.model.feature_map
    mine.write_text(f"{mine.read_text()}\n")
    other = dataclasses.replace(config, model=dataclasses.replace(MODEL, feature_map=read_map(f"{mine}:phi")))
    with pytest.raises(ValueError, match=r"\(the source of the feature map has changed; the run's is .*/run/mine.py\)"):
        open_run(folder, other, ByteTokenizer())


def test_a_map_is_checked_at_the_size_of_the_model_s_heads(tmp_path):
    (tmp_path / "fixed.py").write_text(
        f"# {tmp_path}\nimport jax.numpy as jnp\nphi = lambda x: jnp.cos(x @ jnp.ones((6, 8), x.dtype))\n"
    )
    name = read_map(f"{tmp_path / 'fixed.py'}:phi")
    check_map(name, 6)
    with pytest.raises(ValueError, match=r"raised TypeError: .*\(line 3\) of heads of size 4"):
        check_map(name, 4)
