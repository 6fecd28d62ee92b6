"""The text of files that are more than text: compressed ones, web pages, and JSON with sentences in it."""

import contextlib
import gzip
import html.parser
import json
import re
import zlib
from typing import IO, Any

UNREADABLE = (EOFError, zlib.error)  # besides OSError: what a damaged .gz raises while it is read
_SENTENCE = re.compile(r"(\S+\s+){7}\S")  # eight words at least
_UNSEEN = {"script", "style", "title", "nav", "svg", "template"}
_INLINE = {"a", "abbr", "b", "bdi", "cite", "code", "dfn", "em", "font", "i", "kbd", "mark", "q", "s", "samp", "small"}
_INLINE |= {"span", "strong", "sub", "sup", "tt", "u", "var", "wbr", "img"}
_VOID = {"area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "source", "track", "wbr"}
_TAG = re.compile(r"</?[a-zA-Z][^<>]*>")


def unpacked(name: str, file: IO[bytes]) -> tuple[str, IO[bytes] | gzip.GzipFile]:
    """A file's name and content as they were before gzip, if that packed it."""
    return (name.removesuffix(".gz"), gzip.open(file)) if name.endswith(".gz") else (name, file)


def text_of(name: str, data: bytes, *, sentences: bool = False) -> bytes:
    """A file's text, by the end of its name: of a web page without its tags, of all others as it is.

    Args:
      sentences: of JSON, only the strings of eight words or more.

    Raises:
      UnicodeDecodeError: what is not UTF-8.
    """
    text = data.decode("utf-8")
    if name.endswith((".html", ".htm", ".xhtml")):
        return page_text(text).encode()
    if sentences and name.endswith(".json"):
        return json_sentences(text).encode("utf-8", "replace")  # JSON may name halves of characters
    return data


def page_text(page: str) -> str:
    """The words of a web page, if it has any: a line for each block, lines of code as they are."""
    reader = _Page()
    reader.feed(page)
    reader.close()
    lines = (line.rstrip() for line in "".join(reader.pieces).split("\n"))
    words = re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()
    return words and words + "\n"


class _Page(html.parser.HTMLParser):
    def __init__(self):
        super().__init__(convert_charrefs=True)
        self.pieces: list[str] = []
        self.unseen, self.code = 0, 0

    def handle_starttag(self, tag: str, attrs: Any):
        self.unseen += tag in _UNSEEN
        self.code += tag == "pre"
        if tag not in _INLINE:
            self._break(2 if tag in ("p", "pre", "ul", "ol", "table") or re.fullmatch("h[1-6]", tag) else 1)

    def handle_endtag(self, tag: str):
        self.unseen = max(0, self.unseen - (tag in _UNSEEN))
        self.code = max(0, self.code - (tag == "pre"))
        if tag not in _INLINE and tag not in _VOID:
            self._break(1)

    def handle_data(self, data: str):
        if self.unseen:
            return
        if not self.code:
            data = re.sub(r"\s+", " ", data)
            if not self.pieces or self.pieces[-1].endswith(("\n", " ")):
                data = data.lstrip()
        if data:
            self.pieces.append(data)

    def _break(self, count: int):
        if self.pieces and not self.unseen:
            ended = len(self.pieces[-1]) - len(self.pieces[-1].rstrip("\n"))
            self.pieces += ["\n" * (count - ended)] if ended < count else []


def json_sentences(data: str) -> str:
    """The strings of eight words or more in a JSON text, each once, in order, without tags; none of other text."""
    found: dict[str, None] = {}

    def visit(value: Any) -> None:
        if isinstance(value, str) and _SENTENCE.search(value):
            found[page_text(value) if _TAG.search(value) else value.strip() + "\n"] = None
        for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
            visit(item)

    with contextlib.suppress(ValueError, RecursionError):  # lists in lists by the thousand
        visit(json.loads(data))
    return "\n".join(found)
