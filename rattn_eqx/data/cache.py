"""Folders of a cache: what was written is what is found, or it is made again; which of them are of use.

A cache holds corpora (`python-KEY`, `environment-KEY`, `files-KEY`) and token files (`tokens-KEY`). Each folder's
`manifest.json` names the folder, has the sha256 of the other files and one of itself, and was last used when it was
last changed.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import re
import shutil
import stat
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from rattn_eqx.data.files import UNFINISHED, DamagedError, lock, read_json, remove_unfinished, sha256, write_json

IS_CACHE = re.compile(r"(python|environment|files|tokens)-[0-9a-f]{16}")  # a folder, whatever is in it
CORPUS = ("train.bin", "validation.bin")
TOKENS = ("train.npy", "validation.npy", "tokenizer.json")
_MANIFEST = "manifest.json"
_FIELDS: dict[tuple[str, ...], dict[str, type]] = {  # of the manifests of the two kinds
    CORPUS: {"path": str, "validation_share": float, "python": str, "sha256": str},
    TOKENS: {"corpus": str, "tokenizer": str},
}


def write_manifest(folder: Path, name: str, content: dict[str, Any]) -> dict[str, Any]:
    """Write and return a folder's manifest: `content`, with the `digests` of the files, and the name it will have."""
    sizes = {name: os.lstat(folder / name).st_size for name in content["digests"]}
    manifest = {**content, "sizes": sizes, "folder": name}
    manifest["digest"] = _digest(manifest)
    write_json(folder / _MANIFEST, manifest)
    return manifest


