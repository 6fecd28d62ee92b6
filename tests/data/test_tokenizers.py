"""Tokenizers lose nothing; batches hold what they should, and continue where they stopped."""

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import TypeCheckError

from rattn_eqx.data import batches
from rattn_eqx.data.batches import TokenWindows, long_documents, training_batches, validation_batches
from rattn_eqx.data.corpus import Corpus, build_corpus
from rattn_eqx.data.files import DamagedError
from rattn_eqx.data.tokenizers import (
    BYTE_VOCABULARY,
    DOCUMENT,
    PADDING,
    BPETokenizer,
    ByteTokenizer,
    load_tokenizer,
    tokenize,
)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Corpus:
    return build_corpus(Path(__file__).parents[2] / "data" / "sample", tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def bpe(corpus) -> BPETokenizer:
    return BPETokenizer.train(corpus, 600)


@pytest.fixture(params=["byte", "bpe"])
def tokenizer(request):
    return ByteTokenizer() if request.param == "byte" else request.getfixturevalue("bpe")


@pytest.fixture
def token_file(tmp_path) -> Path:
    """Tokens that all differ after the marker, so that a window tells where it came from: 20 windows of 10."""
    np.save(tmp_path / "tokens.npy", np.concatenate([[DOCUMENT], np.arange(300, 505)]).astype(np.uint16))
    return tmp_path / "tokens.npy"


def window_numbers(batch) -> list[int]:
    return [(int(target) - 300) // 10 for target in batch["targets"][:, 0]]


@settings(max_examples=50)
@given(text=st.one_of(st.binary(), st.text().map(str.encode), st.text("ab \n\t_1\u00e4\u20ac").map(str.encode)))
def test_tokenizers_are_lossless_on_any_bytes(bpe, text):
    for tokenizer in (ByteTokenizer(), bpe):
        tokens = tokenizer.encode(text)
        assert tokens.dtype == np.uint16
        assert tokenizer.decode(tokens) == text
        assert tokenizer.byte_lengths[tokens].sum() == len(text)
        assert not np.isin([tokenizer.document, tokenizer.padding], tokens).any()


def test_bpe_merges_and_keeps_every_byte(corpus, bpe):
    text = b"\0".join(corpus.documents("validation"))
    assert len(bpe.encode(text)) < 0.5 * len(text)
    every_byte = bytes(range(256)) * 2
    assert bpe.decode(bpe.encode(every_byte)) == every_byte
    with pytest.raises(ValueError, match="vocabulary_size must lie between 258 and 65536"):
        BPETokenizer.train(corpus, 70_000)


def test_specials_stand_last_and_for_no_bytes(tokenizer):
    assert (ByteTokenizer().vocabulary_size, ByteTokenizer().document, ByteTokenizer().padding) == (258, 256, 257)
    assert (BYTE_VOCABULARY, DOCUMENT, PADDING) == (258, 256, 257)
    size = tokenizer.vocabulary_size
    assert [tokenizer.document, tokenizer.padding] == [size - 2, size - 1]
    assert tokenizer.byte_lengths.shape == (size,)
    assert np.flatnonzero(tokenizer.byte_lengths == 0).tolist() == [size - 2, size - 1]
    assert tokenizer.decode(np.array([size - 2, *tokenizer.encode(b"ab"), size - 1])) == b"ab"
    with pytest.raises(ValueError, match=f"decode: tokens must lie between 0 and {size - 1}; got 1 to {size}"):
        tokenizer.decode(np.array([1, size]))


def test_shapes_and_dtypes_are_checked(tokenizer, token_file):
    for tokens in (np.zeros((2, 2), np.int32), np.zeros(2, np.float32), [1, 2]):
        with pytest.raises(TypeCheckError):
            tokenizer.decode(tokens)
    with pytest.raises(TypeCheckError):
        tokenizer.encode("text")


def test_tokenizer_survives_its_file(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "tokenizer.json")
    loaded = load_tokenizer(tmp_path / "tokenizer.json")
    assert loaded.to_json() == tokenizer.to_json()
    assert loaded.encode(b"def weigh():\xff").tolist() == tokenizer.encode(b"def weigh():\xff").tolist()
    for content in ("not JSON", '{"kind": "words"}', "[]"):
        (tmp_path / "other.json").write_text(content)
        with pytest.raises(ValueError, match=r"load_tokenizer: .* save wrote"):
            load_tokenizer(tmp_path / "other.json")


HOSTILE_DEFINITIONS = {  # what is changed in a definition, and what is said of it
    "empty": (
        lambda definition: definition.clear(),
        "key tokenizers: BPETokenizer: not a definition of the tokenizers",
    ),
    "lower case": (lambda definition: definition.update(normalizer={"type": "Lowercase"}), "normalizer.* must be None"),
    "truncation": (
        lambda definition: definition.update(
            truncation={"direction": "Right", "max_length": 9, "strategy": "LongestFirst", "stride": 0}
        ),
        "truncation.direction must be None; got 'Right'",
    ),
    "dropout": (lambda definition: definition["model"].update(dropout=0.5), "model.dropout must be None; got 0.5"),
    "a gap": (lambda definition: definition["model"]["vocab"].update({"\u00e9\u00e9": 9999}), "from 0 on"),
    "a letter": (lambda definition: definition["model"]["vocab"].update({"\u20ac": 598}), "pieces of bytes alone"),
    "no bytes": (
        lambda definition: definition["model"].update(vocab={"a": 0, "b": 1}, merges=[]),
        "model.vocab must have every byte",
    ),
    "a list": (lambda definition: definition["model"].update(vocab=[]), "key tokenizers: BPETokenizer: not a defin"),
}


@pytest.mark.parametrize("change", HOSTILE_DEFINITIONS)
def test_a_tokenizer_that_would_lose_text_is_refused(bpe, tmp_path, change):
    content = json.loads(bpe.to_json())
    HOSTILE_DEFINITIONS[change][0](content["tokenizers"])
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(DamagedError, match=f"load_tokenizer: {path}, .*{HOSTILE_DEFINITIONS[change][1]}.*save wrote$"):
        load_tokenizer(path)


def test_what_is_no_tokenizer_at_all_is_refused_in_a_line(tmp_path):
    path = tmp_path / "tokenizer.json"
    nested = '{"kind": "bpe", "tokenizers": ' + '{"a":' * 900 + "1" + "}" * 901
    for text in (nested, "[" * 100_000, '{"kind": "bpe", "tokenizers": 5}', '{"kind": ["byte"]}', "NaN", "\ud800"):
        path.write_bytes(text.encode("utf-8", "surrogatepass"))
        with pytest.raises(DamagedError, match=rf"^load_tokenizer: {path}\b.*save wrote$"):
            load_tokenizer(path)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(DamagedError, match=f"load_tokenizer: {path} must be a regular file"):
        load_tokenizer(path)


def test_missing_library_is_an_error_that_names_the_extra(monkeypatch, corpus):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ImportError, match=r"pip install 'rattn-eqx\[bpe\]'"):
        BPETokenizer.train(corpus, 300)


def test_token_files_hold_every_document_after_a_marker(corpus, tokenizer, tmp_path):
    paths = tokenize(corpus, tokenizer, tmp_path)
    for path, split in zip(paths, ("train", "validation"), strict=True):
        tokens = np.load(path, mmap_mode="r")
        assert tokens.dtype == np.uint16
        starts = np.flatnonzero(tokens == tokenizer.document)
        assert starts[0] == 0
        assert [tokenizer.decode(part) for part in np.split(tokens, starts)[1:]] == corpus.documents(split)
    written = paths[0].stat().st_mtime_ns
    assert tokenize(corpus, tokenizer, tmp_path) == paths
    assert paths[0].stat().st_mtime_ns == written
    assert load_tokenizer(paths[0].parent / "tokenizer.json").to_json() == tokenizer.to_json()


def test_long_documents_are_the_beginnings_of_those_long_enough(tmp_path):
    path = tmp_path / "tokens.npy"
    np.save(path, np.array([256, 1, 2, 256, 3, 256, 4, 5, 6, 256, 7, 8], np.uint16))
    assert long_documents(path, 3).tolist() == [[256, 1, 2], [256, 4, 5], [256, 7, 8]]
    assert long_documents(path, 4).tolist() == [[256, 4, 5, 6]]
    assert long_documents(path, 5).shape == (0, 5)


def test_long_documents_do_not_depend_on_the_blocks_that_are_read(tmp_path, monkeypatch):
    path, generator = tmp_path / "tokens.npy", np.random.default_rng(0)
    for block in (1, 7, 64):
        monkeypatch.setattr(batches, "_BLOCK", block)
        for share in (0.02, 0.3, 1.0):
            stream = np.where(generator.random(300) < share, DOCUMENT, generator.integers(0, 256, 300)).astype(
                np.uint16
            )
            stream[0] = DOCUMENT
            np.save(path, stream)
            documents = np.split(stream, np.flatnonzero(stream == DOCUMENT)[1:])
            for length in (1, 2, 20):
                expected = [document[:length].tolist() for document in documents if len(document) >= length]
                assert long_documents(path, length).tolist() == expected
    with pytest.raises(ValueError, match="long_documents: length must be at least 1; got 0"):
        long_documents(path, 0)


@pytest.mark.slow
def test_long_documents_take_no_memory_for_the_others(tmp_path):
    np.save(tmp_path / "tokens.npy", np.full(5 * 10**7, DOCUMENT, np.uint16))
    program = (
        "import resource, sys; from rattn_eqx.data.batches import long_documents\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "assert len(long_documents(sys.argv[1], 1001)) == 0\n"
        "print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)"
    )
    child = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "tokens.npy")],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(child.stdout) < 150, "MB"


