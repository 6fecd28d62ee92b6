"""The parameters of a `LanguageModel` by name, and a model filled with them one by one."""

import functools
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from rattn_eqx.model.config import ModelConfig
from rattn_eqx.model.language_model import LanguageModel

DTYPES = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}


@functools.cache
def structure(config: ModelConfig, compute_dtype: str = "float32") -> LanguageModel:
    """The model with a `jax.ShapeDtypeStruct` in place of every parameter: no memory."""
    key = jax.eval_shape(jax.random.key, 0)
    return eqx.filter_eval_shape(LanguageModel, config, compute_dtype=compute_dtype, key=key)


def named(model: LanguageModel) -> dict[str, Any]:
    """Its parameters, or their shapes, by path: "blocks.0.attention.projections.query_weight"."""
    leaves = jax.tree_util.tree_leaves_with_path(eqx.filter(model, lambda x: eqx.is_array(x) or _is_shape(x)))
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def filled(like: LanguageModel, read: Callable[[str], np.ndarray], dtype: str | None) -> LanguageModel:
    """The model of a `structure` with its parameters, read one at a time.

    Args:
      read: gives a parameter by its path, in its shape.
      dtype: of parameters; None is float32, "stored" as each is given.
    """
    check_dtype("load", dtype)
    kept = None if dtype == "stored" else DTYPES[dtype or "float32"]
    flat, tree = jax.tree_util.tree_flatten_with_path(like)
    leaves = []
    for path, leaf in flat:
        if _is_shape(leaf):
            array = read(jax.tree_util.keystr(path, simple=True, separator="."))
            leaf = jnp.asarray(np.asarray(array, kept or array.dtype, order="C"))  # a number stays a number, of no axis
        leaves.append(leaf)
    return jax.tree_util.tree_unflatten(tree, leaves)


def check_dtype(function: str, dtype: str | None) -> None:
    """Refuse what is no dtype of parameters."""
    if dtype is not None and dtype != "stored" and dtype not in DTYPES:
        known = ", ".join(map(repr, [*DTYPES, "stored"]))
        raise ValueError(f"{function}: dtype must be one of {known}, or None; got {dtype!r:.80}")


def _is_shape(leaf: Any) -> bool:
    return isinstance(leaf, jax.ShapeDtypeStruct)
