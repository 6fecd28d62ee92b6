"""Text for pretraining without a download: sources and documents of what is installed, or the user's own files."""

import collections
import contextlib
import dataclasses
import hashlib
import os
import platform
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal

from rattn_eqx.data.cache import CORPUS, check, digests, find, write_manifest
from rattn_eqx.data.files import DamagedError, new_folder, open_regular
from rattn_eqx.data.packages import PREFIX
from rattn_eqx.data.prose import UNREADABLE, text_of, unpacked
from rattn_eqx.data.sources import File, find_files, find_package, find_roots

_FORMAT = 4  # part of the cache key: raise it when the same sources would give other bytes
_SEPARATOR = b"\0"  # free for this use, because files that hold it are dropped
_BLOCK = 2**24  # bytes


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
        """Return the documents of one split, in order.

        Raises:
          DamagedError: the file is not what was written.
        """
        path = {"train": self.train, "validation": self.validation}[split]
        with open_regular(path) as file:
            data = file.read()
        if hashlib.sha256(data).hexdigest() != self.manifest["digests"][path.name]:
            raise DamagedError(f"Corpus.documents: {path} is not what was written; build the corpus again")
        return data.split(_SEPARATOR)


def build_corpus(
    source: str | Path,
    cache: Path,
    *,
    validation_share: float = 0.06,
    exclude: Iterable[Path] = (),
    report: Callable[[str], object] = print,
) -> Corpus:
    """Gather a source's text files into a corpus under `cache`, or return the one that is already there.

    A file is dropped, and counted in the manifest, if it is empty, holds a NUL byte, is not UTF-8, cannot be read, or
    repeats an earlier file byte for byte. Files that end with .gz are unpacked, and of web pages (.html) the words are
    taken, without tags. The split depends on each file's path alone, so it is the same on every machine that has
    the same files. Names, sizes and times of the files are the cache's key: a changed file gives a new corpus. The
    whole text passes through memory once, and may take half of what is free.

    Hidden files are left out, and so are, counted in the manifest: the cache, what `exclude` names, every folder that
    is a run or a cache, pipes, devices, links to nowhere and folders that cannot be read. Linked folders of the user's
    own text are read once, and not where they lie above the link.

    A corpus that is found is held against its digests, some seconds for each GB; a damaged one is reported, removed
    and made again.

    Args:
      source: "python", the running interpreter's standard library (.py, its tests included); "environment", that and
        the installed packages' .py files; "package:NAME", the code and documents of an installed package, of whose JSON
        the sentences are taken, "package:NAME/PART", those with PART in their paths; or the path of a file or folder
        of text, whatever the suffixes, such as /usr/share/doc/NAME of a Debian package.
      cache: folder that receives `SOURCE-KEY/{train.bin, validation.bin, manifest.json}`, written whole or not at all.
      validation_share: the share of files, in (0, 1), that is held out; at least one file stands on each side. A
        corpus of one file is cut near that share of its bytes, at the end of a line.
      exclude: files and folders that are no part of the text, such as a run's own folder, there already or not.
      report: is given a line about a damaged corpus.

    Raises:
      ValueError: nothing at `source`, no text in it, too little to cut in two, too much for the memory, or a share
        outside (0, 1).
      OSError: the cache cannot be read or written.
    """
    if not 0.0 < validation_share < 1.0:
        raise ValueError(f"build_corpus: validation_share must lie between 0 and 1; got {validation_share}")
    package = str(source).removeprefix(PREFIX) if str(source).startswith(PREFIX) else None
    if package is None:
        roots = find_roots(source)
        files, left_out = find_files(roots, Path(cache), exclude)
        paths = [root.path for root in roots]
    else:
        files, left_out, paths = find_package(package), {}, [str(source)]
    if not files:
        besides = f" besides what is left out ({_in_words(left_out)})" if left_out else ""
        raise ValueError(f"build_corpus: no text files under {source}{besides}; give a folder with UTF-8 files")
    key = hashlib.sha256(repr((_FORMAT, paths, validation_share, platform.python_version())).encode())
    for file in files:
        key.update(os.fsencode(f"{file.name}\0{file.size}\0{file.modified}\0{file.changed}\n"))
    label = source if source in ("python", "environment") else "files"
    folder = Path(cache) / f"{label}-{key.hexdigest()[:16]}"
    manifest = find(folder, CORPUS, report)
    if manifest is None:
        kept, dropped = _read_text(files, sentences=package is not None)
        if not kept:
            raise ValueError(
                f"build_corpus: none of the {len(files)} files under {source} is text ({_in_words(dropped)});"
                " give UTF-8 files"
            )
        train, validation, rule = _split(kept, validation_share)
        with new_folder(folder) as unfinished:
            for name, documents in zip(CORPUS, (train, validation), strict=True):
                _write_documents(unfinished / name, documents)
            of_files = digests(unfinished, CORPUS)
            content = {
                "source": _printable(source),
                "path": _printable(" and ".join(paths)),
                "python": platform.python_version(),
                "files": len(kept),
                "dropped": dropped,
                "left_out": left_out,
                "train": {"files": len(train), "bytes": sum(map(len, train))},
                "validation": {"files": len(validation), "bytes": sum(map(len, validation))},
                # Of the splits' own digests, so that the same text cut elsewhere has another.
                "sha256": hashlib.sha256(b"".join(bytes.fromhex(of_files[name]) for name in CORPUS)).hexdigest(),
                "split": rule,
                "validation_share": validation_share,
                "digests": of_files,
            }
            write_manifest(unfinished, folder.name, content)
        manifest = check(folder, CORPUS)  # another process's, where that was quicker
    of_this_call = {"source": _printable(source), "left_out": left_out}
    if manifest != manifest | of_this_call:  # the text does not depend on them
        manifest |= of_this_call
        with contextlib.suppress(OSError):  # a cache that may not be written
            manifest = write_manifest(folder, folder.name, manifest)
    return Corpus(manifest, *(folder / name for name in CORPUS))


