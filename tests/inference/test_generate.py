"""Generation of one text: it is the plain loop over prefixes, the key alone decides, and one program serves all."""

import dataclasses
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_model
from jaxtyping import TypeCheckError
from scripted_model import NOT_FINITE, Scripted

from rattn_eqx.inference.generate import generate, generate_batch, room
from rattn_eqx.inference.sampling import sample_token
from rattn_eqx.model.language_model import LanguageModel

CONFIG = dataclasses.replace(small_model.CONFIG, window=2)
KEY = jax.random.key(1)
PROMPT = np.array([3, 1, 4], np.uint16)


@pytest.fixture(scope="module")
def model():
    return small_model.drawn(CONFIG, size=0.5, implementation="reference")


@eqx.filter_jit
def logits_of(model, tokens):
    return model(tokens)


def test_greedy_generation_is_the_loop_over_prefixes(model):
    text = PROMPT.tolist()
    for _ in range(5):
        text.append(int(jnp.argmax(logits_of(model, jnp.asarray(text, jnp.int32))[-1])))
    assert len(set(text[3:])) > 1
    assert list(generate(model, PROMPT, num_tokens=5, temperature=0, key=KEY)) == text[len(PROMPT) :]


@pytest.mark.parametrize("temperature", [1e-40, 1e-320, np.float32(1e-30)])
def test_a_tiny_temperature_is_greedy(model, temperature):
    options: dict[str, Any] = dict(num_tokens=9, forbid=(3, 7), key=KEY)
    greedy = list(generate(model, PROMPT, temperature=0, **options))
    assert list(generate(model, PROMPT, temperature=temperature, **options)) == greedy


