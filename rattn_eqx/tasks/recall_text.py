"""Recall tasks over text, as in RULER (Hsieh et al., arXiv 2404.06654): needles, variables, common and frequent words.

At level "byte" a sample is text for a `ByteTokenizer`, after its document marker; at level "token" a word, a name or a
value is one token id. Every sample is drawn from a seed; nothing is downloaded. The batch is `recall.RecallBatch`.
"""

from typing import Literal

import numpy as np

from pallas.checked import checked
from rattn_eqx.data.tokenizers import BYTE_VOCABULARY, DOCUMENT
from rattn_eqx.tasks.draw import below, bits, distinct, join, shuffled, spell
from rattn_eqx.tasks.recall import RecallBatch, as_batch, require_counts

Level = Literal["byte", "token"]

_letters = lambda text: np.frombuffer(text, np.uint8)[:, None].astype(np.int64)
_DIGITS, _HEX, _CAPITALS, _NOISE = map(
    _letters, (b"0123456789", b"0123456789abcdef", b"ABCDEFGHIJKLMNOPQRSTUVWXYZ", b"abcdefghijklmnopqrstuvwxyz     ")
)
_SYLLABLES = np.array([[a, b] for a in b"bcdfghjklmnpqrstvwxyz" for b in b"aeiou"])
_WORD_CHANCE = (1 / 21 + 1 / 5) / 2  # per letter of a word
_KEYS = {"word": (_SYLLABLES, 3), "number": (_DIGITS, 7), "hex": (_HEX, 8)}
_VALUE = 7  # digits


