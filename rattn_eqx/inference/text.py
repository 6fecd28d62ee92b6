"""Text from a model: what `generate_batch` draws, as characters, and the strings that end it."""

import codecs
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import PRNGKeyArray

from rattn_eqx.data.tokenizers import Tokenizer
from rattn_eqx.inference.chat import Message, chat_prompt
from rattn_eqx.inference.generate import Ended, generate_batch, typed_key
from rattn_eqx.model.language_model import LanguageModel

Prompt = str | Sequence[Message]  # the head of a document, or a conversation, which the assistant goes on with


def generate_text(
    model: LanguageModel,
    tokenizer: Tokenizer,
    prompt: Prompt,
    *,
    key: PRNGKeyArray,
    stop: Sequence[str] = (),
    **options: Any,
) -> Iterator[str]:
    """What follows a prompt, in whole characters, each as soon as it is known.

    Args, Raises: as of `generate_texts`.
    """
    return (
        text
        for _, text, _ in generate_texts(model, tokenizer, [prompt], key=typed_key(key)[None], stop=stop, **options)
    )


def generate_texts(
    model: LanguageModel,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    *,
    stop: Sequence[str] = (),
    **options: Any,
) -> Iterator[tuple[int, str, Ended | None]]:
    """What follows prompts: (the prompt's number, a piece of its text, why it ended or None).

    Pieces are whole characters, though a character may be several tokens; what is no UTF-8 is replaced by U+FFFD. A
    checkpoint's own end tokens end a text. Else the document marker and padding, which stand for no text, are never
    drawn.

    Args:
      prompts: the head of a document each, or a conversation in the words of `chat_prompt`: a list of messages such as
        {"role": "user", "content": "Hello"}.
      stop: strings before which a text ends.
      options: of `generate_batch`: num_tokens, key, temperature, top_k, top_p, max_length, stream.

    Raises:
      ValueError: as `generate_batch` and `chat_prompt`, and for an empty string in `stop`.
    """
    if isinstance(prompts, str):
        raise ValueError(f"generate: prompts must be a list of texts; got one text, {prompts!r:.60}")
    if isinstance(stop, str) or not all(stop):
        raise ValueError(f"generate: stop must be strings of at least one character; got {stop!r:.80}")
    begun = [prompt_tokens(tokenizer, prompt) for prompt in prompts]
    readers = [_Reader(tokenizer, tuple(stop)) for _ in prompts]
    drawn = generate_batch(
        model,
        begun,
        forbid={tokenizer.padding, tokenizer.document} - {*tokenizer.ends},
        stop=lambda row, tokens: readers[row].read(tokens[-1]),
        **{"end": tokenizer.ends, **options},
    )
    return (
        (one.row, readers[one.row].taken(one.index, last=one.ended is not None), one.ended)
        for step in drawn
        for one in step
    )


def prompt_tokens(tokenizer: Tokenizer, prompt: Prompt) -> np.ndarray:
    """The tokens of a prompt; the document marker stands before a text, and what the template writes before a chat."""
    if isinstance(prompt, str):
        return np.insert(tokenizer.encode(prompt.encode()), 0, tokenizer.document)
    return chat_prompt(tokenizer, prompt)


class _Reader:
    """The characters of one text, of which it is known that no stop string begins there."""

    def __init__(self, tokenizer: Tokenizer, stop: tuple[str, ...]):
        self.tokenizer, self.stop = tokenizer, stop
        self.decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self.text, self.shown, self.stopped = "", 0, False
        self.lengths: list[int] = []  # of the text, after each token

    def read(self, token: int) -> bool:
        """One more token: has a stop string come?"""
        self.text += self.decoder.decode(self.tokenizer.decode(np.array([token])))
        reach = max(map(len, self.stop), default=0)
        found = [at for at in (self.text.find(x, max(0, self.shown)) for x in self.stop) if at >= 0]
        if found:
            self.text, self.stopped = self.text[: min(found)], True
        self.lengths.append(len(self.text) if found else max(0, len(self.text) - max(0, reach - 1)))
        return self.stopped

    def taken(self, index: int, last: bool) -> str:
        """What can be shown after this token and was not yet; all of it after the last."""
        if last and not self.stopped:
            self.text += self.decoder.decode(b"", final=True)
        until = len(self.text) if last else self.lengths[index]
        piece, self.shown = self.text[self.shown : until], max(self.shown, until)
        return piece
