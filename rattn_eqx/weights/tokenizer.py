"""The tokenizer of a checkpoint, and which of its tokens mean what to us."""

from typing import Any

from rattn_eqx.data.files import parse_json
from rattn_eqx.data.pretrained_tokenizer import PretrainedTokenizer
from rattn_eqx.weights.foreign import Foreign

_DOCUMENT = "<|endoftext|>"  # what GPT-2, SmolLM and Qwen put between documents


def tokenizer_of(foreign: Foreign) -> PretrainedTokenizer | None:
    """The tokenizer of a checkpoint, with its chat template; None where it came without.

    Documents begin with "<|endoftext|>" where that is a special token, else with the one that begins a sequence (bos),
    or ends one (eos). Padding, which no text has, is the checkpoint's or another special token. What a model writes is
    ended by the document marker, and by what the config says (eos_token_id, which may be a list).

    Raises:
      ValueError: for a tokenizer that `PretrainedTokenizer` does not take, or one without two special tokens; names the
        checkpoint.
      ImportError: the `tokenizers` library is missing.
    """
    if foreign.tokenizer is None:
        return None
    config = foreign.config
    try:
        bos, eos, pad = (_ids(name, config.get(name)) for name in ("bos_token_id", "eos_token_id", "pad_token_id"))
        specials = _specials(foreign.tokenizer)
        named = [token for token, content in specials.items() if content == _DOCUMENT]
        candidates = [token for token in [*named, *bos, *eos] if token in specials]
        document = next(iter([*candidates, *specials]), None)
        padding = next((token for token in [*pad, *specials] if token != document and token in specials), None)
        if document is None or padding is None:
            raise ValueError(f"tokenizer.json must have two special tokens; it has {len(specials)}")
        return PretrainedTokenizer(
            foreign.tokenizer,
            document=document,
            padding=padding,
            ends=tuple(dict.fromkeys([document, *eos])),
            vocabulary_size=config["vocab_size"],
            chat_template=foreign.chat_template,
        )
    except (ValueError, RecursionError) as error:
        raise ValueError(f"load: {foreign.source} refused: {error}; give the checkpoint's own tokenizer") from error


def _specials(definition: str) -> dict[int, str]:
    found = {}
    for token in parse_json(definition, "tokenizer.json").get("added_tokens") or []:
        match token:
            case {"id": int(i), "content": str(content), "special": True}:
                found[i] = content
    return found


def _ids(name: str, value: Any) -> list[int]:
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(token, int) for token in ids):
        raise ValueError(f"{name} must be a token, or a list of them; it is {value!r:.80}")
    return ids