def test_windows_shift_targets_and_number_documents(tmp_path):
    stream = np.array([DOCUMENT, 1, 2, DOCUMENT, 3, 4, 5, DOCUMENT, 6, 7, 8, 9], np.uint16)
    np.save(tmp_path / "tokens.npy", stream)
    windows = TokenWindows(tmp_path / "tokens.npy", 4)
    assert len(windows) == 2
    assert {name: values.tolist() for name, values in windows[0].items()} == {
        "tokens": [256, 1, 2, 256],
        "targets": [1, 2, 256, 3],
        "segment_ids": [1, 1, 1, 2],
    }
    assert {name: values.tolist() for name, values in windows[1].items()} == {
        "tokens": [3, 4, 5, 256],
        "targets": [4, 5, 256, 6],
        "segment_ids": [0, 0, 0, 1],
    }
    assert all(values.dtype == np.int32 for values in windows[1].values())
    np.testing.assert_array_equal(windows[np.int64(1)]["tokens"], windows[1]["tokens"])
    with pytest.raises(IndexError):
        windows[2]


def test_a_pickled_source_leaves_the_tokens_on_disk(tmp_path):
    np.save(tmp_path / "tokens.npy", np.full(100_000, DOCUMENT, np.uint16))
    windows = TokenWindows(tmp_path / "tokens.npy", 4)
    assert windows[7]["segment_ids"].tolist() == [1, 2, 3, 4]
    pickled = pickle.dumps(windows)
    assert len(pickled) < 1000
    assert pickle.loads(pickled)[7]["segment_ids"].tolist() == [1, 2, 3, 4]


