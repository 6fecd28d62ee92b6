"""A needle in real text is read from its sentence, wherever that stands, and its key alone says which."""

import re

import numpy as np
import pytest

from rattn_eqx.data.tokenizers import ByteTokenizer
from rattn_eqx.tasks.needle_in_text import DIGITS, needle_in_text
from rattn_eqx.tasks.recall import score

TEXT = np.frombuffer(b"The quay was quiet; nobody asked what the ledger said. " * 20, np.uint8).astype(np.int32)
TEXTS = np.stack([TEXT[:1000], np.roll(TEXT, 7)[:1000]])


@pytest.mark.parametrize("key", ["word", "number", "id"])
def test_a_reader_of_the_key_is_right_and_the_text_says_the_rest(key):
    batch = needle_in_text(ByteTokenizer(), TEXTS, 3, 40, 400, key=key, num_keys=3)
    assert batch.tokens.shape == batch.targets.shape == (40, 400)
    np.testing.assert_array_equal(batch.tokens[:, 1:], batch.targets[:, :-1])
    predictions, places = np.zeros_like(batch.tokens), []
    for row, (tokens, last) in enumerate(zip(batch.tokens, batch.targets[:, -1:], strict=True)):
        said = bytes([*tokens[1:], *last]).decode()
        *body, question = said.split(" The code of ")
        name, value = question.split(" is ")
        found = {x.split(" is ")[0]: x.split(" is ")[1][:DIGITS] for x in body[1:]}
        assert len(found) == 3
        assert found[name] == value
        places.append(said.index(f" The code of {name} is"))
        predictions[row, -DIGITS:] = [*found[name].encode()]
        at = np.flatnonzero(batch.distance[row])
        np.testing.assert_array_equal(at, np.arange(400 - DIGITS, 400))
        np.testing.assert_array_equal(tokens[at - batch.distance[row, at]], batch.targets[row, at])
    assert score(batch, predictions).exact == 1
    assert min(places) < 60
    assert max(places) > 260
    assert score(batch, np.full_like(predictions, ord("7"))).accuracy < 0.2


@pytest.mark.parametrize("hops", [1, 2])
def test_a_chain_is_traced_to_its_code(hops):
    batch = needle_in_text(ByteTokenizer(), TEXTS, 5, 10, 800, num_keys=3, hops=hops)
    for row, (tokens, last) in enumerate(zip(batch.tokens, batch.targets[:, -1:], strict=True)):
        said = bytes([*tokens[1:], *last]).decode()
        codes = dict(re.findall(rf" The code of (\w+) is (\d{{{DIGITS}}})\.", said))
        comes_from = dict(re.findall(r" The code of (\w+) is that of (\w+)\.", said))
        assert (len(codes), len(comes_from)) == (3, 3 * hops)
        assert len({*codes, *comes_from}) == 3 * (1 + hops), "no name twice"
        (name, value), hop = re.findall(r" In digits, the code of (\w+) is (\d+)$", said)[0], 0
        while name in comes_from:
            name, hop = comes_from[name], hop + 1
        assert (codes[name], hop) == (value, hops)
        at = np.flatnonzero(batch.distance[row])
        assert said.index(f" The code of {name} is {value}.") + 1 < 800 - batch.distance[row, -1]
        np.testing.assert_array_equal(tokens[at - batch.distance[row, at]], batch.targets[row, at])


def test_lengths_have_needles_of_their_own_and_seeds_too():
    draw = lambda seed, length: needle_in_text(ByteTokenizer(), TEXTS, seed, 2, length).tokens[:, -5:].tolist()
    assert draw(0, 400) == draw(0, 400)
    assert draw(0, 400) != draw(1, 400)
    assert draw(0, 400) != draw(0, 401)


def test_what_cannot_be_asked_is_told(monkeypatch):
    for arguments, words in (
        ((ByteTokenizer(), TEXTS, 0, 2, 2000), "texts must have the sample's length=2000; got 2 of 1000"),
        ((ByteTokenizer(), TEXTS, 0, 2, 120), "4 needles and a question must fit"),
        ((ByteTokenizer(), TEXTS, 0, 0, 400), "n must be at least 1"),
    ):
        with pytest.raises(ValueError, match=f"^needle_in_text: .*{words}"):
            needle_in_text(*arguments)
    with pytest.raises(ValueError, match="num_keys must be at most"):
        needle_in_text(ByteTokenizer(), TEXTS, 0, 2, 400, num_keys=99)
    with pytest.raises(ValueError, match=r"times 1 \+ hops with hops; got 9, hops=8"):
        needle_in_text(ByteTokenizer(), TEXTS, 0, 2, 400, num_keys=9, hops=8)
    monkeypatch.setattr(ByteTokenizer, "decode", lambda self, tokens: b"12" * len(tokens))  # as of pairs of digits
    with pytest.raises(ValueError, match="must write digits one by one"):
        needle_in_text(ByteTokenizer(), TEXTS, 0, 2, 400)
