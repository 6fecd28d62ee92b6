"""A conversation as a prompt, written by the chat template that a checkpoint came with."""

import datetime
import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from rattn_eqx.data.pretrained_tokenizer import PretrainedTokenizer, Tokens
from rattn_eqx.data.tokenizers import Tokenizer

Message = dict[str, str]  # {"role": "user", "content": "..."}; other roles are "system" and "assistant"
LONGEST = 2**24  # characters of a prompt


def chat_prompt(tokenizer: Tokenizer, messages: Sequence[Message]) -> Tokens:
    """The tokens of a prompt after which the assistant's answer follows.

    The template writes special tokens around the messages. A message that has the text of one is refused: it would end
    its own turn, and speak as another. A conversation is a document, and begins with its marker, where the template
    writes none. (Hugging Face puts none there; of 16 capitals the small SmolLM2 knows 13 without and 15 with it.)

    Raises:
      ValueError: for a tokenizer without a chat template, messages without role or content, or with a special token's
        text, and for a template that refuses them or fails.
      ImportError: jinja2 is missing.
    """
    if not isinstance(tokenizer, PretrainedTokenizer) or tokenizer.chat_template is None:
        raise ValueError(
            "chat: the tokenizer must have a chat template; it has none; give the prompt as text, or load a checkpoint "
            "that was trained to chat"
        )
    for message in messages:
        if not isinstance(message, dict) or not all(isinstance(message.get(x), str) for x in ("role", "content")):
            raise ValueError(f"chat: messages must have a role and a content, both text; got {message!r:.80}")
        if found := [special for special in tokenizer.specials.values() if special in message["content"]]:
            raise ValueError(f"chat: messages must be without special tokens; got one with {found[0]!r}; leave it out")
    text = render(tokenizer.chat_template, messages, **_tokens_of(tokenizer))
    tokens = tokenizer.encode(text.encode(), special=True)
    begins = len(tokens) > 0 and tokens[0] == tokenizer.document
    return tokens if begins else np.insert(tokens, 0, tokenizer.document)


def _tokens_of(tokenizer: PretrainedTokenizer) -> dict[str, str]:
    """What templates call bos_token and eos_token."""
    ends = [token for token in tokenizer.ends if token != tokenizer.document and token in tokenizer.specials]
    document = tokenizer.specials[tokenizer.document]
    return {"bos_token": document, "eos_token": tokenizer.specials[ends[0]] if ends else document}


def render(template: str, messages: Sequence[Message], **names: Any) -> str:
    """What a chat template makes of messages, with Hugging Face's additions to Jinja, in Jinja's sandbox.

    A template cannot run code, nor reach files. That it takes its time, or memory, is not kept from it.

    Args:
      names: that the template may use, such as bos_token.

    Raises: as `chat_prompt`.
    """
    try:
        import jinja2
        from jinja2.ext import Extension
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError as error:
        raise ImportError("chat: templates need jinja2: pip install 'rattn-eqx[weights]'") from error

    class Generation(Extension):
        """The block `generation`, which marks what an assistant said, is its content."""

        tags = {"generation"}  # noqa: RUF012 (as Jinja has it)

        def parse(self, parser):
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def refuse(reason: str):
        raise jinja2.TemplateError(reason)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", Generation]
    )
    environment.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
    environment.globals |= {"raise_exception": refuse, "strftime_now": datetime.datetime.now().strftime}
    text = ""
    try:
        given = {"messages": list(messages), "add_generation_prompt": True, **names}
        for piece in environment.from_string(template).generate(given):
            text += piece
            if len(text) > LONGEST:
                raise ValueError(f"it writes more than {LONGEST:,} characters")
    except Exception as error:  # whatever its expressions come to
        raise ValueError(f"chat: the template fails: {error!s:.200}; write the prompt as text") from error
    return text
