"""Corpora: what is kept, how it is split, and what is said when there is nothing to keep."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

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
    with pytest.raises(ValueError, match=r"no file or folder at .*absent; give 'python', 'environment' or a path"):
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


@pytest.mark.slow
def test_standard_library_with_its_tests_and_without_installed_packages(tmp_path):
    corpus = build_corpus("python", tmp_path)
    documents = corpus.documents("train") + corpus.documents("validation")
    assert Path(os.__file__).read_bytes() in documents
    assert Path(json.__file__).read_bytes() in documents
    assert Path(pytest.__file__).read_bytes() not in documents
    assert 0.02 < len(corpus.validation.read_bytes()) / corpus.manifest["train"]["bytes"] < 0.15
