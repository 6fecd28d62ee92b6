"""What a converted model is trained to besides the text, held to sums written out."""

import dataclasses
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_model import drawn
from test_conversion import IDS, OLD, SETTINGS, TOKENS, pair, tokens  # noqa: F401, a fixture

from pallas.numerics import relative_rms
from rattn_eqx.data.tokenizers import ByteTokenizer
from rattn_eqx.model import language_model
from rattn_eqx.model.local_layers import with_window
from rattn_eqx.training import loop
from rattn_eqx.training.config import Objective, RunConfig
from rattn_eqx.training.loop import train
from rattn_eqx.training.objective import Aim
from rattn_eqx.training.run_folder import digest, load_config
from rattn_eqx.training.step import make_optimizer

BATCH = {"tokens": TOKENS[:, :-1], "targets": TOKENS[:, 1:], "segment_ids": IDS[:, :-1]}


def logits(model, batch):
    return jax.vmap(model)(batch["tokens"], batch["segment_ids"]).astype(jnp.float32)


def aim_of(objective, model, teacher=None, steps=100):
    return Aim(objective, model, teacher, 0, steps)


@pytest.mark.parametrize("max_logits", [2**26, 2**11])
def test_the_loss_is_part_text_part_what_the_old_model_says(monkeypatch, max_logits):
    monkeypatch.setattr(language_model, "MAX_LOGITS", max_logits)
    _, model = pair(window=5)
    model, teacher = drawn(model.config, size=0.8), drawn(OLD, size=0.4, seed=1)  # far apart: KL has a direction
    aim = aim_of(Objective(0.3, digest(teacher)), model, teacher)
    batch = {name: jnp.asarray(x) for name, x in BATCH.items()}
    silent: Any = aim.silent(1)
    got = eqx.filter_jit(aim.loss)(model, batch, aim.teacher, silent)
    new, old = (np.asarray(jax.nn.log_softmax(logits(x, batch)), np.float64) for x in (model, teacher))
    of_text = -np.take_along_axis(new, BATCH["targets"][..., None], axis=-1).mean()
    divergence = np.sum(np.exp(old) * (old - new), axis=-1).mean()
    reverse = np.sum(np.exp(new) * (new - old), axis=-1).mean()
    assert abs(divergence - reverse) > 0.01
    assert float(got) == pytest.approx(0.7 * of_text + 0.3 * divergence, rel=1e-5)


def test_a_silent_window_leaves_the_residual_branch():
    _, model = pair(window=5)
    model = drawn(model.config, size=0.4)  # whose residual branch says something
    aim = aim_of(Objective(window_dropout=0.5), model)
    batch = {name: jnp.asarray(x) for name, x in BATCH.items()}
    silent: Any = np.array([True, False, True])
    got = eqx.filter_jit(aim.loss)(model, batch, aim.teacher, silent)

    def without_window(layer):
        zero = jnp.zeros_like(layer.rla_gain)
        return eqx.tree_at(lambda x: x.swa_gain, layer, zero, is_leaf=lambda x: x is None)

    where = lambda model: [model.blocks[i].attention for i in (0, 3)]  # the first and third local layers
    expected = eqx.tree_at(where, model, [without_window(x) for x in where(model)])
    targets = jnp.asarray(BATCH["targets"])[..., None]
    of_text = lambda model: -float(jnp.take_along_axis(jax.nn.log_softmax(logits(model, batch)), targets, -1).mean())
    assert float(got) == pytest.approx(of_text(expected), rel=1e-5)
    assert abs(of_text(model) - of_text(expected)) > 1e-3


def test_what_is_drawn_for_a_step():
    _, model = pair(window=5)
    aim = aim_of(Objective(window_dropout=0.6, windows=(3, 8)), model, steps=1000)
    shares = [np.mean([aim.silent(n) for n in range(low + 1, low + 101)]) for low in (0, 200, 400, 500, 900)]
    np.testing.assert_allclose(shares, [0.54, 0.3, 0.06, 0, 0], atol=0.09)
    windows = [aim.window(n) for n in range(1, 1001)]
    assert set(windows[:900]) == {3, 8}
    assert 400 < windows[:900].count(3) < 500
    assert set(windows[900:]) == {None}, "the last tenth is the model's own"
    assert windows == [aim.window(n) for n in range(1, 1001)]
    assert aim_of(Objective(), model).window(1) is None