def test_what_is_no_token_file_or_too_short_is_an_error(token_file, tmp_path):
    assert len(TokenWindows(token_file, 205)) == 1
    with pytest.raises(ValueError, match=r"shorter than one window; got 206 tokens in .*context=206 needs 207"):
        TokenWindows(token_file, 206)
    with pytest.raises(ValueError, match="must begin with the document marker; got 256 for document=598"):
        TokenWindows(token_file, 10, document=598)
    np.save(tmp_path / "wide.npy", np.zeros((2, 2), np.int64))
    with pytest.raises(ValueError, match=r"must hold one dimension of uint16 or uint32; got int64 of shape \(2, 2\)"):
        TokenWindows(tmp_path / "wide.npy", 1)
    with pytest.raises(ValueError, match="every process needs a window; got 20 windows and process_count=21"):
        training_batches(token_file, context=10, batch_size=1, seed=0, process_count=21)
    with pytest.raises(ValueError, match="got process_index=2, process_count=2"):
        training_batches(token_file, context=10, batch_size=1, seed=0, process_index=2, process_count=2)
    with pytest.raises(ValueError, match="batch_size must be at least 1; got 0"):
        training_batches(token_file, context=10, batch_size=0, seed=0)


def test_a_hostile_token_file_is_refused_before_it_is_read(token_file, tmp_path):
    path, whole = tmp_path / "hostile.npy", token_file.read_bytes()
    contents = {
        b"": "must be a .npy file",
        whole[:60]: "must be a .npy file",
        whole[:-3]: "must hold the 206 tokens that it claims; got 409 bytes",
        whole.replace(b"(206,), }  ", b"(2**40,), }"): "must be a .npy file",
    }
    wide = b"(999999999999999,), }"
    at = whole.index(b"(206,), }")
    contents[whole[:at] + wide + whole[at + len(wide) :]] = "must hold the 999,999,999,999,999 tokens that it claims"
    for content, message in contents.items():
        path.write_bytes(content)
        refused_by_all(path, message)
    arrays = {
        "got object": np.array([DOCUMENT, []], object),
        "got >u2": np.array([DOCUMENT, 1], ">u2"),
        r"got uint16 of shape \(2, 3\)": np.asfortranarray(np.zeros((2, 3), np.uint16)),
        r"got uint16 of shape \(0,\)": np.zeros(0, np.uint16),
    }
    for message, array in arrays.items():
        np.save(path, array, allow_pickle=True)
        refused_by_all(path, message)
    np.savez(path.with_suffix(".npz"), array=np.zeros(3))
    refused_by_all(path.with_suffix(".npz"), "must be a .npy file")
    path.unlink()
    os.mkfifo(path)
    refused_by_all(path, "must be a regular file")


