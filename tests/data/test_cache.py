"""What a cache holds is what was written, or is made again; what is of no use is removed, and nothing else."""

import contextlib
import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from rattn_eqx.__main__ import main
from rattn_eqx.data import cache as cache_module
from rattn_eqx.data import cache as caches
from rattn_eqx.data.corpus import build_corpus
from rattn_eqx.data.files import DamagedError, lock
from rattn_eqx.data.tokenizers import ByteTokenizer, tokenize


@pytest.fixture
def text(tmp_path) -> Path:
    (tmp_path / "text").mkdir()
    for index in range(5):
        (tmp_path / "text" / f"{index}.txt").write_bytes(b"document %d\n" % index)
    return tmp_path / "text"


def make(text: Path, cache: Path, reports: list[str]) -> tuple:
    """All that callers see of a corpus and its tokens, made or found."""
    corpus = build_corpus(text, cache, report=reports.append)
    tokens = tokenize(corpus, ByteTokenizer(), cache, report=reports.append)
    files = [corpus.train, corpus.validation, *tokens, tokens[0].parent / "tokenizer.json"]
    assert not any(path.is_symlink() for path in files)
    return corpus.manifest, {path.relative_to(cache): path.read_bytes() for path in files}


def overwrite(path: Path, byte: bytes) -> None:
    path.write_bytes(path.read_bytes()[:128] + byte * (path.stat().st_size - 128))


def replace(path: Path, by: Callable[[Path], object]) -> None:
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    by(path)


def set_value(path: Path, **values) -> None:
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | values), encoding="utf-8")


def restate(path: Path, **values) -> None:
    """A manifest edited by somebody who gave it the digest that fits."""
    content = json.loads(path.read_text("utf-8")) | values
    content.pop("digest")
    path.write_text(json.dumps(content | {"digest": cache_module._digest(content)}), encoding="utf-8")


