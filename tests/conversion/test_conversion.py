"""A converted model begins as the old one, learns layer by layer, and is told apart from it in a table."""

import dataclasses
import json
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_model import drawn

from pallas.numerics import relative_rms
from rattn_eqx.__main__ import main
from rattn_eqx.conversion import transfer as transfer_module
from rattn_eqx.conversion import verdict
from rattn_eqx.conversion.student import replaced, student, student_config
from rattn_eqx.conversion.transfer import lost_shares, transfer
from rattn_eqx.data.tokenizers import BYTE_VOCABULARY, ByteTokenizer
from rattn_eqx.model.attention import RAttention
from rattn_eqx.model.config import ModelConfig
from rattn_eqx.model.local_layers import own_parameters
from rattn_eqx.training.config import RunConfig, TrainConfig
from rattn_eqx.training.loop import initial_state, load_model, train
from rattn_eqx.training.run_folder import digest
from rattn_eqx.weights import own
from rattn_eqx.weights.load import load

OLD = ModelConfig(
    vocabulary_size=BYTE_VOCABULARY,
    model_width=12,
    num_layers=4,
    num_heads=2,
    num_kv_heads=1,
    head_size=6,
    feed_forward_width=16,
    window=0,
    residual=False,
    pattern=("global_rope",),
    qk_norm=False,
)
PATTERN = ("local", "local", "global_rope")
SETTINGS = TrainConfig(
    steps=6, batch_size=2, context=16, learning_rate=1e-2, warmup_steps=1, checkpoint_every=2, evaluate_every=2
)
TOKENS = np.random.default_rng(0).integers(0, 256, (2, 40)).astype(np.int32)
IDS = np.repeat([[0, 1]], [25, 15], axis=1).repeat(2, axis=0).astype(np.int32)


def pair(window: int):
    """(an old model, the converted one)"""
    teacher = drawn(OLD, size=0.4)
    return teacher, student(teacher, student_config(OLD, PATTERN, window))


def test_with_a_window_that_holds_all_and_without_sinks_it_is_the_old_model():
    teacher, model = pair(window=40)
    assert model.config.layer_kinds == ("local", "local", "global_rope", "local")
    expected = eqx.filter_jit(teacher)(jnp.asarray(TOKENS[0]), jnp.asarray(IDS[0]))
    got = eqx.filter_jit(verdict.window_imposed(model))(jnp.asarray(TOKENS[0]), jnp.asarray(IDS[0]))
    assert relative_rms(got, expected) < 1e-6
    with_sinks = eqx.filter_jit(model)(jnp.asarray(TOKENS[0]), jnp.asarray(IDS[0]))
    assert relative_rms(with_sinks, expected) > 1e-2


def test_what_is_learned_is_what_the_old_model_has_not():
    teacher, model = pair(window=5)
    names = lambda tree: {jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)}
    new, rest = eqx.partition(model, own_parameters(model))
    parts = ("sink_logits", "rla_gain", "feature_projection.query", "feature_projection.key")
    assert names(new) == {f".blocks[{i}].attention.{part}" for i in (0, 1, 3) for part in parts}
    assert names(eqx.filter(rest, eqx.is_array)) == names(eqx.filter(teacher, eqx.is_array))
    pairs = zip(*(jax.tree.leaves(eqx.filter(x, eqx.is_array)) for x in (rest, teacher)), strict=True)
    assert all(x is y for x, y in pairs), "nothing is copied"


@pytest.mark.parametrize(
    ("config", "pattern", "window", "words"),
    [
        ({"pattern": ("local", "global_rope"), "window": 3}, PATTERN, 3, "global layers alone; got 2 local"),
        ({}, PATTERN, 0, "window must be at least 1; got window=0"),
        ({}, ("global_rope",), 3, "must make a layer local; got global_rope over 4 layers"),
        ({"pattern": ("global_rope", "global")}, ("local",), 3, "a layer without positions stays global; .* layer 1"),
    ],
)
def test_what_cannot_be_converted_is_told(config: dict[str, Any], pattern, window, words):
    with pytest.raises(ValueError, match=f"^convert: .*{words}"):
        student_config(dataclasses.replace(OLD, **config), pattern, window)