def digests(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """The sha256 of files of a folder."""
    return {name: sha256(folder / name) for name in names}


def check(folder: Path, names: Iterable[str]) -> dict[str, Any]:
    """Read a folder's manifest and hold the files against it, each read once: some seconds for each GB.

    Raises:
      DamagedError: names what is not as it was written: a missing file, a link or a pipe in its place, other content.
      OSError: what may not be read.
    """
    _require(folder, stat.S_ISDIR, "folder")
    _require(folder / _MANIFEST, stat.S_ISREG, "file")
    try:
        manifest = read_json(folder / _MANIFEST)
        fields = _FIELDS.get(tuple(names), {}) | {"digest": str, "digests": dict, "sizes": dict, "folder": str}
        sound = isinstance(manifest, dict) and all(isinstance(manifest.get(x), fields[x]) for x in fields)
        sound = sound and manifest["digest"] == _digest(manifest) and manifest["folder"] == folder.name
    except (DamagedError, RecursionError):
        sound = False
    if not sound:
        raise DamagedError(f"{folder / _MANIFEST} is not what was written")
    for name in names:
        _require(folder / name, stat.S_ISREG, "file")
        stated = manifest["sizes"].get(name), manifest["digests"].get(name)  # sizes first: a sparse file has no end
        if os.lstat(folder / name).st_size != stated[0] or sha256(folder / name) != stated[1]:
            raise DamagedError(f"{folder / name} is not what was written")
    return manifest


def find(folder: Path, names: Iterable[str], report: Callable[[str], object]) -> dict[str, Any] | None:
    """The manifest of a folder that passes `check`; None where there is none, or after a damaged one was removed.

    Raises:
      OSError: what may not be read, or removed.
    """
    while os.path.lexists(folder):
        with contextlib.suppress(FileNotFoundError):  # another process has removed it meanwhile
            found = os.lstat(folder)
            try:
                manifest = check(folder, names)
            except DamagedError as error:
                if os.path.samestat(found, os.lstat(folder)):  # else another process has made it again meanwhile
                    report(f"cache: {error}; removed, and made again")
                    _remove(folder)
                continue
            with contextlib.suppress(OSError):  # a cache that may not be written
                os.utime(folder / _MANIFEST)
            return manifest
    return None


@dataclasses.dataclass(frozen=True)
class Cached:
    """A folder of a cache: of what, how large, when it was last used (seconds since 1970), and in which state."""

    path: Path
    kind: str  # corpus, tokens, or unknown
    source: str
    num_bytes: int
    used: float
    state: str  # in use, superseded, damaged, unfinished


def contents(cache: Path) -> list[Cached]:
    """What a cache holds, each file read once to see whether it is damaged.

    A corpus is superseded by one of the same source, share and Python that was used later; token files are when no
    corpus in use has their text.

    Raises:
      OSError: no such folder, or what may not be read.
    """
    folders = [path for path in sorted(cache.iterdir()) if IS_CACHE.fullmatch(path.name)]
    manifests = {path: _manifest_or_none(path) for path in folders}
    newest: dict[Any, Path] = {}
    for path in sorted((path for path in folders if manifests[path]), key=_used):
        if not _is_tokens(path):
            manifest = manifests[path] or {}
            newest[manifest["path"], manifest["validation_share"], manifest["python"]] = path
    sources = {}
    for path in newest.values():
        manifest = manifests[path] or {}
        sources.setdefault(manifest["sha256"], []).append(manifest["path"])

    def entry(path: Path) -> Cached:
        kind, manifest = "tokens" if _is_tokens(path) else "corpus", manifests[path]
        if manifest is None:
            state, source = "damaged", "unknown"
        elif kind == "tokens":
            state = "in use" if manifest["corpus"] in sources else "superseded"
            of = " and ".join(sources.get(manifest["corpus"], [f"sha256 {manifest['corpus'][:16]}"]))
            source = f"{of}, {manifest['tokenizer']}"
        else:
            state, source = "in use" if path in newest.values() else "superseded", manifest["path"]
        return Cached(path, kind, source, _num_bytes(path), _used(path), state)

    unfinished = [
        Cached(path, "unknown", "unknown", _num_bytes(path), _used(path), "unfinished")
        for path in sorted(cache.glob(f"{UNFINISHED}*"))
    ]
    return [*map(entry, folders), *unfinished]


def describe(entry: Cached) -> str:
    """A line to print."""
    used = time.strftime("%Y-%m-%d %H:%M", time.localtime(entry.used))
    of = f"{entry.kind:<7} {entry.num_bytes:>15,} bytes, used {used}"
    return f"{entry.state:<10}  {of}  {entry.path.name}  {entry.source}"


def prune(cache: Path) -> list[Cached]:
    """Remove what is superseded, damaged or unfinished from a cache, and return it; links are not followed.

    Raises:
      LockedError: a run holds the cache.
      OSError: no such folder, or what may not be read or removed.
    """
    with lock(cache, "rattn cache"):
        found = [entry for entry in contents(cache) if entry.state != "in use"]
        for entry in found:
            if entry.state != "unfinished":
                _remove(entry.path)
        remove_unfinished(cache)
    return [entry for entry in found if not os.path.lexists(entry.path)]


def _digest(content: dict[str, Any]) -> str:
    kept = {name: content[name] for name in content if name != "digest"}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def _require(path: Path, is_kind: Callable[[int], bool], kind: str) -> None:
    try:
        mode = os.lstat(path).st_mode
    except (FileNotFoundError, NotADirectoryError) as error:
        raise DamagedError(f"{path} is missing") from error
    if not is_kind(mode):
        raise DamagedError(f"{path} is no {kind}, but a {'link' if stat.S_ISLNK(mode) else 'thing of another kind'}")


def _manifest_or_none(folder: Path) -> dict[str, Any] | None:
    try:
        return check(folder, TOKENS if _is_tokens(folder) else CORPUS)
    except DamagedError:
        return None


def _is_tokens(folder: Path) -> bool:
    return folder.name.startswith("tokens-")


def _used(folder: Path) -> float:
    """When a folder was last used; of a damaged one, when its own entries last changed."""
    for path in (folder / _MANIFEST, folder):
        with contextlib.suppress(OSError):
            return os.lstat(path).st_mtime
    return 0.0


def _num_bytes(folder: Path) -> int:
    if folder.is_symlink() or not folder.is_dir():
        return os.lstat(folder).st_size
    return sum(os.lstat(path).st_size for path in folder.rglob("*"))


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()