def describe(manifest: dict[str, Any]) -> str:
    """Return a corpus manifest as a few lines to print."""
    dropped, left_out = (_in_words(manifest[name]) or "none" for name in ("dropped", "left_out"))
    lines = [f"corpus {manifest['source']} (Python {manifest['python']})"]
    lines.append(f"files       {manifest['files']:,} kept; dropped: {dropped}; left out: {left_out}")
    for split in ("train", "validation"):
        lines.append(f"{split:<11} {manifest[split]['files']:,} files, {manifest[split]['bytes']:,} bytes")
    return "\n".join([*lines, f"split       {manifest['split']}", f"sha256      {manifest['sha256']}"])


def _in_words(counts: dict[str, int]) -> str:
    return ", ".join(f"{reason} {count:,}" for reason, count in counts.items())


def _printable(path: str | Path) -> str:
    """A path with "?" for the bytes that are not UTF-8."""
    return str(path).encode("utf-8", "replace").decode("utf-8")


def _read_text(files: list[File], *, sentences: bool) -> tuple[list[tuple[str, bytes]], dict[str, int]]:
    """Read the files that are text, each content once, and count the others by reason."""
    kept: list[tuple[str, bytes]] = []
    dropped = collections.Counter[str]()
    seen = set()
    room = _free_memory() // 2  # the other half is for the corpus's documents, when they are made tokens
    for file in files:
        try:
            name, data = _read_file(file, room)
            data = data and text_of(name, data, sentences=sentences)
        except UnicodeDecodeError:
            dropped["not UTF-8"] += 1
            continue
        except (OSError, DamagedError, *UNREADABLE):  # it may have become another kind of file meanwhile
            dropped["unreadable"] += 1
            continue
        if data is None or _SEPARATOR in data:
            dropped["NUL bytes"] += 1
        elif not data:
            dropped["empty"] += 1
        elif (digest := hashlib.sha256(data).digest()) in seen:
            dropped["duplicate"] += 1
        else:
            seen.add(digest)
            kept.append((file.name, data))
            room -= len(data)
    return kept, dict(sorted(dropped.items()))


def _read_file(file: File, room: int) -> tuple[str, bytes | None]:
    """A file's name and content, unpacked; None for one with NUL bytes, of which no more than the first block that has
    one is held.

    Raises:
      ValueError: it holds, or claims, more bytes than there is room for. OSError, DamagedError: as `open_regular`.
    """
    blocks, length = [], 0
    with open_regular(Path(file.path)) as opened:
        size = os.fstat(opened.fileno()).st_size
        name, content = unpacked(file.name, opened)
        while block := content.read(_BLOCK):
            if _SEPARATOR in block:
                return name, None
            blocks.append(block)
            length += len(block)
            if max(length, size) > room:
                raise ValueError(
                    f"build_corpus: the text must fit in half of the free memory; got {file.path} of"
                    f" {max(length, size):,} bytes where {max(room, 0):,} are left; leave it out, or give less text"
                )
    return name, b"".join(blocks)


def _free_memory() -> int:
    """Bytes of memory that a process can take, as far as the system says."""
    free = [2**63]
    with contextlib.suppress(OSError, ValueError, AttributeError):  # no such question to this system
        free.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        free.append(int(next(line for line in lines if line.startswith("MemAvailable")).split()[1]) * 1024)
    with contextlib.suppress(OSError, ValueError):  # of a container; "max" where it has all
        free.append(int(Path("/sys/fs/cgroup/memory.max").read_text(encoding="utf-8")))
    return min(free)


def _write_documents(path: Path, documents: list[bytes]) -> None:
    with open(path, "xb") as file:
        for index, document in enumerate(documents):
            file.write(_SEPARATOR * (index > 0))
            file.write(document)


def _split(kept: list[tuple[str, bytes]], share: float) -> tuple[list[bytes], list[bytes], str]:
    if len(kept) == 1:
        return _cut(kept[0][1], share)
    ranks = {name: hashlib.sha256(os.fsencode(name)).digest() for name, _ in kept}
    below = sum(int.from_bytes(rank[:8]) < share * 2**64 for rank in ranks.values())
    held_out = sorted(ranks, key=ranks.__getitem__)[: min(max(below, 1), len(kept) - 1)]
    contents = dict(kept)
    validation = [contents.pop(name) for name in held_out]
    return list(contents.values()), validation, f"by file: sha256 of the path, as a fraction, below {share:g}"


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
