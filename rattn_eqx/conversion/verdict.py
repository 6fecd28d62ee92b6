"""What a conversion lost and won back: loss by position, and facts that stand before the window."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int32

from pallas.checked import checked
from rattn_eqx.data.pretrained_tokenizer import PretrainedTokenizer
from rattn_eqx.data.tokenizers import Tokenizer
from rattn_eqx.evaluation.text import nats_by_position, switch_off
from rattn_eqx.inference.chat import chat_prompt
from rattn_eqx.inference.text import generate_texts
from rattn_eqx.model.language_model import LanguageModel
from rattn_eqx.model.local_layers import with_sinks

NEVER = -1e9  # a sink's logit that no softmax sees

FACTS = (  # (a sentence, a question, the word that answers it)
    ("The key to the boathouse hangs behind the painting of the lighthouse.", "Behind what does the key hang?",
     "painting"),
    ("Margaret's new telephone number ends in 4715.", "Which number does Margaret's telephone number end in?", "4715"),
    ("The expedition's cook was a quiet man called Bartholomew.", "What was the cook called?", "Bartholomew"),
    ("On Thursday the library closes at noon because of the concert.", "On which day does the library close at noon?",
     "Thursday"),
    ("The old bridge over the river was painted green last summer.", "Which colour was the bridge painted?", "green"),
)  # fmt: skip
FILLER = (
    "The weather stayed mild for most of the week, and the streets were quiet in the afternoon.",
    "Several people walked along the harbour and looked at the boats that had come in the day before.",
    "A small market stood on the square, with bread, apples, cheese and a few second-hand books.",
    "In the evening the lamps were lit, and somebody played the piano with the windows open.",
    "The train to the coast was late again, which nobody seemed to mind very much.",
    "Two children drew a map of the garden and argued about where the pond should be.",
)


@dataclasses.dataclass(frozen=True)
class Loss:
    """Mean nats per token of texts, at positions within the window's length and after it."""

    name: str
    within: float
    beyond: float


def window_imposed(model: LanguageModel) -> LanguageModel:
    """The old model with each local layer's window forced on it: no sink, no residual branch."""
    return switch_off(with_sinks(model, lambda number, sinks: jnp.full_like(sinks, NEVER)), "residual")


@checked
def losses(models: dict[str, LanguageModel], texts: Int32[np.ndarray, "n length"], window: int) -> Iterator[Loss]:
    """The loss of each model on the same texts, one after the other."""
    for name, model in models.items():
        nats = np.stack([np.asarray(nats_by_position(model, jnp.asarray(text)), np.float64) for text in texts])
        yield Loss(name, float(nats[:, :window].mean()), float(nats[:, window:].mean()))


def fact_prompts(tokenizer: Tokenizer, length: int = 300) -> list[tuple[str, str]]:
    """(prompt, answer): of about `length` tokens, with the fact in the second sentence and the question at the end."""
    found = []
    for number, (fact, question, answer) in enumerate(FACTS):
        sentences, ending = [FILLER[number % len(FILLER)], fact], f" {question}"
        while len(tokenizer.encode((" ".join(sentences) + ending).encode())) < length:
            sentences.append(FILLER[(number + len(sentences)) % len(FILLER)])
        found.append((" ".join(sentences) + ending, answer))
    return found


def facts_found(model: LanguageModel, tokenizer: Tokenizer, *, num_tokens: int = 24) -> list[bool]:
    """Whether the greedy answer to each of `fact_prompts` has the word: as a chat, where the tokenizer knows one."""
    prompts, words = _asked(tokenizer)
    answers = [""] * len(words)
    keys = jax.random.split(jax.random.key(0), len(words))
    options: dict[str, Any] = dict(num_tokens=num_tokens, temperature=0.0, key=keys)
    for number, text, _ in generate_texts(model, tokenizer, prompts, **options):
        answers[number] += text
    return [word in answer for answer, word in zip(answers, words, strict=True)]


def check_prompts(tokenizer: Tokenizer) -> None:
    """Raises what `facts_found` would of the tokenizer's chat template, before the work."""
    for prompt in _asked(tokenizer)[0]:
        if not isinstance(prompt, str):
            chat_prompt(tokenizer, prompt)


def _asked(tokenizer: Tokenizer) -> tuple[list[Any], list[str]]:
    """The prompts, as chats where the tokenizer knows one, and the words that answer them."""
    chats = isinstance(tokenizer, PretrainedTokenizer) and tokenizer.chat_template is not None
    pairs = fact_prompts(tokenizer)
    prompts = [[{"role": "user", "content": text}] if chats else f"{text}\nAnswer:" for text, _ in pairs]
    return prompts, [word for _, word in pairs]
