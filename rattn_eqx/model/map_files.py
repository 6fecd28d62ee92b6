"""A feature map from a Python file of the user's, and every map by the name that a config gives it.

A config says "mine.py:phi:SHA256 of the file's bytes" and nothing opens a file because of it: who wants the model reads
the map first (`read_map`), which keeps it for this process. What a name means is so fixed by its hash, of that one
file: a module that it imports is not part of it.
"""

import dataclasses
import functools
import hashlib
import inspect
import os
import re
import sys
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import PRNGKeyArray

from pallas.checks import check_feature_map
from pallas.feature_map import FeatureMap, Hedgehog, as_pair, named
from rattn_eqx.data import files
from rattn_eqx.data.programs import read_source, run_source, told

MAPS = (*named, "learned")
_NAME = re.compile(r"(?P<file>[^/\\:]+\.py):(?P<name>[^\W\d]\w*):(?P<sha256>[0-9a-f]{64})")
_LIMIT = 2**16  # bytes of a file, which every line of results of its map holds


@dataclasses.dataclass(frozen=True)
class _Read:
    """What a file defines under a name: a map, or a function that makes one of a head size and a key."""

    config_name: str
    found: Any
    is_maker: bool
    path: Path
    source: str


_read: dict[tuple[str, str], _Read] = {}  # by name and hash: the same source may have several paths


def is_place(text: str) -> bool:
    """Whether a text is meant as "FILE.py:NAME", and not as the name of a map."""
    return text not in MAPS and ".py" in text


def is_of_file(config_name: str) -> bool:
    """Whether a config's name of a map is that of a file's: "mine.py:phi:SHA256"."""
    return _NAME.fullmatch(config_name) is not None and config_name.isprintable()


def short(config_name: str) -> str:
    """A name for reading: of a file's map the first 8 digits of the hash; anything else as it is."""
    return config_name[:-56] if is_of_file(config_name) else config_name


def read_map(place: str, head_size: int | None = None) -> str:
    """Run a user's Python file for one of the maps that it defines; the name by which a config knows it.

    NAME of "FILE.py:NAME" is a map (..., d) -> (..., f), a pair of them for q and k, an Equinox module, whose
    parameters each local layer learns for itself from where they stand, or a maker: a function, or a class, with an
    argument `key`, such as make(head_size, *, key), that gives the module that a layer begins with. One source is run
    once in a process.

    Args:
      place: FILE.py:NAME.
      head_size: at which the map is checked, as `check_map`; None: where a model is built of it.

    Raises:
      ValueError: for another place, a file that is not regular, small and UTF-8, a program that raises, a name that is
        not there or no map, and as `check_map`; names file, line and remedy.
      OSError: as `open`.
    """
    path, name, source = _source_at(place)
    op, sha256 = f"feature map {path.name}:{name}", _sha256(source)
    config_name = f"{path.name}:{name}:{sha256}"
    if (name, sha256) not in _read:
        defined = _defined(op, path, sha256, source)
        if name not in defined:
            others = ", ".join(key for key, value in defined.items() if callable(value) and not key.startswith("_"))
            raise ValueError(f"{op}: {path} defines no {name}; it has {others[:300] or 'nothing to call'}")
        found = defined[name]
        is_maker = _is_maker(found)
        if not (is_maker or callable(found) or (isinstance(found, tuple) and len(found) == 2)):
            raise ValueError(
                f"{op}: {name} must be a map, a pair of maps, an Equinox module or a function make(head_size, *, key); "
                f"it is {found!r:.80}"
            )
        _read[name, sha256] = _Read(config_name, found, is_maker, path, source)
    if head_size is not None:
        check_map(config_name, head_size)
    return config_name


