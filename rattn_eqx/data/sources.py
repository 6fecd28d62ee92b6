"""The files that a corpus is made of: which there are, and what is left out."""

import collections
import dataclasses
import functools
import os
import re
import stat
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path

from rattn_eqx.data.cache import IS_CACHE
from rattn_eqx.data.files import LOCK
from rattn_eqx.data.packages import package_files

_DOCUMENTS = (".py", ".pyi", ".rst", ".md", ".txt", ".tex", ".pod", ".html", ".htm", ".json")  # of a package
_DOCUMENTS += tuple(f"{suffix}.gz" for suffix in _DOCUMENTS)


@dataclasses.dataclass(frozen=True)
class File:
    """A file of text, and what its content is known by until it is read."""

    name: str  # path relative to its root, with "/" on every system: fixes the order and the split
    path: str
    size: int
    modified: int
    changed: int  # unlike the time before, it cannot be set back


@dataclasses.dataclass(frozen=True)
class Root:
    """A folder, or a file, that is searched; with a label, one of installed packages, of which .py files are read."""

    path: str  # the real one
    label: str = ""


def find_roots(source: str | Path) -> list[Root]:
    """Where a source of `build_corpus` lies.

    Raises:
      ValueError: nothing there.
    """
    if source in ("python", "environment"):
        paths = sysconfig.get_paths()
        roots = [Root(os.path.realpath(paths["stdlib"]), "stdlib/")]
        if source == "environment":
            # One folder on most systems; a link to it (lib64) must not be counted twice.
            packages = dict.fromkeys(os.path.realpath(paths[kind]) for kind in ("purelib", "platlib"))
            roots += [Root(path, "site-packages/") for path in packages]
        return roots
    if not (Path(source).is_file() or Path(source).is_dir()):
        raise ValueError(
            f"build_corpus: no file or folder at {source}; give 'python', 'environment', 'package:NAME' or a path to "
            "UTF-8 text"
        )
    return [Root(os.path.realpath(source))]


def find_package(name: str) -> list[File]:
    """The code and documents that an installed package has, in order of their names; of "NAME/PART" those with PART in
    their paths.

    Raises: as `package_files`.
    """
    name, _, part = name.partition("/")
    files = [
        (file, path) for file, path in package_files("build_corpus", name) if file.endswith(_DOCUMENTS) and part in file
    ]
    found = [_file(file, str(path), os.stat(path)) for file, path in files if not _METADATA.search(file)]
    return sorted(found, key=lambda file: os.fsencode(file.name))


_METADATA = re.compile(r"^[^/]*\.(dist-info|egg-info|data)/")  # what pip knows of a package


def find_files(roots: list[Root], cache: Path, exclude: Iterable[Path]) -> tuple[list[File], dict[str, int]]:
    """The files of all roots in order of their names, and what is left out, counted by reason.

    The cache and what `exclude` names are counted whether or not they are there: the same command counts the same
    before it has written them and after. They say nothing of a root that lies within them, but for one that is
    excluded itself.
    """
    cache_path, excluded_paths = os.path.realpath(cache), [os.path.realpath(path) for path in exclude]
    found, left_out = [], {}
    for root in roots:
        excluded = {
            path: "excluded path" for path in excluded_paths if path == root.path or not _within(root.path, path)
        }
        if not _within(root.path, cache_path):
            excluded[cache_path] = "cache"
        left_out |= {path: reason for path, reason in excluded.items() if _within(path, root.path)}
        found += _walk(root, excluded, left_out)
    counts = dict(sorted(collections.Counter(left_out.values()).items()))
    return sorted(found, key=lambda file: os.fsencode(file.name)), counts


def _walk(root: Root, excluded: dict[str, str], left_out: dict[str, str]) -> Iterator[File]:
    """Give the files under one root, and note each path that is left out with the reason.

    Linked folders come last, in order, so that what lies in the root itself goes by its own name.
    """
    nested = {"site-packages", "dist-packages", "__pycache__"} if root.label else set()

    @functools.cache
    def reason(folder: str) -> str | None:
        return excluded.get(folder) or (None if root.label else _ours(folder))

    def reason_of_link(real: str) -> str | None:
        """What a link leads into may be left out for a folder above it."""
        above = (os.fspath(path) for path in (Path(real), *Path(real).parents))
        return next(filter(None, (reason(path) for path in above if not _within(root.path, path))), None)

    if not os.path.isdir(root.path):
        if root.path not in excluded:
            yield _file(os.path.basename(root.path), root.path, os.stat(root.path))
        return
    folders, links, visited = [(root.label, root.path)], [], set()
    while folders or links:
        if folders:
            prefix, folder = folders.pop()
            why = reason(folder)
        else:
            links.sort()
            prefix, folder, link = links.pop(0)
            if why := "linked folder" if folder in visited else reason_of_link(folder):
                left_out[link] = why
                continue
        if why or folder in visited:
            left_out |= {folder: why} if why else {}
            continue
        visited.add(folder)
        try:
            with os.scandir(folder) as listed:
                entries = list(listed)
        except OSError:  # forbidden, or a longer path than the system takes
            left_out[folder] = "unreadable folder"
            continue
        for entry in entries:
            name, path, is_link = entry.name, entry.path, entry.is_symlink()
            if name.startswith(".") or name in nested or path in excluded:
                continue
            try:
                status = entry.stat()
            except OSError:
                left_out[path] = "link to nowhere" if is_link else "unreadable file"
                continue
            real = os.path.realpath(path) if is_link else path
            if stat.S_ISDIR(status.st_mode):
                if not is_link:
                    folders.append((f"{prefix}{name}/", path))
                elif root.label or _within(folder, real):  # a circle
                    left_out[path] = "linked folder"
                else:
                    links.append((f"{prefix}{name}/", real, path))
            elif not stat.S_ISREG(status.st_mode):  # reading a pipe would wait for ever
                left_out[path] = "pipe or device"
            elif is_link and (why := reason_of_link(real)):
                left_out[path] = why
            elif name.endswith(".jsonl") and _is_results(path):
                left_out[path] = "results"
            elif not root.label or name.endswith(".py"):
                yield _file(f"{prefix}{name}", path, status)


def _ours(folder: str) -> str | None:
    """Whether a folder is a cache's or a run's, also one that has just begun or has lost its config."""
    if IS_CACHE.fullmatch(os.path.basename(folder)):
        return "cache"
    has = lambda name: os.path.lexists(os.path.join(folder, name))
    begun = has("config.json") and (has(LOCK) or has("checkpoints") or has("metrics.jsonl"))
    return "run folder" if begun or (has("metrics.jsonl") and has("checkpoints")) else None


def _is_results(path: str) -> bool:
    """Whether a file is one to which `rattn ablate` or `rattn evaluate` added lines."""
    try:
        with open(path, "rb") as file:
            return re.match(rb'\{"(name|run)": ".*?", "(trial|task)": ', file.read(2**12)) is not None
    except OSError:
        return False


def _file(name: str, path: str, status: os.stat_result) -> File:
    return File(name, path, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


def _within(path: str, folder: str) -> bool:
    return path == folder or path.startswith(folder.rstrip(os.sep) + os.sep)
