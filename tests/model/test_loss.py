"""The loss by blocks of tokens is the loss: its values, its gradients, and how little memory it takes."""

import dataclasses
import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import AS_USERS
from test_modules import CONFIG, make_model
from training_child import training

from pallas.numerics import relative_rms
from rattn_eqx.model import language_model
from rattn_eqx.model.sharding import batch_mesh
from rattn_eqx.training.step import make_optimizer, make_step, mean_loss

T = 21
FAST = dataclasses.replace(CONFIG, num_layers=1, pattern=("global",))  # fast to compile
draw = np.random.default_rng(0).integers
BATCH = {name: jnp.asarray(draw(0, 13, (3, T)), jnp.int32) for name in ("tokens", "targets")}
BATCH["segment_ids"] = jnp.asarray(np.sort(draw(0, 3, (3, T))), jnp.int32)
MASKS = [jnp.asarray(draw(0, 2, (3, T)), bool), jnp.asarray(draw(0, 5, (3, T)) == 0), jnp.zeros((3, T), bool)]


@pytest.fixture
def by_blocks(monkeypatch: pytest.MonkeyPatch):
    """Calls what it is given with logits formed at once, then by blocks of 4 of the 63 tokens, 3 left at the end."""

    def both(function):
        at_once = function()
        monkeypatch.setattr(language_model, "MAX_LOGITS", 7 * 13)
        jax.clear_caches()
        whole = jax.make_jaxpr(lambda m: mean_loss(m, BATCH))(make_model(FAST))
        assert f"f32[3,{T},13]" not in str(whole), "the logits are formed at once"
        return at_once, function()

    return both


def loss_and_gradients(model, masks=()):
    loss = lambda model: mean_loss(model, BATCH, masks)
    return jax.jit(jax.value_and_grad(loss))(model)


def by_hand(model, masks):
    """The loss and its gradient to the head, from the final stream on, in float64 NumPy."""
    stream = jnp.stack([model.final_stream(*x) for x in zip(BATCH["tokens"], BATCH["segment_ids"], strict=True)])
    x, head = np.asarray(stream, np.float64), np.asarray(model.head, np.float64)
    masks = np.asarray(masks or [np.ones((3, T), bool)], np.float64)
    weights = np.sum(masks / np.maximum(1, masks.sum((1, 2), keepdims=True)), axis=0)
    softmax = np.exp(x @ head) / np.exp(x @ head).sum(-1, keepdims=True)
    hot = np.eye(13)[np.asarray(BATCH["targets"])]
    loss = -np.sum(weights * np.log(np.sum(softmax * hot, axis=-1)))
    return loss, np.einsum("btm,btv->mv", x, (softmax - hot) * weights[..., None])


@pytest.mark.parametrize(("tied", "masks"), [(True, ()), (False, ()), (False, MASKS)], ids=["tied", "untied", "scored"])
def test_blocks_change_nothing_but_rounding(by_blocks, tied, masks):
    model = make_model(dataclasses.replace(FAST, tie_embeddings=tied))
    found = by_blocks(functools.partial(loss_and_gradients, model, masks))
    for x, y in zip(*map(jax.tree.leaves, found), strict=True):
        assert relative_rms(x, y) < 1e-6
    if not tied:
        loss, head = by_hand(model, masks)
        for value, gradients in found:
            assert abs(value - loss) < 1e-6 * loss
            assert relative_rms(gradients.head, head) < 1e-6


def test_blocks_under_vmap(by_blocks):
    """As ablations are trained: a model for each seed."""
    models = jax.tree.map(lambda x: jnp.stack([x, 0.5 * x]), make_model(FAST))
    found = by_blocks(lambda: jax.vmap(lambda model: loss_and_gradients(model, MASKS))(models))
    for x, y in zip(*map(jax.tree.leaves, found), strict=True):
        assert relative_rms(x, y) < 1e-6


@pytest.mark.standard_dtype_promotion  # optax
@pytest.mark.parametrize(
    ("changes", "bound"),
    [({"microbatches": 3, "rematerialise": True}, 1e-6), ({"compute_dtype": "bfloat16"}, 3e-3)],
    ids=["microbatches", "bfloat16"],
)
def test_blocks_in_a_step(by_blocks, changes, bound):
    """Under `shard_map`, with donated parameters. The first moment of AdamW is linear in the gradients."""
    settings = training(batch_size=3, **changes)
    options = {name: changes[name] for name in ("compute_dtype", "rematerialise") if name in changes}

    def step():
        parameters, static = eqx.partition(make_model(FAST, **options), eqx.is_array)
        state = make_optimizer(settings).init(parameters)
        _, state, loss, norm = make_step(static, settings, batch_mesh(1))(parameters, state, BATCH)
        return loss, norm, state.inner_state[1][0].mu

    for x, y in zip(*map(jax.tree.leaves, by_blocks(step)), strict=True):
        assert relative_rms(x, y) < bound


PROGRAM = """
import json, resource, sys
import equinox as eqx, jax
from rattn_eqx.model.config import ModelConfig
from rattn_eqx.training.config import TrainConfig
from rattn_eqx.training.step import build_model, make_optimizer, make_step

settings = TrainConfig(steps=10, batch_size=32, context=1024, learning_rate=1e-3, warmup_steps=1)
found = []
for vocabulary_size in (256, 50_000):
    config = ModelConfig(vocabulary_size, 32, 1, 1, 1, 32, 32, window=64, pattern=("local",), tie_embeddings=False)
    parameters, static = eqx.partition(build_model(config, settings, key=jax.random.key(0)), eqx.is_array)
    state = make_optimizer(settings).init(parameters)
    draw = lambda seed: jax.random.randint(jax.random.key(seed), (32, 1024), 0, vocabulary_size)
    batch = {"tokens": draw(1), "targets": draw(2)}
    step = make_step(static, settings).lower(parameters, state, batch).compile()
    planned = step.memory_analysis().temp_size_in_bytes
    jax.block_until_ready(step(parameters, state, batch))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    found.append([planned, peak])
print(json.dumps(found))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="POSIX resource usage")
def test_a_large_vocabulary_takes_little_more_memory_than_a_small_one():
    """A step of 32,768 tokens; the head, its gradient and its optimiser state count, and are small."""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "JAX_PLATFORMS": "cpu"} | AS_USERS
    run = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, timeout=400)
    assert run.returncode == 0, run.stderr
    (planned, peak), (planned_large, peak_large) = json.loads(run.stdout)
    print(f"vocabulary of 50,000 less 256: planned {(planned_large - planned) / 1e9:.2f} GB, "
          f"resident {(peak_large - peak) / 1e9:.2f} GB")  # fmt: skip
    assert planned_large - planned < 1.5e9
    assert peak_large - peak < 1.5e9