DAMAGE: dict[str, tuple[str, Callable[[Path], object]]] = {
    "zeros": ("tokens-*/train.npy", lambda path: overwrite(path, b"\0")),
    "65535": ("tokens-*/train.npy", lambda path: overwrite(path, b"\xff")),
    "empty tokens": ("tokens-*/validation.npy", lambda path: path.write_bytes(b"")),
    "short tokens": ("tokens-*/train.npy", lambda path: os.truncate(path, path.stat().st_size - 5)),
    "sparse": ("tokens-*/train.npy", lambda path: os.truncate(path, 2**42)),  # 4 TiB, were it read to its end
    "empty manifest": ("files-*/manifest.json", lambda path: path.write_bytes(b"")),
    "other manifest": ("files-*/manifest.json", lambda path: path.write_bytes(b"[1]")),
    "deep manifest": ("files-*/manifest.json", lambda path: path.write_bytes(b'{"digest":' * 900 + b"1" + b"}" * 900)),
    "a value": ("files-*/manifest.json", lambda path: set_value(path, files="5")),
    "digests of another kind": ("files-*/manifest.json", lambda path: restate(path, digests=[])),
    "corpus of another kind": ("tokens-*/manifest.json", lambda path: restate(path, corpus=3)),
    "no digests": ("tokens-*/manifest.json", lambda path: path.unlink()),  # as older versions left them
    "other text": ("files-*/train.bin", lambda path: path.write_bytes(path.read_bytes().upper())),
    "FIFO": ("files-*/train.bin", lambda path: replace(path, os.mkfifo)),
    "endless": ("tokens-*/train.npy", lambda path: replace(path, lambda p: p.symlink_to("/dev/zero"))),
    "folder": ("tokens-*/tokenizer.json", lambda path: replace(path, Path.mkdir)),
    "a link for all": ("files-*", lambda path: replace(path, lambda p: p.symlink_to(p.parent.parent / "text"))),
    "a file for all": ("tokens-*", lambda path: replace(path, Path.touch)),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_cache_is_named_and_made_again(text, tmp_path, damage):
    cache, reports = tmp_path / "cache", []
    whole = make(text, cache, reports)
    [path] = cache.glob(DAMAGE[damage][0])
    DAMAGE[damage][1](path)
    assert reports == []
    assert make(text, cache, reports) == whole
    [line] = reports
    assert line.startswith(f"cache: {path} is ")
    assert line.endswith("; removed, and made again")
    assert len(list(text.iterdir())) == 5
    assert make(text, cache, reports) == whole
    assert len(reports) == 1


def test_a_cache_of_another_text_under_this_name_is_made_again(text, tmp_path):
    cache, reports = tmp_path / "cache", []
    whole = make(text, cache, reports)
    shutil.copytree(text, tmp_path / "other")
    (tmp_path / "other" / "5.txt").write_bytes(b"one more\n")
    make(tmp_path / "other", tmp_path / "others", reports)
    for kind in ("files-*", "tokens-*"):
        [mine], [theirs] = cache.glob(kind), (tmp_path / "others").glob(kind)
        replace(mine, lambda path, theirs=theirs: shutil.copytree(theirs, path))
    assert make(text, cache, reports) == whole
    assert len(reports) == 2


def test_text_that_changes_after_it_was_found_is_not_trained_on(text, tmp_path):
    corpus = build_corpus(text, tmp_path / "cache")
    corpus.train.write_bytes(corpus.train.read_bytes().upper())
    with pytest.raises(DamagedError, match=f"{corpus.train} is not what was written; build the corpus again"):
        tokenize(corpus, ByteTokenizer(), tmp_path / "cache")
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_cache_lists_and_prunes(text, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    command, cache = ["cache", "--cache", "~/cache"], tmp_path / "cache"
    assert main(command) == 0
    assert capsys.readouterr().out == f"no cache at {cache}\n"
    make(text, cache, [])
    (text / "new.txt").write_bytes(b"new\n")
    os.utime(next(cache.glob("files-*/manifest.json")), (1, 1))
    newest = make(text, cache, [])[1]
    damaged, unfinished, other = cache / f"files-{0:016x}", cache / ".unfinished-1", cache / "mine"
    for folder in (damaged, unfinished, other):
        folder.mkdir()
    (damaged / "outside").symlink_to(text)

    assert main(command) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sorted(line.split()[0] for line in lines) == ["damaged", "in", "in", *["superseded"] * 2, "unfinished"]
    assert [line for line in lines if "superseded  corpus" in line and "used 1970-01-01" in line and str(text) in line]
    assert [line for line in lines if line.startswith("in use      tokens") and f"{text}, byte 258" in line]

    with lock(cache, "a run", shared=True):
        assert main([*command, "--prune"]) == 2
    assert "rattn cache: other processes hold it" in capsys.readouterr().err
    assert main([*command, "--prune"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["removed"] * 4 + ["in"] * 2
    assert {path.name for path in cache.iterdir()} == {".lock", "mine", *(path.parts[0] for path in newest)}
    assert len(list(text.iterdir())) == 6
    reports = []
    assert make(text, cache, reports)[1] == newest
    assert reports == []


VALUES = [None, 1, -1.5, "x", [], {}, [[1]], True]


def random_edit(cache: Path, beside: Path, dice: random.Random) -> str:
    """Damage a cache, or do it no harm, and say how."""
    folder = dice.choice(sorted(cache.glob("*-*")))
    path = dice.choice([folder, *sorted(folder.iterdir()) * 3]) if folder.is_dir() else folder
    kinds: dict[str, Callable[[Path], object]] = {
        "FIFO": os.mkfifo,
        "folder": Path.mkdir,
        "full folder": lambda p: shutil.copytree(beside, p),
        "nothing": lambda p: None,
        "link": lambda p: p.symlink_to(dice.choice(["nowhere", "/dev/zero", beside, beside / "file", p])),
        "copy": lambda p: shutil.copy(dice.choice([x for x in cache.glob("*/*") if x.is_file()]), p),
    }
    edit = dice.choice(["flip", "flip", "cut", "longer", "zeros", "value", *kinds])
    if edit in kinds:
        replace(path, kinds[edit])
    elif path.is_dir() and not path.is_symlink():
        (path / f"unknown {len(list(path.iterdir()))}").write_bytes(b"no harm")
    elif edit == "value" and path.suffix == ".json":
        with contextlib.suppress(ValueError, OSError):  # damaged already
            set_value(
                path, **{dice.choice(["files", "digests", "folder", "digest", "sha256", "new"]): dice.choice(VALUES)}
            )
    elif path.is_file() and not path.is_symlink() and (data := bytearray(path.read_bytes())):
        at = dice.randrange(len(data))
        if edit == "zeros":
            data[at:] = bytes(len(data) - at)
        else:
            data[at] ^= dice.randrange(1, 256)
        path.write_bytes(data[: at if edit == "cut" else None] + b"\0" * (edit == "longer"))
    return f"{edit} {path}"


@pytest.mark.parametrize(
    "count", [30, pytest.param(250, marks=pytest.mark.slow), pytest.param(1000, marks=pytest.mark.long)]
)
def test_after_random_edits_a_cache_gives_what_an_untouched_one_gives(text, tmp_path, count):
    cache, beside, reports = tmp_path / "cache", tmp_path / "beside", []
    beside.mkdir()
    (beside / "file").write_bytes(b"file")
    whole = make(text, cache, reports)
    for seed in range(count):
        dice = random.Random(seed)
        done = [random_edit(cache, beside, dice) for _ in range(dice.choice([1, 1, 1, 2, 3]))]
        caches.contents(cache)
        assert make(text, cache, reports) == whole, (seed, done)
        assert all("\n" not in line for line in reports)
        assert [(path.name, path.read_bytes()) for path in beside.iterdir()] == [("file", b"file")], (seed, done)
