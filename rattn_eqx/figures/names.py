"""Names of runs, trials and maps in a figure: drawn as they are, no `$` as mathematics, no leading `_` as hidden."""

from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

BLUE, ORANGE, BLACK = "#0072B2", "#E69F00", "#222222"  # a window, RATTENTION or its residual branch, full attention
GREEN, PURPLE, GREY, RED = "#009E73", "#CC79A7", "#BBBBBB", "#A50F15"  # none of these; a limit or a fault
PLAIN: dict[str, Any] = {"parse_math": False, "usetex": False}  # of a matplotlib text that holds a name
SEEN = "\u200b"  # matplotlib leaves labels that begin with "_" out of a legend


def shown(name: str) -> str:
    """The name, with escapes for what no font draws: control characters, newlines, what was no UTF-8 in a file's name.

    >>> shown("a$b"), shown("two\\nlines")
    ('a$b', 'two\\\\nlines')
    """
    return "".join(x if x.isprintable() else x.encode("unicode_escape").decode("ascii") for x in name)


def label(name: str) -> str:
    """The label of an artist, for `legend`."""
    return SEEN + shown(name)


def legend(place: Axes | Figure, **options: Any) -> None:
    """Draw the legend of labels of `label` and others."""
    for text in place.legend(**options).get_texts():
        text.set(text=text.get_text().removeprefix(SEEN), **PLAIN)