def read_named(config_name: str, place: str) -> None:
    """`read_map` of the file that holds the map of a model's config; another file is not run.

    Raises:
      ValueError: as `read_map`; where the model has another map, or the file another source than the model's.
    """
    if not is_of_file(config_name):
        raise ValueError(f"feature map: {place} is not the model's, which has {config_name}; leave it out")
    _, name, source = _source_at(place)
    given, wanted = {"name": name, "sha256": _sha256(source)}, _parts(config_name)
    if given["name"] != wanted["name"]:
        raise ValueError(f"feature map: {place} is not the model's, which has {short(config_name)}; give that one")
    if given != wanted:
        raise ValueError(
            f"feature map: {place} must have the source of the model's map, {short(config_name)}, with SHA-256 "
            f"{wanted['sha256']}; it has {given['sha256']}; give the file as it was, which a run folder and a line of "
            "results hold"
        )
    read_map(place)


def map_of(config_name: str, head_size: int, *, key: PRNGKeyArray) -> FeatureMap:
    """The map that a config names, as a local layer begins with it; a learned one has arrays of its own.

    Raises:
      ValueError: for a name of no map, for a file's map that this process has not read, and for a maker that raises.
    """
    if config_name == "learned":
        return Hedgehog(head_size, key=key)
    if config_name in named:
        return named[config_name]
    if not is_of_file(config_name):
        raise ValueError(f"feature map: {config_name!r:.200} must be one of {', '.join(MAPS)}, or what read_map gives")
    read = _found(config_name)
    if not read.is_maker:
        return jax.tree.map(lambda x: jnp.array(x, copy=True) if eqx.is_array(x) else x, read.found)
    try:
        return read.found(head_size, key=key)
    except (Exception, SystemExit) as error:
        raise ValueError(
            f"feature map {short(config_name)}: {read.path} raised {told(error, read.path)} of head_size={head_size}; "
            "mend it"
        ) from error


def source_of(config_name: str) -> str | None:
    """The source of a file's map, for those who read; None for a map by name."""
    return _found(config_name).source if is_of_file(config_name) else None


def check_place(folder: Path, config_name: str) -> None:
    """Refuse a folder in which another file stands where `keep_source` would write.

    Raises:
      ValueError: there is one. OSError: as `open`.
    """
    path, source = folder / config_name.partition(":")[0], source_of(config_name)
    if source is not None and os.path.lexists(path) and files.read_text(path) != source:
        raise ValueError(f"{path} is not the source of the feature map, which is to be kept there; give another folder")


def keep_source(folder: Path, config_name: str) -> None:
    """Write the source of a file's map beside its model, for those who read; nothing runs it from there."""
    check_place(folder, config_name)
    path, source = folder / config_name.partition(":")[0], source_of(config_name)
    if source is not None and not path.exists():
        files.write_text(path, source)


def is_source_of(source: str, config_name: str) -> bool:
    """Whether a text is the source that a config's name of a map states."""
    return is_of_file(config_name) and _sha256(source) == _parts(config_name)["sha256"]


def check_map(config_name: str, head_size: int) -> None:
    """Refuse a file's map that no layer of that head size could compute with; nothing to check of a map by name.

    Raises:
      ValueError: for a map that mixes tokens, gives another shape or no float, or of normal numbers is not finite, nor
        its gradient; for a maker whose modules differ in more than their numbers; names file, line and remedy.
    """
    if is_of_file(config_name):
        _check(config_name, head_size)


