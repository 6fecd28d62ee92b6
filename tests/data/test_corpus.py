"""Corpora: what is kept, how it is split, and what is said when there is nothing to keep."""

import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from rattn_eqx.data import corpus as corpora
from rattn_eqx.data.corpus import build_corpus, describe, new_folder
from rattn_eqx.data.tokenizers import ByteTokenizer, tokenize


def write_files(folder: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def numbered_files(count: int) -> dict[str, bytes]:
    return {f"part{index % 3}/{index:03d}.txt": f"document {index}\n".encode() for index in range(count)}


def test_split_is_disjoint_complete_and_the_same_wherever_the_files_lie(tmp_path):
    files = numbered_files(300)
    corpora = [
        build_corpus(write_files(tmp_path / name, files), tmp_path / f"cache_{name}", validation_share=0.2)
        for name in ("here", "there")
    ]
    train, validation = (corpora[0].documents(split) for split in ("train", "validation"))
    assert not set(train) & set(validation)
    assert sorted(train + validation) == sorted(files.values())
    assert 30 <= len(validation) <= 90
    assert train == [data for _, data in sorted(files.items()) if data in set(train)]
    by_hash = sorted(files, key=lambda name: hashlib.sha256(name.encode()).digest())
    assert validation == [files[name] for name in by_hash][: len(validation)]  # so that its beginning is a fair sample
    assert corpora[0].train.read_bytes() == corpora[1].train.read_bytes()
    assert corpora[0].validation.read_bytes() == corpora[1].validation.read_bytes()
    assert corpora[0].manifest["sha256"] == corpora[1].manifest["sha256"]


def test_split_of_a_file_does_not_depend_on_its_content_or_the_interpreter(tmp_path):
    files = numbered_files(60)
    folder = write_files(tmp_path / "text", files)
    validation = build_corpus(folder, tmp_path / "cache", validation_share=0.3).documents("validation")
    program = (
        "import sys, pathlib; from rattn_eqx.data.corpus import build_corpus\n"
        "corpus = build_corpus(sys.argv[1], pathlib.Path(sys.argv[2]), validation_share=0.3)\n"
        "sys.stdout.buffer.write(corpus.validation.read_bytes())"
    )
    other_process = subprocess.run(
        [sys.executable, "-c", program, str(folder), str(tmp_path / "other")],
        env=os.environ | {"PYTHONHASHSEED": "7", "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        check=True,
    )
    assert other_process.stdout.split(b"\0") == validation

    longer = write_files(tmp_path / "longer", {name: data + b"more\n" for name, data in files.items()})
    of_longer = build_corpus(longer, tmp_path / "cache", validation_share=0.3).documents("validation")
    assert of_longer == [data + b"more\n" for data in validation]


def test_unusable_files_are_dropped_and_counted(tmp_path):
    folder = write_files(
        tmp_path / "text",
        {
            "a.txt": b"first\n",
            "b.txt": "zweite Fl\u00e4che\n".encode(),
            "c.txt": b"first\n",
            "latin.txt": b"Fl\xe4che\n",
            "image": b"\x89PNG\0\0",
            "empty.txt": b"",
            ".hidden": b"hidden\n",
            ".git/config": b"hidden too\n",
        },
    )
    os.symlink("nowhere", folder / "dangling.txt")
    corpus = build_corpus(folder, tmp_path / "cache")
    assert sorted(corpus.documents("train") + corpus.documents("validation")) == [
        b"first\n",
        "zweite Fl\u00e4che\n".encode(),
    ]
    assert corpus.manifest["dropped"] == {"NUL bytes": 1, "duplicate": 1, "empty": 1, "not UTF-8": 1}
    assert corpus.manifest["train"]["files"] == corpus.manifest["validation"]["files"] == 1
    assert corpus.manifest["train"]["bytes"] + corpus.manifest["validation"]["bytes"] == 6 + 15
    text = describe(corpus.manifest)
    assert "2 kept; dropped: NUL bytes 1, duplicate 1, empty 1, not UTF-8 1" in text
    assert len(text.splitlines()) <= 6


@pytest.mark.parametrize("share", [0.001, 0.999])
@pytest.mark.parametrize("count", [2, 3])
def test_a_few_files_give_at_least_one_to_each_side(tmp_path, count, share):
    folder = write_files(tmp_path / "text", numbered_files(count))
    corpus = build_corpus(folder, tmp_path / "cache", validation_share=share)
    assert corpus.documents("train")[0]
    assert corpus.documents("validation")[0]
    assert corpus.manifest["train"]["files"] + corpus.manifest["validation"]["files"] == count


@pytest.mark.parametrize(
    ("data", "cut"),
    [
        (b"".join(b"%04d line\n" % index for index in range(100)), 940),
        (b"a heading\n" + b"x" * 90, 10),
        (b"x" * 98 + b"\nz", 99),
        (("\u20ac" * 40).encode(), 111),
    ],
    ids=["lines", "last line is long", "first line is long", "no lines"],
)
def test_a_single_file_is_cut_at_a_boundary_and_the_manifest_says_so(tmp_path, data, cut):
    file = write_files(tmp_path, {"book.txt": data}) / "book.txt"
    corpus = build_corpus(file, tmp_path / "cache")
    assert corpus.train.read_bytes() == data[:cut]
    assert corpus.validation.read_bytes() == data[cut:]
    assert f"within the only file: at byte {cut}" in corpus.manifest["split"]


def test_one_file_cut_at_two_places_is_two_corpora(tmp_path):
    file = write_files(tmp_path, {"book.txt": b"".join(b"%04d line\n" % index for index in range(100))}) / "book.txt"
    small, large = (build_corpus(file, tmp_path / "cache", validation_share=share) for share in (0.06, 0.5))
    assert small.train.read_bytes() + small.validation.read_bytes() == file.read_bytes()
    assert large.train.read_bytes() + large.validation.read_bytes() == file.read_bytes()
    assert small.manifest["sha256"] != large.manifest["sha256"]
    folders = [tokenize(corpus, ByteTokenizer(), tmp_path / "cache")[0].parent for corpus in (small, large)]
    assert folders[0] != folders[1]
    for folder, corpus in zip(folders, (small, large), strict=True):
        held_out = np.load(folder / "validation.npy")
        assert ByteTokenizer().decode(held_out) == corpus.validation.read_bytes()


def test_nothing_usable_is_an_error_that_names_the_remedy(tmp_path):
    (tmp_path / "nothing").mkdir()
    write_files(tmp_path / "binary", {"a": b"\0\1", "b": b"\xff\xfe"})
    write_files(tmp_path / "short", {"a": b"a"})
    cache = tmp_path / "cache"
    with pytest.raises(ValueError, match=r"^build_corpus: no text files under .*nothing; give a folder with UTF-8"):
        build_corpus(tmp_path / "nothing", cache)
    with pytest.raises(ValueError, match=r"none of the 2 files under .*binary is text \(NUL bytes 1, not UTF-8 1\)"):
        build_corpus(tmp_path / "binary", cache)
    with pytest.raises(
        ValueError, match=r"no file or folder at .*absent; give 'python', 'environment', 'package:NAME' or a path"
    ):
        build_corpus(tmp_path / "absent", cache)
    with pytest.raises(ValueError, match="the only file cannot be cut in two; got 1 bytes; give more text"):
        build_corpus(tmp_path / "short", cache)
    with pytest.raises(ValueError, match=r"validation_share must lie between 0 and 1; got 1\.5"):
        build_corpus(tmp_path / "short", cache, validation_share=1.5)
    assert not cache.exists() or not list(cache.iterdir())


def test_cache_is_reused_until_a_file_changes_and_is_no_part_of_the_corpus(tmp_path):
    folder = write_files(tmp_path / "text", numbered_files(4))
    cache = folder / "runs" / "cache"
    first = build_corpus(folder, cache)
    written = first.train.stat().st_ino
    again = build_corpus(folder, cache)
    assert again == first
    assert again.train.stat().st_ino == written

    (folder / "new.txt").write_bytes(b"new\n")
    changed = build_corpus(folder, cache)
    assert changed.manifest["files"] == 5
    assert changed.train != first.train
    assert json.loads((changed.train.parent / "manifest.json").read_text("utf-8")) == changed.manifest
    assert len(list(cache.iterdir())) == 2


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    def fail():
        with new_folder(tmp_path / "cache" / "one") as unfinished:
            (unfinished / "half").write_text("")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert list((tmp_path / "cache").iterdir()) == []

    with new_folder(tmp_path / "cache" / "one"):  # another process comes first
        write_files(tmp_path / "cache" / "one", {"theirs": b""})
    assert [path.name for path in (tmp_path / "cache").rglob("*")] == ["one", "theirs"]


def make_run(folder: Path) -> None:
    write_files(folder, {"config.json": b"{}", "tokenizer.json": b"{}", ".lock": b"1", "checkpoints/step": b"x"})
    write_files(folder, {"metrics.jsonl": b"{}\n", "sample.txt": b"a sample"})


def test_a_run_beside_its_text_finds_the_same_files_again(tmp_path):
    folder = write_files(tmp_path, numbered_files(5))
    own = [folder / "runs" / "tiny", folder / "results.jsonl"]
    first = build_corpus(folder, folder, exclude=own)
    make_run(folder / "runs" / "tiny")
    write_files(folder, {"results.jsonl": b"{}\n", ".lock": b"12345\n"})
    again = build_corpus(folder, folder, exclude=own)
    assert (again.manifest["sha256"], again.train) == (first.manifest["sha256"], first.train)
    assert first.manifest["left_out"] == {"excluded path": 2}

    tokenize(first, ByteTokenizer(), folder)
    make_run(folder / "runs" / "done")
    write_files(folder / "runs" / "begun", {"config.json": b"{}", ".lock": b"1", "tokenizer.json": b"{}"})
    write_files(folder / "runs" / "robbed", {"metrics.jsonl": b"{}", "checkpoints/a": b"a"})
    write_files(
        folder, {"runs/ablations.jsonl": b'{"name": "a", "trial": {}}\n', "e.jsonl": b'{"run": "r", "task": "x"}\n'}
    )
    os.symlink(folder / "runs" / "done" / "metrics.jsonl", folder / "latest.jsonl")
    os.symlink(folder / "runs" / "done" / "checkpoints", folder / "newest")
    again = build_corpus(folder, folder, exclude=own)
    assert (again.manifest["sha256"], again.train) == (first.manifest["sha256"], first.train)
    assert again.manifest["left_out"] == {"cache": 2, "excluded path": 2, "results": 2, "run folder": 5}
    assert "left out: cache 2, excluded path 2, results 2, run folder 5" in describe(again.manifest)
    assert json.loads((again.train.parent / "manifest.json").read_text("utf-8")) == again.manifest

    with pytest.raises(ValueError, match=r"besides what is left out \(cache 1, excluded path 1\); give a folder"):
        build_corpus(folder, tmp_path / "cache", exclude=[folder])
    inside = build_corpus(folder / "part0", tmp_path / "cache", exclude=[folder])  # a run around its text is none of it
    assert inside.manifest["files"] == 2


def test_equal_names_sizes_and_times_elsewhere_are_another_text(tmp_path, monkeypatch):
    cache, texts = tmp_path / "cache", {"p1": b"one\n", "p2": b"two\n", "p3": b"one\n"}
    found = {}
    for project, text in texts.items():
        write_files(tmp_path / project / "data", {"a.txt": text * 9, "b.txt": b"the same\n"})
        os.utime(tmp_path / project / "data" / "a.txt", ns=(1, 1))
        os.utime(tmp_path / project / "data" / "b.txt", ns=(1, 1))
        monkeypatch.chdir(tmp_path / project)
        found[project] = build_corpus("data", cache)
        assert text * 9 in [*found[project].documents("train"), *found[project].documents("validation")]
    assert found["p1"].manifest["sha256"] == found["p3"].manifest["sha256"] != found["p2"].manifest["sha256"]
    tokens = {project: tokenize(corpus, ByteTokenizer(), cache) for project, corpus in found.items()}
    assert tokens["p1"] == tokens["p3"] != tokens["p2"]

    write_files(tmp_path / "p3" / "data", {"a.txt": b"new\n" * 9})
    os.utime(tmp_path / "p3" / "data" / "a.txt", ns=(1, 1))  # as `cp -p` does
    changed = build_corpus("data", cache)
    assert b"new\n" * 9 in [*changed.documents("train"), *changed.documents("validation")]


def test_links_are_read_once_and_odd_things_are_counted(tmp_path):
    top = write_files(tmp_path / "top", {"a/one.txt": b"one", "z/two.txt": b"two"})
    write_files(tmp_path / "real", {"three.txt": b"three", "deep/four.txt": b"four"})
    for link, target in {
        "linked": "../real",
        "again": "../real",
        "a/circle": "..",
        "z/inside": "../a",
        "nowhere": "no",
        "zero": "/dev/zero",
    }.items():
        os.symlink(target, top / link)
    os.symlink("..", tmp_path / "real" / "out")  # all that lies beside, and the top again
    os.symlink("itself", top / "itself")
    os.mkfifo(top / "pipe")
    with open(os.fsencode(top) + b"/\xff\xfe.txt", "wb") as file:
        file.write(b"five")
    corpus = build_corpus(top, tmp_path / "cache")
    read = corpus.documents("train") + corpus.documents("validation")
    assert sorted(read) == [b"five", b"four", b"one", b"three", b"two"]
    assert corpus.manifest["left_out"] == {"link to nowhere": 2, "linked folder": 4, "pipe or device": 2}
    assert build_corpus(top, tmp_path / "cache") == corpus


def test_thousands_of_folders_in_folders(tmp_path):
    folder = write_files(tmp_path / "text", numbered_files(3))
    at = os.open(folder, os.O_RDONLY)
    for name in ["d"] * 1100 + ["long" * 40] * 20:  # past Python's recursion, then past the system's longest path
        os.mkdir(name, dir_fd=at)
        at, above = os.open(name, os.O_RDONLY, dir_fd=at), at
        os.close(above)
    os.close(at)
    try:
        write_files(folder / "/".join("d" * 1100), {"low.txt": b"low"})
        corpus = build_corpus(folder, tmp_path / "cache")
        assert corpus.manifest["files"] == 4
        assert corpus.manifest["left_out"] == {"unreadable file": 1}
    finally:
        subprocess.run(["rm", "-rf", folder], check=True)  # `shutil.rmtree` recurses


def test_no_more_text_than_the_memory_holds(tmp_path, monkeypatch):
    folder = write_files(tmp_path / "text", numbered_files(3))
    with open(folder / "sparse", "wb") as file:
        file.truncate(2**40)
    corpus = build_corpus(folder, tmp_path / "cache")
    assert corpus.manifest["dropped"] == {"NUL bytes": 1}
    with open(folder / "sparse", "r+b") as file:
        file.write(b"text " * 2**22)
    with pytest.raises(ValueError, match=r"got .*/sparse of 1,099,511,627,776 bytes where .* are left; leave it out"):
        build_corpus(folder, tmp_path / "cache")
    (folder / "sparse").unlink()
    monkeypatch.setattr(corpora, "_free_memory", lambda: 50)
    write_files(folder, {"new": b"new"})
    with pytest.raises(
        ValueError, match=r"must fit in half of the free memory; got .*part\d.* of 11 bytes where 0 are"
    ):
        build_corpus(folder, tmp_path / "cache")


def test_a_cache_has_the_permissions_of_the_umask_and_no_remains_of_the_dead(tmp_path):
    folder = write_files(tmp_path / "text", numbered_files(3))
    write_files(tmp_path / "cache" / ".unfinished-0", {"train.bin": b"half"})
    old = os.umask(0o027)
    try:
        corpus = build_corpus(folder, tmp_path / "cache")
        tokens, _ = tokenize(corpus, ByteTokenizer(), tmp_path / "cache")
    finally:
        os.umask(old)
    for path in (corpus.train.parent, tokens.parent):
        assert path.stat().st_mode & 0o777 == 0o750
        assert {file.stat().st_mode & 0o777 for file in path.iterdir()} == {0o640}
    assert not list((tmp_path / "cache").glob(".*"))


@pytest.mark.parametrize(
    "count", [15, pytest.param(250, marks=pytest.mark.slow), pytest.param(1000, marks=pytest.mark.long)]
)
def test_random_folders_give_their_texts_and_no_more(tmp_path, count):
    for seed in range(count):
        expected = random_folder(tmp_path / str(seed), random.Random(seed))
        top, cache = tmp_path / str(seed) / "top", tmp_path / str(seed) / "cache"
        if b"".join(expected):
            corpus = build_corpus(top, cache)
            whole = corpus.documents("train") + corpus.documents("validation")
            assert sorted(whole if len(expected) > 1 else [b"".join(whole)]) == sorted(expected), seed
            tokenize(corpus, ByteTokenizer(), cache)
            assert build_corpus(top, cache) == corpus
            describe(corpus.manifest).encode("utf-8")
        else:
            with pytest.raises(ValueError, match=r"^build_corpus: .*; give "):
                build_corpus(top, cache)
        shutil.rmtree(tmp_path / str(seed))


def random_folder(scratch: Path, dice: random.Random) -> list[bytes]:
    """Fill `scratch/top`, and give the texts in it."""
    top, beside = scratch / "top", scratch / "beside"
    folders, expected = [os.fsencode(top), os.fsencode(beside)], []
    for folder in folders:
        os.makedirs(folder)
    os.symlink(beside, top / "beside")
    names = [b"a", b"b c", b"\xff\xfe", "\u20ac".encode(), b"n\new", b"-rf", b"$x$", b"lock", b"config.json"]
    for index in range(dice.randrange(30)):
        parent = dice.choice(folders)
        path = os.path.join(parent, dice.choice(names) + b"%d" % index)
        kind = dice.choice(
            ["text"] * 6 + ["folder"] * 3 + ["hidden", "empty", "NUL", "binary", "pipe", "link", "circle"]
        )
        data = {"text": b"text %d \xe2\x82\xac\n" % index, "NUL": b"a\0b", "binary": b"\xff\xfe", "empty": b""}.get(
            kind
        )
        if kind == "folder":
            os.mkdir(path)
            folders.append(path)
        elif kind == "pipe":
            os.mkfifo(path)
        elif kind == "link":
            os.symlink(dice.choice([b"nowhere", b"/dev/zero", path, b".", b"/"]), path)
        elif kind == "circle":
            os.symlink(dice.choice(folders), path)
        else:
            hidden = os.path.join(parent, b".hidden%d" % index)
            with open(hidden if data is None else path, "wb") as file:
                file.write(b"hidden" if data is None else data)
        if kind == "text":
            expected.append(data)
    return expected


@pytest.mark.slow
def test_standard_library_with_its_tests_and_without_installed_packages(tmp_path):
    corpus = build_corpus("python", tmp_path)
    documents = corpus.documents("train") + corpus.documents("validation")
    assert Path(os.__file__).read_bytes() in documents
    assert Path(json.__file__).read_bytes() in documents
    assert Path(pytest.__file__).read_bytes() not in documents
    assert 0.02 < len(corpus.validation.read_bytes()) / corpus.manifest["train"]["bytes"] < 0.15
