"""Perplexity of a text in pieces: the loss of the whole sequence at once, in memory that local layers keep flat."""

import dataclasses
import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_model

from rattn_eqx.data.tokenizers import ByteTokenizer
from rattn_eqx.evaluation import perplexity
from rattn_eqx.evaluation.perplexity import Bin, file_perplexity, text_perplexity
from rattn_eqx.model.cache import Cache
from rattn_eqx.model.language_model import LanguageModel

CONFIG = dataclasses.replace(small_model.CONFIG, vocabulary_size=258, window=5, num_meta_tokens=2)
TOKENIZER = ByteTokenizer()
TOKENS = np.array([256, *np.random.default_rng(0).integers(0, 256, 300)], np.uint16)
TOKENS[150] = TOKENIZER.document  # of no bytes


@pytest.fixture(scope="module")
def model():
    return small_model.drawn(CONFIG, size=0.5, seed=1)


def losses_of(model) -> np.ndarray:
    """Of every token but the first, from the whole sequence at once."""
    tokens = jnp.asarray(TOKENS, jnp.int32)
    logs = eqx.filter_jit(lambda model: jax.nn.log_softmax(model(tokens[:-1])))(model)
    return -np.asarray(logs)[np.arange(len(TOKENS) - 1), TOKENS[1:]].astype(np.float64)


@pytest.fixture(scope="module")
def losses(model) -> np.ndarray:
    return losses_of(model)


@pytest.mark.parametrize("piece", [1, 7, 100, 512])
def test_it_is_the_loss_of_the_whole_sequence(model, losses, piece):
    bins = text_perplexity(model, TOKENS, TOKENIZER, piece=piece)
    assert [(x.low, x.high) for x in bins] == [(0, 128), (128, 256), (256, 300)]
    for x in bins:
        own = losses[x.low : x.high]
        assert math.isclose(x.nats, own.sum(), rel_tol=1e-5)
        assert x.perplexity == pytest.approx(math.exp(own.mean()), rel=1e-4)
        assert x.num_bytes == x.high - x.low - (x.low == 128)
        assert x.bits_per_byte == pytest.approx(own.sum() / math.log(2) / x.num_bytes, rel=1e-5)


@pytest.mark.parametrize("length", [2, 3, 128, 129, 130, 257])
def test_bins_follow_one_another_to_the_end(model, monkeypatch, length):
    monkeypatch.setattr(perplexity, "_read", lambda given, cache: (cache, np.ones(len(given[1]), np.float32)))
    bins = text_perplexity(model, TOKENS[:length], TOKENIZER, piece=100)
    assert bins[0].low == 0
    assert bins[-1].high == length - 1
    assert [x.high for x in bins[:-1]] == [x.low for x in bins[1:]]
    assert all(x.nats == x.high - x.low > 0 for x in bins)


def test_in_bfloat16():
    model = eqx.filter_jit(LanguageModel)(CONFIG, compute_dtype="bfloat16", key=jax.random.key(0))
    bins, losses = text_perplexity(model, TOKENS, TOKENIZER, piece=64), losses_of(model)
    assert sum(x.nats for x in bins) == pytest.approx(losses.sum(), rel=1e-2)


@pytest.mark.parametrize(("pattern", "per_token"), [(("local",), 0), (("local", "global"), 2 * 4 * 4)])
def test_memory_grows_by_what_global_layers_keep(monkeypatch, pattern, per_token):
    sizes: list[list[int]] = []
    read = perplexity._read

    def watched(given, cache: Cache):
        sizes[-1].append(cache.num_bytes)
        return read(given, cache)

    monkeypatch.setattr(perplexity, "_read", watched)
    model = eqx.filter_jit(LanguageModel)(dataclasses.replace(CONFIG, pattern=pattern), key=jax.random.key(0))
    for length in (21, 201):
        sizes.append([])
        text_perplexity(model, TOKENS[:length], TOKENIZER, piece=20)
    short, long = sizes
    assert (len(short), len(long)) == (1, 10)
    assert len(set(long)) == 1
    assert long[0] - short[0] == 180 * per_token


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_loss_that_is_not_finite_is_an_error(model, bad):
    damaged = eqx.tree_at(lambda m: m.embedding, model, model.embedding.at[7].set(bad))
    tokens = np.array([1, 2, 3, 7, 4], np.uint16)
    with pytest.raises(FloatingPointError, match="loss must be finite; got nan for token 4; take an earlier checkpoin"):
        text_perplexity(eqx.tree_at(lambda m: m.head, damaged, model.embedding.T, is_leaf=lambda x: x is None),
                        tokens, TOKENIZER, piece=2)  # fmt: skip


@pytest.mark.parametrize(
    ("tokens", "piece", "message"),
    [
        ([], 512, "the text must have at least 2 tokens; got 0"),
        ([256], 512, "at least 2 tokens; got 1; give a longer one"),
        ([256, 1], 0, "piece must be at least 1; got 0"),
        ([256, 1, 300], 512, "token ids below vocabulary_size=258; got 300"),
        ([-1, 1], 512, "token ids below vocabulary_size=258; got -1"),
    ],
)
def test_bad_input_is_named(model, tokens, piece, message):
    with pytest.raises(ValueError, match=f"perplexity: .*{message}"):
        text_perplexity(model, np.array(tokens, np.int64), TOKENIZER, piece=piece)


def test_of_a_file(model, tmp_path):
    text = bytes(TOKENS[TOKENS < 256].tolist())
    (tmp_path / "text").write_bytes(text)
    marked = np.array([TOKENIZER.document, *text], np.uint16)
    assert file_perplexity(model, tmp_path / "text", TOKENIZER) == text_perplexity(model, marked, TOKENIZER)
    (tmp_path / "empty").touch()
    with pytest.raises(ValueError, match=r"perplexity: .*empty must have text; it is empty"):
        file_perplexity(model, tmp_path / "empty", TOKENIZER)
    with pytest.raises(ValueError, match="must be a regular file"):
        file_perplexity(model, tmp_path, TOKENIZER)
    with pytest.raises(FileNotFoundError):
        file_perplexity(model, tmp_path / "missing", TOKENIZER)


def test_a_bin_of_no_bytes_or_of_hopeless_loss():
    assert math.isnan(Bin(0, 1, 1.0, 0).bits_per_byte)
    assert math.isfinite(Bin(0, 1, 1e6, 1).perplexity)


def test_progress_is_shown_where_asked(model, capsys):
    text_perplexity(model, TOKENS, TOKENIZER)
    assert capsys.readouterr().err == ""
    text_perplexity(model, TOKENS, TOKENIZER, show_progress=True)
    assert "300/300" in capsys.readouterr().err
