"""A checkpoint's tokenizer: text comes back, words are cut as there, special tokens are read on request alone."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_tokenizer import make, metadata

from rattn_eqx.data.batches import validation_batches
from rattn_eqx.data.corpus import build_corpus
from rattn_eqx.data.files import DamagedError
from rattn_eqx.data.pretrained_tokenizer import PretrainedTokenizer
from rattn_eqx.data.tokenizers import load_tokenizer, tokenize
from rattn_eqx.weights.foreign import Foreign
from rattn_eqx.weights.gguf_tokenizer import tokenizer_json
from rattn_eqx.weights.tokenizer import tokenizer_of


def pieces(tokenizer: PretrainedTokenizer, text: str, **options: bool) -> list[str]:
    tokens = tokenizer.encode(text.encode(), **options)
    return [tokenizer.decode(tokens[i : i + 1]).decode("utf-8", "replace") for i in range(len(tokens))]


@settings(max_examples=50, deadline=None)
@given(text=st.one_of(st.text(), st.text("hello 1234\n<|im_end>'s\u00e9\u20ac")))
def test_text_comes_back(text):
    for words in ("smollm", "gpt-2", "llama-bpe"):
        tokenizer = make(words)
        tokens = tokenizer.encode(text.encode())
        assert tokens.dtype == np.uint16
        assert tokenizer.decode(tokens) == text.encode()
        assert tokenizer.byte_lengths[tokens].sum() == len(text.encode())
        assert not np.isin([0, 1, 2], tokens).any()


@pytest.mark.parametrize(
    ("words", "digits"),
    [("smollm", list("1234")), ("gpt-2", ["1234"]), ("qwen2", list("1234")), ("llama-bpe", ["123", "4"])],
)
def test_words_are_cut_as_by_the_checkpoint(words, digits):
    assert pieces(make(words), "hello hello1234") == ["hello", " hello", *digits]
    assert pieces(make(words), "\n\nhello") == (
        ["\n\n", "hello"] if words in ("qwen2", "llama-bpe") else ["\n"] * 2 + ["hello"]
    )


def test_qwen2_composes_characters():
    tokenizer = make("qwen2")
    assert tokenizer.decode(tokenizer.encode("e\u0301".encode())).decode() == "\u00e9"


def test_special_tokens_are_read_on_request_alone():
    tokenizer = make()
    text = "<|im_end|>hello<think>"
    assert pieces(tokenizer, text) == [*"<|im_end|>", "hello", "<think>"]
    assert tokenizer.encode(text.encode(), special=True).tolist()[0] == 2
    assert pieces(tokenizer, text, special=True) == ["", "hello", "<think>"]


def test_what_tokens_mean():
    tokenizer = make()
    assert (tokenizer.document, tokenizer.padding, tokenizer.ends) == (0, 2, (0, 2))
    tokenizer = make(eos_token_id=[2, 0], pad_token_id=0)
    assert (tokenizer.document, tokenizer.padding, tokenizer.ends) == (0, 1, (0, 2))
    assert np.flatnonzero(tokenizer.byte_lengths == 0).tolist() == [0, 1, 2, *range(269, 300)]
    with pytest.raises(ValueError, match=r"^load: x refused: eos_token_id must be a token, .* it is 'x'"):
        make(eos_token_id="x")
    with pytest.raises(ValueError, match=r"^load: x refused: .* room for tokens up to 268 .*; got 268; give the"):
        make(vocabulary_size=268)
    with pytest.raises(ValueError, match="the text must be UTF-8"):
        tokenizer.encode(b"\xff")


def test_saved_and_loaded(tmp_path):
    tokenizer, path = make(chat_template="a template"), tmp_path / "tokenizer.json"
    tokenizer.save(path)
    loaded = load_tokenizer(path)
    assert isinstance(loaded, PretrainedTokenizer)
    assert loaded.to_json() == tokenizer.to_json()
    assert (loaded.document, loaded.padding, loaded.ends, loaded.chat_template) == (0, 2, (0, 2), "a template")
    content = json.loads(tokenizer.to_json())
    for change, reason in {
        "document": "document and padding must be two special tokens of the tokenizer; got 9 and 2",
        "vocabulary_size": "vocabulary_size must have room for tokens up to 268",
        "ends": "must have document, padding, ends",
    }.items():
        path.write_text(json.dumps(content | {change: 9}), encoding="utf-8")
        with pytest.raises(DamagedError, match=f"^load_tokenizer: {path}, .*{reason}"):
            load_tokenizer(path)
    content["tokenizers"]["decoder"] = {"type": "WordPiece", "prefix": "##", "cleanup": True}
    path.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(DamagedError, match=r"the decoder must be ByteLevel or have ByteFallback; got \['WordPiece'\]"):
        load_tokenizer(path)
    content["tokenizers"]["model"]["continuing_subword_prefix"] = "longer than a merge"  # the library panics
    path.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(DamagedError, match="not a definition of the tokenizers library"):
        load_tokenizer(path)


@pytest.mark.parametrize(("size", "dtype"), [(300, np.uint16), (100_000, np.uint32)])
def test_token_files(tmp_path, size, dtype):
    """Large vocabularies have tokens beyond uint16; batches are filled with a token that no text has."""
    for name in ("a", "b", "c"):
        (tmp_path / f"{name}.txt").write_text(f"hello {name} " * 9)
    corpus, tokenizer = build_corpus(tmp_path, tmp_path / "cache"), make(vocabulary_size=size)
    train, validation = tokenize(corpus, tokenizer, tmp_path / "cache")
    stream = np.load(train)
    assert stream.dtype == dtype
    assert tokenizer.decode(stream) == b"".join(corpus.documents("train"))
    assert np.count_nonzero(stream == tokenizer.document) == len(corpus.documents("train"))
    options = dict(document=tokenizer.document, padding=tokenizer.padding)
    [batch] = validation_batches(validation, context=999, batch_size=1, **options)
    text = batch["targets"][batch["targets"] != tokenizer.padding]
    assert tokenizer.decode(text) == corpus.validation.read_bytes()
    assert (tokenizer.byte_lengths[text] > 0).all()
    assert (batch["segment_ids"] == 1).all()


def sentence_piece(text: str, scores: dict[str, float]) -> list[str]:
    """By the definition: of all neighbours that make a piece, the best pair is joined, until none does."""
    parts = list("\u2581" + text.replace(" ", "\u2581"))
    while pairs := [(-scores[a + b], i) for i, (a, b) in enumerate(itertools.pairwise(parts)) if a + b in scores]:
        _, i = min(pairs)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return [x for part in parts for x in ([part] if part in scores else [f"<0x{b:02X}>" for b in part.encode()])]


def test_sentence_piece_merges_by_score():
    generator = np.random.default_rng(0)
    scores = {character: -100.0 - i for i, character in enumerate("abc\u2581")}
    while len(scores) < 60:
        a, b = generator.choice(list(scores), 2)
        if len(a + b) < 7:
            scores.setdefault(str(a + b), -float(generator.permutation(1000)[0]) / 10)
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *scores]
    kinds = np.array([2, 3, 3] + [6] * 256 + [1] * len(scores))
    of = {"model": "llama", "tokens": tokens, "token_type": kinds, "scores": np.array([0.0] * 259 + [*scores.values()])}
    definition = tokenizer_json({f"tokenizer.ggml.{name}": value for name, value in of.items()})
    config = {"bos_token_id": 1, "eos_token_id": 2, "vocab_size": len(tokens)}
    tokenizer = tokenizer_of(Foreign(Path("x"), config, {}, lambda name: np.zeros(0), definition, None))
    assert tokenizer is not None
    assert (tokenizer.document, tokenizer.padding, tokenizer.ends) == (1, 0, (1, 2))
    for _ in range(100):
        text = "".join(generator.choice(list("abc d\u00e9"), 20))
        found = tokenizer.encode(text.encode())
        assert [tokens[token] for token in found] == sentence_piece(text, scores)
        assert tokenizer.decode(found).decode() == " " + text


def test_unknown_kinds_and_damaged_fields():
    with pytest.warns(
        UserWarning, match=r"of an unknown kind \('gpt2', pre-tokenizer 'tekken'\), so the model is read"
    ):
        assert tokenizer_json(metadata("tekken")) is None
    for name, value, reason in [
        ("tokens", 3, "tokenizer.ggml.tokens must be a list of texts; it is 3"),
        ("tokens", ["a", "a"], "tokens must differ"),
        ("token_type", np.zeros(3), "token_type must be one for each of 269 tokens"),
        ("merges", ["ab"], "merges must be two pieces each; got 'ab'"),
        ("merges", ["a xyz"], r"merges must be of tokens; \['a', 'xyz'\] is not"),
    ]:
        with pytest.raises(ValueError, match=reason):
            tokenizer_json(metadata("smollm") | {f"tokenizer.ggml.{name}": value})
