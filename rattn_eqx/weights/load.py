"""A model from whatever holds one: a run folder, a folder of ours or of Hugging Face's, a GGUF file."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from rattn_eqx.data import files
from rattn_eqx.data.packages import the_file
from rattn_eqx.data.tokenizers import Tokenizer
from rattn_eqx.model.config import ModelConfig
from rattn_eqx.model.language_model import LanguageModel
from rattn_eqx.model.map_files import read_named
from rattn_eqx.training.loop import load_model
from rattn_eqx.training.run_folder import load_config
from rattn_eqx.weights import hugging_face, own, parameters
from rattn_eqx.weights.foreign import Foreign
from rattn_eqx.weights.tokenizer import tokenizer_of

Kind = Literal["run", "own", "hugging_face", "gguf"]


def load(
    path: Path | str,
    dtype: str | None = None,
    *,
    compute_dtype: str | None = None,
    feature_map: str | None = None,
    report: Callable[[str], object] = print,
) -> tuple[LanguageModel, Tokenizer | None, ModelConfig]:
    """The model at a path, its tokenizer if it has one, and its config. Nothing at the path is executed.

    Tensors are read one at a time: no more memory than the model's and a few of its largest tensor.

    Args:
      path: a run folder that `rattn pretrain` left; a folder that `rattn import` or `weights.own.save` wrote; a Hugging
        Face folder of an architecture that `weights.architectures` lists; a GGUF file of one, or "package:NAME", the
        GGUF file of an installed package.
      dtype: of the parameters, such as "bfloat16"; None is float32; "stored": each as in the file.
      compute_dtype: in which the model computes; None: the dtype, if one is named; else what the folder says, or
        float32.
      feature_map: for a model whose map is of a user's Python file: that file and the map's name in it, FILE.py:NAME.
        It is run, as nothing else is, and must have the source that the model was trained with.
      report: told of checkpoints of a run that are passed over.

    Raises:
      ValueError: for a path that holds no such model, and for a file that is damaged, hostile or of another model;
        names path, reason and remedy. For a model whose map is of a file without feature_map, and as
        `map_files.read_named`.
      ImportError: a library is missing that the tokenizer or a quantised tensor needs; names what to install.
      OSError: as `open`.
    """
    path = the_file("load", path, ".gguf")
    parameters.check_dtype("load", dtype)
    if compute_dtype is not None and compute_dtype not in parameters.DTYPES:
        known = ", ".join(map(repr, parameters.DTYPES))
        raise ValueError(f"load: compute_dtype must be one of {known}, or None; got {compute_dtype!r:.80}")
    if feature_map is not None:
        read_named(config_of(path).feature_map, feature_map)
    kind = kind_of(path)
    named = None if dtype == "stored" else dtype
    if kind == "run":
        model, tokenizer, _ = load_model(path, report=report)
        if named is not None:
            cast = lambda x: x.astype(named) if eqx.is_array(x) and jnp.issubdtype(x.dtype, jnp.floating) else x
            model = jax.tree.map(cast, model)
        model = computing_in(model, compute_dtype or named or model.compute_dtype)
    elif kind == "own":
        model, tokenizer = own.load(path, dtype, compute_dtype)
    else:
        foreign = read_foreign(path, kind)
        tokenizer = tokenizer_of(foreign)  # first: it may be refused
        model = hugging_face.model_of(foreign, dtype, compute_dtype or named or "float32")
    return model, tokenizer, model.config


def load_with_tokenizer(
    path: Path | str, dtype: str | None = "stored", **options: Any
) -> tuple[LanguageModel, Tokenizer]:
    """`load` as commands use it, which write and read text: parameters as they are stored, and a tokenizer for sure.

    options: compute_dtype, feature_map and report, as of `load`.

    Raises:
      ValueError: as `load`, and for a model without a tokenizer.
    """
    model, tokenizer, _ = load(path, dtype, **options)
    if tokenizer is None:
        raise ValueError(f"load: {path} must have a tokenizer; it has none; put the checkpoint's into it")
    return model, tokenizer


def config_of(path: Path | str) -> ModelConfig:
    """The config of the model that `load` would give; no tensor is read.

    Raises: as `load`.
    """
    path = the_file("load", path, ".gguf")
    kind = kind_of(path)
    if kind == "run":
        return load_config(path).model
    return own.read_about(path).model if kind == "own" else hugging_face.matched(read_foreign(path, kind))[0]


def kind_of(path: Path) -> Kind:
    """What a path holds, by its config.json, or a file's first bytes.

    Raises:
      ValueError: for a file of another kind, and for a config.json that is damaged.
    """
    if path.is_file():
        with files.open_regular(path) as file:
            if file.read(4) == b"GGUF":
                return "gguf"
        raise ValueError(
            f"load: {path} must be a GGUF file, or the folder of a model; it is another file; give the folder it is in"
        )
    config = path / own.CONFIG
    match files.read_json(config) if os.path.lexists(config) else None:
        case {"format": _, "model": _}:
            return "own"
        case {"model_type": _}:
            return "hugging_face"
    return "run"  # or nothing, as its own reader says


def read_foreign(path: Path, kind: Kind) -> Foreign:
    """The checkpoint of another library."""
    if kind != "gguf":
        return hugging_face.read(path)
    from rattn_eqx.weights import gguf  # of no use without its extra packages

    return gguf.read(path)


def computing_in(model: LanguageModel, compute_dtype: str) -> LanguageModel:
    """The same model, computing in another dtype."""
    if model.compute_dtype == compute_dtype:
        return model
    options: dict[str, Any] = dict(compute_dtype=compute_dtype, rematerialise=model.rematerialise)
    like = eqx.filter_eval_shape(LanguageModel, model.config, **options, key=jax.eval_shape(jax.random.key, 0))
    return jax.tree.unflatten(jax.tree.structure(like), jax.tree.leaves(model))


def import_checkpoint(
    path: Path | str, folder: Path | str, *, dtype: str = "stored", compute_dtype: str = "float32"
) -> tuple[own.About, Tokenizer | None]:
    """Write the checkpoint at a path in our own format, one tensor in memory at a time. Returns what was written.

    Args:
      path: a Hugging Face folder or a GGUF file.
      folder: must not exist.
      dtype, compute_dtype: as of `load`; the default dtype keeps each as it is, and quantised ones in float32.

    Raises:
      ValueError: as `load`, and for a folder that exists, or a path that holds a model of ours.
    """
    path = the_file("load", path, ".gguf")
    parameters.check_dtype("import", dtype)
    own.require_new(folder)
    kind = kind_of(path)
    if kind in ("run", "own"):
        raise ValueError(f"import: {path} must be of another library; it is a model of ours; give it as it is")
    foreign = read_foreign(path, kind)
    config, read = hugging_face.matched(foreign)
    tokenizer = tokenizer_of(foreign)
    about = own.About(config, compute_dtype, {"source": path.name, "hugging_face": foreign.config})
    shapes = {name: leaf.shape for name, leaf in parameters.named(parameters.structure(config)).items()}
    kept = None if dtype == "stored" else parameters.DTYPES[dtype]
    own.write(folder, about, shapes, lambda name: np.asarray(read(name), kept), tokenizer)
    return about, tokenizer