@functools.cache
def _check(config_name: str, head_size: int) -> None:
    op, read = f"feature map {short(config_name)}", _found(config_name)
    one, other = (map_of(config_name, head_size, key=jax.random.key(seed)) for seed in (0, 1))
    pair = as_pair(one)
    if len(pair) != 2 or not all(map(callable, pair)):
        raise ValueError(f"{op}: {read.path} must give a map or a pair of maps; got {one!r:.80}")
    (arrays, rest), (_, other_rest) = eqx.partition(one, eqx.is_array), eqx.partition(other, eqx.is_array)
    if not eqx.tree_equal(rest, other_rest):
        raise ValueError(
            f"{op}: {read.path} must make modules that are alike but for the numbers in their arrays; those of two "
            "keys are not; make an Equinox module with its arrays as fields, not a function that encloses them"
        )
    traced = functools.partial(map_of, config_name, head_size)
    eqx.filter_eval_shape(traced, key=jax.random.key(0))  # as a model is, whose numbers come later
    if wrong := [x for x in jax.tree.leaves(arrays) if not jnp.issubdtype(x.dtype, jnp.floating)]:
        raise ValueError(
            f"{op}: its arrays are parameters and must be float; got {wrong[0].dtype}; make constants in its call"
        )
    try:
        check_feature_map(op, one, head_size)
    except (ValueError, SystemExit) as error:
        if isinstance(error, ValueError) and error.__cause__ is None:
            raise
        raise ValueError(_raised(op, read, error.__cause__ or error, head_size)) from error
    x = jax.random.normal(jax.random.key(0), (16, head_size), jnp.float32)
    try:
        found = [phi(x) for phi in pair]
        slopes = [jax.grad(lambda x, phi=phi: phi(x).astype(jnp.float32).sum())(x) for phi in pair]
    except (Exception, SystemExit) as error:
        raise ValueError(_raised(op, read, error, head_size)) from error
    if wrong := [y for y in found if not jnp.issubdtype(y.dtype, jnp.floating)]:
        raise ValueError(f"{op}: it must give floats; got {wrong[0].dtype}; convert its result by .astype(x.dtype)")
    for what, arrays in (("it is", found), ("its gradient is", slopes)):
        if not all(jnp.isfinite(y).all() for y in arrays):
            raise ValueError(
                f"{op}: it must be finite, and its gradient too; {what} not, of normal numbers; keep logarithms and "
                "roots away from 0, and exponentials from large numbers, by jnp.maximum and jnp.minimum"
            )


def _raised(op: str, read: _Read, error: BaseException, head_size: int) -> str:
    remedy = "wrap a map of single vectors in jnp.vectorize(phi, signature='(d)->(f)')"
    return f"{op}: {read.path} raised {told(error, read.path)} of heads of size {head_size}; mend it, or {remedy}"


def _source_at(place: str) -> tuple[Path, str, str]:
    """The file, the name in it and the source of FILE.py:NAME."""
    file, _, name = place.rpartition(":")
    path = Path(os.path.expanduser(file))
    if path.suffix != ".py" or not name.isidentifier():
        raise ValueError(f"feature map: {place!r:.200} must be FILE.py:NAME; give one such as mine.py:phi")
    op = f"feature map {path.name}:{name}"
    source = read_source(op, path, _LIMIT)
    if not is_of_file(f"{path.name}:{name}:{_sha256(source)}"):
        raise ValueError(f"{op}: the file's name must be printable, without a colon; rename it")
    return path, name, source


def _defined(op: str, path: Path, sha256: str, source: str) -> dict[str, Any]:
    name = f"rattn_map_{sha256}"
    return sys.modules[name].__dict__ if name in sys.modules else run_source(op, path, source, name)


def _sha256(source: str) -> str:
    return hashlib.sha256(source.encode("utf-8", "surrogatepass")).hexdigest()


def _is_maker(found: Any) -> bool:
    try:
        return callable(found) and "key" in inspect.signature(found).parameters
    except (TypeError, ValueError):  # a callable without a signature
        return False


def _parts(config_name: str) -> dict[str, str]:
    matched = _NAME.fullmatch(config_name)
    assert matched is not None
    return {part: matched[part] for part in ("name", "sha256")}


def _found(config_name: str) -> _Read:
    parts = _parts(config_name)
    if (parts["name"], parts["sha256"]) in _read:
        return _read[parts["name"], parts["sha256"]]
    place = ":".join(config_name.split(":")[:2])
    changed = next((x for x in _read.values() if x.config_name.startswith(f"{place}:")), None)
    differs = "" if changed is None else f"; the {place} that was read has another source, {short(changed.config_name)}"
    raise ValueError(
        f"the map {short(config_name)} is of a file, which nothing opens by itself, and must be read first{differs}; "
        f"give --feature-map {place} or load(..., feature_map={place!r}), the file as it was, SHA-256 {parts['sha256']}"
    )