@pytest.mark.parametrize("compute_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_logits_that_are_not_finite_are_no_text(bad, compute_dtype):
    damaged = LanguageModel(CONFIG, compute_dtype=compute_dtype, implementation="reference", key=KEY)
    damaged = eqx.tree_at(lambda m: m.final_norm.weight, damaged, jnp.full(8, bad))
    for temperature in (0, 0.8):
        begun = generate(damaged, PROMPT, num_tokens=2, temperature=temperature, forbid=(0,), key=KEY)
        with pytest.raises(FloatingPointError, match=r"^generate: logits must be finite; .* for token 0 after"):
            next(begun)


@pytest.mark.parametrize("stream", [True, False])
def test_what_was_drawn_before_logits_that_are_not_finite_comes(stream):
    drawn = generate(Scripted([5, 6, NOT_FINITE]), [256], num_tokens=9, temperature=0, stream=stream, key=KEY)
    assert [next(drawn), next(drawn)] == [5, 6]
    with pytest.raises(FloatingPointError, match="for token 2 after"):
        next(drawn)


def test_numbers_and_ids_however_they_are_held(model):
    def text(prompt, forbid, **options):
        return list(generate(model, prompt, forbid=forbid, key=KEY, **options))

    expected = text(PROMPT, (2, 5), num_tokens=6, max_length=8 + 1, temperature=0.5, top_k=4, top_p=1.0)
    options: dict[str, Any] = dict(num_tokens=np.int64(6), max_length=np.uint8(9), temperature=np.float32(0.5))
    options |= {"top_k": np.int64(4), "top_p": 1}
    for prompt, forbid in ((PROMPT.tolist(), [2, 5]), (list(PROMPT), {2, 5}), (jnp.asarray(PROMPT), np.array([2, 5]))):
        assert text(prompt, forbid, **options) == expected


@pytest.mark.parametrize(
    "changes", [{"top_k": 1.5}, {"key": 0}, {"max_length": "8"}, {"prompt": 3}, {"prompt": "model"}, {"cache": "x"}]
)
def test_another_type_is_told_without_the_model(model, changes):
    changes = {name: model if value == "model" else value for name, value in changes.items()}
    arguments: dict[str, Any] = {"prompt": PROMPT, "num_tokens": 2, "key": KEY} | changes
    with pytest.raises(TypeCheckError, match=f"typechecking parameter '{next(iter(changes))}'") as told:
        generate(model, **arguments)
    assert "\n" not in str(told.value)
    assert len(str(told.value)) < 700


def test_the_key_alone_decides(model):
    def text(seed, num_tokens=20, **options):
        key = jax.random.key(seed)
        return list(generate(model, PROMPT, num_tokens=num_tokens, temperature=1e3, key=key, **options))

    assert text(0) == text(0) == text(0, stream=False)
    assert text(0) != text(1)
    assert text(0, 7) == text(0)[:7]
    assert len(set(text(0))) > 3  # near uniform: each token has randomness of its own
    of_old = generate(model, PROMPT, num_tokens=20, temperature=1e3, key=jax.random.PRNGKey(0))
    assert list(of_old) == text(0)


def test_one_compilation_serves_every_length(model, monkeypatch):
    traces = []

    def counted(logits, **options):
        traces.append(logits.shape)
        return sample_token(logits, **options)

    extend = LanguageModel.extend
    pieces = lambda self, tokens, *args, **options: (
        traces.append(tokens.shape) or extend(self, tokens, *args, **options)
    )
    monkeypatch.setattr("rattn_eqx.inference.generate.sample_token", counted)
    monkeypatch.setattr(LanguageModel, "extend", pieces)
    long = np.arange(300) % 11  # more than a piece
    for prompt, count, stream in ((PROMPT, 9, True), (PROMPT[:1], 2, False), (long, 70, False), (long[:9], 1, True)):
        drawn = generate(model, prompt, num_tokens=count, max_length=370, stream=stream, key=KEY)
        assert len(list(drawn)) == count
    assert sorted(traces) == [(11,), (256,)]


def test_most_texts_share_a_room(model):
    """Each room is a program of its own."""
    assert [room(model, needed, None) for needed in (1, 1024, 1025, 2048)] == [1024, 1024, 2048, 2048]
    assert room(model, 20, 30) == 30
    local = dataclasses.replace(CONFIG, pattern=("local",))
    assert room(eqx.filter_eval_shape(LanguageModel, local, key=KEY), 10**9, 30) is None


def test_forbidden_tokens_are_never_sampled(model):
    allowed = {2, 5}
    forbid = tuple(set(range(11)) - allowed)
    for temperature, top_p in ((0, None), (5.0, None), (5.0, 0.9)):
        options: dict[str, Any] = dict(temperature=temperature, top_p=top_p, forbid=forbid)
        drawn = set(generate(model, PROMPT, num_tokens=15, key=KEY, **options))
        assert drawn <= allowed
    assert list(generate(model, PROMPT, num_tokens=0, key=KEY)) == []


def test_log_probabilities_are_of_the_models_own_logits(model):
    """Whatever temperature, top-k and forbidden tokens do to what is drawn."""
    options: dict[str, Any] = dict(temperature=3.0, top_k=4, forbid=(2,), log_probabilities=True)
    drawn = [one for [one] in generate_batch(model, [PROMPT], num_tokens=12, key=KEY, **options)]
    tokens = [one.token for one in drawn]
    assert len(set(tokens)) > 2
    text = jnp.asarray([*PROMPT.tolist(), *tokens], jnp.int32)
    logs = jax.nn.log_softmax(logits_of(model, text))[len(PROMPT) - 1 : -1]
    expected = logs[jnp.arange(12), text[len(PROMPT) :]]
    given = np.array([one.log_probability for one in drawn], float)
    np.testing.assert_allclose(given, np.asarray(expected), atol=1e-5)
    [[unasked]] = generate_batch(model, [PROMPT], num_tokens=1, key=KEY)
    assert unasked.log_probability is None


def test_a_max_length_is_what_a_text_may_have_with_its_prompt(model):
    drawn = list(generate(model, PROMPT, num_tokens=5, max_length=8, temperature=0, key=KEY))
    assert drawn == list(generate(model, PROMPT, num_tokens=5, temperature=0, key=KEY))
    with pytest.raises(ValueError, match="max_length must have room for a prompt and what follows it; got 8 for 9 to"):
        generate(model, PROMPT, num_tokens=6, max_length=8, key=KEY)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": PROMPT[:0]}, "the prompt is empty; give at least one token"),
        ({"prompt": np.array([3, 11])}, "prompt must hold token ids below vocabulary_size=11; got 11"),
        ({"prompt": np.array([-1])}, "got -1"),
        ({"forbid": (2, 40)}, "forbid must hold token ids below vocabulary_size=11; got 40"),
        ({"forbid": tuple(range(11))}, "forbid must leave a token to sample"),
        ({"end": (2, 40)}, "end must hold token ids below vocabulary_size=11; got 40"),
        ({"temperature": -0.1}, "temperature must be at least 0; got -0.1"),
        ({"temperature": float("nan")}, "temperature must be at least 0; got nan"),
        ({"temperature": float("inf")}, "temperature must be finite; got more than 1.79e308"),
        ({"temperature": 10**400}, "temperature must be finite"),
        (
            {"prompt": "text"},
            "prompt must be a row of token ids; got <U1 of shape .4,.; the tokenizer's encode",
        ),
        ({"prompt": [[3, 1]]}, "prompt must be a row of token ids; got int64 of shape .1, 2."),
        ({"forbid": [1.5]}, "forbid must be a row of token ids; got float64 of shape .1,."),
        ({"forbid": [2**70]}, "forbid must be a row of token ids; got object"),
        ({"top_k": 0}, "top_k must be at least 1; got 0"),
        ({"top_p": 0.0}, r"top_p must lie in \(0, 1\]; got 0.0"),
        ({"top_p": 1.5}, "got 1.5"),
        ({"num_tokens": -1}, "num_tokens must be at least 0, .*; got -1"),
        ({"num_tokens": [2, 3]}, r"one or one for each prompt, .*; got \[2, 3\]"),
        ({"max_length": 0}, "max_length must be at least 1; got 0"),
        ({"max_length": 2**70}, "max_length must be .* below 2"),
        ({"max_length": 2**31 - 1}, "caches of 1 texts must fit in memory, .* got at least .* give fewer tokens"),
        ({"num_tokens": 2**31}, "num_tokens must be .* below 2"),
        ({"num_tokens": 10**23}, "num_tokens must be .* below 2"),
    ],
)
def test_bad_input_is_named_at_the_call(model, changes, message):
    arguments: dict[str, Any] = {"prompt": PROMPT, "num_tokens": 2, "key": KEY} | changes
    with pytest.raises(ValueError, match=f"generate: .*{message}|generate: {message}"):
        generate(model, **arguments)  # not iterated
