"""A model in our own format: a folder with config.json, model.safetensors and, if there is one, tokenizer.json.
A feature map of a user's file stands there too, to be read and not run.

Tensors are named by the parameter's path. What was imported or converted is written so; a training run's checkpoints
are another thing (`rattn_eqx.training.checkpoint`).
"""

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from rattn_eqx.data import files
from rattn_eqx.data.tokenizers import Tokenizer, load_tokenizer
from rattn_eqx.model.config import ModelConfig
from rattn_eqx.model.fields import made
from rattn_eqx.model.language_model import LanguageModel
from rattn_eqx.model.local_layers import local_layers
from rattn_eqx.model.map_files import keep_source
from rattn_eqx.weights import parameters
from rattn_eqx.weights.safetensors import open_tensors, write_tensors

FORMAT = "rattn-eqx model, version 1"
CONFIG, TENSORS, TOKENIZER = "config.json", "model.safetensors", "tokenizer.json"


@dataclasses.dataclass(frozen=True)
class About:
    """What config.json says.

    compute_dtype: in which the model computes. origin: where it comes from, as JSON: of an imported model its `source`
    and Hugging Face's config, `hugging_face`.
    """

    model: ModelConfig
    compute_dtype: str
    origin: dict[str, Any]


def save(
    model: LanguageModel,
    folder: Path | str,
    *,
    tokenizer: Tokenizer | None = None,
    origin: dict[str, Any] | None = None,
) -> None:
    """Write any model whose layers are those of its config, each parameter in its dtype, whole or not at all.

    Args:
      folder: must not exist.
      origin: of `About`.

    Raises:
      ValueError: for a folder that exists, a model with other layers, and a dtype beyond 32 bits.
      OSError: as `open`, and for a full disk.
    """
    leaves, expected = parameters.named(model), parameters.named(parameters.structure(model.config))
    shapes = lambda named: {path: leaf.shape for path, leaf in named.items()}
    if shapes(leaves) != shapes(expected):
        different = min(set(shapes(leaves).items()) ^ set(shapes(expected).items()))[0]
        raise ValueError(
            f"save: the model's layers must be those of its config; {different} is another; build the model of its "
            "config"
        )
    if _maps(model) != _maps(parameters.structure(model.config)):
        raise ValueError(
            f"save: the model's feature maps must be that of its config, {model.config.feature_map}; they are others"
        )
    about = About(model.config, model.compute_dtype, origin or {})
    write(folder, about, shapes(leaves), lambda path: np.asarray(leaves[path]), tokenizer)


def write(
    folder: Path | str,
    about: About,
    shapes: dict[str, tuple[int, ...]],
    read: Callable[[str], np.ndarray],
    tokenizer: Tokenizer | None,
) -> None:
    """`save` of parameters that are read one at a time: the shape of each by its path, and what gives it."""
    folder = require_new(folder)
    with files.new_folder(folder) as unfinished:
        write_tensors(unfinished / TENSORS, shapes, read, {"format": FORMAT})
        if tokenizer is not None:
            tokenizer.save(unfinished / TOKENIZER)
        keep_source(unfinished, about.model.feature_map)
        files.write_json(unfinished / CONFIG, {"format": FORMAT, **dataclasses.asdict(about)})


def require_new(folder: Path | str) -> Path:
    """The path of a folder to be written; a ValueError if something is there."""
    folder = Path(folder)
    if os.path.lexists(folder):
        raise ValueError(f"save: {folder} must not exist yet; give another folder")
    return folder


def read_about(folder: Path) -> About:
    """What config.json says.

    Raises:
      ValueError: for another file; names it and what is wrong.
    """
    path = folder / CONFIG
    match files.read_json(path):
        case {"format": str(kind), "model": dict(model), "compute_dtype": str(compute_dtype), "origin": dict(origin)}:
            pass
        case _:
            raise ValueError(f"load: {path} must have format, model, compute_dtype and origin; put back a good copy")
    if kind != FORMAT:
        raise ValueError(f"load: {path} must have the format {FORMAT!r}; it has {kind!r:.80}; use a newer rattn-eqx")
    if compute_dtype not in parameters.DTYPES:
        raise ValueError(f"load: {path} is damaged: compute_dtype is {compute_dtype!r:.80}; put back a good copy")
    try:
        return About(made(ModelConfig, model), compute_dtype, origin)
    except ValueError as error:
        raise ValueError(f"load: {path} is damaged: {error}; put back a good copy") from error


def load(
    folder: Path, dtype: str | None = None, compute_dtype: str | None = None
) -> tuple[LanguageModel, Tokenizer | None]:
    """The model and the tokenizer that `save` wrote.

    Args: as of `rattn_eqx.load`.

    Raises:
      ValueError: for a file that is not sound, or not of the config; names it and what is wrong.
    """
    about, file = read_about(folder), open_tensors(folder / TENSORS)
    if about.model.num_layers > len(file.entries):  # before as many layers as are claimed
        raise ValueError(
            f"load: {folder / TENSORS} refused: it must have tensors for {about.model.num_layers:,} layers; it has "
            f"{len(file.entries):,} in all; put back the model's own files"
        )
    like = parameters.structure(about.model, compute_dtype or _computing(dtype) or about.compute_dtype)
    expected = {path: leaf.shape for path, leaf in parameters.named(like).items()}
    found = {path: entry.shape for path, entry in file.entries.items()}
    if different := sorted(path for path in expected | found if expected.get(path) != found.get(path)):
        name = different[0]
        raise ValueError(
            f"load: {folder / TENSORS} refused: {name!r:.120} must be {expected.get(name, 'absent')}, and is "
            f"{found.get(name, 'absent')}; put back the model's own files"
        )
    tokenizer = load_tokenizer(folder / TOKENIZER) if (folder / TOKENIZER).exists() else None
    return parameters.filled(like, file.read, dtype), tokenizer


def _maps(model: LanguageModel) -> list[Any]:
    """What the local layers' maps are, but for the numbers of their arrays."""
    maps = [jax.tree.flatten(layer.feature_map) for layer in local_layers(model)]
    return [(structure, [leaf for leaf in leaves if callable(leaf)]) for leaves, structure in maps]


def _computing(dtype: str | None) -> str | None:
    return None if dtype == "stored" else dtype
