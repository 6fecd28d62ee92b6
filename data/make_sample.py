"""Write data/sample: forty short Python-like files of our own, in which names and numbers from far above come back.

    python data/make_sample.py

The text is random but always the same: it depends on `random.random` alone, which Python keeps reproducible for a
seed. Every file stands for itself and runs: it defines constants, functions and classes under invented names, and
ends with checks that call the functions and repeat the constants' values, thousands of bytes after their definition.
"""

import random
from collections.abc import Sequence
from pathlib import Path

NUM_FILES = 40
PLACES = ["harbour", "orchard", "foundry", "library", "bakery", "quarry", "market", "garden", "station", "mill"]
NOUNS = ["crate", "barrel", "ledger", "basket", "wagon", "bushel", "parcel", "kettle", "ladder", "lantern", "ribbon"]
VERBS = ["weigh", "sort", "count", "store", "mend", "carry", "paint", "share", "rinse", "stack", "trade", "grind"]
MEASURES = ["weight", "height", "price", "portion", "depth", "length", "width", "charge"]
REASONS = (
    "because the {place} opens before the rain",
    "so that nobody has to {verb} it twice",
    "as the keeper of the {place} asked for",
    "unless the {noun} was promised to a neighbour",
    "which the old {noun} never allowed",
    "and leaves the rest for the next {noun}",
)
ONSETS = ["b", "d", "f", "g", "h", "k", "l", "m", "n", "p", "r", "s", "t", "v", "z", "br", "gl", "kr", "pl", "st"]
VOWELS = ["a", "e", "i", "o", "u", "ai", "ou"]
ENDINGS = ["l", "m", "n", "r", "s", "x", "nd", "rt", "sk"]


class Writer:
    """Makes one file: the words it draws, and the names that the file has defined so far."""

    def __init__(self, number: int):
        self._random = random.Random(number).random
        self.place = PLACES[number % len(PLACES)]
        self.invented: set[str] = set()
        self.constants: dict[str, int] = {}
        self.functions: dict[str, tuple[str, str]] = {}
        self.lines: list[str] = []

    def number(self, low: int, high: int) -> int:
        return low + int(self._random() * (high - low))

    def pick(self, choices: Sequence[str]) -> str:
        return choices[self.number(0, len(choices))]

    def invent(self) -> str:
        """Return a word that this file has not used."""
        while True:
            word = "".join(self.pick(ONSETS) + self.pick(VOWELS) for _ in range(self.number(2, 4)))
            word += self.pick(ENDINGS)
            if word not in self.invented:
                self.invented.add(word)
                return word

    def reason(self) -> str:
        return self.pick(REASONS).format(place=self.place, noun=self.pick(NOUNS), verb=self.pick(VERBS))

    def write(self, *lines: str) -> None:
        self.lines.extend(lines)

    def constant(self) -> None:
        name = f"{self.pick(MEASURES)}_of_{self.invent()}".upper()
        self.constants[name] = self.number(100, 10_000)
        self.write(f"{name} = {self.constants[name]}  # {self.reason()}")

    def call(self, name: str, first: str, second: str) -> str:
        arguments = self.functions[name]
        return f"{name}({arguments[0]}={first}, {arguments[1]}={second})"

    def function(self) -> None:
        noun, other = self.pick(NOUNS), self.pick(MEASURES)
        name = f"{self.pick(VERBS)}_{noun}_{self.invent()}"
        limit = self.pick(list(self.constants))
        self.write("", "", f"def {name}({noun}, {other}):")
        self.write(f'    """Return the {other} of one {noun}, at most {limit.lower()}, {self.reason()}."""')
        if self.functions and self._random() < 0.7:
            earlier = self.pick(list(self.functions))
            self.write(f"    {other} = {self.call(earlier, noun, other)}")
        if self._random() < 0.5:
            self.write(f"    if {noun} > {limit}:", f"        return {limit} - {other} % {self.number(2, 60)}")
        else:
            self.write(f"    for step in range({self.number(2, 9)}):", f"        {other} += step * {noun}")
        self.write(f"    return min({noun} + {other}, {limit})")
        self.functions[name] = (noun, other)

    def record(self) -> tuple[str, str]:
        """Write a class, and return its name and its method's."""
        first, second = self.invent(), self.invent()
        name = self.pick(NOUNS).capitalize() + first.capitalize()
        method = f"{self.pick(VERBS)}_{second}"
        earlier, limit = self.pick(list(self.functions)), self.pick(list(self.constants))
        self.write("", "", f"class {name}:", f'    """One {self.place} entry, {self.reason()}."""', "")
        self.write(f"    def __init__(self, {first}, {second}={limit}):")
        self.write(f"        self.{first} = {first}", f"        self.{second} = {second}", "")
        self.write(f"    def {method}(self):", f'        """Pass {first} and {second} on, {self.reason()}."""')
        self.write(f"        return {self.call(earlier, f'self.{first}', f'self.{second}')}")
        return name, method

    def checks(self, records: list[tuple[str, str]]) -> None:
        self.write("", "", "def check():", f'    """Repeat what the {self.place} agreed on above."""')
        for name, value in self.constants.items():
            self.write(f"    assert {name} == {value}")
        highest = max(self.constants.values())
        for name in self.functions:
            arguments = str(self.number(1, 99)), self.pick(list(self.constants))
            self.write(f"    assert {self.call(name, *arguments)} <= {highest}")
        for name, method in records:
            self.write(f"    assert {name}({self.number(1, 99)}).{method}() <= {highest}")


def sample_files() -> dict[str, str]:
    """Return the sample's files by name."""
    files = {}
    for number in range(NUM_FILES):
        writer = Writer(number)
        records = []
        writer.write(f'"""Chapter {number} of the rules of the {writer.place}, {writer.reason()}."""', "")
        for _ in range(6):
            writer.constant()
        for part in range(14):
            writer.function()
            if part % 4 == 3:
                records.append(writer.record())
        writer.checks(records)
        files[f"{writer.place}_{number:02d}.txt"] = "\n".join(writer.lines) + "\n"
    return files


if __name__ == "__main__":
    folder = Path(__file__).parent / "sample"
    folder.mkdir(exist_ok=True)
    for name, text in sample_files().items():
        (folder / name).write_bytes(text.encode("ascii"))
