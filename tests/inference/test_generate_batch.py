"""Texts beside each other: each depends on itself alone, ends on its own, and may continue a cache that is kept."""

import dataclasses
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_model
from scripted_model import Scripted

from rattn_eqx.inference import generate as module
from rattn_eqx.inference.generate import Drawn, generate, generate_batch
from rattn_eqx.model.language_model import LanguageModel

CONFIG = dataclasses.replace(small_model.CONFIG, num_meta_tokens=2)
KEY = jax.random.key(1)


@pytest.fixture(scope="module")
def model():
    return small_model.drawn(CONFIG, size=0.7, implementation="chunked")


@pytest.fixture
def small_pieces(monkeypatch):
    """So that prompts of a few tokens are several pieces, as prompts of hundreds are."""
    monkeypatch.setitem(module.PIECE, jax.default_backend(), 4)


def prompt(length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 11, length)


def rows(steps, batch: int) -> list[list[Drawn]]:
    drawn = [one for step in steps for one in step]
    found = [[one for one in drawn if one.row == row] for row in range(batch)]
    assert all([one.index for one in row] == list(range(len(row))) for row in found)
    return found


def tokens(steps, batch: int) -> list[list[int]]:
    return [[one.token for one in row] for row in rows(steps, batch)]


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("stream", [True, False])
def test_a_row_does_not_depend_on_the_others_to_the_bit(model, stream):
    options: dict[str, Any] = dict(temperature=0.9, log_probabilities=True, stream=stream, key=jax.random.split(KEY, 3))
    beside = [[prompt(1), prompt(13, 1)], [prompt(30, 2), prompt(4, 3)]]
    for own in (prompt(3), prompt(4), prompt(9)):
        texts = [
            rows(generate_batch(model, [first, own, last], num_tokens=counts, **options), 3)[1]
            for (first, last), counts in zip(beside, ([2, 12, 30], [20, 12, 1]), strict=True)
        ]
        assert texts[0] == texts[1]
        assert len(texts[0]) == 12


@pytest.mark.usefixtures("small_pieces")
def test_a_row_equals_itself_alone(model):
    prompts = [prompt(length, length) for length in (1, 5, 8, 21)]
    options: dict[str, Any] = dict(num_tokens=10, temperature=0, log_probabilities=True)
    for row, text in enumerate(rows(generate_batch(model, prompts, key=KEY, **options), 4)):
        [alone] = rows(generate_batch(model, [prompts[row]], key=KEY, **options), 1)
        assert [one.token for one in text] == [one.token for one in alone]
        scores, of_alone = (np.array([one.log_probability for one in x], float) for x in (text, alone))
        np.testing.assert_allclose(scores, of_alone, atol=1e-5)


def test_keys(model):
    """One for each prompt gives what each gives alone; of one, each prompt gets its own."""
    options: dict[str, Any] = dict(num_tokens=10, temperature=1e3)
    keys = jax.random.split(KEY, 3)
    drawn = tokens(generate_batch(model, [prompt(3)] * 3, key=keys, **options), 3)
    assert drawn == [list(generate(model, prompt(3), key=key, **options)) for key in keys]
    of_one = tokens(generate_batch(model, [prompt(3)] * 3, key=KEY, **options), 3)
    assert len({tuple(text) for text in of_one}) == 3
    folded = jax.vmap(lambda row: jax.random.fold_in(KEY, row))(jnp.arange(3))
    assert tokens(generate_batch(model, [prompt(3)] * 3, key=folded, **options), 3) == of_one


@pytest.mark.parametrize("stream", [True, False])
def test_each_text_ends_on_its_own(stream):
    model = Scripted([7, 8, 9, 1], [1, 2, 3, 9, 4], [*range(10, 90)], [5, 5], [9])
    asked, counts = [], [10, 5, 80, 0, 1]

    def stop(row, text):
        asked.append((row, len(text)))
        return row == 1 and text[-2:] == [2, 3]

    options: dict[str, Any] = dict(temperature=0, end=(9, 200), stop=stop, stream=stream, key=KEY)
    steps = list(generate_batch(model, model.ids(), num_tokens=counts, **options))
    found = rows(steps, 5)
    assert [[one.token for one in row] for row in found] == [[7, 8, 9], [1, 2, 3], [*range(10, 90)], [], [9]]
    assert [row[-1].ended for row in found if row] == ["end", "stop", "count", "end"]
    assert all(one.ended is None for row in found for one in row[:-1])
    assert sorted(asked) == [(row, n) for row, count in ((0, 3), (1, 3), (2, 80), (4, 1)) for n in range(1, count + 1)]
    assert [(one.row, one.index) for one in steps[0]][:2] == [(0, 0), (1, 0) if stream else (0, 1)]
    assert len(steps) == (80 if stream else 2)


