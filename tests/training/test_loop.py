"""Training: it learns, it stops and goes on exactly, and it survives bad steps, bad files and a full disk."""

import dataclasses
import errno
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import training_child
from training_child import bits, curve

from pallas.numerics import relative_rms
from rattn_eqx.data.batches import training_batches
from rattn_eqx.data.files import LockedError, lock
from rattn_eqx.model.language_model import LanguageModel
from rattn_eqx.model.sharding import batch_mesh
from rattn_eqx.training import loop as training
from rattn_eqx.training import objective as objectives
from rattn_eqx.training import step as stepping
from rattn_eqx.training.config import RunConfig
from rattn_eqx.training.run_folder import read_metrics

pytestmark = pytest.mark.standard_dtype_promotion  # optax


class Stop(Exception):
    pass


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory):
    """Holds the tokens, and what XLA compiled while this file's tests run."""
    names = ("dir", "min_compile_time_secs", "min_entry_size_bytes")
    names = [f"jax_{'compilation' if name == 'dir' else 'persistent'}_cache_{name}" for name in names]
    before = {name: getattr(jax.config, name) for name in names}
    folder = tmp_path_factory.mktemp("scratch")
    training_child.keep_compiled(folder / "compiled")
    yield folder
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.fixture(scope="module")
def whole(scratch: Path):
    """The folder and the model of a run that nothing disturbs."""
    folder = scratch / "whole"
    return folder, run(folder, scratch)


@pytest.fixture(scope="module")
def interrupted(scratch: Path, whole) -> Path:
    """The same run, ended by an exception in step 60's evaluation: checkpoints of steps 25 and 50, rows up to 60."""
    folder, really_evaluate, count = scratch / "interrupted", training.evaluate, []

    def evaluate(*arguments):
        count.append(None)
        if len(count) == 3:
            raise Stop
        return really_evaluate(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "evaluate", evaluate)
        with pytest.raises(Stop):
            run(folder, scratch)
    assert [path.name[5:13] for path in checkpoints(folder)] == ["00000025", "00000050"]
    assert read_metrics(folder)[-1]["step"] == 60
    return folder


def run(folder: Path, scratch: Path, report=lambda line: None, **changes) -> LanguageModel:
    return training.train(folder, *training_child.run_arguments(scratch, **changes), report=report, show_progress=False)


def checkpoints(folder: Path) -> list[Path]:
    return sorted((folder / "checkpoints").glob("step_*.npz"))


def assert_ends_like_the_whole(folder: Path, model: LanguageModel, whole) -> None:
    assert curve(folder) == curve(whole[0])
    assert bits(model) == bits(whole[1])
    assert checkpoints(folder)[-1].read_bytes() == checkpoints(whole[0])[-1].read_bytes()


def test_loss_falls(whole):
    rows = read_metrics(whole[0])
    steps = [row for row in rows if "bits_per_byte" in row]
    held_out = [row for row in rows if "bits_per_byte" not in row]
    assert [row["step"] for row in steps] == list(range(1, 61))
    assert [row["step"] for row in held_out] == [20, 40, 60]
    losses = [row["bits_per_byte"] for row in steps]
    assert 7.5 < losses[0] < 10  # random guessing needs 8
    assert np.mean(losses[-10:]) < 0.75 * losses[0]
    assert held_out[0]["validation_bits_per_byte"] > held_out[2]["validation_bits_per_byte"]
    assert [row["step"] for row in rows][19:22] == [20, 20, 21]
    assert all(math.isfinite(row["gradient_norm"]) and row["skipped"] == 0 for row in steps)


def test_the_loss_of_a_step_is_in_bits_per_byte_of_its_targets(whole, scratch):
    config, tokens, _, tokenizer = training_child.run_arguments(scratch)
    settings = config.training
    batches = training_batches(tokens, context=32, batch_size=2, seed=0, document=tokenizer.document)
    batch = next(batches)
    batches.close()
    model = training.initial_state(config)["model"]
    nats = 0.0
    for tokens, targets, ids in zip(batch["tokens"], batch["targets"], batch["segment_ids"], strict=True):
        logits = np.asarray(model(jnp.asarray(tokens), jnp.asarray(ids)), np.float64)
        nats += (np.log(np.exp(logits).sum(-1)) - logits[np.arange(32), targets]).sum()
    expected = nats / np.log(2) / (batch["targets"] < 256).sum()
    row = read_metrics(whole[0])[0]
    assert row["bits_per_byte"] == pytest.approx(expected, rel=1e-5)
    assert row["learning_rate"] == 0
    assert settings.warmup_steps == 4
    assert [round(row["learning_rate"], 6) for row in read_metrics(whole[0])[1:5]] == [0.0025, 0.005, 0.0075, 0.01]