@checked
def needle(
    seed: int,
    n: int,
    length: int,
    *,
    key: Literal["word", "number", "hex"] = "word",
    haystack: Literal["noise", "corpus", "needles"] = "noise",
    num_keys: int = 4,
    num_values: int = 1,
    num_queries: int = 1,
    gap: int = 0,
    text: bytes | None = None,
) -> RecallBatch:
    """Needles in a haystack, byte by byte: sentences " The code of KEY is VALUE." hidden in text, then questions.

    A sample is the document marker and `length` bytes. `num_keys` keys have `num_values` needles each, at random places
    that do not overlap. The sample ends with `num_queries` questions, each about another key:
    " Again: the code of KEY is VALUE, VALUE." with the key's values in the order of their needles. A key is a word of
    three syllables ("kodemi"), a number of 7 digits, or 8 hex digits; the keys of a sample differ. A value is 7
    independent digits. At least `gap` bytes without any of these needles stand before the questions.

    The haystack is "noise", random small letters and spaces; "corpus", a random stretch of `text`, which the needles
    overwrite; or "needles", as many needles of other keys as fit.

    Scored: the 7 digits of every value of a question (an answer). Distance: to the same digit in its needle. The
    needles are spread evenly over the places before the gap. Chance: 1/10.

    An answer's digits are given one after the other, so that the first ones pick its needle out. A reader that copies
    any needle which agrees with the digits so far, and never reads the question's key, is right in 0.85 of the digits
    and 0.15 of the answers with 8 keys and 1 question, 0.89 and 0.34 with 8 questions, crossing off what was asked.
    Compare `RecallScore.exact` with that, not digits with chance.

    Beyond a window, at length 1,024: 96.9% of 64, 75.6% of 256, 49.8% of 512.

    Raises:
      ValueError: counts below 1, more questions than keys, needles that do not fit, a corpus haystack without a text,
        or a text shorter than the haystack or with a needle's words in it.
    """
    require_counts("needle", n=n, num_keys=num_keys, num_values=num_values, num_queries=num_queries)
    if num_queries > num_keys:
        raise ValueError(
            f"needle: num_queries must be at most num_keys; got num_queries={num_queries}, num_keys={num_keys}"
        )
    before, between, ask = b" The code of ", b" is ", b" Again: the code of "
    pieces, digits = _KEYS[key]
    key_size = digits * pieces.shape[1]
    size = len(before) + key_size + len(between) + _VALUE + 1
    question = len(ask) + key_size + len(between) + num_values * (_VALUE + 2) - 1
    body, num_needles = length - num_queries * question, num_keys * num_values
    _require_room("needle", body, gap, num_needles, size, length)

    source = bits("needle", seed)
    slots, more = body // size, body // size if haystack == "needles" else 0
    key_ids = distinct(source, n, num_keys + more, len(pieces) ** digits)
    keys = spell(key_ids, pieces, digits)
    values = spell(below(source, (n, num_needles + more), 10**_VALUE), _DIGITS, _VALUE)
    asked_keys, others = keys[:, :num_keys], keys[:, num_keys:]
    if haystack == "needles":
        lead = body - slots * size
        hay = join((n, more), before, others, between, values[:, num_needles:], b".").reshape(n, -1)
        hay = np.concatenate([np.full((n, lead), ord(" ")), hay], axis=1)
        allowed = slots - -(-gap // size)
        _require_room("needle", allowed * size + gap, gap, num_needles, size, length)
        places = lead + size * distinct(source, n, num_needles, allowed)
    else:
        hay = _noise(source, n, body) if haystack == "noise" else _stretches(source, n, body, text)
        places = _free_places(source, n, num_needles, size, body - gap)
    starts = 1 + np.sort(places.reshape(n, num_keys, num_values), axis=-1)
    values = values[:, :num_needles].reshape(n, num_keys, num_values, _VALUE)
    sentences = join((n, num_keys, num_values), before, asked_keys[:, :, None], between, values, b".")

    sequence = np.concatenate([np.full((n, 1), DOCUMENT), hay, np.empty((n, length - body), np.int64)], axis=1)
    _overwrite(sequence, starts.reshape(n, -1), sentences.reshape(n, num_needles, size))
    listed = join((n, num_queries, num_values), values[:, :num_queries], b", ").reshape(n, num_queries, -1)[..., :-2]
    questions = join((n, num_queries), ask, asked_keys[:, :num_queries], between, listed, b".")
    sequence[:, 1 + body :] = questions.reshape(n, -1)

    evidence = starts[:, :num_queries, :, None] + len(before) + key_size + len(between) + np.arange(_VALUE)
    first = 1 + body + question * np.arange(num_queries)[:, None] + len(ask) + key_size + len(between)
    answers = (first + (_VALUE + 2) * np.arange(num_values))[..., None] + np.arange(_VALUE)
    return _finish(sequence, answers, evidence, 1 / 10, _VALUE, BYTE_VOCABULARY)


@checked
def variables(
    seed: int,
    n: int,
    length: int,
    *,
    level: Level = "byte",
    num_chains: int = 2,
    hops: int = 3,
    num_queries: int = 1,
    gap: int = 0,
    vocabulary_size: int = 256,
) -> RecallBatch:
    """Variable tracking: chains of assignments in noise, then the value of a chain's last variable.

    Each of `num_chains` chains is an assignment of a value to a variable and then `hops` assignments of each chain's
    last variable to a new one, in this order, at random places among those of the other chains. The sample ends with
    `num_queries` questions, each for the last variable of another chain. RULER asks for all names of a chain instead:
    read token by token, each name would then follow from the one before it in a single step.

    At level "byte" a sample is the document marker and `length` bytes, an assignment " VAR ABCDE = 12345." or
    " VAR FGHIJ = ABCDE.", a question " Again: VAR FGHIJ = 12345.", the noise small letters and spaces. At level "token"
    it is length + 1 ids, an assignment [0, name, value or name], a question [1, name, value]; of the ids from 2 on, a
    quarter is noise, the next half names, the rest values, below `vocabulary_size`.

    Scored: the value in each question (5 digits, or one token). Distance: to the value in the chain's first
    assignment, the only place that states it, which lies before all the others of its chain. The assignments keep
    `gap` tokens of noise between them and the questions. Chance: 1/10, or 1 / the number of values.

    Beyond a window, at length 1,024: 100.0% of 64, 99.9% of 256, 94.6% of 512.

    Raises:
      ValueError: counts below 1, more questions than chains, too few ids for the names, or chains that do not fit.
    """
    require_counts("variables", n=n, num_chains=num_chains, hops=hops, num_queries=num_queries)
    if num_queries > num_chains:
        raise ValueError(
            f"variables: num_queries must be at most num_chains; got num_queries={num_queries}, num_chains={num_chains}"
        )
    num_statements, each = num_chains * (hops + 1), hops + 1
    source = bits("variables", seed)
    if level == "byte":
        before, between, ask, after = (list(part) for part in (b" VAR ", b" = ", b" Again: VAR ", b"."))
        names, values, width, lead, num_ids = (_CAPITALS, 5), (_DIGITS, 5), 5, 1, BYTE_VOCABULARY
    else:
        before, between, ask, after = [0], [], [1], []
        noise, middle = 2 + (vocabulary_size - 2) // 4, 2 + (vocabulary_size - 2) * 3 // 4
        if middle - noise < num_statements or vocabulary_size - middle < 2 or noise < 3:
            raise ValueError(
                f"variables: vocabulary_size must hold a name for each of {num_statements} assignments in half of its "
                f"ids; got vocabulary_size={vocabulary_size}; give {2 * num_statements + 8}, or fewer chains or hops"
            )
        names, values = (np.arange(noise, middle)[:, None], 1), (np.arange(middle, vocabulary_size)[:, None], 1)
        width, lead, num_ids = 1, 0, vocabulary_size
    size = len(before) + width + len(between) + width + len(after)
    question = size + len(ask) - len(before)
    body = length + 1 - lead - num_queries * question
    _require_room("variables", body, gap, num_statements, size, length)

    name = spell(distinct(source, n, num_statements, len(names[0]) ** names[1]), *names)
    name = name.reshape(n, num_chains, each, width)
    value = spell(below(source, (n, num_chains), len(values[0]) ** values[1]), *values)
    sources = np.concatenate([value[:, :, None], name[:, :, :-1]], axis=2)
    places = _free_places(source, n, num_statements, size, body - gap)
    starts = lead + np.sort(places.reshape(n, num_chains, each), axis=-1)

    sequence = np.full((n, length + 1), DOCUMENT)
    if level == "byte":
        sequence[:, lead : lead + body] = _noise(source, n, body)
    else:
        sequence[:, :body] = 2 + below(source, (n, body), noise - 2)
    sentences = join((n, num_chains, each), before, name, between, sources, after)
    _overwrite(sequence, starts.reshape(n, -1), sentences.reshape(n, num_statements, size))
    asked = name[:, :num_queries, -1]
    questions = join((n, num_queries), ask, asked, between, value[:, :num_queries], after)
    sequence[:, lead + body :] = questions.reshape(n, -1)

    to_value = len(before) + width + len(between)
    evidence = starts[:, :num_queries, 0, None] + to_value + np.arange(width)
    first = lead + body + question * np.arange(num_queries) + to_value + len(ask) - len(before)
    answers = first[:, None] + np.arange(width)
    return _finish(sequence, answers, evidence, 1 / len(values[0]), width, num_ids)


@checked
def common_words(
    seed: int,
    n: int,
    length: int,
    *,
    level: Level = "byte",
    num_common: int = 3,
    common: int = 10,
    rare: int = 2,
    vocabulary_size: int = 256,
) -> RecallBatch:
    """Common words extraction: a list of words in random order, then those that it holds more often than the others.

    `num_common` words stand in the list `common` times each, all others `rare` times (one of them fewer, where the
    list's end demands it), and as many others as the length has room for. The answer lists the common words in the
    order in which they were first mentioned; RULER takes any order, which cannot be scored token by token.

    At level "byte" a sample is the document marker and `length` bytes: spaces, the list, each word three syllables
    after a space (" kodemi"), ". Common:" and the answer's words. At level "token" it is length + 1 ids: the list, the
    question mark 0, the answer; words are the ids from 1 to vocabulary_size - 1.

    Scored: the answer's words, every letter of them at level "byte", where the last letters of a word are easier than
    its first: `RecallScore.exact` counts whole words. Distance: to the nearest place from which counting mentions shows
    that the word is common and comes next, the answer's words before it being given: from there on the list mentions
    it `rare + 1` times and holds all mentions of the common words that the answer has still to name. It is a word's
    distance for all its letters. Chance: 1 / the number of words, or 13/105 for a letter.

    Beyond a window, at length 1,024: 99.9% of 64, 84.1% of 256, 67.7% of 512.

    Raises:
      ValueError: counts below 1, common <= rare, common words that do not fit, or too few ids for the others.
    """
    require_counts("common_words", n=n, num_common=num_common, common=common, rare=rare)
    if common <= rare:
        raise ValueError(f"common_words: common must be above rare; got common={common}, rare={rare}")
    mentions = _room_for_words("common_words", level, length, num_common, num_common * common, b". Common:")
    num_rare = -(-(mentions - num_common * common) // rare)
    counts = np.repeat([common, rare], [num_common, num_rare])
    counts[-1] -= counts.sum() - mentions
    ids, listed, mentioned = _shuffle_words("common_words", seed, n, level, counts, vocabulary_size)
    mentioned = np.stack(mentioned[:num_common], axis=1)
    answer = np.argsort(mentioned[:, :, 0], axis=1)
    mentioned = np.take_along_axis(mentioned, answer[:, :, None], axis=1)
    seen = mentioned[:, :, -(rare + 1)]
    seen[:, :-1] = np.minimum(seen[:, :-1], mentioned[:, 1:, 0])
    return _write_words(ids, listed, answer, seen, length, level, vocabulary_size, b". Common:")


@checked
def frequent_words(
    seed: int, n: int, length: int, *, level: Level = "byte", num_frequent: int = 3, vocabulary_size: int = 256
) -> RecallBatch:
    """Frequent words extraction: a list whose words' counts fall as 1 / rank**2; then the most frequent, in order.

    Of m words the one of rank k = 1, 2, ... stands in the list max(1, floor(3 m / 5 k**2)) times, in random order, with
    as many ranks as the list has room for. The answer lists the `num_frequent` most frequent words, the most frequent
    first. How a sample is written and which positions are scored is as in `common_words`, with ". Frequent:" for the
    question.

    Distance: let c be the count of rank k + 1. Read backwards from the question, the list shows the word of rank k
    c + 1 times at the nearest place from which it is certain that it is more frequent than all words that follow it:
    distance goes to that mention. Chance: 1 / the number of words, or 13/105 for a letter.

    Beyond a window, at length 1,024: 100.0% of 64, 85.8% of 256, 36.7% of 512.

    Raises:
      ValueError: counts below 1, a list in which the counts of the first num_frequent + 1 ranks do not all differ, or
        too few ids for its words.
    """
    require_counts("frequent_words", n=n, num_frequent=num_frequent)
    mentions = _room_for_words("frequent_words", level, length, num_frequent, num_frequent + 1, b". Frequent:")
    ranks = np.arange(1, mentions + 1)
    counts = np.maximum(1, 3 * mentions // (5 * ranks**2))
    counts = counts[np.cumsum(counts) <= mentions]
    counts = np.append(counts, np.ones(mentions - counts.sum(), np.int64))
    top = counts[: num_frequent + 1]
    if len(top) <= num_frequent or (np.diff(top) >= 0).any():
        raise ValueError(
            f"frequent_words: the counts of the first num_frequent + 1 ranks must differ; got {top.tolist()} for "
            f"num_frequent={num_frequent} in a list of {mentions} words; give more length or a smaller num_frequent"
        )
    ids, listed, mentioned = _shuffle_words("frequent_words", seed, n, level, counts, vocabulary_size)
    answer = np.tile(np.arange(num_frequent), (n, 1))
    seen = np.stack([mentioned[rank][:, -(counts[rank + 1] + 1)] for rank in range(num_frequent)], axis=1)
    return _write_words(ids, listed, answer, seen, length, level, vocabulary_size, b". Frequent:")


def _word_pieces(level: Level, vocabulary_size: int) -> tuple[np.ndarray, int]:
    """What words are spelled with, and how many pieces a word has."""
    return (_SYLLABLES, 3) if level == "byte" else (np.arange(1, vocabulary_size)[:, None], 1)


def _shuffle_words(
    op: str, seed: int, n: int, level: Level, counts: np.ndarray, vocabulary_size: int
) -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
    """Lists of words with these counts in random order.

    Returns:
      The words' numbers [n, words], which word stands at each place [n, places], and each word's places [n, count],
      ascending.
    """
    pieces, digits = _word_pieces(level, vocabulary_size)
    if len(pieces) ** digits < len(counts):
        raise ValueError(
            f"{op}: vocabulary_size must give each of the list's {len(counts)} words an id, and one to the question; "
            f"got vocabulary_size={vocabulary_size}; give {len(counts) + 1} ids, less length, or level='byte'"
        )
    source = bits(op, seed)
    ids = distinct(source, n, len(counts), len(pieces) ** digits)
    places = shuffled(source, n, int(counts.sum()))
    listed = np.empty_like(places)
    np.put_along_axis(listed, places, np.repeat(np.arange(len(counts)), counts)[None], axis=1)
    by_word = np.split(places, np.cumsum(counts)[:-1], axis=1)
    return ids, listed, [np.sort(mentions, axis=1) for mentions in by_word]


def _write_words(
    ids: np.ndarray,
    listed: np.ndarray,
    answer: np.ndarray,
    seen: np.ndarray,
    length: int,
    level: Level,
    vocabulary_size: int,
    ask: bytes,
) -> RecallBatch:
    """The list, the question and the answer; `seen` [n, answers] is the place in the list that fixes each answer."""
    pieces, digits = _word_pieces(level, vocabulary_size)
    words, rows, width = spell(ids, pieces, digits), np.arange(len(ids))[:, None], digits * pieces.shape[1]
    if level == "byte":
        start, space, question, chance, num_ids = [DOCUMENT], b" ", ask, _WORD_CHANCE, BYTE_VOCABULARY
    else:
        start, space, question, chance, num_ids = [], b"", [0], 1 / (vocabulary_size - 1), vocabulary_size
    text, answers = (
        join(places.shape, space, words[rows, places]).reshape(len(ids), -1) for places in (listed, answer)
    )
    padding = length + 1 - len(start) - text.shape[1] - len(question) - answers.shape[1]
    parts = (start, b" " * padding, text, question, answers)
    sequence = join((len(ids),), *(part for part in parts if len(part)))
    unit = len(space) + width
    evidence = (len(start) + padding + unit * seen + len(space))[..., None] + np.arange(width)
    first = length + 1 - answers.shape[1] + unit * np.arange(answer.shape[1]) + len(space)
    return _finish(sequence, first[:, None] + np.arange(width), evidence, chance, width, num_ids)


def _room_for_words(op: str, level: Level, length: int, num_answers: int, least: int, ask: bytes) -> int:
    """How many words a list has room for, at least `least`."""
    unit, around = (7, len(ask)) if level == "byte" else (1, 0)
    mentions = (length - around) // unit - num_answers
    if mentions < least:
        raise ValueError(
            f"{op}: the list must hold at least {least} words; got room for {mentions} in length={length} at "
            f"level={level!r}; give a length of {(least + num_answers) * unit + around}, or ask for less"
        )
    return mentions


def _require_room(op: str, body: int, gap: int, num_sentences: int, size: int, length: int) -> None:
    if gap < 0 or body - gap < num_sentences * size:
        raise ValueError(
            f"{op}: {num_sentences} sentences of {size} tokens, gap >= 0 and the questions must fit in length; got "
            f"length={length}, gap={gap}; give more length, a smaller gap, or fewer sentences and questions"
        )


def _noise(source: np.random.Philox, n: int, size: int) -> np.ndarray:
    return _NOISE[below(source, (n, size), len(_NOISE)), 0]


def _stretches(source: np.random.Philox, n: int, size: int, text: bytes | None) -> np.ndarray:
    """Random stretches of `size` bytes of a text."""
    if text is None or len(text) < size or b" The code of " in text:
        got = "none" if text is None else f"{len(text)} bytes" if len(text) < size else "a text with ' The code of '"
        raise ValueError(
            f"needle: haystack='corpus' needs a text of at least {size} bytes without ' The code of '; got {got}; "
            "pass text=, or another haystack"
        )
    starts = below(source, (n, 1), len(text) - size + 1)
    return np.frombuffer(text, np.uint8)[starts + np.arange(size)].astype(np.int64)


def _free_places(source: np.random.Philox, n: int, count: int, size: int, room: int) -> np.ndarray:
    """Starts of `count` sentences that do not overlap, anywhere in the first `room` tokens, in random order."""
    offsets = np.sort(below(source, (n, count), room - count * size + 1), axis=1) + size * np.arange(count)
    return np.take_along_axis(offsets, shuffled(source, n, count), axis=1)


def _overwrite(sequence: np.ndarray, starts: np.ndarray, sentences: np.ndarray) -> None:
    """Lay sentences [n, count, size] over a sequence at their starts [n, count]."""
    n, _, size = sentences.shape
    places = (starts[:, :, None] + np.arange(size)).reshape(n, -1)
    np.put_along_axis(sequence, places, sentences.reshape(n, -1), axis=1)


def _finish(
    sequence: np.ndarray, answers: np.ndarray, evidence: np.ndarray, chance: float, answer_size: int, num_ids: int
) -> RecallBatch:
    """The batch whose answers stand at `answers` [*shape], each fixed by the token at `evidence` [n, *shape]."""
    distance = np.zeros((len(sequence), sequence.shape[1] - 1), np.int32)
    predicting = answers.reshape(-1) - 1
    distance[:, predicting] = predicting - evidence.reshape(len(sequence), -1)
    return as_batch(sequence.astype(np.int32), distance, chance, answer_size, num_ids)