@pytest.mark.usefixtures("small_pieces")
def test_twenty_prompts_continue_a_kept_cache(model, monkeypatch):
    shared, prompts = prompt(40), [prompt(1 + n % 7, n) for n in range(20)]
    _, kept = eqx.filter_jit(model.prefill)(jnp.asarray(shared, jnp.int32), model.init_cache(64))
    before = jax.tree.map(np.array, kept)
    pieces, read = [], module._read
    counted = lambda model, state, tokens, counts: pieces.append(tokens.shape) or read(model, state, tokens, counts)
    monkeypatch.setattr(module, "_read", counted)
    options: dict[str, Any] = dict(num_tokens=6, temperature=0)
    texts = tokens(generate_batch(model, prompts, cache=kept, key=KEY, **options), 20)
    assert pieces == [(20, 4)] * 2, "what the cache holds was read again"
    whole = [np.concatenate([shared, x]) for x in prompts]
    assert texts == tokens(generate_batch(model, whole, max_length=64, key=KEY, **options), 20)
    assert list(generate(model, prompts[3], cache=kept, key=KEY, **options)) == texts[3]
    assert texts != tokens(generate_batch(model, prompts, max_length=64, key=KEY, **options), 20)
    jax.tree.map(np.testing.assert_array_equal, before, jax.tree.map(np.array, kept))


def test_what_does_not_fit_a_cache_is_told_and_the_cache_unharmed(model):
    _, kept = eqx.filter_jit(model.prefill)(jnp.arange(9, dtype=jnp.int32), model.init_cache(16))
    other = lambda **changes: eqx.filter_eval_shape(LanguageModel, dataclasses.replace(CONFIG, **changes), key=KEY)
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16) if x.ndim > 1 else x, kept.layers[1])
    batched = jax.tree.map(lambda x: jnp.stack([x, x]), kept)
    one = jax.tree.map(lambda x: x[None], kept)
    before = jax.tree.map(np.array, kept)
    wrong = {
        "the cache must have room for 17 tokens, 9 of them read; it has 16": (model, kept, {"num_tokens": 6}),
        "max_length belongs to a new cache; got 32": (model, kept, {"max_length": 32}),
        "of this model, of 3 layers; got one of 2": (other(num_layers=3), kept, {}),
        r"layers\[0\].keys must be float32\[5, 1, 4\]; got float32\[3, 1, 4\]": (other(window=5), kept, {}),
        r"layers\[0\].keys must be float32\[3, 2, 4\]; got": (other(num_kv_heads=2), kept, {}),
        r"layers\[0\].keys_rla must be None; got": (other(residual=False, num_meta_tokens=0), kept, {}),
        r"layers\[1\].keys must be float32\[16, 1, 4\]; got bfloat16": (
            model,
            eqx.tree_at(lambda x: x.layers[1], kept, half),
            {},
        ),
        r"unbatched; .*layers\[0\].keys must be .*; got float32\[2, 3, 1, 4\]": (model, batched, {}),
        r"unbatched; .*layers\[0\].keys must be .*; got float32\[1, 3, 1, 4\]": (model, one, {}),
        "generate: the cache must be of this model, whose global layers need room": (
            model,
            other(pattern=("local",), num_meta_tokens=0).init_cache(),
            {},
        ),
    }
    for message, (reader, cache, changes) in wrong.items():
        with pytest.raises(ValueError, match=message):
            generate_batch(reader, [prompt(1), prompt(2)], **({"num_tokens": 2, "cache": cache, "key": KEY} | changes))
    jax.tree.map(np.testing.assert_array_equal, before, jax.tree.map(np.array, kept))
    assert len(list(generate(model, prompt(2), num_tokens=5, cache=kept, key=KEY))) == 5


def test_a_cache_of_fewer_bits_is_continued(model):
    _, kept = eqx.filter_jit(model.prefill)(jnp.arange(9, dtype=jnp.int32), model.init_cache(16, "bfloat16"))
    assert kept.layers[0].keys.dtype == jnp.bfloat16
    assert len(list(generate(model, prompt(2), num_tokens=5, cache=kept, key=KEY))) == 5


def test_a_prompt_longer_than_a_global_layers_room(model):
    cache, long = model.init_cache(8), jnp.asarray(prompt(9), jnp.int32)
    with pytest.raises(ValueError, match=r"a document must fit in the cache's room=8; got 9 tokens, 0 of them"):
        model.prefill(long, cache)
    logits, after = eqx.filter_jit(model.prefill)(long[:8], cache)
    assert np.isfinite(logits).all()
    with pytest.raises(ValueError, match="room=8; got 9 tokens, 8 of them read before"):
        model.decode_step(long[8], after)
    with pytest.raises(ValueError, match=r"the cache must have room for 10 tokens, 0 of them read; it has 8"):
        generate(model, prompt(9), num_tokens=1, cache=cache, key=KEY)
    with pytest.raises(ValueError, match=r"max_length must have room for .*; got 8 for 10 tokens"):
        generate_batch(model, [prompt(9), prompt(2)], num_tokens=1, max_length=8, key=KEY)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompts": []}, "prompts must be at least one; got none"),
        ({"prompts": [[1], []]}, "the prompt is empty"),
        ({"prompts": [[1], [2, 11]]}, "below vocabulary_size=11; got 11"),
        ({"num_tokens": [1, -1]}, r"num_tokens must be at least 0, .* got \[1, -1\]"),
        ({"key": jax.random.split(KEY, 3)}, r"key must be one, or one for each of 2 prompts; got \(3,\)"),
    ],
)
def test_bad_input_is_named_at_the_call(model, changes, message):
    arguments: dict[str, Any] = {"prompts": [[1], [2, 3]], "num_tokens": 2, "key": KEY} | changes
    with pytest.raises(ValueError, match=f"generate: .*{message}"):
        generate_batch(model, **arguments)  # not iterated
