"""A small byte-level tokenizer with the special tokens of a chat."""

from pathlib import Path
from typing import Any

import numpy as np

from rattn_eqx.data.pretrained_tokenizer import PretrainedTokenizer
from rattn_eqx.weights.foreign import Foreign
from rattn_eqx.weights.gguf_tokenizer import tokenizer_json
from rattn_eqx.weights.tokenizer import tokenizer_of

SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
BYTES = [chr(x) for x in [*range(33, 127), *range(161, 173), *range(174, 256), *range(256, 324)]]  # as GPT-2 shows them
MERGES = ["1 2", "12 3", "123 4", "h e", "l l", "he ll", "hell o", "\u0120 hello", "\u010a \u010a"]
CONFIG = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}


def metadata(words: str) -> dict[str, Any]:
    tokens = [*SPECIALS, *BYTES, *(merge.replace(" ", "") for merge in MERGES), "<think>"]
    kinds = np.array([3] * 3 + [1] * (len(tokens) - 4) + [4])
    of = {"model": "gpt2", "pre": words, "tokens": tokens, "merges": MERGES, "token_type": kinds}
    return {f"tokenizer.ggml.{name}": value for name, value in of.items()}


def make(
    words: str = "smollm", vocabulary_size: int = 300, chat_template: str | None = None, **config: Any
) -> PretrainedTokenizer:
    config = {**CONFIG, "vocab_size": vocabulary_size, **config}
    foreign = Foreign(Path("x"), config, {}, lambda name: np.zeros(0), tokenizer_json(metadata(words)), chat_template)
    tokenizer = tokenizer_of(foreign)
    assert tokenizer is not None
    return tokenizer
