"""The n-gram and gzip baselines, against definitions written out."""

import collections
import gzip

import jaxtyping
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rattn_eqx.data import byte_models
from rattn_eqx.data.byte_models import gzip_bits_per_byte, interpolated_bits_per_byte
from rattn_eqx.data.tokenizers import DOCUMENT

SYMBOLS = st.lists(st.sampled_from([DOCUMENT, 0, 97, 98, 255]), min_size=1, max_size=60)


class SlowModel:
    """Witten-Bell interpolation over dictionaries, as the docstring's equation reads."""

    def __init__(self, train: list[int], order: int):
        self.followers = collections.defaultdict(collections.Counter)
        stream = [DOCUMENT] * order + train
        for at in range(order, len(stream)):
            for length in range(order + 1):
                self.followers[tuple(stream[at - length : at])][stream[at]] += 1

    def probability(self, context: tuple[int, ...], symbol: int) -> float:
        shorter = self.probability(context[1:], symbol) if context else 1 / 257
        followers = self.followers[context]
        if not followers:
            return shorter
        return (followers[symbol] + len(followers) * shorter) / (followers.total() + len(followers))


@settings(max_examples=60)
@given(train=SYMBOLS, validation=SYMBOLS.filter(lambda symbols: set(symbols) != {DOCUMENT}), order=st.integers(0, 6))
def test_bits_per_byte_equal_the_definition(train, validation, order):
    model = SlowModel(train, order)
    stream = [DOCUMENT] * order + validation
    positions = range(order, len(stream))
    bits = -sum(np.log2(model.probability(tuple(stream[at - order : at]), stream[at])) for at in positions)
    expected = bits / sum(symbol != DOCUMENT for symbol in validation)
    actual = interpolated_bits_per_byte(np.array(train, np.uint16), np.array(validation, np.uint16), order=order)
    assert actual == pytest.approx(expected, rel=1e-12)


def test_probabilities_over_the_alphabet_sum_to_one_in_every_context():
    generator = np.random.default_rng(0)
    train = np.concatenate([[DOCUMENT], generator.integers(97, 101, 400)]).astype(np.uint16)
    levels = byte_models._count(train, 3)
    contexts = np.concatenate([levels[0].contexts, byte_models._ngram_codes(generator.integers(0, 257, 50), 2)])
    codes = (contexts[:, None] << 9) | np.arange(257)
    sums = byte_models._probabilities(levels, codes.ravel()).reshape(codes.shape).sum(axis=1)
    np.testing.assert_allclose(sums, 1.0, rtol=1e-12)


def test_counts_do_not_depend_on_the_blocks_that_are_counted(monkeypatch):
    tokens = np.random.default_rng(0).integers(97, 100, 500).astype(np.uint16)
    whole = byte_models._count(tokens, 3)
    for block in (1, 2, 7):
        monkeypatch.setattr(byte_models, "_BLOCK", block)
        for level, expected in zip(byte_models._count(tokens, 3), whole, strict=True):
            for name, values in vars(expected).items():
                np.testing.assert_array_equal(getattr(level, name), values)


def test_more_context_helps_on_text_that_has_some():
    text = np.frombuffer(b"the cat sat on the mat and the rat ran to the cat " * 40, np.uint8).astype(np.uint16)
    figures = [interpolated_bits_per_byte(text[:1500], text[1500:], order=order) for order in range(4)]
    assert figures == sorted(figures, reverse=True)
    assert figures[0] > 3
    assert figures[3] < 0.5


def test_gzip_counts_the_file_that_gzip_writes_and_drops_markers():
    text = b"abracadabra " * 50
    tokens = np.insert(np.frombuffer(text, np.uint8).astype(np.uint16), [0, 100], DOCUMENT)
    expected = 8 * len(gzip.compress(text, 9)) / len(text)
    assert gzip_bits_per_byte(text) == expected
    assert gzip_bits_per_byte(tokens) == expected


def test_what_cannot_be_scored_is_an_error():
    text = np.arange(100, dtype=np.uint16)
    with pytest.raises(ValueError, match="order must lie between 0 and 6; got 7"):
        interpolated_bits_per_byte(text, text, order=7)
    with pytest.raises(ValueError, match="train must hold tokens from 0 to 256"):
        interpolated_bits_per_byte(text + 200, text)
    with pytest.raises(ValueError, match="validation must hold tokens from 0 to 256, and at least one"):
        interpolated_bits_per_byte(text, text[:0])
    with pytest.raises(ValueError, match="validation holds no bytes"):
        interpolated_bits_per_byte(text, np.array([DOCUMENT], np.uint16))
    with pytest.raises(ValueError, match="gzip_bits_per_byte: the text holds no bytes"):
        gzip_bits_per_byte(b"")


def test_wrong_shapes_are_named():
    with pytest.raises(jaxtyping.TypeCheckError, match="parameter 'train'"):
        interpolated_bits_per_byte(np.zeros((3, 4), np.int64), np.zeros(5, np.int64))
