"""Solves recall tasks by force, from what stands before each scored position, and knows nothing of the generators.

A solver takes one sample's tokens up to a scored position, and gives the next token and the place of its evidence. It
searches token by token, or by regular expression in the text.
"""

import collections
import re
from collections.abc import Callable

Solver = Callable[[list[int]], tuple[int, int]]


def solve_mqar(tokens: list[int]) -> tuple[int, int]:
    key, place = tokens[-1], len(tokens) - 2
    while tokens[place] != key:
        place -= 1
    return tokens[place + 1], place + 1


def solve_bigrams(marker: int) -> Solver:
    def solve(tokens: list[int]) -> tuple[int, int]:
        place = len(tokens) - 2
        while tokens[place] != tokens[-1] or tokens[place + 1] == marker:
            place -= 1
        return tokens[place + 1], place + 1

    return solve


def solve_needle(tokens: list[int]) -> tuple[int, int]:
    text = bytes(tokens[1:])
    key, given = re.findall(rb" Again: the code of (\w+) is ([\d, ]*)$", text)[0]
    values = given.split(b", ")
    number, digit = len(values) - 1, len(values[-1])
    needle = [m for m in re.finditer(rb" The code of (\w+) is (\d{7})\.", text) if m[1] == key][number]
    return needle[2][digit], 1 + needle.start(2) + digit


def solve_variables_in_bytes(tokens: list[int]) -> tuple[int, int]:
    text = bytes(tokens[1:])
    name, given = re.findall(rb" Again: VAR (\w+) = (\d*)$", text)[0]
    while True:
        [assignment] = re.finditer(rb" VAR " + name + rb" = (\w+)\.", text.split(b" Again:")[0])
        name = assignment[1]
        if name.isdigit():
            return name[len(given)], 1 + assignment.start(1) + len(given)


def solve_variables_in_tokens(first_value: int) -> Solver:
    def solve(tokens: list[int]) -> tuple[int, int]:
        name = tokens[-1]
        for place in range(len(tokens) - 3, -1, -1):  # a chain's assignments stand in order
            if tokens[place] == 0 and tokens[place + 1] == name:
                name = tokens[place + 2]
                if name >= first_value:
                    return name, place + 2
        raise AssertionError("no assignment of a value")

    return solve


def words_of_text(tokens: list[int], question: bytes) -> tuple[list, list, list[int], int]:
    """The list's words, the answer's whole words, each listed word's place, and the letters of the word begun."""
    listed, given = bytes(tokens[1:]).split(question)
    mentions = list(re.finditer(rb"\w+", listed))
    *whole, begun = given.split(b" ")[1:]
    return [m[0] for m in mentions], whole, [1 + m.start() for m in mentions], len(begun)


def words_of_tokens(tokens: list[int], question: bytes) -> tuple[list, list, list[int], int]:
    mark = tokens.index(0)
    return tokens[:mark], tokens[mark + 1 :], list(range(mark)), 0


def solve_common_words(words_of: Callable, common: int, rare: int) -> Solver:
    def solve(tokens: list[int]) -> tuple[int, int]:
        words, given, places, letters = words_of(tokens, b". Common:")
        counts = collections.Counter(words)
        remaining = [word for word in dict.fromkeys(words) if counts[word] == common and word not in given]
        seen = collections.Counter()
        for word, place in zip(reversed(words), reversed(places), strict=True):
            seen[word] += 1
            if seen[remaining[0]] > rare and all(seen[later] == common for later in remaining[1:]):
                return _letter(remaining[0], letters), place + letters
        raise AssertionError("never certain")

    return solve


def solve_frequent_words(words_of: Callable) -> Solver:
    def solve(tokens: list[int]) -> tuple[int, int]:
        words, given, places, letters = words_of(tokens, b". Frequent:")
        ranked = [(word, count) for word, count in collections.Counter(words).most_common() if word not in given]
        (word, _), (_, next_count) = ranked[:2]
        left = next_count + 1
        for mention, place in zip(reversed(words), reversed(places), strict=True):
            left -= mention == word
            if not left:
                return _letter(word, letters), place + letters
        raise AssertionError("never certain")

    return solve


def _letter(word: bytes | int, letters: int) -> int:
    return word if isinstance(word, int) else word[letters]