def test_the_lost_share_is_that_of_each_layer_on_the_old_models_stream():
    teacher, model = pair(window=5)
    got = eqx.filter_jit(lost_shares)(model, jnp.asarray(TOKENS), jnp.asarray(IDS))
    lost, whole = np.zeros(3), np.zeros(3)
    for tokens, ids in zip(TOKENS, IDS, strict=True):
        x, local = teacher.embed(jnp.asarray(tokens)), 0
        for old, new in zip(teacher.blocks, model.blocks, strict=True):
            normed = old.attention_norm(x)
            gathered = old.attention(normed, jnp.asarray(ids))
            if isinstance(new.attention, RAttention):
                same = replaced(new.attention)(normed, jnp.asarray(ids))
                np.testing.assert_array_equal(same, gathered)
                lost[local] += np.sum(np.square(new.attention(normed, jnp.asarray(ids)) - gathered))
                whole[local] += np.sum(np.square(gathered))
                local += 1
            x = old(x, jnp.asarray(ids))
    np.testing.assert_allclose(got, lost / whole, rtol=1e-4)


@pytest.fixture
def tokens(tmp_path):
    path = tmp_path / "tokens" / "train.npy"
    path.parent.mkdir()
    text = np.tile(np.frombuffer(b"what the window left behind is summed in a state; ", np.uint8), 60)
    np.save(path, np.concatenate([[ByteTokenizer().document], text]).astype(np.uint16))
    return path


