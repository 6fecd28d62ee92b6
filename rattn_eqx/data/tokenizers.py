"""From text to tokens: bytes, byte pairs or a checkpoint's own, and the token files that batches are read from."""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, final

import numpy as np
from jaxtyping import Int32, Integer, UInt16

from pallas.checked import checked
from rattn_eqx.data.cache import TOKENS, check, digests, find, write_manifest
from rattn_eqx.data.corpus import Corpus
from rattn_eqx.data.files import DamagedError, new_folder, read_json, write_text
from rattn_eqx.data.pretrained_tokenizer import (
    PretrainedTokenizer,
    from_json,
    import_tokenizers,
    read_definition,
    require_in_vocabulary,
)

BYTE_VOCABULARY = 258
DOCUMENT = 256  # stands before every document: it begins the sequence and separates documents
PADDING = 257
_TOGETHER = 64  # documents that are encoded side by side


@final
@dataclasses.dataclass(frozen=True)
class ByteTokenizer:
    """One token per byte, and the two special tokens `DOCUMENT` and `PADDING`."""

    vocabulary_size: int = dataclasses.field(default=BYTE_VOCABULARY, init=False)
    document: int = dataclasses.field(default=DOCUMENT, init=False)
    padding: int = dataclasses.field(default=PADDING, init=False)
    ends: tuple[int, ...] = dataclasses.field(default=(), init=False)

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
        require_in_vocabulary(tokens, self.vocabulary_size)
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
        """Read the library's own JSON text; use `BPETokenizer.train` or `load_tokenizer`.

        Raises:
          ValueError: other text, or pieces that are not of bytes.
          ImportError: the `tokenizers` library is missing.
        """
        self._definition = definition
        self._tokenizer = _read_definition(definition)
        num_pieces = self._tokenizer.get_vocab_size()
        self._pieces = [self._tokenizer.id_to_token(token).encode("latin-1") for token in range(num_pieces)]
        self.vocabulary_size = num_pieces + 2
        self.document = num_pieces
        self.padding = num_pieces + 1
        self.ends: tuple[int, ...] = ()

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
        library = import_tokenizers("BPETokenizer", "bpe")
        tokenizer = _untrained(library)
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
        require_in_vocabulary(tokens, self.vocabulary_size)
        return b"".join(self._pieces[token] for token in tokens.tolist() if token < self.document)

    def to_json(self) -> str:
        """Return the tokenizer as JSON text."""
        return json.dumps({"kind": "bpe", "tokenizers": json.loads(self._definition)})

    def save(self, path: Path) -> None:
        """Write the tokenizer as JSON, for `load_tokenizer`."""
        write_text(Path(path), self.to_json())


Tokenizer = ByteTokenizer | BPETokenizer | PretrainedTokenizer
_KINDS = {ByteTokenizer: "byte", BPETokenizer: "bpe", PretrainedTokenizer: "pretrained"}


def load_tokenizer(path: Path) -> Tokenizer:
    """Read a tokenizer that `save` wrote.

    Raises:
      DamagedError: a file that holds something else; names the key.
      OSError: a file that cannot be read.
    """
    remedy = "give a file that a tokenizer's save wrote"
    try:
        content = read_json(Path(path), 2**25)  # of 65,536 pieces it is some 4 MB, of Llama 3's 128,256 some 10
    except DamagedError as error:
        raise DamagedError(f"load_tokenizer: {error}, or {remedy}") from error
    match content:
        case {"kind": "byte"}:
            return ByteTokenizer()
        case {"kind": "bpe" | "pretrained" as kind, "tokenizers": dict(definition)}:
            try:
                if kind == "pretrained":
                    return from_json(content)
                tokenizer = BPETokenizer(json.dumps(definition))
                _require_as_trained(tokenizer)
                return tokenizer
            except (ValueError, RecursionError) as error:
                raise DamagedError(f"load_tokenizer: {path}, key tokenizers: {error}; {remedy}") from error
    raise DamagedError(
        f"load_tokenizer: {path} must have kind 'byte', or kind 'bpe' or 'pretrained' and tokenizers; got "
        f"{content!r:.80}; {remedy}"
    )


