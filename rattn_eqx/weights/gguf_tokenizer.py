"""The tokenizer of a GGUF file, as the text of Hugging Face's tokenizer.json."""

import json
import warnings
from typing import Any

import numpy as np

# Kinds of tokens.
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)
_QWEN2_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3_WORDS = _QWEN2_WORDS.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
_WORDS = {  # by the name of the pre-tokenizer: a pattern of words; None is GPT-2's, with digits apart for those named
    "default": None,
    "gpt-2": None,
    "smollm": None,
    "starcoder": None,
    "qwen2": _QWEN2_WORDS,
    "deepseek-r1-qwen": _QWEN2_WORDS,
    "llama-bpe": _LLAMA3_WORDS,
    "smaug-bpe": _LLAMA3_WORDS,
}
_DIGITS_APART = ("smollm", "starcoder")
_SPACE = "\u2581"  # how SentencePiece writes a space


def tokenizer_json(metadata: dict[str, Any]) -> str | None:
    """The text of tokenizer.json of a GGUF file's metadata; None without one, and, with a warning, for unknown kinds.

    Known are byte-level BPE ("gpt2") with the pre-tokenizers of SmolLM, GPT-2, Qwen 2 and Llama 3, and SentencePiece's
    BPE ("llama").

    Raises:
      ValueError: for fields that are missing, of another type or of different lengths.
    """
    model, words = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre", "default")
    if model is None:
        return None
    if model not in ("gpt2", "llama") or (model == "gpt2" and words not in _WORDS):
        kind = f"{model!r:.80}, pre-tokenizer {words!r:.80}"
        warnings.warn(
            f"gguf: the file's tokenizer is of an unknown kind ({kind}), so the model is read without; give its "
            f"tokenizer.json. Known are 'llama', and 'gpt2' with {', '.join(_WORDS)}",
            stacklevel=3,
        )
        return None
    tokens = _texts(metadata, "tokens")
    if len(set(tokens)) < len(tokens):
        raise ValueError("tokenizer.ggml.tokens must differ; it has one twice")
    kinds = metadata.get("tokenizer.ggml.token_type", np.full(len(tokens), _NORMAL))
    if not isinstance(kinds, np.ndarray) or len(kinds) != len(tokens):
        raise ValueError(f"tokenizer.ggml.token_type must be one for each of {len(tokens):,} tokens")
    definition = (_byte_level if model == "gpt2" else _sentence_piece)(metadata, tokens, kinds)
    added = [(i, token) for i, token in enumerate(tokens) if kinds[i] in (_UNKNOWN, _CONTROL, _USER_DEFINED)]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    definition["added_tokens"] = [
        {"id": i, "content": token, **flags, "special": bool(kinds[i] != _USER_DEFINED)} for i, token in added
    ]
    return json.dumps({"version": "1.0", "truncation": None, "padding": None, **definition}, ensure_ascii=False)


def _byte_level(metadata: dict[str, Any], tokens: list[str], kinds: np.ndarray) -> dict[str, Any]:
    """GPT-2's kind: merges of bytes, within words."""
    name = metadata.get("tokenizer.ggml.pre", "default")
    bytes_apart = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    steps: list[dict[str, Any]] = []
    if name in _DIGITS_APART:
        steps.append({"type": "Digits", "individual_digits": True})
    if (words := _WORDS[name]) is not None:
        steps.append({"type": "Split", "pattern": {"Regex": words}, "behavior": "Isolated", "invert": False})
    steps.append({**bytes_apart, "use_regex": words is None})
    merges = [_pair(merge) for merge in _texts(metadata, "merges")]
    return {
        "normalizer": {"type": "NFC"} if words == _QWEN2_WORDS else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps},
        "post_processor": None,
        "decoder": bytes_apart,
        "model": _bpe(tokens, merges, ignore_merges=words == _LLAMA3_WORDS),
    }


def _sentence_piece(metadata: dict[str, Any], tokens: list[str], kinds: np.ndarray) -> dict[str, Any]:
    """Llama 2's and Mistral's kind: merges of characters, the best score first; what has no piece is bytes."""
    scores = metadata.get("tokenizer.ggml.scores")
    if not isinstance(scores, np.ndarray) or len(scores) != len(tokens):
        raise ValueError(f"tokenizer.ggml.scores must be one for each of {len(tokens):,} tokens")
    pieces = {token: i for i, token in enumerate(tokens) if kinds[i] == _NORMAL}
    merges = []
    for piece in sorted(pieces, key=lambda piece: (-scores[pieces[piece]], pieces[piece])):
        if len(piece) > 255:
            raise ValueError(f"tokenizer.ggml.tokens must be pieces of at most 255 characters; got {len(piece):,}")
        cuts = [(piece[:at], piece[at:]) for at in range(1, len(piece))]
        found = [(pieces[a], pieces[b], [a, b]) for a, b in cuts if a in pieces and b in pieces]
        merges += [pair for *_, pair in sorted(found)]
    prefix = metadata.get("tokenizer.ggml.add_space_prefix", True)
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    normalizers = [{"type": "Prepend", "prepend": _SPACE}, replace] if prefix else [replace]
    back = {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "}
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else []
    unknown = next((tokens[i] for i in np.flatnonzero(kinds == _UNKNOWN)), None)
    return {
        "normalizer": {"type": "Sequence", "normalizers": normalizers},
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": [back, {"type": "ByteFallback"}, {"type": "Fuse"}, *strip]},
        "model": _bpe(tokens, merges, byte_fallback=True, unk_token=unknown, fuse_unk=True),
    }


def _bpe(tokens: list[str], merges: list[list[str]], **options: Any) -> dict[str, Any]:
    vocabulary = {token: i for i, token in enumerate(tokens)}
    for pair in merges:
        if not {*pair, "".join(pair)} <= vocabulary.keys():
            raise ValueError(f"tokenizer.ggml.merges must be of tokens; {pair!r:.80} is not")
    names = ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix")
    off = dict.fromkeys(names) | dict.fromkeys(("fuse_unk", "byte_fallback", "ignore_merges"), False)
    return {"type": "BPE", **off, **options, "vocab": vocabulary, "merges": merges}


def _pair(merge: str) -> list[str]:
    left, _, right = merge.partition(" ")
    if not left or not right or " " in right:
        raise ValueError(f"tokenizer.ggml.merges must be two pieces each; got {merge!r:.80}")
    return [left, right]


def _texts(metadata: dict[str, Any], name: str) -> list[str]:
    value = metadata.get(f"tokenizer.ggml.{name}")
    if not isinstance(value, list):
        raise ValueError(f"tokenizer.ggml.{name} must be a list of texts; it is {value!r:.80}")
    return value
