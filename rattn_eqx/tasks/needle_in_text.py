"""Needles in real text, for any tokenizer that writes digits one by one, as those of pretrained models often do."""

from typing import Literal

import numpy as np
from jaxtyping import Int32

from pallas.checked import checked
from rattn_eqx.data.tokenizers import Tokenizer
from rattn_eqx.tasks.recall import RecallBatch, require_counts

DIGITS = 5  # of a code
_WORDS = (
    "apple", "anchor", "basket", "bridge", "candle", "castle", "cellar", "copper", "cotton", "dragon", "engine",
    "falcon", "feather", "forest", "garden", "granite", "hammer", "harbour", "island", "jacket", "ladder",
    "lantern", "marble", "meadow", "mirror", "needle", "orchard", "pepper", "pocket", "rabbit", "ribbon",
    "saddle", "sailor", "shadow", "shelter", "silver", "spider", "temple", "thunder", "timber", "tunnel",
    "velvet", "violin", "wagon", "walnut", "winter",
)  # fmt: skip


@checked
def needle_in_text(
    tokenizer: Tokenizer,
    texts: Int32[np.ndarray, "texts tokens"],
    seed: int,
    n: int,
    length: int,
    *,
    key: Literal["word", "number", "id"] = "word",
    num_keys: int = 4,
    hops: int = 0,
) -> RecallBatch:
    """Sentences " The code of KEY is VALUE." at random places of a text, and at its end one of the keys again.

    A sample is the document marker and `length` tokens: a stretch of one of the texts, the needles in it, and " The
    code of KEY is VALUE" with the key of one of them. Keys are words, numbers of 6 digits or ids of 8 hex digits, those
    of a sample differ; values are DIGITS digits. Scored are the digits of the last value. Distance: to the same digit
    in its needle. Chance: 1/10.

    With hops the value must be traced, as in RULER's variable tracking (arXiv 2404.06654): each key begins a chain of
    sentences " The code of NEXT is that of KEY.", one a hop, and the question is " In digits, the code of LAST is".

    Args:
      texts: tokens to hide the needles in, such as `batches.long_documents` gives; each is read from its start.

    Raises:
      ValueError: no texts, or shorter ones than the length; needles that do not fit; more keys than there are words; a
        tokenizer that joins digits.
    """
    require_counts("needle_in_text", n=n, num_keys=num_keys)
    if not texts.size or texts.shape[1] < length:
        raise ValueError(
            f"needle_in_text: texts must have the sample's length={length}; got {texts.shape[0]} of "
            f"{texts.shape[1]} tokens; give longer ones"
        )
    chain = 1 + hops
    if not 0 < num_keys * chain <= len(_WORDS) or hops < 0:
        raise ValueError(
            f"needle_in_text: num_keys must be at most {len(_WORDS)}, times 1 + hops with hops; got {num_keys}, "
            f"hops={hops}"
        )
    generator = np.random.default_rng((seed, length))
    tokens = np.empty((n, length + 1), np.int32)
    distance = np.zeros((n, length), np.int32)
    for row in range(n):
        names = _keys(generator, key, num_keys * chain)
        values = ["".join(generator.choice([*"0123456789"], DIGITS)) for _ in range(num_keys)]
        sentences = [f" The code of {name} is {value}" for name, value in zip(names[::chain], values, strict=True)]
        needles = [_encode(tokenizer, sentence, ".") for sentence in sentences]
        needles += [
            (_tokens(tokenizer, f" The code of {name} is that of {names[number - 1]}."), 0)
            for number, name in enumerate(names)
            if number % chain
        ]
        asked = f" In digits, the code of {names[hops]} is {values[0]}" if hops else sentences[0]
        question, _ = _encode(tokenizer, asked, "")
        room = length - len(question) - sum(len(needle) for needle, _ in needles)
        if room < len(needles):
            raise ValueError(
                f"needle_in_text: {len(needles)} needles and a question must fit; got length={length}; give a longer "
                "one"
            )
        text = texts[generator.integers(len(texts))]
        text = text[text != tokenizer.document][:room]
        text = np.resize(text, room)  # repeats what had markers in it
        order = generator.permutation(len(needles))
        cuts = np.sort(generator.integers(0, room + 1, len(needles)))
        pieces, at, found = [], 1, 0
        for number, piece in zip([*order, None], np.split(text, cuts), strict=True):
            pieces.append(piece)
            at += len(piece)
            if number is not None:
                needle, end = needles[number]
                if number == 0:
                    found = at + end - DIGITS  # where its first digit stands
                pieces.append(needle)
                at += len(needle)
        tokens[row] = np.concatenate([[tokenizer.document], *pieces, question])
        distance[row, -DIGITS:] = length - DIGITS - found
    return RecallBatch(tokens[:, :-1], tokens[:, 1:].copy(), distance, 0.1, DIGITS, tokenizer.vocabulary_size)


def _keys(generator: np.random.Generator, kind: str, count: int) -> list[str]:
    if kind == "word":
        return [str(x) for x in generator.choice(_WORDS, count, replace=False)]
    if kind == "number":
        return [str(x) for x in 100_000 + generator.choice(900_000, count, replace=False)]
    return [f"{x:08x}" for x in generator.choice(2**32, count, replace=False)]


def _encode(tokenizer: Tokenizer, text: str, end: str) -> tuple[np.ndarray, int]:
    """Tokens of a text that ends with a value, and of its end; and how many the former are."""
    tokens = _tokens(tokenizer, text)
    for place in range(1, DIGITS + 1):
        if tokenizer.decode(tokens[-place:]) != text[-place:].encode():
            raise ValueError(
                f"needle_in_text: the tokenizer must write digits one by one; of {text[-DIGITS:]!r} it makes "
                f"{len(tokenizer.encode(text[-DIGITS:].encode()))} tokens; take the task needle, in bytes"
            )
    return np.concatenate([tokens, _tokens(tokenizer, end)]), len(tokens)


def _tokens(tokenizer: Tokenizer, text: str) -> np.ndarray:
    return np.asarray(tokenizer.encode(text.encode()), np.int32)
