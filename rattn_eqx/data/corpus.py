"""Text for pretraining without a download: the interpreter's sources, its environment's, or the user's own files."""

import collections
import dataclasses
import hashlib
import json
import os
import platform
import stat
import sysconfig
from pathlib import Path
from typing import Any, Literal

from rattn_eqx.data.files import new_folder

_FORMAT = 2  # part of the cache key: raise it when the same sources would give other bytes
_SEPARATOR = b"\0"  # free for this use, because files that hold it are dropped


@dataclasses.dataclass(frozen=True)
class Corpus:
    """A text corpus on disk, cut into a training and a validation split that share no file.

    `train` and `validation` are files that hold their documents joined by NUL bytes, `manifest` says where they came
    from (`describe` prints it). Its `sha256` stands for the text of both splits. Training documents stand in order of
    their path; validation documents in order of their path's hash, so that the first bytes of the split are a fair
    sample of it.
    """

    manifest: dict[str, Any]
    train: Path
    validation: Path

    def documents(self, split: Literal["train", "validation"]) -> list[bytes]:
        """Return the documents of one split, in order."""
        return {"train": self.train, "validation": self.validation}[split].read_bytes().split(_SEPARATOR)


@dataclasses.dataclass(frozen=True)
class _File:
    name: str  # path relative to its root, with "/" on every system: fixes the order and the split
    path: str
    size: int
    modified: int


def build_corpus(source: str | Path, cache: Path, *, validation_share: float = 0.06) -> Corpus:
    """Gather a source's text files into a corpus under `cache`, or return the one that is already there.

    A file is dropped, and counted in the manifest, if it is empty, holds a NUL byte, is not UTF-8, cannot be read, or
    repeats an earlier file byte for byte. The split depends on each file's path alone, so it is the same on every
    machine that has the same files. Names, sizes and times of the files are the cache's key: a changed file gives a
    new corpus. The whole text passes through memory once.

    Args:
      source: "python", the running interpreter's standard library (.py, its tests included); "environment", that and
        the installed packages' .py files; or the path of a file or folder of the user's own text, whatever the
        suffixes. Hidden files and the cache itself are left out.
      cache: folder that receives `SOURCE-KEY/{train.bin, validation.bin, manifest.json}`, written whole or not at all.
      validation_share: the share of files, in (0, 1), that is held out; at least one file stands on each side. A
        corpus of one file is cut near that share of its bytes, at the end of a line.

    Raises:
      ValueError: nothing at `source`, no text in it, too little to cut in two, or a share outside (0, 1).
    """
    if not 0.0 < validation_share < 1.0:
        raise ValueError(f"build_corpus: validation_share must lie between 0 and 1; got {validation_share}")
    cache = Path(cache)
    files = _find_files(source, cache)
    if not files:
        raise ValueError(f"build_corpus: no text files under {source}; give a folder with UTF-8 files")
    key = hashlib.sha256(repr((_FORMAT, str(source), validation_share, platform.python_version())).encode())
    for file in files:
        key.update(os.fsencode(f"{file.name}\0{file.size}\0{file.modified}\n"))
    label = source if source in ("python", "environment") else "files"
    folder = cache / f"{label}-{key.hexdigest()[:16]}"
    if not folder.exists():
        kept, dropped = _read_text(files)
        if not kept:
            reasons = ", ".join(f"{reason} {count}" for reason, count in dropped.items())
            raise ValueError(
                f"build_corpus: none of the {len(files)} files under {source} is text ({reasons}); give UTF-8 files"
            )
        train, validation, rule = _split(kept, validation_share)
        blobs = {"train": _SEPARATOR.join(train), "validation": _SEPARATOR.join(validation)}
        manifest = {
            "source": str(source),
            "python": platform.python_version(),
            "files": len(kept),
            "dropped": dropped,
            "train": {"files": len(train), "bytes": sum(map(len, train))},
            "validation": {"files": len(validation), "bytes": sum(map(len, validation))},
            "sha256": _sha256_of_splits(blobs["train"], blobs["validation"]),
            "split": rule,
        }
        with new_folder(folder) as unfinished:
            for split, blob in blobs.items():
                (unfinished / f"{split}.bin").write_bytes(blob)
            (unfinished / "manifest.json").write_text(json.dumps(manifest, indent=2), encoding="utf-8")
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    return Corpus(manifest, folder / "train.bin", folder / "validation.bin")


def describe(manifest: dict[str, Any]) -> str:
    """Return a corpus manifest as a few lines to print."""
    dropped = ", ".join(f"{reason} {count:,}" for reason, count in manifest["dropped"].items()) or "none"
    lines = [f"corpus {manifest['source']} (Python {manifest['python']})"]
    lines.append(f"files       {manifest['files']:,} kept; dropped: {dropped}")
    for split in ("train", "validation"):
        lines.append(f"{split:<11} {manifest[split]['files']:,} files, {manifest[split]['bytes']:,} bytes")
    return "\n".join([*lines, f"split       {manifest['split']}", f"sha256      {manifest['sha256']}"])