def test_a_run_stopped_between_checkpoints_goes_on_exactly(interrupted, whole, scratch, tmp_path):
    folder, said = tmp_path / "run", []
    shutil.copytree(interrupted, folder)
    newest = checkpoints(folder)[-1]
    with open(folder / "metrics.jsonl", "a") as metrics:
        metrics.write('{"step": 61, "bits_')  # what a kill leaves of a row
    model = run(folder, scratch, said.append)
    assert_ends_like_the_whole(folder, model, whole)
    assert said == [f"resuming after step 50 from {newest}"]

    before, kept = (folder / "metrics.jsonl").read_bytes(), checkpoints(folder)
    shutil.copy2(checkpoints(interrupted)[0], folder / "checkpoints")  # left where the kill comes before it is removed
    assert bits(run(folder, scratch)) == bits(model), "a finished run was trained on"
    assert checkpoints(folder) == kept
    assert (folder / "metrics.jsonl").read_bytes() == before


def test_a_truncated_checkpoint_is_refused_and_the_one_before_it_used(interrupted, whole, scratch, tmp_path):
    folder, said = tmp_path / "run", []
    shutil.copytree(interrupted, folder)
    older, newest = checkpoints(folder)
    newest.write_bytes(newest.read_bytes()[:-1000])
    model = run(folder, scratch, said.append)
    assert_ends_like_the_whole(folder, model, whole)
    assert said[0].startswith(f"checkpoint {newest} refused: its bytes have SHA-256 ")
    assert said[0].endswith("trying the one before it")
    assert said[1:] == [f"resuming after step 25 from {older}"]


def test_a_checkpoint_of_another_run_is_named_and_the_one_before_it_used(interrupted, whole, scratch, tmp_path):
    folder, said = tmp_path / "run", []
    shutil.copytree(interrupted, folder)
    config, *_ = training_child.run_arguments(scratch)
    restored = training.restore_latest(folder / "checkpoints", training.initial_state(config))
    assert restored is not None
    state, metadata, newest = restored
    metadata["run"]["config"]["training"]["seed"] = 1
    foreign = training.save_checkpoint(folder / "checkpoints", 55, state, metadata | {"step": 55}, keep=3)
    model, _, _ = training.load_model(folder, report=said.append)
    assert bits(model) == bits(state["model"])
    reason = "it belongs to another run: training.seed is 1 in it and 0 in config.json and tokenizer.json"
    assert said == [f"checkpoint {foreign} refused: {reason}; trying the one before it"]
    said.clear()
    assert_ends_like_the_whole(folder, run(folder, scratch, said.append), whole)
    assert said[1:] == [f"resuming after step 50 from {newest}"]
    assert reason in said[0]


def test_a_checkpoint_of_another_place_in_the_batches_is_refused(interrupted, whole, scratch, tmp_path):
    folder, said = tmp_path / "run", []
    shutil.copytree(interrupted, folder)
    config, *_ = training_child.run_arguments(scratch)
    restored = training.restore_latest(folder / "checkpoints", training.initial_state(config))
    assert restored is not None
    state, metadata, newest = restored
    for step, place in ((55, None), (56, 1), (57, 2**70)):
        wrong = metadata | {"step": step, "batches": dict.fromkeys(metadata["batches"], place)}
        training.save_checkpoint(folder / "checkpoints", step, state, wrong, keep=9)
    assert_ends_like_the_whole(folder, run(folder, scratch, said.append), whole)
    assert said[3:] == [f"resuming after step 50 from {newest}"]
    assert all("must hold step, devices and the place in the batches" in line for line in said[:3])


