"""The tokenizer that a checkpoint came with."""

import json
import re
from typing import Any, final

import numpy as np
from jaxtyping import Int32, Integer, UInt16, UInt32

from pallas.checked import checked
from rattn_eqx.data.files import parse_json, write_text

Tokens = UInt16[np.ndarray, "tokens"] | UInt32[np.ndarray, "tokens"]  # the second for more than 65,536 of them
MOST_TOKENS = 2**22
# The bytes that GPT-2 shows as themselves; the others it shows as the characters from 256 on, in order.
_SHOWN = [*range(33, 127), *range(161, 173), *range(174, 256)]
_BYTES = {chr(byte): byte for byte in _SHOWN}
_BYTES |= {chr(256 + i): byte for i, byte in enumerate(sorted({*range(256)} - {*_SHOWN}))}


@final
class PretrainedTokenizer:
    """The tokenizer of a checkpoint, as its tokenizer.json says, through the `tokenizers` library.

    Text must be UTF-8. Special tokens such as "<|im_end|>" are read only where `special` asks for them, for a prompt
    that a chat template wrote: in any other text they are characters like all. (Hugging Face reads them everywhere.)
    Added tokens that are not special, such as "<think>", are read as there.

    Args:
      definition: the text of tokenizer.json.
      document: a special token, which begins every document.
      padding: another, which no text has.
      ends: tokens that end what a model writes, such as the end of a turn.
      vocabulary_size: the model's, which may have more rows than there are tokens.
      chat_template: in Jinja, for `rattn_eqx.inference.chat`.

    Raises:
      ValueError: another text, a kind of tokenizer that is not in bytes, tokens outside the vocabulary, or a document
        marker or padding that is not special.
      ImportError: the `tokenizers` library is missing.
    """

    def __init__(
        self,
        definition: str,
        *,
        document: int,
        padding: int,
        ends: tuple[int, ...] = (),
        vocabulary_size: int,
        chat_template: str | None = None,
    ):
        self._definition = definition
        self._plain, self._special = (read_definition("PretrainedTokenizer", definition, "weights") for _ in range(2))
        self._plain.encode_special_tokens = True  # as characters
        for tokenizer in (self._plain, self._special):
            tokenizer.no_truncation()
            tokenizer.no_padding()
        added = self._plain.get_added_tokens_decoder()
        self.specials = {token: entry.content for token, entry in added.items() if entry.special}
        self.document, self.padding, self.ends = document, padding, tuple(ends)
        self.vocabulary_size, self.chat_template = vocabulary_size, chat_template
        pieces = {token: piece for piece, token in self._plain.get_vocab(with_added_tokens=True).items()}
        if not max(pieces, default=0) < vocabulary_size <= MOST_TOKENS:
            raise ValueError(
                f"PretrainedTokenizer: vocabulary_size must have room for tokens up to {max(pieces, default=0)} and be "
                f"at most {MOST_TOKENS:,}; got {vocabulary_size}"
            )
        if not {document, padding} <= self.specials.keys() or document == padding:
            raise ValueError(
                "PretrainedTokenizer: document and padding must be two special tokens of the tokenizer; got "
                f"{document} and {padding}"
            )
        if not all(0 <= token < vocabulary_size for token in self.ends):
            raise ValueError(f"PretrainedTokenizer: ends must be tokens below {vocabulary_size}; got {self.ends}")
        as_bytes = _decoder_of(definition)
        self._pieces = [b""] * vocabulary_size
        for token, piece in pieces.items():
            if token not in self.specials:
                self._pieces[token] = added[token].content.encode() if token in added else as_bytes(piece)
        self._byte_lengths = np.array([*map(len, self._pieces)], np.int32)

    @property
    @checked
    def byte_lengths(self) -> Int32[np.ndarray, "vocabulary"]:
        """The number of bytes that each token stands for; 0 for special tokens, and ids without a token."""
        return self._byte_lengths

    @checked
    def encode(self, text: bytes, *, special: bool = False) -> Tokens:
        """Return the tokens of UTF-8 text; no marker is put before them.

        Args:
          special: read special tokens in the text.

        Raises:
          ValueError: other bytes.
        """
        try:
            characters = text.decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(
                f"encode: the text must be UTF-8; {error}; give other text, or a byte tokenizer"
            ) from error
        tokenizer = self._special if special else self._plain
        [encoding] = tokenizer.encode_batch_fast([characters], add_special_tokens=False)
        return np.array(encoding.ids, np.uint16 if self.vocabulary_size <= 2**16 else np.uint32)

    @checked
    def decode(self, tokens: Integer[np.ndarray, "tokens"]) -> bytes:
        """Return the bytes that the tokens stand for; special tokens stand for none.

        The text may differ from what was encoded where the tokenizer normalises it, or puts a space before it.

        Raises:
          ValueError: a token outside the vocabulary.
        """
        require_in_vocabulary(tokens, self.vocabulary_size)
        return b"".join(self._pieces[token] for token in tokens.tolist())

    def to_json(self) -> str:
        """Return the tokenizer as JSON text."""
        names = ("document", "padding", "ends", "vocabulary_size", "chat_template")
        about = {name: getattr(self, name) for name in names}
        return json.dumps({"kind": "pretrained", **about, "tokenizers": json.loads(self._definition)})

    def save(self, path: Any) -> None:
        """Write the tokenizer as JSON, for `load_tokenizer`."""
        write_text(path, self.to_json())


