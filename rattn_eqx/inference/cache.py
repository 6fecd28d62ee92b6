"""A cache in a file: what a model has read, to be continued in another process."""

import hashlib
import json
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import numpy as np
from jaxtyping import TypeCheckError
from safetensors import SafetensorError, safe_open
from safetensors.flax import save

from pallas.checked import checked
from rattn_eqx.data import files
from rattn_eqx.model.cache import Cache
from rattn_eqx.model.language_model import LanguageModel, check_cache

FORMAT = "rattn-eqx cache, version 1"


@checked
def save_cache(path: Path | str, cache: Cache, model: LanguageModel) -> None:
    """Write a cache of a model to a file in the safetensors format, whole or not at all.

    Arrays are named by layer and field, such as `layers.0.keys`; a batch's have their batch axis. The file says which
    model read the text, by a digest of its shapes and of a part of its numbers.

    Raises:
      ValueError: for a cache of another model.
    """
    check_cache("save_cache", model, _one_of(cache))
    arrays, room = _named(cache), json.dumps(cache.room)
    metadata = {"format": FORMAT, "room": room, "model": fingerprint(model), "digest": _digest(arrays, room)}
    with files.new_file(Path(path)) as file:
        file.write(save(arrays, metadata))


@checked
def load_cache(path: Path | str, model: LanguageModel) -> Cache:
    """The cache that `save_cache` wrote, equal to the bit. Nothing in the file is executed.

    Raises:
      ValueError: for a file that is no cache, or damaged, and for one of another model; names the file and the remedy.
    """
    again = "read the text again with model.prefill"
    files.open_regular(Path(path)).close()  # no pipe, no folder
    try:
        with safe_open(path, framework="flax") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise ValueError(f"load_cache: {path} must be a cache that save_cache wrote; it is not; {again}")
            if metadata.get("model") != fingerprint(model):
                raise ValueError(f"load_cache: {path} is a cache of another model, or of other parameters; {again}")
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dictionary)
    except SafetensorError as error:
        raise ValueError(f"load_cache: {path} is damaged ({error!s:.200}); {again}") from error
    room = metadata.get("room", "")
    if metadata.get("digest") != _digest(arrays, room):
        raise ValueError(f"load_cache: {path} is damaged: its content is not what was written; {again}")
    try:  # a digest can be made to fit
        like = eqx.filter_eval_shape(model.init_cache, json.loads(room), arrays["layers.0.keys"].dtype)
        if set(arrays) != set(_named(like)):
            raise ValueError("it has other arrays")
        cache = jax.tree.unflatten(jax.tree.structure(like), [arrays[name] for name in _named(like)])
        check_cache("load_cache", model, _one_of(cache))
        lengths = np.stack([np.asarray(layer.length) for layer in cache.layers])
        most = 2**31 - 1 if cache.room is None else cache.room
        if (lengths != lengths[0]).any() or (lengths < 0).any() or (lengths > most).any():
            raise ValueError("its lengths cannot be")
    except (ValueError, TypeError, KeyError, IndexError, TypeCheckError) as error:
        raise ValueError(f"load_cache: {path} is damaged ({error!s:.200}); {again}") from error
    return cache


def _one_of(cache: Cache) -> Cache:
    """Of a batch the first, else the cache itself."""
    return jax.tree.map(lambda x: x[0], cache) if cache.segment_id.ndim == 1 else cache


def fingerprint(model: LanguageModel) -> str:
    """A digest of the model's config and parameters: of each, the shape and at most 4,096 of its numbers."""
    digest = hashlib.sha256(repr((model.config, model.compute_dtype)).encode())
    for path, leaf in jax.tree_util.tree_leaves_with_path(eqx.filter(model, eqx.is_array)):
        numbers = leaf.reshape(-1)
        some = np.asarray(numbers[:: max(1, -(-numbers.size // 4096))])
        digest.update(repr((jax.tree_util.keystr(path), leaf.shape, str(leaf.dtype))).encode() + some.tobytes())
    return digest.hexdigest()


def _digest(arrays: dict[str, Any], room: str) -> str:
    digest = hashlib.sha256(repr(room).encode())
    for name in sorted(arrays):
        array = np.asarray(arrays[name])
        digest.update(repr((name, array.shape, str(array.dtype))).encode() + array.tobytes())
    return digest.hexdigest()


def _named(cache: Cache) -> dict[str, Any]:
    """Its arrays, or shapes, by name, in the order of its leaves."""
    leaves = jax.tree_util.tree_leaves_with_path(cache)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}