def refused_by_all(path: Path, message: str) -> None:
    for read in (
        lambda: TokenWindows(path, 4),
        lambda: validation_batches(path, context=4, batch_size=1),
        lambda: long_documents(path, 4),
    ):
        with pytest.raises(ValueError, match=f"{path} .*{message}"):
            read()


def test_every_epoch_shuffles_all_windows_anew(token_file):
    batches = training_batches(token_file, context=10, batch_size=4, seed=3)
    epochs = [[number for _ in range(5) for number in window_numbers(next(batches))] for _ in range(3)]
    batches.close()
    assert all(sorted(epoch) == list(range(20)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in [*epochs, list(range(20))]}) == 4
    other = training_batches(token_file, context=10, batch_size=20, seed=4)
    assert window_numbers(next(other)) != epochs[0]
    other.close()


@pytest.mark.parametrize("taken", [0, 1, 6, 7, 13, 23])
def test_state_through_json_continues_exactly_also_across_epochs(token_file, taken):
    arguments = {"context": 10, "batch_size": 3, "seed": 5}  # 20 windows: batches straddle the epochs' ends
    whole = training_batches(token_file, **arguments)
    for _ in range(taken):
        next(whole)
    state = json.loads(json.dumps(whole.get_state()))
    expected = [next(whole) for _ in range(9)]

    resumed = training_batches(token_file, **arguments)
    next(resumed)  # something is read ahead, which the state must replace
    resumed.set_state(state)
    for batch in expected:
        actual = next(resumed)
        assert batch["tokens"].shape == (3, 10)
        for name in ("tokens", "targets", "segment_ids"):
            assert isinstance(actual[name], np.ndarray)
            np.testing.assert_array_equal(actual[name], batch[name])
    whole.close()
    resumed.close()


def test_processes_share_each_epoch_without_overlap(token_file):
    shares = [
        training_batches(token_file, context=10, batch_size=2, seed=1, process_index=index, process_count=3)
        for index in range(3)
    ]
    left_out = set()
    for _ in range(6):  # 20 windows: 6 a process and 2 left out
        epoch = [number for share in shares for _ in range(3) for number in window_numbers(next(share))]
        assert len(set(epoch)) == len(epoch) == 18
        left_out |= set(range(20)) - set(epoch)
    assert len(left_out) > 2
    for share in shares:
        share.close()


def test_an_open_iterator_does_not_hold_up_the_interpreters_end(token_file):
    program = (
        "import sys, pathlib; from rattn_eqx.data.batches import training_batches\n"
        "batches = training_batches(pathlib.Path(sys.argv[1]), context=10, batch_size=2, seed=0)\n"
        "print(next(batches)['tokens'].shape)"
    )
    finished = subprocess.run(
        [sys.executable, "-W", "error", "-c", program, str(token_file)],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert finished.stdout == "(2, 10)\n"


@pytest.mark.parametrize("max_tokens", [None, 1, 40, 47, 10_000])
@pytest.mark.parametrize(("context", "batch_size"), [(10, 4), (7, 3), (500, 2)])
def test_validation_batches_hold_every_target_once_and_in_order(token_file, context, batch_size, max_tokens):
    batches = list(validation_batches(token_file, context=context, batch_size=batch_size, max_tokens=max_tokens))
    assert all(batch["tokens"].shape == (batch_size, context) for batch in batches)
    tokens, targets = (np.concatenate([batch[name].ravel() for batch in batches]) for name in ("tokens", "targets"))
    stream = np.load(token_file).astype(np.int32)
    kept = targets != PADDING
    num_targets = min(max_tokens or 205, 205)
    np.testing.assert_array_equal(targets[kept], stream[1 : num_targets + 1])
    np.testing.assert_array_equal(tokens[kept], stream[:num_targets])
    assert kept[:num_targets].all()  # the padding comes last
    assert (tokens[~kept] == PADDING).all()
    assert len(targets) - num_targets < batch_size * context


def test_validation_windows_are_those_of_the_source_and_know_its_padding(corpus, bpe, tmp_path):
    _, path = tokenize(corpus, bpe, tmp_path)
    windows = TokenWindows(path, 64, bpe.document)
    batches = list(validation_batches(path, context=64, batch_size=5, document=bpe.document))
    rows = [{name: batch[name][row] for name in batch} for batch in batches for row in range(5)]
    for index in range(len(windows)):
        for name, values in windows[index].items():
            np.testing.assert_array_equal(rows[index][name], values)
    assert sum(row["segment_ids"][-1] for row in rows) == len(corpus.documents("validation"))
    assert batches[-1]["targets"][-1, -1] == bpe.padding
    with pytest.raises(ValueError, match="max_tokens must be at least 1; got 0"):
        validation_batches(path, context=64, batch_size=5, document=bpe.document, max_tokens=0)