@pytest.mark.standard_dtype_promotion  # optax
def test_transfer_learns_leaves_the_rest_and_resumes_to_the_bit(tmp_path, tokens, monkeypatch):
    _, model = pair(window=5)
    learn = lambda name: transfer(tmp_path / name, model, SETTINGS, tokens, ByteTokenizer(), show_progress=False)
    at_once = learn("at once")
    rows = [json.loads(line) for line in (tmp_path / "at once/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [*range(1, 7)]
    assert rows[-1]["lost"] < rows[0]["lost"]
    assert all(len([name for name in row if name.startswith("layer")]) == 3 for row in rows)
    rest = lambda model: jax.tree.leaves(eqx.partition(model, own_parameters(model))[1])
    assert all(x is y for x, y in zip(rest(at_once), rest(model), strict=True))

    add = transfer_module.Metrics.add

    def stop(self, row):
        if row["step"] == 4:
            raise KeyboardInterrupt
        add(self, row)

    monkeypatch.setattr(transfer_module.Metrics, "add", stop)
    with pytest.raises(KeyboardInterrupt):
        learn("stopped")
    monkeypatch.setattr(transfer_module.Metrics, "add", add)
    (older,) = (tmp_path / "stopped/checkpoints").iterdir()
    content, resumed = older.read_bytes(), learn("stopped")
    older.write_bytes(content)  # as a kill leaves it that comes right after the last checkpoint's
    learn("stopped")
    assert len([*older.parent.iterdir()]) == 2
    for x, y in zip(jax.tree.leaves(at_once), jax.tree.leaves(resumed), strict=True):
        if eqx.is_array(x):
            np.testing.assert_array_equal(x, y)
    with pytest.raises(ValueError, match="the transfer of another model, text or settings"):
        transfer(tmp_path / "stopped", pair(window=4)[1], SETTINGS, tokens, ByteTokenizer(), show_progress=False)


@pytest.mark.standard_dtype_promotion  # optax
def test_the_command_leaves_a_model_that_others_read_and_a_table(tmp_path, capsys):
    old, text, out = tmp_path / "old", tmp_path / "text", tmp_path / "out"
    own.save(drawn(OLD, size=0.4), old, tokenizer=ByteTokenizer())
    text.mkdir()
    for name in "abcdef":
        (text / f"{name}.txt").write_text(f"{name} is a letter, and what it stands for is a sound. " * 12)
    arguments = ["convert", str(old), "--out", str(out), "--corpus", str(text), "--cache", str(tmp_path / "cache"),
        "--window", "6", "--pattern", "local,global", "--context", "32", "--transfer-steps", "3", "--steps", "2",
        "--checkpoint-every", "2", "--text-length", "100", "--texts", "1"]  # fmt: skip
    assert main(arguments) == 0
    said = capsys.readouterr().out
    results = json.loads((out / "results.json").read_text())
    names = ["the model as it was", "its window imposed", "after the transfer", "converted"]
    assert [*results["models"]] == [*names, "converted, residual branch off"]
    for name, row in results["models"].items():
        assert f"{name:<34}{row['within']:>10.3f}{row['beyond']:>10.3f}" in said
    assert all((out / name).read_bytes().startswith(b"\x89PNG") for name in ("transfer.png", "training.png"))
    model, _, config = load(out / "model")
    assert config.layer_kinds == ("local", "global_rope") * 2
    assert (config.sinks, config.swa_gain, config.window) == (True, None, 6)
    trained, _, run = load_model(out / "training")
    assert digest(model) == digest(trained) != run.start
    beyond = [results["models"][name]["beyond"] for name in (*names[:2], "converted")]
    assert results["won_back"] == pytest.approx((beyond[1] - beyond[2]) / (beyond[1] - beyond[0]))
    assert results["about"]["training"]["evaluation_tokens"] == 16384
    num_rows = lambda name: len((out / name / "metrics.jsonl").read_text().splitlines())
    rows = num_rows("transfer"), num_rows("training")

    (out / ".unfinished-of-a-killed-process").touch()
    assert main(arguments) == 0, "again, it finds all done"
    assert not [*out.glob(".unfinished-*")]
    assert capsys.readouterr().out.splitlines()[-9:-1] == said.splitlines()[-9:-1]
    assert (num_rows("transfer"), num_rows("training")) == rows, "nothing was trained again"
    assert main(["generate", "--run", str(out / "model"), "--prompt", "a", "--num-tokens", "3"]) == 0
    capsys.readouterr()
    for changed, words in (
        (["--steps", "0"], "holds a conversion that differs in training; give another --out"),
        (["--window", "5"], "differs in config"),
        (["--pattern", "locale"], "--pattern must hold local and global alone; got 'locale'"),
        (["--text-length", "6"], "texts must be longer than the window; got 6 tokens and window=6"),
        (["--out", str(old)], "holds a model; give another"),
        (["--text-length", "5000", "--out", str(tmp_path / "new")], "a held-out text must have 5000 tokens"),
    ):
        assert main([*arguments, *changed]) == 2
        assert words in capsys.readouterr().err


def test_the_old_model_with_its_window_imposed_is_a_plain_window():
    teacher, model = pair(window=5)
    plain_config = dataclasses.replace(model.config, residual=False, sinks=False, feature_projection=False)
    plain = drawn(plain_config, size=0.4)
    of_block = lambda x: (x.attention_norm, x.attention.projections, x.feed_forward_norm, x.feed_forward)
    where = lambda model: [model.embedding, model.final_norm, *(part for x in model.blocks for part in of_block(x))]
    plain = eqx.tree_at(where, plain, where(teacher))
    got, expected = (eqx.filter_jit(x)(jnp.asarray(TOKENS[0])) for x in (verdict.window_imposed(model), plain))
    assert relative_rms(got, expected) < 1e-6


def test_a_loss_is_that_of_its_positions():
    teacher, _ = pair(window=5)
    (loss,) = verdict.losses({"it": teacher}, TOKENS, window=7)
    nats = [-jax.nn.log_softmax(teacher(jnp.asarray(x[:-1])))[np.arange(39), x[1:]] for x in TOKENS]
    assert loss.within == pytest.approx(np.mean([x[:7] for x in nats]), rel=1e-5)
    assert loss.beyond == pytest.approx(np.mean([x[7:] for x in nats]), rel=1e-5)


def test_facts_are_found_where_the_answer_has_the_word(monkeypatch):
    teacher, _ = pair(window=5)

    def answers(model, tokenizer, prompts, **options):
        assert all(prompt.endswith("?\nAnswer:") for prompt in prompts)
        yield from ((0, "behind the paint", None), (1, "4716", "end"), (0, "ing", "end"), (4, "It was green.", "end"))

    monkeypatch.setattr(verdict, "generate_texts", answers)
    assert verdict.facts_found(teacher, ByteTokenizer()) == [True, False, False, False, True]


@pytest.mark.standard_dtype_promotion  # optax
def test_training_begins_with_the_model_it_is_given_and_no_other(tmp_path, tokens):
    _, model = pair(window=5)
    config = RunConfig(model.config, dataclasses.replace(SETTINGS, steps=2), "of no corpus", digest(model))
    go = lambda config, start: train(
        tmp_path / "run", config, tokens, tokens, ByteTokenizer(), start=start, show_progress=False
    )
    trained = go(config, model)
    moved = [
        np.abs(x - y).max() for x, y in zip(*map(jax.tree.leaves, (trained, model)), strict=True) if eqx.is_array(x)
    ]
    assert 0 < max(moved) < 0.1, "two steps from it"
    wider = dataclasses.replace(config, model=dataclasses.replace(model.config, window=6))
    for changed, start, words in (
        (config, None, "got none"),
        (dataclasses.replace(config, start=None), model, "got another"),
        (config, pair(window=5)[0], "got another"),
        (wider, model, "must have the config of config.model"),
    ):
        with pytest.raises(ValueError, match=words):
            go(changed, start)
    kept = dataclasses.replace(config, training=dataclasses.replace(config.training, rematerialise=True))
    assert initial_state(kept, model)["model"].rematerialise


def test_a_fact_stands_early_and_its_question_at_the_end():
    for prompt, answer in verdict.fact_prompts(ByteTokenizer(), length=900):
        assert answer in prompt[:300]
        assert prompt.count(answer) == 1
        assert prompt.endswith("?")
        assert 900 <= len(prompt) < 1050