def from_json(content: dict[str, Any]) -> PretrainedTokenizer:
    """The tokenizer of what `to_json` wrote; a ValueError for other content."""
    match content:
        case {
            "kind": "pretrained",
            "document": int(document),
            "padding": int(padding),
            "ends": list(ends),
            "vocabulary_size": int(vocabulary_size),
            "chat_template": str() | None as chat_template,
            "tokenizers": dict(definition),
        } if all(isinstance(token, int) for token in ends):
            return PretrainedTokenizer(
                json.dumps(definition),
                document=document,
                padding=padding,
                ends=tuple(ends),
                vocabulary_size=vocabulary_size,
                chat_template=chat_template,
            )
    raise ValueError("a pretrained tokenizer must have document, padding, ends, vocabulary_size, chat_template")


def _decoder_of(definition: str) -> Any:
    """From a piece to its bytes, for the two kinds of tokenizer that stand for all text."""
    kinds: list[str | None] = []
    match parse_json(definition, "tokenizer.json").get("decoder"):
        case {"type": "Sequence", "decoders": list(steps)}:
            kinds = [step.get("type") for step in steps]
        case {"type": str(kind)}:
            kinds = [kind]

    def of_byte_level(piece: str) -> bytes:
        try:
            return bytes(_BYTES[character] for character in piece)
        except KeyError as error:
            raise ValueError(f"PretrainedTokenizer: pieces must be of GPT-2's bytes; got {piece!r:.80}") from error

    def of_characters(piece: str) -> bytes:
        if match := re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", piece):
            return bytes.fromhex(match[1])
        return piece.replace("\u2581", " ").encode()

    if "ByteLevel" in kinds:
        return of_byte_level
    if "ByteFallback" in kinds:
        return of_characters
    raise ValueError(f"PretrainedTokenizer: the decoder must be ByteLevel or have ByteFallback; got {kinds!r:.80}")


def read_definition(what: str, definition: str, extra: str) -> Any:
    """The library's tokenizer.

    Raises:
      ValueError: another text. ImportError: the library is missing; `extra` of ours brings it.
    """
    library = import_tokenizers(what, extra)
    try:
        return library.Tokenizer.from_str(definition)
    except BaseException as error:  # the library raises no narrower class; a panic of its own is no Exception
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        raise ValueError(f"{what}: not a definition of the tokenizers library: {str(error)!r:.120}") from error


def import_tokenizers(what: str, extra: str) -> Any:
    try:
        import tokenizers
    except ImportError as error:
        raise ImportError(f"{what} needs the tokenizers library: pip install 'rattn-eqx[{extra}]'") from error
    return tokenizers


def require_in_vocabulary(tokens: Integer[np.ndarray, "tokens"], vocabulary_size: int) -> None:
    if tokens.size and not 0 <= tokens.min() <= tokens.max() < vocabulary_size:
        raise ValueError(
            f"decode: tokens must lie between 0 and {vocabulary_size - 1}; got {tokens.min()} to {tokens.max()}"
        )