@pytest.mark.parametrize(
    ("name", "value"), [("rope_theta", "10000.0"), ("num_layers", "99999999999")], ids=["equal shapes", "huge"]
)
def test_a_config_that_was_edited_is_noticed_before_a_model_is_made(interrupted, tmp_path, name: str, value: str):
    folder = tmp_path / "run"
    shutil.copytree(interrupted, folder)
    path = folder / "config.json"
    old = json.loads(path.read_text())["model"][name]
    path.write_text(path.read_text().replace(f'"{name}": {old}', f'"{name}": {value}'))
    with pytest.raises(ValueError, match=rf"another run: model.{name} is {old} in it and {value} in config.json"):
        training.load_model(folder, report=lambda line: None)


def test_metrics_that_lost_rows_take_the_run_back_to_a_checkpoint_that_has_its_own(whole, scratch, tmp_path):
    folder, said = tmp_path / "run", []
    shutil.copytree(whole[0], folder)
    path = folder / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-20])
    assert_ends_like_the_whole(folder, run(folder, scratch, said.append), whole)
    assert f"{path} does not begin with the " in said[0]
    assert said[1].startswith("resuming after step 50 from ")


def test_what_another_process_trains_in_is_refused(interrupted, scratch, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(interrupted, folder)
    before = {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    child = "import sys; from pathlib import Path; from rattn_eqx.data.files import lock\n"
    child += "with lock(Path(sys.argv[1]), 'train'): print(flush=True); sys.stdin.read()"
    root = str(Path(__file__).parents[2])
    command = [sys.executable, "-c", child, str(folder)]
    holder = subprocess.Popen(
        command, env=os.environ | {"PYTHONPATH": root}, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert holder.stdout is not None
    holder.stdout.readline()
    with pytest.raises(LockedError, match=f"train: {folder}: process {holder.pid} holds it; wait for that process or"):
        run(folder, scratch)
    training.load_model(folder)
    holder.kill()  # which no lock survives
    holder.communicate()
    assert {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before | {
        ".lock": f"{holder.pid}\n".encode()
    }
    with lock(folder, "test"):
        pass


def test_checkpoints_go_into_a_folder_of_the_run(interrupted, scratch, tmp_path):
    folder, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    shutil.copytree(interrupted, folder)
    (folder / "checkpoints").rename(elsewhere)
    for make in ("symlink_to", "hardlink_to"):
        getattr(folder / "checkpoints", make)({"symlink_to": elsewhere, "hardlink_to": folder / "config.json"}[make])
        with pytest.raises(ValueError, match="checkpoints must be a folder and no link; remove it, or give its place"):
            run(folder, scratch)
        (folder / "checkpoints").unlink()


@pytest.mark.parametrize("synced", [0, 1], ids=["metrics", "checkpoint"])
def test_a_full_disk_leaves_the_last_checkpoint_usable(interrupted, whole, scratch, tmp_path, monkeypatch, synced):
    left = [None] * synced  # files that reach the disk before it is full
    fsync = os.fsync

    def full(descriptor):
        if not left:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        left.pop()
        fsync(descriptor)

    folder, said = tmp_path / "run", []
    shutil.copytree(interrupted, folder)
    before = [path.read_bytes() for path in checkpoints(folder)]
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match=r"step 60 could not be saved: No space left on device; free some") as error:
            run(folder, scratch)
    assert str(folder) in str(error.value)
    assert ("metrics" in str(error.value)) == (synced == 0)
    assert [path.read_bytes() for path in checkpoints(folder)] == before
    assert_ends_like_the_whole(folder, run(folder, scratch, said.append), whole)
    assert said[0].startswith("resuming after step 50 from ")


@pytest.mark.parametrize("bad_gradients", [True, False])
def test_bad_steps_are_skipped_and_a_loss_that_stays_bad_stops_the_run(scratch, tmp_path, monkeypatch, bad_gradients):
    config, tokens, _, tokenizer = training_child.run_arguments(scratch, checkpoint_every=5)
    batches = training_batches(tokens, context=32, batch_size=2, seed=0, document=tokenizer.document)
    drawn = [next(batches) for _ in range(30)]
    batches.close()
    sums = [int(batch["tokens"].sum()) for batch in drawn]
    bad = [3, 4, *range(8, 31)]  # steps
    assert len(set(sums)) == len(sums)
    really, bad_sums = stepping.mean_loss, jnp.array([sums[step - 1] for step in bad])

    def mean_loss(model, batch):
        factor = jnp.where(jnp.any(batch["tokens"].sum() == bad_sums), jnp.nan, 1.0)
        loss = really(model, batch)
        return factor * loss if bad_gradients else loss + jax.lax.stop_gradient(factor - 1.0)

    monkeypatch.setattr(objectives, "mean_loss", mean_loss)
    folder, said = tmp_path / "run", []
    with pytest.raises(FloatingPointError, match="not finite for 10 steps in a row, up to step 17; lower the learning"):
        run(folder, scratch, said.append, checkpoint_every=5)
    rows = [row for row in read_metrics(folder) if "bits_per_byte" in row]
    assert [row["step"] for row in rows if row["bits_per_byte"] is None] == [3, 4, *range(8, 18)]
    assert [row["gradient_norm"] is None for row in rows] == [bad_gradients and row["step"] in bad for row in rows]
    assert [row["skipped"] for row in rows[:8]] == [0, 0, 1, 2, 2, 2, 2, 3]
    rate = stepping.learning_rate_schedule(config.training)
    assert [row["learning_rate"] for row in rows[4:7]] == [float(np.asarray(rate(step))) for step in (2, 3, 4)], (
        "rate moved on"
    )
    assert said[0] == "step 3: loss or gradients were not finite; step skipped (1 so far)"
    assert len(said) == 12

    # The checkpoint written meanwhile holds what training on the good batches alone gives.
    restored = training.restore_latest(folder / "checkpoints", training.initial_state(config), report=pytest.fail)
    assert restored is not None
    assert restored[1]["step"] == 15
    monkeypatch.undo()
    state, mesh = training.initial_state(config), batch_mesh(2)
    parameters, static = eqx.partition(state["model"], eqx.is_array)
    step, optimizer_state = stepping.make_step(static, config.training, mesh), state["optimizer"]
    for number in (1, 2, 5, 6, 7):
        parameters, optimizer_state, *_ = step(parameters, optimizer_state, drawn[number - 1])
    got = jax.tree.leaves((eqx.filter(restored[0]["model"], eqx.is_array), restored[0]["optimizer"].inner_state))
    expected = jax.tree.leaves((parameters, optimizer_state.inner_state))
    for x, y in zip(got, expected, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-5)

    model, _, _ = training.load_model(folder)
    assert bits(model) == bits(restored[0]["model"])


def one_step(scratch: Path, **changes):
    """Loss, gradient norm and AdamW's first moment, which is linear in the gradients, after one step."""
    config, tokens, _, tokenizer = training_child.run_arguments(scratch, **changes)
    batches = training_batches(tokens, context=32, batch_size=2, seed=0, document=tokenizer.document)
    batch = next(batches)
    batches.close()
    state = training.initial_state(config)
    parameters, static = eqx.partition(state["model"], eqx.is_array)
    step = stepping.make_step(static, config.training, batch_mesh(2 // config.training.microbatches))
    _, optimizer_state, loss, norm = step(parameters, state["optimizer"], batch)
    return float(loss), float(norm), jax.tree.leaves(optimizer_state.inner_state[1][0].mu)


def test_microbatches_change_nothing_but_rounding(scratch):
    loss, norm, moments = one_step(scratch)
    loss_of_pieces, norm_of_pieces, moments_of_pieces = one_step(scratch, microbatches=2)
    assert loss_of_pieces == pytest.approx(loss, rel=1e-6)
    assert norm_of_pieces == pytest.approx(norm, rel=1e-5)
    for x, y in zip(moments_of_pieces, moments, strict=True):
        assert relative_rms(x, y) < 1e-5


def run_on_two_devices(folder: Path, scratch: Path) -> str:
    command = [sys.executable, training_child.__file__, str(folder), str(scratch), "2", json.dumps({})]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=True).stdout


def test_going_on_with_another_number_of_devices_is_said(interrupted, scratch, tmp_path):
    shutil.copytree(interrupted, tmp_path / "run")
    said = run_on_two_devices(tmp_path / "run", scratch)
    assert "on 2 device(s), not the 1 of before: results differ by rounding" in said


def test_two_devices_give_the_same_to_rounding(whole, scratch):
    folder = scratch / "two_devices"
    run_on_two_devices(folder, scratch)
    on_two, on_one = curve(folder), curve(whole[0])
    assert [row["step"] for row in on_two] == [row["step"] for row in on_one]
    for two, one in zip(on_two[:6], on_one[:6], strict=True):
        assert two == pytest.approx(one, rel=1e-3), "rounding grows with the steps"
    assert on_two[0] == pytest.approx(on_one[0], rel=1e-5)
    assert on_two[-1] == pytest.approx(on_one[-1], rel=0.05)


class Toy(eqx.Module):
    up_weight: jax.Array
    gain: jax.Array


def by_hand(config, gradients: list[dict[str, np.ndarray]], parameters: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """AdamW and RMSProp with momentum in float64 NumPy, with clipping, decay of up_weight, and the schedule."""
    first = {name: np.zeros(2) for name in parameters}
    second = {name: np.zeros(2) for name in parameters}
    for count, gradient in enumerate(gradients):
        norm = np.sqrt(sum((g**2).sum() for g in gradient.values()))
        if count < config.warmup_steps:
            rate = config.learning_rate * count / config.warmup_steps
        else:
            share = (count - config.warmup_steps) / (config.steps - config.warmup_steps)
            rate = config.learning_rate * 0.5 * (1 + np.cos(np.pi * share))
        for name, g in gradient.items():
            g = g / max(1, norm / config.clip_norm)
            second[name] = 0.95 * second[name] + 0.05 * g**2
            if config.optimizer == "adamw":
                first[name] = 0.9 * first[name] + 0.1 * g
                root = np.sqrt(second[name] / (1 - 0.95 ** (count + 1)))
                update = first[name] / (1 - 0.9 ** (count + 1)) / (root + 1e-8)
            else:
                first[name] = 0.9 * first[name] + g / (np.sqrt(second[name]) + 1e-8)
                update = first[name]
            decay = config.weight_decay * parameters[name] if name == "up_weight" else 0
            parameters = parameters | {name: parameters[name] - rate * (update + decay)}
    return parameters


@pytest.mark.parametrize(
    ("loss", "size", "skipped"), [(1.0, 1e15, 0), (1.0, 1e30, 1), (math.inf, 1.0, 1), (math.nan, 1.0, 1)]
)
def test_a_step_is_skipped_for_its_loss_or_a_norm_that_overflows(loss, size, skipped):
    optimizer = stepping.make_optimizer(training_child.training(warmup_steps=0))
    parameters: Any = Toy(jnp.ones(2), jnp.ones(2))
    gradients = jax.tree.map(lambda x: size * x, parameters)
    state: Any = optimizer.init(parameters)
    found: Any = stepping.train_step(lambda *_: (jnp.float32(loss), gradients), optimizer, parameters, state, None)
    after, state_after, *_ = found
    assert int(state_after.total_notfinite) == int(state_after.notfinite_count) == skipped
    assert (bits((after, state_after.inner_state)) == bits((parameters, state.inner_state))) == bool(skipped)


@pytest.mark.parametrize("optimizer", ["adamw", "rmsprop"])
def test_optimizers_by_hand(optimizer):
    config = training_child.training(steps=6, warmup_steps=2, optimizer=optimizer, weight_decay=0.5)
    generator = np.random.default_rng(0)
    draw = lambda size: {name: size * generator.standard_normal(2) for name in ("up_weight", "gain")}
    start, gradients = draw(1), [draw(size) for size in (3, 0.1, 1, 5, 0.3)]
    expected = by_hand(config, gradients, start)
    update = stepping.make_optimizer(config)
    as_toy: Any = lambda values: Toy(**{name: jnp.asarray(value, jnp.float32) for name, value in values.items()})
    parameters: Any = as_toy(start)
    state = update.init(parameters)
    for gradient in gradients:
        changes, state = update.update(as_toy(gradient), state, parameters)
        parameters = eqx.apply_updates(parameters, changes)
    for name, value in expected.items():
        np.testing.assert_allclose(getattr(parameters, name), value, rtol=1e-5)


def test_a_non_finite_gradient_changes_no_bit():
    update: Any = stepping.make_optimizer(training_child.training(warmup_steps=0))
    parameters: Any = Toy(jnp.ones(2), jnp.ones(2))
    state: Any = update.init(parameters)
    for bad in (jnp.nan, jnp.inf):
        changes, after = update.update(Toy(jnp.array([1.0, bad]), jnp.ones(2)), state, parameters)
        assert bits(eqx.apply_updates(parameters, changes)) == bits(parameters)
        assert bits(after.inner_state) == bits(state.inner_state)
        assert int(after.total_notfinite) == int(state.total_notfinite) + 1
        state = after


def test_rmsprop_trains(scratch):
    config, tokens, _, tokenizer = training_child.run_arguments(scratch, optimizer="rmsprop", learning_rate=1e-3)
    config = dataclasses.replace(
        config, model=dataclasses.replace(config.model, pattern=("global",))
    )  # fast to compile
    batches = training_batches(tokens, context=32, batch_size=2, seed=0, document=tokenizer.document)
    state = training.initial_state(config)
    parameters, static = eqx.partition(state["model"], eqx.is_array)
    step, optimizer_state, losses = stepping.make_step(static, config.training, batch_mesh(2)), state["optimizer"], []
    for _ in range(60):
        parameters, optimizer_state, loss, _ = step(parameters, optimizer_state, next(batches))
        losses.append(float(loss))
    batches.close()
    assert np.mean(losses[-10:]) < 0.75 * losses[0]


def test_weight_decay_acts_on_the_matrices_alone():
    config = dataclasses.replace(
        training_child.MODEL,
        num_layers=2,
        pattern=("local", "global"),
        num_meta_tokens=2,
        learned_feature_scale=True,
        tie_embeddings=False,
    )
    model = eqx.filter_eval_shape(LanguageModel, config, key=jax.random.key(0))
    decayed = stepping.is_decayed(eqx.filter(model, lambda leaf: isinstance(leaf, jax.ShapeDtypeStruct)))
    names = {jax.tree_util.keystr(path): value for path, value in jax.tree_util.tree_leaves_with_path(decayed)}
    attention = ("query_weight", "key_weight", "value_weight", "out_weight")
    expected = {f".blocks[{i}].attention.projections.{name}" for i in (0, 1) for name in attention}
    expected |= {f".blocks[{i}].feed_forward.{name}_weight" for i in (0, 1) for name in ("gate", "up", "down")}
    assert {name for name, value in names.items() if value} == expected
    left_out = {".embedding", ".head", ".final_norm.weight", ".blocks[0].attention.rla_gain"}
    assert left_out <= {name for name, value in names.items() if not value}, sorted(names)


def test_learning_rate_schedule():
    rate = stepping.learning_rate_schedule(training_child.training(steps=110, warmup_steps=10, learning_rate=2.0))
    expected = {0: 0.0, 5: 1.0, 10: 2.0, 35: 1 + math.sqrt(0.5), 60: 1.0, 110: 0.0}
    assert {step: float(np.asarray(rate(step))) for step in expected} == pytest.approx(expected, abs=1e-6)
    rate = stepping.learning_rate_schedule(training_child.training(warmup_steps=0, learning_rate=2.0))
    assert np.asarray(rate(0)) == 2.0


def test_a_folder_without_a_checkpoint_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"no config.json; start one with `rattn pretrain`"):
        training.load_model(tmp_path)
    config = RunConfig(training_child.MODEL, training_child.training(), "0" * 64)
    training.open_run(tmp_path / "run", config, training.load_tokenizer(write_byte_tokenizer(tmp_path)))
    with pytest.raises(ValueError, match="has no checkpoint yet; let `rattn pretrain` reach its first one"):
        training.load_model(tmp_path / "run")


def write_byte_tokenizer(folder: Path) -> Path:
    path = folder / "tokenizer.json"
    path.write_text('{"kind": "byte"}')
    return path
