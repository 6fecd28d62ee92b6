"""From text to tokens: bytes or byte pairs, and the token files that batches are read from."""

import dataclasses
import functools
import hashlib
import json
from pathlib import Path
from typing import Any, final

import numpy as np
from jaxtyping import Int32, Integer, UInt16

from pallas.checked import checked
from rattn_eqx.data.corpus import Corpus
from rattn_eqx.data.files import new_folder, write_text

BYTE_VOCABULARY = 258
DOCUMENT = 256  # stands before every document: it begins the sequence and separates documents
PADDING = 257  # every tokenizer's padding follows its document marker


@final
@dataclasses.dataclass(frozen=True)
class ByteTokenizer:
    """One token per byte, and the two special tokens `DOCUMENT` and `PADDING`."""

    vocabulary_size: int = dataclasses.field(default=BYTE_VOCABULARY, init=False)
    document: int = dataclasses.field(default=DOCUMENT, init=False)
    padding: int = dataclasses.field(default=PADDING, init=False)

    @property
    @checked
    def byte_lengths(self) -> Int32[np.ndarray, "vocabulary"]:
        """The number of bytes that each token stands for; 0 for the special tokens."""
        return np.repeat(np.array([1, 0], np.int32), [DOCUMENT, 2])

    @checked
    def encode(self, text: bytes) -> UInt16[np.ndarray, "tokens"]:
        """Return the tokens of any bytes."""
        return np.frombuffer(text, np.uint8).astype(np.uint16)

    @checked
    def decode(self, tokens: Integer[np.ndarray, "tokens"]) -> bytes:
        """Return the bytes that the tokens stand for; special tokens stand for none.

        Raises:
          ValueError: a token outside the vocabulary.
        """
        _require_in_vocabulary(tokens, self.vocabulary_size)
        return tokens[tokens < DOCUMENT].astype(np.uint8).tobytes()

    def to_json(self) -> str:
        """Return the tokenizer as JSON text."""
        return json.dumps({"kind": "byte"})

    def save(self, path: Path) -> None:
        """Write the tokenizer as JSON, for `load_tokenizer`."""
        write_text(Path(path), self.to_json())


@final
class BPETokenizer:
    """Byte-pair encoding over bytes, trained on a corpus by the `tokenizers` library.

    Each byte is shown to the library as the character of the same number (Latin-1), so any bytes can be encoded and
    come back unchanged. The specials are the last two tokens: `document`, then `padding`.
    """

    def __init__(self, definition: str):
        """Read the library's own JSON text; use `BPETokenizer.train` or `load_tokenizer`."""
        self._definition = definition
        self._tokenizer = _tokenizers().Tokenizer.from_str(definition)
        num_pieces = self._tokenizer.get_vocab_size()
        self._pieces = [self._tokenizer.id_to_token(token).encode("latin-1") for token in range(num_pieces)]
        self.vocabulary_size = num_pieces + 2
        self.document = num_pieces
        self.padding = num_pieces + 1

    @classmethod
    def train(cls, corpus: Corpus, vocabulary_size: int) -> "BPETokenizer":
        """Learn merges from the training split of a corpus.

        Args:
          corpus: what to learn from.
          vocabulary_size: the most tokens, specials included, 258 to 65536; a small corpus gives fewer.

        Raises:
          ValueError: a vocabulary size out of range.
          ImportError: the `tokenizers` library is missing.
        """
        if not BYTE_VOCABULARY <= vocabulary_size <= 2**16:
            raise ValueError(
                f"BPETokenizer.train: vocabulary_size must lie between {BYTE_VOCABULARY} and {2**16}, so that bytes,"
                f" specials and uint16 suffice; got {vocabulary_size}"
            )
        library = _tokenizers()
        # Merges stay within a word, a number of three digits, a run of marks, a line's end with the indent after it,
        # or a run of spaces. Bytes from 128 on are parts of UTF-8 characters and count as letters.
        words = r" ?[A-Za-z_\x{80}-\x{ff}]+| ?[0-9]{1,3}| ?[^\sA-Za-z_0-9\x{80}-\x{ff}]+|[\r\n]+[ \t]*|[ \t]+"
        tokenizer = library.Tokenizer(library.models.BPE())
        tokenizer.pre_tokenizer = library.pre_tokenizers.Split(library.Regex(words), behavior="isolated")
        trainer = library.trainers.BpeTrainer(
            vocab_size=vocabulary_size - 2,
            initial_alphabet=[chr(byte) for byte in range(256)],
            min_frequency=2,
            show_progress=False,
        )
        tokenizer.train_from_iterator((text.decode("latin-1") for text in corpus.documents("train")), trainer)
        return cls(tokenizer.to_str())

    @functools.cached_property
    @checked
    def byte_lengths(self) -> Int32[np.ndarray, "vocabulary"]:
        """The number of bytes that each token stands for; 0 for the special tokens."""
        return np.array([*map(len, self._pieces), 0, 0], np.int32)

    @checked
    def encode(self, text: bytes) -> UInt16[np.ndarray, "tokens"]:
        """Return the tokens of any bytes."""
        [encoding] = self._tokenizer.encode_batch_fast([text.decode("latin-1")], add_special_tokens=False)
        return np.array(encoding.ids, np.uint16)

    @checked
    def decode(self, tokens: Integer[np.ndarray, "tokens"]) -> bytes:
        """Return the bytes that the tokens stand for; special tokens stand for none.

        Raises:
          ValueError: a token outside the vocabulary.
        """
        _require_in_vocabulary(tokens, self.vocabulary_size)
        return b"".join(self._pieces[token] for token in tokens.tolist() if token < self.document)

    def to_json(self) -> str:
        """Return the tokenizer as JSON text."""
        return json.dumps({"kind": "bpe", "tokenizers": json.loads(self._definition)})

    def save(self, path: Path) -> None:
        """Write the tokenizer as JSON, for `load_tokenizer`."""
        write_text(Path(path), self.to_json())


