"""Text: characters that are several tokens come whole, and a stop string is never shown, nor what may become one."""

from typing import Any

import jax
import numpy as np
import pytest
from scripted_model import Scripted

from rattn_eqx.data.corpus import build_corpus
from rattn_eqx.data.tokenizers import BPETokenizer, ByteTokenizer
from rattn_eqx.inference.text import generate_text, generate_texts

KEY = jax.random.key(1)
TOKENIZER = ByteTokenizer()


def pieces(text: bytes | list[int], count: int, **options: Any) -> tuple[list[str], str]:
    """What is shown after each token of one text, and why it ended."""
    shown = list(generate_texts(Scripted(text), TOKENIZER, [""], num_tokens=count, temperature=0, key=KEY, **options))
    assert all(ended is None for *_, ended in shown[:-1])
    assert all(row == 0 for row, *_ in shown)
    return [piece for _, piece, _ in shown], str(shown[-1][2])


def both(text: bytes | list[int], count: int, **options: Any) -> tuple[list[str], str]:
    """The same streamed and not."""
    streamed = pieces(text, count, **options)
    unstreamed = pieces(text, count, **options, stream=False)
    assert "".join(unstreamed[0]) == "".join(streamed[0])
    assert unstreamed[1] == streamed[1]
    return streamed


def test_characters_come_whole():
    text = "aé→😀b"
    shown, ended = both(text.encode(), len(text.encode()))
    assert shown == ["a", "", "é", "", "", "→", "", "", "", "😀", "b"]
    assert ended == "count"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (b"a\xffb", "a\ufffdb"),
        (b"\xc3(", "\ufffd("),  # begun and not gone on with
        (b"ok\xf0\x9f\x98", "ok\ufffd"),  # cut by the end
        (b"\x80\x80", "\ufffd\ufffd"),
    ],
)
def test_what_is_no_utf8_is_replaced(text, expected):
    assert "".join(both(text, len(text))[0]) == expected


@pytest.mark.parametrize(
    ("text", "stop", "expected", "ended"),
    [
        (b"one.END two", ["END"], "one.", "stop"),
        (b"one.ENDtwo", ["ENDED", "two", "D"], "one.EN", "stop"),  # the first that comes, of any length
        (b"a\n\nb", ["\n\n"], "a", "stop"),
        (b"one ENx END!", ["END"], "one ENx ", "stop"),  # begun and not gone on with
        (b"ENENDx", ["END"], "EN", "stop"),
        (b"END", ["END"], "", "stop"),
        (b"one EN", ["END"], "one EN", "count"),  # held back until the end
        ("→é→!".encode(), ["é→"], "→", "stop"),
        ("aéb".encode(), ["é"], "a", "stop"),
        (b"abc", [], "abc", "count"),
        (b"ababc", ["abc", "bab"], "a", "stop"),  # what is whole first ends it,
        (b"xab", ["b", "ab"], "x", "stop"),  # and of two that are whole at once the longer
    ],
)
def test_a_stop_string_is_not_shown_nor_what_follows(text, stop, expected, ended):
    shown, why = both(text, len(text), stop=stop)
    assert ("".join(shown), why) == (expected, ended)


def test_no_token_is_drawn_after_a_stop_string_and_no_more_held_back_than_must_be():
    shown, ended = pieces(b"abcdSTOPefgh", 12, stop=["STOP"])
    assert shown == ["", "", "", "a", "b", "c", "d", ""]
    assert ended == "stop"
    assert pieces(b"abcdSTO", 7, stop=["STOP"])[0] == ["", "", "", "a", "b", "c", "dSTO"]


@pytest.mark.parametrize("stream", [True, False])
def test_texts_beside_each_other(stream):
    texts = ["first STOP", "é" * 20, "third, which is longer", "STOP"]
    model = Scripted(*(text.encode() for text in texts))
    options: dict[str, Any] = dict(num_tokens=[30, 40, 5, 30], stop=["STOP"], temperature=0, stream=stream, key=KEY)
    whole, why = [""] * 4, dict.fromkeys(range(4))
    for row, piece, ended in generate_texts(model, TOKENIZER, model.prompts(), **options):
        assert why[row] is None, "a piece of a text that had ended"
        whole[row] += piece
        why[row] = ended
    assert whole == ["first ", "é" * 20, "third", ""]
    assert list(why.values()) == ["stop", "count", "count", "stop"]


def test_a_text_alone():
    options: dict[str, Any] = dict(num_tokens=9, temperature=0, key=KEY)
    assert list(generate_text(Scripted(b"one END"), TOKENIZER, "", stop=["END"], **options))[-1] == ""
    assert "".join(generate_text(Scripted(b"one END"), TOKENIZER, "", stop=["END"], **options)) == "one "


def test_tokens_that_stand_for_no_text_are_never_drawn():
    """The likeliest is one of them: the next is drawn."""
    for special in (TOKENIZER.document, TOKENIZER.padding):
        assert "".join(both([97, special, 98], 3)[0]) == "a\0b"


def test_end_tokens_are_part_of_the_text():
    shown, ended = both(b"one. two", 8, end=[ord(".")])
    assert ("".join(shown), ended) == ("one.", "end")


def test_of_byte_pairs(tmp_path):
    """Tokens of several characters, of which a stop string takes a part."""
    (tmp_path / "text").write_bytes("naïve cat, naïve dog. ".encode() * 400)
    tokenizer = BPETokenizer.train(build_corpus(tmp_path / "text", tmp_path / "cache"), 300)
    text = "naïve cat, naïve dog. naïve"
    script = tokenizer.encode(text.encode()).tolist()
    assert max(map(len, map(tokenizer.decode, np.array(script)[:, None]))) > 3
    model = Scripted(script, vocabulary_size=tokenizer.vocabulary_size)
    options: dict[str, Any] = dict(num_tokens=len(script), temperature=0, key=KEY)
    assert "".join(generate_text(model, tokenizer, "", **options)) == text
    for stream in (True, False):
        drawn = generate_text(model, tokenizer, "", stop=["ve do"], stream=stream, **options)
        assert "".join(drawn) == "naïve cat, naï"


@pytest.mark.parametrize("stop", ["END", [""], ["a", ""]])
def test_stop_must_be_strings(stop):
    with pytest.raises(ValueError, match="generate: stop must be strings of at least one character; got "):
        generate_texts(Scripted(b"a"), TOKENIZER, [""], num_tokens=2, key=KEY, stop=stop)