def tokenize(
    corpus: Corpus, tokenizer: Tokenizer, cache: Path, *, report: Callable[[str], object] = print
) -> tuple[Path, Path]:
    """Write a corpus's two splits as token files, or find those that are already there.

    A token file is a one-dimensional .npy to be memory-mapped, of uint16, or of uint32 where the vocabulary has more
    than 65,536 tokens: every document's tokens in order, the document marker before each. The tokenizer is saved with
    them as `tokenizer.json`.

    Files that are found are held against their digests, some seconds for each GB; damaged ones are reported, removed
    and made again.

    Args:
      report: is given a line about damaged files.

    Returns:
      The paths of the training and of the validation tokens, in `cache/tokens-KEY`; the key stands for the corpus's
      text, its split and the tokenizer.

    Raises:
      DamagedError: the corpus is not what was written.
      OSError: the cache cannot be read or written.
    """
    key = hashlib.sha256((corpus.manifest["sha256"] + tokenizer.to_json()).encode())
    folder = Path(cache) / f"tokens-{key.hexdigest()[:16]}"
    if find(folder, TOKENS, report) is None:
        with new_folder(folder) as unfinished:
            for split in ("train", "validation"):
                _write_tokens(unfinished / f"{split}.npy", corpus.documents(split), tokenizer)
            tokenizer.save(unfinished / "tokenizer.json")
            about = f"{_KINDS[type(tokenizer)]} {tokenizer.vocabulary_size:,}"
            content = {"corpus": corpus.manifest["sha256"], "tokenizer": about, "digests": digests(unfinished, TOKENS)}
            write_manifest(unfinished, folder.name, content)
        check(folder, TOKENS)  # another process's, where that was quicker
    return folder / "train.npy", folder / "validation.npy"


def _write_tokens(path: Path, documents: list[bytes], tokenizer: Tokenizer) -> None:
    """Write one token file, a few documents' tokens in memory at a time, which threads make."""
    dtype = tokenizer.encode(b"").dtype
    header: dict[str, Any] = {"descr": dtype.str, "fortran_order": False, "shape": (0,)}
    with open(path, "xb") as file, ThreadPoolExecutor() as pool:
        np.lib.format.write_array_header_1_0(file, header)
        start = file.tell()
        for at in range(0, len(documents), _TOGETHER):
            for tokens in pool.map(tokenizer.encode, documents[at : at + _TOGETHER]):
                file.write(np.insert(tokens, 0, tokenizer.document).tobytes())
        header["shape"] = ((file.tell() - start) // dtype.itemsize,)
        file.seek(0)
        np.lib.format.write_array_header_1_0(file, header)  # padded, so that any length fits


def _untrained(library: Any) -> Any:
    """What `BPETokenizer.train` begins with.

    Merges stay within a word, a number of three digits, a run of marks, a line's end with the indent after it, or a
    run of spaces. Bytes from 128 on are parts of UTF-8 characters and count as letters.
    """
    words = r" ?[A-Za-z_\x{80}-\x{ff}]+| ?[0-9]{1,3}| ?[^\sA-Za-z_0-9\x{80}-\x{ff}]+|[\r\n]+[ \t]*|[ \t]+"
    tokenizer = library.Tokenizer(library.models.BPE())
    tokenizer.pre_tokenizer = library.pre_tokenizers.Split(library.Regex(words), behavior="isolated")
    return tokenizer


def _read_definition(definition: str) -> Any:
    """The library's tokenizer.

    Raises:
      ValueError: other text, or pieces that are not of bytes.
    """
    tokenizer = read_definition("BPETokenizer", definition, "bpe")
    vocabulary = tokenizer.get_vocab()
    if sorted(vocabulary.values()) != list(range(len(vocabulary))) or len(vocabulary) > 2**16 - 2:
        raise ValueError("BPETokenizer: model.vocab must number at most 65,534 pieces from 0 on")
    if max(map(max, filter(None, vocabulary)), default="") > "\xff":
        raise ValueError("BPETokenizer: model.vocab must have pieces of bytes alone, as Latin-1")
    return tokenizer


def _require_as_trained(tokenizer: BPETokenizer) -> None:
    """Hold a tokenizer to what `BPETokenizer.train` makes, but for words, vocabulary and merges: others lose text.

    Raises:
      ValueError: names the key.
    """
    library = import_tokenizers("BPETokenizer", "bpe")
    given, expected = (_settings(json.loads(x.to_str())) for x in (tokenizer._tokenizer, _untrained(library)))
    for key in sorted(given.keys() | expected.keys()):
        if given.get(key) != expected.get(key):
            raise ValueError(f"BPETokenizer: {key} must be {expected.get(key)!r:.80}; got {given.get(key)!r:.80}")
    if not {bytes([byte]) for byte in range(256)} <= set(tokenizer._pieces):
        raise ValueError("BPETokenizer: model.vocab must have every byte")


def _settings(definition: dict[str, Any]) -> dict[str, Any]:
    """The keys of a definition, those of its parts too, but for what differs between tokenizers of ours."""
    flat = {}
    for name, part in definition.items():
        flat |= {f"{name}.{key}": value for key, value in part.items()} if isinstance(part, dict) else {name: part}
    return {key: flat[key] for key in flat if key not in ("model.vocab", "model.merges", "pre_tokenizer.pattern")}