Tokenizer = ByteTokenizer | BPETokenizer


def load_tokenizer(path: Path) -> Tokenizer:
    """Read a tokenizer that `save` wrote.

    Raises:
      ValueError: a file that holds something else.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"load_tokenizer: {path} is not JSON; give a file that a tokenizer's save wrote") from error
    match content:
        case {"kind": "byte"}:
            return ByteTokenizer()
        case {"kind": "bpe", "tokenizers": definition}:
            return BPETokenizer(json.dumps(definition))
    raise ValueError(f"load_tokenizer: {path} holds no tokenizer; give a file that a tokenizer's save wrote")


def tokenize(corpus: Corpus, tokenizer: Tokenizer, cache: Path) -> tuple[Path, Path]:
    """Write a corpus's two splits as token files, or find those that are already there.

    A token file is a one-dimensional uint16 .npy to be memory-mapped: every document's tokens in order, the document
    marker before each. The tokenizer is saved with them as `tokenizer.json`.

    Returns:
      The paths of the training and of the validation tokens, in `cache/tokens-KEY`; the key stands for the corpus's
      text, its split and the tokenizer.
    """
    key = hashlib.sha256((corpus.manifest["sha256"] + tokenizer.to_json()).encode())
    folder = Path(cache) / f"tokens-{key.hexdigest()[:16]}"
    if not folder.exists():
        marker = np.array([tokenizer.document], np.uint16)
        with new_folder(folder) as unfinished:
            for split in ("train", "validation"):
                parts = [part for text in corpus.documents(split) for part in (marker, tokenizer.encode(text))]
                np.save(unfinished / f"{split}.npy", np.concatenate(parts))
            tokenizer.save(unfinished / "tokenizer.json")
    return folder / "train.npy", folder / "validation.npy"


def _require_in_vocabulary(tokens: Integer[np.ndarray, "tokens"], vocabulary_size: int) -> None:
    if tokens.size and not 0 <= tokens.min() <= tokens.max() < vocabulary_size:
        raise ValueError(
            f"decode: tokens must lie between 0 and {vocabulary_size - 1}; got {tokens.min()} to {tokens.max()}"
        )


def _tokenizers() -> Any:
    try:
        import tokenizers
    except ImportError as error:
        raise ImportError("BPETokenizer needs the tokenizers library: pip install 'rattn-eqx[bpe]'") from error
    return tokenizers