def _find_files(source: str | Path, cache: Path) -> list[_File]:
    if source in ("python", "environment"):
        paths = sysconfig.get_paths()
        roots = [("stdlib/", Path(paths["stdlib"]))]
        if source == "environment":
            # One folder on most systems; a link to it (lib64) must not be counted twice.
            packages = dict.fromkeys(Path(paths[kind]).resolve() for kind in ("purelib", "platlib"))
            roots += [("site-packages/", root) for root in packages]
        found = [file for label, root in roots for file in _walk(root, cache, label, suffix=".py")]
    elif Path(source).is_file():
        status = os.stat(source)
        found = [_File(Path(source).name, str(source), status.st_size, status.st_mtime_ns)]
    elif Path(source).is_dir():
        found = _walk(Path(source), cache)
    else:
        raise ValueError(
            f"build_corpus: no file or folder at {source}; give 'python', 'environment' or a path to UTF-8 text"
        )
    return sorted(found, key=lambda file: os.fsencode(file.name))


def _walk(root: Path, cache: Path, label: str = "", suffix: str = "") -> list[_File]:
    """List the files under one root; a label stands for an installed root, whose nested roots are left out."""
    nested = {"site-packages", "dist-packages", "__pycache__"} if label else set()
    top, cache_path = str(root.resolve()), str(cache.resolve())
    found = []
    for folder, subfolders, names in os.walk(top):
        subfolders[:] = [
            name
            for name in subfolders
            if not name.startswith(".") and name not in nested and os.path.join(folder, name) != cache_path
        ]
        for name in names:
            if name.startswith(".") or not name.endswith(suffix):
                continue
            path = os.path.join(folder, name)
            try:
                status = os.stat(path)
            except OSError:  # a link to nowhere
                continue
            if stat.S_ISREG(status.st_mode):  # reading a pipe would wait for ever
                relative = label + path.removeprefix(top).lstrip(os.sep).replace(os.sep, "/")
                found.append(_File(relative, path, status.st_size, status.st_mtime_ns))
    return found


def _read_text(files: list[_File]) -> tuple[list[tuple[str, bytes]], dict[str, int]]:
    """Read the files that are text, each content once, and count the others by reason."""
    kept: list[tuple[str, bytes]] = []
    dropped = collections.Counter[str]()
    seen = set()
    for file in files:
        try:
            data = Path(file.path).read_bytes()
        except OSError:
            dropped["unreadable"] += 1
            continue
        if not data:
            dropped["empty"] += 1
        elif _SEPARATOR in data:
            dropped["NUL bytes"] += 1
        elif not _is_utf8(data):
            dropped["not UTF-8"] += 1
        elif (digest := hashlib.sha256(data).digest()) in seen:
            dropped["duplicate"] += 1
        else:
            seen.add(digest)
            kept.append((file.name, data))
    return kept, dict(sorted(dropped.items()))


def _is_utf8(data: bytes) -> bool:
    try:
        data.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _split(kept: list[tuple[str, bytes]], share: float) -> tuple[list[bytes], list[bytes], str]:
    if len(kept) == 1:
        return _cut(kept[0][1], share)
    ranks = {name: hashlib.sha256(os.fsencode(name)).digest() for name, _ in kept}
    below = sum(int.from_bytes(rank[:8]) < share * 2**64 for rank in ranks.values())
    held_out = sorted(ranks, key=ranks.__getitem__)[: min(max(below, 1), len(kept) - 1)]
    contents = dict(kept)
    validation = [contents.pop(name) for name in held_out]
    return list(contents.values()), validation, f"by file: sha256 of the path, as a fraction, below {share:g}"


def _sha256_of_splits(train: bytes, validation: bytes) -> str:
    """Of the splits' own digests, so that the same text cut elsewhere has another."""
    return hashlib.sha256(hashlib.sha256(train).digest() + hashlib.sha256(validation).digest()).hexdigest()


def _cut(data: bytes, share: float) -> tuple[list[bytes], list[bytes], str]:
    """Cut the only file at the line boundary nearest before its last `share`, or the first after it."""
    aim = min(round(len(data) * (1 - share)), len(data) - 1)
    character = next((at for at in range(aim, 0, -1) if data[at] & 0xC0 != 0x80), 0)  # not inside a UTF-8 sequence
    for boundary, at in [
        ("a line boundary", data.rfind(b"\n", 0, aim) + 1),
        ("a line boundary", data.find(b"\n", aim) + 1),
        ("a character, for want of lines", character),
    ]:
        if 0 < at < len(data):
            return [data[:at]], [data[at:]], f"within the only file: at byte {at:,} of {len(data):,}, {boundary}"
    raise ValueError(f"build_corpus: the only file cannot be cut in two; got {len(data)} bytes; give more text")
