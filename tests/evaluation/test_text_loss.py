"""Bits per byte against a hand computation, and what the residual branch's switch switches."""

import dataclasses
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from training_child import MODEL, SAMPLE

from rattn_eqx.data.batches import long_documents, validation_batches
from rattn_eqx.data.corpus import Corpus, build_corpus
from rattn_eqx.data.tokenizers import BPETokenizer, ByteTokenizer, Tokenizer, tokenize
from rattn_eqx.evaluation import attribution, recall
from rattn_eqx.evaluation.attribution import effective_memory
from rattn_eqx.evaluation.recall import predict
from rattn_eqx.evaluation.text import evaluate, loss_by_position, without_residual
from rattn_eqx.model import language_model
from rattn_eqx.model.language_model import LanguageModel
from rattn_eqx.pretrain import as_bytes

CONTEXT = 16


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return build_corpus(SAMPLE, tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def bpe(corpus: Corpus) -> BPETokenizer:
    return BPETokenizer.train(corpus, 400)


@pytest.fixture(params=["byte", "bpe"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return ByteTokenizer() if request.param == "byte" else request.getfixturevalue("bpe")


def make_model(vocabulary_size: int, **changes) -> LanguageModel:
    config = dataclasses.replace(MODEL, vocabulary_size=vocabulary_size, num_layers=3, **changes)
    return LanguageModel(config, key=jax.random.key(0))


def bits_per_byte_by_hand(model: LanguageModel, stream: np.ndarray, tokenizer: Tokenizer) -> float:
    """Window by window, without batches or padding; the softmax in NumPy's float64."""
    nats, num_bytes, logits_of = 0.0, 0, eqx.filter_jit(model)
    for start in range(0, len(stream) - 1, CONTEXT):
        window = stream[start : start + CONTEXT + 1].astype(np.int32)
        tokens, targets = window[:-1], window[1:]
        segment_ids = np.cumsum(tokens == tokenizer.document, dtype=np.int32)
        logits = np.asarray(logits_of(jnp.asarray(tokens), jnp.asarray(segment_ids)), np.float64)
        log_sums = np.log(np.sum(np.exp(logits), axis=-1))
        nats += np.sum(log_sums - logits[np.arange(len(targets)), targets])
        num_bytes += len(tokenizer.decode(targets))
    return nats / np.log(2) / num_bytes


def test_bits_per_byte_by_hand(corpus, tokenizer, tmp_path: Path):
    """All targets' bits, document markers' included, over the bytes alone; 150 targets end 6 into a batch of 48."""
    marker = np.array([tokenizer.document], np.uint16)
    documents = [text[:99] for text in corpus.documents("train")[:6]]
    stream = np.concatenate([part for text in documents for part in (marker, tokenizer.encode(text))])[:151]
    assert len(stream) == 151
    assert np.count_nonzero(stream[1:] == tokenizer.document) >= 1
    np.save(tmp_path / "tokens.npy", stream)
    model = make_model(tokenizer.vocabulary_size)

    def batches():
        path, document = tmp_path / "tokens.npy", tokenizer.document
        return validation_batches(path, context=CONTEXT, batch_size=3, document=document)

    padded = [np.count_nonzero(batch["targets"] == tokenizer.padding) for batch in batches()]
    assert padded == [0, 0, 0, 42]
    expected = bits_per_byte_by_hand(model, stream, tokenizer)
    np.testing.assert_allclose(evaluate(model, batches(), tokenizer), expected, rtol=1e-5)


class Polynomial(eqx.Module):
    """A map of the caller's own, with a list in it."""

    coefficients: list[float]

    def __call__(self, x):
        return sum(c * x**power for power, c in enumerate(self.coefficients))


def test_a_map_that_holds_a_list_is_evaluated(corpus, tmp_path: Path):
    _, validation = tokenize(corpus, ByteTokenizer(), tmp_path)
    config = dataclasses.replace(MODEL, num_layers=1, pattern=("local",))

    def bits(feature_map):
        model = LanguageModel(config, feature_map=lambda key: feature_map, key=jax.random.key(0))
        batches = validation_batches(validation, context=CONTEXT, batch_size=3, document=256, max_tokens=96)
        return evaluate(model, batches, ByteTokenizer())

    assert bits(Polynomial([0.0, 1.0])) == pytest.approx(bits(lambda x: x), rel=1e-6)


def test_loss_by_position_is_the_mean_of_its_positions(corpus, tokenizer, tmp_path: Path):
    _, validation = tokenize(corpus, tokenizer, tmp_path)
    documents = long_documents(validation, 301, document=tokenizer.document)
    model = make_model(tokenizer.vocabulary_size)
    rows = loss_by_position(model, documents, tokenizer)
    assert [(low, high) for low, high, _ in rows] == [(0, 128), (128, 256), (256, 300)]
    one = jax.jit(lambda tokens: jax.nn.log_softmax(model(tokens)))
    logs = np.stack([one(jnp.asarray(document[:-1])) for document in documents]).astype(np.float64)
    bits = -np.take_along_axis(logs, documents[:, 1:, None], axis=-1)[..., 0] / np.log(2)
    num_bytes = tokenizer.byte_lengths[documents[:, 1:]]
    for low, high, found in rows:
        assert np.isclose(found, bits[:, low:high].sum() / num_bytes[:, low:high].sum(), rtol=1e-5)


def test_logits_by_blocks_give_the_same_numbers(corpus, tmp_path, monkeypatch):
    _, validation = tokenize(corpus, ByteTokenizer(), tmp_path)
    documents, model = long_documents(validation, 151, document=256)[:2], make_model(258, pattern=("global",))
    tokens, targets = documents[:, :-1], documents[:, 1:]
    batch = {"tokens": tokens, "targets": targets, "segment_ids": np.zeros_like(tokens)}

    def numbers():
        rows = loss_by_position(model, documents, ByteTokenizer())
        memory = effective_memory(model, tokens, num_places=2)
        return evaluate(model, [batch], ByteTokenizer()), [bits for _, _, bits in rows], predict(model, tokens), memory

    bits, by_position, predicted, memory = numbers()
    for module in (language_model, recall, attribution):
        monkeypatch.setattr(module, "MAX_LOGITS", 40 * 258)
    jax.clear_caches()  # so that functions compiled above are compiled anew
    formed = eqx.filter_make_jaxpr(recall._likeliest)(model, jnp.asarray(tokens))[0]
    assert "[2,150,258]" not in str(formed), "the logits are formed at once"
    bits_again, by_position_again, predicted_again, memory_again = numbers()
    np.testing.assert_allclose([bits_again, *by_position_again], [bits, *by_position], rtol=1e-6)
    np.testing.assert_array_equal(predicted_again, predicted)
    np.testing.assert_allclose(memory_again.change, memory.change, rtol=1e-5, equal_nan=True)


@pytest.mark.parametrize("pattern", [("local",), ("local", "global")])
def test_without_residual_sets_every_gain_to_zero_and_nothing_else(pattern):
    model = make_model(258, pattern=pattern)
    is_gain = lambda path: jax.tree_util.keystr(path).endswith(".rla_gain")
    zeroed = jax.tree_util.tree_map_with_path(
        lambda path, leaf: jnp.zeros_like(leaf) if is_gain(path) else leaf, eqx.filter(model, eqx.is_array)
    )
    expected = eqx.combine(zeroed, model)
    tokens = jax.random.randint(jax.random.key(1), (3 * model.config.window,), 0, 256)
    logits_of = eqx.filter_jit(lambda model: model(tokens))
    logits, without = logits_of(model), logits_of(without_residual(model))
    np.testing.assert_array_equal(without, logits_of(expected))
    assert jnp.max(jnp.abs(without - logits)) > 1e-2
    assert eqx.tree_equal(without_residual(model), expected)
    plain = make_model(258, pattern=pattern, residual=False)
    assert without_residual(plain) is plain


def test_as_bytes_gives_the_byte_tokenizers_stream(corpus, bpe, tmp_path):
    plain = ByteTokenizer()
    for path, byte_path in zip(tokenize(corpus, bpe, tmp_path), tokenize(corpus, plain, tmp_path), strict=True):
        tokens, expected = np.load(path), np.load(byte_path)
        assert len(tokens) < 0.7 * len(expected)
        converted = as_bytes(tokens, bpe)
        assert converted.dtype == expected.dtype
        np.testing.assert_array_equal(converted, expected)
        np.testing.assert_array_equal(as_bytes(expected, plain), expected)
        beginning = as_bytes(tokens[:501], bpe)  # as an evaluation reads it, cut within a document
        np.testing.assert_array_equal(beginning, expected[: len(beginning)])
        assert len(beginning) == bpe.byte_lengths[tokens[:501]].sum() + np.count_nonzero(tokens[:501] == bpe.document)