@pytest.mark.standard_dtype_promotion  # optax
def test_what_local_layers_have_of_their_own_learns_at_its_own_rate():
    _, model = pair(window=5)
    parameters = eqx.filter(drawn(model.config, size=0.4), eqx.is_array)
    gradients = jax.tree.map(lambda x: jnp.sin(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape) + 2, parameters)
    moved = []
    for rate in (1, 7):
        optimizer = make_optimizer(dataclasses.replace(SETTINGS, own_rate=rate, warmup_steps=0, weight_decay=0.0))
        updates, _ = jax.jit(optimizer.update)(gradients, optimizer.init(parameters), parameters)
        moved.append({jax.tree_util.keystr(path): x for path, x in jax.tree_util.tree_leaves_with_path(updates)})
    own = ("sink_logits", "rla_gain", "feature_projection.query", "feature_projection.key")
    for name in moved[0]:
        np.testing.assert_allclose(moved[1][name], moved[0][name] * (7 if name.endswith(own) else 1), rtol=1e-6)
    assert sum(name.endswith(own) for name in moved[0]) == 3 * len(own)


def test_another_window_is_that_of_a_model_built_with_it():
    _, model = pair(window=5)
    built = drawn(dataclasses.replace(model.config, window=9), size=0.4)
    changed = with_window(drawn(model.config, size=0.4), 9)
    got, expected = (eqx.filter_jit(x)(jnp.asarray(TOKENS[0])) for x in (changed, built))
    assert relative_rms(got, expected) < 1e-6


def test_what_does_not_fit_is_told():
    teacher, model = pair(window=5)
    without = drawn(dataclasses.replace(model.config, sinks=False), size=0.4)
    refused: Any = (
        ((Objective(0.5, "other"), model, teacher), "teacher must be the model whose digest .* got another"),
        ((Objective(0.5, digest(teacher)), model, None), "got none"),
        ((Objective(windows=(3,)), teacher), "needs local layers"),
        ((Objective(window_dropout=0.1), without), "needs sinks"),
    )
    for arguments, words in refused:
        with pytest.raises(ValueError, match=words):
            aim_of(*arguments)
    wider = drawn(dataclasses.replace(OLD, vocabulary_size=OLD.vocabulary_size + 1), size=0.4)
    with pytest.raises(ValueError, match="vocabulary of 258; got 259"):
        aim_of(Objective(0.5, digest(wider)), model, wider)
    out_of_range: Any = (
        (dict(distillation=1.5, teacher="x"), "distillation must be a share"),
        (dict(distillation=0.5), "teacher belongs to a distillation above 0"),
        (dict(window_dropout=1.0), "window_dropout must be a probability"),
        (dict(windows=(0,)), "windows must be at least 1"),
    )
    for values, words in out_of_range:
        with pytest.raises(ValueError, match=f"^Objective: {words}"):
            Objective(**values)


@pytest.mark.standard_dtype_promotion  # optax
def test_a_stopped_run_goes_on_exactly_and_no_other_objective_does(tmp_path, tokens, monkeypatch):  # noqa: F811
    teacher, model = pair(window=5)
    objective = Objective(0.3, digest(teacher), 0.5, (3, 8))
    config = RunConfig(model.config, SETTINGS, "of no corpus", digest(model), objective)
    options: Any = dict(start=model, teacher=teacher, show_progress=False)
    go = lambda name, config=config: train(tmp_path / name, config, tokens, tokens, ByteTokenizer(), **options)
    at_once = go("at once")
    assert load_config(tmp_path / "at once") == config
    save = loop.save_checkpoint

    def stop(checkpoints, number, *rest):
        save(checkpoints, number, *rest)
        if number == 4:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(loop, "save_checkpoint", stop)
        with pytest.raises(KeyboardInterrupt):
            go("stopped")
    resumed = go("stopped")
    assert digest(resumed) == digest(at_once) != digest(model)
    with pytest.raises(ValueError, match=r"objective.window_dropout is 0.5 there and 0.4 here"):
        go("stopped", dataclasses.replace(config, objective=dataclasses.replace(objective, window_dropout=0.4)))
